"""pFedAFM by hand: which step trains what, the mixture per feature, and faults of the released code as ablations."""

import dataclasses

import pytest
import tiny
import torch
from torch import nn

from consilium.algorithms import pfedafm
from consilium.algorithms.fedmrl import FedMRL
from consilium.algorithms.pfedafm import FeatureMixture, pFedAFM
from consilium.core import Payload
from consilium.errors import ConfigError
from consilium.moe.merging import Merging


def setup(world="cohort"):
    """Both extractors end in features of the width 6."""
    return tiny.small_setup(world, clients_per_round=4)


class Constant(nn.Module):
    """An extractor that always says the same."""

    width = 2

    def __init__(self, *values):
        super().__init__()
        self.values = torch.tensor(values)

    def forward(self, x):
        return self.values.expand(len(x), 2)


def test_the_mixture_by_hand():
    """a = (1, 1/4): the first feature is F's alone, the second a quarter F's: 8/4 + 3 * 4/4 = 5."""
    made = FeatureMixture(Constant(2.0, 8.0), Constant(6.0, 4.0))
    made.alpha.data = torch.tensor([1.0, 0.25])
    assert made(torch.zeros(1, 3)).tolist() == [[2.0, 5.0]]
    made.alpha.data = torch.tensor([1.5, -0.5])
    made.train()(torch.zeros(1, 3))
    assert made.alpha.tolist() == [1.0, 0.0]  # clamped


def trained(method, world="cohort", client="animal-00"):
    made = setup(world)
    server, half = method.server(made), method.client(made)
    context = tiny.small_context(client, world)
    sent = server.deliver(context.info)
    return sent, half.train(sent, context), context


def test_only_the_shared_extractor_leaves_a_client():
    sent, reply, context = trained(pFedAFM())
    assert set(reply.groups) == {"params"} and reply.group("params").keys() == sent.group("params").keys()
    assert all(key.startswith("shared.") for key in sent.group("params"))
    kept = context.state.params
    assert "alpha" in kept and all(key.startswith(("private.", "head.")) or key == "alpha" for key in kept)
    assert ((kept["alpha"] >= 0) & (kept["alpha"] <= 1)).all()
    assert any(not torch.equal(t, sent.group("params")[key]) for key, t in reply.group("params").items())


def test_the_first_step_does_not_touch_g_and_the_second_nothing_else(monkeypatch):
    seen = []
    fit, train = pfedafm.fit, pfedafm.trained
    monkeypatch.setattr(pfedafm, "fit", lambda model, *a, **k: (seen.append(names(model)), fit(model, *a, **k))[1])
    monkeypatch.setattr(
        pfedafm, "trained", lambda s, model, *a, **k: (seen.append(names(model)), train(s, model, *a, **k))[1]
    )
    trained(pFedAFM())
    first, second = seen
    assert "backbone.alpha" in first and "head.weight" in first and not any(".shared." in path for path in first)
    assert second and all(path.startswith("backbone.shared.") for path in second)


def names(model):
    """Paths of what is trained."""
    return {path for path, p in model.named_parameters() if p.requires_grad}


def test_the_server_averages_what_it_was_sent():
    """Weights 1 and 3, values 0 and 4: 3. With "last", the last client's 4; whatever the weights."""
    made = setup()
    for method, expected in ((pFedAFM(), 3.0), (pFedAFM(aggregation="last"), 4.0), (FedMRL(aggregation="last"), 4.0)):
        server = method.server(made)
        replies = [
            (c, Payload({"params": {k: torch.full_like(t, v) for k, t in server.params.items()}}, {"num_examples": n}))
            for c, v, n in (("animal-00", 0.0, 1), ("animal-01", 4.0, 3))
        ]
        server.aggregate(1, iter(replies))
        assert all((t == expected).all() for t in server.params.values())


def test_with_shared_alpha_the_next_client_begins_with_the_last_ones():
    sent, reply, context = trained(pFedAFM(aggregation="last", shared_alpha=True))
    assert "alpha" in sent.group("params") and "alpha" in reply.group("params") and "alpha" not in context.state.params


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ConfigError, match="part of aggregation 'last'"):
        pFedAFM(shared_alpha=True).server(setup())
    with pytest.raises(ConfigError, match="averages nothing"):
        pFedAFM(aggregation="last").server(dataclasses.replace(setup(), merging=Merging(clip=1.0)))
