"""How a number of experts is spread over the layers of a model, and which of a layer's experts have the highest scores.

A *shape* is a weight per block, in the order of the layers. How much a layer suffers from missing experts has little to
do with how evenly its experts are used, so shapes are compared by what matters: the loss of sub-models cut by them.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

__all__ = ["Shape", "most", "shapes", "spread"]

Shape = tuple[float, ...]
"""A weight > 0 per block; () gives every block the same."""


def spread(experts: int, counts: Mapping[str, int], least: Mapping[str, int], shape: Shape = ()) -> dict[str, int]:
    """Return experts per block: `experts` of them in all, in proportion to the shape.

    One after the other goes to the block with the largest weight / (experts it has + 1), ties to the lower layer
    (D'Hondt's rule), so that a larger number never takes an expert from a block.

    Args:
        experts: in all; more than there are count as all.
        counts: experts of the full model per block. least: what every block has at least.
        shape: a weight per block, > 0; (): the same for all.

    Raises:
        ValueError: if `experts` are fewer than `least` in all, or the shape has another length or a weight <= 0.
    """
    shape = shape or (1.0,) * len(counts)
    if len(shape) != len(counts) or not all(0 < weight < float("inf") for weight in shape):
        raise ValueError(f"layers is {shape}; give {len(counts)} positive numbers, one per sparse layer")
    given = dict(least)
    if experts < sum(given.values()):
        raise ValueError(f"{experts} experts are too few: the layers need {sum(given.values())} between them")
    weights = dict(zip(counts, shape, strict=True))
    for _ in range(min(experts, sum(counts.values())) - sum(given.values())):
        free = [block for block in counts if given[block] < counts[block]]
        given[max(free, key=lambda block: weights[block] / (given[block] + 1))] += 1
    return given


def shapes(blocks: int) -> list[Shape]:
    """Return the shapes that are tried for a model of so many blocks: even, falling, and a group of layers favoured.

    The layers are cut into at most four consecutive groups; each in turn has two and four times the weight of the rest.
    """
    groups = min(blocks, 4)
    of_block = [block * groups // blocks for block in range(blocks)]
    even = [(1.0,) * blocks]
    falling: Sequence[Shape] = [tuple(float(groups - g) for g in of_block)] if groups > 2 else []
    favoured = [
        tuple(factor if g == chosen else 1.0 for g in of_block)
        for chosen in range(groups)
        for factor in (2.0, 4.0)
        if groups > 1
    ]
    return [*even, *falling, *favoured]


def most(scores: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Return the ids of the experts with the highest scores, as many per block as `counts` says; ties: lower id.

    Args:
        scores: block -> a number per expert [E].
    """
    return {
        block: tuple(sorted(scores[block].argsort(descending=True, stable=True)[:n].tolist()))
        for block, n in counts.items()
    }
