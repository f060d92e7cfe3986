"""What `consilium inspect` prints: a model's layers, experts, router and bytes, and which budgets fit a device."""

import itertools
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from consilium.core import ClientInfo
from consilium.errors import BudgetError
from consilium.escape import one_line, terminal
from consilium.moe.budget import MemoryModel, human
from consilium.setup import Setup

__all__ = ["print_model"]


def print_model(setup: Setup, limit: int | None, rank: int, out: Console) -> None:
    """Print it, at most 80 columns wide.

    Args:
        setup: the model, and the batch that training memory is given for.
        limit: a device's bytes; None: only what training needs is printed.
        rank: of the adapters.
    """

    def say(text: str, head: str = "") -> None:
        out.print(Text.assemble((one_line(head), "bold"), terminal(text)), highlight=False, soft_wrap=True)

    source, memory = setup.model, MemoryModel.of(setup.model)
    size, counts = source.torch_dtype.itemsize, memory.counts
    whole = memory.params(counts)
    say(f"  {source.family.name}, {source.form}", head=source.path)
    say(f"  {whole / 1e6:,.1f} M parameters, {human(whole * size)} in {source.dtype}")
    say(f"  without experts: {memory.dense_params / 1e6:,.1f} M parameters, {human(memory.dense_params * size)}")
    say(f"  {sum(stack.layers for stack in memory.stacks)} layers, of which {len(counts)} are sparse:")
    for (count, each), alike in itertools.groupby(counts, key=lambda b: (counts[b], memory.expert_params[b])):
        blocks = list(alike)
        named = blocks[0] if len(blocks) == 1 else f"{blocks[0]} to {blocks[-1]}"
        say(f"    {named}:")
        say(f"    {len(blocks)} x {count} experts of {each:,} parameters, {human(each * size)} each")
    say(f"  router: {_router(setup)}")
    if source.family.least > 1:
        say(f"  every layer needs {source.family.least} experts")
    say("")
    fit = setup.fit
    tokens = f"{fit.batch_size} x {fit.max_length} tokens" + ("" if setup.heads else f", {fit.target_length} of target")
    how = fit.optimizer + (", checkpointing" if fit.gradient_checkpointing else "")
    say(f" ({tokens}, {how})", head="Memory of a client")
    say("  experts per layer: held (rows) and trained in a batch (columns);")
    say(f"  plain: all, without a choice; LoRA: all, rank {rank}")
    out.print(_budgets(setup, limit, rank))
    if limit is not None:
        say(f"* fits a device of {human(limit)}.")
        for line in _verdict(setup, limit, rank):
            out.print(line, highlight=False)


def _router(setup: Setup) -> str:
    family, config = setup.model.family, setup.model.config
    top_k = int(getattr(config, "num_experts_per_tok", None) or 1) if family.top_k else 1
    said = f"top-{top_k}, by {family.choice or 'logits'}" + (" with a correction bias" if family.choice else "")
    if family.groups and config.n_group and config.n_group > 1:
        said += f", in {config.topk_group} of {config.n_group} groups"
    return said


def _steps(setup: Setup) -> list[int]:
    """All experts of a layer, a half, a quarter, an eighth, and the fewest; descending."""
    most, least = max(setup.model.counts.values()), max(setup.least.values())
    return sorted({max(n, least) for n in (most, most // 2, most // 4, most // 8, least)}, reverse=True)


def _counts(setup: Setup, n: int) -> dict[str, int]:
    return {block: min(n, total) for block, total in setup.model.counts.items()}


def _budgets(setup: Setup, limit: int | None, rank: int) -> Table:
    """Rows: experts held per layer. Columns: trained per layer, plain training, adapters."""
    steps = _steps(setup)
    trained = steps if steps[-1] == 1 else [*steps, 1]

    def cell(counts: Mapping[str, int], mode: str, learning: int | None) -> str:
        need = setup.footprint(counts, mode, rank=rank, trained=learning).total
        return human(need).replace(" ", "") + ("" if limit is None else "*" if need <= limit else " ")

    table = Table(box=None, padding=(0, 1), header_style="bold")
    for title in ("held", "plain", *map(str, trained), "LoRA"):
        table.add_column(title, justify="right", no_wrap=True)
    for held in steps:
        counts = _counts(setup, held)
        cells = [
            cell(counts, "full", sum(_counts(setup, n).values())) if n <= held else "" for n in trained
        ]  # more than are held cannot be trained
        table.add_row(str(held), cell(counts, "full", None), *cells, cell(counts, "lora", None))
    return table


def _verdict(setup: Setup, limit: int, rank: int) -> list[str]:
    """What the device can do: with two budgets, plainly, and with adapters."""
    device, total = ClientInfo("device", 1, "task", limit), sum(setup.model.counts.values())
    try:
        forward, backward = setup.budgets(device)
        lines = [f"It can hold {forward} of {total} experts, and train {backward} of them in a batch."]
    except BudgetError as error:
        lines = [f"A {error}."]
    plain = setup.largest_uniform(limit)
    lines.append(f"Plainly it can train {plain or 'not even the fewest'} experts per layer.")
    able = range(max(setup.model.counts.values()), max(setup.least.values()) - 1, -1)
    adapted = next((n for n in able if not setup.lacks(device, _counts(setup, n), "lora", rank=rank)), None)
    lines.append(f"With LoRA it can train {adapted or 'not even the fewest'} experts per layer.")
    return lines
