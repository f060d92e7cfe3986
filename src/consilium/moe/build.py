"""Model sources: a directory, a name on the hub, the shipped model, or a GGUF file.

Remote code is never run, and weights are only read from safetensors or GGUF files.
"""

import copy
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from consilium.constraints import check_settings
from consilium.core import ExpertSet, counts_of
from consilium.errors import ConfigError, ModelError, first_line
from consilium.kinds import Gives, Model
from consilium.machine import quietly
from consilium.moe.addressing import all_experts, flatten, load_flat, router_row_of
from consilium.moe.discovery import family_of, fitting_config, has_experts
from consilium.moe.families import Family, Form, experts_per_token
from consilium.moe.formats import gguf_place, plain_config, reading
from consilium.moe.gates import Gates, attach_gates, default_scale, shares_gates
from consilium.moe.intact import check_folder
from consilium.moe.model import TaskModel, text_config
from consilium.moe.partial import held_weights, sliced
from consilium.moe.probe import check_slices
from consilium.moe.structure import TOKENS
from consilium.moe.surgery import checked, slice_experts
from consilium.moe.tokens import read_tokenizer
from consilium.params import Params
from consilium.products import quicken

__all__ = ["ModelSource", "shipped"]

_SHIPPED = Path(__file__).parents[1] / "models"
_UNREAD = re.compile(
    r"(?:^|/)(?:\.|(?:readme|licen[cs]e|notice|copying|changelog|citation)[^/]*$)|\.(?:md|rst|pdf|png|jpe?g|gif|svg|webp)$",
    re.IGNORECASE,
)
"""Files of a model's directory that do not affect it: hidden files, texts for people and pictures.

All other files are part of the fingerprint, whatever their names: templates, merges, special tokens, generation
settings, indices of shards."""


def shipped() -> dict[str, Path]:
    """Return name -> directory of the models that come with the package."""
    return {p.parent.name: p.parent for p in sorted(_SHIPPED.glob("*/config.json"))}


@dataclass(frozen=True)
class ModelSource(Model):
    """A mixture of experts, or a dense causal language model, and its use.

    Args:
        path: a shipped model's name, a local directory (config.json, safetensors, tokenizer), or a hub name.
        form: "classification" (encoder or decoder with a pooled head) or "text-to-text".
        dtype: dtype of the weights in training and in payloads: "float32" or "bfloat16"; the memory estimate for
            bfloat16 holds on a GPU, while a CPU needs about three times as much.
        revision: for hub names, the commit to pin.
        resize: add rows to the embeddings if the tokenizer has more tokens than the model has rows; each new row is
            the mean of the others.
        gguf: a GGUF file with weights, configuration and tokenizer: its name in the directory `path`, or its own path.
    """

    path: str = "docstring-switch"
    form: Form = "classification"
    dtype: Literal["float32", "bfloat16"] = "float32"
    revision: str | None = None
    resize: bool = False
    gguf: str = ""

    def __post_init__(self) -> None:
        check_settings(self, "model.")

    @property
    def world(self) -> str:
        """Return the kind of model that methods must be able to train, see `core.Algorithm.worlds`."""
        return "moe"

    @property
    def dense(self) -> bool:
        """Return True if the model is known to have no experts, without asking a hub."""
        is_local = self.gguf or self.path in shipped() or (Path(self.path).expanduser() / "config.json").is_file()
        try:  # A hub is only asked once the model is read.
            return bool(is_local) and not has_experts(self._stored)
        except ModelError:  # The same error is raised again when the model is read.
            return False

    reads: ClassVar[frozenset[Gives]] = frozenset({"labelled texts", "language"})
    shared: ClassVar[bool] = True

    def ready(self) -> None:
        """Raise ModelError if the model is not there, before any data is read."""
        _ = self.location

    def check_site(self, shape: tuple[int, ...]) -> None:
        """Check that the model can process the output of its tokenizer; the server decides how long texts are."""
        self.check_texts(0)

    def architecture(self, client: int) -> str:
        """Return the name of a client's architecture, which is "" because all clients share one model."""
        return ""

    @cached_property
    def location(self) -> str:
        """Return the local directory, or the hub name unchanged.

        Raises:
            ModelError: if no model is given, if `path` looks like a directory that does not exist, or if the directory
                is incomplete or leads out of itself.
        """
        if self.gguf:
            return gguf_place(self.path, self.gguf)[0]
        if self.path in shipped():
            return str(shipped()[self.path])
        if not self.path:
            raise ModelError(
                "no model is given: name one with --model.path, a directory with a checkpoint or a name on the hub, "
                "e.g. ibm-granite/granite-3.1-1b-a400m-instruct for a CPU or allenai/OLMoE-1B-7B-0924 for a GPU; the "
                "page docs/models.md says which model is for what"
            )
        folder = Path(self.path).expanduser()
        if folder.is_dir():
            if not (folder / "config.json").exists():
                raise ModelError(f"model directory {self.path!r} has no config.json")
            check_folder(folder)
            return str(folder)
        if folder.is_absolute() or self.path.startswith((".", "~")) or self.path.count("/") != 1:
            raise ModelError(
                f"model {self.path!r} is neither a directory, a shipped model ({', '.join(shipped()) or 'none'}) "
                "nor a hub name of the form owner/name"
            )
        return self.path

    @cached_property
    def config(self) -> Any:
        """Return the transformers configuration of the trained model; `resize` raises its vocabulary size if needed."""
        stored_config = self._stored
        if not self.resize or (rows := self._tokens) <= text_config(stored_config).vocab_size:
            return stored_config
        config = copy.deepcopy(stored_config)
        text_config(config).vocab_size = rows
        return config

    @property
    def _where(self) -> dict[str, Any]:
        """Return the arguments of `from_pretrained` that select the file or commit."""
        return {"gguf_file": gguf_place(self.path, self.gguf)[1]} if self.gguf else {"revision": self.revision}

    @cached_property
    def _stored(self) -> Any:
        """Return the configuration of the weights as they are trained, without its quantisation settings."""
        return plain_config(copy.deepcopy(self._found))

    @cached_property
    def _found(self) -> Any:
        """Return the configuration as it is stored with the weights."""
        try:
            config = transformers.AutoConfig.from_pretrained(self.location, trust_remote_code=False, **self._where)
        except (OSError, ValueError) as error:
            raise ModelError(f"model {self.path!r} cannot be read: {first_line(error)}") from error
        class_config = fitting_config(config)
        if class_config is not config and getattr(config, "quantization_config", None):
            class_config.quantization_config = config.quantization_config
        return class_config

    @property
    def quantised(self) -> bool:
        """Return True if the weights are stored in fewer bits than they are trained in."""
        return bool(getattr(self._found, "quantization_config", None))

    @cached_property
    def _tokens(self) -> int:
        """Return the number of token ids of the tokenizer: the largest id plus one."""
        return max(read_tokenizer(self.location, self.revision, self._where.get("gguf_file")).get_vocab().values()) + 1

    @cached_property
    def family(self) -> Family:
        """Return the family, which describes where this model stores experts and how it chooses them."""
        return family_of(self._stored)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the model's tokenizer with the end and padding tokens that training needs.

        Tokens that the tokenizer does not name are taken from the generation settings or the configuration of the
        model.

        Raises:
            ModelError: if there is no tokenizer, or if no end or padding token is named anywhere.
        """
        tokenizer = read_tokenizer(self.location, self.revision, self._where.get("gguf_file"))
        for role in ("pad", *(("eos",) if self.form == "text-to-text" else ())):
            if getattr(tokenizer, f"{role}_token_id") is None:
                raise ModelError(
                    f"model {self.path!r} names no {role}_token in tokenizer_config.json, generation_config.json or "
                    f"config.json; add one to tokenizer_config.json"
                )
        return tokenizer

    def check_texts(self, length: int) -> None:
        """Check that the model can process the output of its tokenizer.

        Args:
            length: the largest number of tokens of a text, including its answer if the model is a decoder.

        Raises:
            ModelError: if the tokenizer is missing, or if the embeddings lack some of its ids.
            ConfigError: if texts are longer than the model has positions.
        """
        self.tokenizer()
        if self._tokens > text_config(self.config).vocab_size:
            raise ModelError(
                f"the tokenizer of {self.path!r} has ids up to {self._tokens - 1}, the model has "
                f"{text_config(self.config).vocab_size} embedding rows (ids from 0): take the tokenizer that the "
                "model was trained with, or give --model.resize to add the rows"
            )
        limit = getattr(text_config(self.config), "max_position_embeddings", None)
        if limit is not None and length > limit:
            raise ConfigError(
                f"texts may have {length} tokens by fit.max_length and fit.target_length; {self.path!r} has {limit} "
                "positions: lower them"
            )

    @cached_property
    def counts(self) -> dict[str, int]:
        """Return the experts per block of the full model, in the order of the layers. Nothing is loaded."""
        return counts_of(all_experts(self.skeleton("", ())))

    def public_usage(self) -> dict[str, list[float]]:
        """Return each expert's share of public tokens by block, from the model's `card.json`; {} if it has none."""
        return self._card.get("usage_public", {})

    def gate_scales(self, held: ExpertSet) -> dict[str, float]:
        """Return the constant c of every layer that lacks experts: block -> c; see `moe.gates`.

        The value is taken from the model's card ("gates_public"), otherwise from `default_scale`. The result is {} for
        a family with gates that do not depend on absent experts.
        """
        if not shares_gates(self.family):
            return {}
        card_scales, top_k = self._card.get("gates_public", {}), experts_per_token(self.config)
        scales = {}
        for block, ids in held.items():
            total = self.counts[block]
            if len(ids) < total:
                block_scales = card_scales.get(block, ())
                is_complete = len(block_scales) == total
                scales[block] = block_scales[len(ids) - 1] if is_complete else default_scale(len(ids), total, top_k)
        return scales

    @cached_property
    def _card(self) -> dict[str, Any]:
        card = Path(self.location) / "card.json"
        return json.loads(card.read_text()) if card.is_file() else {}

    @cached_property
    def fingerprint(self) -> str:
        """Return a text that identifies the model.

        For a directory it is "files:..." with a hash over the names and contents of all files that affect the model
        (see `_UNREAD`). For a name on the hub it is "hub:name@commit".
        """
        folder = Path(self.location)
        if not folder.is_dir():
            return f"hub:{self.location}@{getattr(self.config, '_commit_hash', None) or self.revision}"
        digest = hashlib.sha256()
        names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        for name, path in sorted(names.items()):
            if not _UNREAD.search(name):
                with path.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
                digest.update(name.encode("utf-8", "surrogateescape") + f"\0{content}\0".encode())
        return f"files:{digest.hexdigest()}"

    def round(self, params: Mapping[str, Tensor]) -> Params:
        """Convert flat parameters to the dtype in which the model computes; a correction bias keeps its own."""
        correction_suffix = f".{self.family.correction.rsplit('.', 1)[-1]}" if self.family.correction else None
        correction_keys = {
            key for key in params if correction_suffix and key.endswith(correction_suffix) and router_row_of(key)
        }
        return {key: t if key in correction_keys else t.to(self.torch_dtype) for key, t in params.items()}

    def skeleton(self, task: str, labels: tuple[str, ...]) -> TaskModel:
        """Return the full model on the meta device, with shapes and names but no memory."""
        from accelerate import init_empty_weights
        from transformers.initialization import no_init_weights

        cls = getattr(transformers, self.family.classes[self.form])
        with init_empty_weights(include_buffers=False), no_init_weights():
            backbone = cls._from_config(self.config, dtype=self.torch_dtype)
            model = TaskModel(backbone, self.family, task, labels, self.torch_dtype)
        backbone.tie_weights()  # accelerate gives every module a meta parameter of its own.
        return model

    def build(
        self,
        params: Params,
        task: str,
        labels: tuple[str, ...],
        held: ExpertSet | None = None,
        gates: Gates | None = None,
    ) -> TaskModel:
        """Build a live model from flat parameters; only the held experts (None: all) are ever in memory.

        Args:
            gates: the scaling of a slice's gates; None: no scaling.
        """
        model = self.skeleton(task, labels)
        if held is not None:
            slice_experts(model, held)
        model = quicken(load_flat(model, params, held))
        return model if gates is None else attach_gates(model, gates)

    def load(self, held: ExpertSet | None = None) -> Params:
        """Load the pretrained backbone as flat parameters, without heads.

        Args:
            held: block -> ids of the experts to read. The others are never in memory, except that a GGUF file is read
                as a whole first. None: all.

        Raises:
            ModelError: if there are no safetensors, if the checkpoint lacks weights the form needs, or if the model
                does not behave as its family says.
        """
        cls, subset = getattr(transformers, self.family.classes[self.form]), None
        if held is not None and held != all_experts(full_model := self.skeleton("", ())):
            subset = checked(held, counts_of(all_experts(full_model)), self.family)
        quantisation_args = reading(self._found, self.path)
        if subset is None or self.gguf or quantisation_args:
            backbone = self._read(cls, self.location, **self._where, **quantisation_args)
            if quantisation_args:  # Some weights have another dtype than requested.
                for parameter in backbone.parameters():
                    parameter.data = parameter.data.to(self.torch_dtype)
            self._verify(backbone)
        else:
            state = held_weights(self.location, self.revision, full_model, subset)
            backbone = self._read(sliced(cls, self.family, subset), None, state_dict=state)
        if (rows := text_config(self.config).vocab_size) > text_config(self._stored).vocab_size:
            _add_rows(backbone, rows)
        model = TaskModel(backbone, self.family, "", (), self.torch_dtype)
        if subset is None or not (self.gguf or quantisation_args):
            return flatten(model, held)
        return flatten(slice_experts(model, subset), subset)

    def _read(self, cls: Any, where: str | None, **how: Any) -> Any:
        """Load a model with `from_pretrained` of a class."""
        format_args = {} if self.gguf else {"use_safetensors": True}
        config = copy.deepcopy(self._found if "quantization_config" in how else self._stored)
        try:
            with quietly():
                backbone, loading_info = cls.from_pretrained(
                    where, config=config, dtype=self.torch_dtype, trust_remote_code=False, output_loading_info=True,
                    **format_args, **how,
                )  # fmt: skip
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(f"model {self.path!r} cannot be loaded: {first_line(error)}") from error
        if loading_info["missing_keys"]:
            missing = sorted(loading_info["missing_keys"])
            raise ModelError(
                f"model {self.path!r} has no weights for {self.form}: {len(missing)} are missing, e.g. {missing[0]!r}"
            )
        return backbone

    def _verify(self, backbone: Any) -> None:
        """Check once per process that the model, with its own weights, behaves as its family says."""
        if self.family.dense or (key := (self.location, self.form, self.dtype)) in _VERIFIED:
            return
        ids = torch.tensor(TOKENS) % text_config(self.config).vocab_size
        try:
            check_slices(backbone, self.family, ids)
        except ModelError as error:
            raise ModelError(f"model {self.path!r} cannot be federated: {error}") from error
        _VERIFIED.add(key)


_VERIFIED: set[tuple[str, str, str]] = set()
"""Models that were checked in this process: (place, form, dtype)."""


@torch.no_grad()
def _add_rows(backbone: "transformers.PreTrainedModel", rows: int) -> None:
    """Add rows to the input and output embeddings, each the mean of the existing rows."""
    n_old_rows = backbone.get_input_embeddings().weight.shape[0]
    backbone.resize_token_embeddings(rows, mean_resizing=False)
    for module in {backbone.get_input_embeddings(), backbone.get_output_embeddings()} - {None}:
        for parameter in module.parameters():  # weight [V, D], perhaps bias [V]
            parameter[n_old_rows:] = parameter[:n_old_rows].float().mean(0).to(parameter.dtype)
