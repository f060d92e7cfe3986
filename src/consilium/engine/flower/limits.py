"""What a site does not let a server ask of it, whatever the method: the site's own policy, beside its data.

The server names the algorithm and the training in every message; a site that would have to train longer, with larger
steps, or on larger payloads than it has said answers with the limit and what was asked, and does nothing.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from consilium.errors import ConfigError, PayloadError
from consilium.experiment import Experiment
from consilium.moe.budget import bytes_of, human

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    """The most that a server may ask of a site.

    Args:
        lr: learning rate, of every part of a model, > 0. epochs: passes over the site's data in a round, >= 1.
        steps: batches in a round, >= 1. batch_size: examples in one, >= 1. rounds: of a run, >= 1.
        bytes: of one payload, each way, before compression, e.g. "500MB"; `wire.cap` of the server counts as well.
    """

    lr: float = 10.0
    epochs: int = 100
    steps: int = 1_000_000
    batch_size: int = 4096
    rounds: int = 100_000
    bytes: str = "4GB"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), field.type
            flag = f"--max-{field.name.replace('_', '-')}"
            if kind is str:
                if not isinstance(value, str) or bytes_of(value) < 1:
                    raise ConfigError(f"{flag} is {value!r}; it must be a size, e.g. 500MB")
            elif type(value) not in ((int,) if kind is int else (int, float)) or not 0 < value < math.inf:
                raise ConfigError(f"{flag} is {value!r}; it must be a {'whole ' * (kind is int)}number greater than 0")

    def check(self, experiment: Experiment, examples: int) -> None:
        """Judge a server's experiment for a site with so many training examples.

        Raises:
            ConfigError: naming what is asked for and the limit.
        """
        fit = experiment.fit
        asked: dict[str, tuple[str, Any]] = {
            "fit.lr": ("lr", fit.lr),
            "fit.head_lr": ("lr", fit.head_lr),
            "fit.epochs": ("epochs", fit.epochs),
            "fit.batch_size": ("batch_size", fit.batch_size),
            "rounds": ("rounds", experiment.rounds),
            "steps of a round": ("steps", fit.epochs * math.ceil(examples / fit.batch_size)),
        }
        for field in dataclasses.fields(experiment.algorithm):  # whatever trains at a client, by the names papers use
            value = getattr(experiment.algorithm, field.name)
            if field.name.endswith("epochs") and not field.name.startswith("server"):
                asked[f"algorithm.{field.name}"] = ("epochs", value)
            elif field.name.startswith("eta") and field.name not in ("eta_s", "eta_g") and value is not None:
                asked[f"algorithm.{field.name}"] = ("lr", value)
        for name, (limit, value) in asked.items():
            if not value <= getattr(self, limit):
                raise ConfigError(
                    f"the server asks for {name} {value:g}, this site allows {getattr(self, limit):g} "
                    f"(--max-{limit.replace('_', '-')})"
                )

    def check_round(self, number: int) -> None:
        """Raise ConfigError for a round beyond those that a run may have, whatever its experiment says."""
        if number > self.rounds:
            raise ConfigError(f"the server asks for round {number}, this site allows {self.rounds} (--max-rounds)")

    def cap(self, cap: str) -> str:
        """The smaller of the server's cap of a payload and the site's."""
        return min(cap, self.bytes, key=bytes_of)

    def check_bytes(self, size: int) -> None:
        """Raise PayloadError for a payload of more bytes than the site takes."""
        if size > bytes_of(self.bytes):
            raise PayloadError(f"the server sent {human(size)}, this site takes {self.bytes} (--max-bytes)")
