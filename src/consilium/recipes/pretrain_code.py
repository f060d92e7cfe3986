"""The pretraining of the shipped language model `code-olmoe`, a small OLMoE, on the public shard of `data.domains`.

    python -m consilium.recipes.pretrain_code --out DIR

A byte-level BPE tokenizer is trained on the public shard, then a stock `OlmoeForCausalLM`. Every layer is sparse, a
token takes two of sixteen experts, and the gates are not normalised over the two. The documents of all public domains
are shuffled, joined with an end mark after each, and cut into rows. The loss is the next token's plus `balance` times
the load-balance loss of each layer. The learning rate rises, then falls to zero over the planned steps as a cosine.

A run that stops resumes from its last save. It takes about twenty minutes on two cores with AVX-512.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from consilium.data.domains import PUBLIC, documents, versions
from consilium.errors import CheckpointError, ConfigError, DataError
from consilium.moe.build import ModelSource
from consilium.moe.discovery import family_of
from consilium.moe.experts import Experts
from consilium.moe.gates import measure_scales
from consilium.moe.model import TaskModel
from consilium.moe.routing import Tap
from consilium.products import quicken
from consilium.recipes.pretrain_model import byte_level_bpe

__all__ = ["PretrainCode", "Pretraining", "main", "train_tokenizer", "write_card"]

PAD, END = 0, 1
SPECIAL = ("<pad>", "<end>")


@dataclass(frozen=True)
class PretrainCode:
    """Settings of one pretraining run.

    Args:
        out: folder for the model, the tokenizer and the state to resume from.
        steps: updates, >= 1.
        rows: rows per update.
        length: tokens per row.
        vocabulary: tokens, the special ones included.
        width: width of the model.
        hidden: width inside an expert.
        layers: number of layers.
        heads: attention heads.
        experts: experts per layer.
        top_k: experts per token.
        rate: peak learning rate.
        warmup: share of the steps in which the learning rate rises.
        decay: weight decay of AdamW.
        balance: weight of the load-balance loss.
        threads: CPU threads.
        seed: seed of everything that is drawn.
        save_minutes: minutes between saves.
    """

    out: Path
    steps: int = 6000
    rows: int = 8
    length: int = 256
    vocabulary: int = 4096
    width: int = 128
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    experts: int = 16
    top_k: int = 2
    rate: float = 3e-3
    warmup: float = 0.03
    decay: float = 0.1
    balance: float = 0.003
    threads: int = 2
    seed: int = 0
    save_minutes: float = 3.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}; it must be at least 1")
        if self.width % self.heads:
            raise ConfigError(f"width is {self.width}; it must be a multiple of heads, {self.heads}")


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that restores every text character by character."""
    tokenizer = byte_level_bpe(texts, vocabulary, SPECIAL, prefix=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[PAD],
        eos_token=SPECIAL[END],
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


class Pretraining:
    """The model, optimizer and place in the data, which together are the content of a save."""

    def __init__(self, settings: PretrainCode, texts: list[str] | None = None):
        self.settings = settings
        texts = [d.text for domain in PUBLIC for d in documents(domain.name, "public")] if texts is None else texts
        if not texts:
            raise DataError("there are no public documents to learn from; install the packages in constraints.txt")
        torch.set_num_threads(settings.threads)
        state = settings.out / "state.safetensors"
        self.tokenizer = (
            PreTrainedTokenizerFast.from_pretrained(settings.out)
            if state.exists()
            else train_tokenizer(texts, settings.vocabulary)
        )
        self.ids = [torch.tensor([*ids, END], dtype=torch.int32) for ids in self.tokenizer(texts)["input_ids"]]
        config = OlmoeConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=settings.width,
            intermediate_size=settings.hidden,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads,
            num_experts=settings.experts,
            num_experts_per_tok=settings.top_k,
            norm_topk_prob=False,
            tie_word_embeddings=True,
            max_position_embeddings=1024,
            pad_token_id=PAD,
            bos_token_id=None,
            eos_token_id=END,
        )
        torch.manual_seed(settings.seed)
        backbone = OlmoeForCausalLM(config)
        self.model = quicken(TaskModel(backbone, family_of("olmoe"), "", (), torch.float32))
        self.experts = Experts(self.model, keep=True)
        self.trainable = self.experts.trainable(self.model)
        matrices = [p for p in self.trainable.values() if p.dim() > 1]
        vectors = [p for p in self.trainable.values() if p.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": settings.decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.95), fused=True)
        self.step, self.seconds = 0, 0.0

    def batches(self) -> Iterator[Tensor]:
        """Yield the token ids [rows, length] of every step, epoch after epoch; they are equal for equal settings."""
        s, epoch = self.settings, 0
        while True:
            order = torch.randperm(len(self.ids), generator=torch.Generator().manual_seed(s.seed + epoch)).tolist()
            stream = torch.cat([self.ids[i] for i in order])
            size = s.rows * s.length
            if len(stream) < size:
                raise DataError(f"the public documents have {len(stream)} tokens; one step needs {size}")
            count = len(stream) // s.length
            rows = torch.randperm(count, generator=torch.Generator().manual_seed(s.seed - epoch - 1))
            table = stream[: count * s.length].view(count, s.length)
            for start in range(0, count - s.rows + 1, s.rows):
                yield table[rows[start : start + s.rows]].long()
            epoch += 1

    def run(self, log: Callable[[str], None] = print) -> None:
        """Train to the end of the plan, and save on the way."""
        s, mean, last_save = self.settings, float("nan"), time.monotonic()
        start = time.monotonic() - self.seconds
        self.model.train()
        with Tap(self.model) as tap, self.experts:
            for number, ids in enumerate(self.batches()):
                if number < self.step:
                    continue
                if self.step >= s.steps:
                    break
                loss = self._update(ids, tap)
                mean = loss if math.isnan(mean) else 0.98 * mean + 0.02 * loss
                self.step += 1
                self.seconds = time.monotonic() - start
                if self.step % 100 == 0:
                    log(f"step {self.step}/{s.steps}  loss {mean:.3f}  {self.seconds / 60:.1f} min")
                if time.monotonic() - last_save > 60 * s.save_minutes:
                    last_save = time.monotonic()
                    self.save()
        self.save()

    def _update(self, ids: Tensor, tap: Tap) -> float:
        s, progress = self.settings, self.step / self.settings.steps
        factor = (
            progress / s.warmup
            if progress < s.warmup
            else 0.5 * (1 + math.cos(math.pi * (progress - s.warmup) / (1 - s.warmup)))
        )
        for group in self.optimizer.param_groups:
            group["lr"] = s.rate * max(factor, 1e-3)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        self.optimizer.zero_grad()
        with tap.batch(batch):
            logits, labels = self.model(batch)
        loss = F.cross_entropy(logits, labels)
        (loss + s.balance * tap.balance_loss()).backward()
        nn.utils.clip_grad_norm_(self.trainable.values(), 1.0)
        self.optimizer.step()
        return float(loss.detach())

    def save(self) -> None:
        """Write the model in bfloat16 and the tokenizer for `from_pretrained`, and the state to resume from."""
        folder = self.settings.out
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.trainable.items():
            tensors[f"model/{name}"] = parameter.detach()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = value
        place = {"step": self.step, "seconds": self.seconds, "settings": _plan(self.settings)}
        copies = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}
        save_file(copies, folder / "state.tmp", metadata={"place": json.dumps(place)})
        self.tokenizer.save_pretrained(folder)
        for path in ("model.safetensors", "config.json"):
            (folder / path).unlink(missing_ok=True)
        tied = self.model.backbone.all_tied_weights_keys  # not written, because `from_pretrained` ties them again
        weights = {
            key: tensor.detach().to(torch.bfloat16)
            for key, tensor in self.model.backbone.state_dict().items()
            if key not in tied
        }
        self.model.backbone.save_pretrained(folder, state_dict=weights)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}, indent=2) + "\n")
        (folder / "state.tmp").replace(folder / "state.safetensors")

    def resume(self) -> bool:
        """Continue from `out` if it holds a state, and return whether it does.

        Raises:
            CheckpointError: if the state belongs to other settings.
        """
        path = self.settings.out / "state.safetensors"
        if not path.exists():
            return False
        with safe_open(path, "pt") as file:
            place = json.loads(file.metadata()["place"])
        if place["settings"] != _plan(self.settings):
            raise CheckpointError(f"{path} is of a run with other settings ({place['settings']}); give another --out")
        tensors = load_file(path)
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(tensors[f"model/{name}"])
                moments = {
                    k: tensors[f"{k}/{name}"] for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}/{name}" in tensors
                }
                if moments:
                    self.optimizer.state[parameter] = moments
        self.step, self.seconds = place["step"], place["seconds"]
        return True


def write_card(out: Path, ids: list[Tensor], rows: int = 96, length: int = 256) -> None:
    """Write card.json: how often public text asks for each expert, and the scale of the gates of a slice.

    Args:
        out: folder of the finished model.
        ids: token ids of the public documents.
        rows: rows that are measured.
        length: tokens per row.
    """
    source = ModelSource(str(out), form="text-to-text")
    model = source.build(source.load(), "", ()).eval()
    stream = torch.cat(ids)
    starts = torch.linspace(0, len(stream) - length, rows).long().tolist()
    batches = []
    for start in range(0, rows, 8):
        part = torch.stack([stream[i : i + length] for i in starts[start : start + 8]]).long()
        batches.append({"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part})
    with torch.inference_mode(), Tap(model) as tap:
        for batch in batches:
            with tap.batch(batch, count=True):
                model(batch)
    usage = {block: [round(share, 6) for share in p.tolist()] for block, p in tap.usage.probability().items()}
    card = {"usage_public": usage, "gates_public": measure_scales(model, batches)}
    (out / "card.json").write_text(json.dumps(card, indent=1) + "\n")


def _plan(settings: PretrainCode) -> dict[str, object]:
    """Return the settings that a state must share; the others may change when a run resumes."""
    return {k: v for k, v in asdict(settings).items() if k not in ("out", "threads", "save_minutes")}


def main() -> None:
    """Pretrain, or continue a run that was interrupted."""
    import tyro

    settings = tyro.cli(PretrainCode)
    run = Pretraining(settings)
    tokens = sum(map(len, run.ids))
    print(f"{len(run.ids)} public documents, {tokens} tokens; {versions()}")
    if run.resume():
        print(f"continuing after step {run.step}")
    run.run()
    write_card(settings.out, run.ids)


if __name__ == "__main__":
    main()
