"""randomMoE: a fixed random map within each client's memory, merged expert by expert."""

import pytest
import tiny
import torch

from consilium.algorithms.randommoe import RandomMoE, random_choice
from consilium.core import Payload, experts_from_scalars
from consilium.errors import ConfigError

MEMORY = {"animal-00": lambda: tiny.bytes_for(2), "animal-01": lambda: tiny.bytes_for(5) + 1, "colour-00": lambda: 10}


def memory():
    return {client: size() for client, size in MEMORY.items()}


def test_the_map_is_fixed_random_and_within_memory(tmp_path):
    setup = tiny.setup(memory=memory(), clients_per_round=6)
    algorithm = RandomMoE()
    server = algorithm.server(setup)
    before = server.structure()
    sizes = {client: {len(ids) for ids in held.values()} for client, held in before.items()}
    assert sizes == {"animal-00": {2}, "animal-01": {5}, "colour-00": {1}} | {client: {8} for client in tiny.IDS[3:]}
    assert {c.id for c in setup.clients if server.unable(c)} == {"colour-00"}
    engine = tiny.engine(server, algorithm.client(setup), setup, tmp_path)
    record = engine.round(1, test=False)
    assert record["selected"] == sorted(set(tiny.IDS) - {"colour-00"})
    assert server.structure() == before == RandomMoE().server(setup).structure()
    for client in setup.clients:
        assert experts_from_scalars(server.deliver(client).scalars) == before[client.id]


def test_the_choice_follows_seed_and_client_and_differs_by_layer():
    setup = tiny.setup()
    four = dict.fromkeys(setup.model.counts, 4)
    maps = {str(random_choice(setup, client, four)) for client in tiny.IDS}
    assert len(maps) == 6 and str(random_choice(tiny.setup(seed=1), tiny.IDS[0], four)) not in maps
    assert random_choice(setup, "animal-00", four) == random_choice(tiny.setup(), "animal-00", four)
    first, second = random_choice(setup, "animal-00", four).values()
    assert first != second


def test_the_papers_setting_is_a_number():
    setup = tiny.setup()
    server = RandomMoE(experts=3).server(setup)
    assert {len(ids) for held in server.structure().values() for ids in held.values()} == {3}
    with pytest.raises(ConfigError, match=r"experts is 9; allowed are 1\.\.8"):
        RandomMoE(experts=9).server(setup)
    with pytest.raises(ConfigError, match="experts is 0"):
        RandomMoE(experts=0).server(setup)


def test_a_share_of_the_memory_is_a_smaller_budget():
    setup = tiny.setup(memory={"animal-00": tiny.bytes_for(4)})
    share = tiny.bytes_for(2) / tiny.bytes_for(4)
    assert {len(ids) for ids in RandomMoE().server(setup).structure()["animal-00"].values()} == {4}
    assert {len(ids) for ids in RandomMoE(share=share).server(setup).structure()["animal-00"].values()} == {2}
    assert {len(ids) for ids in RandomMoE(share=0.01).server(setup).structure()["animal-00"].values()} == {1}
    for wrong in (0.0, 1.5):
        with pytest.raises(ConfigError, match=rf"share is {wrong}; it must be within \(0, 1\]"):
            RandomMoE(share=wrong)


def test_modular_aggregation_by_hand():
    """Expert 0 from both (n = 1, 3): (2 * 1 + 6 * 3) / 4 = 5; expert 1 from one: overwritten; expert 2: unchanged."""
    server = RandomMoE().server(tiny.setup())
    names = [f"b.{part}.{i}.w" for i in range(3) for part in ("experts", "router")]
    server.params = {"trunk": torch.tensor(0.0)} | {name: torch.tensor(-1.0) for name in names}
    values = ({"trunk": 4.0, "b.experts.0.w": 2.0, "b.router.0.w": 2.0, "b.experts.1.w": 9.0, "b.router.1.w": 8.0},
              {"trunk": 8.0, "b.experts.0.w": 6.0, "b.router.0.w": 6.0})  # fmt: skip
    replies = [
        (client, Payload({"params": {k: torch.tensor(v) for k, v in value.items()}}, {"num_examples": n}))
        for client, value, n in (("animal-00", values[0], 1), ("animal-01", values[1], 3))
    ]
    server.aggregate(1, iter(replies))
    assert {k: t.item() for k, t in server.params.items()} == {
        "trunk": 7.0, "b.experts.0.w": 5.0, "b.router.0.w": 5.0, "b.experts.1.w": 9.0, "b.router.1.w": 8.0,
        "b.experts.2.w": -1.0, "b.router.2.w": -1.0,
    }  # fmt: skip


def test_an_expert_changes_only_if_a_participant_holds_it(tmp_path):
    setup = tiny.setup(clients_per_round=2)
    algorithm = RandomMoE(experts=2)
    server = algorithm.server(setup)
    before = dict(server.params)
    record = tiny.engine(server, algorithm.client(setup), setup, tmp_path).round(1, test=False)
    for key, tensor in server.params.items():
        if ".experts." in key:
            block, i = key.split(".experts.")[0], int(key.split(".experts.")[1].split(".")[0])
            if not any(i in server.map[client][block] for client in record["selected"]):
                assert tensor is before[key]
