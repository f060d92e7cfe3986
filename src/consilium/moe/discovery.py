"""Discovery of a configuration's mixture-of-experts structure, by building and running a tiny model of it.

The tiny model (`moe.twin`) runs one batch with a hook on every module:

    experts     the module that receives expert indices and holds a tensor [E, ..] per projection
    router      the module that returned these indices
    block       the module that owns both; blocks that no token passed are left unchanged
    rows        tensors with a row per expert below the router, or next to it in the block
    behaviour   the score function, whether gates depend on experts that were not chosen, the fewest experts that a
                router can rank, the final scaling of logits, whether position ids keep packed examples apart

`moe.probe` then slices the tiny model and compares it with a masked copy of itself. A model that does not behave as
found is refused by name.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import transformers
from transformers import PretrainedConfig

from consilium.errors import ModelError, first_line
from consilium.machine import quietly
from consilium.moe.families import NAMES, REFUSED, ROWS, Family, linear_layers
from consilium.moe.structure import Finder
from consilium.moe.twin import EXPERTS, shrink, twin

__all__ = ["Key", "classes_of", "family_of", "fitting_config", "has_experts"]


def classes_of(config: PretrainedConfig) -> dict[str, str]:
    """Return the transformers class for each form of task; {} if there is none for text."""
    from transformers.models.auto import modeling_auto as auto  # slow to import

    class_by_form = {}
    for form, names in (
        ("text-to-text", (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
                          auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)),
        ("classification", (auto.MODEL_MAPPING_NAMES,)),
    ):  # fmt: skip
        name = next((names[config.model_type] for names in names if config.model_type in names), None)
        if isinstance(name, str) and hasattr(transformers, name):
            class_by_form[form] = name
    return class_by_form


def fitting_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration that the text class of a model takes: the given one, or its text part."""
    name = classes_of(config).get("text-to-text")
    config_class = getattr(transformers, name).config_class if name else None
    if config_class is not None and not isinstance(config, config_class):
        return config.get_text_config()
    return config


def has_experts(config: PretrainedConfig) -> bool:
    """Return True if a configuration names routed experts.

    It does with more than one expert. One expert, as in a slice, counts if the default configuration of its model type
    has more than one.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    n_experts = _most_experts(config)
    if n_experts == 1 and config.model_type in CONFIG_MAPPING_NAMES:
        return _most_experts(transformers.AutoConfig.for_model(config.model_type)) > 1
    return n_experts > 1


def _most_experts(config: PretrainedConfig) -> int:
    text_part = config.get_text_config()
    parts = [text_part, *(part for part in vars(text_part).values() if isinstance(part, PretrainedConfig))]
    numbers = [getattr(part, name, None) for part in parts for name in EXPERTS]
    return max((n for n in numbers if isinstance(n, int)), default=0)


def family_of(config: PretrainedConfig | str) -> Family:
    """Return the family of a configuration, which describes where its models store experts and how they choose them.

    Args:
        config: the configuration of a model; or a model type, for its default configuration.

    Raises:
        ModelError: if the model has no experts or its structure is not understood; the message gives the reason.
    """
    if isinstance(config, str):
        try:
            config = transformers.AutoConfig.for_model(config)
        except ValueError as error:
            raise ModelError(
                f"model type {config!r} is not known to transformers {transformers.__version__}"
            ) from error
    model_type = config.model_type
    if model_type in REFUSED:
        raise ModelError(f"model type {model_type!r} cannot be federated: {REFUSED[model_type]}")
    return _discover(Key(config)) if has_experts(config) else _dense(Key(config))


@dataclass(frozen=True)
class Key:
    """A hashable wrapper that compares configurations by their contents."""

    config: PretrainedConfig

    def __hash__(self) -> int:
        return hash(self._text())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and self._text() == other._text()

    def _text(self) -> str:
        names = ("_name_or_path", "dtype", "torch_dtype")
        return repr((type(self.config).__name__, {k: v for k, v in self.config.to_dict().items() if k not in names}))


@lru_cache(maxsize=128)
def _discover(key: Key) -> Family:
    config = key.config
    model_type, row = config.model_type, ROWS.get(config.model_type, {})
    name = row.get("name", NAMES.get(model_type, model_type))
    if "block" in row:
        return Family(model_type=model_type, stated=tuple(row), **row)
    classes = dict(row.get("classes", classes_of(config)))
    if not classes:
        raise ModelError(f"model type {model_type!r} cannot be federated: transformers has no text class for it")
    form = "text-to-text" if "text-to-text" in classes else "classification"
    try:
        with quietly(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = twin(shrink(config), getattr(transformers, classes[form]))
            return Finder(model, config, name, classes, row).family()
    except ModelError as error:
        raise ModelError(f"model type {model_type!r} cannot be federated: {error}") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(
            f"model type {model_type!r} cannot be federated: a tiny model of it does not run ({reason})"
        ) from error


@lru_cache(maxsize=64)
def _dense(key: Key) -> Family:
    """Return the family of a dense causal language model: its linear layers and the final scaling of its logits."""
    config = key.config
    model_type = config.model_type
    refusal = (
        f"model type {model_type!r} is neither a mixture of experts (its configuration names no routed experts) nor "
        "a causal language model"
    )
    from transformers.models.auto import modeling_auto as auto

    if model_type not in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or getattr(config, "is_encoder_decoder", False):
        raise ModelError(refusal)
    classes = classes_of(config)
    family = Family(model_type, model_type, "", "", (), "", "fused", classes)
    try:
        with quietly(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = twin(shrink(config), getattr(transformers, classes["text-to-text"]))
            finder = Finder(model, config, model_type, classes, {})
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(f"model type {model_type!r}: a tiny model of it does not run ({reason})") from error
    if not finder.causal():
        raise ModelError(refusal)
    targets = dict.fromkeys(path.rpartition(".")[2] for path, _ in linear_layers(model))
    if not targets:
        raise ModelError(f"model type {model_type!r} has no linear layers (torch.nn.Linear) that adapters could change")
    return replace(family, lora_targets=tuple(targets), **finder.finish())
