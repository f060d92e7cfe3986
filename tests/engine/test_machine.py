"""Property 18: clients that come and go, answer late, twice or wrongly, and a server that crashes and starts again, in
any order. After every step the ledger adds up, committed rounds count upwards one by one, and the model and every
client's state are the sums of what was accepted in them."""

import dataclasses
import itertools
import json
import math
from collections import Counter

import loopback
import runs
import tiny
import torch
import toy
from flwr.app import Array
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

import consilium.engine.flower as flower
from consilium.core import Algorithm, Payload, Sampling, derive_seed
from consilium.engine.checkpoint import ClientStore, load_checkpoint, save_checkpoint
from consilium.engine.flower.records import STYPE, to_record
from consilium.experiment import Wire, to_json
from consilium.prepare import Prepared

Algorithm.registry.pop("Toy", None)  # the tests over the registry are not to find it
NAMES = ["site-0", "site-1", "site-2"]
FAULTS = ["silent", "crashing", "lost", "twice", "nan", "garbage", "old", "away"]
_number = itertools.count()


def spoilt(kind, content):
    """A reply that is not finite, is no payload, or is of another round."""
    if kind == "nan":
        bad = Payload({"params": {"w": torch.full((50,), math.nan)}})
        content["payload"]["params"] = to_record(bad, {})["payload"]["params"]
    elif kind == "garbage":
        content["payload"]["params"] = Array("uint8", (3,), STYPE, b"abc")
    else:
        content["engine"]["round"] = 0


class Rounds(RuleBasedStateMachine):
    experiment, root, seen = None, None, None  # of the test

    def __init__(self):
        super().__init__()
        self.folder = self.root / str(next(_number))
        self.folder.mkdir(parents=True)
        self.grid = loopback.Loopback([{"partition-id": i, "num-partitions": 3} for i in (2, 0, 1)])
        self.total, self.own = torch.zeros(50), {}
        self.committed, self.last = 0, None
        self.start()

    def start(self):
        """The server's process begins, with nothing but what is on disk."""
        prepared = Prepared.of(self.experiment)
        found = load_checkpoint(self.folder / "checkpoints")
        if found:
            prepared.server.restore(found.server)
        assert (found.round if found else 0) == self.committed
        store = ClientStore(self.folder / "clients", found.versions if found else {})
        told = {
            "experiment": json.dumps(to_json(self.experiment)), "heads": json.dumps(prepared.setup.heads), "run": "",
            "model": "", "folder": str(store.folder), "seed": 0,
        }  # fmt: skip
        roster = flower.Roster(self.grid, NAMES, poll=0.002)
        self.engine = flower.FlowerEngine(
            prepared.server, prepared.infos, roster, store, self.experiment.wire, told, self.folder,
            sampling=self.experiment.sampling,
        )  # fmt: skip

    @rule(faults=st.lists(st.sampled_from(["well", *FAULTS]), min_size=3, max_size=3))
    def weather(self, faults):
        """What becomes of each of the three clients from now on."""
        for faulty in (self.grid.silent, self.grid.crashing, self.grid.lost, self.grid.twice, self.grid.away):
            faulty.clear()
        self.grid.spoil.clear()
        for number, fault in enumerate(faults, 100):
            if fault == "away":
                self.grid.away.add(number)
            elif fault in ("nan", "garbage", "old"):
                self.grid.spoil["train", number] = lambda content, fault=fault: spoilt(fault, content)
            elif fault != "well":
                getattr(self.grid, fault).add(("train", number))

    @rule(crashes=st.booleans())
    def round(self, crashes):
        """One round, committed if enough have answered, unless the server's process ends before that."""
        number = self.committed + 1
        self.last = record = self.engine.round(number, test=False)
        self.seen.update(key for key, n in record["ledger"].items() if n)
        self.seen[f"{record['ledger']['ok']} ok"] += not crashes
        if crashes:
            self.start()
        elif not record["abandoned"]:
            save_checkpoint(self.folder / "checkpoints", number, self.engine.server.state(), self.engine.store)
            self.committed = number
            for client in sorted(c for c, told in record["clients"].items() if not told["rejected"]):
                rng = torch.Generator().manual_seed(derive_seed(0, "client", number, client))
                self.own[client] = self.own.get(client, torch.zeros(50)) + torch.rand(50, generator=rng)
                self.total = self.total + self.own[client]

    @rule()
    def crashes(self):
        self.start()

    @invariant()
    def the_ledger_adds_up(self):
        if self.last:
            told, record = self.last["ledger"], self.last
            assert told["selected"] == told["ok"] + told["error"] + told["rejected"] + told["missing"] == 3
            assert bool(record["abandoned"]) == (told["ok"] < self.experiment.sampling.min_clients)
            assert json.loads(json.dumps(record, allow_nan=False)) == record

    @invariant()
    def the_model_is_the_sum_of_what_counted(self):
        assert torch.equal(self.engine.server.params["w"], self.total)
        found = {c: self.engine.store.load(c).params["own"] for c in self.engine.store.versions}
        assert found.keys() == self.own.keys() and all(torch.equal(found[c], self.own[c]) for c in found)


def test_whatever_happens_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setitem(Algorithm.registry, "Toy", toy.Toy)
    made = runs.experiment(
        runs.table(tmp_path), toy.Toy(), model=tiny.source(num_experts=4), sampling=Sampling(3, min_clients=2),
        wire=Wire(deadline=0.05),
    )  # fmt: skip
    data = made.data.load(0)  # once
    monkeypatch.setattr(type(made.data), "load", lambda self, seed: data)
    monkeypatch.setattr(Rounds, "experiment", dataclasses.replace(made, engine="flower"))
    monkeypatch.setattr(Rounds, "root", tmp_path / "machine")
    monkeypatch.setattr(Rounds, "seen", Counter())
    run_state_machine_as_test(Rounds, settings=settings(max_examples=25, stateful_step_count=16))
    happened = {"error", "rejected", "missing", "late", "duplicate", "0 ok", "1 ok", "3 ok"}
    assert all(Rounds.seen[what] for what in happened), Rounds.seen
