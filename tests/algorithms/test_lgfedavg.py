"""LG-FedAvg: heads travel, extractors stay."""

import pytest
import tiny
import torch

from consilium.algorithms.lgfedavg import LGFedAvg
from consilium.core import Payload
from consilium.errors import ConfigError
from consilium.models.cohort import ARCHITECTURES

HEAD = {f"head.corner.{label}.{leaf}" for label in "abc" for leaf in ("weight", "bias")}


def test_what_leaves_a_client_key_by_key():
    setup = tiny.small_setup()
    server, half, context = LGFedAvg().server(setup), LGFedAvg().client(setup), tiny.small_context("animal-01")
    sent = server.deliver(context.info)
    reply = half.train(sent, context)
    assert sent.groups.keys() == reply.groups.keys() == {"params"}
    assert sent.group("params").keys() == reply.group("params").keys() == HEAD
    assert context.state.params.keys() == {f"{i}.{leaf}" for i in (1, 3) for leaf in ("weight", "bias")}


def test_averaging_by_hand():
    """n_k = 1 and 3: (1 * 4 + 3 * 8) / 4 = 7; a row that only the first client has: 4."""
    server = LGFedAvg().server(tiny.small_setup())
    row = torch.ones(6)
    one = {"head.corner.a.weight": 4 * row, "head.corner.b.weight": 4 * row}
    two = {"head.corner.a.weight": 8 * row}
    server.aggregate(
        1,
        iter(
            [("x", Payload({"params": one}, {"num_examples": 1})), ("y", Payload({"params": two}, {"num_examples": 3}))]
        ),
    )
    assert (server.params["head.corner.a.weight"] == 7).all() and (server.params["head.corner.b.weight"] == 4).all()


def test_the_received_head_is_the_one_that_is_used():
    setup = tiny.small_setup()
    half, context = LGFedAvg().client(setup), tiny.small_context("animal-01")
    rows = {key: torch.full_like(t, 2.0) for key, t in setup.head_params(6).items()}
    model = half._model(Payload({"params": rows}), context)
    assert (model.head.weight == 2).all() and (model.head.bias == 2).all()


def test_unequal_widths_are_refused(monkeypatch):
    made = ARCHITECTURES["mlp-1"]

    def wider(shape, cohort):
        extractor = made(shape, cohort)
        extractor.width = 7
        return extractor

    monkeypatch.setitem(ARCHITECTURES, "mlp-3", wider)
    with pytest.raises(ConfigError, match="depends on the width"):
        LGFedAvg().server(tiny.small_setup())
