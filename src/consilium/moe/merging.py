"""Rules by which a server merges updates: the mean of the papers, or rules that withstand some dishonest clients.

All rules work by groups: an expert with all its tensors, a router row, a head row, and the trunk. The contributors of a
group are the clients of the round that returned it with a weight above 0. A rule for an expert therefore only sees the
clients that held and trained it.

    mean        sum_k w_k x_k / sum_k w_k                                    the default, `params.WeightedMean`
    median      of every coordinate (Yin et al. 2018, https://arxiv.org/abs/1803.01498)              n >= 2 f + 1
    trimmed     of every coordinate the mean without the f largest and f smallest (the same)         n >= 2 f + 1
    krum        the mean of the m contributors with the smallest summed squared distance to their n - f - 2 nearest
                others (Blanchard et al. 2017, https://arxiv.org/abs/1703.02757)   n >= max(2 f + 3, f + 2 + m)

There are n contributors, f of them arbitrary (`attackers`), and m = `chosen`. A group with fewer contributors than its
rule needs keeps its previous value, bit for bit, and is counted (`told`), because a mean of few contributors would let
an attacker control a rare expert. The rules other than the mean count every contributor once: the weights, which
clients declare, only decide who contributes.

Norm clipping (Sun et al. 2019, https://arxiv.org/abs/1911.07963) comes before any rule. A client's change x_k - w is
scaled down to the norm `clip`: that of each expert by itself, and that of trunk and heads together. The change of all
router rows together is scaled down to `clip_router`, because this small tensor steers all tokens.

Memory: the mean is a running sum (one float64 copy of the model). The other rules need all replies. These are stored in
files in a temporary folder (TMPDIR) until the round is merged, and are read one tensor at a time. Memory then holds
about 3 n times the largest tensor in float64 in addition to the model, and the disk holds n replies.
"""

import math
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from consilium.constraints import NonNegativeFloat, PositiveInt, check_settings
from consilium.errors import PayloadError
from consilium.moe.addressing import expert_of, router_row_of
from consilium.params import Params, WeightedMean

__all__ = ["Merging", "RobustMean", "group_of", "krum", "median_of", "trimmed_mean"]

Rule = Literal["mean", "median", "trimmed", "krum"]
Weight = float | Callable[[str], float]


@dataclass(frozen=True)
class Merging:
    """The merging of updates by a server; see `moe.merging`. The default is the method's own weighted mean.

    Args:
        rule: "mean", "median", "trimmed" or "krum", applied to every expert, row and the trunk separately.
        attackers: f, the number of contributors that may be arbitrary, >= 1; the mean withstands none.
        chosen: m, the number of contributors that krum averages, >= 1.
        clip: largest L2 norm of a client's change of an expert, and of trunk and heads together; 0: no clipping.
        clip_router: largest L2 norm of a client's change of all router rows together; 0: no clipping.
        uniform: the mean gives every client the same weight, whatever number of examples it declares.
    """

    rule: Rule = "mean"
    attackers: PositiveInt = 1
    chosen: PositiveInt = 1
    clip: NonNegativeFloat = 0.0
    clip_router: NonNegativeFloat = 0.0
    uniform: bool = False

    def __post_init__(self) -> None:
        check_settings(self, "merging.")

    @property
    def plain(self) -> bool:
        """Return True if these settings are the method's own mean."""
        return self.rule == "mean" and not (self.clip or self.clip_router or self.uniform)

    @property
    def needs(self) -> int:
        """Return the fewest contributors for which the rule gives a result."""
        f = self.attackers
        minimums = {"mean": 1, "median": 2 * f + 1, "trimmed": 2 * f + 1, "krum": max(2 * f + 3, f + 2 + self.chosen)}
        return minimums[self.rule]


def group_of(key: str) -> str:
    """Return the group of a flat name: its expert, router row or head row, otherwise "trunk"."""
    if place := router_row_of(key):
        return f"{place[0]}.router.{place[1]}"
    if place := expert_of(key):
        return f"{place[0]}.experts.{place[1]}"
    return key.rpartition(".")[0] if key.startswith("head.") else "trunk"


# --- the rules, of n stacked updates [n, ..] ------------------------------------------------------------------------


def median_of(x_N: Tensor) -> Tensor:
    """Return the median of every coordinate; for an even number of updates, the mean of the middle two."""
    n, sorted_N = len(x_N), x_N.sort(dim=0).values
    return (sorted_N[(n - 1) // 2] + sorted_N[n // 2]) / 2


def trimmed_mean(x_N: Tensor, trim: int) -> Tensor:
    """Return the mean of every coordinate without its `trim` largest and `trim` smallest values."""
    return x_N.sort(dim=0).values[trim : len(x_N) - trim].mean(dim=0)


def krum(squared_NN: Tensor, attackers: int, chosen: int) -> list[int]:
    """Return the places of the contributors that Krum selects, ascending.

    Krum selects those with the smallest sum of squared distances to the n - f - 2 nearest others; ties go to the first.

    Args:
        squared_NN: squared distances between contributors, float64 [n, n].
        attackers: f.
        chosen: m, the number of contributors to select.
    """
    n = len(squared_NN)
    near_NN = squared_NN.masked_fill(torch.eye(n, dtype=torch.bool), math.inf).sort(dim=1).values
    scores_N = near_NN[:, : n - attackers - 2].sum(dim=1)
    return sorted(scores_N.argsort(stable=True)[:chosen].tolist())


# --- in place of a WeightedMean -------------------------------------------------------------------------------------


class RobustMean:
    """A replacement for `params.WeightedMean` with the same interface, returned by `Setup.mean` for other rules.

    Args:
        merging: the rule.
        previous: the server's parameters, which the clients' changes refer to.
        mean: for the rule "mean": the mean that the clipped updates are added to.
    """

    def __init__(self, merging: Merging, previous: Mapping[str, Tensor], mean: WeightedMean):
        self._merging = merging
        self._previous = previous
        self._mean = mean
        self._spool = _Spool() if merging.rule != "mean" else None
        self._clipped: list[bool] = []
        self._norms: list[float] = []
        self._kept: set[str] = set()

    def add(self, params: Mapping[str, Tensor], weight: Weight) -> None:
        """Count one client's tensors, see `WeightedMean.add`.

        Raises:
            PayloadError: as in `WeightedMean.add`, and for a name or shape that the server's model does not have.
        """
        weights = {key: weight(key) if callable(weight) else weight for key in params}
        for key, tensor in params.items():
            if not 0 <= weights[key] < math.inf:
                raise PayloadError(f"weight {weights[key]!r} of {key!r} is not a finite number >= 0")
            if key not in self._previous or self._previous[key].shape != tensor.shape:
                raise PayloadError(f"{key!r} {tuple(tensor.shape)} is not a parameter of the server's model")
        params = self._clip({key: tensor for key, tensor in params.items() if weights[key] > 0})
        if self._spool is not None:
            self._spool.add(params)
        else:
            self._mean.add(params, 1.0 if self._merging.uniform else weights.__getitem__)

    def mean(self, previous: Mapping[str, Tensor]) -> Params:
        """Return the new parameters; tensors with no or too few contributors are the previous ones, not copied."""
        if self._spool is None:
            return self._mean.mean(previous)
        new_params = {}
        for group, contributors in self._spool.groups.items():
            if len(contributors) < self._merging.needs:
                self._kept.add(group)
                continue
            for key, x in self._merge(self._spool.keys[group], contributors).items():
                new_params[key] = x.to(previous[key].dtype)
        return {key: new_params.get(key, old_tensor) for key, old_tensor in previous.items()}

    def told(self) -> dict[str, float]:
        """Return numbers for the record.

        They are the number of groups that clients returned, and the numbers of experts and other groups that kept their
        value because of too few contributors. With clipping, they are also the number of clipped clients and the median
        norm of the clients' changes of trunk and heads.
        """
        numbers: dict[str, float] = self._mean.told()
        if self._spool is not None:
            experts = sum(expert_of(group) is not None for group in self._kept)
            numbers |= {"experts_kept": float(experts), "others_kept": float(len(self._kept) - experts)}
            numbers["parts"] = float(len(self._spool.groups))
        if self._merging.clip or self._merging.clip_router:
            numbers["clipped"] = float(sum(self._clipped))
            numbers["norm"] = median(self._norms) if self._norms else 0.0
        return numbers

    def _merge(self, keys: list[str], contributors: list[int]) -> Params:
        """Return the rule's result for a group, float64."""
        rule, f = self._merging.rule, self._merging.attackers
        stacks = {key: lambda key=key: self._spool.stack(key, contributors) for key in keys}
        if rule == "median":
            return {key: median_of(stack()) for key, stack in stacks.items()}
        if rule == "trimmed":
            return {key: trimmed_mean(stack(), f) for key, stack in stacks.items()}
        squared_NN = torch.zeros(len(contributors), len(contributors), dtype=torch.float64)
        for stack in stacks.values():
            x_NX = stack().reshape(len(contributors), -1)
            for place, x_X in enumerate(x_NX):
                squared_NN[place] += (x_NX - x_X).square().sum(dim=1)
        selection = krum(squared_NN, f, self._merging.chosen)
        return {key: stack()[selection].mean(dim=0) for key, stack in stacks.items()}

    def _clip(self, params: Mapping[str, Tensor]) -> Params:
        """Return a client's tensors; tensors with too large a change are moved towards the server's, in float64."""
        merging = self._merging
        if not (merging.clip or merging.clip_router):
            return dict(params)
        squares: dict[str, float] = {}
        for key, tensor in params.items():
            change = tensor.double() - self._previous[key].double()
            squares[_clipped_with(key)] = squares.get(_clipped_with(key), 0.0) + float(change.square().sum())
        scales = {}
        for part, square in squares.items():
            bound = merging.clip_router if part == "router" else merging.clip
            scales[part] = bound / math.sqrt(square) if bound and square > bound * bound else 1.0
        self._norms.append(math.sqrt(squares.get("rest", 0.0)))
        self._clipped.append(any(scale < 1 for scale in scales.values()))
        return {
            key: tensor if (s := scales[_clipped_with(key)]) == 1 else self._towards(key, tensor, s)
            for key, tensor in params.items()
        }

    def _towards(self, key: str, tensor: Tensor, scale: float) -> Tensor:
        server_tensor = self._previous[key].double()
        return server_tensor + scale * (tensor.double() - server_tensor)


def _clipped_with(key: str) -> str:
    """Return the unit that a tensor's change is clipped with: "router" for all router rows, its expert, or "rest"."""
    if router_row_of(key):
        return "router"
    return group_of(key) if expert_of(key) else "rest"


class _Spool:
    """The replies of a round, stored in files that are deleted together with the object.

    Attributes:
        groups: group -> contributors, by their places.
        keys: group -> its flat names.
    """

    def __init__(self) -> None:
        self.groups: dict[str, list[int]] = {}
        self.keys: dict[str, list[str]] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="consilium-replies-"))
        self._files: list[Any] = []
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def add(self, params: Params) -> None:
        """Store one client's tensors.

        Raises:
            PayloadError: if the client sent other tensors of a group than the clients before it.
        """
        place, groups = len(self._files), {}
        for key in params:
            groups.setdefault(group_of(key), []).append(key)
        for group, keys in groups.items():
            if sorted(keys) != sorted(self.keys.setdefault(group, keys)):
                raise PayloadError(f"{group} came with {len(keys)} tensors, from others with {len(self.keys[group])}")
            self.groups.setdefault(group, []).append(place)
        path = self._folder / f"{place:06d}.safetensors"
        save_file({key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in params.items()}, path)
        self._files.append(safe_open(path, "pt"))

    def stack(self, key: str, contributors: list[int]) -> Tensor:
        """Return the contributors' tensors, float64 [n, ..]."""
        return torch.stack([self._files[place].get_tensor(key).double() for place in contributors])
