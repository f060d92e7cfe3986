"""The card of a pretrained model, measured and written next to it: card.json and README.md.

python -m consilium.recipes.pretrain_card --model DIR [--scores central.json]
"""

import json
import platform
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoTokenizer, SwitchTransformersEncoderModel

from consilium.data import source
from consilium.data.docstrings import PUBLIC, DocstringData, answer
from consilium.data.source import Doc
from consilium.moe.build import ModelSource
from consilium.moe.gates import measure_scales
from consilium.recipes.pretrain_model import watch_routers

__all__ = ["Card", "gates", "main", "mutual_information", "specialisation", "usage"]


SCALED = 512
"""The documents over which the constants of the gates are measured."""


@dataclass(frozen=True)
class Card:
    """Settings of the card.

    Args:
        model: folder that `consilium.recipes.pretrain` wrote.
        scores: JSON with the result of benchmarks/central.py, copied into the card.
        command: command that made the model, for the card.
        documents: documents sampled for the public usage; half as many of the clients' for the specialisation.
        threads: CPU threads.
    """

    model: Path
    scores: Path | None = None
    command: str = "python -m consilium.recipes.pretrain --out DIR"
    documents: int = 8000
    threads: int = 1


@torch.no_grad()
def usage(path: Path, docs: Sequence[Doc]) -> dict[str, Tensor]:
    """Count the tokens of each document that are routed to each expert: block -> [documents, E]."""
    model = SwitchTransformersEncoderModel.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    logits = watch_routers(model)
    names = [f"encoder.block.{i}.layer.1.mlp" for i in range(len(model.encoder.block))]
    counts = {name: torch.zeros(len(docs), model.config.num_experts) for name in names}
    order = sorted(range(len(docs)), key=lambda i: len(docs[i].text))
    for start in range(0, len(order), 64):
        rows = order[start : start + 64]
        batch = tokenizer([docs[i].text for i in rows], padding=True, truncation=True, return_tensors="pt")
        logits.clear()
        model(**batch)
        for name, scores in zip(names, logits, strict=True):
            choices = torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1])
            counts[name][rows] = (choices * batch["attention_mask"][..., None]).sum(1).float()
    return counts


def gates(path: Path, docs: Sequence[Doc]) -> dict[str, list[float]]:
    """Return the constants c(1) .. c(E) of every block that keep a slice's gates on scale, see `moe.gates`."""
    source = ModelSource(str(path))
    head = {"head.none.none.weight": torch.zeros(source.config.hidden_size), "head.none.none.bias": torch.zeros(())}
    tokenizer, model = source.tokenizer(), source.build(source.load() | head, "none", ("none",))
    order = sorted(docs, key=lambda doc: len(doc.text))
    parts = [[doc.text for doc in order[i : i + 64]] for i in range(0, len(order), 64)]
    batches = (
        {
            **tokenizer(texts, padding=True, truncation=True, return_tensors="pt"),
            "labels": torch.zeros(len(texts)).long(),
        }
        for texts in parts
    )
    return measure_scales(model, batches)


def mutual_information(table: Tensor) -> float:
    """Return the mutual information of the rows and columns of a table of counts.

    It is given as a share of the rows' entropy, in [0, 1].
    """
    joint = table.double() / table.sum()
    rows, columns = joint.sum(1, keepdim=True), joint.sum(0, keepdim=True)
    entropy = -(rows * rows.clamp_min(1e-300).log()).sum()
    information = (joint * (joint.clamp_min(1e-300) / (rows * columns).clamp_min(1e-300)).log()).sum()
    return float(information / entropy) if entropy > 0 else 0.0


def specialisation(counts: dict[str, Tensor], groups: Sequence[str]) -> dict[str, dict[str, float]]:
    """Measure, per block, how differently the groups of documents use the experts.

    `variation` is the mean total variation between a group's expert shares and those of all others together: 0 if
    groups are routed alike, 1 if no expert is shared. `information` is the mutual information of a token's group and
    its expert, see `mutual_information`.
    """
    names = sorted(set(groups))
    index = torch.tensor([names.index(group) for group in groups])
    measures = {}
    for block, table in counts.items():
        per_group = torch.stack([table[index == i].sum(0) for i in range(len(names))])
        other_counts = per_group.sum(0, keepdim=True) - per_group
        shares, other_shares = (t / t.sum(1, keepdim=True).clamp_min(1) for t in (per_group, other_counts))
        measures[block] = {
            "variation": round(float((shares - other_shares).abs().sum(1).mean() / 2), 4),
            "information": round(mutual_information(per_group), 4),
        }
    return measures


def describe(settings: Card) -> dict[str, Any]:
    """Return the card as JSON."""
    data = DocstringData()
    public, private = data.public(), data.private()
    rng = random.Random(0)
    public_sample = rng.sample(public, min(settings.documents, len(public)))
    largest_packages = [package for package, _ in Counter(doc.package for doc in private).most_common(10)]
    client_sample = [doc for doc in private if doc.package in largest_packages and answer("kind", doc)]
    client_sample = rng.sample(client_sample, min(settings.documents // 2, len(client_sample)))
    public_usage, client_usage = usage(settings.model, public_sample), usage(settings.model, client_sample)
    place, parameters = {}, 0
    if (settings.model / "state.safetensors").exists():
        with safe_open(settings.model / "state.safetensors", "pt") as file:
            place = json.loads(file.metadata()["place"])
    with safe_open(settings.model / "model.safetensors", "pt") as file:
        parameters = sum(torch.Size(file.get_slice(key).get_shape()).numel() for key in file.keys())  # noqa: SIM118
    counts = Counter(doc.package for doc in public)
    return {
        "name": "docstring-switch",
        "command": settings.command,
        "parameters": parameters,
        "checkpoint_bytes": (settings.model / "model.safetensors").stat().st_size,
        "training": {
            "steps": place.get("step"),
            "tokens": place.get("seen"),
            "epochs": place.get("epoch"),
            "minutes": round(place["seconds"] / 60, 1) if place else None,
        },
        "data": {
            "documents": len(public),
            "of_clients": len(private),
            "packages": {p: {"version": source.version(p), "documents": counts[p]} for p in sorted(counts)},
            "wholly_public": list(PUBLIC),
        },
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("torch", "transformers", "tokenizers")},
        "scores": json.loads(settings.scores.read_text()) if settings.scores else None,
        "specialisation": {
            "documents": len(client_sample),
            "by_package": specialisation(client_usage, [doc.package for doc in client_sample]),
            "by_kind": specialisation(client_usage, [doc.kind for doc in client_sample]),
        },
        "gates_public": gates(settings.model, public_sample[:SCALED]),
        "usage_public": {
            block: [round(x, 6) for x in (table.sum(0) / table.sum()).tolist()] for block, table in public_usage.items()
        },
    }


def readme(card: dict[str, Any]) -> str:
    """Return the card as Markdown for people."""
    training, data = card["training"], card["data"]
    lines = [
        "# docstring-switch",
        "",
        "A Switch Transformer encoder (4 layers, all sparse, 16 experts each, top-1) on the documentation of Python",
        f"packages; {card['parameters']:,} parameters, {card['checkpoint_bytes']:,} bytes in bfloat16. It is the model",
        "of the docstring recipes, small enough to ship and for a laptop. No client's text was in its data.",
        "",
        f"Made by `{card['command']}` on CPU: {training['steps']:,} steps, {training['tokens']:,} tokens, "
        f"{training['minutes']} minutes.",
        f"Data: {data['documents']:,} public docstrings of {len(data['packages'])} packages (versions in `card.json`); "
        f"{data['of_clients']:,} are kept",
        "for clients. Objective: masked tokens, and heads for package, kind, verb and the name's words, not shipped.",
        "",
        "The texts are documentation under the licences of the packages; the weights are under this project's licence.",
        "",
    ]
    if card["scores"]:
        names = list(next(iter(card["scores"].values())))
        lines += ["Test accuracy, clients' data pooled (`benchmarks/central.py`):", ""]
        lines += ["| task | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for task, scores in card["scores"].items():
            lines.append(f"| {task} | " + " | ".join(f"{100 * scores[name]:.1f} %" for name in names) + " |")
        lines.append("")
        for line, model_text in (("words", "bags of words"), ("n-grams", "n-grams of words and characters")):
            tasks = [t for t, scores in card["scores"].items() if scores.get("model", 1) <= scores.get(line, 0)]
            if tasks:
                lines += [f"A linear model on {model_text} is as good or better on: {', '.join(tasks)}.", ""]
    lines += [
        "How differently experts are used (total variation between one group and the others, clients' texts):",
        "",
    ]
    lines += ["| layer | by package | by kind |", "|---|---|---|"]
    by_package, by_kind = (card["specialisation"][key] for key in ("by_package", "by_kind"))
    for block in by_package:
        lines.append(f"| `{block}` | {by_package[block]['variation']:.3f} | {by_kind[block]['variation']:.3f} |")
    return "\n".join(lines) + "\n"


def main(settings: Card) -> None:
    """Measure the model, and write card.json and README.md into its folder."""
    torch.set_num_threads(settings.threads)
    card = describe(settings)
    (settings.model / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    (settings.model / "README.md").write_text(readme(card), encoding="utf-8")
    print(f"wrote card.json and README.md to {settings.model}")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Card))
