"""The privacy account of a run: the budget that its rounds have spent, recorded before each round begins.

    privacy.jsonl     one line for every attempt at a round

A round is charged as soon as it begins, whatever its outcome. Even a round that was undone by a crash or by too few
replies may have sent its model to clients for scoring. Lines are never removed, so a run that was killed and resumed
has spent more than a run that was not, and reports that.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from consilium.engine.checkpoint import append_json
from consilium.errors import CheckpointError, ConfigError
from consilium.experiment import Experiment
from consilium.privacy import epsilon_spent, sampling_rate

__all__ = ["Account"]


@dataclass
class Account:
    """The privacy budget of a run, and how much of it has been spent.

    Args:
        folder: folder of the run; None: the run has not begun.
        experiment: the experiment with the `privacy` settings of the run.
        clients: number of clients N.
    """

    folder: Path | None
    experiment: Experiment
    clients: int
    attempts: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if self.folder and self.path.exists():
            self.attempts = len(self.path.read_bytes().splitlines())  # a torn line is charged as an attempt, too

    @property
    def path(self) -> Path:
        return self.folder / "privacy.jsonl"

    @property
    def charged(self) -> bool:
        """Return whether anything is charged to the budget at all."""
        return self.experiment.privacy.charged

    def spent(self, more: int = 0, weights: bool = True) -> float:
        """Return the epsilon spent after `more` further rounds.

        Args:
            more: rounds to add to the attempts so far.
            weights: False: return the epsilon of the usage alone.
        """
        if not self.charged:
            return 0.0
        usage = "usage" in self.experiment.algorithm.reads()
        cohort = min(self.experiment.sampling.clients_per_round, self.clients)
        return epsilon_spent(self.experiment.privacy, self.clients, cohort, self.attempts + more, usage, weights)

    def affords(self, rounds: int) -> bool:
        """Return whether `rounds` more rounds stay within the budget."""
        return self.spent(rounds) <= self.experiment.privacy.epsilon

    def check(self, committed: int) -> None:
        """Raise an error if the run cannot go on.

        Raises:
            ConfigError: if the budget does not allow a single round.
            CheckpointError: if more rounds are committed than the file records.
        """
        if self.attempts < committed and self.charged:
            raise CheckpointError(
                f"{self.path} tells of {self.attempts} rounds, {committed} are committed: what was spent is not known"
            )
        if not self.attempts and not self.affords(1):
            raise ConfigError(
                f"one round would spend epsilon {self.spent(1):.4g}, privacy.epsilon is "
                f"{self.experiment.privacy.epsilon:g}; raise privacy.noise or the budget"
            )

    def charge(self, round: int) -> None:
        """Record and charge an attempt at a round, before it begins."""
        if self.charged:
            append_json(self.path, {"round": round, "epsilon": self.spent(1)})
            self.attempts += 1

    def told(self) -> dict[str, Any]:
        """Return the privacy entry for records, the summary and the card.

        Returns:
            {} if nothing is charged. Otherwise the entry "privacy" holds epsilon and delta, the parts that they cover,
            and the assumptions that they rest on.
        """
        if not self.charged:
            return {}
        privacy, usage = self.experiment.privacy, "usage" in self.experiment.algorithm.reads()
        noisy_usage = usage and privacy.usage == "noised"
        parts = [name for name, is_on in (("weights", privacy.noise > 0), ("usage", noisy_usage)) if is_on]
        entry: dict[str, Any] = {"epsilon": self.spent(), "delta": privacy.delta_for(self.clients), "covers": parts}
        entry |= {"attempts": self.attempts, "budget": privacy.epsilon}
        if warning := privacy.delta_warning(self.clients):
            entry["warning"] = warning
        if noisy_usage:
            entry["epsilon_usage"] = self.spent(weights=False)
        if privacy.noise:
            rate = sampling_rate(self.experiment.sampling.clients_per_round, self.clients)
            entry |= {"noise": privacy.noise, "clip": privacy.clip, "sampling": privacy.sampling}
            entry |= {"rate": rate if privacy.sampling == "poisson" else 1.0}
            difference = "added or removed" if privacy.sampling == "poisson" else "replaced by no change"
            entry["neighbours"] = f"one client {difference}"
        return {"privacy": entry}
