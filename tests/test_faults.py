"""Faults of a deployment with real processes, minutes each. SCAFFOLD: states at the sites and at the server."""

import dataclasses
import json
import os
import signal

import loopback
import pytest
import runs
import tiny
from deployments import Deployment, rounds
from processes import until

pytest.importorskip("flwr")

import consilium.engine.flower as flower
from consilium.algorithms.scaffold import SCAFFOLD
from consilium.certificates import certificates
from consilium.core import Sampling
from consilium.experiment import Wire, to_json
from consilium.run import run, serve

pytestmark = pytest.mark.slow

PATIENCE = float(os.environ.get("CONSILIUM_TEST_PATIENCE", "1"))
NAMES = ["site-0", "site-1", "site-2"]


class Sites(Deployment):
    """Three sites with a file of their own each, and one machine that has it all."""

    def __init__(self, folder, deadline, length):
        super().__init__(folder)
        certificates(folder / "keys", [], NAMES)
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

    def serving(self):
        return self.server("experiment.json", sites=NAMES)[0]

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
