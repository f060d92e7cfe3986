"""The structure of a tiny model, determined from one batch that runs through it; see `moe.discovery`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from consilium.errors import ModelError
from consilium.moe.families import Family, blocks
from consilium.moe.model import finish_logits, trunk_of
from consilium.moe.probe import check_slices
from consilium.moe.surgery import attribute, share_block, slice_block
from consilium.moe.twin import EXPERTS

__all__ = ["TOKENS", "Finder"]

TOKENS = ((11, 3, 27, 5, 90, 41, 8), (60, 7, 33, 2, 19, 104, 77))
"""Token ids of the batch that a tiny model processes."""
SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": torch.exp,
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda x: nn.functional.softplus(x).sqrt(),
}
"""Score functions, up to a factor per token."""
FINISH = (
    ("logits_scaling",),
    ("logit_scale",),
    ("final_logit_softcapping",),
    ("unpadded_vocab_size",),
    ("output_multiplier", "final_logit_softcapping"),
    ("final_logit_softcapping", "unpadded_vocab_size"),
)
"""Fields of configurations that apply to logits, in the order of their application."""


@dataclass
class _Call:
    """One call of a module: its path, the module, its arguments and its output."""

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    output: Any


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[_Call]]:
    calls: list[_Call] = []
    paths = {module: path for path, module in model.named_modules()}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        calls.append(_Call(paths[module], module, (*args, *kwargs.values()), output))

    hooks = [module.register_forward_hook(record, with_kwargs=True) for module in paths]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


class Finder:
    """A finder of the `Family` of a tiny model.

    Args:
        model: the tiny model.
        config: the configuration of the full model.
        name: the family's name.
        classes: transformers class for each form of task.
        row: the fields that `ROWS` states.
    """

    def __init__(
        self, model: nn.Module, config: PretrainedConfig, name: str, classes: dict[str, str], row: Mapping[str, Any]
    ):
        self.model, self.config, self.name, self.classes, self.row = model, config, name, classes, dict(row)
        self.ids = torch.tensor(TOKENS) % int(config.get_text_config().vocab_size)
        with torch.no_grad(), _watched(model) as self.calls:
            self.output = model(input_ids=self.ids, attention_mask=torch.ones_like(self.ids))

    def family(self) -> Family:
        experts, router = self._pair()
        family = self._structure(experts, router)
        family = replace(family, **self.finish())
        family = self._row(family)
        family = replace(family, **{k: v for k, v in self._behaviour(family, router).items() if k not in self.row})
        family = replace(family, **{k: v for k, v in self._least(family).items() if k not in self.row})
        check_slices(self.model, family, self.ids)
        return family

    def causal(self) -> bool:
        """Return True if logits do not depend on later positions."""
        other_ids = self.ids.clone()
        other_ids[:, -1] = (other_ids[:, -1] + 1) % int(self.config.get_text_config().vocab_size)
        with torch.no_grad():
            logits = self.model(input_ids=other_ids, attention_mask=torch.ones_like(other_ids)).logits
        return _close(logits[:, :-1], self.output.logits[:, :-1])

    def _row(self, family: Family) -> Family:
        field_names = {field.name for field in fields(Family)}
        return replace(family, stated=tuple(self.row), **{k: v for k, v in self.row.items() if k in field_names})

    def _pair(self) -> tuple[_Call, _Call]:
        """Return the calls of the first experts and of their router."""
        for call in self.calls:
            indices = [a for a in call.args if _is_index(a)]
            if indices and _stacked(call.module):
                parent = call.path.rpartition(".")[0]
                for other_call in self.calls:
                    is_sibling = other_call.path.startswith(f"{parent}.") and other_call.path != call.path
                    if (
                        is_sibling
                        and isinstance(other_call.output, tuple)
                        and any(_same(indices[0], o) for o in other_call.output)
                    ):
                        if all(
                            t.is_floating_point()
                            for t in (*other_call.module.parameters(), *other_call.module.buffers())
                        ):
                            return call, other_call
                        break  # It looks up experts in a table by token; such a block is kept whole.
                else:
                    raise ModelError("its experts are chosen by the block itself, outside of a router module")
        raise ModelError("no module of it is given expert indices and holds one tensor of experts per projection")

    def _structure(self, experts: _Call, router: _Call) -> Family:
        block = experts.path.rpartition(".")[0]
        owner = self.model.get_submodule(block)
        paths = {"router": router.path[len(block) + 1 :], "experts": experts.path[len(block) + 1 :]}
        stacks = _stacked(experts.module)
        total = min(len(tensor) for tensor in stacks.values())
        tensors = tuple(n for n, p in experts.module.named_parameters() if p.ndim and len(p) >= total)
        extra, rows, beside = _rows(owner, router.module, paths, total)
        if any(len(tensor) not in (total, total + extra) for tensor in stacks.values()):
            raise ModelError("its tensors of experts have different numbers of experts")
        correction = [
            path
            for path in (*(f"{paths['router']}.{row}" for row in rows), *beside)
            if not isinstance(t := attribute(owner, path), nn.Parameter) or not t.requires_grad
        ]
        if len(correction) > 1:
            raise ModelError(f"it has more than one tensor that corrects choices: {', '.join(correction)}")
        used_parts = {part for call in self.calls if type(call.module) is type(owner) for part in call.path.split(".")}
        idle_names = [n for n, m in self.model.named_modules() if type(m) is type(owner) and _holds(m, paths)]
        idle_names = [n for n in idle_names if n not in {call.path for call in self.calls}]
        outside_parts = {
            part for n in idle_names for part in n.split(".") if part not in used_parts and not part.isdecimal()
        }
        return Family(
            name=self.name,
            model_type=self.config.model_type,
            block=type(owner).__name__,
            router=paths["router"],
            router_class=type(router.module).__name__,
            rows=rows,
            beside=beside,
            extra=extra,
            correction=correction[0] if correction else None,
            experts=paths["experts"],
            layout="fused",
            tensors=tensors,
            lora_targets=_projections(stacks),
            classes=self.classes,
            counts=_counts(owner, paths, total, extra),
            number=self._number(),
            top_k=_top_k(owner, paths["router"], router),
            groups=bool(getattr(router.module, "num_group", None) and hasattr(router.module, "topk_group")),
            outside=tuple(sorted(outside_parts)),
            **_positions(router, total, extra),
        )

    def _number(self) -> str:
        config = self.config.get_text_config()
        return next((name for name in EXPERTS if isinstance(getattr(config, name, None), int)), EXPERTS[0])

    def finish(self) -> dict[str, Any]:
        """Return the fields for the computation of logits from the last hidden state."""
        if "text-to-text" not in self.classes:
            return {}
        hidden = next(c.output for c in reversed(self.calls) if c.module is trunk_of(self.model))
        with torch.no_grad():
            raw_logits = self.model.get_output_embeddings()(hidden[0])
            config = self.config.get_text_config()
            field_groups = [names for names in FINISH if all(getattr(config, name, None) is not None for name in names)]
            for field_names in (*sorted(field_groups, key=len, reverse=True), ()):
                if _close(finish_logits(raw_logits, config, field_names), self.output.logits):
                    return {"finish": field_names, "packs": self._packs()}
        return {"whole": True}

    def _packs(self) -> bool:
        """Return True if two examples in one row, with position ids from 0 each, do not affect each other."""
        row = self.ids.reshape(1, -1)
        length = self.ids.shape[1]
        positions = torch.arange(length).repeat(len(self.ids))[None]
        try:
            with torch.no_grad():
                logits = self.model(input_ids=row, position_ids=positions, use_cache=False).logits
        except Exception:
            return False
        return _close(logits.view(*self.output.logits.shape), self.output.logits)

    def _behaviour(self, family: Family, call: _Call) -> dict[str, Any]:
        """Return the score function, and whether gates depend on experts that were not chosen."""
        if family.dispatch:
            return {}
        outputs = call.output
        logits = outputs[family.logits].float().reshape(-1, outputs[family.logits].shape[-1])
        logits = logits.clamp_min(1e-30).log() if family.probabilities else logits
        index = outputs[family.routed].reshape(len(logits), -1)
        gates = outputs[family.gates].reshape(index.shape).float()
        score_names = [name for name, score in SCORES.items() if _proportional(gates, score(logits).gather(-1, index))]
        owner = self.model.get_submodule(_block_of(call.path, family))
        return {"score": score_names[0] if score_names else "softmax", "normalised": _independent(owner, family, call)}

    def _least(self, family: Family) -> dict[str, Any]:
        """Return the fewest experts that the router can rank."""
        for least in (1, 2, 3, 4):
            try:
                for block in blocks(self.model, family).values():
                    copy = slice_block(share_block(block), family, tuple(range(least)))
                    call = next(c for c in self.calls if c.module is block.get_submodule(family.router))
                    with torch.no_grad():
                        gates = copy.get_submodule(family.router)(*_for(copy, block, family, call.args))[family.gates]
                    if not bool(gates.isfinite().all()):
                        raise ValueError
                return {"least": least}
            except Exception:
                continue
        raise ModelError("its router cannot rank four experts or fewer")


def _is_index(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.int64 and value.ndim == 2


def _same(index: Tensor, other: Any) -> bool:
    return (
        isinstance(other, Tensor) and other.dtype == index.dtype and torch.equal(other.reshape(index.shape), index)
        if isinstance(other, Tensor) and other.numel() == index.numel()
        else False
    )


def _stacked(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters [E, ..] of a module, E > 1, that are matrices of experts."""
    return {name: p for name, p in module.named_parameters(recurse=False) if p.ndim == 3 and len(p) > 1}


def _projections(stacks: Mapping[str, Tensor]) -> tuple[str, str]:
    if len(stacks) != 2 or "down_proj" not in stacks:
        raise ModelError(f"its experts have the projections {', '.join(stacks)}; two are understood")
    first = next(name for name in stacks if name != "down_proj")
    return first, "down_proj"


def _rows(
    owner: nn.Module, router: nn.Module, paths: Mapping[str, str], total: int
) -> tuple[int, tuple[str, ...], tuple[str, ...]]:
    """Return the number of rows after those of the experts, and the names of the tensors with a row per expert.

    The names are given separately for tensors in the router and for tensors next to it in the block.
    """
    tensors = {**dict(router.named_parameters()), **dict(router.named_buffers())}
    matrices = {n: t for n, t in tensors.items() if t.ndim == 2 and t.is_floating_point() and t.shape[0] >= total}
    matrix_names = [n for n, t in matrices.items() if len(t) == total] or [
        n for n, t in matrices.items() if total < len(t) <= total + 4
    ]
    if not matrix_names:
        raise ModelError("its router has no matrix with a row per expert")
    extra = len(matrices[matrix_names[0]]) - total

    def per_expert(tensor: Tensor) -> bool:
        sizes = (total, total + extra)
        return tensor.is_floating_point() and (
            (tensor.ndim == 1 and len(tensor) in sizes)
            or (tensor.ndim == 2 and tensor.shape[0] == 1 and tensor.shape[1] in sizes)
        )

    rows = (matrix_names[0], *(n for n, t in tensors.items() if per_expert(t)))
    block_tensors = {**dict(owner.named_parameters(recurse=False)), **dict(owner.named_buffers(recurse=False))}
    return extra, rows, tuple(n for n, t in block_tensors.items() if per_expert(t))


def _counts(owner: nn.Module, paths: Mapping[str, str], total: int, extra: int) -> tuple[str, ...]:
    count_paths = []
    for path in (paths["router"], paths["experts"], ""):
        module = owner.get_submodule(path)
        for name, value in vars(module).items():
            is_count = "expert" in name or "class" in name
            if type(value) is int and is_count and "shared" not in name and value in (total, total + extra):
                count_paths.append(f"{path}.{name}".lstrip("."))
    return tuple(count_paths)


def _top_k(owner: nn.Module, router: str, call: _Call) -> str | None:
    k = next(o.shape[-1] for o in call.output if _is_index(o) or (isinstance(o, Tensor) and o.dtype == torch.int64))
    for path in (router, ""):
        for name in ("top_k", "topk", "num_experts_per_tok"):
            if getattr(owner.get_submodule(path), name, None) == k:
                return f"{path}.{name}".lstrip(".")
    return None


def _positions(call: _Call, total: int, extra: int) -> dict[str, Any]:
    """Return the positions of logits, gates and indices in a router's output."""
    outputs = list(call.output)
    routed_position = next(i for i, o in enumerate(outputs) if isinstance(o, Tensor) and o.dtype == torch.int64)
    shape = outputs[routed_position].shape
    gate_positions = [
        i for i, o in enumerate(outputs) if isinstance(o, Tensor) and o.is_floating_point() and o.shape == shape
    ]
    logit_positions = [
        i for i, o in enumerate(outputs)
        if isinstance(o, Tensor) and o.is_floating_point() and o.shape[-1] in (total, total + extra)
        and i not in gate_positions
    ]  # fmt: skip
    if not gate_positions or not logit_positions:
        raise ModelError("its router does not give out logits [.., E] and gates [.., K]")
    rows = outputs[logit_positions[0]].float()
    sums = rows.sum(-1)
    probabilities = bool((rows >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-4)
    skips = extra > 0 and outputs[logit_positions[0]].shape[-1] == total + extra
    return {
        "skips": skips,
        "logits": logit_positions[0],
        "gates": gate_positions[0],
        "routed": routed_position,
        "probabilities": probabilities,
    }


def _holds(module: nn.Module, paths: Mapping[str, str]) -> bool:
    try:
        return bool(module.get_submodule(paths["router"])) and bool(_stacked(module.get_submodule(paths["experts"])))
    except AttributeError:
        return False


def _block_of(path: str, family: Family) -> str:
    return path[: -len(family.router) - 1]


def _for(copy: nn.Module, block: nn.Module, family: Family, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of a router with the block's own tensors replaced by those of its copy."""
    replacements = {id(attribute(block, path)): attribute(copy, path) for path in family.beside}
    return tuple(replacements.get(id(arg), arg) for arg in args)


def _close(a: Tensor, b: Tensor) -> bool:
    """Return True if two results only differ by rounding.

    The tolerance is relative to the largest element, because sums in another order leave errors of that size in small
    elements as well.
    """
    return a.shape == b.shape and torch.allclose(
        a.float(), b.float(), rtol=1e-4, atol=1e-5 * (1 + float(b.abs().max()))
    )


def _proportional(gates: Tensor, scores: Tensor) -> bool:
    """Return True if gates are the scores up to a factor per token (with one expert: one factor for all tokens)."""
    ratio = gates / scores.clamp_min(1e-30)
    if ratio.shape[-1] == 1:
        ratio = ratio.t()
    return torch.allclose(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-3)


@torch.no_grad()
def _independent(owner: nn.Module, family: Family, call: _Call) -> bool:
    """Return True if the gates of tokens do not change with the router row of an expert that they did not choose."""
    indices = call.output[family.routed].reshape(-1, call.output[family.routed].shape[-1])
    gates = call.output[family.gates].reshape(indices.shape)
    has_evidence = False
    for place in range(attribute(owner, family.row_paths[0]).shape[0] - family.extra):
        copy = share_block(owner)
        path, _, leaf = family.row_paths[0].rpartition(".")
        router_weight = attribute(copy, family.row_paths[0]).detach().clone()
        router_weight[place] *= 0.5
        setattr(copy.get_submodule(path), leaf, nn.Parameter(router_weight, requires_grad=False))
        output = copy.get_submodule(family.router)(*_for(copy, owner, family, call.args))
        new_indices, new_gates = (
            output[family.routed].reshape(indices.shape),
            output[family.gates].reshape(indices.shape),
        )
        token_mask = (indices != place).all(-1) & (new_indices == indices).all(-1)
        has_evidence |= bool(token_mask.any())
        if not torch.allclose(gates[token_mask], new_gates[token_mask], rtol=1e-5, atol=1e-7):
            return False
    return has_evidence
