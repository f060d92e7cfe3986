"""NestedMoE: a larger device's experts contain a smaller one's, those with the largest public usage."""

import tiny

from consilium.algorithms.nestedmoe import NestedMoE


def test_the_larger_contain_the_smaller(monkeypatch):
    memory = {client: tiny.bytes_for(n) for client, n in zip(tiny.IDS, (1, 2, 3, 4, 5, 8), strict=True)}
    setup = tiny.setup(memory=memory)
    usage = {block: [0.1, 0.9, 0.3, 0.8, 0.2, 0.7, 0.6, 0.4] for block in setup.model.counts}
    monkeypatch.setattr(type(setup.model), "public_usage", lambda self: usage)
    held = NestedMoE().server(setup).structure()
    top = [1, 3, 5, 6, 7, 2, 4, 0]
    for client, n in zip(tiny.IDS, (1, 2, 3, 4, 5, 8), strict=True):
        assert all(ids == tuple(sorted(top[:n])) for ids in held[client].values())


def test_a_given_number():
    held = NestedMoE(experts=2).server(tiny.setup()).structure()
    assert {len(ids) for blocks in held.values() for ids in blocks.values()} == {2}
    assert len({tuple(blocks.items()) for blocks in held.values()}) == 1
