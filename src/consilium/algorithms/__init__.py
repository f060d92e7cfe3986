"""The federated methods, one module per paper, each with the server half and the client half of its method.

A new module in this folder becomes available by itself. No other file has to list it.
"""

import importlib
import pkgutil

__all__ = ["register_all"]


def register_all() -> None:
    """Import every module of this folder, which registers its algorithms."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
