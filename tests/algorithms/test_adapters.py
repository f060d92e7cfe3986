"""Every method for mixtures of experts with adapters on the experts: only they, routers and heads travel."""

import math

import pytest
import tiny
import torch
from test_registry import MOE, halves, setup

from consilium.moe.addressing import is_adapter, travels
from consilium.moe.lora import Lora


@pytest.mark.parametrize("mean", ["factors", "products"])
@pytest.mark.parametrize("name", MOE)
def test_two_rounds_in_which_only_adapters_routers_and_heads_travel(name, mean, tmp_path):
    made = setup(name)
    made = tiny.setup(made.model, clients_per_round=4, clients=tiny.infos(), lora=Lora(rank=2, mean=mean))
    server, client = halves(name, made)
    engine, carried = tiny.engine(server, client, made, tmp_path), []
    carry = engine._carry
    engine._carry = lambda payload: carried.append(payload) or carry(payload)
    before = {key: tensor.clone() for key, tensor in server.params.items()}
    records = [engine.round(number, test=number == 2) for number in (1, 2)]
    odd = {key for p in carried for group in p.groups.values() for key in group if "." in key and "lora" not in key}
    assert not [key for key in odd if ".experts." in key]  # no expert's own weights, in whatever group
    assert all(travels(key) for payload in carried for key in payload.groups.get("params", {}))
    for told in records[1]["clients"].values():
        assert told["rejected"] is None and math.isfinite(told["train_loss"])
    assert all(0 <= score <= 1 for score in records[1]["test"].values()) and records[1]["test"]
    if name not in ("Standalone",):
        assert any(is_adapter(key) and not torch.equal(server.params[key], before[key]) for key in before)
