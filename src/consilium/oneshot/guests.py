"""Whole experts of sites next to the frozen experts of the public model (FlexOlmo).

Shi, Bhagia, Farhat, Muennighoff et al. FlexOlmo: Open Language Models for Flexible Data Use. NeurIPS 2025.
https://arxiv.org/abs/2507.07024

A site trains a copy of a public expert in every sparse layer, its router row, and optionally a bias min(b, 0) on the
row's logit; everything else is frozen. To combine guests of several sites, their rows are appended to the router's
rows, and their experts to the experts. Without a bias the result is an ordinary model of the family (`fuse`).

Shapes: N tokens, D model width, E public experts, G guests.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from consilium.errors import ModelError
from consilium.moe.model import TaskModel
from consilium.oneshot.base import Base

__all__ = ["Guest", "OpenExperts", "OpenRouter", "fuse", "open_blocks"]


@dataclass(frozen=True)
class Guest:
    """One expert of a site in one block.

    Args:
        tensors: tensor name in the family -> tensor (without the dimension of experts).
        row_D: its router row.
        bias: scalar tensor that counts as min(bias, 0); None: no bias.
    """

    tensors: Mapping[str, Tensor]
    row_D: Tensor
    bias: Tensor | None = None


class OpenRouter(nn.Module):
    """The family's own router over its own rows and those of guests.

    The amounts that are added to the logits of guests (a bias, a domain score) become G more coordinates of every
    token, and the rows of the guests get a unit matrix of G more columns. The family's forward pass therefore stays
    unchanged.

    Attributes:
        adjust: x [N, D] -> amounts added to the logits of guests [N, G]; None: only the biases are added.
    """

    def __init__(self, router: nn.Module, guests: Sequence[Guest], top_k: int):
        super().__init__()
        self.router = router
        self.rows = nn.ParameterList(nn.Parameter(guest.row_D.clone()) for guest in guests)
        biases = [guest.bias for guest in guests]
        self.biases = nn.ParameterList(nn.Parameter(b.clone()) for b in biases if b is not None)
        self._has_bias = tuple(b is not None for b in biases)
        self.adjust: Callable[[Tensor], Tensor] | None = None
        router.top_k = top_k
        if hasattr(router, "num_experts"):
            router.num_experts += len(guests)

    def bias_G(self) -> Tensor:
        """Return min(b, 0) of every guest; 0 for a guest without bias."""
        biases = iter(self.biases)
        zero = self.router.weight.new_zeros(())
        return torch.stack([next(biases).clamp(max=0) if has_bias else zero for has_bias in self._has_bias])

    def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of the family's router, over E + G experts."""
        x_ND, public_rows, guests = hidden.reshape(-1, hidden.shape[-1]), self.router.weight, len(self.rows)
        rows = torch.cat([public_rows, torch.stack(list(self.rows))])
        state = {"weight": rows}
        if len(self.biases) or self.adjust is not None:
            added_NG = self.bias_G().to(x_ND.dtype).expand(len(x_ND), -1)
            if self.adjust is not None:
                added_NG = added_NG + self.adjust(x_ND).to(x_ND.dtype)
            unit = torch.cat(
                [rows.new_zeros(len(public_rows), guests), torch.eye(guests, dtype=rows.dtype, device=rows.device)]
            )
            state["weight"] = torch.cat([rows, unit], dim=1)
            x_ND = torch.cat([x_ND, added_NG], dim=1)
        if "bias" in dict(self.router.named_parameters(recurse=False)):
            state["bias"] = torch.cat([self.router.bias, self.router.bias.new_zeros(guests)])
        if hasattr(self.router, "hidden_dim"):
            self.router.hidden_dim = x_ND.shape[1]
        return torch.func.functional_call(self.router, state, (x_ND,))


class OpenExperts(nn.Module):
    """The family's own experts, and guests with indices from E on."""

    def __init__(self, experts: nn.Module, guests: Sequence[Guest]):
        super().__init__()
        self.experts = experts
        self.count = int(experts.num_experts)
        self.guests = nn.ModuleList(
            nn.ParameterDict({name: nn.Parameter(t.clone()) for name, t in guest.tensors.items()}) for guest in guests
        )

    def forward(self, hidden_ND: Tensor, index_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs, [N, D]."""
        public_NK = index_NK < self.count
        out = self.experts(
            hidden_ND,
            torch.where(public_NK, index_NK, 0),
            torch.where(public_NK, weights_NK, torch.zeros_like(weights_NK)),
        )
        for i, tensors in enumerate(self.guests):
            token, slot = torch.where(index_NK == self.count + i)
            if len(token):
                y_ND = self._compute(hidden_ND[token], tensors)
                out = out.index_add(0, token, (y_ND * weights_NK[token, slot, None]).to(out.dtype))
        return out

    def _compute(self, x_ND: Tensor, tensors: nn.ParameterDict) -> Tensor:
        def product(x: Tensor, name: str) -> Tensor:
            matrix = tensors[name]
            y = x @ matrix if self.experts.is_transposed else nn.functional.linear(x, matrix)
            return y + tensors[f"{name}_bias"] if f"{name}_bias" in tensors else y

        return product(self.experts._apply_gate(product(x_ND, "gate_up_proj")), "down_proj")


@dataclass(frozen=True)
class Opened:
    """The open parts of a live model: block -> router, and block -> experts."""

    routers: Mapping[str, OpenRouter] = field(default_factory=dict)
    experts: Mapping[str, OpenExperts] = field(default_factory=dict)


def open_blocks(model: TaskModel, guests: Mapping[str, Sequence[Guest]], top_k: int) -> Opened:
    """Add guests to the sparse blocks of a live model, in place.

    Args:
        guests: block -> its guests, for every block.
        top_k: experts per token, 1 .. E + G.
    """
    routers, experts, family = {}, {}, model.family
    for path, block in Base.sparse(model).items():
        routers[path] = OpenRouter(getattr(block, family.router), guests[path], top_k)
        experts[path] = OpenExperts(getattr(block, family.experts), guests[path])
        setattr(block, family.router, routers[path])
        setattr(block, family.experts, experts[path])
    return Opened(routers, experts)


def fuse(model: TaskModel, guests: Mapping[str, Sequence[Guest]], top_k: int) -> TaskModel:
    """Turn guests into ordinary experts of the family, in place, and update the configuration.

    Raises:
        ModelError: for a guest whose router bias is not 0, in a family whose router has none.
    """
    family, number = model.family, 0
    for path, block in Base.sparse(model).items():
        router, experts = getattr(block, family.router), getattr(block, family.experts)
        own_bias = "bias" in dict(router.named_parameters(recurse=False))
        biases = [0.0 if g.bias is None else float(g.bias.clamp(max=0)) for g in guests[path]]
        if any(biases) and not own_bias:
            raise ModelError(
                f"the router rows of {path} have biases ({', '.join(f'{b:.3g}' for b in biases if b)}), and a "
                f"checkpoint of {family.name} has no place for them: train with --no-bias, or write --format consilium"
            )
        rows = torch.cat([router.weight, *(g.row_D[None].to(router.weight.dtype) for g in guests[path])])
        router.weight = nn.Parameter(rows, requires_grad=False)
        if own_bias:
            router.bias = nn.Parameter(torch.cat([router.bias, router.bias.new_tensor(biases)]), requires_grad=False)
        for name in family.tensors:
            tensor = getattr(experts, name)
            guest_tensor = torch.stack([g.tensors[name].to(tensor.dtype) for g in guests[path]])
            setattr(experts, name, nn.Parameter(torch.cat([tensor, guest_tensor]), requires_grad=False))
        number = len(rows)
        for owner in (router, experts):
            if hasattr(owner, "num_experts"):
                owner.num_experts = number
        router.top_k = top_k
    model.config = model.backbone.config = copy.deepcopy(model.config)  # the source's own configuration stays as it is
    setattr(model.config, family.number, number)
    model.config.num_experts_per_tok = top_k
    return model
