"""How the shipped model was made: a small Switch encoder pretrained on the public documentation.

    python -m consilium.recipes.pretrain --out DIR --minutes 60

A byte-level BPE tokenizer is trained on the public shard (`DocstringData.public`), then a stock
`SwitchTransformersEncoderModel`, every layer sparse, by masked language modelling (tied to the input embedding)
together with classification heads on the mean-pooled hidden state: package, kind, first verb, and the words of the
documented name. The heads are thrown away. Routing is kept even by Switch's loss, E * sum_e f_e P_e, layer by layer.

The learning rate falls to zero over the planned minutes or steps. A run that stops resumes from its last save.
"""

import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, SwitchTransformersConfig, SwitchTransformersEncoderModel

from consilium.data.docstrings import DocstringData
from consilium.data.source import Doc, words
from consilium.errors import CheckpointError, ConfigError, DataError

__all__ = ["Batch", "Pretrain", "Pretraining", "main", "train_tokenizer"]

SPECIAL = ("<pad>", "</s>", "<unk>", "<mask>")
PAD, EOS, UNK, MASK = range(4)
HEADS = ("topic", "kind", "verb")


@dataclass(frozen=True)
class Pretrain:
    """Settings of one pretraining run.

    Attributes:
        out: folder for the model, the tokenizer and the state to resume from.
        minutes, steps: how long, whichever ends first; the learning rate reaches zero there. 0 = no such limit.
        vocabulary: tokens, the special ones included.
        width, hidden, layers, heads, experts: d_model, d_ff (per expert), layers, attention heads, experts per layer.
        length: tokens per text at most.
        tokens: tokens per batch, padding included.
        rate: peak learning rate; embeddings: their rate is so many times as high. warmup: share of the rise.
        masking: largest masked share of a text; each text draws its share between 0 and this.
        balance: coefficient of the load-balance loss. dropout: of the model. decay: AdamW weight decay.
        classify: weight of the mean classification loss against the masked-token loss.
        threads: CPU threads. seed: of everything drawn.
        save_minutes: minutes between saves. heldout: public documents kept for measuring.
    """

    out: Path
    minutes: float = 60.0
    steps: int = 0
    vocabulary: int = 6000
    width: int = 160
    hidden: int = 320
    layers: int = 4
    heads: int = 5
    experts: int = 16
    length: int = 72
    tokens: int = 2048
    rate: float = 2e-3
    embedding: float = 2.0
    warmup: float = 0.03
    masking: float = 0.3
    balance: float = 0.01
    dropout: float = 0.0
    decay: float = 0.01
    classify: float = 1.0
    threads: int = 1
    seed: int = 0
    save_minutes: float = 5.0
    heldout: int = 1000

    def __post_init__(self) -> None:
        if self.minutes <= 0 and self.steps <= 0:
            raise ConfigError("both minutes and steps are 0; give at least one of them")
        if self.width % self.heads:
            raise ConfigError(f"width {self.width} is not a multiple of heads {self.heads}")


def train_tokenizer(texts: list[str], vocabulary: int, length: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the texts, which ends every text with </s> and needs no unknown token."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[PAD],
        eos_token=SPECIAL[EOS],
        unk_token=SPECIAL[UNK],
        mask_token=SPECIAL[MASK],
        model_max_length=length,
        model_input_names=["input_ids", "attention_mask"],
    )


@dataclass(frozen=True)
class Batch:
    """Token ids [B, T] (padded), head targets [B] (-1 = none), name words [B, W] as rows that sum to 1 or 0."""

    ids: Tensor
    targets: dict[str, Tensor]
    words: Tensor


class Corpus:
    """Encoded documents with their answers, handed out in batches of about equal length."""

    def __init__(self, docs: list[Doc], tokenizer: PreTrainedTokenizerFast, length: int, classes: dict[str, list[str]]):
        encoded = tokenizer([doc.text for doc in docs], truncation=True, max_length=length)["input_ids"]
        self.ids = [torch.tensor(row) for row in encoded]
        self.classes = classes
        place = {head: {label: i for i, label in enumerate(labels)} for head, labels in classes.items()}
        self.targets = {head: torch.tensor([place[head].get(_answer(head, doc), -1) for doc in docs]) for head in HEADS}
        self.words = [[place["words"][w] for w in words(doc.name) if w in place["words"]] for doc in docs]

    def batches(self, tokens: int, rng: random.Random) -> Iterator[Batch]:
        """One pass in random order; a batch has at most `tokens` tokens, and neighbours in length share it."""
        order = list(range(len(self.ids)))
        rng.shuffle(order)
        groups = []
        for start in range(0, len(order), 4096):
            chunk = sorted(order[start : start + 4096], key=lambda i: len(self.ids[i]))
            group: list[int] = []
            for i in chunk:
                if group and len(self.ids[i]) * (len(group) + 1) > tokens:
                    groups.append(group)
                    group = []
                group.append(i)
            groups.append(group)
        rng.shuffle(groups)
        for group in groups:
            yield self.take(group)

    def take(self, rows: list[int]) -> Batch:
        """The batch of these rows."""
        ids = nn.utils.rnn.pad_sequence([self.ids[i] for i in rows], batch_first=True, padding_value=PAD)
        named = torch.zeros(len(rows), len(self.classes["words"]))
        for r, i in enumerate(rows):
            for word in self.words[i]:
                named[r, word] = 1.0 / len(self.words[i])
        return Batch(ids, {head: self.targets[head][rows] for head in HEADS}, named)


def _answer(head: str, doc: Doc) -> str | None:
    if head == "topic":
        return doc.package
    if head == "kind":
        return doc.kind
    own = doc.name.rsplit(".", 1)[-1]
    parts = words(own)
    called = doc.kind in ("function", "method", "classmethod", "staticmethod")
    return parts[0] if called and len(parts) > 1 and not own.startswith("__") else None


def _classes(docs: list[Doc]) -> dict[str, list[str]]:
    """Labels per head that occur often enough, and the frequent words of names."""
    least = max(2, len(docs) // 1000)
    classes = {}
    for head in HEADS:
        counts = Counter(_answer(head, doc) for doc in docs)
        classes[head] = sorted(k for k, n in counts.items() if k and n >= (least if head == "verb" else 2))
    counts = Counter(w for doc in docs for w in set(words(doc.name)))
    classes["words"] = sorted(w for w, n in counts.most_common(1000) if n >= 2)
    return classes


class Pretraining:
    """Model, heads, optimiser and the place in the data: everything that a save holds."""

    def __init__(self, settings: Pretrain, docs: list[Doc]):
        if len(docs) < 16:
            raise DataError(f"{len(docs)} public documents; pretraining needs at least 16: install more packages")
        self.settings = settings
        torch.manual_seed(settings.seed)
        torch.set_num_threads(settings.threads)
        docs = random.Random(settings.seed).sample(docs, len(docs))
        held = min(settings.heldout, len(docs) // 5)
        self.tokenizer = train_tokenizer([doc.text for doc in docs[held:]], settings.vocabulary, settings.length)
        classes = _classes(docs[held:])
        self.docs = docs
        self.heldout = Corpus(docs[:held], self.tokenizer, settings.length, classes)
        self.train = Corpus(docs[held:], self.tokenizer, settings.length, classes)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = build(settings, len(self.tokenizer)).to(self.device)
        sizes = {name: len(labels) for name, labels in classes.items()}
        self.heads = nn.ModuleDict({name: nn.Linear(settings.width, n) for name, n in sizes.items()}).to(self.device)
        self.logits = watch_routers(self.model)
        shared = self.model.shared.weight
        rest = [p for p in (*self.model.parameters(), *self.heads.parameters()) if p is not shared]
        groups = [{"params": [shared], "factor": settings.embedding}, {"params": rest, "factor": 1.0}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=settings.rate, betas=(0.9, 0.98), weight_decay=settings.decay, fused=True
        )
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.step, self.seconds, self.seen, self.epoch, self.position = 0, 0.0, 0, 0, 0

    def loss(self, batch: Batch, masking: float) -> tuple[Tensor, dict[str, float]]:
        """Loss of one batch and its parts; masks each text by a share between 0 and `masking`."""
        ids = batch.ids.to(self.device)
        real = ids != PAD
        share = torch.rand(len(ids), 1, generator=self.generator) * masking
        chosen = (torch.rand(batch.ids.shape, generator=self.generator) < share).to(self.device)
        chosen &= real & (ids != EOS)
        self.logits.clear()
        inputs = torch.where(chosen, MASK, ids)
        hidden = self.model(input_ids=inputs, attention_mask=real.long()).last_hidden_state
        parts = {}
        total = torch.zeros((), device=self.device)
        if chosen.any():
            scores = hidden[chosen] @ self.model.shared.weight.T
            total = parts["mask"] = F.cross_entropy(scores.float(), ids[chosen])
        pooled = (hidden * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        for head in HEADS:
            targets = batch.targets[head].to(self.device)
            if (targets >= 0).any():
                parts[head] = F.cross_entropy(self.heads[head](pooled).float(), targets, ignore_index=-1)
                total = total + self.settings.classify * parts[head]
        named = batch.words.to(self.device)
        parts["words"] = -(named * self.heads["words"](pooled).float().log_softmax(-1)).sum() / len(ids)
        total = total + self.settings.classify * 0.5 * parts["words"]
        parts["balance"] = torch.stack([balance_loss(logits, real) for logits in self.logits]).mean()
        total = total + self.settings.balance * parts["balance"] * self.settings.layers
        return total, {name: float(part.detach()) for name, part in parts.items()}

    def progress(self) -> float:
        """How much of the plan is done, 0 to 1."""
        s = self.settings
        by_time = self.seconds / (60 * s.minutes) if s.minutes > 0 else 0.0
        return min(1.0, max(by_time, self.step / s.steps if s.steps > 0 else 0.0))

    def run(self, log: Callable[[str], None] = print) -> None:
        """Train to the end of the plan, saving on the way."""
        saved, spoken, means = self.seconds, self.seconds, {}
        begun = time.monotonic() - self.seconds  # everything counts: batches, saves and evaluations too
        self.model.train()
        while self.progress() < 1:
            order = random.Random(f"{self.settings.seed}:{self.epoch}")
            for index, batch in enumerate(self.train.batches(self.settings.tokens, order)):
                if index < self.position:
                    continue
                parts = self._update(batch)
                self.seconds = time.monotonic() - begun
                self.step += 1
                self.position += 1
                self.seen += int((batch.ids != PAD).sum())
                means = {k: 0.98 * means.get(k, v) + 0.02 * v for k, v in parts.items()}
                if self.step % 100 == 0 or self.seconds - spoken > 30:
                    spoken = self.seconds
                    log(self._line(means))
                if self.seconds - saved > 60 * self.settings.save_minutes:
                    saved = self.seconds
                    self.save()
                    log(f"held out: {self.evaluate()}")
                if self.progress() >= 1:
                    break
            else:
                self.epoch, self.position = self.epoch + 1, 0
        self.save()

    def _update(self, batch: Batch) -> dict[str, float]:
        done, warm = self.progress(), self.settings.warmup
        factor = done / warm if done < warm else 0.5 * (1 + math.cos(math.pi * (done - warm) / (1 - warm)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate * group["factor"] * max(factor, 1e-4)
        total, parts = self.loss(batch, self.settings.masking)
        self.optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_([*self.model.parameters(), *self.heads.parameters()], 1.0)
        self.optimizer.step()
        return parts

    def _line(self, means: dict[str, float]) -> str:
        losses = " ".join(f"{name} {value:.3f}" for name, value in means.items())
        rate = self.seen / max(self.seconds, 1e-9)
        where = f"step {self.step} epoch {self.epoch} {self.seconds / 60:.1f} min"
        return f"{where} {100 * self.progress():.1f}% {losses} ({rate:.0f} tokens/s)"

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Accuracy of the heads on held-out public documents, and the smallest expert's share of tokens."""
        self.model.eval()
        right, count = Counter(), Counter()
        used = torch.zeros(self.settings.layers, self.settings.experts)
        for batch in self.heldout.batches(self.settings.tokens, random.Random(0)):
            ids = batch.ids.to(self.device)
            real = ids != PAD
            self.logits.clear()
            hidden = self.model(input_ids=ids, attention_mask=real.long()).last_hidden_state
            pooled = (hidden * real[..., None]).sum(1) / real.sum(1, keepdim=True)
            for head in HEADS:
                targets = batch.targets[head].to(self.device)
                guess = self.heads[head](pooled).argmax(-1)
                right[head] += int(((guess == targets) & (targets >= 0)).sum())
                count[head] += int((targets >= 0).sum())
            for layer, logits in enumerate(self.logits):
                used[layer] += logits[real].argmax(-1).bincount(minlength=self.settings.experts).cpu()
        self.model.train()
        shares = used / used.sum(1, keepdim=True)
        scores = {head: round(right[head] / max(count[head], 1), 4) for head in HEADS}
        return {**scores, "least_used": round(float(shares.min()), 4), "most_used": round(float(shares.max()), 4)}

    def save(self) -> None:
        """Write the model (bf16) and tokenizer for `from_pretrained`, and the state to resume from."""
        out = self.settings.out
        out.mkdir(parents=True, exist_ok=True)
        export(self.model, self.tokenizer, out)
        tensors = {f"model.{k}": v for k, v in self.model.named_parameters()}
        tensors |= {f"heads.{k}": v for k, v in self.heads.named_parameters()}
        names = list(tensors)
        for name, parameter in zip(names, list(tensors.values()), strict=True):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = value
        tensors["generator"] = self.generator.get_state()
        copies = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
        place = {k: getattr(self, k) for k in ("step", "seconds", "seen", "epoch", "position")}
        save_file(copies, out / "state.tmp", metadata={"place": json.dumps(place)})
        (out / "state.tmp").replace(out / "state.safetensors")

    def resume(self) -> bool:
        """Continue from `out` if it holds a state; CheckpointError when that state is of another model."""
        from safetensors import safe_open

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


def build(settings: Pretrain, vocabulary: int) -> SwitchTransformersEncoderModel:
    """A Switch encoder with every layer sparse, from a config, in float32."""
    config = SwitchTransformersConfig(
        vocab_size=vocabulary,
        d_model=settings.width,
        d_kv=settings.width // settings.heads,
        d_ff=settings.hidden,
        num_layers=settings.layers,
        num_sparse_encoder_layers=settings.layers,
        num_decoder_layers=settings.layers,
        num_sparse_decoder_layers=settings.layers,
        num_heads=settings.heads,
        num_experts=settings.experts,
        expert_capacity=1024,  # per text: above any length in use, so no token is ever dropped
        router_jitter_noise=0.0,
        dropout_rate=settings.dropout,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )
    config.architectures = ["SwitchTransformersEncoderModel"]
    model = SwitchTransformersEncoderModel(config)
    initialise(model)
    for block in model.encoder.block:
        block.layer[1].mlp.experts.forward = _sorted_experts.__get__(block.layer[1].mlp.experts)
    return model


@torch.no_grad()
def initialise(model: SwitchTransformersEncoderModel) -> None:
    """Weights from which AdamW learns in minutes; the stock ones were made for Adafactor and long runs.

    - Small embeddings: at AdamW's step size those of rare words, which tell most, would hardly move from unit variance.
    - Small outputs of attention and experts, so that they do not drown the embeddings.
    - Router logits of unit deviation instead of sqrt(d_model): no token belongs to one expert from the start.
    - Attention heads that look one word back, one ahead, nearby, around, and everywhere: relative positions are
      learnt slowly, and until they are, the masked-word loss stands still at the frequencies of words.
    """
    width = model.config.d_model
    model.shared.weight.normal_(std=0.05)
    for block in model.encoder.block:
        block.layer[0].SelfAttention.o.weight.mul_(0.2)
        mlp = block.layer[1].mlp
        mlp.router.classifier.weight.normal_(std=width**-0.5)
        for expert in mlp.experts.values():
            expert.wo.weight.mul_(0.5)
    attention = model.encoder.block[0].layer[0].SelfAttention
    distances = torch.arange(-127, 128)
    buckets = attention._relative_position_bucket(distances, num_buckets=32, max_distance=128)
    for bucket in buckets.unique():
        d = distances[buckets == bucket].float().mean()
        near = [-4 * (d + 1).abs().clamp(max=2), -4 * (d - 1).abs().clamp(max=2)]
        biases = [*near, -2 * d.abs().log1p(), -d.abs().log1p()]
        for head in range(attention.n_heads):
            attention.relative_attention_bias.weight[bucket, head] = biases[head] if head < len(biases) else 0.0


def _sorted_experts(experts: nn.ModuleDict, hidden_TD: Tensor, chosen_T1E: Tensor, weights_T1: Tensor) -> Tensor:
    """The stock experts' result, computed on tokens sorted by expert: one gather instead of one search per expert."""
    expert_T = chosen_T1E.squeeze(1).argmax(-1)
    order_T = expert_T.argsort()
    counts = expert_T.bincount(minlength=len(experts)).tolist()
    pieces = hidden_TD[order_T].split(counts)
    done = [experts[f"expert_{e}"](piece) for e, piece in enumerate(pieces) if len(piece)]
    sorted_TD = torch.cat(done) * weights_T1[order_T]
    return torch.zeros_like(hidden_TD).index_copy(0, order_T, sorted_TD.to(hidden_TD.dtype))


def watch_routers(model: SwitchTransformersEncoderModel) -> list[Tensor]:
    """A list that each forward pass appends every layer's router logits [B, T, E] to, first layer first."""
    logits: list[Tensor] = []
    for block in model.encoder.block:
        block.layer[1].mlp.router.register_forward_hook(lambda module, args, output: logits.append(output[2]))
    return logits


def balance_loss(logits: Tensor, real: Tensor) -> Tensor:
    """Switch's load balance of one layer, E * sum_e f_e P_e over real tokens: 1 when even, E when collapsed.

    logits [B, T, E]; real [B, T] bool. f_e: share of tokens whose first choice is e; P_e: mean probability of e.
    """
    kept = logits[real].float()
    experts = kept.shape[-1]
    shares = F.one_hot(kept.argmax(-1), experts).float().mean(0)
    return experts * (shares * kept.softmax(-1).mean(0)).sum()


def export(model: SwitchTransformersEncoderModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Model in bfloat16 and tokenizer, to be opened by `from_pretrained`, which then computes in float32."""
    names = [k for k in model.state_dict() if k != "encoder.embed_tokens.weight"]  # tied to shared.weight
    tensors = {k: model.state_dict()[k].detach().to("cpu", torch.bfloat16).contiguous() for k in names}
    save_file(tensors, out / "model.tmp", metadata={"format": "pt"})
    (out / "model.tmp").replace(out / "model.safetensors")
    model.config.dtype = "float32"
    model.config.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main(settings: Pretrain) -> None:
    """Run or resume one pretraining and print where it was saved."""
    begun = time.monotonic()
    job = Pretraining(settings, DocstringData().public())
    count = sum(p.numel() for p in job.model.parameters())
    tokens = sum(len(row) for row in job.train.ids)
    print(f"{len(job.docs)} public documents, {tokens} tokens, {count} parameters, {time.monotonic() - begun:.0f} s")
    print(json.dumps({k: str(v) for k, v in asdict(settings).items()}))
    if job.resume():
        print(f"resumed at step {job.step}, {job.seconds / 60:.1f} minutes in")
    job.run(lambda line: print(line, flush=True))
    print(f"held out: {job.evaluate()}\nsaved to {settings.out}")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Pretrain))
