"""User code: methods and recipes in a file, or in an installed package.

A package lists its modules under the entry point "consilium". A file is given with --import, or with its class as
`--algorithm my_file.py:MyMethod`. Every process that works on a run imports both, and the code registers what it
defines. A run directory never names code to import.
"""

import hashlib
import importlib.util
import os
import sys
from importlib.metadata import entry_points
from pathlib import Path

from consilium.errors import ConfigError, first_line

__all__ = ["VARIABLE", "add_file", "has_plugins", "import_plugins"]

VARIABLE = "CONSILIUM_IMPORT"
"""Environment variable with the paths of the user's files, separated by the system's path separator."""
GROUP = "consilium"


def add_file(path: Path) -> None:
    """Import a file in this process, and in those that it starts.

    Raises:
        ConfigError: if the file does not exist.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is not a file; name a Python file with a method or a recipe of yours")
    paths = [*_files(), str(path.absolute())]
    os.environ[VARIABLE] = os.pathsep.join(dict.fromkeys(paths))


def has_plugins() -> bool:
    """Return True if there is any user code to import."""
    return bool(_files()) or bool(entry_points(group=GROUP))


def import_plugins() -> None:
    """Import the entry points and the files, each once.

    Raises:
        ConfigError: if one of them cannot be imported; the message names it.
    """
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:
            raise ConfigError(
                f"the package of entry point {entry.value} cannot be imported: {first_line(error)}"
            ) from error
    for path in _files():
        _import(Path(path))


def _files() -> list[str]:
    return [path for path in os.environ.get(VARIABLE, "").split(os.pathsep) if path]


def _import(path: Path) -> None:
    name = f"consilium_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not Python; name a file that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(f"{path} cannot be imported: {type(error).__name__}: {first_line(error)}") from error
