"""Scores of packages and routers by domain, and the value of each site's contribution.

The evaluating party provides the rows: public rows at the hub, its own rows at a site. A domain is a client of the
given data. Scores are in bits per byte of text if the task is the next token, else in nats per token; lower is better.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from consilium.core import ClientContext, ClientInfo, ClientState
from consilium.data.encode import Encoded, token_bytes
from consilium.data.task import ClientData
from consilium.errors import DataError
from consilium.experiment import Experiment
from consilium.moe.model import TaskModel
from consilium.oneshot.base import Base, Frozen
from consilium.oneshot.build import Building, assemble, fit_ridge
from consilium.oneshot.moments import measure
from consilium.oneshot.package import Package
from consilium.scoring import mean_loss, read_batches
from consilium.setup import Setup

__all__ = ["Domains", "Matrix", "alone", "contributions", "ensemble", "fit_router", "matrix"]

Matrix = dict[str, dict[str, float]]
"""Model -> domain -> score."""


@dataclass(frozen=True)
class Domains:
    """Rows to score on, by domain.

    Args:
        experiment: says how rows are read.
        data: domain -> its data.
        split: "test", "validation" or "train".
    """

    experiment: Experiment
    data: Mapping[str, ClientData]
    split: str = "test"

    @classmethod
    def of(cls, experiment: Experiment, split: str = "test") -> "Domains":
        """Load the data of an experiment; its clients are the domains."""
        return cls(experiment, experiment.data.load(experiment.seed).clients, split)

    @cached_property
    def setup(self) -> Setup:
        """Return the set-up that turns rows into tokens."""
        return Base(self.experiment.model).setup(self.experiment)

    @cached_property
    def rows(self) -> dict[str, Encoded]:
        """Return domain -> rows."""
        return {n: self.setup.encode(self.context(n), getattr(d, self.split)) for n, d in self.data.items()}

    def context(self, name: str) -> ClientContext:
        """Return the context that the loops of `training` need for a domain."""
        data = self.data[name]
        info = ClientInfo(name, len(data.train), data.task.name)
        return ClientContext(info, data, torch.device(self.experiment.device), self.experiment.seed, ClientState())

    def batches(self) -> Iterable[dict[str, Tensor]]:
        """Yield the rows of all domains in batches."""
        for name, rows in self.rows.items():
            yield from read_batches(rows, self.experiment.fit.batch_size, self.context(name))

    def scores(self, model: TaskModel) -> dict[str, float]:
        """Return domain -> score of a live model."""
        model.to(torch.device(self.experiment.device))
        return {
            name: mean_loss(self.setup, model, rows, self.context(name), len(rows)) * self._unit(name)
            for name, rows in self.rows.items()
        }

    @property
    def unit(self) -> str:
        """Return the unit of the scores."""
        all_plain = all(data.task.metric == "token_accuracy" for data in self.data.values())
        return "bits per byte" if all_plain else "nats per token"

    def _unit(self, name: str) -> float:
        """Return the factor from nats per token to the unit."""
        if self.unit == "nats per token":
            return 1.0
        sizes = token_bytes(self.setup.model.tokenizer())
        # The first token of a row is not predicted, because nothing comes before it, unless the row has a prompt.
        rows = self.rows[name]
        target_ids = [t if s else t[1:] for s, t in zip(rows.sources, rows.targets, strict=True)]
        byte_count = sum(int(sizes[torch.tensor(ids)].sum()) for ids in target_ids if ids)
        if not byte_count:
            raise DataError(f"domain {name} has no text to score")
        return sum(map(len, target_ids)) / math.log(2) / byte_count


def fit_router(
    base: Base, packages: Mapping[str, Package], building: Building, public: Domains | None
) -> dict[str, Tensor]:
    """Return what a router needs in addition to the packages; {} for most.

    Args:
        public: rows for the ridge router's class without a site (None: it has no such class) and for lorahub's search.

    Raises:
        DataError: for lorahub without rows.
    """
    if building.router == "ridge":
        return fit_ridge(packages, building, None if public is None else _public_moments(base, packages, public))
    if building.router != "lorahub":
        return {}
    if public is None:
        raise DataError("router lorahub is searched on a few rows: give a recipe and --data flags for them")
    return {"weights": _search(base, packages, building, public)}


def _public_moments(base: Base, packages: Mapping[str, Package], public: Domains) -> dict[str, Tensor]:
    expert = next(iter(packages.values())).kind == "expert"
    model = base.open_model() if expert else base.model()
    paths = sorted({path for package in packages.values() for path in package.part("moment")})
    return measure(model, paths, public.batches())


def _search(base: Base, packages: Mapping[str, Package], building: Building, public: Domains) -> Tensor:
    """Return LoraHub's coefficients [E] in [-1.5, 1.5] that minimise loss + 0.05 mean |w|.

    They are searched by a (1+1) evolution strategy from 0. The paper takes nevergrad's NGOpt, which is also a
    one-plus-one strategy with so small a number of tries. The products B A are added, not A and B separately, so there
    are no cross terms.
    """
    generator = torch.Generator().manual_seed(building.seed)
    best_weights, least_loss, step = torch.zeros(len(packages)), math.inf, 0.5
    for attempt in range(building.tries):
        noise = torch.randn(len(packages), generator=generator) if attempt else torch.zeros(len(packages))
        weights = (best_weights + step * noise).clamp(-1.5, 1.5)
        scores = public.scores(assemble(base, packages, building, {"weights": weights}))
        loss = sum(scores.values()) / len(scores) + 0.05 * float(weights.abs().mean())
        is_better = loss < least_loss
        if is_better:
            best_weights, least_loss = weights, loss
        step = step * (1.5 if is_better else 0.9)
    return best_weights


def matrix(
    base: Base,
    packages: Mapping[str, Package],
    buildings: Sequence[Building],
    domains: Domains,
    public: Domains | None = None,
    told: Callable[[str], None] = lambda line: None,
) -> Matrix:
    """Score the public model, every package alone, and every router, on every domain."""
    scores: Matrix = {"public": domains.scores(base.model())}
    for site, package in packages.items():
        scores[site] = domains.scores(alone(base, package))
        told(f"{site}: {_mean(scores[site]):.3f} {domains.unit}")
    for building in buildings:
        router_tensors = fit_router(base, packages, building, public)
        scores[f"router {building.router}"] = domains.scores(assemble(base, packages, building, router_tensors))
        told(f"router {building.router}: {_mean(scores[f'router {building.router}']):.3f} {domains.unit}")
    return scores


def alone(base: Base, package: Package) -> Frozen:
    """Return the public model with the part of one site, as the site trained it."""
    if package.kind == "expert":
        return assemble(base, {package.site: package}, Building("flexolmo"))
    return assemble(base, {package.site: package}, Building("uniform"))


def contributions(
    base: Base,
    packages: Mapping[str, Package],
    building: Building,
    domains: Domains,
    public: Domains | None = None,
) -> Matrix:
    """Return site -> domain -> rise of the score without the site; a site helps if it is positive."""

    def scores(members: Mapping[str, Package]) -> dict[str, float]:
        if not members:
            return domains.scores(base.model())
        return domains.scores(assemble(base, members, building, fit_router(base, members, building, public)))

    full_scores = scores(packages)
    gains = {}
    for site in packages:
        reduced_scores = scores({name: package for name, package in packages.items() if name != site})
        gains[site] = {name: reduced_scores[name] - full_scores[name] for name in full_scores}
    return gains


@torch.inference_mode()
def ensemble(models: Sequence[TaskModel], domains: Domains) -> dict[str, float]:
    """Return domain -> score of the mean of the models' probabilities, with one forward pass per model."""
    scores = {}
    for model in models:
        model.eval()
    for name, rows in domains.rows.items():
        total, count = 0.0, 0
        for batch in read_batches(rows, domains.experiment.fit.batch_size, domains.context(name)):
            logs, labels = [], None
            for model in models:
                logits, labels = model(batch)
                logs.append(F.log_softmax(logits.float(), dim=-1).gather(1, labels[:, None])[:, 0])
            log_probabilities = torch.logsumexp(torch.stack(logs), dim=0) - math.log(len(logs))
            total -= float(log_probabilities.sum())
            count += len(log_probabilities)
        scores[name] = total / count * domains._unit(name)
    return scores


def _mean(scores: Mapping[str, float]) -> float:
    return sum(scores.values()) / len(scores)
