"""Training with fewer active experts per token, and the means that compensate for it: an output scale for the experts,
balanced routing, and gradients for experts that no token reached.

Shapes: T tokens, E experts in the model, K experts chosen per token.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from consilium.core import ExpertSet
from consilium.moe.addressing import expert_of, table
from consilium.moe.gates import WEIGHTS
from consilium.moe.model import TaskModel
from consilium.moe.surgery import attribute
from consilium.params import Params

__all__ = ["activate", "add_scales", "balance_routing", "fill_gradients", "full_k", "scales_of"]

SCALE = "output_scale"


def full_k(model: TaskModel) -> int:
    """Return K of the full model, or 1 if the configuration of the family does not name it."""
    return int(getattr(model.config, "num_experts_per_tok", 1))


def activate(model: TaskModel, k: int) -> TaskModel:
    """Limit every token to at most k experts from now on, in place.

    A family with a fixed number of experts per token, such as Switch (one) or PhiMoE (two), is left unchanged.
    """
    family = model.family
    if family.top_k is not None and (family.least == 1 or family.groups):
        owner, _, name = family.top_k.rpartition(".")
        for block in model.blocks().values():
            setattr(block.get_submodule(owner), name, max(1, min(k, attribute(block, family.top_k))))
    return model


def add_scales(model: TaskModel, scales: Params) -> TaskModel:
    """Multiply the output of every block's experts by a trainable float32 scalar.

    A scalar starts at 1 if `scales` has no value for its block. Shared experts, which a family computes separately, are
    not scaled.

    Args:
        scales: block -> scalar.
    """
    for name, block in model.blocks().items():
        experts = block.get_submodule(model.family.experts)
        value = scales.get(name, torch.ones(())).to(next(model.backbone.parameters()).device, torch.float32, copy=True)
        experts.register_parameter(SCALE, nn.Parameter(value))
        experts.register_forward_hook(lambda module, args, output: output * getattr(module, SCALE).to(output.dtype))
    return model


def scales_of(model: TaskModel) -> Params:
    """Return the trained scalars by block, as copies on the CPU."""
    scales = {}
    for name, block in model.blocks().items():
        parameter = block.get_submodule(model.family.experts).get_parameter(SCALE)
        scales[name] = parameter.detach().to("cpu", torch.float32, copy=True)
    return scales


def balance_routing(model: TaskModel, candidates: int, reach: float, momentum: float) -> TaskModel:
    """Favour less used experts among each token's candidates during training, in place.

    A family is left unchanged if its router does more than take the K largest values of a softmax. Examples are
    correction biases, groups and capacity limits.

    Args:
        candidates: N, the number of experts with the largest logits of a token that may be chosen; 0: 2 K.
        reach: the largest change of a logit.
        momentum: momentum of the usage u: u <- momentum u + (1 - momentum) shares.
    """
    family = model.family
    takes_largest = family.correction is None and family.score == "softmax" and not family.groups and family.least == 1
    if not takes_largest or family.dispatch or (family.logits, family.routed) != (0, 2):
        return model
    normalises = family.normalised
    for block in model.blocks().values():
        router = block.get_submodule(family.router)
        router.register_forward_hook(Balanced(candidates, reach, momentum, normalises))
    return model


class Balanced:
    """A forward hook on a router that adds reach tanh(u*/u - 1) to the logits of the candidates, with u* = 1 / E.

    Attributes:
        u: usage [E], which sums to 1; it starts uniform.
    """

    def __init__(self, candidates: int, reach: float, momentum: float, normal: bool):
        self.candidates, self.reach, self.momentum, self.normal = candidates, reach, momentum, normal
        self.u: Tensor | None = None

    def __call__(self, router: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not router.training:
            return output
        logits_TE, gates_TK = output[0].float(), output[WEIGHTS]
        n_experts, k = logits_TE.shape[-1], gates_TK.shape[-1]
        u_E = torch.full((n_experts,), 1 / n_experts, device=logits_TE.device) if self.u is None else self.u
        change_E = self.reach * torch.tanh(1 / (n_experts * u_E.clamp(min=1e-6)) - 1)
        candidate_ids = logits_TE.topk(min(max(self.candidates or 2 * k, k), n_experts), dim=-1).indices
        candidates_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(-1, candidate_ids, True)
        changed_logits_TE = (logits_TE + change_E).masked_fill(~candidates_TE, float("-inf"))
        top_k = changed_logits_TE.softmax(-1).topk(k, dim=-1)
        weights = top_k.values / top_k.values.sum(-1, keepdim=True) if self.normal else top_k.values
        share_E = torch.bincount(top_k.indices.flatten(), minlength=n_experts).float() / top_k.indices.numel()
        self.u = self.momentum * u_E + (1 - self.momentum) * share_E
        return (output[0], weights.to(gates_TK.dtype), top_k.indices, *output[3:])


def fill_gradients(model: TaskModel, held: ExpertSet | None, factor: float):
    """Return a gradient correction for `training.fit`.

    The correction gives an expert that no token reached `factor` times the mean gradient of the reached experts of its
    block.
    """
    names = table(model, held)

    @torch.no_grad()
    def correct(trainable: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        parameters_by_tensor: dict[tuple[str, str], list[Tensor]] = {}
        for path, p in trainable.items():
            name = names[path]
            place = expert_of(name if isinstance(name, str) else name[0])
            if place is None:
                continue
            if isinstance(name, str):
                parameters_by_tensor.setdefault((place[0], name.split(f".experts.{place[1]}.", 1)[1]), []).append(p)
            elif p.grad is not None:
                reached_experts = p.grad.flatten(1).any(1)
                if reached_experts.any() and not reached_experts.all():
                    p.grad[~reached_experts] = factor * p.grad[reached_experts].mean(0)
        for members in parameters_by_tensor.values():
            reached_experts = [p for p in members if p.grad is not None and p.grad.any()]
            if reached_experts:
                mean = factor * torch.stack([p.grad for p in reached_experts]).mean(0)
                for p in members:
                    if all(p is not other for other in reached_experts):
                        p.grad = mean.clone()

    return correct
