"""A second corpus, which nobody looked at while AffinityMoE was designed: natural language in six domains.

News (AG News), encyclopedia (SQuAD), word problems (GSM8K), instructions (Dolly), requests to an assistant (CLINC150),
plays (Shakespeare), from a folder of open data that is not part of this project (`--data`). Half of the rows, by a hash
of the text, pretrain a model of the size of `code-olmoe`. The clients' texts come from the other half.
Two settings:

    one      six clients, each with a domain of its own, which the model knows
    shared   eighteen clients, three for each domain, 4 to 12 kB of training text each

Methods, devices, rounds and scores are those of benchmarks/testbed.py, and so are the ways of searching learning rates.

    python benchmarks/second_corpus.py --pretrain     # the model; once, half an hour on one core, resumable
    python benchmarks/second_corpus.py --search       # the learning rates, by validation data of a seed of their own
    python benchmarks/second_corpus.py                # the runs that are missing, and the table

Writes benchmarks/results/second_corpus.md and .json.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq
import tyro
from cells import RESULTS, finish, plan
from testbed import GRID, METHODS, ROUNDS, SEARCH_SEED, UNLIMITED, keep_best, read, section, slug

from consilium.data.language import LanguageData
from consilium.experiment import Experiment
from consilium.machine import cores
from consilium.recipes.code import DEVICE, affinitymoe_code
from consilium.recipes.pretrain_code import PretrainCode, Pretraining, write_card

SETTINGS = {"one": 1, "shared": 3}
"""Clients per domain."""
COMPARED = ("AffinityMoE", "alone", "FedMoE", "randomMoE", "AffinityMoE, all alike", "FedAvg, no limit")
SOURCES: dict[str, tuple[str, tuple[str, ...], Callable[[dict[str, str]], str]]] = {
    "news": ("agnews_train_25k", ("text",), lambda row: row["text"]),
    "encyclopedia": ("squad_v11_train", ("context",), lambda row: row["context"]),
    "problems": ("gsm8k", ("question", "answer"), lambda row: f"{row['question']}\n{row['answer']}"),
    "instructions": (
        "dolly15k_fedit",
        ("instruction", "context", "response"),
        lambda row: "\n".join(filter(None, (row["instruction"], row["context"], row["response"]))),
    ),
    "assistant": ("clinc150", ("text",), lambda row: row["text"]),
    "plays": ("tiny_shakespeare_by_speaker", ("speaker", "text"), lambda row: f"{row['speaker']}:\n{row['text']}"),
}
"""Domain -> file, columns, and how a row becomes a text."""
SIZES = {"train": 8_000, "validation": 9_000, "test": 62_000}
"""Characters per client, on average for training text."""
PIECE = 1_000
"""Characters of one row of a client's file; short texts are joined, so that splits by rows are splits by size."""


@dataclass(frozen=True)
class Benchmark:
    """What to run.

    Args:
        data: folder with the Parquet files.
        settings: of one, shared.
        methods: names as in the table; () all.
        seeds: runs per method and setting.
        pretrain: pretrain the model and stop.
        steps: steps of pretraining.
        search: search the learning rates and stop.
        out: where model, texts and runs go.
        jobs: runs at a time, one thread each.
        table_only: only make the table of the runs there are.
    """

    data: Path = Path("../shared/data")
    settings: tuple[str, ...] = tuple(SETTINGS)
    methods: tuple[str, ...] = ()
    seeds: int = 5
    pretrain: bool = False
    steps: int = 3000
    search: bool = False
    out: Path = Path("runs/benchmark-second-corpus")
    jobs: int = cores()
    table_only: bool = False


def texts(data: Path, domain: str, public: bool) -> Iterator[str]:
    """Yield the different texts of one half of a domain, in the order of the file."""
    name, columns, text_of = SOURCES[domain]
    seen = set()
    for row in pq.read_table(data / f"{name}.parquet", columns=list(columns)).to_pylist():
        text = text_of(row).strip()
        digest = hashlib.sha256(text.encode()).digest()
        if text and digest not in seen and (digest[0] % 2 == 0) == public:
            seen.add(digest)
            yield text


def pieces(rows: list[str], size: float) -> list[str]:
    """Take texts from the end of `rows`, joined to pieces of at least `PIECE` characters, until `size` is reached."""
    taken: list[str] = []
    while sum(map(len, taken)) < size:
        piece: list[str] = []
        while sum(map(len, piece)) < PIECE:
            piece.append(rows.pop())
        taken.append("\n\n".join(piece))
    return taken


def write_clients(data: Path, per_domain: int, seed: int, file: Path) -> None:
    """Write the clients' texts of one seed as JSON lines with the columns client, split and text."""
    lines = []
    for domain in SOURCES:
        rows = list(texts(data, domain, public=False))
        rng = random.Random(f"{seed}:{domain}")
        rng.shuffle(rows)
        for client in range(per_domain):
            for split, size in SIZES.items():
                factor = rng.uniform(0.5, 1.5) if split == "train" else 1.0
                lines += [
                    {"client": f"{domain}-{client}", "split": split, "text": piece}
                    for piece in pieces(rows, factor * size)
                ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def rates() -> dict[str, dict[str, float]]:
    """Setting -> method -> the learning rate that the search found."""
    file = RESULTS / "second_corpus_rates.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def experiment(benchmark: Benchmark, setting: str, method: str, seed: int, rate: float | None = None) -> Experiment:
    """One cell of the table, or of the search if a rate is given."""
    base = affinitymoe_code()
    file = benchmark.out / "texts" / f"{setting}-{seed}.jsonl"
    if not file.exists():
        write_clients(benchmark.data, SETTINGS[setting], seed, file)
    total = sum(SIZES.values())
    return replace(
        base,
        name=f"{setting}-{slug(method)}-{seed}" if rate is None else f"search-{setting}-{slug(method)}-{rate:g}",
        algorithm=METHODS[method],
        data=LanguageData(
            file, text="text", client="client", validation=SIZES["validation"] / total, test=SIZES["test"] / total
        ),
        model=replace(base.model, path=str(benchmark.out / "model")),
        fit=replace(base.fit, lr=rate or rates()[setting][method]),
        sampling=replace(base.sampling, clients_per_round=len(SOURCES) * SETTINGS[setting]),
        rounds=ROUNDS,
        evaluate_every=ROUNDS,
        completions=0,
        memory=() if method in UNLIMITED else (DEVICE,),
        seed=seed,
    )


def pretrain(benchmark: Benchmark) -> None:
    """Pretrain the model on the public half, or continue."""
    corpus = [text for domain in SOURCES for text in texts(benchmark.data, domain, public=True)]
    run = Pretraining(PretrainCode(benchmark.out / "model", steps=benchmark.steps, threads=benchmark.jobs), corpus)
    run.resume()
    run.run()
    write_card(run.settings.out, run.ids)


def main(benchmark: Benchmark) -> None:
    """Run what is missing, then write the table."""
    if benchmark.pretrain:
        return pretrain(benchmark)
    methods = benchmark.methods or COMPARED
    if benchmark.search:
        cells = {
            (setting, method, rate): experiment(benchmark, setting, method, SEARCH_SEED, rate)
            for rate in GRID
            for setting in benchmark.settings
            for method in methods
        }
        return keep_best("second_corpus", cells, benchmark, rates())
    searched = [method for method in COMPARED if all(method in rates().get(s, {}) for s in benchmark.settings)]
    whole, wanted = plan(benchmark, benchmark.settings, searched, COMPARED, lambda *cell: experiment(benchmark, *cell))
    cells = finish("second_corpus", whole, wanted, read, benchmark.jobs)
    lines = [
        "# A second corpus: six domains of natural language",
        "",
        "Made by `python benchmarks/second_corpus.py`; its first lines say what is compared. Bits per byte of test",
        "text, lower is better: the mean over clients, then mean and 95 % t-interval over seeds. MB: traffic a client.",
        "",
    ]
    for setting in SETTINGS:
        lines += section(cells, setting, COMPARED, domains=setting == "shared")
    text = "\n".join(lines)
    (RESULTS / "second_corpus.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
