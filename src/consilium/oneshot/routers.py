"""The routers of a hub, which choose the site whose part computes a token.

    uniform     every adapter counts 1/E for every token
    lorahub     constants w_e, searched on a few public rows (Huang et al. 2023, https://arxiv.org/abs/2307.13269)
    arrow       |<x, p_e>|, p_e the top right singular vector of B_e A_e; softmax over the k largest
                (Ostapenko et al. ICML 2024, https://arxiv.org/abs/2405.11157)
    phatgoose   <norm(x), norm(v_e)> / sqrt(X), v_e a gate vector that the site trained; softmax over all, the k
                largest, divided by their sum (Muqeeth et al. ICML 2024, https://arxiv.org/abs/2402.05859)
    flexolmo    the router rows that sites trained, next to the public model's own (whole experts, see `guests`). Rows
                that were trained separately are not calibrated against each other's texts. If every site gives its sums
                M_e, they are moved: r_e + apart (sum_c M_c + lambda I)^-1 (2 m_e - sum_c m_c), without the constant in
                x; ours
    ridge       a linear regression of the site on x, from sums that sites and the hub's public rows give:
                W = (sum_e M_e + lambda I)^-1 [m_0 .. m_E]; ours

Every router except `lorahub` uses only values that each site computed alone, so a withdrawn site removes them entirely.
The ridge regression is solved again from the sums of the remaining sites. Routers compute in float32, whatever the
model's dtype.

Shapes: N tokens, E sites, X width of the input, R rank.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from consilium.errors import ConfigError
from consilium.oneshot.adapters import Pair

__all__ = [
    "ADAPTER_ROUTERS",
    "EXPERT_ROUTERS",
    "JOINT",
    "Router",
    "arrow",
    "constant",
    "directions",
    "phatgoose",
    "prototype",
    "ridge",
    "solve_ridge",
]

Router = Literal["uniform", "lorahub", "arrow", "phatgoose", "flexolmo", "ridge"]
ADAPTER_ROUTERS = ("uniform", "lorahub", "arrow", "phatgoose", "ridge")
EXPERT_ROUTERS = ("flexolmo", "ridge")
JOINT = frozenset({"lorahub"})
"""Routers that are fitted over all sites together; they must be fitted again after a withdrawal."""
Weigh = Callable[[Tensor], Tensor]


def constant(weights: Sequence[float]) -> Weigh:
    """Return a router that gives these coefficients to every token."""
    row_E = torch.tensor(list(weights), dtype=torch.float32)
    return lambda x_NX: row_E.to(x_NX.device).expand(len(x_NX), -1)


def prototype(pair: Pair) -> Tensor:
    """Return Arrow's prototype of one adapter: the top right singular vector of B A, float32 [X], of norm 1.

    With A^T = Q U (QR), the right singular vectors of B A are Q times those of B U^T, a matrix of R columns, so the
    product is never formed. The sign is that of the vector's largest entry; Arrow ignores it.
    """
    q_XR, u_RR = torch.linalg.qr(pair.a_RX.double().t())
    _, _, vh_RR = torch.linalg.svd(pair.b_YR.double() @ u_RR.t(), full_matrices=False)
    p_X = q_XR @ vh_RR[0]
    return (p_X * p_X[p_X.abs().argmax()].sign()).float()


def arrow(pairs: Sequence[Pair], top_k: int, temperature: float = 1.0) -> Weigh:
    """Return Arrow's router over adapters of one module."""
    prototypes_EX = torch.stack([prototype(pair) for pair in pairs])
    k = _checked(top_k, len(pairs))

    def weigh(x_NX: Tensor) -> Tensor:
        logits_NE = (x_NX.float() @ prototypes_EX.to(x_NX.device).t()).abs() / temperature
        return torch.softmax(_keep_largest(logits_NE, k, float("-inf")), dim=-1)

    return weigh


def phatgoose(gates: Sequence[Tensor], top_k: int) -> Weigh:
    """Return PHATGOOSE's router over the gate vectors [X] of one module."""
    gates_EX = torch.stack([_standard(v_X.float()) for v_X in gates])
    k = _checked(top_k, len(gates))

    def weigh(x_NX: Tensor) -> Tensor:
        logits_NE = _standard(x_NX.float()) @ gates_EX.to(x_NX.device).t() / x_NX.shape[-1] ** 0.5
        c_NE = _keep_largest(torch.softmax(logits_NE, dim=-1), k, 0.0)
        return c_NE / c_NE.sum(-1, keepdim=True)

    return weigh


def _standard(x: Tensor) -> Tensor:
    """Return LayerNorm without weights, over the last dimension."""
    return F.layer_norm(x, x.shape[-1:])


def solve_ridge(moments: Mapping[str, Tensor], strength: float) -> Tensor:
    """Solve the regression of the site on the token.

    Args:
        moments: class -> sum of (x, 1)(x, 1)^T over its tokens, [X + 1, X + 1]; all classes have the same weight. The
            first class may be the public rows.
        strength: lambda, as a share of the mean of the diagonal.

    Returns:
        W, float32 [X + 1, classes]: (x, 1) W estimates, for each class, the probability that the token belongs to it.
    """
    means = [m.double() / m[-1, -1].double() for m in moments.values()]
    return _damped_solution(means, [mean[:, -1] for mean in means], strength)


def _damped_solution(matrices: Sequence[Tensor], targets: Sequence[Tensor], strength: float) -> Tensor:
    """Solve (sum of matrices + lambda I) W = targets; returns W, float32, a column for each target."""
    total = torch.stack(list(matrices)).sum(0)
    damping = strength * total.diagonal().mean() * torch.eye(len(total), dtype=torch.float64)
    return torch.linalg.solve(total + damping, torch.stack(list(targets), dim=1)).float()


def directions(moments: Mapping[str, Tensor], strength: float) -> dict[str, Tensor]:
    """Return site -> float32 [X], the regression of +1 on its tokens and -1 on those of the others, without constant.

    Args:
        moments: site -> sum of (x, 1)(x, 1)^T over its tokens, [X + 1, X + 1]; all sites have the same weight.
        strength: as in `solve_ridge`.
    """
    means = {site: m.double() / m[-1, -1].double() for site, m in moments.items()}
    common = torch.stack([m[:-1, -1] for m in means.values()]).sum(0)
    targets = [2 * m[:-1, -1] - common for m in means.values()]
    solution = _damped_solution([m[:-1, :-1] for m in means.values()], targets, strength)
    return dict(zip(means, solution.unbind(1), strict=True))


def ridge(w_XC: Tensor, top_k: int, sharpness: float, public: bool) -> Weigh:
    """Return the ridge router: the softmax of sharpness times the regression, with all but the k largest set to 0.

    Args:
        w_XC: result of `solve_ridge`.
        public: whether the first class is the public model, which gets no adapter.
    """
    classes = w_XC.shape[1]
    k = _checked(top_k, classes - public)

    def weigh(x_NX: Tensor) -> Tensor:
        x = torch.cat([x_NX.float(), x_NX.new_ones(len(x_NX), 1, dtype=torch.float32)], dim=1)
        c_NC = torch.softmax(sharpness * (x @ w_XC.to(x.device)), dim=-1)
        c_NE = c_NC[:, int(public) :]
        return _keep_largest(c_NE, k, 0.0)

    return weigh


def _keep_largest(values_NE: Tensor, k: int, other: float) -> Tensor:
    """Return the values with all but the k largest of every row replaced."""
    if k >= values_NE.shape[1]:
        return values_NE
    top_values, index = values_NE.topk(k, dim=-1)
    return torch.full_like(values_NE, other).scatter(-1, index, top_values)


def _checked(top_k: int, sites: int) -> int:
    if top_k < 1:
        raise ConfigError(f"--top-k is {top_k}; it must be at least 1")
    return min(top_k, sites)
