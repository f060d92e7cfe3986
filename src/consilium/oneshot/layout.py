"""The layout of packages for a public model: the names and shapes that their tensors may have."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from consilium.oneshot.adapters import target_modules
from consilium.oneshot.base import OPEN_FAMILIES, Base

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """The tensors that packages for a public model may contain.

    Args:
        fingerprint: fingerprint of the model's files (`ModelSource.fingerprint`).
        frozen: sha256 of its tensors.
        dtype: dtype in which sites train, "float32" or "bfloat16".
        modules: path -> (X, Y) of the modules that adapters may be attached to.
        experts: sparse block -> name of an expert's tensor -> its shape; {}: no whole experts.
        width: D, the model's width.
    """

    fingerprint: str
    frozen: str
    dtype: str
    modules: dict[str, tuple[int, int]]
    experts: dict[str, dict[str, tuple[int, ...]]]
    width: int

    @classmethod
    def of(cls, base: Base) -> "Layout":
        """Derive the layout from a public model."""
        experts: dict[str, dict[str, tuple[int, ...]]] = {}
        if base.family is None or base.source.config.model_type in OPEN_FAMILIES:
            model = base.open_model()
            for path, block in Base.sparse(model).items():
                module = block.get_submodule(model.family.experts)
                experts[path] = {name: tuple(getattr(module, name).shape[1:]) for name in model.family.tensors}
        model = base.model()
        modules = target_modules(model, "both")
        source = base.source
        return cls(source.fingerprint, base.digest, source.dtype, modules, experts, model.config.hidden_size)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "Layout":
        """Return the layout that was saved by `dataclasses.asdict`."""
        modules = {path: (int(x), int(y)) for path, (x, y) in saved["modules"].items()}
        experts = {b: {n: tuple(shape) for n, shape in t.items()} for b, t in saved["experts"].items()}
        return cls(saved["fingerprint"], saved["frozen"], saved["dtype"], modules, experts, int(saved["width"]))
