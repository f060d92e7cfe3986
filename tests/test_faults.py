"""Faults of a deployment with real processes, minutes each. SCAFFOLD: states at the sites and at the server."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import sqlite3
import time

import loopback
import psutil
import pytest
import runs
import tiny
from deployments import Deployment, free_port, rounds
from network import Namespaces, Proxy, why_no_namespaces
from processes import until

pytest.importorskip("flwr")

import consilium.engine.flower as flower
from consilium.algorithms.scaffold import SCAFFOLD
from consilium.certificates import certificates
from consilium.core import Sampling
from consilium.experiment import Wire, to_json
from consilium.loop import run, serve

pytestmark = pytest.mark.slow

PATIENCE = float(os.environ.get("CONSILIUM_TEST_PATIENCE", "1"))
NAMES = ["site-0", "site-1", "site-2"]


class Sites(Deployment):
    """Three sites with a file of their own each, and one machine that has it all."""

    def __init__(self, folder, deadline, length, hosts=()):
        super().__init__(folder)
        certificates(folder / "keys", hosts, NAMES)
        data = runs.table(folder)
        wire = Wire(deadline=deadline)
        self.made = runs.experiment(
            data, SCAFFOLD(), model=tiny.source(num_experts=4), sampling=Sampling(3), rounds=length, wire=wire,
            evaluate_every=length,
        )  # fmt: skip
        (folder / "experiment.json").write_text(json.dumps(to_json(self.made)))
        for name in NAMES:
            rows = [line for line in data.read_text().splitlines(keepends=True) if name in line]
            (folder / f"{name}.jsonl").write_text("".join(rows))

    def site(self, name):
        return self.client("experiment.json", "--data.path", f"{name}.jsonl", name=name)[0]

    def serving(self, **where):
        return self.server("experiment.json", sites=NAMES, **where)[0]

    def after(self, number, process):
        """Wait until a round is in the record."""

        def there():
            found = rounds(self.folder / "runs/short")
            return found if len(found) >= number else None

        return until(there, 600 * PATIENCE, f"round {number}", process)


def replayed(made, missing, folder):
    """Weights of the same run in this process, with the same clients missing in the same rounds."""
    grid = loopback.Loopback([])
    for name in NAMES:
        own = runs.experiment(folder / f"{name}.jsonl", model=made.model)
        flower.save_site(folder / f"again-{name}/site.json", name, own)
        grid.configs.append({"site": str(folder / f"again-{name}/site.json")})

    class Missing:
        def started(self, *_):
            self.rounded({"round": 0}, [])

        def step(self, *_):
            pass

        def rounded(self, record, _):
            now = missing[record["round"]] if record["round"] < len(missing) else {}
            grid.silent = {("train", 100 + NAMES.index(name)) for name in now}

    serve(dataclasses.replace(made, wire=Wire(deadline=0.5)), folder / "again", grid, NAMES, 1.0, Missing())
    return runs.outcome(folder / "again")["summary"]["weights"]


def test_a_site_is_killed_and_comes_back_and_another_stalls(tmp_path):
    """Rounds end by their deadline with the others; nothing that comes late enters a later round."""
    with Sites(tmp_path, deadline=45 * PATIENCE, length=8) as there:
        server, sites = there.serving(), {name: there.site(name) for name in NAMES}
        there.after(1, server)
        sites["site-0"].family.signal(signal.SIGKILL)
        records = there.after(2, server)
        assert set(records[1]["missing"]) <= {"site-0"}
        there.after(3, server)
        sites["site-0"] = there.site("site-0")

        def back():
            found = rounds(tmp_path / "runs/short")
            return found if len(found) > 3 and "site-0" in found[-1]["clients"] else None

        records = until(back, 900 * PATIENCE, "site-0 again", server)
        sites["site-1"].family.signal(signal.SIGSTOP)
        stalled = len(records)
        there.after(stalled + 2, server)
        sites["site-1"].family.signal(signal.SIGCONT)
        there.finished(server, 900 * PATIENCE)
    records = rounds(tmp_path / "runs/short")
    missing = [{**record["missing"], **record["errors"]} for record in records]
    assert any("site-0" in m for m in missing[1:4]) and any("site-1" in m for m in missing[stalled:])
    assert all("site-2" not in m for m in missing)
    for record in records:
        assert sorted([*record["clients"], *record["missing"], *record["errors"]]) == record["selected"] == NAMES
        assert record["seconds"]["round"] < 2 * 45 * PATIENCE + 60 * PATIENCE
    assert runs.outcome(tmp_path / "runs/short")["summary"]["weights"] == replayed(there.made, missing, tmp_path)


def test_the_server_is_killed_and_goes_on(tmp_path):
    """No round counts twice, and the weights are those of one machine."""
    with Sites(tmp_path, deadline=600 * PATIENCE, length=4) as there:
        server, _sites = there.serving(), [there.site(name) for name in NAMES]
        there.after(2, server)
        server.family.signal(signal.SIGKILL)
        server.wait()
        there.finished(there.serving(), 1200 * PATIENCE)
    over = runs.outcome(tmp_path / "runs/short")
    assert [m["round"] for m in over["metrics"]] == [1, 2, 3, 4] and not any(m["missing"] for m in over["metrics"])
    run(there.made, tmp_path / "local")
    assert over["summary"]["weights"] == runs.outcome(tmp_path / "local")["summary"]["weights"]


def checked(there, folder):
    """Every selected client is accounted for in every round, and what counted is what one machine makes of it."""
    records = rounds(folder / "runs/short")
    missing = [{**record["missing"], **record["errors"]} for record in records]
    assert [record["round"] for record in records] == list(range(1, there.made.rounds + 1))
    for record in records:
        assert sorted([*record["clients"], *record["missing"], *record["errors"]]) == record["selected"] == NAMES
        assert not any(told["rejected"] for told in record["clients"].values())
    assert runs.outcome(folder / "runs/short")["summary"]["weights"] == replayed(there.made, missing, folder)
    return missing


def one(text):
    """The one process whose command line has this."""

    def found():
        for p in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if text in " ".join(p.cmdline()):
                    return p

    return until(found, 60 * PATIENCE, text)


def test_flowers_processes_are_killed_and_its_database_is_locked(tmp_path):
    """The server's command notices, starts them again, and goes on: no round twice, none lost, the same bits."""
    with Sites(tmp_path, deadline=120 * PATIENCE, length=6) as there:
        server, _sites = there.serving(), [there.site(name) for name in NAMES]
        there.after(1, server)
        with contextlib.closing(sqlite3.connect(tmp_path / "runs/short.flower/state.db", timeout=60)) as database:
            database.execute("BEGIN EXCLUSIVE")
            time.sleep(30)
            database.rollback()
        there.after(len(rounds(tmp_path / "runs/short")) + 1, server)
        one(f"flower-superlink --host 127.0.0.1 --port {there.port}").kill()
        there.after(len(rounds(tmp_path / "runs/short")) + 1, server)
        one(f"flwr-serverapp --runtime-api-address 127.0.0.1:{there.port}").kill()
        there.finished(server, 1200 * PATIENCE)
    assert 2 <= (tmp_path / "01-server.log").read_text().count("starting them again") <= 4  # the lock may end it, too
    checked(there, tmp_path)


def test_an_upload_is_cut_and_the_port_is_full_of_idle_connections(tmp_path):
    """At the first byte, half-way, and just before the end of what a site sends in a round, once for good: a reply is
    merged whole or not at all. Sixty-four others hold connections open and say nothing, or half a word."""
    with Sites(tmp_path, deadline=45 * PATIENCE, length=14) as there:
        server, near = there.serving(), there.port
        until(lambda: "listening on" in (tmp_path / "01-server.log").read_text(), 300 * PATIENCE, "the server", server)

        def back():
            there.after(len(rounds(tmp_path / "runs/short")) + 1, server)
            return "site-0" in rounds(tmp_path / "runs/short")[-1]["clients"]

        with Proxy(near) as proxy, contextlib.ExitStack() as idle:
            there.port = proxy.port
            site = there.site("site-0")
            there.port = near
            _others = [there.site(name) for name in NAMES[1:]]
            there.after(1, server)
            for n in range(64):
                lurker = idle.enter_context(socket.create_connection(("127.0.0.1", near)))
                lurker.sendall(b"\x16\x03\x01" if n % 2 else b"")
            before = proxy.sent
            there.after(2, server)
            whole = proxy.sent - before
            for size in (whole // 2, 0, whole - 1000):
                proxy.cut_after(size)
                until(lambda: proxy.cut, 120 * PATIENCE, f"{size} of {whole} bytes", server)
                if size == whole // 2:
                    site.family.signal(signal.SIGKILL)
                    there.port = proxy.port
                    proxy.heal()
                    there.site("site-0")
                time.sleep(2)
                proxy.heal()
                until(back, 600 * PATIENCE, f"site-0 after {size} bytes", server)
            there.finished(server, 900 * PATIENCE)
    missing = checked(there, tmp_path)
    assert not any(name in m for m in missing for name in NAMES[1:])
    assert any("site-0" in m for m in missing) and "site-0" not in missing[0]


@pytest.mark.parametrize(("seconds", "length"), [(60, 10), (600, 130)], ids=["a minute", "ten minutes"])
def test_a_link_goes_down_and_up(tmp_path, seconds, length):
    """Five seconds nobody notices; through minutes the others go on; then the site is back, never started again."""
    if why := why_no_namespaces():
        pytest.skip(why)
    with Namespaces() as net, Sites(tmp_path, 40 * PATIENCE, length, hosts=[net.address]) as there:
        there.within = net.here
        server = there.serving(listen="0.0.0.0")
        _near = [there.site(name) for name in ("site-0", "site-2")]
        there.host, there.within = net.address, net.there
        _far = there.site("site-1")
        there.after(1, server)
        net.link("down")
        time.sleep(5)
        net.link("up")
        there.after(3, server)
        net.link("down")
        time.sleep(seconds)
        net.link("up")
        records = there.after(4, server)

        def back():
            found = rounds(tmp_path / "runs/short")
            return "site-1" in found[-1]["clients"] and len(found) > len(records)

        until(back, 300 * PATIENCE, "site-1 again", server)
        there.finished(server, 1800 * PATIENCE)
    missing = checked(there, tmp_path)
    assert not any("site-1" in m for m in missing[:2]) and any("site-1" in m for m in missing)
    assert not any(name in m for m in missing for name in ("site-0", "site-2"))


SLOW = """
import sys, time
if any("flwr-serverapp" in word or "flwr-clientapp" in word for word in sys.orig_argv):
    class Slow:
        def find_spec(self, name, path=None, target=None):
            if name == "flwr":
                sys.meta_path.remove(self)
                time.sleep(45)
    sys.meta_path.insert(0, Slow())
"""


def test_programs_that_take_longer_to_start_than_their_tokens_live(tmp_path):
    """Flower's tokens live for 30 s; the server's program and every program of the site take 45 s to be imported.
    No second one is started in their place, and the run ends."""
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow/sitecustomize.py").write_text(SLOW)
    path = os.pathsep.join([str(tmp_path / "slow"), *filter(None, [os.environ.get("PYTHONPATH")])])
    with Sites(tmp_path, deadline=1200 * PATIENCE, length=1) as there:
        at = f"127.0.0.1:{there.port}"
        own = ["--certificates", "keys/site-0", "--server", at, "--state", "state", "--port", free_port()]
        secure = ["--certificates", "keys", "--sites", "site-0", "--address", at, "--wait", "3000"]
        fewer = ["--sampling.clients-per-round", "1"]
        server, _ = there.start(["server", "experiment.json", *fewer, *secure], PYTHONPATH=path)
        _, said = there.start(
            ["client", "experiment.json", "--data.path", "site-0.jsonl", "--name", "site-0", *own], PYTHONPATH=path
        )
        there.finished(server, 2400 * PATIENCE)
        assert "gives up its turn" not in there.logs()
        lines = [line for line in said.read_text().splitlines() if " site-0: " in line]
        assert len(lines) == 4 and "connected" in lines[0] and "trained" in lines[1] and "scores" in lines[2]
    (record,) = rounds(tmp_path / "runs/short")
    assert record["missing"] == {} and list(record["clients"]) == ["site-0"]
