"""Attacks between real processes over TLS: a site against the server, and a server against a site; minutes each.

The attacker is the program of this package with a few lines put in its way: a `sitecustomize` that changes one module
as it is imported in one of Flower's processes.
"""

import contextlib
import json
import os
import socket
import threading

import pytest
import runs
from deployments import rounds
from processes import until
from test_faults import NAMES, PATIENCE, Sites, replayed

pytestmark = pytest.mark.slow

HOOK = """
import sys
if any({program!r} in word for word in sys.orig_argv):
    import importlib.util
    class Hook:
        def find_spec(self, name, path=None, target=None):
            if name != {module!r}:
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            real = spec.loader.exec_module
            def exec_module(module):
                real(module)
                change(module)
            spec.loader.exec_module = exec_module
            return spec
    sys.meta_path.insert(0, Hook())
"""


def changed(folder, program, module, code):
    """The environment in which the module is changed by the code's `change(module)` in processes of the program."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HOOK.format(program=program, module=module) + code)
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


EVIL_SITE = """
import json
def change(client):
    import zstandard
    from flwr.app import Array, ConfigRecord, RecordDict
    from consilium.engine.flower.records import PACKED, STYPE
    honest = client.Message
    def message(content, reply_to):
        told = content.config_records.get("engine", {})
        number = told.get("round")
        if number == 1:
            bomb = zstandard.compress(bytes(20_000_000), 1)
            for i in range(40):
                content["payload"][f"x{i}"] = Array("uint8", (20_000_000,), PACKED, bomb)
        elif number == 2:
            told["seconds"] = content["scalars"]["report/test before aggregation"] = 1.7e308
        elif number == 3:
            empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
            header = json.dumps({f"params/{i}": empty for i in range(200_000)}).encode()
            blob = len(header).to_bytes(8, "little") + header
            content["payload"]["params"] = Array("uint8", (len(blob),), STYPE, blob)
        elif number == 4:
            reason = "\\x1b]0;owned\\x07\\nround 9: forged " + "x" * 2_000_000
            content = RecordDict({"failed": ConfigRecord({"reason": reason})})
        return honest(content, reply_to=reply_to)
    client.Message = message
"""


@contextlib.contextmanager
def storm(port):
    """Connections that are opened and reset at once, again and again, some after half a word of TLS."""
    end = threading.Event()

    def connect():
        while not end.wait(0.05):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as connection:
                connection.sendall(b"\x16\x03\x01")

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def test_a_site_attacks_the_server(tmp_path):
    """Bombs, silly numbers, a huge header and a forged line, in a storm of connections. The honest sites lose nothing,
    and the run has the bits of one in which the liar was absent when it was refused."""
    with Sites(tmp_path, deadline=600 * PATIENCE, length=5) as there:
        server, _honest = there.serving(), [there.site(name) for name in NAMES[1:]]
        environment = changed(tmp_path / "evil", "flwr-clientapp", "consilium.engine.flower.client", EVIL_SITE)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            _liar = there.site(NAMES[0])
        there.after(1, server)
        with storm(there.port):
            there.after(2, server)
        there.finished(server, 2400 * PATIENCE)
        said = (tmp_path / "01-server.log").read_text()
    records = rounds(tmp_path / "runs/short")
    told = [record["clients"].get(NAMES[0]) for record in records]
    assert "group 'x0' was not asked of this client" in told[0]["rejected"]
    assert not told[1]["rejected"] and told[1]["seconds"]["train"] == 0
    assert "header of a blob" in told[2]["rejected"]
    reason = records[3]["errors"][NAMES[0]]
    assert "forged" in reason and len(reason) <= 1000 and reason.isprintable()
    assert not told[4]["rejected"]
    for record in records:
        assert not {*record["missing"], *record["errors"]} & {*NAMES[1:]}
        assert not any(record["clients"][name]["rejected"] for name in NAMES[1:])
    assert "\x1b]0;" not in said and "\nround 9: forged" not in said
    missing = [{NAMES[0]: ""} if i in (0, 2, 3) else {} for i in range(5)]
    over = runs.outcome(tmp_path / "runs/short")
    assert over["status"] == "finished"
    assert over["summary"]["weights"] == replayed(there.made, missing, tmp_path)
    assert sum(path.stat().st_size for path in (tmp_path / "runs").rglob("*") if path.is_file()) < 200_000_000


EVIL_SERVER = """
def change(loop):
    import json, time
    import zstandard
    from pathlib import Path
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
    from consilium.engine.flower.records import PACKED, STYPE
    from consilium.engine.flower.roster import failed
    from consilium.experiment import to_json

    def attack(experiment, folder, grid, sites, *_):
        made = to_json(experiment)
        said = {"protocol": 1, "experiment": json.dumps(made), "heads": "{}", "run": "a" * 32,
                "model": experiment.model.fingerprint}
        told = said | {"client": sites[0], "round": 1, "version": 0, "seed": 0, "cap": "500GB", "reply": "exact",
                       "zstd": False, "deadline": 60.0, "base": "", "hold": False}
        many = json.dumps({**made, "fit": {**made["fit"], "epochs": 10**9}})
        bomb = Array("uint8", (10**9,), PACKED, zstandard.compress(bytes(20_000_000), 1))
        empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        header = json.dumps({f"params/{i}": empty for i in range(600_000)}).encode()
        header = Array("uint8", (0,), STYPE, len(header).to_bytes(8, "little") + header)
        noise = Array("uint8", (8,), STYPE, b"\\xff" * 8)
        attacks = {
            "epochs": ("query.describe", said | {"experiment": many}, None),
            "folder": ("query.describe", said | {"run": "../../owned"}, None),
            "nested": ("query.describe", said | {"experiment": "[" * 100_000}, None),
            "bombs": ("train", told, {f"x{i}": bomb for i in range(40)}),
            "header": ("train", told, {"params": header}),
            "noise": ("train", told, {"params": noise}),
            "honest": ("query.describe", said, None),
        }
        while not (nodes := list(grid.get_node_ids())):
            time.sleep(1)
        for name, (kind, engine, arrays) in attacks.items():
            content = RecordDict({"engine": ConfigRecord({**engine, "nonce": name})})
            if arrays is not None:
                content["payload"], content["scalars"] = ArrayRecord(array_dict=arrays), ConfigRecord({})
            (identifier,) = grid.push_messages([Message(content, dst_node_id=nodes[0], message_type=kind, ttl=3000)])
            while not (replies := list(grid.pull_messages([identifier]))):
                time.sleep(0.5)
            with Path("answers.jsonl").open("a") as out:
                out.write(json.dumps([name, failed(replies[0])]) + "\\n")
        time.sleep(3600)

    loop.serve = attack
"""

ANSWERS = {
    "epochs": "this site allows",
    "folder": "the run's token is",
    "nested": "the server's experiment is no JSON",
    "bombs": "bytes; at most",
    "header": "",
    "noise": "is not a payload",
    "honest": None,
}


def test_a_server_attacks_a_site(tmp_path):
    """Too much work, a folder elsewhere, deep JSON, bombs, headers and noise. The site refuses each in one line, keeps
    nothing of it, and still answers an honest question."""
    with Sites(tmp_path, deadline=600 * PATIENCE, length=1) as there:
        environment = changed(tmp_path / "evil", "flwr-serverapp", "consilium.loop", EVIL_SERVER)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            server = there.server("experiment.json", "--sampling.clients-per-round", "1", sites=NAMES[:1])[0]
        own = ["experiment.json", "--data.path", f"{NAMES[0]}.jsonl", "--max-bytes", "100MB"]
        site, _ = there.client(*own, name=NAMES[0])
        found = tmp_path / "answers.jsonl"

        def answers():
            return dict(map(json.loads, found.read_text().splitlines())) if found.exists() else {}

        until(lambda: len(answers()) == len(ANSWERS), 1800 * PATIENCE, "seven answers", server)
        assert site.poll() is None
    for name, expected in ANSWERS.items():
        answer = answers()[name]
        if expected is None:
            assert answer is None
            continue
        assert expected in answer and len(answer) <= 1100 and answer.isprintable() and str(tmp_path) not in answer
    state = tmp_path / f"state-{NAMES[0]}"
    kept = {path.name for path in state.iterdir()}
    assert kept <= {"site.json", "data.json", "secret", "flower", "a" * 32} and not list(tmp_path.rglob("*owned*"))
    assert sum(p.stat().st_size for p in state.rglob("*") if p.is_file() and "flower" not in p.parts) < 1_000_000
