"""Changes of an experiment by name: single settings ("fit.lr=1e-3"), sweeps of one, and files with several."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from consilium.errors import ConfigError
from consilium.experiment import Experiment, from_json, to_json

__all__ = ["changed", "merged", "read_settings", "read_sweep", "read_variant", "suffix_of", "sweeps"]


def changed(experiment: Experiment, settings: Mapping[str, str]) -> Experiment:
    """Return the experiment with some settings changed.

    Args:
        settings: dotted name, as in the command's flags ("fit.lr", "algorithm.beta") -> value as text.

    Raises:
        ConfigError: for a name that does not exist, or a value that is not allowed there.
    """
    tree: dict[str, Any] = {}
    for name, text in settings.items():
        *groups, field = name.replace("-", "_").split(".")
        branch = tree
        for group in groups:
            branch = branch.setdefault(group, {})
        branch[field] = _value(text)
    return merged(experiment, tree)


def merged(experiment: Experiment, part: Mapping[str, Any]) -> Experiment:
    """Return the experiment with a partial description merged into it.

    Args:
        part: nested like a saved experiment; everything that it leaves out stays. A group with another "type" (another
            method, another data source) replaces the whole group.

    Raises:
        ConfigError: for a name that does not exist, or a value that is not allowed there.
    """
    return from_json(_merge(to_json(experiment), part, ""))


def _merge(saved: Mapping[str, Any], part: Any, where: str) -> dict[str, Any]:
    if not isinstance(part, Mapping):
        raise ConfigError(f"{where or 'the file'} is {part!r}; it must hold settings by name")
    if part.get("type", saved.get("type")) != saved.get("type"):
        return dict(part)
    merged_settings = dict(saved)
    for key, value in part.items():
        inner = saved.get(key)
        name = f"{where}.{key}" if where else str(key)
        merged_settings[key] = _merge(inner, value, name) if isinstance(inner, Mapping) else value
    return merged_settings


def read_settings(path: Path) -> dict[str, Any]:
    """Read a partial description of an experiment from a YAML or JSON file.

    Raises:
        ConfigError: if the file cannot be read.
    """
    import yaml

    try:
        settings = yaml.safe_load(path.read_text())  # JSON is YAML
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML or JSON: {type(error).__name__}") from error
    if not isinstance(settings, dict):
        kind = type(settings).__name__
        raise ConfigError(f"{path} holds a {kind}; it must hold settings by name, e.g. fit: {{lr: 0.001}}")
    return settings


def read_variant(text: str) -> tuple[str, dict[str, str]]:
    """Read a method with options, "HFedMoE:beta=0:select=random".

    Returns:
        The method's name, and option -> value.

    Raises:
        ConfigError: for an option without "=".
    """
    name, *options = text.split(":")
    option_values = {}
    for option in options:
        field, equals, value = option.partition("=")
        if not (field and equals):
            raise ConfigError(f"{text!r} is no method with options; write NAME:option=value, e.g. HFedMoE:beta=0")
        option_values[field] = value
    return name, option_values


def read_sweep(text: str) -> tuple[str, list[str]]:
    """Read a sweep, "fit.lr=1e-4,1e-3".

    Raises:
        ConfigError: if it names no setting, no value, or a value twice.
    """
    name, _, values = text.partition("=")
    value_list = [value.strip() for value in values.split(",") if value.strip()]
    if not name or not value_list:
        raise ConfigError(f"--sweep is {text!r}; write a setting and its values, e.g. fit.lr=1e-4,1e-3")
    if len(set(value_list)) < len(value_list):
        raise ConfigError(f"--sweep names a value twice: {text}")
    return name, value_list


def suffix_of(settings: Mapping[str, str]) -> str:
    """Return the suffix of a run's name for its settings, e.g. "-lr0.001"; "" without any."""
    return "".join(
        "-" + re.sub(r"[^A-Za-z0-9._-]+", "_", f"{name.rpartition('.')[2]}{value}") for name, value in settings.items()
    )


def _value(text: str) -> Any:
    """Parse a text as a number, truth value, list or null; return the text itself if it is none of these."""
    if text in ("True", "False", "None"):
        return {"True": True, "False": False, "None": None}[text]
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return float(text)  # 1e-4 is JSON, but .5 is not
    except ValueError:
        return text


def sweeps(texts: Sequence[str]) -> list[dict[str, str]]:
    """Return every combination of the values of several sweeps, as settings; [{}] without any."""
    combinations: list[dict[str, str]] = [{}]
    for text in texts:
        name, values = read_sweep(text)
        combinations = [{**combination, name: value} for combination in combinations for value in values]
    return combinations
