"""The distribution of experts over the layers of a model, and the selection of each layer's experts by score.

A *shape* is a weight per block, in the order of the layers. The damage from missing experts in a layer has little to do
with how evenly its experts are used. Shapes are therefore compared directly, by the loss of sub-models cut by them.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

__all__ = ["Shape", "most", "shapes", "spread"]

Shape = tuple[float, ...]
"""A weight > 0 per block; () gives every block the same weight."""


def spread(experts: int, counts: Mapping[str, int], least: Mapping[str, int], shape: Shape = ()) -> dict[str, int]:
    """Return experts per block: `experts` of them in total, in proportion to the shape.

    Each expert in turn goes to the block with the largest weight / (experts it has + 1), with ties to the lower layer
    (D'Hondt's rule). A larger number therefore never takes an expert from a block.

    Args:
        experts: the total; a number above that of the full model is reduced to it.
        counts: experts of the full model per block.
        least: the fewest experts of every block.
        shape: a weight per block, > 0; (): the same for all.

    Raises:
        ValueError: if `experts` is less than the sum of `least`, or the shape has another length or a weight <= 0.
    """
    shape = shape or (1.0,) * len(counts)
    if len(shape) != len(counts) or not all(0 < weight < float("inf") for weight in shape):
        raise ValueError(f"layers is {shape}; give {len(counts)} positive numbers, one per sparse layer")
    allocation = dict(least)
    if experts < sum(allocation.values()):
        raise ValueError(f"{experts} experts are too few: the layers need {sum(allocation.values())} between them")
    weights = dict(zip(counts, shape, strict=True))
    for _ in range(min(experts, sum(counts.values())) - sum(allocation.values())):
        free_blocks = [block for block in counts if allocation[block] < counts[block]]
        allocation[max(free_blocks, key=lambda block: weights[block] / (allocation[block] + 1))] += 1
    return allocation


def shapes(blocks: int) -> list[Shape]:
    """Return the candidate shapes for a model with `blocks` blocks: even, falling, or one group of layers favoured.

    The layers are cut into at most four consecutive groups. Each group in turn gets two and four times the weight of
    the rest.
    """
    groups = min(blocks, 4)
    group_of_block = [block * groups // blocks for block in range(blocks)]
    even_shapes = [(1.0,) * blocks]
    falling_shapes: Sequence[Shape] = [tuple(float(groups - g) for g in group_of_block)] if groups > 2 else []
    favouring_shapes = [
        tuple(factor if g == favourite else 1.0 for g in group_of_block)
        for favourite in range(groups)
        for factor in (2.0, 4.0)
        if groups > 1
    ]
    return [*even_shapes, *falling_shapes, *favouring_shapes]


def most(scores: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Return the ids of the experts with the highest scores, `counts[block]` per block; ties go to the lower id.

    Args:
        scores: block -> a number per expert [E].
        counts: block -> the number of experts to select.
    """
    return {
        block: tuple(sorted(scores[block].argsort(descending=True, stable=True)[:n].tolist()))
        for block, n in counts.items()
    }
