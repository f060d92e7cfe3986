"""The scaling of a slice's gates, so that a sub-MoE weighs its experts as the full model would.

A router multiplies the output of each chosen expert by a gate. In some families the gate is a share of a softmax over
all experts (Switch, DeepSeek-V2; OLMoE, Qwen2-MoE and Qwen3-MoE with `norm_topk_prob` false). A slice runs this softmax
over its own n of E router rows, so every gate grows, and the output of a layer grows with it: up to eight times on the
shipped model. `fit.gates` selects the correction. With q_e the softmax over the n rows, p_e over all E rows, k the
experts per token, K the k best of the n and T the k best of the E, the gate of an expert e in K is

    "constant"   c q_e                          c: one number per layer and n, see below
    "full"       p_e                            = q_e sigmoid(logsumexp(held logits) - logsumexp(absent logits))
    "mass"       q_e sum_T p / sum_K q          the total gate of a token is that of the full router
    "slice"      q_e                            no correction

A layer that holds all its experts is not changed by any setting.

"constant" is the default because it is the only one of the first three that plain transformers can represent: a
configuration has one number for the rows of the softmax, the candidates of the top-k and the experts. Absent experts
replaced by zeros would take places among the best k ("drop", which measured worse than all of these). A constant is
multiplied into the second matrices of the experts on export, which is exact. "full" and "mass" need the router rows of
the absent experts. These rows are sent along but neither trained nor returned; an expert's row is trained by the
clients that hold the expert. Models trained with these settings can only be exported with `--format consilium`.

The constant keeps the mean total gate of a token:

    c(n) = E[sum_T p] / E[sum_K q]              over public tokens and random choices of n experts

`measure_scales` computes it from a model and tokens, and a model's card (`card.json`, "gates_public") stores it for
every layer and n. It depends on n alone, so it is the same for all clients with the same number of experts in that
layer, and no client's data enters it. Without a card it is the geometric mean of two values: max(n, k) / E, which holds
for a uniform router, and 1, which holds for a router that is always certain: c(n) = sqrt(max(n, k) / E).

All settings are equivalent if gates do not depend on absent experts. This is so where gates are normalised over the
chosen k (Mixtral, GraniteMoE, gpt-oss, Ernie 4.5; OLMoE, Qwen2-MoE and Qwen3-MoE with `norm_topk_prob`), where each is
a sigmoid of its own logit (DeepSeek-V3, GLM4-MoE, normalised or not), and in PhiMoE, where gates are normalised over
the experts within a few percent of the best.

Shapes: T tokens, D model width, E experts, N experts held, X absent, K experts per token.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from consilium.core import ExpertSet, Scalar, counts_of
from consilium.errors import ModelError, PayloadError
from consilium.moe.addressing import all_experts, router_row_of
from consilium.moe.families import Family, experts_per_token
from consilium.moe.model import Batch, TaskModel
from consilium.params import Params

__all__ = [
    "KINDS",
    "NEED_ROWS",
    "Gates",
    "Kind",
    "absent_rows",
    "attach_gates",
    "default_scale",
    "fold_gates",
    "gates_from_scalars",
    "gates_to_scalars",
    "measure_scales",
    "shares_gates",
]

Kind = Literal["constant", "full", "mass", "slice"]
KINDS: tuple[str, ...] = get_args(Kind)
NEED_ROWS = ("full", "mass")
"""The kinds that need the router rows of absent experts."""
MOST = 1e4
"""The largest constant that is accepted from a payload; measured constants are about 1 at most."""
WEIGHTS = 1
"""Position of the chosen experts' gates in the output tuple of the routers that are scaled here."""


@dataclass(frozen=True)
class Gates:
    """The scaling of the gates of a sliced model; see the module.

    Args:
        kind: one of `KINDS`.
        scale: with "constant": block -> c, > 0; 1 if a block is missing.
        rows: with "full" and "mass": the router rows of the absent experts, by flat names.
    """

    kind: Kind = "slice"
    scale: Mapping[str, float] = field(default_factory=dict)
    rows: Params = field(default_factory=dict)


def shares_gates(family: Family) -> bool:
    """Return True if gates are shares of a softmax over all experts, so that absent experts change their scale."""
    return not family.normalised


def default_scale(held: int, total: int, top_k: int) -> float:
    """Return c for a layer with `held` of `total` experts if nothing was measured."""
    return math.sqrt(min(max(held, top_k) / total, 1.0))


def gates_to_scalars(scale: Mapping[str, float]) -> dict[str, Scalar]:
    """Return the constants as scalars of a payload, one number per block."""
    return {f"gates/{block}": float(c) for block, c in scale.items()}


def gates_from_scalars(kind: Kind, scalars: Mapping[str, Scalar], rows: Params) -> Gates:
    """Return the gates that a payload asks for.

    Args:
        kind: `fit.gates`.
        scalars: scalars of the payload.
        rows: the payload's group "router".

    Raises:
        PayloadError: for a constant that is not a number in (0, MOST].
    """
    if kind in NEED_ROWS:
        return Gates(kind, rows=rows)
    scale = {}
    for key, value in scalars.items():
        if not key.startswith("gates/"):
            continue
        if isinstance(value, (bool, str, list)) or not 0 < value <= MOST:
            raise PayloadError(f"{key} is {value!r}; it must be a number in (0, {MOST:g}]")
        scale[key.removeprefix("gates/")] = float(value)
    return Gates(kind, scale if kind == "constant" else {})


def absent_rows(params: Params, held: ExpertSet) -> Params:
    """Return the router rows of the experts that are not held, by flat names, without copying the tensors."""
    rows = {}
    for key, tensor in params.items():
        place = router_row_of(key)
        if place is not None and place[1] not in held.get(place[0], ()):
            rows[key] = tensor
    return rows


def attach_gates(model: TaskModel, gates: Gates) -> TaskModel:
    """Scale the gates of a sliced model from now on, in place, and store the scaling in `model.gates`.

    Blocks that hold all experts, and families with gates that do not depend on absent experts, are left unchanged.

    Raises:
        ModelError: if "full" or "mass" lacks the row of an absent expert, or the model's gates are scaled already.
    """
    if model.gates is not None and model.gates.kind != "slice":
        raise ModelError(f"the gates of this model are scaled already ({model.gates.kind}); build it anew")
    model.gates = gates
    if gates.kind == "slice" or not shares_gates(model.family):
        return model
    total = int(getattr(model.config, model.family.number))
    counts = counts_of(all_experts(model))
    for name, block in model.blocks().items():
        if counts[name] == total:
            continue
        router = block.get_submodule(model.family.router)
        if gates.kind == "constant":
            router.register_forward_hook(_Constant(gates.scale.get(name, 1.0)))
        else:
            weight_XD, bias_X = _rows(gates.rows, name, total - counts[name])
            router.register_buffer("absent_weight", weight_XD, persistent=False)
            router.register_buffer("absent_bias", bias_X, persistent=False)
            router.register_forward_hook(_Shared(gates.kind, model.family.logits, experts_per_token(model.config)))
    return model


def fold_gates(model: TaskModel) -> TaskModel:
    """Multiply the constants into the experts' second matrices, in place, so that the gates need no scaling.

    The outputs of the model do not change.

    Raises:
        ModelError: for "full" and "mass", which cannot be expressed by weights.
    """
    gates = model.gates
    if gates is None or gates.kind == "slice" or not shares_gates(model.family):
        return model
    counts, total = counts_of(all_experts(model)), int(getattr(model.config, model.family.number))
    sliced_blocks = [name for name, n in counts.items() if n < total]
    if gates.kind in NEED_ROWS and sliced_blocks:
        raise ModelError(
            f"the gates of {sliced_blocks[0]} depend on the router rows of experts that are not held (fit.gates is "
            f"{gates.kind!r}), and no configuration of {model.family.name} can say so"
        )
    for name in sliced_blocks:
        block = model.blocks()[name]
        router, experts = block.get_submodule(model.family.router), block.get_submodule(model.family.experts)
        for key, hook in list(router._forward_hooks.items()):
            if isinstance(hook, _Constant):
                del router._forward_hooks[key]
        target = model.family.lora_targets[-1]
        for path, parameter in experts.named_parameters():
            if target in path.split(".") or path == f"{target}_bias":
                parameter.data = parameter.data * gates.scale.get(name, 1.0)
    model.gates = Gates()
    return model


@torch.no_grad()
def measure_scales(
    model: TaskModel, batches: Iterable[Batch], draws: int = 64, seed: int = 0
) -> dict[str, list[float]]:
    """Measure c(n) of every layer: block -> [c(1), .., c(E)]; {} for a family with gates that need no constant.

    Args:
        model: a model with all its experts.
        batches: batches of public data; padding is left out.
        draws: the number of random choices of n experts; if there are no more than this, all choices are used.
        seed: seed of the random choices.
    """
    from consilium.moe.routing import Tap

    if not shares_gates(model.family):
        return {}
    training, k = model.training, experts_per_token(model.config)
    rng = torch.Generator().manual_seed(seed)
    counts = counts_of(all_experts(model))
    subsets = {(block, n): _choices(total, n, draws, rng) for block, total in counts.items() for n in range(1, total)}
    full_sums = dict.fromkeys(counts, 0.0)
    subset_sums = dict.fromkeys(subsets, 0.0)
    model.eval()
    with Tap(model) as tap:
        for batch in batches:
            with tap.batch(batch):
                model(batch)
            for block, p_TE in tap.gates().items():
                p_TE = p_TE.clamp_min(1e-30)  # Shares among n experts stay defined if a token all but excludes them.
                full_sums[block] += float(p_TE.topk(k, dim=-1).values.sum())
                for n in range(1, counts[block]):
                    for ids in subsets[block, n]:
                        p_TN = p_TE[:, ids.to(p_TE.device)]
                        best_TK = p_TN.topk(min(k, n), dim=-1).values
                        subset_sums[block, n] += float((best_TK.sum(-1) / p_TN.sum(-1)).sum()) / len(subsets[block, n])
    model.train(training)
    return {
        block: [round(full_sums[block] / subset_sums[block, n], 4) for n in range(1, total)] + [1.0]
        for block, total in counts.items()
    }


def _choices(total: int, n: int, draws: int, rng: torch.Generator) -> list[Tensor]:
    """Return all choices of n experts, or `draws` random ones if there are more."""
    if math.comb(total, n) <= draws:
        return [torch.tensor(ids) for ids in combinations(range(total), n)]
    return [torch.randperm(total, generator=rng)[:n] for _ in range(draws)]


def _rows(rows: Params, block: str, absent: int) -> tuple[Tensor, Tensor | None]:
    """Return weights [X, D] and biases [X] (None: there are none) of a block's absent rows, ascending by id."""
    prefix = f"{block}.router."
    ids = sorted({router_row_of(key)[1] for key in rows if key.startswith(prefix)})
    if len(ids) != absent:
        raise ModelError(f"{block} lacks {absent} experts, and there are router rows of {len(ids)} of them")
    weight_XD = torch.stack([rows[f"{prefix}{i}.weight"].detach() for i in ids])
    biases = [rows[name].detach() for i in ids if (name := f"{prefix}{i}.bias") in rows]
    return weight_XD, torch.stack(biases) if biases else None


class _Constant:
    """A forward hook on a router that multiplies the gates by a constant."""

    def __init__(self, scale: float):
        self.scale = scale

    def __call__(self, router: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (*output[:WEIGHTS], output[WEIGHTS] * self.scale, *output[WEIGHTS + 1 :])


class _Shared:
    """A forward hook on a router that accounts for the absent experts, token by token.

    Args:
        kind: "full" or "mass".
        logits: position of the logits in the router's output.
        top_k: experts per token of the full model.
    """

    def __init__(self, kind: str, logits: int, top_k: int):
        self.kind, self.logits, self.top_k = kind, logits, top_k

    def __call__(self, router: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        held_logits, gates = output[self.logits], output[WEIGHTS]
        hidden = args[0].reshape(*held_logits.shape[:-1], -1).to(held_logits.dtype)
        bias = None if router.absent_bias is None else router.absent_bias.to(held_logits.dtype)
        absent_logits = F.linear(hidden, router.absent_weight.to(held_logits.dtype), bias).float()
        held_logits = held_logits.float()
        if self.kind == "full":
            factor = (held_logits.logsumexp(-1) - absent_logits.logsumexp(-1)).sigmoid()
        else:
            full_mass = torch.cat([held_logits, absent_logits], -1).softmax(-1).topk(self.top_k, dim=-1).values.sum(-1)
            held_mass = held_logits.softmax(-1).topk(gates.shape[-1], dim=-1).values.sum(-1)
            factor = full_mass / held_mass
        gates = (gates * factor.unsqueeze(-1)).to(gates.dtype)
        return (*output[:WEIGHTS], gates, *output[WEIGHTS + 1 :])
