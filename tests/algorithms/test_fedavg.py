"""FedAvg: the weighted mean of what came back, heads by task, and one common sub-MoE at a smaller budget."""

import json
import shutil

import pytest
import tiny
import torch

from consilium.algorithms.fedavg import FedAvg, common_experts
from consilium.core import Payload, experts_from_scalars
from consilium.errors import BudgetError, ConfigError
from consilium.moe.build import ModelSource


def reply(n, **values):
    return Payload(
        {"params": {key.replace("__", "."): torch.tensor(v) for key, v in values.items()}}, {"num_examples": n}
    )


def test_the_mean_by_hand():
    """n = 1 and 3: w = (1 * 2 + 3 * 6) / 4 = 5. Each head row comes from its own task's client alone."""
    server = FedAvg().server(tiny.setup())
    server.params = {"w": torch.tensor(0.0), "head.a.x.bias": torch.tensor(0.0), "head.b.x.bias": torch.tensor(0.0)}
    replies = [("a-0", reply(1, w=2.0, head__a__x__bias=7.0)), ("b-0", reply(3, w=6.0, head__b__x__bias=-1.0))]
    assert server.aggregate(1, iter(replies)) == {}
    assert {k: t.item() for k, t in server.params.items()} == {"w": 5.0, "head.a.x.bias": 7.0, "head.b.x.bias": -1.0}


def test_a_client_is_sent_its_tasks_heads_and_no_others():
    setup = tiny.setup(clients_per_round=6)
    server = FedAvg().server(setup)
    sent = server.configure(1, setup.clients)
    assert set(sent) == set(tiny.IDS)
    for client, payload in sent.items():
        heads = {key.split(".")[1] for key in payload.group("params") if key.startswith("head.")}
        assert heads == {client.split("-")[0]}
        assert experts_from_scalars(payload.scalars) is None


def test_clients_without_the_memory_cannot_take_part():
    memory = {"animal-00": tiny.bytes_for(8) - 1, "colour-01": 1}
    setup = tiny.setup(memory=memory, clients_per_round=6)
    server = FedAvg().server(setup)
    assert {c.id for c in setup.clients if server.unable(c)} == set(memory)
    assert server.unable(setup.clients[0]).startswith("needs ")
    assert set(server.configure(1, setup.clients)) == set(tiny.IDS) - set(memory)


def test_fit_is_what_the_smallest_device_can_train():
    memory = {"animal-00": tiny.bytes_for(5), "colour-01": tiny.bytes_for(3) + 1, "number-00": tiny.bytes_for(8)}
    setup = tiny.setup(memory=memory, clients_per_round=6)
    server = FedAvg("fit").server(setup)
    sent = server.configure(1, setup.clients)
    assert set(sent) == set(tiny.IDS)
    held = {client: experts_from_scalars(payload.scalars) for client, payload in sent.items()}
    assert all(h == server.held for h in held.values()) and {len(ids) for ids in server.held.values()} == {3}
    assert {k for p in sent.values() for k in p.group("params") if ".experts." in k} == {
        k
        for k in server.params
        if ".experts." in k and int(k.split(".experts.")[1].split(".")[0]) in server.held[k.split(".experts.")[0]]
    }


def test_fit_without_limits_is_the_whole_model():
    assert common_experts(tiny.setup(), "fit") is None
    assert common_experts(tiny.setup(), "all") is None


def test_fit_that_cannot_be():
    setup = tiny.setup(memory={client: 1000 + i for i, client in enumerate(tiny.IDS)})
    last = tiny.IDS[-1]
    message = rf"no device can hold one expert per layer, not even {last}: needs .*, has 1.0 kB"
    with pytest.raises(BudgetError, match=message):
        common_experts(setup, "fit")


def test_fit_leaves_out_a_device_that_cannot_hold_one_expert():
    setup = tiny.setup(memory={"colour-01": 1000, "animal-00": tiny.bytes_for(3)})
    assert {len(ids) for ids in common_experts(setup, "fit").values()} == {3}
    server = FedAvg("fit").server(setup)
    assert [c.id for c in setup.clients if server.unable(c)] == ["colour-01"]


@pytest.mark.parametrize("experts", [0, 9, -1])
def test_numbers_of_experts_that_are_refused(experts):
    with pytest.raises(ConfigError, match=rf"experts is {experts}; allowed are 1..8, 'all' and 'fit'"):
        common_experts(tiny.setup(), experts)


def test_a_random_choice_follows_the_seed():
    held = common_experts(tiny.setup(), 3)
    assert held == common_experts(tiny.setup(), 3)
    assert held != common_experts(tiny.setup(seed=1), 3)
    assert all(len(ids) == 3 and list(ids) == sorted(set(ids)) for ids in held.values())


def test_the_card_ranks_the_experts(tmp_path):
    """Public usage (.1 .3 .05 .2 ...): the three largest are experts 1, 3 and 7; ties go to the lower id."""
    shutil.copytree(tiny.directory("switch_transformers"), tmp_path / "m")
    usage = [0.1, 0.3, 0.05, 0.2, 0.05, 0.05, 0.1, 0.15]
    source = ModelSource(str(tmp_path / "m"))
    (tmp_path / "m" / "card.json").write_text(json.dumps({"usage_public": dict.fromkeys(source.counts, usage)}))
    assert set(common_experts(tiny.setup(source), 3).values()) == {(1, 3, 7)}
    assert set(common_experts(tiny.setup(source), 4).values()) == {(0, 1, 3, 7)}


def test_experts_outside_the_common_model_never_change(tmp_path):
    setup = tiny.setup()
    algorithm = FedAvg(2)
    server = algorithm.server(setup)
    before = dict(server.params)
    tiny.engine(server, algorithm.client(setup), setup, tmp_path).round(1, test=False)
    changed = {key for key, t in server.params.items() if not torch.equal(t, before[key])}
    for key in changed:
        for infix in (".experts.", ".router."):
            if infix in key:
                assert int(key.split(infix)[1].split(".")[0]) in server.held[key.split(infix)[0]]
    assert any(".experts." in key for key in changed)
