"""Sub-networks of small models: some units of every layer, and the weights of neighbouring layers that belong to them.

A model is a chain of convolutions and linear layers in a Sequential (`models.cohort.ARCHITECTURES`). Every layer but
the last, which makes the representation, keeps some of its units (filters). The next layer then reads only these units;
after a Flatten, it reads all places of each. Flat names are those of the model: "3.weight", "3.bias".

Shapes: O units of a layer, I units that it reads, P places of a filter after a Flatten (1 elsewhere).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from consilium.errors import ConfigError
from consilium.params import Params

__all__ = ["Link", "chain", "cut", "narrowed", "params_of", "put"]

Units = Mapping[str, Sequence[int]]
"""Layer -> the kept units, ascending."""


@dataclass(frozen=True)
class Link:
    """A layer of the chain.

    Args:
        name: its index in the Sequential.
        units: O.
        before: name of the layer that it reads; "": the input.
        places: P of each unit of the layer `before`.
        inside: parameters of one unit per unit that it reads (a kernel's size).
    """

    name: str
    units: int
    before: str
    places: int
    inside: int


def chain(module: nn.Module) -> tuple[Link, ...]:
    """Return the layers of a model, in order.

    Raises:
        ConfigError: if the model is not a chain of convolutions and linear layers.
    """
    if not isinstance(module, nn.Sequential):
        raise ConfigError(
            f"{type(module).__name__} is no chain of layers; sub-networks are for cnn-*, mnist-* and mlp-*"
        )
    links: list[Link] = []
    for name, layer in module.named_children():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            previous_link = links[-1] if links else None
            out_units, in_units = layer.weight.shape[:2]
            places = in_units // previous_link.units if previous_link and isinstance(layer, nn.Linear) else 1
            inside = layer.weight[0, 0].numel() * places if previous_link else layer.weight[0].numel()
            links.append(Link(name, out_units, previous_link.name if previous_link else "", places, inside))
        elif any(True for _ in layer.parameters()):
            raise ConfigError(
                f"{type(layer).__name__} in a model of which sub-networks are taken; allowed are Conv2d, Linear"
            )
    return tuple(links)


def _places(link: Link, units: Units) -> Tensor | None:
    """Return the indices of a layer's inputs that belong to the kept units, or None for all inputs."""
    if link.before not in units:
        return None
    unit_ids = torch.tensor(units[link.before])
    return (unit_ids[:, None] * link.places + torch.arange(link.places)).flatten()


def cut(params: Mapping[str, Tensor], links: Sequence[Link], units: Units) -> Params:
    """Return the parameters of a sub-network; uncut tensors and names outside the chain (heads) are not copied."""
    sub_params = dict(params)
    for link in links:
        weight, bias, input_indices = params[f"{link.name}.weight"], params[f"{link.name}.bias"], _places(link, units)
        if link.name in units:
            unit_ids = torch.tensor(units[link.name])
            weight, bias = weight[unit_ids], bias[unit_ids]
        sub_params[f"{link.name}.weight"] = weight if input_indices is None else weight[:, input_indices].contiguous()
        sub_params[f"{link.name}.bias"] = bias
    return sub_params


def put(sums: Params, counts: Params, sub: Mapping[str, Tensor], links: Sequence[Link], units: Units, w: float) -> None:
    """Add a sub-network, weighted by w, to running sums in place.

    Args:
        sums: float64, shaped like the whole model; w times the sub-network is added at its places.
        counts: float64, shaped like the whole model; w is added at the same places.
        sub: parameters of the sub-network.
        links: the layers of the model.
        units: the kept units.
        w: the weight.
    """
    for link in links:
        input_indices = _places(link, units)
        unit_ids = torch.tensor(units[link.name]) if link.name in units else torch.arange(link.units)
        for leaf in ("weight", "bias"):
            key = f"{link.name}.{leaf}"
            if leaf == "bias" or input_indices is None:
                sums[key].index_add_(0, unit_ids, sub[key].double(), alpha=w)
                counts[key].index_add_(0, unit_ids, torch.ones_like(sub[key], dtype=torch.float64), alpha=w)
            else:
                rows_OX, count_OX = sums[key].index_select(0, unit_ids), counts[key].index_select(0, unit_ids)
                rows_OX.index_add_(1, input_indices, sub[key].double(), alpha=w)
                count_OX.index_add_(1, input_indices, torch.ones_like(sub[key], dtype=torch.float64), alpha=w)
                sums[key][unit_ids], counts[key][unit_ids] = rows_OX, count_OX


def narrowed(module: nn.Sequential, units: Units) -> nn.Sequential:
    """Replace the layers of a model in place by new ones of the sub-network's widths, and return the model."""
    for link in chain(module):
        layer = module.get_submodule(link.name)
        out_units = len(units.get(link.name, range(link.units)))
        input_indices = _places(link, units)
        if isinstance(layer, nn.Conv2d):
            inputs = layer.in_channels if input_indices is None else len(input_indices)
            new_layer = nn.Conv2d(
                inputs, out_units, layer.kernel_size, layer.stride, layer.padding, device=layer.weight.device
            )
        else:
            inputs = layer.in_features if input_indices is None else len(input_indices)
            new_layer = nn.Linear(inputs, out_units, device=layer.weight.device)
        module[int(link.name)] = new_layer
    return module


def params_of(links: Sequence[Link], units: Units) -> int:
    """Return the number of parameters of a sub-network, without heads."""
    total = 0
    for link in links:
        out_units = len(units.get(link.name, range(link.units)))
        input_count = len(units[link.before]) if link.before in units else None
        previous_units = next((other.units for other in links if other.name == link.before), 1)
        total += out_units * (link.inside * (previous_units if input_count is None else input_count) + 1)
    return total
