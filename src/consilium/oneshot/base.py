"""The public model that all sites start from: a mixture of experts or a dense decoder, frozen.

Its digest covers every tensor, so that a package can state exactly which model it was trained against.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from consilium.data.task import Task
from consilium.errors import ModelError
from consilium.experiment import Experiment
from consilium.moe.build import ModelSource
from consilium.moe.discovery import has_experts
from consilium.moe.families import Family
from consilium.moe.model import TaskModel
from consilium.moe.surgery import slice_experts
from consilium.moe.upcycle import Upcycling, convert, dense_model
from consilium.setup import Setup

__all__ = ["OPEN_FAMILIES", "Base", "Frozen", "digest_of", "frozen_tensors"]

OPEN_FAMILIES = ("olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "gpt_oss")
"""Model types with routers that need only one more row: no groups, no correction bias, no sampling."""


class Frozen(TaskModel):
    """A causal language model with frozen parameters of its own; trained parts are attached to its modules.

    `blocks` is empty, because the local loop must neither look for the family's routers nor balance them.
    """

    def blocks(self) -> dict[str, nn.Module]:
        """Return no blocks; use `Base.sparse` for them."""
        return {}


@dataclass(frozen=True)
class Base:
    """A public model and its source.

    Args:
        source: where it comes from, with form "text-to-text".
    """

    source: ModelSource

    @cached_property
    def family(self) -> Family | None:
        """Return the family of a mixture of experts, or None for a dense decoder.

        Raises:
            ModelError: for a model that is not a decoder of a known kind.
        """
        kind = self.source.config.model_type
        if self.source.config.is_encoder_decoder:
            raise ModelError(f"model type {kind!r} is an encoder-decoder; packages are for causal language models")
        family = self.source.family
        return family if has_experts(self.source.config) else None

    def setup(self, experiment: Experiment, task: Task | None = None) -> Setup:
        """Return the set-up by which an experiment reads rows and trains, with this model, which may be dense."""
        labels = [] if task is None else [(task.name, task.labels)]
        return replace(experiment, model=self.source).setup(labels)

    def model(self) -> Frozen:
        """Return the live model on the CPU, all parameters frozen, in evaluation mode."""
        source = self.source
        if self.family is None:
            backbone, family = dense_model(source).to(source.torch_dtype), source.family
        else:
            backbone, family = source.build(source.load(), "", ()).backbone, self.family
        return _frozen(backbone, family, source.torch_dtype)

    def open_model(self) -> Frozen:
        """Return a live mixture of experts that accepts further experts.

        A dense decoder becomes a mixture with a single expert, its own feed-forward network, and a router row of zeros.
        This mixture computes the same as the dense model.

        Raises:
            ModelError: for a family whose router cannot take one more row.
        """
        source = self.source
        if self.family is not None:
            _check_open(source.config.model_type, self.family.name)
            return self.model()
        backbone, family = convert(dense_model(source).to(source.torch_dtype), Upcycling(experts=2, top_k=2))
        _check_open(family.model_type, family.name)
        task = TaskModel(backbone, family, "", (), source.torch_dtype)
        slice_experts(task, {block: (0,) for block in task.blocks()})
        for block in task.blocks().values():
            nn.init.zeros_(block.get_submodule(family.router).weight)
        return _frozen(backbone, family, source.torch_dtype)

    @property
    def top_k(self) -> int:
        """Return the experts per token of the public model; 1 for a dense model."""
        return 1 if self.family is None else int(self.source.config.num_experts_per_tok)

    @cached_property
    def digest(self) -> str:
        """Return the sha256 (hex) of the public model's tensors, which stay frozen during training."""
        return digest_of(frozen_tensors(self.model()))

    @staticmethod
    def sparse(model: TaskModel) -> dict[str, nn.Module]:
        """Return block name -> sparse block, in the order of the layers."""
        return TaskModel.blocks(model)


def _frozen(backbone: nn.Module, family: Family, dtype: torch.dtype) -> Frozen:
    model = Frozen(backbone, family, "", (), dtype)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def _check_open(model_type: str, name: str) -> None:
    if model_type not in OPEN_FAMILIES:
        raise ModelError(
            f"{name} cannot take one more expert exactly (groups, a correction bias or a sampling router); whole "
            f"experts are for {', '.join(OPEN_FAMILIES)}; train adapters instead (--kind adapter)"
        )


def frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return path -> tensor of all parameters without a gradient, and of all floating-point buffers."""
    frozen_params = {path: p for path, p in model.named_parameters() if not p.requires_grad}
    return frozen_params | {path: b for path, b in model.named_buffers() if b.is_floating_point()}


def digest_of(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> str:
    """Return the sha256 (hex) of names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(dict(tensors).items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
