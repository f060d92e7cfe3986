"""Limits on what a server may ask of a site, whatever the method: the site's own policy, kept next to its data.

The server names the algorithm and the training in every message. The cost of a setting is declared where the setting is
defined (`consilium.work`). A site compares the costs with its limits before it begins, and counts steps, tokens,
seconds and bytes where they are spent (`Limits.work`). A server that asks for more gets an error with the limit and its
request.
"""

import dataclasses
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from consilium.constraints import PositiveFloat, PositiveInt, check_settings, forbid
from consilium.core import Sampling, Scalar
from consilium.errors import ConfigError, PayloadError
from consilium.experiment import DATA, Experiment
from consilium.machine import memory_bytes
from consilium.models.cohort import Cohort
from consilium.moe.budget import bytes_of, human
from consilium.moe.build import ModelSource
from consilium.moe.merging import Merging
from consilium.privacy import Privacy
from consilium.work import COMPARED, Work

__all__ = ["ELSEWHERE", "Limits", "costs_of", "prune_runs"]

ELSEWHERE = {
    **dict.fromkeys((ModelSource, Cohort, *DATA.values()), "a site has its own, or the same as the server's"),
    Sampling: "the server alone chooses who takes part",
    Merging: "the server alone merges",
    Privacy: "the server alone adds noise to weights; what a site tells costs it no work",
}
"""Settings that a server sends and that cost a site nothing: class -> reason."""
TEXTS, LABELS = 16_000_000, 100_000
"""Largest size in bytes of an experiment and its labels as JSON, and largest number of labels in it: a model has a row
for each label."""
FOLDERS = 100
"""Largest number of former runs that a site keeps the state of; a folder takes space that its files do not show."""


@dataclass(frozen=True)
class Limits:
    """The most that a server may ask of a site.

    Args:
        lr: learning rate of every part of a model, > 0.
        epochs: passes over the site's data in a round, >= 1.
        steps: updates of a model in a round, >= 1.
        batch_size: examples in one update, >= 1.
        tokens: tokens that a model reads and writes in a round, in training, scoring and generation; for images and
            tables, rows.
        seconds: wall-clock seconds of a round's training, or of its scoring, > 0.
        rounds: rounds of a run, >= 1.
        bytes: size of one message in each direction, all its groups together and decompressed, e.g. "500MB"; the
            server's `wire.cap` applies as well.
        memory: memory that a model may take during training, by the memory model; "": the memory of the device as
            stated by the site, or else all memory of the device.
        state: size of the states of former runs that are kept.
        days: days after which the state of a former run is removed.
    """

    lr: PositiveFloat = 10.0
    epochs: PositiveInt = 100
    steps: PositiveInt = 1_000_000
    batch_size: PositiveInt = 4096
    tokens: PositiveInt = 1_000_000_000
    seconds: PositiveFloat = 86_400.0
    rounds: PositiveInt = 100_000
    bytes: str = "4GB"
    memory: str = ""
    state: str = "10GB"
    days: PositiveInt = 30

    def __post_init__(self) -> None:
        check_settings(self, "--max-")
        for name in ("bytes", "memory", "state"):
            value = getattr(self, name)
            is_unset = name == "memory" and not value
            forbid(not is_unset and bytes_of(value) < 1, f"--max-{name} is {value!r}; it must be a size, e.g. 500MB")

    def check(self, experiment: Experiment, examples: int) -> None:
        """Compare the costs that a server's experiment declares with the limits.

        Args:
            examples: number of the site's training examples.

        Raises:
            ConfigError: naming the request and the limit.
        """
        requests = [(name, cost, value) for name, cost, value in costs_of(experiment) if cost in COMPARED]
        fit = experiment.fit
        if fit.rows in ("examples", "documents"):  # reported before the first round; `training.fit` counts anyway
            requests.append(("steps of a round", "steps", fit.epochs * math.ceil(examples / fit.batch_size)))
        for name, cost, value in requests:
            if value is not None and not value <= getattr(self, cost):
                raise ConfigError(
                    f"the server asks for {name} {value:g}, this site allows {getattr(self, cost):g} "
                    f"(--max-{cost.replace('_', '-')})"
                )

    def work(self, deadline: float, own: int | None, device: torch.device) -> Work:
        """Return a new budget for one message.

        Args:
            deadline: seconds after which the server does not wait any more.
            own: bytes that the site's device can hold, as stated by the site; None: not stated.
            device: device that the site trains on.
        """
        memory_limit = bytes_of(self.memory) if self.memory else own or memory_bytes(str(device))
        return Work(self.steps, self.tokens, self.seconds, memory_limit, deadline)

    def check_round(self, number: int) -> None:
        """Raise ConfigError for a round beyond the allowed number of rounds, whatever the server's experiment says."""
        if number > self.rounds:
            raise ConfigError(f"the server asks for round {number}, this site allows {self.rounds} (--max-rounds)")

    def cap(self, cap: str) -> str:
        """Return the smaller of the server's cap of a payload and the site's."""
        return min(cap, self.bytes, key=bytes_of)

    def check_bytes(self, size: int) -> None:
        """Raise PayloadError for a message of more bytes than the site takes."""
        if size > bytes_of(self.bytes):
            raise PayloadError(f"the server sent {human(size)}, this site takes {self.bytes} (--max-bytes)")


def costs_of(settings: Any, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield (dotted name, cost, value) of every setting of an experiment that a site follows.

    Raises:
        ConfigError: for a field that does not declare its cost, e.g. of a method that was added without one.
    """
    for field in dataclasses.fields(settings):
        value, name = getattr(settings, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            if type(value) not in ELSEWHERE:
                yield from costs_of(value, f"{name}.")
        elif "cost" in field.metadata:
            yield name, field.metadata["cost"], value
        else:
            raise ConfigError(f"{name} does not say what it costs a site; declare it with consilium.work.setting")


def size_of(scalars: Mapping[str, Scalar]) -> int:
    """Return the approximate size in bytes of names and values in a message."""
    values = (item for value in scalars.values() for item in (value if isinstance(value, list) else [value]))
    return sum(map(len, scalars)) + sum(len(item) if isinstance(item, str) else 8 for item in values)


def check_texts(experiment: str, heads: str) -> None:
    """Raise PayloadError for settings and labels, as JSON, that are too long; whether they are valid is not checked."""
    if (size := len(experiment) + len(heads)) > TEXTS:
        raise PayloadError(f"the server's settings and labels are {human(size)}; at most {human(TEXTS)} are allowed")
    if (labels := heads.count('"') // 2) > LABELS:
        raise PayloadError(f"the server names {labels:,} labels; at most {LABELS:,} are allowed")


def prune_runs(folder: Path, current: str, days: float, most: int) -> None:
    """Remove the states of former runs from a site's folder: those too old, then the oldest until the rest is small.

    Args:
        folder: folder of the site.
        current: name of the folder of the run in progress; it is always kept, and its size does not count.
        days: allowed days since anything in a run's folder was last written.
        most: bytes that all former runs may take together.
    """
    former_runs = []
    for path in folder.iterdir():
        if path.name != current and is_run(path.name) and path.is_dir() and not path.is_symlink():
            stats = [file.lstat() for file in (path, *path.rglob("*"))]
            former_runs.append((max(stat.st_mtime for stat in stats), sum(stat.st_size for stat in stats), path))
    kept_bytes, oldest_time = 0, time.time() - 86_400 * days
    for index, (last_write, size, path) in enumerate(sorted(former_runs, reverse=True)):
        kept_bytes += size
        if last_write < oldest_time or kept_bytes > most or index >= FOLDERS:
            shutil.rmtree(path, ignore_errors=True)


def is_run(name: str) -> bool:
    """Return whether a name can be that of a run's folder: up to 64 letters and digits, and not Flower's own."""
    return name.isascii() and name.isalnum() and len(name) <= 64 and name != "flower"
