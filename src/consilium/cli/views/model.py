"""The output of `consilium inspect`: a model's layers, experts, router and bytes, and the budgets that fit a device."""

import itertools
import textwrap
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from consilium.core import ClientInfo
from consilium.errors import BudgetError
from consilium.escape import one_line, terminal
from consilium.moe.budget import MemoryModel, human
from consilium.moe.families import experts_per_token
from consilium.moe.model import text_config
from consilium.moe.uniform import can_fill
from consilium.setup import Setup

__all__ = ["print_model"]


def print_model(setup: Setup, limit: int | None, rank: int, out: Console) -> None:
    """Print a description of the model, at most 80 columns wide.

    Args:
        setup: the model, and the batch for which training memory is given.
        limit: memory of a device in bytes; None: print only the memory that training needs.
        rank: rank of the adapters.
    """

    def say(text: str, head: str = "") -> None:
        out.print(Text.assemble((one_line(head), "bold"), terminal(text)), highlight=False, soft_wrap=True)

    source, memory = setup.model, MemoryModel.of(setup.model)
    size, counts = source.torch_dtype.itemsize, memory.counts
    parameter_count = memory.params(counts)
    say(f"  {source.family.name}, {source.form}", head=source.path)
    say(f"  {parameter_count / 1e6:,.1f} M parameters, {human(parameter_count * size)} in {source.dtype}")
    say(f"  without experts: {memory.dense_params / 1e6:,.1f} M parameters, {human(memory.dense_params * size)}")
    layers = sum(stack.layers for stack in memory.stacks)
    say(f"  {layers} layers" + (f", of which {len(counts)} are sparse:" if counts else ""))
    for (count, expert_params), group in itertools.groupby(counts, key=lambda b: (counts[b], memory.expert_params[b])):
        blocks = list(group)
        blocks_text = blocks[0] if len(blocks) == 1 else f"{blocks[0]} to {blocks[-1]}"
        say(f"    {blocks_text}:")
        say(f"    {len(blocks)} x {count} experts of {expert_params:,} parameters, {human(expert_params * size)} each")
    for line in _structure(setup, memory):
        for part in textwrap.wrap(line, 78, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False):
            say(f"  {part}")
    say("")
    fit = setup.fit
    tokens = f"{fit.batch_size} x {fit.max_length} tokens" + ("" if setup.heads else f", {fit.target_length} of target")
    settings_text = fit.optimizer + (", checkpointing" if fit.gradient_checkpointing else "")
    say(f" ({tokens}, {settings_text})", head="Memory of a client")
    say("  experts per layer: held (rows) and trained in a batch (columns);")
    say(f"  plain: all, without a choice; LoRA: all, rank {rank}")
    out.print(_budgets(setup, limit, rank))
    if limit is not None:
        say(f"* fits a device of {human(limit)}.")
        for line in _verdict(setup, limit, rank):
            out.print(line, highlight=False)


def _structure(setup: Setup, memory: MemoryModel) -> list[str]:
    """Return lines on the experts that were found, the facts stated by a row, and the exactness of an export."""
    source, family = setup.model, setup.model.family
    if family.dense:
        return [
            f"no experts: LoRA changes {', '.join(family.lora_targets)}",
            f"found: {_found(setup)}",
            "export: exact; adapters as PEFT's files, or merged",
        ]
    k = experts_per_token(source.config) if family.top_k else 1
    active_params = memory.dense_params + sum(
        min(k, n) * memory.expert_params[block] + n * memory.row_params[block] for block, n in memory.counts.items()
    )
    lines = [f"active per token: {active_params / 1e6:,.1f} M parameters", f"router: {_router(setup)}"]
    lines.append(
        "gates: do not depend on experts that are not chosen"
        if family.normalised
        else "gates: shares of a softmax over all experts; slices scale them (fit.gates)"
    )
    if family.least > 1:
        lines.append(f"every layer needs {family.least} experts")
    lines.append(f"found: {_found(setup)}")
    if family.stated:
        lines.append(f"stated by a row of moe/families.py: {', '.join(family.stated)}")
    lines.append(f"export: {_export(setup)}")
    return lines


def _found(setup: Setup) -> str:
    family = setup.model.family
    if family.dense:
        return f"logits finished by {', '.join(family.finish) or 'nothing'}"
    parts = [f"block {family.block}", f"router .{family.router}", f"experts .{family.experts} ({family.layout})"]
    parts += [f"correction .{family.correction}"] if family.correction else []
    parts += [f"{family.extra} rows behind the experts"] if family.extra else []
    return ", ".join(part for part in parts)


def _export(setup: Setup) -> str:
    """Return a phrase on the slices that plain transformers can hold without a change of their logits."""
    model = setup.model.skeleton("", ())
    if model.family.extra or not can_fill(model):
        return "exact where all layers hold as many experts; others with --format consilium"
    return "exact, also where layers hold different numbers of experts"


def _router(setup: Setup) -> str:
    family, config = setup.model.family, text_config(setup.model.config)
    top_k = experts_per_token(config) if family.top_k else 1
    score_name = family.score if family.correction or family.score != "softmax" else "logits"
    description = f"top-{top_k}, by {score_name}" + (" with a correction bias" if family.correction else "")
    if family.groups and config.n_group and config.n_group > 1:
        description += f", in {config.topk_group} of {config.n_group} groups"
    return description


def _steps(setup: Setup) -> list[int]:
    """Return numbers of experts per layer, descending: all, a half, a quarter, an eighth, and the fewest."""
    if not setup.model.counts:
        return [0]
    largest, smallest = max(setup.model.counts.values()), max(setup.least.values())
    return sorted(
        {max(n, smallest) for n in (largest, largest // 2, largest // 4, largest // 8, smallest)}, reverse=True
    )


def _counts(setup: Setup, n: int) -> dict[str, int]:
    return {block: min(n, total) for block, total in setup.model.counts.items()}


def _budgets(setup: Setup, limit: int | None, rank: int) -> Table:
    """Return a table of memory.

    The rows are experts held per layer. The columns are experts trained per layer, plain training, and adapters.
    """
    steps = _steps(setup)
    trained = [] if steps == [0] else steps if steps[-1] == 1 else [*steps, 1]

    def cell(counts: Mapping[str, int], mode: str, learning: int | None) -> str:
        need = setup.footprint(counts, mode, rank=rank, trained=learning).total
        return human(need).replace(" ", "") + ("" if limit is None else "*" if need <= limit else " ")

    table = Table(box=None, padding=(0, 1), header_style="bold")
    for title in ("held", "plain", *map(str, trained), "LoRA"):
        table.add_column(title, justify="right", no_wrap=True)
    for held_count in steps:
        counts = _counts(setup, held_count)
        cells = [
            cell(counts, "full", sum(_counts(setup, n).values())) if n <= held_count else "" for n in trained
        ]  # a client cannot train more experts than it holds
        table.add_row(str(held_count), cell(counts, "full", None), *cells, cell(counts, "lora", None))
    return table


def _verdict(setup: Setup, limit: int, rank: int) -> list[str]:
    """Return sentences on what the device can train: with two budgets, plainly, and with adapters."""
    device, total = ClientInfo("device", 1, "task", limit), sum(setup.model.counts.values())
    if not total:
        modes = {"plainly": "full", "with LoRA": "lora"}
        options = [name for name, mode in modes.items() if not setup.lacks(device, {}, mode, rank=rank)]
        return [f"It can train the model {' and '.join(options)}." if options else "It cannot train the model."]
    try:
        forward, backward = setup.budgets(device)
        lines = [f"It can hold {forward} of {total} experts, and train {backward} of them in a batch."]
    except BudgetError as error:
        lines = [f"A {error}."]
    plain_count = setup.largest_uniform(limit)
    lines.append(f"Plainly it can train {plain_count or 'not even the fewest'} experts per layer.")
    options = range(max(setup.model.counts.values()), max(setup.least.values()) - 1, -1)
    lora_count = next((n for n in options if not setup.lacks(device, _counts(setup, n), "lora", rank=rank)), None)
    lines.append(f"With LoRA it can train {lora_count or 'not even the fewest'} experts per layer.")
    return lines
