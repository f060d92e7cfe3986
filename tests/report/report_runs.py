"""Synthetic run directories in the documented format: plausible numbers, no training."""

from __future__ import annotations

import base64
import json
import math
import random
import re
from pathlib import Path

TASKS = {"topic": "accuracy", "kind": "accuracy", "verb": "token_f1"}
_LEVEL = {"FedMoE": 0.72, "RandomMoE": 0.60, "FedAvg": 0.66, "FedProx": 0.67, "Standalone": 0.55}
_PROFILE = {"FedMoE": 62e6, "RandomMoE": 66e6, "FedAvg": 93.1e6, "FedProx": 95.4e6, "Standalone": 60e6}


def make_run(
    path: Path,
    algorithm: str = "FedMoE",
    clients: int = 12,
    blocks: int = 4,
    experts: int = 16,
    rounds: int = 20,
    seed: int = 0,
    finished: bool = True,
    partition_seed: int = 0,
    tasks: dict[str, str] | None = None,
) -> Path:
    """Write one run directory and return it."""
    tasks = tasks or TASKS
    rng = random.Random(f"{algorithm} {seed}")
    path.mkdir(parents=True)
    names = [f"{task}-{i:02d}" for task in tasks for i in range(math.ceil(clients / len(tasks)))][:clients]
    task_of = {name: name.rsplit("-", 1)[0] for name in names}
    memory = {name: [60e6, 80e6, 120e6, 160e6][i % 4] for i, name in enumerate(names)}
    need = _PROFILE.get(algorithm, 70e6)
    unable = {
        n: f"cannot hold the model: needs {need / 1e6:.1f} MB, has {memory[n] / 1e6:.1f} MB"
        for n in names
        if algorithm in ("FedAvg", "FedProx") and memory[n] < need
    }
    able = [n for n in names if n not in unable]
    _partition(path, names, task_of, memory, partition_seed)
    structure, events, counts = _structure(names, task_of, blocks, experts, rounds, rng, algorithm)
    lines = _rounds(able, unable, task_of, algorithm, rounds, rng, counts, memory, tasks)
    if not finished:
        lines = lines[: rounds // 2]
    _write(path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    kept = [e for e in events if e["round"] <= lines[-1]["round"]]
    _write(path / "events.jsonl", "".join(json.dumps(event) + "\n" for event in kept))
    config = {
        "experiment": {
            "name": path.name,
            "rounds": rounds,
            "seed": seed,
            "data": {"type": "DocstringData", "tasks": list(tasks), "clients": clients, "alpha": 0.3},
            "fit": {"gradient_checkpointing": False, "lora": {"rank": 0}},
            "algorithm": {"type": algorithm, "k": 3, "patience": 2, "lr": 3e-4 if algorithm != "FedAvg" else 1e-3},
        },
        "versions": {"consilium": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.2"},
        "git": "cddb22d",
        "status": "finished" if finished else "interrupted",
    }
    _write(path / "config.json", json.dumps(config))
    if algorithm in ("FedMoE", "RandomMoE"):
        _write(path / "structure.json", json.dumps(structure))
    if finished:
        summary = _summary(algorithm, lines, names, task_of, memory, unable, structure, blocks, tasks)
        _write(path / "summary.json", json.dumps(summary))
    return path


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _partition(path: Path, names: list[str], task_of: dict, memory: dict, seed: int) -> None:
    clients = {
        n: {
            "task": task_of[n],
            "labels": ["a", "b", "c", "d"],
            "sizes": {"train": 200, "validation": 60, "test": 100},
            "memory_bytes": int(memory[n]),
            "label_counts": {"a": 41 + i, "b": 30, "c": 19, "d": 10},
        }
        for i, n in enumerate(names)
    }
    skipped = {"verb-98": "empty client: no function of its packages has a documentation line"}
    _write(path / "partition.json", json.dumps({"clients": clients, "skipped": skipped, "fingerprint": f"{seed:064x}"}))


def _structure(names, task_of, blocks, experts, rounds, rng, algorithm):
    block_names = [f"encoder.block.{2 * b + 1}.layer.1.mlp" for b in range(blocks // 2)]
    block_names += [f"decoder.block.{2 * b + 1}.layer.2.mlp" for b in range(blocks - len(block_names))]
    fixed = random.Random(7)
    taste = {
        (t, b): [fixed.random() ** 5 + 0.004 for _ in range(experts)] for t in task_of.values() for b in block_names
    }
    usage, now = {}, {}
    for n in names:
        usage[n], now[n] = {}, {}
        for b in block_names:
            raw = [p * (0.6 + 0.8 * rng.random()) for p in taste[task_of[n], b]]
            usage[n][b] = [p / sum(raw) for p in raw]
            ranked = sorted(range(experts), key=lambda e: -usage[n][b][e])
            size = max(1, round(experts * rng.uniform(0.25, 0.6)))
            now[n][b] = sorted(ranked[:size] if algorithm == "FedMoE" else rng.sample(range(experts), size))
    maps, events = {"0": json.loads(json.dumps(now))}, []
    counts = {0: {n: sum(map(len, now[n].values())) for n in names}}
    if algorithm == "FedMoE":
        events.append({"round": 0, "event": "stage_one", "experts_mean": sum(counts[0].values()) / len(names)})
        for r in range(4, rounds, 2):
            n, b = rng.choice(names), rng.choice(block_names)
            outside = [e for e in range(experts) if e not in now[n][b]]
            if rng.random() < 0.35 and outside:
                new = rng.sample(outside, min(3, len(outside)))
                now[n][b] = sorted(now[n][b] + new)
                events.append({"round": r, "event": "grow", "client": n, "experts": {b: new}, "similar": names[:3]})
            elif len(now[n][b]) > 3:
                gone = rng.sample(now[n][b], 2)
                now[n][b] = [e for e in now[n][b] if e not in gone]
                events.append({"round": r, "event": "shrink", "client": n, "experts": {b: gone}})
            if rng.random() < 0.25:
                events.append({"round": r + 1, "event": "rollback", "client": n, "validation": [0.61, 0.58]})
                events.append({"round": r + 1, "event": "freeze", "client": n})
            maps[str(r)] = json.loads(json.dumps(now))
            counts[r] = {n: sum(map(len, now[n].values())) for n in names}
    return (
        {"blocks": dict.fromkeys(block_names, experts), "rounds": maps, "usage": usage, "trained": usage},
        events,
        counts,
    )


def _rounds(able, unable, task_of, algorithm, rounds, rng, counts, memory, tasks):
    lines = []
    skill = {n: rng.gauss(0, 0.06) for n in able}
    for r in range(rounds):
        chosen = sorted(rng.sample(able, min(5, len(able))))
        level = _LEVEL.get(algorithm, 0.6) - 0.35 * math.exp(-r / 5)
        shift = {t: 0.1 - 0.12 * i for i, t in enumerate(tasks)}
        held = counts[max(k for k in counts if k <= r)]
        size = 0 if algorithm == "Standalone" else 1
        entry = {
            n: {
                "train_loss": 1.2 * math.exp(-r / 8),
                "validation": min(1, max(0, level + shift[task_of[n]] + skill[n] + rng.gauss(0, 0.03))),
                "examples": 200,
                "steps": 13,
                "bytes_down": size * (held[n] * 90_000 + 1_400_000),
                "bytes_up": size * (held[n] * 90_000 + 1_405_000),
                "seconds": {"train": 2.0, "evaluate": 0.4},
                "peak_bytes_model": int(min(memory[n] * 0.97, 22e6 + held[n] * 1.6e6)),
                "experts": held[n],
            }
            for n in chosen
        }
        test = None
        if r % 2 == 1 or r == rounds - 1:
            test = {n: min(1, max(0, level + shift[task_of[n]] + skill[n] + rng.gauss(0, 0.01))) for n in able}
        down, up = (sum(e[k] for e in entry.values()) for k in ("bytes_down", "bytes_up"))
        lines.append({
            "round": r, "stage": ("one" if r < 2 else "two") if algorithm == "FedMoE" else "", "selected": chosen,
            "unable": unable, "clients": entry, "test": test, "scores": _scores(test, task_of, tasks),
            "bytes_down": down, "bytes_up": up, "peak_rss_bytes": 812_000_000, "experts_mean": 30.0, "server": {},
            "seconds": {"round": 14.0, "train": 10.0, "evaluate": 3.1 if test else 1.2, "engine": 0.9},
        })  # fmt: skip
    return lines


def _scores(test, task_of, tasks):
    if test is None:
        return None
    by_task = {t: [v for n, v in test.items() if task_of[n] == t] for t in tasks}
    scores = {t: sum(v) / len(v) for t, v in by_task.items() if v}
    return scores | {"mean": sum(scores.values()) / len(scores)}


def _summary(algorithm, lines, names, task_of, memory, unable, structure, blocks, tasks):
    last = lines[-1]
    maps = structure["rounds"]
    final = maps[max(maps, key=int)]
    peaks: dict[str, int] = {}
    for line in lines:
        for n, e in line["clients"].items():
            peaks[n] = max(peaks.get(n, 0), e["peak_bytes_model"])
    mean = lambda m: sum(sum(map(len, b.values())) for b in m.values()) / len(m)  # noqa: E731
    sparse = algorithm in ("FedMoE", "RandomMoE")
    return {
        "algorithm": algorithm,
        "rounds": len(lines),
        "tasks": {
            t: {"metric": metric, "score": last["scores"].get(t), "clients": sum(task_of[n] == t for n in last["test"])}
            for t, metric in tasks.items()
        },
        "mean": last["scores"]["mean"],
        "clients": {
            n: {"task": task_of[n], "test": last["test"].get(n), "memory_bytes": int(memory[n]),
                "experts": [len(b) for b in final[n].values()] if sparse else [16] * blocks,
                "peak_bytes_model": None if n in unable else peaks.get(n), "reason": unable.get(n)}
            for n in names
        },
        "coverage": f"{len(names) - len(unable)}/{len(names)}",
        "bytes_down": sum(line["bytes_down"] for line in lines),
        "bytes_up": sum(line["bytes_up"] for line in lines),
        "seconds": {
            "total": sum(line["seconds"]["round"] for line in lines),
            **{k: sum(line["seconds"][k] for line in lines) for k in ("train", "evaluate", "engine")},
        },
        "peak_rss_bytes": 812_000_000,
        "experts": {"start": mean(maps["0"]), "end": mean(final)} if sparse else None,
    }  # fmt: skip


def images(page, theme="light"):
    """The SVG images of a theme, as texts."""
    name = {"light": "src", "dark": "srcset"}[theme]
    found = re.findall(rf' {name}="data:image/svg\+xml;base64,([^"]*)"', page)
    return [base64.b64decode(image).decode() for image in found]
