"""Labels and texts that an exported model predicts."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from consilium.data.causal import encode_language
from consilium.data.encode import Encoded, encode
from consilium.data.task import Split, Task
from consilium.errors import ConfigError, ModelError, first_line
from consilium.export.folder import use_of
from consilium.moe.build import ModelSource
from consilium.moe.files import load_sub_moe
from consilium.moe.model import TaskModel

__all__ = ["Labelled", "Taken"]

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Labelled:
    """An answer of a classifier.

    Args:
        probability: the softmax at the label, in (0, 1].
    """

    task: str
    label: str
    probability: float


@dataclass(frozen=True)
class Taken:
    """An exported model, ready to answer.

    Args:
        kind: see `deployed.Deployed.kind`.
        models: task -> live model; a generating model has one, under "".
        max_length: tokens kept of a text.
        target_length: tokens generated.
    """

    kind: str
    source: ModelSource
    models: dict[str, TaskModel]
    max_length: int
    target_length: int

    @classmethod
    def of(cls, folder: Path) -> "Taken":
        """Load an exported model.

        Raises:
            ConfigError: for a folder that `consilium export` has not made, for adapters without their base, or for a
                small model.
        """
        use = use_of(folder)
        if use["format"] == "adapter":
            raise ConfigError(f"{folder} holds adapters alone; its README.md says how PEFT loads them on their base")
        if use["format"] == "cohort":
            raise ConfigError(f"{folder} holds a small model: use `consilium predict {folder}`")
        if use["format"] == "consilium":
            source, model, _ = load_sub_moe(folder)
            models = {model.task: model}
        else:
            source = ModelSource(str(folder.resolve()), use["form"], use["dtype"])
            models = _with_heads(folder, source, use["tasks"])
        for model in models.values():
            model.eval()
        return cls(use["kind"], source, models, use["max_length"], use["target_length"])

    def labelled(self, texts: Sequence[str], top: int = 1) -> Iterator[list[Labelled]]:
        """Yield, for each text, the `top` most probable labels of every task that the model has."""
        for text in texts:
            yield [answer for task, model in self.models.items() for answer in self._label(task, model, text, top)]

    @torch.inference_mode()
    def _label(self, task: str, model: TaskModel, text: str, top: int) -> list[Labelled]:
        logits, _ = model(self._task_batch(model, text))
        best = logits[0].float().softmax(-1).topk(min(top, len(model.labels)))
        return [
            Labelled(task, model.labels[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    def _task_batch(self, model: TaskModel, text: str) -> dict[str, torch.Tensor]:
        """Return a text as a batch, cut to `max_length` as in training; batches always have labels, so it has some."""
        is_classifier, seq2seq = bool(model.labels), model.encoder_decoder
        kind = "classification" if is_classifier else "seq2seq" if seq2seq else "causal"
        form = "classification" if is_classifier else "text-to-text"
        task = Task(model.task, form, model.labels, "accuracy")
        split = Split([text], [model.labels[0] if is_classifier else ""])
        encoded = encode(split, task, self.source.tokenizer(), kind, self.max_length, self.target_length)
        return encoded.batch([0], CPU, prompt=True)

    def written(self, text: str, tokens: int | None = None) -> str:
        """Return the model's answer to a text, or its continuation of the text; decoding is greedy."""
        if self.kind == "conversation":
            return self.answered([{"role": "user", "content": text}], tokens)
        model = next(iter(self.models.values()))
        if self.kind == "text-to-text":
            return self._generated(self._task_batch(model, text), tokens)
        ids = self.source.tokenizer()(text)["input_ids"][-self.max_length - self.target_length :]
        return self._generated(Encoded([ids], [[]], [""], "causal", 0).batch([0], CPU, prompt=True), tokens)

    def answered(self, conversation: Sequence[dict[str, Any]], tokens: int | None = None) -> str:
        """Return the assistant's next turn; only the end of the conversation that fits `max_length` is kept."""
        split = Split([json.dumps(list(conversation))], [""])
        encoded = encode_language(split, self.source.tokenizer(), "examples", self.max_length, self.target_length)
        return self._generated(encoded.batch([0], CPU, prompt=True), tokens)

    def _generated(self, batch: dict[str, torch.Tensor], tokens: int | None) -> str:
        model = next(iter(self.models.values()))
        ids = model.generate(batch, tokens or self.target_length)
        return self.source.tokenizer().decode(ids[0], skip_special_tokens=True).strip()


def _with_heads(folder: Path, source: ModelSource, tasks: dict[str, list[str]]) -> dict[str, TaskModel]:
    """Return the backbone with each task's head; all of them share the backbone's tensors."""
    params = source.load()
    if not tasks:
        return {"": source.build(params, "", ())}
    try:
        heads = load_file(folder / "head.safetensors")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder / 'head.safetensors'} cannot be read: {first_line(error)}") from error
    models = {}
    for task, labels in tasks.items():
        rows = {
            f"head.{task}.{label}.{leaf}": heads[f"{task}.{leaf}"][row]
            for row, label in enumerate(labels)
            for leaf in ("weight", "bias")
        }
        models[task] = source.build(params | rows, task, tuple(labels))
        models[task].backbone = next(iter(models.values())).backbone
    return models
