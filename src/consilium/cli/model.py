"""The commands `consilium inspect`, `consilium plan` and `consilium upcycle`."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from consilium.cli.parsing import parse, read_command
from consilium.cli.screen import out
from consilium.escape import print_line


def inspect_command(args: list[str]) -> None:
    """consilium inspect MODEL \\[--memory 12GiB]"""
    from consilium.cli.views.model import print_model
    from consilium.core import Sampling
    from consilium.fit import Fit
    from consilium.moe.budget import bytes_of
    from consilium.moe.build import ModelSource
    from consilium.setup import MixtureSetup

    def parameters(
        model: Annotated[str, tyro.conf.Positional],
        gguf: str = "",
        memory: str | None = None,
        form: Literal["classification", "text-to-text"] | None = None,
        batch_size: int = 16,
        max_length: int = 64,
        target_length: int = 16,
        rank: int = 8,
        gradient_checkpointing: bool = False,
    ) -> tuple[MixtureSetup, int | None, int]:
        """Print the layers, experts, router and bytes of a model, and the budgets of experts that fit a device.

        Args:
            model: a directory, a shipped model's name, or a hub name.
            gguf: a GGUF file in that directory.
            memory: memory of a device, e.g. 12GiB; the output then shows what fits.
            form: classification or text-to-text; default: the form that the checkpoint was made for.
            batch_size: examples per step.
            max_length: tokens per example.
            target_length: target tokens per example (text-to-text).
            rank: rank of LoRA adapters.
            gradient_checkpointing: recompute activations in the backward pass.
        """
        source = ModelSource(model, gguf=gguf)
        generates = any("LM" in name or "Generation" in name for name in source.config.architectures or ())
        generates = generates or source.dense
        source = ModelSource(model, gguf=gguf, form=form or ("text-to-text" if generates else "classification"))
        fit = Fit(
            batch_size=batch_size,
            max_length=max_length,
            target_length=target_length,
            gradient_checkpointing=gradient_checkpointing,
        )
        heads = {"task": ("label",)} if source.form == "classification" else {}
        return MixtureSetup(source, fit, Sampling(), 0, heads), bytes_of(memory) if memory else None, rank

    setup, limit, rank = parse(parameters, args, "consilium inspect")
    print_model(setup, limit, rank, out)


def plan_command(args: list[str]) -> None:
    """consilium plan RECIPE|FILE.json [--algorithm NAME] [--config FILE] [flags of the experiment]"""
    command = read_command(args, "plan", plan_command.__doc__, {"--algorithm": "", "--config": ""})
    from consilium.cli.views.forecast import print_plan

    print_plan(command.experiment, out)


def upcycle_command(args: list[str]) -> None:
    """consilium upcycle MODEL \\[--experts 8] \\[--top-k 2] --out DIR"""
    from consilium.export.folder import new_folder
    from consilium.moe.upcycle import Upcycling, upcycle

    def parameters(
        model: Annotated[str, tyro.conf.Positional],
        out: Path,
        how: Annotated[Upcycling, tyro.conf.arg(name="")],
        gguf: str = "",
    ) -> tuple[str, Path, Upcycling, str]:
        """Turn a dense model into a mixture of experts (Komatsuzaki et al. 2023), with its tokenizer and chat template.

        Args:
            model: a directory or a hub name: llama, mistral, granite, qwen2, qwen3, olmo2 or t5.
            out: directory to write; it must be new or empty.
            how: settings of the experts.
            gguf: a GGUF file in the directory.
        """
        return model, out, how, gguf

    model, folder, how, gguf = parse(parameters, args, "consilium upcycle")
    with new_folder(folder) as new_path:
        lines = upcycle(model, new_path, how, gguf)
    for line in (*lines, f"see it: consilium inspect {folder}"):
        print_line(out, line)
