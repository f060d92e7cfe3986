"""Your own text from one file, with its columns named on the command line."""

from dataclasses import replace
from pathlib import Path

from consilium.data.textfile import TextFileData
from consilium.experiment import Experiment
from consilium.recipes import recipe
from consilium.recipes.docstrings import EQUAL_MEMORY, fedmoe_docstrings

__all__ = ["fedmoe_text"]


@recipe("fedmoe-text", rivals=EQUAL_MEMORY)
def fedmoe_text() -> Experiment:
    """FedMoE on your own CSV, JSONL or Parquet file: --data.path FILE --data.text COLUMN --data.target COLUMN."""
    base = fedmoe_docstrings()
    return replace(
        base,
        name="fedmoe-text",
        data=TextFileData(path=Path("examples.csv")),
        fit=replace(base.fit, max_length=128),
        rounds=20,
        memory=(),
    )
