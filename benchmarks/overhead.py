"""What a round costs beside training: judging, merging, recording and saving the replies of 100 clients.

    python benchmarks/overhead.py [--clients 100] [--params 1000000] [--rounds 7]      half a minute; prints a table

Every client answers at once with a model of so many float32 parameters in 20 tensors, and keeps no state. All checks
are on: what is sent is finite, what returns is what was asked for; the mean is in float64; the ledger's line and the
checkpoint are written and synced, as `run` does it. "through bytes" turns every payload into bytes and back, both ways.
Per round: seconds of the processor, which other programs do not change, and of the clock; the least of all rounds.
"""

import argparse
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from consilium.algorithms.fedavg import averaged
from consilium.core import Client, ClientInfo, Payload, Sampling, Server
from consilium.engine.checkpoint import ClientStore, append_json, save_checkpoint
from consilium.engine.local import LocalEngine

TENSORS, REPLIES = 20, 4


class Averaging(Server):
    """FedAvg's rule on plain tensors."""

    def __init__(self, params):
        self.params = params

    def configure(self, round, clients):
        return {client.id: self.deliver(client) for client in clients}

    def aggregate(self, round, replies):
        self.params = averaged(self.params, replies)
        return {}

    def deliver(self, client):
        return Payload({"params": self.params})


class Ready(Client):
    """Has its answers by heart."""

    def __init__(self, replies):
        self.replies = replies

    def train(self, payload, context):
        params = self.replies[int(context.info.id) % len(self.replies)]
        return Payload({"params": params}, {"num_examples": 10, "train_loss": 0.5, "validation": 0.5, "steps": 1})

    evaluate = None


def model(size: int, seed: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {f"layer.{i}.weight": torch.randn(size // TENSORS, generator=rng) for i in range(TENSORS)}


def measure(clients: int, size: int, rounds: int, strict: bool) -> dict[str, tuple[float, float]]:
    """Part -> (processor, clock) seconds of the fastest round."""
    infos = tuple(ClientInfo(f"{i:04d}", 10, "task") for i in range(clients))
    best: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        engine = LocalEngine(
            server=Averaging(model(size, 0)),
            client=Ready([model(size, 1 + i) for i in range(REPLIES)]),
            infos=infos,
            federation=SimpleNamespace(clients=dict.fromkeys(info.id for info in infos)),
            store=ClientStore(root / "clients"),
            seed=0,
            strict=strict,
            sampling=Sampling(clients),
        )
        for number in range(1, rounds + 1):
            times = [(time.process_time(), time.perf_counter())]
            record = engine.round(number, test=False)
            times.append((time.process_time(), time.perf_counter()))
            append_json(root / "metrics.jsonl", record)
            save_checkpoint(root / "checkpoints", number, engine.server.state(), engine.store)
            times.append((time.process_time(), time.perf_counter()))
            assert record["ledger"]["ok"] == clients
            for part, a, b in (("exchange", 0, 1), ("writing", 1, 2), ("round", 0, 2)):
                spent = (times[b][0] - times[a][0], times[b][1] - times[a][1])
                best[part] = tuple(map(min, zip(best.get(part, spent), spent, strict=True)))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag, default in (("--clients", 100), ("--params", 1_000_000), ("--rounds", 7)):
        parser.add_argument(flag, type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{args.clients} clients, {args.params:,} parameters, one thread, torch {torch.__version__}")
    print(f"{'':16} {'part':10} {'processor s':>12} {'clock s':>10}")
    for name, strict in (("in process", False), ("through bytes", True)):
        for part, (cpu, wall) in measure(args.clients, args.params, args.rounds, strict).items():
            print(f"{name:16} {part:10} {cpu:12.3f} {wall:10.3f}", flush=True)


if __name__ == "__main__":
    main()
