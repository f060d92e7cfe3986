"""Versions of the packages that can influence the bits of a run."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

__all__ = ["git_revision", "versions"]

PACKAGES = (
    "consilium",
    "torch",
    "transformers",
    "peft",
    "datasets",
    "flwr",
    "flwr-datasets",
    "safetensors",
    "numpy",
)


def versions() -> dict[str, str]:
    """Return package -> version of the packages that a run's bits may depend on, and of Python."""
    return {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def git_revision() -> str | None:
    """Return the revision of the source tree from which the package runs.

    The result is None if the package is installed, even if that is inside another source tree.
    """
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD", f"HEAD:./{Path(__file__).name}"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.split()[0] if result.returncode == 0 else None
