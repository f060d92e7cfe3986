"""Seconds and bytes of a round over Flower, and the server's memory: our engine against stock Flower FedAvg.

    python benchmarks/flower.py --sizes 1,10,100,400 --stock 400
    python benchmarks/flower.py --sizes 100,400 --stock 400 --tensor 1000 --out benchmarks/results/flower_large.json

A SuperLink and SuperNodes as processes on loopback, without TLS for both. Per size (MB per client and direction) and
round, the server sends the model and every client answers with random numbers of its own, so nothing can be stored
once for two. Ours: one blob per payload group, replies merged one at a time. Stock: `FedAvg` with one array per
tensor. Both in one run, ours first, which leaves nothing of stock's in the server's memory. That is the ServerApp's own
(anonymous, looked at every 10 ms; what it maps of files the system can have back) above what it is before the side's
first round, libraries and all.
"""

import argparse
import contextlib
import functools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from consilium.addresses import Address
from consilium.core import ClientInfo, Payload, Server
from consilium.deployment import child, flower_environment, listening, program
from consilium.engine.checkpoint import ClientStore
from consilium.engine.flower import FlowerEngine, Roster
from consilium.engine.flower import server_app as flower_app
from consilium.engine.flower.records import from_record, stamp, to_record
from consilium.experiment import Wire
from consilium.params import WeightedMean

client_app = ClientApp()


def weights(megabytes: int, kilobytes: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    numbers = kilobytes * 1000 // 4
    return {f"t{i:05d}": torch.randn(numbers, generator=generator) for i in range(megabytes * 1000 // kilobytes)}


def own(context, number):
    """A generator that no other client and round has."""
    return torch.Generator().manual_seed(1000 * int(context.node_config["partition-id"]) + number)


@client_app.query("name")
def name(message: Message, context: Context) -> Message:
    return Message(
        RecordDict({"engine": ConfigRecord({"partition": int(context.node_config["partition-id"])})}), reply_to=message
    )


@client_app.train()
def train(message: Message, context: Context) -> Message:
    if "engine" in message.content:
        payload, told = from_record(message.content)
        generator = own(context, int(told["round"]))
        new = {key: torch.randn(t.shape, generator=generator) for key, t in payload.group("params").items()}
        reply = to_record(
            Payload({"params": new}, {"num_examples": 1}),
            {"rejected": "", "kept": False, "seconds": 0.0, **stamp(told)},
        )
        return Message(reply, reply_to=message)
    generator = own(context, 500 + int(message.content["config"]["server-round"]))
    held = message.content["arrays"].to_torch_state_dict()
    new = {key: torch.randn(t.shape, generator=generator) for key, t in held.items()}
    return Message(
        RecordDict({"arrays": ArrayRecord(new), "metrics": MetricRecord({"num-examples": 1})}), reply_to=message
    )


class Model(Server):
    def __init__(self, params):
        self.params = params

    def configure(self, round, clients):
        return {client.id: Payload({"params": self.params}) for client in clients}

    def aggregate(self, round, replies):
        mean = WeightedMean()
        for _, reply in replies:
            mean.add(reply.group("params"), 1)
        self.params = mean.mean(self.params)
        return {}

    def deliver(self, client):
        return Payload({"params": self.params})


def own_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


def measured(work):
    peak, done = [own_bytes()], threading.Event()

    def look():
        while not done.wait(0.01):
            peak[0] = max(peak[0], own_bytes())

    watcher = threading.Thread(target=look)
    watcher.start()
    start = time.perf_counter()
    try:
        result = work()
    finally:
        seconds = time.perf_counter() - start
        done.set()
        watcher.join()
    return {"seconds": seconds, "peak_bytes": peak[0]}, result


def serve(grid: Grid, config: dict) -> None:
    clients, rounds = int(config["clients"]), int(config["rounds"])
    infos = [ClientInfo(f"c{i}", 1, "none") for i in range(clients)]
    roster = Roster(grid, [info.id for info in infos], poll=0.5)
    while len(roster.nodes()) < clients:
        time.sleep(0.5)
    sizes, kilobytes = [int(text) for text in str(config["sizes"]).split(",")], int(config["tensor"])
    results, base = [], own_bytes()

    def told(engine: str, size: int, number: int, crossed: int, spent: dict) -> None:
        results.append({"engine": engine, "megabytes": size, "round": number, **spent, "base_bytes": base,
                        "bytes": crossed})  # fmt: skip
        Path(str(config["out"])).write_text(json.dumps(results, indent=1))

    for size in sizes:
        server = Model(weights(size, kilobytes, torch.Generator().manual_seed(size)))
        known = {"seed": 0, "experiment": "", "run": ""}
        with tempfile.TemporaryDirectory() as folder:
            engine = FlowerEngine(
                server, infos, roster, ClientStore(Path(folder)), Wire(cap="4GB"), known, Path(folder)
            )
            for number in range(1, rounds + 1):
                spent, record = measured(functools.partial(engine.round, number, test=False))
                told("ours", size, number, record["bytes_down"] + record["bytes_up"], spent)
        server.params = {}
    base = own_bytes()
    for size in (size for size in sizes if size <= int(config["stock"])):
        params = weights(size, kilobytes, torch.Generator().manual_seed(size))
        for number in range(1, rounds + 1):
            strategy = FedAvg(1.0, 0.0, min_train_nodes=clients, min_available_nodes=clients)
            once = functools.partial(strategy.start, grid, num_rounds=1, timeout=3600)
            spent, _ = measured(lambda s=once, p=params: s(initial_arrays=ArrayRecord(p)))
            told("stock", size, number, 2 * clients * sum(t.nbytes for t in params.values()), spent)


server_app = flower_app(serve)


def run(options) -> None:
    home = Path(tempfile.mkdtemp(prefix="flower-benchmark-"))
    app, port = home / "app", options.port
    app.mkdir()
    shutil.copy(__file__, app / "bench_app.py")
    config = {"clients": options.clients, "rounds": options.rounds, "sizes": options.sizes, "stock": options.stock,
              "tensor": options.tensor, "out": str(options.out.absolute())}  # fmt: skip
    (app / "pyproject.toml").write_text(
        '[project]\nname = "bench"\nversion = "1.0.0"\nlicense = "Apache-2.0"\ndependencies = []\n'
        '[tool.flwr.app]\npublisher = "consilium"\n'
        '[tool.flwr.app.components]\nserverapp = "bench_app:server_app"\nclientapp = "bench_app:client_app"\n'
        "[tool.flwr.app.config]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items())
    )
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "run"\n[superlink.run]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    environment = flower_environment(home)
    with contextlib.ExitStack() as stack:
        link = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port),
                "--database", str(home / "state.db"), "--disable-runtime-dependency-installation"]  # fmt: skip
        process = stack.enter_context(child(link, environment, home / "superlink.log"))
        listening(process, Address("127.0.0.1", port), home / "superlink.log")
        for i in range(options.clients):
            node = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}", "--host", "127.0.0.1",
                    "--port", str(port + 1 + i), "--node-config", f"partition-id={i}"]  # fmt: skip
            stack.enter_context(child(node, flower_environment(home / f"node-{i}"), home / f"node-{i}.log"))
        subprocess.run([program("flwr"), "run", str(app), "run", "--stream"], env=environment, check=True)
    rows = json.loads(options.out.read_text())
    if len(rows) != (expected := write(rows, options)):
        sys.exit(f"only {len(rows)} of {expected} rounds came to their end, see {home}")
    shutil.rmtree(home)


def write(rows: list[dict], options) -> int:
    """The table as Markdown beside the numbers. Returns how many rounds there should be."""
    sizes = [int(text) for text in options.sizes.split(",")]
    lines = [
        "# A round over Flower: our engine against stock FedAvg",
        "",
        f"Made by `python benchmarks/flower.py --sizes {options.sizes} --stock {options.stock} --tensor",
        f"{options.tensor}`: {options.clients} clients on loopback, every payload random numbers of its own. Stock:",
        f"FedAvg, one array per tensor of {options.tensor} kB. Seconds: mean [least, most] over rounds. Server: what",
        "its process holds at most beside what it holds before the side's first round; three models are the new one's",
        "sums in float64 and the old one.",
        "",
        "| MB per client and way | side | s per round | stock / ours | MB crossed | server MB | models + 300 MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in sizes:
        sides = {name: [r for r in rows if (r["engine"], r["megabytes"]) == (name, size)] for name in ("ours", "stock")}
        seconds = {name: [row["seconds"] for row in held] for name, held in sides.items()}
        for name, held in sides.items():
            if not held and (name == "ours" or size <= options.stock):
                lines.append(f"| {size} | {name} | no round came to its end | - | - | - | {3 * size + 300} |")
            if held:
                ratio = (
                    statistics.mean(seconds["stock"]) / statistics.mean(seconds["ours"]) if seconds["stock"] else None
                )
                more = max(row["peak_bytes"] - row["base_bytes"] for row in held) / 1e6
                lines.append(
                    f"| {size} | {name} | {statistics.mean(seconds[name]):.1f} [{min(seconds[name]):.1f}, "
                    f"{max(seconds[name]):.1f}] | {f'{ratio:.1f}' if ratio and name == 'ours' else '-'} "
                    f"| {held[0]['bytes'] / 1e6:.1f} | {more:.0f} | {3 * size + 300} |"
                )
    options.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return options.rounds * (len(sizes) + sum(size <= options.stock for size in sizes))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1,10,100", help="MB per client and direction, ascending")
    parser.add_argument("--stock", type=int, default=10, help="largest size that stock FedAvg is measured at")
    parser.add_argument("--tensor", type=int, default=64, help="kB of one tensor of the model")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--port", type=int, default=18000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/flower.json")
    run(parser.parse_args())
