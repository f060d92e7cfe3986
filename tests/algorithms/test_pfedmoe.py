"""pFedMoE: mixing, gate and gradients by hand, what travels key by key, the options.

The hand-made mixture: x = [[1, 2], [0, 1]], G(x) = x, F(x) = x W with F = [[4, 8], [2, 0]].
"""

import dataclasses
import math

import pytest
import tiny
import torch
from torch import nn

from consilium.algorithms.pfedmoe import BatchNorm, Gate, Mixture, SwitchableNorm, pFedMoE
from consilium.core import Payload
from consilium.errors import ConfigError, PayloadError
from consilium.models.cohort import ARCHITECTURES

X = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
G = X
F = torch.tensor([[4.0, 8.0], [2.0, 0.0]])


def linear(weight):
    made = nn.Linear(2, 2)
    made.width = 2
    with torch.no_grad():
        made.weight.copy_(torch.tensor(weight))
        made.bias.zero_()
    return made


def mixture(**options):
    """F = x W: [1, 2] -> [4, 8] and [0, 1] -> [2, 0] for W = [[0, 2], [8, 0]] as rows of nn.Linear."""
    made = Mixture(linear([[1.0, 0.0], [0.0, 1.0]]), linear([[0.0, 2.0], [8.0, 0.0]]), 2, pFedMoE(m=4, **options))
    if hasattr(made, "gate"):  # weights [3/4, 1/4] whatever it reads: logits ln 3 and 0
        with torch.no_grad():
            made.gate.linear2.weight.zero_()
            made.gate.linear2.bias.copy_(torch.tensor([math.log(3), 0.0]))
    return made


# --- R = a_G G + a_F F ------------------------------------------------------------------------------------------------


def test_mixing_by_hand():
    """3/4 [1, 2] + 1/4 [4, 8] = [1.75, 3.5]; 3/4 [0, 1] + 1/4 [2, 0] = [0.5, 0.75]."""
    r, a = mixture(norm="layer").mix(X)
    torch.testing.assert_close(a, torch.tensor([[0.75, 0.25]] * 2))
    torch.testing.assert_close(r, torch.tensor([[1.75, 3.5], [0.5, 0.75]]))


@pytest.mark.parametrize(
    ("mixing", "expected"), [("static", 0.5 * G + 0.5 * F), ("shared", G), ("local", 0.75 * G + 0.25 * F)]
)
def test_the_options_by_hand(mixing, expected):
    torch.testing.assert_close(mixture(norm="layer", mixing=mixing)(X), expected)


def test_a_gate_on_features_reads_both_representations():
    made = mixture(norm="layer", gate_input="features")
    assert made.gate.linear1.in_features == 4
    torch.testing.assert_close(made(X), 0.75 * G + 0.25 * F)


@pytest.mark.parametrize("gate_input", ["raw", "features"])
def test_the_weights_alone_are_those_of_the_mixture(gate_input):
    made = mixture(norm="layer", gate_input=gate_input)
    nn.init.normal_(made.gate.linear2.weight)
    assert torch.equal(made.weights(X), made.mix(X)[1])


def test_one_backward_reaches_all_three_by_hand():
    """L = sum of all of R. dL/dz_G = a_G a_F (sum g - sum f): 3/16 (3 - 12) + 3/16 (1 - 2) = -1.875, dL/dz_F = 1.875.
    dL/d bias of G: a_G once per example, 1.5; of F: 0.5."""
    made = mixture(norm="layer")
    made(X).sum().backward()
    torch.testing.assert_close(made.gate.linear2.bias.grad, torch.tensor([-1.875, 1.875]))
    torch.testing.assert_close(made.shared.bias.grad, torch.tensor([1.5, 1.5]))
    torch.testing.assert_close(made.private.bias.grad, torch.tensor([0.5, 0.5]))


def test_unequal_widths_are_joined():
    shared = linear([[1.0, 0.0], [0.0, 1.0]])
    private = nn.Linear(2, 3)
    private.width = 3
    made = Mixture(shared, private, 2, pFedMoE(mixing="static"))
    torch.testing.assert_close(made(X), 0.5 * made.join(X) + 0.5 * private(X))


# --- the gate ---------------------------------------------------------------------------------------------------------


def test_the_papers_gate_by_hand():
    """x = [[0, 2], [2, 0]]: means 1 and variances 1 over example and batch alike, so norm0 gives [[-1, 1], [1, -1]].
    linear1 takes the first: [-1, 1], which norm1 keeps; sigmoid: s = .268941, .731059. linear2 gives [s, -s], which
    norm2 brings to [[-1, 1], [1, -1]]; softmax of (1, -1) is 1 / (1 + e^-2) = .880797."""
    gate = Gate(2, 1, "batch")
    with torch.no_grad():
        gate.linear1.weight.copy_(torch.tensor([[1.0, 0.0]]))
        gate.linear2.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        gate.linear1.bias.zero_()
        gate.linear2.bias.zero_()
        gate.norm2.weight.fill_(1.0)
    expected = torch.tensor([[0.119203, 0.880797], [0.880797, 0.119203]])
    torch.testing.assert_close(gate(torch.tensor([[0.0, 2.0], [2.0, 0.0]])), expected, atol=1e-4, rtol=0)


def test_an_untrained_gate_mixes_evenly_and_can_learn():
    """A batch norm in front of the softmax would spread an untrained gate's weights from 0 to 1."""
    gate, x = Gate(6, 8, "batch"), torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    a = gate(x)
    assert torch.equal(a, torch.full_like(a, 0.5))
    a[:, 0].mul(torch.linspace(0, 1, 64)).sum().backward()
    assert gate.norm2.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize("norm", ["batch", "layer", "group"])
@pytest.mark.parametrize("training", [True, False])
def test_weights_sum_to_one(norm, training):
    gate = Gate(6, 8, norm).train(training)
    for size in (1, 2, 5):  # a single example too
        a = gate(torch.randn(size, 6, generator=torch.Generator().manual_seed(size)))
        assert a.shape == (size, 2) and (a >= 0).all()
        torch.testing.assert_close(a.sum(1), torch.ones(size))


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_without_batch_statistics_nobody_depends_on_the_neighbours(norm):
    gate, x = Gate(6, 8, norm), torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gate(x)[:1], gate(x[:1]))


def test_switchable_norm_by_hand():
    """x = [[1, 3], [3, 9]]: own means 2, 6 and variances 1, 9; batch means 2, 6 and variances 1, 9. Equal weights:
    first entry mean (2 + 2) / 2, variance (1 + 1) / 2: (1 - 2) / 1; second of the first row: mean 4, variance 5."""
    norm = SwitchableNorm(2, eps=0.0)
    x = torch.tensor([[1.0, 3.0], [3.0, 9.0]])
    expected = torch.tensor([[-1.0, -1 / math.sqrt(5)], [-1 / math.sqrt(5), 1.0]])
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm.running_mean, torch.tensor([0.2, 0.6]))
    torch.testing.assert_close(norm.running_var, torch.tensor([1.0, 1.8]))


def test_a_batch_of_one_is_normalised_by_the_running_statistics():
    norm = BatchNorm(2)
    norm.running_mean.fill_(1.0)
    torch.testing.assert_close(norm(torch.tensor([[2.0, 1.0]])), torch.tensor([[1.0, 0.0]]), atol=1e-4, rtol=0)
    assert norm.running_mean.tolist() == [1.0, 1.0]


# --- what travels -----------------------------------------------------------------------------------------------------


def trained(algorithm=None, client="animal-01", world="mixed", **fit):
    algorithm = algorithm or pFedMoE(m=4)
    setup = tiny.small_setup(world, **fit)
    server, half = algorithm.server(setup), algorithm.client(setup)
    context = tiny.small_context(client, world)
    sent = server.deliver(context.info)
    return sent, half.train(sent, context), context, (server, half)


def test_what_leaves_a_client_key_by_key():
    """animal-01 has the MLP; it stays with head and gate. The shared extractor, an MLP too, goes out and back."""
    sent, reply, context, _ = trained()
    shared = {"shared.1.weight", "shared.1.bias", "shared.3.weight", "shared.3.bias"}
    assert sent.groups.keys() == reply.groups.keys() == {"params"}
    assert sent.group("params").keys() == reply.group("params").keys() == shared
    assert not sent.scalars
    assert {key for key in reply.scalars if not key.startswith("report/")} == {
        "num_examples", "validation", "train_loss", "steps", "cut", "seconds_evaluate",
    }  # fmt: skip
    assert {key for key in reply.scalars if key.startswith("report/")} == {
        "report/test before aggregation", "report/gate a", "report/gate b", "report/gate c",
    }  # fmt: skip
    own = {f"private.{i}.{leaf}" for i in (1, 3) for leaf in ("weight", "bias")}
    own |= {f"head.corner.{label}.{leaf}" for label in "abc" for leaf in ("weight", "bias")}
    kept = context.state.params.keys()
    assert own < kept and all(key.startswith("gate.") for key in kept - own)
    assert {"gate.norm0.weight", "gate.norm1.bias", "gate.linear1.weight"} < kept
    assert all(0 <= reply.scalars[f"report/gate {label}"] <= 1 for label in "abc")


def test_an_all_private_mixture_sends_nothing_and_has_as_many_parameters():
    sent, reply, context, _ = trained(pFedMoE(m=4, mixing="local"))
    assert sent.nbytes == reply.nbytes == 0 and not sent.group("params") and not reply.groups
    _, shared, whole, _ = trained()
    assert context.state.params.keys() == whole.state.params.keys() | shared.group("params").keys()


def test_aggregation_by_hand():
    """n_k = 1 and 3: (1 * 4 + 3 * 8) / 4 = 7."""
    server = pFedMoE().server(tiny.small_setup())

    def reply(value, n):
        params = {key: torch.full_like(t, value) for key, t in server.params.items()}
        return Payload({"params": params}, {"num_examples": n})

    server.aggregate(1, iter([("animal-00", reply(4.0, 1)), ("animal-01", reply(8.0, 3))]))
    assert all((t == 7).all() for t in server.params.values())


def test_a_client_goes_on_from_its_state_and_the_received_extractor():
    sent, _, context, (_, half) = trained()
    before = dict(context.state.params)
    moved = Payload({"params": {key: t + 1 for key, t in sent.group("params").items()}})
    model = half._model(moved, context)
    torch.testing.assert_close(model.backbone.shared[1].bias.detach(), moved.group("params")["shared.1.bias"])
    torch.testing.assert_close(model.backbone.private[1].bias.detach(), before["private.1.bias"])
    half.train(moved, tiny.small_context("animal-01", round=2, state=context.state))
    assert not torch.equal(before["gate.linear1.weight"], context.state.params["gate.linear1.weight"])


def test_a_client_may_predict_with_the_extractor_it_trained():
    _, reply, context, (_, half) = trained(pFedMoE(m=4, deploy="trained"))
    assert tiny.same({k: context.state.params[k] for k in reply.group("params")}, reply.group("params"))
    moved = Payload({"params": {key: t + 100 for key, t in reply.group("params").items()}})
    assert tiny.payloads_equal(half.evaluate(moved, context), half.evaluate(reply, context))
    model = half._model(moved, context)  # but it trains the one it receives
    assert torch.equal(model.backbone.shared[1].bias.detach(), moved.group("params")["shared.1.bias"])


def test_all_methods_begin_alike():
    """A client's own model is the one that Standalone begins with; the shared extractor is the server's."""
    setup = tiny.small_setup()
    context = tiny.small_context("animal-00")
    half = pFedMoE().client(setup)
    begun = half._initial(context)
    own = setup.initial_params(context.info)
    assert tiny.same({k: begun[k if k.startswith("head.") else f"private.{k}"] for k in own}, own)
    server = pFedMoE().server(tiny.small_setup())
    assert tiny.same({k: begun[k] for k in server.params}, server.params)
    half.train(Payload({"params": server.params}), context)  # the next of its kind begins as it has begun
    assert half._initial(context) is begun
    assert tiny.same(begun, pFedMoE().client(setup)._initial(context))


# --- one model for clients of a kind ----------------------------------------------------------------------------------


def rounds(fresh):
    """Two rounds of two clients of one architecture, trained and scored; fresh: each by a client's half of its own."""
    setup, told, states = tiny.small_setup("cohort", batch_size=8), [], {}
    server, half = pFedMoE(m=4).server(setup), pFedMoE(m=4).client(setup)
    for number in (1, 2):
        for client in ("animal-00", "animal-01"):
            half = pFedMoE(m=4).client(setup) if fresh else half
            context = tiny.small_context(client, "cohort", number, states.get(client))
            told.append(half.train(server.deliver(context.info), context))
            told.append(half.evaluate(server.deliver(context.info), context))
            states[client] = context.state
    return told, states, half


def test_a_model_that_is_used_again_remembers_nothing():
    """Weights, running statistics and scores are those of a model made anew, to the bit."""
    (told, states, half), (expected, others, _) = rounds(fresh=False), rounds(fresh=True)
    assert len(half.used) == 1
    for a, b in zip(told, expected, strict=True):
        assert tiny.same(a.group("params"), b.group("params"))
        assert {k: v for k, v in a.scalars.items() if "seconds" not in k} == {
            k: v for k, v in b.scalars.items() if "seconds" not in k
        }
    assert all(tiny.same(states[client].params, others[client].params) for client in states)


def test_what_a_client_sent_and_kept_stays_when_its_model_goes_on():
    sent, reply, context, (_, half) = trained()
    kept = {key: t.clone() for key, t in {**context.state.params, **reply.group("params")}.items()}
    (model,) = half.used.values()
    half.train(sent, tiny.small_context("colour-01"))
    assert [*half.used.values()] == [model]  # another client has had it
    assert tiny.same({**context.state.params, **reply.group("params")}, kept)


def test_models_are_kept_by_architecture_and_labels():
    sent, _, _, (_, half) = trained()
    half.train(sent, tiny.small_context("animal-00"))  # a CNN
    assert len(half.used) == 2
    relabelled = tiny.small_context("colour-01")
    task = dataclasses.replace(relabelled.data.task, labels=("c", "b", "a"))
    data = dataclasses.replace(relabelled.data, task=task)
    assert half._model(sent, dataclasses.replace(relabelled, data=data)).labels == ("c", "b", "a")
    assert len(half.used) == 2


def test_a_used_model_refuses_what_a_new_one_would():
    sent, _, context, (_, half) = trained()
    low = Payload({"params": {key: t.half() for key, t in sent.group("params").items()}})
    with pytest.raises(PayloadError, match="float16"):
        half.train(low, context)
    assert not half.used


def test_a_module_of_the_users_is_made_anew():
    """It may remember anything."""
    setup = tiny.small_setup("cohort")
    own = dataclasses.replace(setup.model, architectures=(f"{__name__}:flat",))
    setup = dataclasses.replace(setup, model=own)
    server, half = pFedMoE(m=4).server(setup), pFedMoE(m=4).client(setup)
    context = tiny.small_context("animal-00", "cohort")
    info = dataclasses.replace(context.info, architecture=own.architecture(0))
    half.train(server.deliver(info), dataclasses.replace(context, info=info))
    assert not half.used


def flat(shape):
    """An architecture of the user's."""
    made = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 6))
    made.width = 6
    return made


def test_the_three_learning_rates_are_the_three_parts():
    """One step of SGD from the same weights: twice the rate, twice the way, and nobody else moves otherwise."""
    ways = {}
    for name in ("none", "eta_theta", "eta_omega", "eta_phi"):
        rates = {"eta_theta": 10.0, "eta_omega": 10.0, "eta_phi": 10.0} | ({name: 20.0} if name != "none" else {})
        _, reply, context, (_, half) = trained(pFedMoE(m=4, **rates), batch_size=8)
        begun = half._initial(context)
        after = {**context.state.params, **reply.group("params")}
        ways[name] = {key: after[key] - t for key, t in begun.items() if "running" not in key}
    part = {"eta_theta": ("shared.",), "eta_omega": ("private.", "head."), "eta_phi": ("gate.",)}
    for name, prefixes in part.items():
        for key, way in ways[name].items():
            factor = 2.0 if key.startswith(prefixes) else 1.0
            torch.testing.assert_close(way, factor * ways["none"][key], rtol=1e-3, atol=1e-5)
    assert any(way.abs().max() > 1e-4 for key, way in ways["none"].items() if key.startswith("gate."))


def test_extractors_of_other_widths_take_part(monkeypatch):
    class Wide(nn.Sequential):
        width = 9

        def __init__(self, shape, cohort):
            super().__init__(nn.Flatten(), nn.Linear(math.prod(shape), 9))

    monkeypatch.setitem(ARCHITECTURES, "mlp-3", Wide)  # what animal-01 runs, and what is shared
    setup = tiny.small_setup()
    context = tiny.small_context("animal-00")
    half = pFedMoE(m=4).client(setup)
    reply = half.train(pFedMoE().server(setup).deliver(context.info), context)
    assert context.state.params["join.weight"].shape == (6, 9)
    assert reply.group("params")["shared.1.weight"].shape == (9, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"eta_phi": 0.0}, "eta_phi is 0"), ({"m": 0}, "m is 0"), ({"m": 6, "norm": "group"}, "multiple of 4"),
     ({"mixing": "half"}, "mixing is 'half'"), ({"norm": "none"}, "norm is"), ({"gate_input": "x"}, "gate_input is"),
     ({"deploy": "x"}, "deploy is")],
)  # fmt: skip
def test_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        pFedMoE(**options)
