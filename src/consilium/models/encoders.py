"""Extractors from outside this package, by architecture name: a function of your own, or a transformers model.

    mypackage.nets:make_resnet      a function: the shape of one example -> an extractor with attribute `width`, or the
                                    pair (extractor, width); the module must be installed, or on PYTHONPATH
    ./vit-tiny, google/vit-base-patch16-224, distilbert/distilbert-base-uncased
                                    a directory or a hub name, in either case with a slash: an encoder of images or
                                    texts, from safetensors; code that lies next to the weights is not run

A function is imported when its extractor is first built, never when a name is read. Names come from a command line, an
`Experiment` or a config.json that a user runs on their own machine: do not run a config.json that you would not run as
a program. Across sites, no party makes another import anything: a site refuses a server that names an architecture
outside the package's table and the site's own choice, and a server treats the names of a site likewise.

The representation of an image is the encoder's pooled output, and that of a text the mean over its tokens. Where
pooling is a dense layer of the pre-training (ViT, BERT), which most checkpoints lack, that layer is left out, and the
representation of an image is its first token. Images [B, C, H, W] are in [-1, 1], as `TensorSplit` gives pixels. They
are resized (bilinear) and normalised as the checkpoint's preprocessor_config.json says; a single channel is repeated
where the model takes three. Texts are rows of token ids [B, L]. The padding id is masked, and columns of only padding
are cut off.

A checkpoint's weights are the same wherever it is used. For pFedMoE's shared extractor, take a smaller checkpoint than
the clients have; otherwise the two extractors start with the same weights.
"""

import importlib
import json
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from transformers import PreTrainedTokenizerBase

from consilium.errors import ConfigError, ModelError, first_line
from consilium.machine import quietly

__all__ = ["FORMS", "ImageEncoder", "TextEncoder", "extractor", "is_function", "is_model", "one_tokenizer", "resolved"]

FORMS = "a function of your own (mypackage.nets:make) or a transformers model (a directory or hub name with a slash)"
_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_function(name: str) -> bool:
    """Return True if a name has the form module.path:function."""
    return _FUNCTION.fullmatch(name) is not None


def is_model(name: str) -> bool:
    """Return True if a name is that of a transformers model, which contains a slash."""
    return "/" in name


def resolved(name: str) -> str:
    """Return a directory as an absolute path, as a run may be resumed elsewhere, and any other name unchanged."""
    path = Path(name).expanduser()
    return str(path.absolute()) if is_model(name) and (path.is_dir() or name[0] in "./~") else name


def extractor(name: str, shape: tuple[int, ...]) -> nn.Module:
    """Build an extractor [B, *shape] -> [B, d] with attribute `width` = d; on the meta device it has only shapes.

    Args:
        name: an architecture, see the module.
        shape: shape of one example; () for texts.

    Raises:
        ConfigError: if a function cannot be imported, fails, or does not make an extractor of such examples.
        ModelError: if a model cannot be read, or is of another kind than the examples.
    """
    return _own(name, shape) if is_function(name) else _encoder(name, shape)


# --- user-supplied functions ------------------------------------------------------------------------------------------


def _own(name: str, shape: tuple[int, ...]) -> nn.Module:
    make = _imported(name)
    try:
        result = make(shape)
    except Exception as error:
        raise ConfigError(f"{name}({shape}) failed with {type(error).__name__}: {error}") from error
    module, width = (
        result if isinstance(result, tuple) and len(result) == 2 else (result, getattr(result, "width", None))
    )
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"{name} returned a {type(module).__name__}; it must return a torch module, or (module, width)"
        )
    if type(width) is not int or width < 1:
        raise ConfigError(
            f"{name}: width is {width!r}; give the module an attribute `width`, or return (module, width)"
        )
    module.width = width
    _check(name, module, shape)
    return module


def _imported(name: str) -> Callable[[tuple[int, ...]], Any]:
    path, _, function = name.partition(":")
    try:
        module = importlib.import_module(path)
    except Exception as error:
        raise ConfigError(
            f"{path} of {name!r} cannot be imported ({type(error).__name__}: {error}); install it, or name its folder "
            "in PYTHONPATH"
        ) from error
    make = getattr(module, function, None)
    if not callable(make):
        problem = "has no function" if make is None else f"has a {type(make).__name__} and no function"
        raise ConfigError(
            f"{path} {problem} {function!r}; give a function from the shape of one example to a torch module"
        )
    return make


def _check(name: str, module: nn.Module, shape: tuple[int, ...]) -> None:
    """Raise ConfigError unless a module is float32, has no tied or lazy tensors and returns shape [B, width]."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    if lazy_keys := [key for key, t in tensors if is_lazy(t)]:
        raise ConfigError(
            f"{name}: {lazy_keys[0]} is lazy; give the sizes of all layers, the shape of an example is {shape}"
        )
    if wrong_dtypes := [(key, t.dtype) for key, t in tensors if t.is_floating_point() and t.dtype != torch.float32]:
        raise ConfigError(f"{name}: {wrong_dtypes[0][0]} is {wrong_dtypes[0][1]}; it must be torch.float32")
    if len([*module.named_parameters()]) != len([*module.named_parameters(remove_duplicate=False)]):
        raise ConfigError(f"{name}: a parameter has two names; tied parameters would be averaged twice: use one module")
    if any(t.is_meta for _, t in tensors):
        return
    examples = torch.zeros(2, *shape) if shape else torch.ones(2, 4, dtype=torch.int64)
    was_training = module.training
    try:
        with torch.no_grad():
            output = module.eval()(examples)
    except Exception as error:
        raise ConfigError(
            f"{name}: its module cannot take {tuple(examples.shape)}, two examples: {type(error).__name__}: {error}"
        ) from error
    module.train(was_training)
    if not isinstance(output, Tensor) or output.shape != (2, module.width):
        result = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ConfigError(
            f"{name}: two examples give {result}; with width {module.width} it must be (2, {module.width})"
        )


# --- transformers models ----------------------------------------------------------------------------------------------


def _encoder(name: str, shape: tuple[int, ...]) -> nn.Module:
    config = _config(name)
    takes_images, takes_texts = (
        type(config) in mapping
        for mapping in (
            transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
            transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        )
    )
    if not takes_images and (not takes_texts or getattr(config, "is_encoder_decoder", False)):
        raise ModelError(f"model {name!r} is {config.model_type}, which is no encoder of images or texts")
    if len(shape) not in ((3,) if takes_images else (0,)):
        inputs = "images (channels, height, width)" if takes_images else "texts"
        raise ModelError(f"model {name!r} takes {inputs}, the examples are {f'of shape {shape}' if shape else 'texts'}")
    if takes_images:
        return ImageEncoder(_model(name, config), shape, _preprocessing(name, config))
    return TextEncoder(_model(name, config))


@lru_cache(maxsize=64)
def _config(name: str) -> Any:
    return _read(name, lambda: transformers.AutoConfig.from_pretrained(name, trust_remote_code=False))


def _read(name: str, read: Callable[[], Any]) -> Any:
    path = Path(name)
    if path.is_absolute() and not path.is_dir():
        raise ModelError(f"model {name!r} is no directory; name one that is there, or a model on the hub")
    try:
        return read()
    except (OSError, ValueError, KeyError, HfHubHTTPError, SafetensorError, json.JSONDecodeError) as error:
        raise ModelError(f"model {name!r} cannot be read: {first_line(error)}") from error


def _model(name: str, config: Any) -> nn.Module:
    """Load a model in float32, without a dense pooling layer.

    Inside a meta device context, build it from its configuration alone.
    """
    if nn.Linear(1, 1).weight.is_meta:
        from transformers.initialization import no_init_weights

        with no_init_weights():
            model = transformers.AutoModel.from_config(config, dtype=torch.float32)
        model.tie_weights()
        return _without_pooling(model)
    load_options = {"use_safetensors": True, "trust_remote_code": False}
    with quietly():
        model, info = _read(
            name,
            lambda: transformers.AutoModel.from_pretrained(
                name, config=config, dtype=torch.float32, output_loading_info=True, **load_options
            ),
        )
    encoder_keys = {key for key, _ in _without_pooling(model).named_parameters()}
    if missing := sorted(encoder_keys & set(info["missing_keys"])):
        raise ModelError(f"model {name!r} lacks {len(missing)} weights of its encoder, e.g. {missing[0]!r}")
    return model.eval()


def _without_pooling(model: nn.Module) -> nn.Module:
    if isinstance(getattr(getattr(model, "pooler", None), "dense", None), nn.Linear):
        model.pooler = None
    return model


def _width(config: Any) -> int:
    """Return d, the width of the last layer."""
    width = getattr(config, "hidden_size", None)
    return width if isinstance(width, int) else config.hidden_sizes[-1]


@lru_cache(maxsize=64)
def _preprocessing_of(name: str) -> dict[str, Any]:
    try:
        return transformers.image_processing_base.ImageProcessingMixin.get_image_processor_dict(name)[0]
    except (OSError, ValueError):  # Without a preprocessor configuration, images are not changed.
        return {}


def _preprocessing(name: str, config: Any) -> dict[str, Any]:
    """Return "size" (H, W) or None for any, and "mean" and "std" of pixels in [0, 1], one number or one per channel."""
    settings = _preprocessing_of(name)
    size = settings.get("crop_size") if settings.get("do_center_crop") else None
    size = getattr(config, "image_size", None) or size or (settings.get("size") if settings.get("do_resize") else None)
    if isinstance(size, dict):
        size = [size.get(key, size.get("shortest_edge")) for key in ("height", "width")]
    size = [size, size] if isinstance(size, int) else size
    is_normalised = settings.get("do_normalize", True)
    mean, std = (
        settings.get(key, 0.5) if is_normalised else identity
        for key, identity in (("image_mean", 0.0), ("image_std", 1.0))
    )
    return {"size": size and tuple(size), "mean": mean, "std": std}


class ImageEncoder(nn.Module):
    """A transformers image encoder: [B, C, H, W] in [-1, 1] -> [B, d].

    Args:
        model: a model that takes pixel_values in `forward`.
        shape: (C, H, W) of the examples.
        told: result of `_preprocessing`.

    Raises:
        ModelError: if the model does not take this number of channels.
    """

    def __init__(self, model: nn.Module, shape: tuple[int, ...], told: dict[str, Any]):
        super().__init__()
        self.model = model
        self.width = _width(model.config)
        self.size = told["size"]
        self.channels = getattr(model.config, "num_channels", 3)
        if shape[0] not in (1, self.channels):
            raise ModelError(f"images have {shape[0]} channels, {model.config.model_type} takes {self.channels}")
        mean, std = (torch.tensor(told[key], device="cpu").expand(self.channels) for key in ("mean", "std"))
        # x in [-1, 1] is a pixel (x + 1) / 2 in [0, 1]. These are plain numbers because buffers would travel.
        self.scale, self.shift = (0.5 / std).tolist(), ((0.5 - mean) / std).tolist()

    def forward(self, x: Tensor) -> Tensor:
        if self.size is not None and tuple(x.shape[2:]) != self.size:
            x = F.interpolate(x, self.size, mode="bilinear")
        if (self.scale, self.shift) != ([1.0] * self.channels, [0.0] * self.channels):
            scale, shift = (x.new_tensor(numbers).view(-1, 1, 1) for numbers in (self.scale, self.shift))
            x = torch.addcmul(shift, x, scale)
        output = self.model(pixel_values=x.expand(-1, self.channels, -1, -1))
        pooled_output = getattr(output, "pooler_output", None)
        return output.last_hidden_state[:, 0] if pooled_output is None else pooled_output.flatten(1)


class TextEncoder(nn.Module):
    """A transformers text encoder: token ids [B, L] int64 -> [B, d], the mean over the tokens that are not padding.

    Args:
        model: a model that takes input_ids and attention_mask in `forward`.

    Raises:
        ModelError: if the configuration has no padding id, or a text is longer than the model reads.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.width = _width(model.config)
        self.pad = model.config.pad_token_id
        self.limit = getattr(model.config, "max_position_embeddings", None)
        if self.pad is None:
            raise ModelError(f"{model.config.model_type} has no pad_token_id in its configuration; set one")

    def forward(self, ids: Tensor) -> Tensor:
        mask = ids != self.pad
        length = int((mask.any(0) * torch.arange(1, ids.shape[1] + 1, device=ids.device)).amax().clamp(min=1))
        if self.limit is not None and length > self.limit:
            raise ModelError(
                f"a text has {length} tokens, {self.model.config.model_type} reads {self.limit}; lower fit.max_length"
            )
        ids, mask = ids[:, :length], mask[:, :length]
        hidden = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


@lru_cache(maxsize=8)
def one_tokenizer(names: tuple[str, ...]) -> PreTrainedTokenizerBase:
    """Return the common tokenizer of text encoders that read the same rows of ids.

    Raises:
        ConfigError: if they have different tokenizers, no architecture has one, or a tokenizer and its model disagree
            on the vocabulary or the padding id.
    """
    models = [name for name in dict.fromkeys(names) if is_model(name)]
    if not models:
        raise ConfigError(f"no architecture of {', '.join(names)} has a tokenizer; texts need a transformers encoder")
    tokenizers = {
        n: _read(n, lambda n=n: transformers.AutoTokenizer.from_pretrained(n, trust_remote_code=False)) for n in models
    }
    first_name, tokenizer = next(iter(tokenizers.items()))
    for name, candidate in tokenizers.items():
        if candidate.get_vocab() != tokenizer.get_vocab() or candidate.pad_token_id != tokenizer.pad_token_id:
            raise ConfigError(
                f"{first_name} and {name} have different tokenizers; all encoders must read the same token ids"
            )
        if len(candidate) > (vocab_size := _config(name).vocab_size):
            raise ConfigError(
                f"the tokenizer of {name} has {len(candidate)} tokens, its model {vocab_size}; they are no pair"
            )
        if candidate.pad_token_id is None or _config(name).pad_token_id != candidate.pad_token_id:
            ids = f"{candidate.pad_token_id}, its configuration {_config(name).pad_token_id}"
            raise ConfigError(f"the tokenizer of {name} pads with {ids}; they must be the same number")
    return tokenizer
