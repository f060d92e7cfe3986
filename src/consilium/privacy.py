"""Client-level differential privacy of the weights, and modes of telling the usage of experts.

DP-FedAvg (McMahan, Ramage, Talwar, Zhang 2018, https://arxiv.org/abs/1710.06963), with the server trusted to add noise:

    w <- w + (sum_k clip_C(w_k - w) + N(0, (z C)^2)) / m

over the clients k of a round, all of them counted alike; clip_C scales a client's whole change to the norm C at most.
m is the cohort that is expected, not the number that replied. What a client does not return is a zero in its change,
and the noise is on every parameter that the server holds: which experts or labels a client has shows in neither.
Integer tensors stay as they are.

    z   Privacy.noise     C   Privacy.clip     m   `cohort`     (epsilon, delta)   Privacy.epsilon, Privacy.delta

- sampling "poisson": each client takes part by itself with the rate q = clients_per_round / N, which amplifies privacy;
  neighbours differ by one client added or removed. A round may have nobody, and then is noise alone.
- sampling "fixed": clients_per_round of them, as the run's seed has it, which anybody may know; no amplification is
  claimed, and neighbours differ by one client's changes replaced with zeros.

Noise and Poisson sampling are drawn from the operating system's randomness, never from the run's seed: two runs of one
seed differ, and a round that is done again after a crash gets other noise and is charged again. The budget is counted
with dp-accounting's privacy loss distributions. Limit: noise is added in float64, not in exact arithmetic.

A client's usage of experts gives away its mix of labels. Modes of telling it, for methods that ask for it:

    exact     the counts, as the papers have it
    coarse    per layer, which experts are in the upper half; a promise of less, not of a number
    noised    shares + N(0, (z_u sqrt(2 L))^2), of L layers, sqrt(2 L) being the most that a client's shares can change
              (L2): client-level differential privacy even against the server, charged to the same budget
"""

import math
import random
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from consilium.core import ClientInfo, Sampling
from consilium.errors import ConfigError, PayloadError
from consilium.params import Params

__all__ = [
    "PoissonSampling",
    "Privacy",
    "PrivateMean",
    "epsilon_spent",
    "fresh_generator",
    "sampling_rate",
    "usage_told",
]

TOKENS = 1_000_000
"""Noised shares are told as counts of so many tokens."""


@dataclass(frozen=True)
class Privacy:
    """What is kept from whom, see `consilium.privacy`.

    Args:
        noise: z, standard deviation of the noise on the sum of changes in units of `clip`; 0: no differential privacy.
        clip: C, largest L2 norm of a client's whole change, > 0.
        epsilon: the budget; a run ends before the round that would exceed it.
        delta: in (0, 1); 0: 1 / N^1.1 for N clients.
        sampling: "poisson", each client with a rate; "fixed", so many, without a claim to amplification.
        usage: how clients tell their usage of experts: "exact", "coarse", "noised".
        usage_noise: z_u, for "noised": standard deviation in units of the most that a client can change; > 0.
    """

    noise: float = 0.0
    clip: float = 1.0
    epsilon: float = 8.0
    delta: float = 0.0
    sampling: Literal["poisson", "fixed"] = "poisson"
    usage: Literal["exact", "coarse", "noised"] = "exact"
    usage_noise: float = 0.0

    def __post_init__(self) -> None:
        for name in ("noise", "usage_noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"privacy.{name} is {getattr(self, name)}; it must be a number >= 0")
        for name in ("clip", "epsilon"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"privacy.{name} is {getattr(self, name)}; it must be a number > 0")
        if not 0 <= self.delta < 1:
            raise ConfigError(f"privacy.delta is {self.delta}; it must be within (0, 1), or 0 for 1 / N^1.1")
        for name, allowed in (("sampling", ("poisson", "fixed")), ("usage", ("exact", "coarse", "noised"))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"privacy.{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        if (self.usage == "noised") != (self.usage_noise > 0):
            raise ConfigError(
                f"privacy.usage is {self.usage!r} with usage_noise {self.usage_noise:g}; noised usage needs noise > 0, "
                "the other modes have none"
            )

    @property
    def charged(self) -> bool:
        """Whether anything is counted against the budget."""
        return self.noise > 0 or self.usage == "noised"

    def delta_for(self, clients: int) -> float:
        """delta, or its default for so many clients."""
        return self.delta or clients**-1.1

    def stricter(self, other: "Privacy") -> "Privacy":
        """This, with the other's way of telling usage where that tells less."""
        order = ("exact", "coarse", "noised")
        if (order.index(other.usage), other.usage_noise) <= (order.index(self.usage), self.usage_noise):
            return self
        return replace(self, usage=other.usage, usage_noise=other.usage_noise)

    def sampled(self, sampling: Sampling, clients: int) -> Sampling:
        """How clients are chosen where weights are private.

        Raises:
            ConfigError: for tasks chosen first, which no rate describes.
        """
        if not self.noise or self.sampling == "fixed":
            return sampling
        if sampling.distinct_tasks:
            raise ConfigError("sampling.distinct_tasks does not go with privacy.sampling poisson; take fixed")
        rate = sampling_rate(sampling.clients_per_round, clients)
        return PoissonSampling(
            sampling.clients_per_round, False, sampling.min_clients, sampling.min_fraction, rate=rate
        )


def sampling_rate(at_once: int, clients: int) -> float:
    """q: with which a client takes part where so many of so many are expected in a round."""
    return min(1.0, at_once / max(clients, 1))


# --- randomness -----------------------------------------------------------------------------------------------------


def fresh_generator() -> torch.Generator:
    """A generator from the operating system's randomness: another one at every call. Tests alone replace it."""
    return torch.Generator().manual_seed(secrets.randbits(63))


@dataclass(frozen=True)
class PoissonSampling(Sampling):
    """Every client by itself with a probability, drawn from the operating system's randomness.

    Args:
        rate: the probability, of the clients that can take part.
    """

    rate: float = 1.0

    def choose(self, clients: Sequence[ClientInfo], round: int, seed: int) -> list[ClientInfo]:
        """Whoever was drawn, nobody included; `round` and `seed` do not matter."""
        draw = random.SystemRandom()
        return [client for client in sorted(clients, key=lambda c: c.id) if draw.random() < self.rate]

    def quorum(self, selected: int) -> int:
        """As in `Sampling`, but a round of few that were drawn is not short of clients."""
        return min(selected, super().quorum(selected))


# --- the weights ----------------------------------------------------------------------------------------------------


class PrivateMean:
    """What `Setup.mean` gives under differential privacy: filled and read like `params.WeightedMean`.

    Args:
        privacy: clip and noise. previous: the server's parameters. cohort: m, clients that are expected in a round.
    """

    def __init__(self, privacy: Privacy, previous: Mapping[str, Tensor], cohort: float):
        self._privacy = privacy
        self._cohort = cohort
        self._previous = previous
        self._sums = {key: torch.zeros_like(t, dtype=torch.float64) for key, t in previous.items() if _noisy(t)}
        self._clipped = 0

    def add(self, params: Mapping[str, Tensor], weight: float | Callable[[str], float]) -> None:
        """Count one client's whole reply, once; every client weighs 1, whatever `weight` says.

        Raises:
            PayloadError: for a name or shape that the server's model does not have.
        """
        changes = {}
        for key, tensor in params.items():
            if key not in self._previous or self._previous[key].shape != tensor.shape:
                raise PayloadError(f"{key!r} {tuple(tensor.shape)} is not a parameter of the server's model")
            if key in self._sums:
                changes[key] = tensor.double() - self._previous[key].double()
        norm = math.sqrt(sum(float(change.square().sum()) for change in changes.values()))
        self._clipped += norm > self._privacy.clip
        scale = self._privacy.clip / norm if norm > self._privacy.clip else 1.0
        for key, change in changes.items():
            self._sums[key].add_(change, alpha=scale)

    def mean(self, previous: Mapping[str, Tensor]) -> Params:
        """The new parameters; the noise is drawn here, once."""
        generator, std = fresh_generator(), self._privacy.noise * self._privacy.clip
        merged = dict(previous)
        for key, total in self._sums.items():
            noise = torch.randn(total.shape, generator=generator, dtype=torch.float64) * std
            merged[key] = (previous[key].double() + (total + noise) / self._cohort).to(previous[key].dtype)
        return merged

    def told(self) -> dict[str, float]:
        """For the record, which is not private: clients whose change was clipped."""
        return {"clipped": float(self._clipped)}


def _noisy(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


@lru_cache
def epsilon_spent(privacy: Privacy, clients: int, cohort: int, rounds: int, usage: bool, weights: bool = True) -> float:
    """epsilon at `privacy.delta_for(clients)` after so many rounds, by privacy loss distributions; inf: thousands.

    Args:
        cohort: clients expected in a round, of which with `clients` the sampling rate follows.
        rounds: that began, whether they came to an end or not.
        usage: whether the method asks for usage: of a client once a round at most, and not amplified, for the server
            sees whose it is.
        weights: False leaves the weights out, for what usage alone has spent.

    Raises:
        ConfigError: if dp-accounting is not installed.
    """
    if not rounds:
        return 0.0
    try:
        from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
        from dp_accounting.pld import PLDAccountant
    except ModuleNotFoundError as error:
        raise ConfigError(f"privacy needs {error.name}: pip install 'consilium[privacy]'") from error
    noised, rate = usage and privacy.usage == "noised", sampling_rate(cohort, clients)
    inverse = (weights and privacy.noise and privacy.noise**-2) + (noised and privacy.usage_noise**-2)
    if inverse * rounds > 1e4:  # epsilon of thousands promises nothing, and its distributions would fill the memory
        return math.inf
    step = 1e-3 * max(1.0, inverse * rounds / 10)
    accountant = PLDAccountant(value_discretization_interval=step)
    if weights and privacy.noise:
        event = GaussianDpEvent(privacy.noise)
        if privacy.sampling == "poisson" and rate < 1:
            event = PoissonSampledDpEvent(rate, event)
        accountant.compose(event, rounds)
    if noised:
        accountant.compose(GaussianDpEvent(privacy.usage_noise), rounds)
    return float(accountant.get_epsilon(privacy.delta_for(clients)))


# --- the usage of experts -------------------------------------------------------------------------------------------


def usage_told(demand: Mapping[str, Tensor], privacy: Privacy) -> dict[str, Tensor]:
    """What a client tells of its usage.

    Args:
        demand: block -> tokens that asked for each expert, int64 [E].

    Returns:
        Of the same form: the counts; 1 for the upper half of a layer's experts (ties: lower id) and 0 for the others;
        or noised shares of `TOKENS`, none below 0.
    """
    if privacy.usage == "exact":
        return dict(demand)
    if privacy.usage == "coarse":
        return {block: _upper_half(n_E) for block, n_E in demand.items()}
    generator, std = fresh_generator(), privacy.usage_noise * math.sqrt(2 * len(demand))
    told = {}
    for block, n_E in demand.items():
        share_E = n_E.double() / max(float(n_E.sum()), 1.0)
        share_E = share_E + std * torch.randn(share_E.shape, generator=generator, dtype=torch.float64)
        told[block] = (share_E.clamp(min=0) * TOKENS).round().to(torch.int64)
    return told


def _upper_half(n_E: Tensor) -> Tensor:
    told = torch.zeros_like(n_E)
    told[n_E.argsort(descending=True, stable=True)[: max(len(n_E) // 2, 1)]] = 1
    return told
