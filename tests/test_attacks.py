"""An attack between real processes over TLS: a server against a site; minutes.

The attacker is the program of this package with a few lines put in its way: a `sitecustomize` that changes one module
as it is imported in one of Flower's processes.
"""

import json
import os

import pytest
from processes import until
from test_faults import NAMES, PATIENCE, Sites

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


EVIL_SERVER = """
def change(loop):
    import json, time
    import torch
    import zstandard
    from pathlib import Path
    from consilium.core import Payload
    from consilium.engine.codec import encode
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
        zeros = {"w": torch.zeros(5_000_000)}
        bombs = {f"x{i}": zstandard.compress(encode(Payload({f"x{i}": zeros})), 1) for i in range(40)}
        empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        header = json.dumps({f"params/{i}": empty for i in range(600_000)}).encode()
        header = Array("uint8", (0,), STYPE, len(header).to_bytes(8, "little") + header)
        noise = Array("uint8", (8,), STYPE, b"\\xff" * 8)
        attacks = {
            "epochs": ("query.describe", said | {"experiment": many}, None),
            "folder": ("query.describe", said | {"run": "../../owned"}, None),
            "nested": ("query.describe", said | {"experiment": "[" * 100_000}, None),
            "bombs": ("train", told, {k: Array("uint8", (10**9,), PACKED, b) for k, b in bombs.items()}),
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
    "bombs": "the blob of group 'x4' unfolds to 20000",
    "header": "the header of a blob is",
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
