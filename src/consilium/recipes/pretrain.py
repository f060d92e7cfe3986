"""The pretraining of the shipped model, a small Switch encoder, on the public documentation.

    python -m consilium.recipes.pretrain --out DIR

A byte-level BPE tokenizer is trained on the public shard (`DocstringData.public`). A stock
`SwitchTransformersEncoderModel` with every layer sparse is then trained by masked language modelling (tied to the input
embedding), together with classification heads on the mean-pooled hidden state. The heads predict the package, kind,
first verb, and the words of the documented name, and are discarded at the end. Routing is kept even by Switch's loss,
E * sum_e f_e P_e, layer by layer.

The learning rate falls to zero over the planned minutes or steps. A run that stops resumes from its last save.
"""

import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from consilium.data.docstrings import DocstringData
from consilium.data.source import Doc
from consilium.errors import CheckpointError, ConfigError, DataError
from consilium.recipes.pretrain_corpus import HEADS, Batch, Corpus, classes_of
from consilium.recipes.pretrain_model import (
    EOS,
    MASK,
    PAD,
    balance_loss,
    build,
    export,
    train_tokenizer,
    watch_routers,
)

__all__ = ["Pretrain", "Pretraining", "main"]


@dataclass(frozen=True)
class Pretrain:
    """Settings of one pretraining run.

    Training ends at the first of the two limits, minutes and steps. The learning rate reaches zero there.

    Args:
        out: folder for the model, the tokenizer and the state to resume from.
        minutes: most minutes of training; 0: no such limit.
        steps: most steps of training; 0: no such limit.
        vocabulary: tokens, the special ones included.
        width: d_model.
        hidden: d_ff of each expert.
        layers: number of layers.
        heads: attention heads.
        experts: experts per layer.
        length: most tokens per text.
        tokens: tokens per batch, padding included.
        rate: peak learning rate.
        embedding: factor of the learning rate for the embeddings.
        warmup: share of the run in which the learning rate rises.
        masking: largest masked share of a text; each text draws its share between 0 and this.
        balance: coefficient of the load-balance loss.
        decay: weight decay of AdamW.
        dropout: dropout while pretraining; the model is written without, since its masks cost clients a third more
            memory.
        classify: weight of the classification losses against the masked-token loss.
        smoothing: label smoothing of the classification losses.
        bag_epochs: passes over the data that fit embeddings and heads alone, before the network; 0: none.
        threads: CPU threads.
        seed: seed of everything drawn.
        save_minutes: minutes between saves.
        heldout: public documents kept for measuring.
    """

    out: Path
    minutes: float = 60.0
    steps: int = 0
    vocabulary: int = 10000
    width: int = 160
    hidden: int = 288
    layers: int = 4
    heads: int = 5
    experts: int = 16
    length: int = 80
    tokens: int = 2048
    rate: float = 1.5e-3
    embedding: float = 1.0
    warmup: float = 0.03
    masking: float = 0.4
    balance: float = 0.01
    dropout: float = 0.1
    decay: float = 0.05
    classify: float = 1.0
    bag_epochs: int = 6
    smoothing: float = 0.1
    threads: int = 1
    seed: int = 0
    save_minutes: float = 5.0
    heldout: int = 1000

    def __post_init__(self) -> None:
        if self.minutes <= 0 and self.steps <= 0:
            raise ConfigError("both minutes and steps are 0; give at least one of them")
        if self.width % self.heads:
            raise ConfigError(f"width {self.width} is not a multiple of heads {self.heads}")


class Pretraining:
    """The model, heads, optimizer and place in the data, which together are the content of a save."""

    def __init__(self, settings: Pretrain, docs: list[Doc]):
        if len(docs) < 16:
            raise DataError(f"{len(docs)} public documents; pretraining needs at least 16: install more packages")
        self.settings = settings
        torch.manual_seed(settings.seed)
        torch.set_num_threads(settings.threads)
        docs = random.Random(settings.seed).sample(docs, len(docs))
        heldout_count = min(settings.heldout, len(docs) // 5)
        self.tokenizer = train_tokenizer(
            [doc.text for doc in docs[heldout_count:]], settings.vocabulary, settings.length
        )
        classes = classes_of(docs[heldout_count:])
        self.docs = docs
        self.heldout = Corpus(docs[:heldout_count], self.tokenizer, settings.length, classes)
        self.train = Corpus(docs[heldout_count:], self.tokenizer, settings.length, classes)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = build(settings, len(self.tokenizer)).to(self.device)
        sizes = {name: len(labels) for name, labels in classes.items()}
        self.heads = nn.ModuleDict({name: nn.Linear(settings.width, n) for name, n in sizes.items()}).to(self.device)
        self.logits = watch_routers(self.model)
        embedding = self.model.shared.weight
        other_params = [p for p in (*self.model.parameters(), *self.heads.parameters()) if p is not embedding]
        groups = [{"params": [embedding], "factor": settings.embedding}, {"params": other_params, "factor": 1.0}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=settings.rate, betas=(0.9, 0.98), weight_decay=settings.decay, fused=True
        )
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.step, self.seconds, self.seen, self.epoch, self.position = 0, 0.0, 0, 0, 0

    def loss(self, batch: Batch, masking: float) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of one batch and its parts.

        Each text is masked by a random share between 0 and `masking`.
        """
        ids = batch.ids.to(self.device)
        real = ids != PAD
        share = torch.rand(len(ids), 1, generator=self.generator) * masking
        mask = (torch.rand(batch.ids.shape, generator=self.generator) < share).to(self.device)
        mask &= real & (ids != EOS)
        self.logits.clear()
        inputs = torch.where(mask, MASK, ids)
        hidden = self.model(input_ids=inputs, attention_mask=real.long()).last_hidden_state
        parts = {}
        total = torch.zeros((), device=self.device)
        if mask.any():
            scores = hidden[mask] @ self.model.shared.weight.T
            total = parts["mask"] = F.cross_entropy(scores.float(), ids[mask])
        for head, part in self._classify(self._pool(hidden, real), batch).items():
            parts[head] = part
            total = total + self.settings.classify * part
        parts["balance"] = torch.stack([balance_loss(logits, real) for logits in self.logits]).mean()
        total = total + self.settings.balance * parts["balance"] * self.settings.layers
        return total, {name: float(part.detach()) for name, part in parts.items()}

    def warm_start(self) -> None:
        """Fit embeddings and heads as a bag of words first; this takes seconds and saves the network many epochs.

        It pools the mean of the normalised embeddings, as the network does while its layers still add little. Each text
        loses a random share of its tokens, between 0 and (1 + `masking`) / 2, so that no single word decides.
        """
        s, embedding = self.settings, self.model.shared.weight
        optimizer = torch.optim.Adam([embedding, *self.heads.parameters()], lr=3e-3, fused=True)
        count = len(self.train.ids)
        batch, total = min(128, count), s.bag_epochs * (count // min(128, count))
        for step in range(total):
            if step % (count // batch) == 0:
                order = torch.randperm(count, generator=self.generator).tolist()
            start = step % (count // batch) * batch
            part = self.train.take(order[start : start + batch])
            real = part.ids != PAD
            share = torch.rand(batch, 1, generator=self.generator) * (0.5 + s.masking / 2)
            keep_mask = real & (torch.rand(part.ids.shape, generator=self.generator) >= share)
            keep_mask |= real & ~keep_mask.any(1, keepdim=True)
            scale = torch.rsqrt(embedding.pow(2).mean(-1, keepdim=True) + 1e-6)
            pooled = self._pool((embedding * scale)[part.ids.to(self.device)], keep_mask.to(self.device))
            optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / total)
            optimizer.zero_grad()
            torch.stack(list(self._classify(pooled, part).values())).sum().backward()
            optimizer.step()
        with torch.no_grad():  # scale all to about the size of the layers' outputs, so that these can change them
            embedding.mul_(0.1 * torch.rsqrt(embedding.pow(2).mean(-1, keepdim=True) + 1e-6))

    @staticmethod
    def _pool(hidden: Tensor, real: Tensor) -> Tensor:
        return (hidden * real[..., None]).sum(1) / real.sum(1, keepdim=True)

    def _classify(self, pooled: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the loss of the words, and of each head that has a target in the batch."""
        parts = {}
        for head in HEADS:
            targets = batch.targets[head].to(self.device)
            if (targets >= 0).any():
                parts[head] = F.cross_entropy(
                    self.heads[head](pooled).float(), targets, ignore_index=-1, label_smoothing=self.settings.smoothing
                )
        word_targets = batch.words.to(self.device)
        parts["words"] = (
            -0.5 * (word_targets * self.heads["words"](pooled).float().log_softmax(-1)).sum() / len(word_targets)
        )
        return parts

    def progress(self) -> float:
        """Return the share of the plan that is done, in [0, 1]."""
        s = self.settings
        time_share = self.seconds / (60 * s.minutes) if s.minutes > 0 else 0.0
        return min(1.0, max(time_share, self.step / s.steps if s.steps > 0 else 0.0))

    def run(self, log: Callable[[str], None] = print) -> None:
        """Train to the end of the plan, and save on the way."""
        last_save, last_log, means = self.seconds, self.seconds, {}
        start = time.monotonic() - self.seconds  # everything counts: batches, saves and evaluations too
        if self.step == 0 and self.settings.bag_epochs:
            self.warm_start()
            log(f"bag of words: {time.monotonic() - start:.0f} s, held out: {self.evaluate()}")
        self.model.train()
        while self.progress() < 1:
            order = random.Random(f"{self.settings.seed}:{self.epoch}")
            for index, batch in enumerate(self.train.batches(self.settings.tokens, order)):
                if index < self.position:
                    continue
                parts = self._update(batch)
                self.seconds = time.monotonic() - start
                self.step += 1
                self.position += 1
                self.seen += int((batch.ids != PAD).sum())
                means = {k: 0.98 * means.get(k, v) + 0.02 * v for k, v in parts.items()}
                if self.step % 100 == 0 or self.seconds - last_log > 30:
                    last_log = self.seconds
                    log(self._line(means))
                if self.seconds - last_save > 60 * self.settings.save_minutes:
                    last_save = self.seconds
                    self.save()
                    log(f"held out: {self.evaluate()}")
                if self.progress() >= 1:
                    break
            else:
                self.epoch, self.position = self.epoch + 1, 0
        self.save()

    def _update(self, batch: Batch) -> dict[str, float]:
        progress, warm = self.progress(), self.settings.warmup
        factor = progress / warm if progress < warm else 0.5 * (1 + math.cos(math.pi * (progress - warm) / (1 - warm)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate * group["factor"] * max(factor, 1e-4)
        torch.manual_seed(self.settings.seed + 1_000_003 * self.step)  # dropout: a resumed run draws the same
        total, parts = self.loss(batch, self.settings.masking)
        self.optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_([*self.model.parameters(), *self.heads.parameters()], 1.0)
        self.optimizer.step()
        return parts

    def _line(self, means: dict[str, float]) -> str:
        losses = " ".join(f"{name} {value:.3f}" for name, value in means.items())
        rate = self.seen / max(self.seconds, 1e-9)
        position_text = f"step {self.step} epoch {self.epoch} {self.seconds / 60:.1f} min"
        return f"{position_text} {100 * self.progress():.1f}% {losses} ({rate:.0f} tokens/s)"

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the accuracy of the heads on held-out public documents, and the extreme shares of tokens of an expert.

        The shares are those of the least and the most used expert.
        """
        self.model.eval()
        correct_counts, target_counts = Counter(), Counter()
        token_counts = torch.zeros(self.settings.layers, self.settings.experts)
        for batch in self.heldout.batches(self.settings.tokens, random.Random(0)):
            ids = batch.ids.to(self.device)
            real = ids != PAD
            self.logits.clear()
            hidden = self.model(input_ids=ids, attention_mask=real.long()).last_hidden_state
            pooled = self._pool(hidden, real)
            for head in HEADS:
                targets = batch.targets[head].to(self.device)
                guess = self.heads[head](pooled).argmax(-1)
                correct_counts[head] += int(((guess == targets) & (targets >= 0)).sum())
                target_counts[head] += int((targets >= 0).sum())
            for layer, logits in enumerate(self.logits):
                token_counts[layer] += logits[real].argmax(-1).bincount(minlength=self.settings.experts).cpu()
        self.model.train()
        shares = token_counts / token_counts.sum(1, keepdim=True)
        scores = {head: round(correct_counts[head] / max(target_counts[head], 1), 4) for head in HEADS}
        return {**scores, "least_used": round(float(shares.min()), 4), "most_used": round(float(shares.max()), 4)}

    def save(self) -> None:
        """Write the model (bf16) and tokenizer for `from_pretrained`, and the state to resume from."""
        folder = self.settings.out
        folder.mkdir(parents=True, exist_ok=True)
        export(self.model, self.tokenizer, folder)
        tensors = {f"model.{k}": v for k, v in self.model.named_parameters()}
        tensors |= {f"heads.{k}": v for k, v in self.heads.named_parameters()}
        names = list(tensors)
        for name, parameter in zip(names, list(tensors.values()), strict=True):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = value
        tensors["generator"] = self.generator.get_state()
        copies = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
        place = {k: getattr(self, k) for k in ("step", "seconds", "seen", "epoch", "position")}
        save_file(copies, folder / "state.tmp", metadata={"place": json.dumps(place)})
        (folder / "state.tmp").replace(folder / "state.safetensors")

    def resume(self) -> bool:
        """Continue from `out` if it holds a state, and return whether it does.

        Raises:
            CheckpointError: if the state belongs to another model.
        """
        path = self.settings.out / "state.safetensors"
        if not path.exists():
            return False
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            place = json.loads(file.metadata()["place"])
        parameters = {f"model.{k}": v for k, v in self.model.named_parameters()}
        parameters |= {f"heads.{k}": v for k, v in self.heads.named_parameters()}
        for name, parameter in parameters.items():
            if name not in tensors or tensors[name].shape != parameter.shape:
                raise CheckpointError(f"{path} is of another model ({name} differs); choose another folder for out")
            parameter.data.copy_(tensors[name])
            keys = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}/{name}" in tensors]
            if keys:
                state = {k: tensors[f"{k}/{name}"] for k in keys}
                self.optimizer.state[parameter] = {k: v if k == "step" else v.to(self.device) for k, v in state.items()}
        self.generator.set_state(tensors["generator"])
        for key, value in place.items():
            setattr(self, key, value)
        return True


def main(settings: Pretrain) -> None:
    """Run or resume one pretraining and print where it was saved."""
    start = time.monotonic()
    job = Pretraining(settings, DocstringData().public())
    count = sum(p.numel() for p in job.model.parameters())
    tokens = sum(len(row) for row in job.train.ids)
    print(f"{len(job.docs)} public documents, {tokens} tokens, {count} parameters, {time.monotonic() - start:.0f} s")
    print(json.dumps({k: str(v) for k, v in asdict(settings).items()}))
    if job.resume():
        print(f"resumed at step {job.step}, {job.seconds / 60:.1f} minutes in")
    job.run(lambda line: print(line, flush=True))
    print(f"held out: {job.evaluate()}\nsaved to {settings.out}")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Pretrain))
