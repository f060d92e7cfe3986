# ruff: noqa: F401, F811  fixtures of another file
"""Same seed, same bits: whatever the order of answers, and in merging whatever the number of threads. Through bytes and
after resuming: `test_registry`, `test_flower`, `test_resume`. In training torch's kernels sum otherwise on two threads
than on one: how many is a setting of the run, and it is not resumed with another number (`test_durable`)."""

import dataclasses
import itertools

import pytest
import torch
from test_flower import bits_of, data, grid, toys

from consilium.experiment import Wire
from consilium.params import WeightedMean, checksum, finite


def test_any_order_of_answers_gives_the_same_bits_and_records(toys, grid, tmp_path, monkeypatch):
    """All six orders in which three clients can answer, and the same run in this process."""
    made = dataclasses.replace(toys, rounds=2, wire=Wire(deadline=60))
    local = bits_of(tmp_path / "local", dataclasses.replace(made, engine="local", strict=True))
    real, seen = grid.pull_messages, []
    for order in itertools.permutations((100, 101, 102)):

        def pull(identifiers, order=order):
            (identifier,) = identifiers
            kind, node = (getattr(grid.queue[identifier].metadata, key) for key in ("message_type", "dst_node_id"))
            waiting = [m.metadata.dst_node_id for m in grid.queue.values() if m.metadata.message_type == kind]
            if node != min(waiting, key=order.index):
                return []
            seen.append((kind, node))
            return real(identifiers)

        monkeypatch.setattr(grid, "pull_messages", pull)
        assert bits_of(tmp_path / "".join(map(str, order)), made) == local
        assert [node for kind, node in seen if kind == "train"] == [*order] * 2
        seen.clear()


@pytest.fixture
def threads():
    yield torch.set_num_threads
    torch.set_num_threads(1)


def test_merging_of_large_tensors_by_one_thread_or_two(threads):
    """A million numbers, which torch does split between threads: the mean is of each number alone."""
    rng = torch.Generator().manual_seed(0)
    replies = [{"w": torch.randn(1_000_000, generator=rng)} for _ in range(5)]
    found = []
    for n in (1, 2):
        threads(n)
        mean = WeightedMean()
        for weight, reply in enumerate(replies, 1):
            assert finite(reply["w"])
            mean.add(reply, weight)
        found.append(checksum(mean.mean(replies[0])))
    assert found[0] == found[1]
