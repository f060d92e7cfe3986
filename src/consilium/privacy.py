"""Client-level differential privacy of the weights, and modes of disclosing the usage of experts.

DP-FedAvg (McMahan, Ramage, Talwar, Zhang 2018, https://arxiv.org/abs/1710.06963), with the server trusted to add noise:

    w <- w + (sum_k clip_C(w_k - w) + N(0, (z C)^2)) / m

The sum runs over the clients k of a round, and all of them count alike; clip_C scales a client's whole change to the
norm C at most. m is the expected cohort, not the number of replies. A parameter that a client does not return has a
change of zero, and the noise is added to every parameter that the server holds. The result therefore does not show
which experts or labels a client has. Integer and boolean tensors, such as a batch norm's counter, are not merged: they
stay as the server has them.

Running statistics of batch norms are merged like weights, with two rules of their own. Their change is clipped
separately, to sqrt(0.1) C, and that of the weights to sqrt(0.9) C. Large statistics then leave room for the weights,
and the whole change still has the norm C at most. A running variance (`running_var`) never falls below half its value
before the round, because noise could make it negative and the model's output NaN. This step uses only values that are
noised already, so it costs no privacy.

    z   Privacy.noise     C   Privacy.clip     m   `cohort`     (epsilon, delta)   Privacy.epsilon, Privacy.delta

- sampling "poisson": each client takes part independently with the rate q = clients_per_round / N, which amplifies
  privacy; neighbours differ by one client added or removed. A round may have no clients; it then consists of noise
  alone.
- sampling "fixed": clients_per_round of them, determined by the run's seed, which may be public. No amplification is
  claimed, and neighbours differ by one client's changes replaced with zeros.

Noise and Poisson sampling are drawn from the operating system's randomness, never from the run's seed. Two runs of one
seed therefore differ, and a round that is repeated after a crash gets other noise and is charged again. The budget is
counted with dp-accounting's privacy loss distributions, to 0.3 %. Limit: noise is added in float64, not in exact
arithmetic.

A client's usage of experts reveals its mix of labels. Modes of disclosing it, for methods that ask for it:

    exact     the counts, as the papers have it
    coarse    per layer, which experts are in the upper half; this discloses less, but has no quantified guarantee
    noised    shares + N(0, (z_u sqrt(2 L))^2) for L layers; sqrt(2 L) is the most that a client's shares can change
              (L2): client-level differential privacy even against the server, charged to the same budget
"""

import math
import random
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from consilium.constraints import Fraction, NonNegativeFloat, PositiveFloat, check_settings, forbid
from consilium.core import Algorithm, ClientInfo, Sampling
from consilium.errors import ConfigError, PayloadError
from consilium.params import Params

__all__ = [
    "PoissonSampling",
    "Privacy",
    "PrivateMean",
    "epsilon_of_sgd",
    "epsilon_spent",
    "fresh_generator",
    "sampling_rate",
    "usage_told",
]

TOKENS = 1_000_000
"""Noised shares are reported as counts out of this many tokens."""


@dataclass(frozen=True)
class Privacy:
    """The settings of what the server may learn about a client, see `consilium.privacy`.

    Args:
        noise: z, standard deviation of the noise on the sum of changes in units of `clip`; 0: no differential privacy.
        clip: C, largest L2 norm of a client's whole change, > 0.
        epsilon: the budget; a run ends before the round that would exceed it.
        delta: in (0, 1); 0: 1 / N^1.1 for N clients.
        sampling: "poisson", each client with a rate; "fixed", a fixed number, without a claim to amplification.
        usage: how clients disclose their usage of experts: "exact", "coarse", "noised".
        usage_noise: z_u, for "noised": standard deviation in units of the most that a client can change; > 0.
        labels: what clients disclose per label: "counts", the number of examples of each label and other values by
            label; "names", only which labels they have.
        scores: how clients disclose losses and scores: "exact"; "coarse", rounded to 0.05, or to two digits from 1 on;
            "none".
    """

    noise: NonNegativeFloat = 0.0
    clip: PositiveFloat = 1.0
    epsilon: PositiveFloat = 8.0
    delta: Fraction = 0.0
    sampling: Literal["poisson", "fixed"] = "poisson"
    usage: Literal["exact", "coarse", "noised"] = "exact"
    usage_noise: NonNegativeFloat = 0.0
    labels: Literal["counts", "names"] = "counts"
    scores: Literal["exact", "coarse", "none"] = "exact"

    def __post_init__(self) -> None:
        check_settings(self, "privacy.")
        forbid(
            (self.usage == "noised") != (self.usage_noise > 0),
            f"privacy.usage is {self.usage!r} with usage_noise {self.usage_noise:g}; noised usage needs noise > 0, "
            "the other modes have none",
        )

    @property
    def charged(self) -> bool:
        """Return True if anything is charged to the budget."""
        return self.noise > 0 or self.usage == "noised"

    def delta_for(self, clients: int) -> float:
        """Return delta, or its default for this number of clients."""
        return self.delta or clients**-1.1

    def delta_warning(self, clients: int) -> str | None:
        """Return why delta is too large for a federation of `clients`, or None if it is at most a tenth of 1 / N."""
        delta = self.delta_for(clients)
        if not self.charged or delta * clients <= 0.1 * (1 + 1e-9):
            return None
        default = " (the default, 1 / N^1.1)" if not self.delta else ""
        return (
            f"privacy.delta is {delta:.3g}{default}, which is not well below 1 / N = {1 / clients:.3g}: publishing all "
            f"of one client in N would almost meet it. Set privacy.delta to {0.1 / clients:.2g} or less."
        )

    def at_site(self, own: "Privacy") -> "Privacy":
        """Return the settings that hold at a site: the server's (self), except where the site discloses less.

        - usage: a site that says "exact" discloses what the server asks for. Any other setting of the site overrides
          "exact" and the server's other mode; of two noises the larger one holds.
        - labels, scores: the setting that discloses less.

        Args:
            own: the site's settings; only `usage`, `usage_noise`, `labels` and `scores` count.

        Raises:
            ConfigError: if the site says "coarse" and the server "noised". The server charges noised usage to the run's
                account of privacy, and coarse usage has no such guarantee.
        """
        if own.usage == "coarse" and self.usage == "noised":
            raise ConfigError(
                f"the server asks for noised usage (privacy.usage_noise {self.usage_noise:g}), on which its account of "
                "privacy relies, and this site tells coarse usage. Set privacy.usage at the server to exact or coarse, "
                "or privacy.usage noised and privacy.usage_noise at this site."
            )
        usage, noise = (self.usage, self.usage_noise) if own.usage == "exact" else (own.usage, own.usage_noise)
        if self.usage == usage == "noised":
            noise = max(self.usage_noise, noise)
        less = {name: max(getattr(self, name), getattr(own, name), key=order.index) for name, order in _ORDERS.items()}
        return replace(self, usage=usage, usage_noise=noise, **less)

    def check_reads(self, algorithm: Algorithm) -> None:
        """Raise ConfigError if the method's server uses values of clients that noise does not cover.

        The error names the settings that would change this, if there are any.
        """
        covered_values = {"usage"} if self.usage == "noised" else set()
        if not (values := algorithm.reads() - covered_values):
            return
        name = type(algorithm).__name__
        method: Any = algorithm  # a dataclass, as every method is
        changes = [
            f"algorithm.{field.name} {not value} (--algorithm.{'no-' * value}{field.name.replace('_', '-')})"
            for field in fields(method)
            if isinstance(value := getattr(method, field.name), bool)
            and replace(method, **{field.name: not value}).reads() <= {"usage"}
        ]
        if algorithm.reads() <= {"usage"}:
            changes = ["privacy.usage noised and privacy.usage_noise"]
        elif changes:
            changes = [f"{changes[0]}, privacy.usage noised and privacy.usage_noise"]
        way_out = f"set {changes[0]}" if changes else "take a method that merges models alone, e.g. FedAvg"
        raise ConfigError(
            f"{name}'s server goes by {' and '.join(sorted(values))} of each client, which privacy.noise does not "
            f"cover; {way_out}"
        )

    def sampled(self, sampling: Sampling, clients: int) -> Sampling:
        """Return the client sampling to use when weights are private.

        Raises:
            ConfigError: if tasks are chosen first, because no rate describes that.
        """
        if not self.noise or self.sampling == "fixed":
            return sampling
        if sampling.distinct_tasks:
            raise ConfigError("sampling.distinct_tasks does not go with privacy.sampling poisson; take fixed")
        rate = sampling_rate(sampling.clients_per_round, clients)
        return PoissonSampling(
            sampling.clients_per_round, False, sampling.min_clients, sampling.min_fraction, rate=rate
        )


_ORDERS = {"labels": ("counts", "names"), "scores": ("exact", "coarse", "none")}
"""Settings in which each value discloses less than the one before it."""


def sampling_rate(at_once: int, clients: int) -> float:
    """Return q, the rate at which each client takes part if `at_once` of `clients` are expected in a round."""
    return min(1.0, at_once / max(clients, 1))


# --- randomness -----------------------------------------------------------------------------------------------------


def fresh_generator() -> torch.Generator:
    """Return a new generator, seeded by the operating system's randomness at every call; only tests replace it."""
    return torch.Generator().manual_seed(secrets.randbits(63))


@dataclass(frozen=True)
class PoissonSampling(Sampling):
    """Sampling of every client independently with a probability, drawn from the operating system's randomness.

    Args:
        rate: the probability, of the clients that can take part.
    """

    rate: float = 1.0

    def choose(self, clients: Sequence[ClientInfo], round: int, seed: int) -> list[ClientInfo]:
        """Draw the clients, possibly none; `round` and `seed` do not matter."""
        draw = random.SystemRandom()
        return [client for client in sorted(clients, key=lambda c: c.id) if draw.random() < self.rate]

    def quorum(self, selected: int) -> int:
        """Return the quorum of `Sampling`, but never more than the clients drawn, so that a small draw can succeed."""
        return min(selected, super().quorum(selected))


# --- the weights ----------------------------------------------------------------------------------------------------


class PrivateMean:
    """The mean of `Setup.mean` under differential privacy; it has the interface of `params.WeightedMean`.

    Args:
        privacy: clip and noise.
        previous: the server's parameters.
        cohort: m, clients that are expected in a round.
    """

    def __init__(self, privacy: Privacy, previous: Mapping[str, Tensor], cohort: float):
        self._privacy = privacy
        self._cohort = cohort
        self._previous = previous
        self._sums = {k: torch.zeros_like(t, dtype=torch.float64) for k, t in previous.items() if t.is_floating_point()}
        share = STATISTICS if any(map(is_statistic, self._sums)) else 0.0
        self._clips = {True: math.sqrt(share) * privacy.clip, False: math.sqrt(1 - share) * privacy.clip}
        self._clipped = 0

    def add(self, params: Mapping[str, Tensor], weight: float | Callable[[str], float]) -> None:
        """Add one client's whole reply, once; every client weighs 1, whatever `weight` says.

        Raises:
            PayloadError: for a name or shape that the server's model does not have.
        """
        changes: dict[bool, Params] = {True: {}, False: {}}
        for key, tensor in params.items():
            if key not in self._previous or self._previous[key].shape != tensor.shape:
                raise PayloadError(f"{key!r} {tuple(tensor.shape)} is not a parameter of the server's model")
            if key in self._sums:
                changes[is_statistic(key)][key] = tensor.double() - self._previous[key].double()
        is_clipped = False
        for kind, part in changes.items():
            norm = math.sqrt(sum(float(change.square().sum()) for change in part.values()))
            is_clipped |= norm > self._clips[kind]
            scale = self._clips[kind] / norm if norm > self._clips[kind] else 1.0
            for key, change in part.items():
                self._sums[key].add_(change, alpha=scale)
        self._clipped += is_clipped

    def mean(self, previous: Mapping[str, Tensor]) -> Params:
        """Return the new parameters; the noise is drawn here, once."""
        generator, std = fresh_generator(), self._privacy.noise * self._privacy.clip
        params = dict(previous)
        for key, total in self._sums.items():
            noise = torch.randn(total.shape, generator=generator, dtype=torch.float64) * std
            old_value = previous[key].double()
            new_value = old_value + (total + noise) / self._cohort
            if key.endswith(VARIANCE):
                new_value = torch.maximum(new_value, old_value.abs() / 2)
            params[key] = new_value.to(previous[key].dtype)
        return params

    def told(self) -> dict[str, float]:
        """Return the number of clients whose change was clipped, for the record, which is not private."""
        return {"clipped": float(self._clipped)}


VARIANCE = "running_var"
STATISTICS = 0.1
"""Share of C^2 that a client's running statistics may use, if the model has any."""


def is_statistic(key: str) -> bool:
    """Return True if a flat name is of a running statistic of a batch norm."""
    return key.endswith(("running_mean", VARIANCE))


@lru_cache
def epsilon_spent(privacy: Privacy, clients: int, cohort: int, rounds: int, usage: bool, weights: bool = True) -> float:
    """Return epsilon at `privacy.delta_for(clients)` after `rounds` rounds, within 0.3 % and never too small.

    Rounds without amplification are one Gaussian mechanism, whose epsilon has a closed form. Sampled rounds are
    composed by dp-accounting's privacy loss distributions (Poisson, one client added or removed). Their error falls
    with the square of the discretisation step, so the step is divided by 4 until epsilon stops changing.

    Args:
        cohort: clients expected in a round; the sampling rate is `cohort / clients`.
        rounds: rounds that began, whether or not they were completed.
        usage: whether the method asks for usage. A client discloses it once a round at most. It is not amplified,
            because the server sees which client it belongs to.
        weights: whether the weights count; without them, the result is the epsilon spent by usage alone.

    Raises:
        ConfigError: if dp-accounting is not installed.
    """
    if not rounds:
        return 0.0
    try:
        from dp_accounting import get_epsilon_gaussian
    except ModuleNotFoundError as error:
        raise ConfigError(f"privacy needs {error.name}: pip install 'consilium[privacy]'") from error
    delta, rate = privacy.delta_for(clients), sampling_rate(cohort, clients)
    noises = [privacy.usage_noise] if usage and privacy.usage == "noised" else []
    is_sampled = weights and privacy.noise > 0 and privacy.sampling == "poisson" and rate < 1
    if weights and privacy.noise > 0 and not is_sampled:
        noises.append(privacy.noise)
    inverse = math.fsum(noise**-2 for noise in noises) * rounds  # 1 / sigma^2 of one Gaussian equivalent to all of them
    if not is_sampled:
        return float(get_epsilon_gaussian(inverse**-0.5, delta)) if inverse else 0.0
    if (inverse + privacy.noise**-2 * rounds) > HOPELESS:
        return math.inf
    # The loss of one round lies within about 1 / (2 z^2) + 9 / z, so start with 200 steps over that range.
    step, previous_epsilon = (0.5 / privacy.noise + 9) / privacy.noise / 200, math.inf
    for _ in range(REFINEMENTS):
        epsilon = _sampled_epsilon(rate, privacy.noise, rounds, inverse, step, delta)
        if previous_epsilon - epsilon <= max(AGREED * epsilon, 1e-5):
            return epsilon
        step, previous_epsilon = step / 4, epsilon
    return previous_epsilon


HOPELESS = 1e6
"""rounds / z^2 above which epsilon is reported as infinite: it would be in the thousands, which guarantees nothing."""
AGREED = 0.02
"""Relative change of epsilon from one step to its quarter at which refinement stops; 1/15 of it remains as error."""
REFINEMENTS = 6


def _sampled_epsilon(rate: float, noise: float, rounds: int, inverse: float, step: float, delta: float) -> float:
    """Return epsilon of `rounds` sampled rounds and one Gaussian of variance 1 / `inverse`, at this step."""
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    loss_distribution = _round_loss(rate, noise, step).self_compose(rounds)
    if inverse:
        loss_distribution = loss_distribution.compose(
            from_gaussian_mechanism(inverse**-0.5, value_discretization_interval=step)
        )
    with np.errstate(over="ignore"):  # a ratio of masses that overflows is larger than any loss
        return float(loss_distribution.get_epsilon_for_delta(delta))


def epsilon_of_sgd(rate: float, noise: float, steps: int, delta: float) -> float:
    """Return epsilon of `steps` steps of DP-SGD that draws every row with `rate`, with noise of `noise` times the clip.

    Raises:
        ConfigError: if dp-accounting is not installed.
    """
    privacy = Privacy(noise=noise, delta=delta, epsilon=1.0)
    clients = 1_000_000  # any number works: the rate is the cohort's share of it, and delta is given
    return epsilon_spent(privacy, clients, round(rate * clients), steps, usage=False)


@lru_cache(maxsize=32)
def _round_loss(rate: float, noise: float, step: float) -> Any:
    """Return the privacy loss distribution of one Poisson-sampled round."""
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    return from_gaussian_mechanism(noise, value_discretization_interval=step, sampling_prob=rate)


# --- the usage of experts -------------------------------------------------------------------------------------------


def usage_told(demand: Mapping[str, Tensor], privacy: Privacy) -> dict[str, Tensor]:
    """Return what a client discloses about its usage.

    Args:
        demand: block -> tokens that asked for each expert, int64 [E], or another measure >= 0 of each, float [E].

    Returns:
        A mapping of the same form and dtypes. "exact": the input; "coarse": 1 for the upper half of a layer's experts
        (ties: lower id) and 0 for the others; "noised": noised shares of `TOKENS`, none below 0.
    """
    if privacy.usage == "exact":
        return dict(demand)
    if privacy.usage == "coarse":
        return {block: _upper_half(n_E) for block, n_E in demand.items()}
    generator, std = fresh_generator(), privacy.usage_noise * math.sqrt(2 * len(demand))
    usage = {}
    for block, n_E in demand.items():
        share_E = n_E.double() / (float(n_E.sum()) or 1.0)
        share_E = share_E + std * torch.randn(share_E.shape, generator=generator, dtype=torch.float64)
        usage[block] = (share_E.clamp(min=0) * TOKENS).round().to(n_E.dtype)
    return usage


def _upper_half(n_E: Tensor) -> Tensor:
    mask_E = torch.zeros_like(n_E)
    mask_E[n_E.argsort(descending=True, stable=True)[: max(len(n_E) // 2, 1)]] = 1
    return mask_E
