"""Planning with device memory: experts held and trained, ranks of adapters, and whether a model fits at all."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self

from consilium.core import ClientContext, ClientInfo, ExpertSet, counts_of
from consilium.errors import BudgetError, ConfigError
from consilium.moe.budget import Footprint, MemoryModel, Mode, human
from consilium.moe.build import ModelSource
from consilium.moe.layers import Shape, spread
from consilium.moe.surgery import checked
from consilium.setup.base import Setup

__all__ = ["Planner"]


@dataclass(frozen=True)
class Planner(Setup):
    """The part of `MixtureSetup` that plans with memory."""

    model: ModelSource

    def rank_of(self, client: ClientInfo) -> int:
        """Return the rank of a client's adapters.

        With `fit.lora.ranks` "memory" it is the largest rank at which the whole model fits the client's memory, at
        least 1.
        """
        lora = self.fit.lora
        if lora.ranks == "equal" or client.memory_bytes is None:
            return lora.rank

        def fits(rank: int) -> bool:
            return self.with_rank(rank).footprint(self.model.counts).total <= client.memory_bytes

        return _most(1, lora.rank, fits) if fits(1) else 1

    def with_rank(self, rank: int) -> Self:
        """Return the set-up with adapters of another rank and the same scale."""
        return replace(self, fit=replace(self.fit, lora=self.fit.lora.at(rank)))

    def _for(self, client: ClientInfo) -> Self:
        """Return the set-up with a client's own adapter rank."""
        if not self.fit.lora.rank or self.fit.lora.ranks == "equal":
            return self
        return self.with_rank(self.rank_of(client))

    def footprint(
        self,
        counts: Mapping[str, int],
        mode: Mode = "full",
        references: int = 0,
        rank: int = 8,
        trained: int | None = None,
    ) -> Footprint:
        """Return the bytes that a client needs for `counts` experts per block, by the memory model.

        They are the larger of what training needs and what the evaluation after it needs.

        Args:
            mode: "forward" is evaluation alone; "full" is "lora" with `fit.lora`, at its rank; "peft" is stage one of
                FedMoE.
            references: extra copies of the weights the method keeps while training (FedProx 1, SCAFFOLD 3).
            rank: rank of the adapters ("lora").
            trained: experts of all blocks together that `fit(choose=...)` trains in any one batch; None: all, without
                `choose`.
        """
        fit = self.fit
        if mode == "full" and fit.lora.rank:
            mode, rank = "lora", fit.lora.rank
        shape = {**fit.lengths, "optimizer": fit.optimizer, "momentum": fit.momentum}
        evaluation = self._memory.footprint(counts, mode="forward", batch_size=self.evaluation_rows, **shape)
        forward = mode == "forward"
        if forward:
            mode, rank = ("lora", fit.lora.rank) if fit.lora.rank else ("full", rank)
        training = self._memory.footprint(
            counts,
            mode=mode,
            batch_size=fit.batch_size,
            gradient_checkpointing=fit.gradient_checkpointing,
            references=references,
            rank=rank,
            trained=trained,
            **shape,
        )
        evaluation = replace(evaluation, masters=training.masters)  # validation runs while the masters are in memory
        return evaluation if forward else max(training, evaluation, key=lambda footprint: footprint.total)

    def reported(
        self,
        counts: Mapping[str, int],
        mode: Mode = "full",
        references: int = 0,
        rank: int = 8,
        trained: int | None = None,
    ) -> dict[str, int]:
        """Return the footprint in bytes as a scalar of a reply."""
        return {"footprint": self.footprint(counts, mode, references, rank, trained).total}

    def admit(
        self,
        context: ClientContext,
        held: ExpertSet | None,
        mode: Mode = "full",
        references: int = 0,
        rank: int = 8,
        trained: int | None = None,
    ) -> dict[str, int]:
        """Raise BudgetError if a mixture would not fit what the client allows, before it is built.

        Args:
            held: its experts; None: all. The other arguments are those of `footprint`.

        Returns:
            The value of `reported`.

        Raises:
            BudgetError: with the bytes needed and allowed.
            ModelError: for experts that the model does not have.
        """
        counts = self.model.counts
        if held is not None:
            counts = counts_of(checked(held, counts, self.model.family))
        report = self._for(context.info).reported(counts, mode, references, rank, trained)
        context.work.hold(report["footprint"], f"a model of {sum(counts.values())} experts")
        return report

    def lacks(
        self,
        client: ClientInfo,
        counts: Mapping[str, int],
        mode: Mode = "full",
        references: int = 0,
        rank: int = 8,
        trained: int | None = None,
    ) -> str | None:
        """Return why the client's device cannot train `counts` experts per block, or None if it can."""
        if client.memory_bytes is None:
            return None
        need = self._for(client).footprint(counts, mode, references, rank, trained).total
        if need <= client.memory_bytes:
            return None
        return f"needs {human(need)}, has {human(client.memory_bytes)}, lacks {human(need - client.memory_bytes)}"

    @property
    def _memory(self) -> MemoryModel:
        return MemoryModel.of(self.model)

    def spread(self, experts: int, shape: Shape = ()) -> dict[str, int]:
        """Return experts per block, `experts` of them in all, in proportion to the shape; see `layers.spread`.

        Without a shape, `layers` counts.

        Raises:
            BudgetError: for fewer than every block needs, see `least`.
            ConfigError: for a shape of another length.
        """
        if experts < sum(self.least.values()):
            raise BudgetError(f"{experts} experts are too few: the layers need {sum(self.least.values())} between them")
        try:
            return spread(experts, self.model.counts, self.least, shape or self.layers)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def fitting(self, client: ClientInfo, shape: Shape = (), share: float = 1.0, references: int = 0) -> dict[str, int]:
        """Return the most experts per block, spread by the shape, that a client's device can train.

        Args:
            share: share of the client's memory that may be used, in (0, 1]; the fewest experts that the model needs are
                given in any case.
            references: extra copies of the weights the method keeps while training.
        """
        minimum, total = sum(self.least.values()), sum(self.model.counts.values())
        if client.memory_bytes is None:
            return dict(self.model.counts)
        memory_limit, client_planner = share * client.memory_bytes, self._for(client)

        def fits(experts: int) -> bool:
            return client_planner.footprint(self.spread(experts, shape), references=references).total <= memory_limit

        return self.spread(_most(minimum, total, fits), shape)

    @property
    def least(self) -> dict[str, int]:
        """Return the fewest experts per block that the family's routers work with."""
        return {block: min(self.model.family.least, total) for block, total in self.model.counts.items()}

    def budgets(
        self, client: ClientInfo, references: int = 0, mode: Literal["full", "lora"] = "full", rank: int = 8
    ) -> tuple[int, int]:
        """Return how many experts a client's device can hold and train, of all blocks together.

        The first number is the most that the device can hold while one expert per block is trained, spread over the
        blocks by `spread`. The second is the most of these that it can train. A device without a limit holds and trains
        all.

        Returns:
            (forward, backward): resident experts, and experts trained in any one batch (`fit(choose=...)`), <= forward.

        Raises:
            BudgetError: with the bytes missing, if the smallest configuration does not fit.
        """
        total, blocks = sum(self.model.counts.values()), len(self.model.counts)
        if client.memory_bytes is None:
            return total, total

        def fits(forward: int, backward: int) -> bool:
            return self.lacks(client, self.spread(forward), mode, references, rank, backward) is None

        minimum = sum(self.least.values())
        if lack := self.lacks(client, self.least, mode, references, rank, blocks):
            raise BudgetError(f"{client.id} cannot train even {minimum} experts in {blocks} layers: {lack}")
        forward = _most(minimum, total, lambda n: fits(n, blocks))
        return forward, _most(blocks, forward, lambda n: fits(forward, n))

    def sub_moe_counts(self, client: ClientInfo, share: float = 1.0, references: int = 0) -> dict[str, int]:
        """Return the experts per block of the sub-MoE of a method that has no rule of its own for the layers.

        It has the same number of experts in every block, or with `layers` numbers in proportion to them: the most that
        `share` of the client's memory can train. If even the fewest do not fit, they are returned nevertheless.
        """
        if self.layers:
            return self.fitting(client, share=share, references=references)
        n = max(self.largest_uniform(client.memory_bytes, share, references), self.model.family.least)
        return {block: min(n, total) for block, total in self.model.counts.items()}

    def largest_uniform(self, memory_bytes: int | None, share: float = 1.0, references: int = 0) -> int:
        """Return the most experts per block, the same in every block, that fit into `share` of the memory.

        The result is 0 if none fits, or if only fewer fit than the family's routers work with.
        """
        maximum, minimum = max(self.model.counts.values()), max(self.least.values())
        if memory_bytes is None:
            return maximum
        for n in range(maximum, minimum - 1, -1):
            counts = {block: min(n, total) for block, total in self.model.counts.items()}
            if self.footprint(counts, references=references).total <= share * memory_bytes:
                return n
        return 0


def _most(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """Return the largest n in [low, high] for which holds(n); holds must be monotone and true at low."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
