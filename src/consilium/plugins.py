"""Code of the user's own: methods and recipes in a file, or in an installed package.

A package names its modules under the entry point "consilium"; a file is named by --import, or with its class by
`--algorithm my_file.py:MyMethod`. Both are imported by every process that works on a run: what is defined there
registers itself. A run directory never names code to import.
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
    """Have this process, and those that it starts, import a file.

    Raises:
        ConfigError: if the file does not exist.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is not a file; name a Python file with a method or a recipe of yours")
    paths = [*_files(), str(path.absolute())]
    os.environ[VARIABLE] = os.pathsep.join(dict.fromkeys(paths))


def has_plugins() -> bool:
    """Return whether there is any code of the user's own to import."""
    return bool(_files()) or bool(entry_points(group=GROUP))


def import_plugins() -> None:
    """Import the entry points and the files, each once.

    Raises:
        ConfigError: if one cannot be imported, naming it.
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
