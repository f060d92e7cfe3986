"""Training of a site's package: it trains once, on its own data, next to the frozen public model.

Training runs in stretches of a fixed number of steps. After each stretch the validation loss is computed, and the state
is written to one atomic file, so a run that was killed resumes to the same bits. The package contains the best stretch
by validation loss, or the initial values if none was better. Under differential privacy it contains the last stretch,
because the choice would use the data once more.

Optimizer moments are reset in every stretch, as they are in every round of a federated run.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Interval
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from consilium.constraints import PositiveInt, check_settings, forbid
from consilium.core import ClientContext, ClientInfo, ClientState, derive_seed
from consilium.data.encode import shuffled
from consilium.data.task import ClientData
from consilium.engine.checkpoint import write_atomic
from consilium.errors import CheckpointError, DataError
from consilium.experiment import Experiment, to_json
from consilium.moe.budget import bytes_of
from consilium.oneshot.adapters import Adapted, Pair, Targets, attach, initial_pairs
from consilium.oneshot.base import Base, Frozen, digest_of, frozen_tensors
from consilium.oneshot.dp import Private, fit_private
from consilium.oneshot.guests import Guest, Opened, open_blocks
from consilium.oneshot.memory import admit
from consilium.oneshot.moments import first_row, measure, measure_routers
from consilium.oneshot.package import Package
from consilium.scoring import mean_loss
from consilium.training import fit
from consilium.work import Work

__all__ = ["Making", "Trainer", "Training", "site_data", "train"]

Making = Literal["adapter", "gated", "expert"]
"""Adapters; adapters with a gate vector (PHATGOOSE); a whole expert with its router row (FlexOlmo)."""
STATE = "training.safetensors"


@dataclass(frozen=True)
class Training:
    """The part that a site trains. `Experiment.fit` says how it trains, with `fit.epochs` times `rounds` passes.

    Args:
        kind: adapter, low-rank adapters; gated, with a gate vector for each, trained afterwards; expert, a copy of the
            most used public expert in every sparse layer, and its router row.
        rank: R of adapters.
        alpha: the scale of adapters is alpha / rank; 0: alpha = rank.
        targets: modules of adapters: linear, layers outside of experts; blocks, feed-forward networks as a whole; both.
        copies: experts per layer, >= 1.
        bias: give router rows a bias min(b, 0), as in FlexOlmo's paper; most families then need --format consilium.
        gate_steps: steps of training the gate vectors, >= 1.
        gate_lr: learning rate of the gate vectors, > 0.
        moments: add what the ridge router needs: sums of products of hidden states, which reveal more about the data
            than weights do.
        save_every: steps of a stretch, >= 1.
        dp_noise: train by DP-SGD with noise of this many times `dp_clip`; 0: without. Its epsilon is in the card.
        dp_clip: largest norm of the gradient of one row, > 0.
        dp_delta: in (0, 1); 0: 1 / rows^1.1.
    """

    kind: Making = "adapter"
    rank: PositiveInt = 16
    alpha: Annotated[float, Interval(ge=0, lt=1e6)] = 0.0
    targets: Targets = "linear"
    copies: PositiveInt = 1
    bias: bool = False
    gate_steps: PositiveInt = 100
    gate_lr: Annotated[float, Interval(gt=0, lt=1e6)] = 1e-2
    moments: bool = False
    save_every: PositiveInt = 50
    dp_noise: float = 0.0
    dp_clip: float = 1.0
    dp_delta: float = 0.0

    @property
    def private(self) -> Private:
        """Return the settings of DP-SGD."""
        return Private(self.dp_noise, self.dp_clip, self.dp_delta)

    def __post_init__(self) -> None:
        check_settings(self)
        forbid(
            self.private.noise and (self.moments or self.kind == "gated"),
            "dp_noise covers weights trained in one stage: leave out --moments and --kind gated",
        )


def site_data(experiment: Experiment, client: str = "") -> ClientData:
    """Load a site's own data, which is the data of one client.

    Raises:
        DataError: if there are several clients and none is named, or no client of that name.
    """
    clients = experiment.data.load(experiment.seed).clients
    if client not in clients and (client or len(clients) != 1):
        raise DataError(f"the data has the clients {', '.join(clients)}; name the site's own by --client")
    return clients[client or next(iter(clients))]


def train(
    experiment: Experiment,
    site: str,
    training: Training,
    folder: Path,
    data: ClientData,
    card: Mapping[str, Any] | None = None,
    told: Callable[[str], None] = lambda line: None,
) -> Package:
    """Train a site's part, or resume its training, and return the unsigned package.

    Args:
        folder: folder for the state of the training; it stays at the site.
        card: information for people, e.g. licence and contact.
        told: called with a line of progress after each stretch.

    Raises:
        BudgetError: if the training would not fit `experiment.memory`.
        CheckpointError: for the state of another training.
    """
    trainer = Trainer(experiment, site, training, data)
    trainer.run(folder, told)
    return trainer.package(card or {})


class Trainer:
    """A live model with the parts that a site trains, and the site's data."""

    def __init__(self, experiment: Experiment, site: str, training: Training, data: ClientData):
        self.experiment, self.site, self.training, self.data = experiment, site, training, data
        self.base = Base(experiment.model)
        self.setup = self.base.setup(experiment, data.task)
        memory = bytes_of(experiment.memory[0]) if experiment.memory else None
        info = ClientInfo(site, len(data.train), data.task.name, memory)
        work = Work(memory=memory or float("inf"))
        device = torch.device(experiment.device)
        self.context = ClientContext(info, data, device, experiment.seed, ClientState(), work=work)
        admit(self.base, self.setup, training, work)
        self.rows = self.setup.encode(self.context, data.train)
        self.validation = self.setup.encode(self.context, data.validation)
        self.adapted: dict[str, Adapted] = {}
        self.opened = Opened()
        self.model = self._open() if training.kind == "expert" else self._adapt()
        self.model.to(device)
        self.history: list[dict[str, Any]] = []
        self.best: tuple[float, dict[str, Tensor]] = (float("inf"), {})
        self.before = float("nan")

    # --- the parts --------------------------------------------------------------------------------------------------

    def _adapt(self) -> Frozen:
        training, model = self.training, self.base.model()
        alpha, seed = training.alpha or training.rank, derive_seed(self.experiment.seed, "adapters")
        pairs = initial_pairs(model, training.targets, training.rank, alpha, seed)
        self.adapted = attach(model, {path: [pair] for path, pair in pairs.items()})
        return model

    def _open(self) -> Frozen:
        model = self.base.open_model()
        with_dp = bool(self.training.private.noise)  # with DP, only noised gradients may depend on the data
        inputs, usage = ({}, {}) if with_dp else measure_routers(model, self._batches())
        guests = {}
        for path, block in Base.sparse(model).items():
            router, experts = block.get_submodule(model.family.router), block.get_submodule(model.family.experts)
            expert_order = (
                usage[path].argsort(descending=True, stable=True) if usage else torch.arange(len(router.weight))
            )
            row = first_row(router.weight, inputs.get(path))
            guests[path] = [
                Guest(
                    {
                        name: getattr(experts, name)[int(expert_order[i % len(expert_order)])]
                        for name in model.family.tensors
                    },
                    row,
                    torch.zeros((), dtype=row.dtype) if self.training.bias else None,
                )
                for i in range(self.training.copies)
            ]
        self.opened = open_blocks(model, guests, self.top_k)
        return model

    @property
    def top_k(self) -> int:
        """Return the experts per token in training: those of the public model plus the site's own."""
        return self.base.top_k + self.training.copies

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        size = self.experiment.fit.batch_size
        for start in range(0, len(self.rows), size):
            yield self.rows.batch(range(start, min(start + size, len(self.rows))), self.context.device)

    # --- training ---------------------------------------------------------------------------------------------------

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """Return path -> parameter of what is trained now."""
        return {path: p for path, p in self.model.named_parameters() if p.requires_grad}

    def run(self, folder: Path, told: Callable[[str], None] = lambda line: None) -> None:
        """Train all remaining stretches, then restore the best one."""
        frozen = digest_of(frozen_tensors(self.model))
        experiment, training = self.experiment, self.training
        batches = self._order("parts", experiment.fit.epochs * experiment.rounds)
        rates = {"": experiment.fit.lr}
        self._stage("parts", folder, batches, rates, told)
        if training.kind == "gated":
            self._add_gates()
            steps = -(-training.gate_steps * experiment.fit.batch_size // len(self.rows))
            gates = self._order("gates", max(steps, 1))[: training.gate_steps]
            self._stage("gates", folder, gates, {"": training.gate_lr}, told)
        after = {p: t for p, t in frozen_tensors(self.model).items() if ".a." not in p and ".b." not in p}
        if digest_of(after) != frozen:
            raise CheckpointError("the public model changed during training; this is a fault of the package consilium")

    def _order(self, stage: str, epochs: int) -> list[list[int]]:
        """Return the row indices of every batch of a stage."""
        generator = torch.Generator().manual_seed(derive_seed(self.experiment.seed, "order", stage))
        return list(shuffled(len(self.rows), epochs, self.experiment.fit.batch_size, generator))

    def _stage(
        self,
        stage: str,
        folder: Path,
        batches: list[list[int]],
        rates: dict[str, float],
        told: Callable[[str], None],
    ) -> None:
        masters, steps_done = self._resume(folder, stage)
        if not steps_done:
            initial_loss = self._loss()
            self.best = (initial_loss, {path: p.detach().cpu().clone() for path, p in self.trainable.items()})
            if stage == "parts":
                self.before = initial_loss
        size = self.training.save_every
        for start in range(steps_done, len(batches), size):
            stretch = batches[start : start + size]
            loss, masters = self._stretch(stage, start, stretch, rates, masters)
            validation = self._loss()
            steps_done = start + len(stretch)
            self.history.append({"stage": stage, "step": steps_done, "train": loss, "validation": validation})
            if self.training.private.noise or validation < self.best[0]:
                self.best = (validation, {path: p.detach().cpu().clone() for path, p in self.trainable.items()})
            self._save(folder, stage, steps_done, masters)
            told(f"{stage}: step {steps_done} of {len(batches)}, loss {loss:.3f}, validation {validation:.3f}")
        self._write(self.best[1])

    def _stretch(
        self, stage: str, start: int, batches: list[list[int]], rates: dict[str, float], masters: dict[str, Tensor]
    ) -> tuple[float, dict[str, Tensor]]:
        """Train on these batches; return the mean loss, and the float32 values of a model below 32 bits."""
        seed = derive_seed(self.experiment.seed, stage, start)
        context = replace(self.context, seed=seed)
        if self.training.private.noise:
            return fit_private(
                self.model, self.rows, len(batches), rates[""], self.setup, context, self.training.private
            ), {}
        order = [row for batch in batches for row in batch]
        rows = replace(
            self.rows, sources=[self.rows.sources[i] for i in order], targets=[self.rows.targets[i] for i in order]
        )
        config = replace(self.experiment.fit, epochs=1, balance=0.0, clip=self.experiment.fit.clip)
        result = fit(self.model, rows, config, context, rates=rates, start=dict(masters))
        self.model.eval()
        return result.loss, result.masters

    def _loss(self) -> float:
        """Return the mean loss on the validation data, in nats per predicted token."""
        return mean_loss(self.setup, self.model, self.validation, self.context, len(self.validation))

    def _add_gates(self) -> None:
        """Freeze adapters and give each a gate vector: c = sigmoid(<v, x>)."""
        for module in self.adapted.values():
            module.requires_grad_(False)
            module.gate = nn.Parameter(torch.zeros_like(module.a[0][0]))
            module.weigh = lambda x_NX, v_X=module.gate: torch.sigmoid(x_NX @ v_X)[:, None]

    # --- what is kept -----------------------------------------------------------------------------------------------

    @property
    def _identity(self) -> str:
        """Return a digest of everything that a saved state depends on."""
        settings = {"experiment": to_json(self.experiment), "training": asdict(self.training), "site": self.site}
        rows = hashlib.sha256(json.dumps([self.rows.sources, self.rows.targets]).encode()).hexdigest()
        return hashlib.sha256(json.dumps([settings, rows, self.base.digest]).encode()).hexdigest()

    def _save(self, folder: Path, stage: str, done: int, masters: dict[str, Tensor]) -> None:
        tensors = {f"now/{path}": p.detach().cpu() for path, p in self.trainable.items()}
        tensors |= {f"best/{path}": t for path, t in self.best[1].items()}
        tensors |= {f"masters/{path}": t.detach().cpu() for path, t in masters.items()}
        if stage == "gates":
            tensors |= {f"parts/{path}": t for path, t in self._parts().items()}
        state = {
            "identity": self._identity, "stage": stage, "done": done, "best": self.best[0], "before": self.before,
            "history": self.history,
        }  # fmt: skip
        blob = save({name: t.contiguous() for name, t in tensors.items()}, {"consilium": json.dumps(state)})
        write_atomic(folder / STATE, blob)

    def _parts(self) -> dict[str, Tensor]:
        return {
            f"{path}.{kind}": getattr(m, kind)[0].detach().cpu() for path, m in self.adapted.items() for kind in "ab"
        }

    def _resume(self, folder: Path, stage: str) -> tuple[dict[str, Tensor], int]:
        """Restore the model and return the float32 values and the steps done of a stage; ({}, 0) to start over."""
        path = folder / STATE
        if not path.exists():
            return {}, 0
        try:
            blob = path.read_bytes()
            tensors = load(blob)
            header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
            state = json.loads(header["__metadata__"]["consilium"])
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read ({type(error).__name__}); remove it to begin anew") from error
        if state["identity"] != self._identity:
            raise CheckpointError(f"{path} is of another training (settings or data differ); name another --state")
        self.history, self.before = state["history"], state["before"]
        group = {kind: _below(tensors, kind) for kind in ("now", "best", "masters", "parts")}
        if state["stage"] == stage:
            self._write(group["now"])
            self.best = (state["best"], group["best"])
            return group["masters"], state["done"]
        if stage == "parts":  # this stage is over: the second stage has begun
            for path_kind, tensor in group["parts"].items():
                module, _, kind = path_kind.rpartition(".")
                getattr(self.adapted[module], kind)[0].data.copy_(tensor)
            self.best = (state["best"], {p: t.detach().cpu().clone() for p, t in self.trainable.items()})
            return {}, 10**12
        return {}, 0

    def _write(self, tensors: Mapping[str, Tensor]) -> None:
        trainable = self.trainable
        for path, tensor in tensors.items():
            trainable[path].data.copy_(tensor)

    # --- the result -------------------------------------------------------------------------------------------------

    def package(self, card: Mapping[str, Any]) -> Package:
        """Return the unsigned package of what was trained."""
        training, kind = self.training, "expert" if self.training.kind == "expert" else "adapter"
        router = {"adapter": "none", "gated": "vector", "expert": "row+bias" if training.bias else "row"}
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in self._tensors().items()}
        if training.moments:
            public_model = self.base.open_model() if kind == "expert" else self.base.model()
            module_paths = list(self.opened.routers) or list(self.adapted)
            tensors |= {f"{p}.moment": t for p, t in measure(public_model, module_paths, self._batches()).items()}
        scale = 1.0 if kind == "expert" else float(training.alpha or training.rank) / training.rank
        private = training.private
        scores = (
            {}
            if private.noise
            else {"validation": {"public": self.before, "own": self.best[0], "unit": "nats per token"}}
        )
        steps = max((record["step"] for record in self.history if record["stage"] == "parts"), default=0)
        if private.noise:
            card = {**card, "privacy": private.told(len(self.rows), self.experiment.fit.batch_size, steps)}
        settings = {
            **asdict(training),
            "fit": asdict(self.experiment.fit),
            "kind_of_text": self.kind_of_text,
            "steps": steps,
        }
        source = self.base.source
        return Package(
            self.site, kind, router[training.kind], source.fingerprint, self.base.digest, len(self.data.train), scale,
            json.loads(json.dumps(settings)), {**card, **scores}, tensors,
        )  # fmt: skip

    @property
    def kind_of_text(self) -> str:
        """Return the kind of text that the model writes, as `consilium predict` needs it."""
        if self.data.task.form != "language":
            return "text-to-text"
        return "conversation" if any(self.data.train.texts) else "document"

    def _tensors(self) -> dict[str, Tensor]:
        tensors_by_name: dict[str, Tensor] = {}
        for path, module in self.adapted.items():
            tensors_by_name |= {f"{path}.lora_A": module.a[0], f"{path}.lora_B": module.b[0]}
            if hasattr(module, "gate"):
                tensors_by_name[f"{path}.gate"] = module.gate
        for block, router in self.opened.routers.items():
            for i, tensors in enumerate(self.opened.experts[block].guests):
                tensors_by_name |= {f"{block}.guest.{i}.{name}": t for name, t in tensors.items()}
                tensors_by_name[f"{block}.guest.{i}.row"] = router.rows[i]
                if self.training.bias:
                    tensors_by_name[f"{block}.guest.{i}.bias"] = router.biases[i].clamp(max=0).reshape(1)
        return tensors_by_name

    def pairs(self) -> dict[str, Pair]:
        """Return module -> adapter with its current values."""
        return {p: Pair(m.a[0].detach(), m.b[0].detach(), m.scales[0]) for p, m in self.adapted.items()}


def _below(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{kind}/"): t for name, t in tensors.items() if name.startswith(f"{kind}/")}
