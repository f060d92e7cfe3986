"""Loading of models written by `build.write`, in any of its formats, as live models of transformers."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from consilium.errors import ModelError, PackageError
from consilium.inside import refuse_links
from consilium.moe.build import ModelSource
from consilium.oneshot.base import Base, Frozen
from consilium.oneshot.build import BUILT, PARTS, Building, assemble
from consilium.oneshot.package import Package

__all__ = ["load_built", "record_of"]


def record_of(folder: Path) -> dict[str, Any]:
    """Return the contents of a built model's `oneshot.json`.

    Raises:
        ModelError: for another folder.
    """
    try:
        record = json.loads((folder / BUILT).read_text())
        record["format"], record["building"], record["sites"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder} is not what `consilium hub build` makes ({type(error).__name__})") from error
    return record


def load_built(folder: Path, model: str = "") -> Frozen:
    """Load a built model; `.backbone` is the model of transformers.

    Args:
        model: place of the public model; "": its place when the model was built.

    Raises:
        ModelError: for a folder that is no built model or broken, or another public model.
    """
    record = record_of(folder)
    refuse_links(folder)
    if record["format"] == "transformers":
        return Base(ModelSource(str(folder.resolve()), "text-to-text", record["dtype"])).model()
    base = Base(ModelSource(model or record["model"], "text-to-text", record["dtype"]))
    if base.source.fingerprint != record["fingerprint"]:
        raise ModelError(f"{base.source.path} is another model than the one that {folder} was built for")
    try:
        tensors = _peft_tensors(folder, record) if record["format"] == "peft" else load_file(folder / PARTS)
        building = Building(**{**record["building"], "sites": tuple(record["building"]["sites"])})
        packages = {site: _package(site, record, tensors) for site in record["sites"]}
        router_tensors = {name[1:]: tensor for name, tensor in tensors.items() if name.startswith("/")}
        return assemble(base, packages, building, router_tensors)
    except (OSError, SafetensorError, TypeError, KeyError, AttributeError, PackageError) as error:
        raise ModelError(f"{folder} is broken ({type(error).__name__}: {error}); build it again") from error


def _package(site: str, told: dict[str, Any], tensors: dict[str, Tensor]) -> Package:
    site_tensors = {name.removeprefix(f"{site}/"): t for name, t in tensors.items() if name.startswith(f"{site}/")}
    scale = float(told["sites"][site]["scale"])
    return Package(site, told["kind"], "none", told["fingerprint"], "", 1, scale, tensors=site_tensors)


def _peft_tensors(folder: Path, told: dict[str, Any]) -> dict[str, Tensor]:
    tensors = {}
    for site in told["sites"]:
        for name, tensor in load_file(folder / site / "adapter_model.safetensors").items():
            tensors[f"{site}/{name.removeprefix('base_model.model.').removesuffix('.weight')}"] = tensor
    return tensors
