"""The settings of local training, `Fit`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from annotated_types import Interval
from torch import Tensor
from torch.nn import functional as F

from consilium.constraints import Count, Factor, Fraction, Rate, Share, check_settings, forbid
from consilium.data.causal import Rows
from consilium.moe.gates import Kind
from consilium.moe.lora import Lora
from consilium.work import setting

__all__ = ["Fit"]


@dataclass(frozen=True)
class Fit:
    """The settings of a client's training in one round.

    Args:
        lr: learning rate of the backbone, > 0.
        head_lr: learning rate of classification heads, which start from zero, > 0.
        epochs: passes over the client's training data per round, >= 1.
        batch_size: examples per step, >= 1.
        max_length: source tokens kept per example, >= 1; longer sources are truncated, and counted in the record.
        target_length: target tokens kept (text-to-text, answers), including the end-of-text token, >= 2.
        rows: how causal language models read instruction data (examples, packed) and plain text (documents, blocks,
            packed): rows of max_length + target_length tokens, see `data.causal`. Classification and text-to-text have
            one example per row: examples.
        optimizer: "adamw" or "sgd"; fresh in every round.
        momentum: momentum of sgd, 0 <= momentum < 1; like all optimizer state, it is reset in every round.
        weight_decay: decoupled weight decay with adamw, added to the gradient with sgd.
        clip: largest norm of the gradient, 0: no clipping.
        label_smoothing: label smoothing of the cross-entropy with labels, in all methods, 0..1 (FedMoE, Eq 1).
        balance: weight of the per-layer load-balance loss (alpha in FedMoE's Eq 1).
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        precision: precision in which small models compute, in training and in scoring: "float32", or "bfloat16" by
            torch's autocast; weights and their updates stay float32. A mixture of experts uses `model.dtype` instead.
        gates: how a client that lacks experts weighs those that it holds, in families whose gates are shares of a
            softmax over all experts; other families are not affected, see `moe.gates`. "constant": the softmax over the
            held experts times one number per layer, which keeps the mean total gate; the only kind that plain
            transformers can represent exactly. "full": the softmax over all experts. "mass": the softmax over the held
            experts times the total gate that the full router gives this token. "slice": the softmax over the held
            experts as it is, up to E times too large.
        personal: also score a model of the client's own, next to the delivered one: "best" is the best by its
            validation data among the models that it is sent, the models that it trains from them in each round, and the
            model that it is delivered in the end. This is early stopping per client. For mixtures of experts only.
        lora: train adapters on the experts instead of all parameters. Then only adapters, router rows and head rows
            travel, and every client loads the rest from the model's own place.
    """

    lr: Rate = setting(1e-3, "lr")
    head_lr: Rate = setting(1e-2, "lr")
    epochs: Count = setting(1, "epochs")
    batch_size: Count = setting(16, "batch_size")
    max_length: Count = setting(96, "tokens")
    target_length: Annotated[int, Interval(ge=2, le=1e12)] = setting(16, "tokens")
    rows: Rows = setting("examples", "free")
    optimizer: Literal["adamw", "sgd"] = setting("adamw", "free")
    momentum: Fraction = setting(0.0, "factor")
    weight_decay: Factor = setting(0.0, "factor")
    clip: Annotated[float, Interval(ge=0, le=1e12)] = setting(1.0, "free")
    label_smoothing: Share = setting(0.1, "factor")
    balance: Factor = setting(0.01, "factor")
    gradient_checkpointing: bool = setting(False, "free")
    precision: Literal["float32", "bfloat16"] = setting("float32", "free")
    gates: Kind = setting("constant", "free")
    personal: Literal["none", "best"] = setting("none", "free")
    lora: Lora = field(default_factory=Lora)

    def __post_init__(self) -> None:
        check_settings(self, "fit.")
        forbid(self.momentum and self.optimizer != "sgd", f"fit.momentum is {self.momentum}; with adamw it must be 0")

    def lowered(self, device: torch.device) -> torch.autocast:
        """Return a context in which models compute in `precision`."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def descent(self, trainable: Mapping[str, Tensor], rates: Mapping[str, float]) -> torch.optim.Optimizer:
        """Return a new optimizer of these parameters.

        Args:
            trainable: path -> parameter.
            rates: prefix of a path -> learning rate; the first matching prefix counts.
        """
        members: dict[str, list[Tensor]] = {prefix: [] for prefix in rates}
        for path, p in trainable.items():
            members[next(prefix for prefix in rates if path.startswith(prefix))].append(p)
        groups = [{"params": members[prefix], "lr": lr} for prefix, lr in rates.items() if members[prefix]]
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        return torch.optim.AdamW(groups, lr=self.lr, weight_decay=self.weight_decay, fused=True)

    def cross_entropy(self, logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        """Return the supervised loss of every method: the cross-entropy in float32 with `label_smoothing`."""
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing, reduction=reduction)

    @property
    def plain(self) -> bool:
        """Return True if training only ever changes a weight by its learning rate times its gradient."""
        return self.optimizer == "sgd" and not (self.momentum or self.weight_decay or self.clip)

    @property
    def lengths(self) -> dict[str, int]:
        """Return S and T of the memory model: tokens of a row that are only read, and predicted at most."""
        if self.rows == "examples":
            return {"max_length": self.max_length, "target_length": self.target_length}
        return {"max_length": 0, "target_length": self.max_length + self.target_length}
