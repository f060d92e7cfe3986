"""Loading of a model's tokenizer."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import transformers
from transformers import PreTrainedTokenizerBase

from consilium.errors import ModelError, first_line

__all__ = ["read_tokenizer"]

_TOKENIZER_FILES = tuple(
    ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt"]
)


@lru_cache(maxsize=4)
def read_tokenizer(location: str, revision: str | None = None, gguf: str | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model, with the end and padding tokens that the model's own settings name.

    Args:
        location: a directory or a hub name.
        revision: for hub names, the commit.
        gguf: a GGUF file in the directory that holds it.

    Raises:
        ModelError: if there is no readable tokenizer.
    """
    file_args = {"gguf_file": gguf} if gguf else {"revision": revision}
    folder = Path(location)
    if gguf is None and folder.is_dir() and not any((folder / name).exists() for name in _TOKENIZER_FILES):
        # transformers would make an empty one from the model type, which encodes every text as nothing.
        raise ModelError(f"{location!r} has no tokenizer: none of {', '.join(_TOKENIZER_FILES)} is there")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(location, trust_remote_code=False, **file_args)
    except Exception as error:  # `tokenizers` raises plain ones for a broken file, transformers KeyError and others.
        reason = first_line(error) if isinstance(error, OSError | ValueError) else repr(error)
        raise ModelError(f"{location!r} has no tokenizer that can be read: {reason}") from error
    for role in ("eos", "pad"):
        if getattr(tokenizer, f"{role}_token") is None and (token := _named(tokenizer, location, file_args, role)):
            setattr(tokenizer, f"{role}_token", token)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _named(tokenizer: PreTrainedTokenizerBase, location: str, where: Mapping[str, str | None], role: str) -> str | None:
    """Return the end or padding token that the model's own settings name by id; the first if there are several."""
    for config_class in (transformers.GenerationConfig, transformers.AutoConfig):
        try:
            token_id = getattr(config_class.from_pretrained(location, **where), f"{role}_token_id", None)
        except (OSError, ValueError, TypeError):  # A GGUF file has no generation settings.
            continue
        first_id = token_id[0] if isinstance(token_id, list) and token_id else token_id
        if isinstance(first_id, int) and 0 <= first_id < len(tokenizer):
            return tokenizer.convert_ids_to_tokens(first_id)
    return None
