"""One file, one paper: the server half and the client half of a method.

A file put into this folder is a method: nothing else names it.
"""

import importlib
import pkgutil

__all__ = ["register_all"]


def register_all() -> None:
    """Import every module of this folder, which registers its algorithms."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
