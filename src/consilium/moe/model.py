"""A backbone prepared for one task: with a linear head on the pooled hidden state, or for text generation.

Shapes: B examples, S tokens, T target tokens, D model width, C labels, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from consilium.moe.families import Family, blocks

__all__ = ["Batch", "TaskModel", "finish_logits", "text_config", "trunk_of"]

Batch = Mapping[str, Tensor]
"""`input_ids` [B, S] int64; `attention_mask` [B, S] 0/1; `labels`, which are [B] (classification), [B, T] (text-to-text
with an encoder-decoder) or [B, S] (causal), with -100 where there is nothing to predict; `position_ids` [B, S] if
several examples are packed into a row, starting from 0 with each of them (causal, families with `packs`)."""


def text_config(config: Any) -> Any:
    """Return the text part of a configuration, which for most models is the configuration itself."""
    return config if getattr(config, "is_encoder_decoder", False) else config.get_text_config()


def trunk_of(backbone: Any) -> nn.Module:
    """Return the part of a language model that outputs the last hidden state."""
    base = backbone.base_model
    return backbone.model if base is backbone else base


def finish_logits(logits: Tensor, config: Any, fields: tuple[str, ...]) -> Tensor:
    """Apply the final scaling of a model to raw logits.

    Args:
        logits: [.., V], the output embeddings applied to the last hidden state.
        config: the configuration of the text model.
        fields: the fields of the configuration to apply, in this order; fields that are None or missing are skipped.
    """
    for field in fields:
        value = getattr(config, field, None)
        if value is None:
            continue
        if field == "logits_scaling":
            logits = logits / value
        elif field == "unpadded_vocab_size":
            logits = logits[..., :value]
        elif field == "final_logit_softcapping":
            logits = torch.tanh(logits / value) * value
        else:
            logits = logits * value
    return logits


class TaskModel(nn.Module):
    """A transformers model of a known family, set up for one task.

    Classification: logits [B, C] = head(mean over non-pad positions of the last hidden state [B, S, D]).
    Text-to-text: logits [B, T, V] for the labels, from an encoder-decoder or a causal language model.

    Args:
        backbone: an instance of one of `family.classes`.
        family: the family of the backbone.
        task: name of the task.
        labels: label names of the task; () for text-to-text.
        dtype: dtype of the head, and of the parameters that `addressing.flatten` returns.

    Attributes:
        adapters: `lora.Adapters` on the experts, or None.
        gates: `gates.Gates` that were attached to a slice, or None.
        quantised: flat local name of an expert tensor in 4 bits -> the result of `quantise`; the parameter itself is a
            shape on the meta device.
    """

    def __init__(self, backbone: nn.Module, family: Family, task: str, labels: tuple[str, ...], dtype: torch.dtype):
        super().__init__()
        self.backbone = backbone
        self.family = family
        self.task = task
        self.labels = labels
        self.dtype = dtype
        self.config: Any = text_config(backbone.config)
        self.adapters: Any = None
        self.gates: Any = None
        self.quantised: dict[str, tuple[Tensor, Any]] = {}
        self.head = nn.Linear(self.config.hidden_size, len(labels), dtype=dtype) if labels else None

    @property
    def encoder_decoder(self) -> bool:
        """Return True if text-to-text runs through an encoder and a decoder."""
        return self.head is None and bool(self.config.is_encoder_decoder)

    def blocks(self) -> dict[str, nn.Module]:
        """Return block name (path below the backbone) -> sparse block, in the order of the layers."""
        return blocks(self.backbone, self.family)

    def masks(self, batch: Batch) -> dict[str, Tensor]:
        """Return masks of real positions: "encoder" [B, S], and "decoder" [B, T] for encoder-decoders; bool."""
        masks = {"encoder": batch["attention_mask"].bool()}
        if self.encoder_decoder:
            masks["decoder"] = batch["labels"] != -100
        return masks

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return logits [N, C or V] and their targets [N], without positions that have the label -100."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        if self.head is not None:
            hidden = self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
            weights = mask.unsqueeze(-1).to(hidden.dtype)
            mean_hidden = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
            return self.head(mean_hidden), batch["labels"]
        # No `labels` are passed, so the backbone computes no loss of its own. The cache would not be used.
        labels = batch["labels"]
        if self.encoder_decoder:
            decoder_ids = self.backbone.prepare_decoder_input_ids_from_labels(labels)
            output = self.backbone(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids, use_cache=False)
            label_mask = labels != -100
            return output.logits[label_mask], labels[label_mask]
        position_args = {}
        if "position_ids" in batch:  # They only mark the borders of examples if there is no mask.
            mask, position_args = None, {"position_ids": batch["position_ids"]}
        if self.family.whole:
            output = self.backbone(input_ids=ids, attention_mask=mask, use_cache=False, **position_args)
            label_mask = labels[:, 1:] != -100
            return output.logits[:, :-1][label_mask], labels[:, 1:][label_mask]
        output = trunk_of(self.backbone)(input_ids=ids, attention_mask=mask, use_cache=False, **position_args)
        hidden = output.last_hidden_state
        # Long sequences have few predicted positions, so logits are limited to these.
        label_mask = labels[:, 1:] != -100
        logits = self.backbone.get_output_embeddings()(hidden[:, :-1][label_mask])
        return finish_logits(logits, self.config, self.family.finish), labels[:, 1:][label_mask]

    @torch.no_grad()
    def generate(self, batch: Batch, max_new_tokens: int, count: Callable[[int], None] = lambda tokens: None) -> Tensor:
        """Return greedy continuation token ids [B, <= max_new_tokens] (text-to-text only).

        Args:
            batch: a batch; only `input_ids` and `attention_mask` are used.
            max_new_tokens: the largest number of tokens to generate per example.
            count: called with B after each token; an exception that it raises ends the generation.
        """
        from transformers import StoppingCriteriaList  # slow to import

        ids, mask = batch["input_ids"], batch["attention_mask"]

        def stop_none(written: Tensor, scores: Any, **_: Any) -> Tensor:
            """Count the tokens of a step as a stopping criterion that ends no sequence."""
            count(len(written))
            return torch.zeros(len(written), dtype=torch.bool, device=written.device)

        output = self.backbone.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1,
            stopping_criteria=StoppingCriteriaList([stop_none]),
        )  # fmt: skip
        return output[:, 1:] if self.encoder_decoder else output[:, ids.shape[1] :]
