"""DP-SGD at a site (Abadi et al. 2016, https://arxiv.org/abs/1607.00133): a bound on what a package reveals of a row.

    g <- ( sum over drawn rows of clip_C(gradient of the row)  +  N(0, (z C)^2) ) / expected rows

Each row is drawn independently with the rate q = batch size / rows (Poisson). Rows and noise are drawn from the
operating system's randomness. Neighbours differ by one row of training data: an example, or one row of tokens if
documents are joined and cut. Gradients are taken row by row, so any module can be trained, at the cost of speed.
"""

import math
import secrets
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from consilium.constraints import Fraction, NonNegativeFloat, PositiveFloat, check_settings
from consilium.core import ClientContext
from consilium.data.encode import Encoded
from consilium.moe.model import TaskModel
from consilium.privacy import epsilon_of_sgd, fresh_generator
from consilium.setup import Setup
from consilium.work import tokens_in

__all__ = ["Private", "fit_private"]


@dataclass(frozen=True)
class Private:
    """Differential privacy of a site's training.

    Args:
        noise: z, standard deviation of the noise in units of `clip`; 0: none.
        clip: C, largest norm of a row's gradient, > 0.
        delta: in (0, 1); 0: 1 / rows^1.1.
    """

    noise: NonNegativeFloat = 0.0
    clip: PositiveFloat = 1.0
    delta: Fraction = 0.0

    def __post_init__(self) -> None:
        check_settings(self, "dp_")

    def told(self, rows: int, batch_size: int, steps: int) -> dict[str, Any]:
        """Return the card's privacy entry for this number of steps."""
        delta, rate = self.delta or rows**-1.1, min(1.0, batch_size / rows)
        return {
            "epsilon": epsilon_of_sgd(rate, self.noise, steps, delta),
            "delta": delta,
            "noise": self.noise,
            "clip": self.clip,
            "rate": rate,
            "steps": steps,
            "unit": "one row of training data added or removed",
        }


def fit_private(
    model: TaskModel, data: Encoded, steps: int, lr: float, setup: Setup, context: ClientContext, private: Private
) -> float:
    """Train in place by DP-SGD with the optimizer of `setup.fit`, and return the mean loss of the rows drawn."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = setup.fit.descent({str(i): p for i, p in enumerate(parameters)}, {"": lr})
    rate = min(1.0, setup.fit.batch_size / len(data))
    generator, system = fresh_generator(), secrets.SystemRandom()
    context.work.plan(steps)
    model.train()
    losses = []
    for _ in range(steps):
        context.work.step()
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        for row in (i for i in range(len(data)) if system.random() < rate):
            batch = data.batch([row], context.device)
            context.work.read(tokens_in(batch))
            logits, labels = model(batch)
            loss = setup.fit.cross_entropy(logits, labels)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            _add_clipped(sums, gradients, private.clip)
            losses.append(float(loss.detach()))
        for p, total in zip(parameters, sums, strict=True):
            noise = torch.randn(total.shape, generator=generator) * private.noise * private.clip
            p.grad = ((total + noise.to(total.device)) / (rate * len(data))).to(p.dtype)
        optimizer.step()
        context.progress(context.work.done, steps)
    optimizer.zero_grad()
    model.eval()
    return sum(losses) / len(losses) if losses else float("nan")


def _add_clipped(sums: list[Tensor], gradients: tuple[Tensor | None, ...], clip: float) -> None:
    """Add one row's gradient to the sums, clipped to the norm `clip`."""
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients if g is not None))
    scale = min(1.0, clip / norm) if norm else 1.0
    for total, gradient in zip(sums, gradients, strict=True):
        if gradient is not None:
            total.add_(gradient.float(), alpha=scale)
