"""Rules by which a server merges adapters: pairs A [R, X], B [Y, R] that clients return in changed versions.

The separate means of A and B do not give the mean of the updates B A: mean(B) mean(A) also contains the cross terms
B_1 A_2 and B_2 A_1. This bias is zero if all clients share A, and grows as their A diverge. With w_k the weight that
the method gives client k, scaled to a sum of 1 over the clients that returned the pair:

    mean             A = sum w_k A_k, B = sum w_k B_k                                       FedIT (2305.05644): biased
    ffa              A keeps its initial value for all; B = sum w_k B_k                     FFA-LoRA (2403.12313): exact
    alternate        B alone is trained and merged in odd rounds, A alone in even rounds    RoLoRA (2409.02346): exact
    share_a          A = sum w_k A_k; B stays with its client                               FedSA-LoRA (2410.01463)
    stack            W += s sum w_k B_k A_k; A drawn anew, B = 0                            FLoRA (2409.05976): exact
    residual         mean, and W += s (sum w_k B_k A_k - B A)                            FedEx-LoRA (2410.09432): exact
    svd              B A = the best rank R of sum w_k B_k A_k, B = U S, A = V^T             FlexLoRA (2402.11505)
    pad              smaller ranks padded with zeros, then mean                    HetLoRA (2401.06432), weights n_k
    pad_norm         the same, with w_k proportional to the norm of all updates of k        HetLoRA's own weights
    rank_partition   row r of A and column r of B: the mean over clients of rank > r        raFLoRA (2602.13486)

s is the scale alpha / R. W is the change of the base: `<tensor>.lora_W` [Y, X] among the server's parameters, sent in a
payload's group "base". It is as large as the adapted weights, so "stack" and "residual" save memory but not traffic to
the client. FLoRA sends the stack of one round to clients that have all earlier ones. Consilium sends the sum, which
also works for a client that was absent. HetLoRA's pruning of ranks is left out. The papers of RoLoRA, FFA-LoRA, HetLoRA
and FedEx-LoRA were not at hand; the rules follow descriptions by others.

A client of rank r < R is sent the first r rows of A and columns of B. With "svd" these are the largest.

Rank collapse: if small ranks are averaged with large ones, the energy of the merged updates moves into the few rows
that all clients have (raFLoRA). `AdapterMean.told` measures this in every round. Its values are means over the pairs
with a non-zero update: "effective_rank" is exp of the entropy of the singular values of the merged update, scaled to a
sum of 1; "energy_beyond" is the share of their squares beyond the smallest rank that took part.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from consilium.errors import PayloadError
from consilium.params import Params, WeightedMean

__all__ = ["ANY_RANK", "FOLDED", "FOLDS", "PAIRWISE", "AdapterMean", "Rule", "effective_rank", "spectrum"]

Rule = Literal["mean", "ffa", "alternate", "share_a", "stack", "residual", "svd", "pad", "pad_norm", "rank_partition"]
FOLDS = frozenset({"stack", "residual"})
"""Rules that add to the base."""
ANY_RANK = frozenset({"stack", "svd", "pad", "pad_norm", "rank_partition"})
"""Rules for clients of unequal ranks."""
PAIRWISE = ANY_RANK | FOLDS
"""Rules that take A and B of a pair together; the others compute an elementwise mean."""
FOLDED = "lora_W"

Weight = float | Callable[[str], float]
Term = tuple[float, Tensor, Tensor]
"""w_k, A_k [r, X], B_k [Y, r]; float64."""


class AdapterMean(WeightedMean):
    """A weighted mean that merges adapters by a rule; for other keys, see `WeightedMean`.

    Args:
        rule: see the module.
        scale: s.
        begin: returns flat names of A -> A at the start of the next round, for "stack" (which reinitialises adapters)
            and "ffa" (where clients do not send A); called once at most.
    """

    def __init__(self, rule: Rule, scale: float, begin: Callable[[], Params]):
        super().__init__()
        self._rule = rule
        self._scale = scale
        self._begin = begin
        self._terms: dict[str, list[Term]] = {}
        self._least = 0
        self._told: dict[str, float] = {}

    def add(self, params: Mapping[str, Tensor], weight: Weight) -> None:
        """Count one client's tensors, see `WeightedMean.add`; the weight of a pair is that of its A.

        Raises:
            PayloadError: as in `WeightedMean.add`, and for A without B or B without A if the rule needs both.
        """
        adapters = {key for key in params if key.endswith((".lora_A", ".lora_B"))}
        ranks = [params[key].shape[0] for key in adapters if key.endswith("_A")]
        self._least = min([*([self._least] if self._least else []), *ranks], default=0)
        if self._rule not in PAIRWISE:
            return super().add(params, weight)
        super().add({key: tensor for key, tensor in params.items() if key not in adapters}, weight)
        terms: dict[str, Term] = {}
        for key in sorted(adapters):
            name, other_key = key[:-1], key[:-1] + ("B" if key.endswith("A") else "A")
            if other_key not in params:
                raise PayloadError(f"{key!r} arrived without {other_key!r}")
            w = weight(f"{name}A") if callable(weight) else weight
            if not 0 <= w < math.inf:
                raise PayloadError(f"weight {w!r} of {key!r} is not a finite number >= 0")
            if w and key.endswith("A"):
                terms[name.removesuffix(".lora_")] = (w, params[key].double(), params[other_key].double())
        if self._rule == "pad_norm":
            norm = math.sqrt(sum(_squared_norm(a_RX, b_YR) for _, a_RX, b_YR in terms.values()))
            terms = {name: (norm or 1e-30, a_RX, b_YR) for name, (_, a_RX, b_YR) in terms.items()}
        for name, term in terms.items():
            self._terms.setdefault(name, []).append(term)

    def mean(self, previous: Mapping[str, Tensor]) -> Params:
        """Return the merged parameters, see `WeightedMean.mean`."""
        adapter_keys = {key for key in self._sums if key.endswith((".lora_A", ".lora_B"))}
        merged_params = super().mean(previous)
        spectra: list[Tensor] = []
        fresh_adapters = self._begin() if self._terms and self._rule == "stack" else {}
        for name, terms in self._terms.items():
            a, b, w = (f"{name}.{leaf}" for leaf in ("lora_A", "lora_B", FOLDED))
            _check(name, terms, previous)
            new_tensors, factors = self._merged(terms, merged_params[a], merged_params[b], fresh_adapters.get(a))
            spectra.append(spectrum(*factors))
            for key, tensor in zip((a, b, w), new_tensors, strict=True):
                if tensor is not None:
                    tensor = tensor + merged_params[key].double() if key == w else tensor
                    merged_params[key] = tensor.to(previous[key].dtype)
        if self._rule not in PAIRWISE and adapter_keys:
            spectra = self._spectra(merged_params, {key[:-1] for key in adapter_keys})
        self._told = self._collapse(spectra)
        return merged_params

    def told(self) -> dict[str, float]:
        """Return the measures of rank collapse, see the module; {} if the server has no merged update."""
        return dict(self._told)

    def _merged(
        self, terms: list[Term], a_RX: Tensor, b_YR: Tensor, fresh: Tensor | None
    ) -> tuple[tuple[Tensor | None, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]:
        """Return new A, new B and the addition to the base (None: unchanged), and factors of the merged update."""
        total, rank = sum(w for w, _, _ in terms), len(a_RX)
        factors = torch.cat([a for _, a, _ in terms]), torch.cat([b * (w / total) for w, _, b in terms], dim=1)
        if self._rule == "stack":
            product = factors[1] @ factors[0]
            new_a = a_RX if fresh is None else fresh
            return (new_a.double(), torch.zeros_like(b_YR, dtype=torch.float64), self._scale * product), factors
        if self._rule == "svd":
            a, b = truncated(*factors, rank)
            missing = rank - len(a)  # The server's rank is kept; rows that no client sent are given no effect.
            a = torch.cat([a, a_RX[len(a) :].double()])
            b = torch.cat([b, torch.zeros(len(b), missing, dtype=b.dtype)], dim=1)
            return (a, b, None), (a, b)
        if self._rule == "rank_partition":
            a = _rows([(w, a) for w, a, _ in terms], a_RX.double())
            b = _rows([(w, b.t()) for w, _, b in terms], b_YR.double().t()).t()
            return (a, b, None), (a, b)
        a = sum(_padded(a, rank) * (w / total) for w, a, _ in terms)
        b = sum(_padded(b.t(), rank) * (w / total) for w, _, b in terms).t()
        if self._rule == "residual":
            return (a, b, self._scale * (factors[1] @ factors[0] - b @ a)), factors
        return (a, b, None), (a, b)

    def _spectra(self, merged: Params, pairs: set[str]) -> list[Tensor]:
        """Return the spectra for rules that merge elementwise; [] for "share_a", which has no merged update."""
        if self._rule == "share_a":
            return []
        fresh_adapters = self._begin() if self._rule == "ffa" else {}
        spectra = []
        for name in sorted(pairs):
            a_RX = fresh_adapters.get(f"{name}A", merged.get(f"{name}A"))
            if a_RX is not None and f"{name}B" in merged:
                spectra.append(spectrum(a_RX.double(), merged[f"{name}B"].double()))
        return spectra

    def _collapse(self, spectra: list[Tensor]) -> dict[str, float]:
        spectra = [s for s in spectra if float(s.sum()) > 0]
        if not spectra:
            return {}
        lowest_rank = self._least or min(len(s) for s in spectra)
        energy_shares = [float(s[lowest_rank:].square().sum() / s.square().sum()) for s in spectra]
        return {
            "effective_rank": sum(map(effective_rank, spectra)) / len(spectra),
            "energy_beyond": sum(energy_shares) / len(energy_shares),
        }


def spectrum(a_RX: Tensor, b_YR: Tensor) -> Tensor:
    """Return the singular values of B A, descending, without forming it; as many as the smallest side."""
    r_left, r_right = torch.linalg.qr(b_YR, mode="r").R, torch.linalg.qr(a_RX.t(), mode="r").R
    return torch.linalg.svdvals(r_left @ r_right.t())


def effective_rank(values: Tensor) -> float:
    """Return exp of the entropy of singular values scaled to a sum of 1 (Roy and Vetterli 2007).

    The result is between 1 and the number of values, or 0 if all are zero.
    """
    total = float(values.sum())
    if not total:
        return 0.0
    share = values[values > 0] / total
    return math.exp(float(-(share * share.log()).sum()))


def truncated(a_RX: Tensor, b_YR: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A [r, X] and B [Y, r], r <= rank, of the best rank-`rank` approximation of B A (Eckart-Young).

    It is computed through the QR of both: B = U S, A = V^T. A has orthonormal rows even where the update is zero, so
    that these directions can still be learnt.
    """
    left, r_left = torch.linalg.qr(b_YR)
    right, r_right = torch.linalg.qr(a_RX.t())
    u, s, vh = torch.linalg.svd(r_left @ r_right.t(), full_matrices=False)
    return vh[:rank] @ right.t(), left @ (u[:, :rank] * s[:rank])


def _squared_norm(a_RX: Tensor, b_YR: Tensor) -> float:
    """Return ||B A||_F^2 = trace((B^T B) (A A^T))."""
    return float(((b_YR.t() @ b_YR) * (a_RX @ a_RX.t())).sum().clamp(min=0))


def _padded(x_RX: Tensor, rank: int) -> Tensor:
    """Return the rows with zero rows appended, `rank` in total."""
    return torch.cat([x_RX, x_RX.new_zeros(rank - len(x_RX), x_RX.shape[1])])


def _rows(terms: list[tuple[float, Tensor]], old_RX: Tensor) -> Tensor:
    """Return the weighted mean of each row over the clients that have it; rows that none has keep their old value."""
    mean_RX = old_RX.clone()
    for r in range(max(len(x) for _, x in terms)):
        weighted_rows = [(w, x[r]) for w, x in terms if len(x) > r]
        mean_RX[r] = sum(w * x for w, x in weighted_rows) / sum(w for w, _ in weighted_rows)
    return mean_RX


def _check(name: str, terms: list[Term], previous: Mapping[str, Tensor]) -> None:
    """Raise PayloadError for a pair that the server does not have, or with shapes other than its first r rows."""
    old_a, old_b = previous.get(f"{name}.lora_A"), previous.get(f"{name}.lora_B")
    for _, a_RX, b_YR in terms:
        fits = old_a is not None and old_b is not None and a_RX.dim() == b_YR.dim() == 2
        fits = fits and a_RX.shape[1] == old_a.shape[1] and b_YR.shape[0] == old_b.shape[0]
        if not fits or not 1 <= len(a_RX) == b_YR.shape[1] <= len(old_a):
            raise PayloadError(f"'{name}' is no pair of the server's model, or has another shape")
