"""One flat name space for trunk, experts and router rows, independent of a family's own layout.

    trunk        the parameter's own path            encoder.block.0.layer.0.SelfAttention.q.weight
    expert       <block>.experts.<id>.<tensor>       model.layers.3.mlp.experts.17.down_proj
    adapter      <block>.experts.<id>.<tensor>.lora_A   of a LoRA on the tensor (or module); and .lora_B
                 <path of a linear layer>.lora_A        in a dense model
    folded       <block>.experts.<id>.<tensor>.lora_W   what a rule of `moe.rules` has added to it, on the server
    router row   <block>.router.<id>.<tensor>        model.layers.3.mlp.router.17.weight (also where it is a buffer)
    head row     head.<task>.<label>.<tensor>        head.topic.numpy.weight

Ids are those of the full model. A model that holds experts (3, 17) of a block keeps them in local places (0, 1). Only
this module translates between the two: `load_flat` on the way in and `flatten` on the way out.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from consilium.core import ExpertSet, counts_of
from consilium.errors import ModelError
from consilium.moe.model import TaskModel
from consilium.params import Params

__all__ = [
    "all_experts",
    "expert_of",
    "flatten",
    "is_adapter",
    "load_flat",
    "local",
    "pack",
    "router_row_of",
    "row_dimension",
    "select",
    "tensors",
    "travels",
    "unpack",
]

Table = dict[str, str | tuple[str, ...]]
"""Path of a tensor -> its flat name, or a tuple with the flat names of its slices, one per expert or label."""


def all_experts(model: TaskModel) -> dict[str, tuple[int, ...]]:
    """Return all expert places of the model in its present state: block -> (0, .., E-1)."""
    if not model.blocks():  # A small dense model has no family to ask.
        return {}
    row, extra = model.family.row_paths[0], model.family.extra
    return {name: tuple(range(_at(block, row).shape[0] - extra)) for name, block in model.blocks().items()}


def expert_of(key: str) -> tuple[str, int] | None:
    """Return (block, id) for the flat name of an expert, and None for any other name."""
    return _split(key, ".experts.")


def is_adapter(key: str) -> bool:
    """Return True if a flat name belongs to an adapter."""
    return key.endswith((".lora_A", ".lora_B")) and not key.startswith("head.")


def travels(key: str) -> bool:
    """Return True if a tensor is sent between server and clients when a model is trained by adapters.

    This holds for adapters, router rows and head rows.
    """
    return is_adapter(key) or router_row_of(key) is not None or key.startswith("head.")


def router_row_of(key: str) -> tuple[str, int] | None:
    """Return (block, id) for the flat name of a router row, and None for any other name."""
    return _split(key, ".router.")


def _first(name: str | tuple[str, ...]) -> str:
    return name if isinstance(name, str) else name[0]


def _split(key: str, infix: str) -> tuple[str, int] | None:
    block, separator, rest = key.partition(infix)
    if block.startswith("head."):  # The name of a label may look like anything.
        return None
    number = rest.split(".", 1)[0]
    return (block, int(number)) if separator and number.isdecimal() else None


def select(params: Mapping[str, Tensor], task: str, held: ExpertSet | None = None) -> Params:
    """Return the parameters that a client of `task` needs: trunk, its experts, their router rows and the task's head.

    The tensors are not copied.

    Args:
        held: block -> ids of the client's experts; None: every expert.
    """
    selection = {}
    for key, tensor in params.items():
        if key.startswith("head."):
            is_needed = key.startswith(f"head.{task}.")
        else:
            place = None if held is None else (expert_of(key) or router_row_of(key))
            is_needed = place is None or place[1] in held.get(place[0], ())
        if is_needed:
            selection[key] = tensor
    return selection


def _at(block: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    return getattr(block.get_submodule(owner), name)


def row_dimension(tensor: Tensor, total: int) -> int:
    """Return the dimension that indexes the rows of experts: 1 for [1, E] with E > 1, otherwise 0."""
    return int(tensor.ndim == 2 and tensor.shape[0] == 1 and tensor.shape[1] >= total > 1)


def table(model: TaskModel, held: ExpertSet | None = None) -> Table:
    """Return the flat names of all tensors of the model.

    Args:
        held: the full-model ids of the experts in the model's places; None: all, in order.

    Raises:
        ModelError: if `held` does not name as many experts as the model has places.
    """
    places = all_experts(model)
    held = places if held is None else held
    if counts_of(held) != counts_of(places):
        raise ModelError(f"the model has {counts_of(places)} experts per block, the names given are {counts_of(held)}")
    names: Table = {}
    for path, tensor in tensors(model).items():
        names[path] = _flat_name(path, tensor, model.family, held)
    for path in model.adapters.named() if model.adapters is not None else ():
        names[path] = path
        if block_and_place := expert_of(path):
            block, place = block_and_place
            names[path] = path.replace(f".experts.{place}.", f".experts.{held[block][place]}.", 1)
    if model.head is not None:
        for leaf in ("weight", "bias"):
            names[f"head.{leaf}"] = tuple(f"head.{model.task}.{label}.{leaf}" for label in model.labels)
    return names


def _flat_name(path: str, tensor: Tensor, family: Any, held: ExpertSet) -> str | tuple[str, ...]:
    for block, ids in held.items():
        if not path.startswith(block + "."):
            continue
        rest = path[len(block) + 1 :]
        if rest in family.row_paths:
            leaf = rest.rsplit(".", 1)[-1]
            return (*(f"{block}.router.{i}.{leaf}" for i in ids), *_behind(path, tensor, len(ids)))
        if rest.startswith(family.experts + "."):
            inner = rest[len(family.experts) + 1 :]
            if inner in family.tensors:
                return (*(f"{block}.experts.{i}.{inner}" for i in ids), *_behind(path, tensor, len(ids)))
            module, _, leaf = inner.partition(".")
            for place, i in enumerate(ids):
                if family.layout == "modules" and module == family.module.format(place):
                    return f"{block}.experts.{i}.{leaf}"
    return path


def _behind(path: str, tensor: Tensor, experts: int) -> Iterator[str]:
    """Yield trunk names for the rows of a tensor that follow the rows of experts."""
    for j in range(tensor.shape[row_dimension(tensor, experts)] - experts):
        yield f"trunk.{path.replace('.experts.', '.expert.').replace('.router.', '.route.')}.{j}"


def unpack(names: Table, tensors: Mapping[str, Tensor]) -> Params:
    """Rename tensors in the model's layout to flat names. Slices are views."""
    flat: Params = {}
    for path, tensor in tensors.items():
        name = names[path]
        if isinstance(name, str):
            flat[name] = tensor
        else:  # Slices lie along the first dimension, or along the second for a row [1, E].
            flat.update(zip(name, tensor.unbind(int(tensor.shape[0] != len(name))), strict=True))
    return flat


def pack(names: Table, flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename flat tensors to the model's layout and stack slices. Keys that the model does not have are ignored.

    Raises:
        ModelError: if a flat name is missing; the message names the first one.
    """
    tensors = {}
    for path, name in names.items():
        try:
            tensors[path] = flat[name] if isinstance(name, str) else torch.stack([flat[n] for n in name])
        except KeyError as error:
            raise ModelError(f"the parameters lack {error.args[0]!r}, which {path!r} of the model needs") from None
    return tensors


def parameters(model: TaskModel) -> dict[str, nn.Parameter]:
    """Return path -> parameter, with tied parameters once.

    The head's parameters are called `head.weight` and `head.bias`. Adapters have their flat names with local places.
    """
    parameter_by_path = dict(model.backbone.named_parameters())
    if model.head is not None:
        parameter_by_path |= {f"head.{leaf}": p for leaf, p in model.head.named_parameters()}
    if model.adapters is not None:
        parameter_by_path |= model.adapters.named()
    return parameter_by_path


def tensors(model: TaskModel) -> dict[str, Tensor]:
    """Return all tensors that have flat names.

    These are `parameters` and the router rows that a family keeps in buffers. For a small dense model they include its
    floating-point buffers, such as those of norms.
    """
    family = model.family
    buffers = dict(model.backbone.named_buffers())
    if family is None:
        return parameters(model) | {path: t for path, t in buffers.items() if t.is_floating_point()}
    rows = [f"{block}.{row}" for block in model.blocks() for row in family.row_paths]
    return parameters(model) | {path: buffers[path] for path in rows if path in buffers}


def local(model: TaskModel, flat: Mapping[str, Tensor], held: ExpertSet | None = None) -> dict[str, Tensor]:
    """Return path -> value of every parameter in `flat`, in the dtype that it has there; see `load_flat`."""
    names, paths = table(model, held), parameters(model)
    parameter_names = {p: n for p, n in names.items() if p in paths and (model.adapters is None or travels(_first(n)))}
    return pack(parameter_names, flat)


def flatten(model: TaskModel, held: ExpertSet | None = None, masters: dict[str, Tensor] | None = None) -> Params:
    """Return all parameters under flat names; for a model with adapters, only those that `travels` accepts.

    The tensors are detached copies on the CPU that share no memory with the model. They have the model's dtype, even if
    a family keeps a part in float32 once it has run (Switch its routers). Only a correction bias keeps its own dtype,
    because training cannot restore the lost precision.

    Args:
        held: the full-model ids of the experts in the model's places; None: all, in order.
        masters: path -> float32 value that replaces a parameter. The mapping is emptied, and all floats are returned
            in float32.
    """
    family = model.family
    masters, in_float32 = ({}, False) if masters is None else (masters, bool(masters))
    correction_suffix = f".{family.correction}" if family is not None and family.correction else None
    names = table(model, held)
    memory_format = torch.contiguous_format  # This also gives a row of one element a stride of 1.
    flat: Params = {}
    for path, t in tensors(model).items():
        if model.adapters is not None and not travels(_first(names[path])):
            continue
        t = masters.pop(path, t).detach()
        if in_float32:
            t = t.to(torch.float32)
        elif not correction_suffix or not path.endswith(correction_suffix):
            t = t.to(model.dtype)
        parts = unpack(names, {path: t.cpu()})  # A few large transfers from a GPU are faster than many small ones.
        flat |= {key: part.to("cpu", copy=True, memory_format=memory_format) for key, part in parts.items()}
    return flat


def load_flat(model: TaskModel, flat: Mapping[str, Tensor], held: ExpertSet | None = None) -> TaskModel:
    """Write flat parameters into the model bit for bit, and materialise a model that was built on the meta device.

    Existing parameters keep their dtype; meta parameters and buffers take the dtype of the values. For a model with
    adapters, only the names that `travels` accepts are written. Tied parameters stay tied. `flat` may contain more
    names than the model has.

    Raises:
        ModelError: if a name is missing or a shape differs.
    """
    names = table(model, held)
    if model.adapters is not None:
        names = {path: name for path, name in names.items() if travels(_first(name))}
    tensor_by_path = pack(names, flat)
    new_parameters: dict[int, nn.Parameter] = {}
    for path, parameter in ((path, t) for path, t in tensors(model).items() if path in tensor_by_path):
        tensor = tensor_by_path[path]
        if parameter.shape == tensor.shape[::-1] and tensor.shape[1:] == (1,):  # Stacked rows of a tensor [1, E].
            tensor = tensor.view(parameter.shape)
        if parameter.shape != tensor.shape:
            raise ModelError(f"{path!r} has shape {tuple(parameter.shape)}, the parameters {tuple(tensor.shape)}")
        if not isinstance(parameter, nn.Parameter):
            owner, _, name = path.rpartition(".")
            tensor = tensor if parameter.is_meta else tensor.to(parameter.device, copy=True)
            setattr(model.backbone.get_submodule(owner), name, tensor)
        elif parameter.is_meta:
            value = tensor if isinstance(names[path], tuple) else tensor.clone()
            new_parameters[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        else:
            parameter.data.copy_(tensor)
    for module in model.modules() if new_parameters else ():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) in new_parameters:
                setattr(module, name, new_parameters[id(parameter)])
    return model
