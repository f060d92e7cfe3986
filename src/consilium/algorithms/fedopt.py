"""FedAvgM, FedAdam and FedYogi: Adaptive Federated Optimization.

Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan. ICLR 2021. https://arxiv.org/abs/2003.00295

Algorithm 2: clients train as in FedAvg; the server uses the mean change as a gradient.

    d <- mean_k x_k - x                  m <- beta1 m + (1 - beta1) d
    FedAdam   v <- beta2 v + (1 - beta2) d^2
    FedYogi   v <- v - (1 - beta2) d^2 sign(v - d^2)
    x <- x + eta m / (sqrt(v) + tau)

FedAvgM (Hsu, Qi, Brown, 2019, https://arxiv.org/abs/1909.06335) uses m <- beta1 m + d and x <- x + eta m.

    m, v     groups "m" and "v" of the server's state, float64        v_0      tau^2, as in the paper

Departures: the mean is by n_k. If no client of a round has returned a tensor (an expert, the head of another task), the
tensor keeps its value, m and v; the paper has no such tensors. Buffers, such as running statistics, are averaged.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from consilium.algorithms.fedavg import FedAvgClient, FedAvgServer, averaged, common_experts
from consilium.constraints import Fraction, Scale
from consilium.core import Algorithm, Client, ClientId, Payload, Server
from consilium.errors import ConfigError
from consilium.moe.rules import PAIRWISE
from consilium.params import Params
from consilium.setup import Setup
from consilium.work import setting

__all__ = ["FedAdam", "FedAvgM", "FedYogi"]


@dataclass(frozen=True)
class FedAvgM(Algorithm):
    """FedAvg with momentum at the server.

    Args:
        eta: learning rate of the server, > 0.
        beta1: momentum, in [0, 1).
        experts: see FedAvg.
    """

    tau: ClassVar[float] = 0.0  # FedAdam and FedYogi set it
    eta: Scale = setting(1.0, "server")
    beta1: Fraction = setting(0.9, "server")
    experts: int | Literal["all", "fit"] = setting("all", "server")

    def server(self, setup: Setup) -> Server:
        return FedOptServer(setup, self)

    def client(self, setup: Setup) -> Client:
        return FedAvgClient(setup)

    def step(self, d: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the change of a tensor and its new m and v, all float64.

        Args:
            d: mean change of the tensor over the clients.
            m: first moment.
            v: second moment.
        """
        m = self.beta1 * m + d
        return self.eta * m, m, v


@dataclass(frozen=True)
class FedAdam(FedAvgM):
    """FedAvg with Adam at the server.

    Args:
        eta: learning rate of the server, > 0.
        beta1: momentum, in [0, 1).
        experts: see FedAvg.
        beta2: decay of the second moment, in [0, 1).
        tau: adaptivity, > 0: changes far below it are scaled by eta / tau.
    """

    eta: Scale = setting(0.01, "server")
    beta2: Fraction = setting(0.99, "server")
    tau: Scale = setting(1e-3, "server")

    def step(self, d: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        m = self.beta1 * m + (1 - self.beta1) * d
        v = self.second(d.square(), v)
        return self.eta * m / (v.sqrt() + self.tau), m, v

    def second(self, square: Tensor, v: Tensor) -> Tensor:
        """Return the new second moment, given the squared mean change and the old second moment."""
        return self.beta2 * v + (1 - self.beta2) * square


@dataclass(frozen=True)
class FedYogi(FedAdam):
    """FedAvg with Yogi at the server; its second moment falls more slowly than Adam's.

    Args:
        eta: learning rate of the server, > 0.
        beta1: momentum, in [0, 1).
        experts: see FedAvg.
        beta2: decay of the second moment, in [0, 1).
        tau: adaptivity, > 0.
    """

    def second(self, square: Tensor, v: Tensor) -> Tensor:
        return v - (1 - self.beta2) * square * torch.sign(v - square)


class FedOptServer(FedAvgServer):
    """A FedAvg server that takes an optimiser step along the mean change."""

    def __init__(self, setup: Setup, algorithm: FedAvgM):
        if setup.fit.lora.rank and setup.fit.lora.rule in PAIRWISE:
            raise ConfigError(
                f"fit.lora.rule is {setup.fit.lora.rule!r}; an optimiser at the server needs a mean number by number: "
                "take mean, ffa, alternate or share_a"
            )
        super().__init__(setup, common_experts(setup, algorithm.experts))
        self.algorithm = algorithm
        self.m: Params = {}
        self.v: Params = {}

    def aggregate(self, round: int, replies: Iterable[tuple[ClientId, Payload]]) -> dict[str, float]:
        mean = self.setup.mean(self.params)
        mean_params = averaged(self.params, replies, mean)
        initial_moment = self.algorithm.tau**2
        params, m, v = dict(self.params), dict(self.m), dict(self.v)
        for key, new_tensor in mean_params.items():
            old_tensor = self.params[key]
            if new_tensor is old_tensor:  # no client has returned this tensor
                continue
            if key.endswith(("running_mean", "running_var")):
                params[key] = new_tensor
                continue
            moment1 = m[key] if key in m else torch.zeros_like(old_tensor, dtype=torch.float64)
            moment2 = v[key] if key in v else torch.full_like(old_tensor, initial_moment, dtype=torch.float64)
            change, moment1, moment2 = self.algorithm.step(new_tensor.double() - old_tensor.double(), moment1, moment2)
            params[key] = (old_tensor.double() + change).to(old_tensor.dtype)
            m[key], v[key] = moment1, moment2  # kept in float64, in which the square of a huge change is finite
        self.params, self.m, self.v = params, m, v
        return mean.told()

    def state(self) -> Payload:
        return Payload({"params": self.params, "m": self.m, "v": self.v})

    def restore(self, state: Payload) -> None:
        self.params, self.m, self.v = state.group("params"), state.group("m"), state.group("v")
