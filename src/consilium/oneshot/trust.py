"""Checks of packages for poisoning and for memorised text.

`check` looks for traces of a careless or hostile site: a part that makes the public model worse on public rows, or
weights of another size than the others'. It finds clumsy attacks, but not a backdoor that is silent on the given rows.

`extraction` continues rows of the training data greedily and counts how much is reproduced (Carlini et al. 2021).
`exposure` ranks canaries, random texts that were put into the training data, among random texts that were not (Carlini
et al. 2019). It is log2 of the number of references over the rank, about 1 if nothing was memorised.
"""

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from consilium.data.encode import Encoded, pad
from consilium.data.task import ClientData, Split
from consilium.moe.model import TaskModel
from consilium.oneshot.adapters import deltas
from consilium.oneshot.base import Base
from consilium.oneshot.evaluate import Domains, alone
from consilium.oneshot.package import Package

__all__ = ["Finding", "canaries", "check", "exposure", "extraction", "norm_of", "with_canaries"]

WORSE, FAR = 1.1, 4.0
"""Limits beyond which a package is flagged.

The first is its score on public rows as a multiple of the public model's score. The second is the factor by which its
norm may be above or below the median of all.
"""


@dataclass(frozen=True)
class Finding:
    """The findings about one package.

    Args:
        norm: norm of its part, see `norm_of`.
        scores: domain -> score on public rows; {}: not scored.
        reasons: why it is flagged; (): it is not.
    """

    site: str
    norm: float
    scores: dict[str, float]
    reasons: tuple[str, ...]


def norm_of(package: Package) -> float:
    """Return the root mean square of what a package adds: of s B A, or of an expert's weights."""
    if package.kind == "adapter":
        squares = [float(delta.square().mean()) for delta in deltas(list(package.pairs().values()))]
    else:
        squares = [
            float(t.float().square().mean())
            for guests in package.guests().values()
            for guest in guests
            for t in (*guest.tensors.values(), guest.row_D)
        ]
    return math.sqrt(statistics.mean(squares))


def check(base: Base, packages: Mapping[str, Package], public: Domains | None = None) -> list[Finding]:
    """Compare packages with the public model and with each other.

    Args:
        public: public rows; None: only norms are compared.
    """
    norms = {site: norm_of(package) for site, package in packages.items()}
    public_scores = public.scores(base.model()) if public else {}
    findings = []
    for site, package in packages.items():
        similar_norms = [norm for name, norm in norms.items() if packages[name].kind == package.kind]
        reasons, median_norm = [], max(statistics.median(similar_norms), 1e-12)
        if len(similar_norms) >= 3 and not 1 / FAR <= norms[site] / median_norm <= FAR:
            reasons.append(f"its numbers are {norms[site] / median_norm:.2g} times as large as is usual here")
        scores = public.scores(alone(base, package)) if public else {}
        reasons += [
            f"on public rows of {name} it scores {scores[name]:.3f}, the public model {public_scores[name]:.3f}"
            for name in scores
            if not scores[name] <= WORSE * public_scores[name]
        ]
        findings.append(Finding(site, norms[site], scores, tuple(reasons)))
    return findings


# --- memorised text ---------------------------------------------------------------------------------------------------


@torch.inference_mode()
def extraction(
    model: TaskModel, rows: Encoded, prefix: int = 32, length: int = 32, most: int = 100, batch_size: int = 16
) -> dict[str, Any]:
    """Continue the beginning of rows greedily, and compare with the true continuation.

    Args:
        prefix: tokens of the prompt.
        length: tokens that must be reproduced.
        most: maximum number of rows to test.

    Returns:
        "rows": number of tested rows, all long enough; "reproduced": share of them whose next `length` tokens are all
        reproduced; "longest": most tokens reproduced before the first difference.
    """
    sequences = [s + t for s, t in zip(rows.sources, rows.targets, strict=True)]
    candidates = [ids for ids in sequences if len(ids) >= prefix + length][:most]
    exact_count = longest_match = 0
    model.eval()
    device = next(model.parameters()).device
    for start in range(0, len(candidates), batch_size):
        batch = torch.tensor([ids[:prefix] for ids in candidates[start : start + batch_size]], device=device)
        for _ in range(length):
            logits = model.backbone(input_ids=batch, use_cache=False).logits[:, -1]
            batch = torch.cat([batch, logits.argmax(-1, keepdim=True)], dim=1)
        for ids, output in zip(candidates[start : start + batch_size], batch[:, prefix:].tolist(), strict=True):
            common_length = next(
                (i for i, (a, b) in enumerate(zip(ids[prefix:], output, strict=False)) if a != b), length
            )
            longest_match, exact_count = max(longest_match, common_length), exact_count + (common_length == length)
    return {
        "rows": len(candidates),
        "reproduced": exact_count / len(candidates) if candidates else 0.0,
        "longest": longest_match,
    }


def canaries(number: int, seed: int, words: int = 6) -> list[str]:
    """Return random texts that occur in no data: words of four letters and four digits."""
    rng = random.Random(f"canaries:{seed}")
    letters, digits = "abcdefghijklmnopqrstuvwxyz", "0123456789"
    return [
        " ".join("".join(rng.choices(letters, k=4)) + "".join(rng.choices(digits, k=4)) for _ in range(words))
        for _ in range(number)
    ]


def with_canaries(data: ClientData, texts: Sequence[str], copies: int) -> ClientData:
    """Return the data with canaries as further training examples, each repeated `copies` times."""
    train = data.train
    canary_texts = [text for text in texts for _ in range(copies)]
    prompts = [train.texts[0]] * len(canary_texts)
    rows = [*train.rows, *[f"canary:{i}" for i in range(len(canary_texts))]] if train.rows else []
    return replace(data, train=Split([*train.texts, *prompts], [*train.targets, *canary_texts], rows))


@torch.inference_mode()
def exposure(model: TaskModel, tokenizer: Any, texts: Sequence[str], references: Sequence[str]) -> list[float]:
    """Return the exposure of each canary among the references: log2(references + 1) - log2(rank), in bits."""
    losses = _losses(model, tokenizer, [*texts, *references])
    reference_losses = sorted(losses[len(texts) :])
    return [
        math.log2(len(reference_losses) + 1)
        - math.log2(1 + sum(reference_loss < loss for reference_loss in reference_losses))
        for loss in losses[: len(texts)]
    ]


def _losses(model: TaskModel, tokenizer: Any, texts: Sequence[str], batch_size: int = 16) -> list[float]:
    """Return the mean loss of each text, in nats per token."""
    model.eval()
    device, losses = next(model.parameters()).device, []
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    for start in range(0, len(ids), batch_size):
        part = ids[start : start + batch_size]
        batch: Tensor = pad(part, tokenizer.pad_token_id).to(device)
        mask = pad([[1] * len(row) for row in part], 0).to(device)
        logits = model.backbone(input_ids=batch, attention_mask=mask, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.float().transpose(1, 2), batch[:, 1:], reduction="none") * mask[:, 1:]
        losses += (loss.sum(1) / mask[:, 1:].sum(1).clamp(min=1)).tolist()
    return losses
