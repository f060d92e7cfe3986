"""The ledger of a run's rounds: who is accounted for, which rounds count, who is benched."""

import dataclasses
import io
import itertools
import json
import math
import re

import pytest
import runs
import tiny
import torch
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from consilium.core import Algorithm, Payload, Sampling, Server
from consilium.engine.checkpoint import load_checkpoint
from consilium.engine.judge import BENCH, check_sent, number, tally
from consilium.engine.rounds import ledger
from consilium.errors import BudgetError, ConfigError, ConsiliumError, DataError, ModelError, PayloadError, RoundError
from consilium.escape import one_line
from consilium.experiment import from_json, to_json
from consilium.loop import FAILED, resume, run
from consilium.report import write_report
from consilium.rundir import RunDirectory
from consilium.watch import Terminal

Algorithm.registry.pop("Toy", None)  # the tests over the registry are not to find it
_number = itertools.count()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.table(tmp_path_factory.mktemp("data"))


@pytest.fixture
def faults(monkeypatch):
    """(client, how many times it has been asked, from 1) -> "error", "nan" or an exception, instead of a good reply."""
    found, asked = {}, {}
    real = toy.ToyClient.train

    def train(self, payload, context):
        client = context.info.id
        asked[client] = asked.get(client, 0) + 1
        fault = found.get((client, asked[client]))
        if isinstance(fault, Exception):
            raise fault
        if fault == "error":
            raise DataError("row 3\nhas no label")
        reply = real(self, payload, context)
        lie = {"nan": {"train_loss": math.nan}, "count": {"num_examples": 0}}.get(fault, {})
        return Payload(reply.groups, {**reply.scalars, **lie})

    monkeypatch.setattr(toy.ToyClient, "train", train)
    monkeypatch.setitem(Algorithm.registry, "Toy", toy.Toy)
    found["again"] = asked.clear
    return found


@pytest.fixture
def toys(data):
    return runs.experiment(data, toy.Toy(), sampling=Sampling(3), rounds=4)


def lines(folder, name="metrics"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


# --- the equation -----------------------------------------------------------------------------------------------------


@settings(max_examples=10)
@given(st.data())
def test_whatever_happens_every_selected_client_is_accounted_for_once(data):
    """Six rounds of six clients that do well, fail, lie; the model is the sum of what was accepted in rounds that
    count, a client's own sum of what it did in rounds that counted it."""
    setup = tiny.setup(clients_per_round=4)
    chosen = Sampling(4, min_clients=data.draw(st.integers(1, 3)))
    server = toy.ToyServer(dataclasses.replace(setup, sampling=chosen))
    plans = iter(lambda: data.draw(st.sampled_from(["ok", "ok", "error", "nan", "count", "shape"])), None)
    accepted = {}

    class Moody(toy.ToyClient):
        def train(self, payload, context):
            plan = next(plans)
            if plan == "error":
                raise DataError("no data")
            reply = super().train(payload, context)
            if plan == "ok":
                accepted[context.info.id] = reply.group("params")["w"]
            spoilt = {"nan": torch.full((50,), math.nan), "shape": torch.ones(1)}.get(plan, reply.group("params")["w"])
            return Payload({"params": {"w": spoilt}}, {"num_examples": 0 if plan == "count" else 1})

    engine = tiny.engine(server, Moody(), setup, tiny.root / f"ledger-{next(_number)}")
    engine.sampling = chosen
    total = torch.zeros(50)
    for n in range(1, 7):
        accepted.clear()
        record = engine.round(n, test=False)
        told = record["ledger"]
        assert told["selected"] == told["ok"] + told["error"] + told["rejected"] + told["missing"] == 4
        assert told["ok"] == len(accepted) and told["sent"] == 4 and told["late"] == told["duplicate"] == 0
        assert bool(record["abandoned"]) == (told["ok"] < chosen.min_clients)
        if not record["abandoned"]:
            for w in (accepted[client] for client in sorted(accepted)):
                total = total + w
            assert all(engine.store.versions[client] == n for client in accepted)
        assert torch.equal(server.params["w"], total)
        assert json.loads(json.dumps(record, allow_nan=False)) == record


RECORD = {
    "round": 3, "selected": ["a", "b", "c", "d"], "bytes_sent": {"a": 10, "b": 20, "c": 30}, "errors": {"c": "x"},
    "missing": {"d": "y"}, "late": {"d": [1, 2]}, "duplicate": {"a": 2},
    "clients": {"a": {"rejected": None, "bytes_up": 5}, "b": {"rejected": "bad", "bytes_up": 7}},
}  # fmt: skip


def test_the_ledger_by_hand():
    assert ledger(RECORD) == {
        "selected": 4, "sent": 3, "ok": 1, "error": 1, "rejected": 1, "missing": 1,
        "late": 2, "duplicate": 2, "bytes": 10 + 20 + 30 + 5 + 7,
    }  # fmt: skip


@pytest.mark.parametrize("change", [{"missing": {}}, {"errors": {"c": "x", "a": "z"}}, {"missing": {"e": "y"}}])
def test_a_client_that_is_not_accounted_for_or_twice_is_a_fault(change):
    with pytest.raises(RuntimeError, match=r"round 3 selected \['a', 'b', 'c', 'd'\], accounted for are"):
        ledger(RECORD | change)


def test_a_server_that_does_not_take_all_replies_is_told(toys, faults, tmp_path, monkeypatch):
    monkeypatch.setattr(toy.ToyServer, "aggregate", lambda self, round, replies: {"first": float(len(next(replies)))})
    with pytest.raises(RuntimeError, match="accounted for are"):
        run(toys, tmp_path / "run")


def test_a_clients_own_error_is_its_own_and_any_other_ends_the_run(toys, faults, tmp_path):
    faults["site-1", 2] = "error"
    run(toys, tmp_path / "run")
    second = lines(tmp_path / "run")[1]
    assert second["errors"] == {"site-1": "DataError: row 3 has no label"} and set(second["clients"]) == {
        "site-0",
        "site-2",
    }
    faults["again"]()
    for error in (ZeroDivisionError("oops"), ConfigError("oops"), ModelError("oops")):
        faults["site-1", 2] = error
        faults["again"]()
        with pytest.raises(type(error), match="oops"):
            run(toys, tmp_path / type(error).__name__)


def test_a_client_that_cannot_be_scored_is_untested(toys, faults, tmp_path, monkeypatch):
    def evaluate(self, payload, context):
        if context.info.id == "site-2":
            raise BudgetError("too small")
        return Payload(scalars={"score": 2.0 if context.info.id == "site-1" else 0.5, "perplexity": math.inf})

    monkeypatch.setattr(toy.ToyClient, "evaluate", evaluate)
    run(dataclasses.replace(toys, rounds=1), tmp_path / "run")
    (record,) = lines(tmp_path / "run")
    assert record["untested"] == {"site-1": "its score is 2.0", "site-2": "BudgetError: too small"}
    assert record["test"] == {"site-0": 0.5} and record["perplexity"] == {"site-0": None}


# --- rounds that do not count -----------------------------------------------------------------------------------------


def test_an_abandoned_round_is_tried_again_and_the_end_is_the_same(toys, faults, tmp_path):
    run(toys, tmp_path / "whole")
    faults["again"]()
    faults["site-0", 2] = faults["site-1", 2] = "error"
    run(dataclasses.replace(toys, sampling=Sampling(3, min_fraction=0.5)), tmp_path / "run")
    told = lines(tmp_path / "run")
    assert [(line["round"], bool(line["abandoned"])) for line in told] == [
        (1, False), (2, True), (2, False), (3, False), (4, False)
    ]  # fmt: skip
    assert "1 of 3 selected clients counted, needed are 2" in told[1]["abandoned"]
    assert [record["round"] for record in RunDirectory(tmp_path / "run").rounds()] == [1, 2, 3, 4]
    whole, over = runs.outcome(tmp_path / "whole"), runs.outcome(tmp_path / "run")
    assert over["summary"] == whole["summary"] and over["events"] == whole["events"]
    assert over["structure"] == whole["structure"]


def test_three_in_a_row_stop_the_run_which_can_be_resumed(toys, faults, tmp_path):
    run(toys, tmp_path / "whole")
    faults["again"]()
    faults |= {(site, n): "error" for site in ("site-0", "site-1", "site-2") for n in (2, 4, 5, 6)}
    said = r"round 3 was abandoned 3 times in a row: 0 of 3 .*site-0: DataError: row 3 has no label.*resume the run"
    with pytest.raises(RoundError, match=said):
        run(toys, tmp_path / "run")
    assert issubclass(RoundError, ConsiliumError) and FAILED == 3  # which the command line ends with code 2
    assert [p.name for p in sorted((tmp_path / "run/checkpoints").iterdir())] == [
        "round-00001.safetensors",
        "round-00002.safetensors",
    ]
    resume(tmp_path / "run")
    assert [(line["round"], bool(line["abandoned"])) for line in lines(tmp_path / "run")] == [
        (1, False), (2, True), (2, False), *[(3, True)] * 3, (3, False), (4, False)
    ]  # fmt: skip
    whole, over = runs.outcome(tmp_path / "whole"), runs.outcome(tmp_path / "run")
    assert over["summary"] == whole["summary"] and over["events"] == whole["events"]


def test_states_of_a_round_that_did_not_count_are_removed_and_those_that_do_are_kept(toys, faults, tmp_path):
    """site-2 takes part in round 1 alone; its state of an abandoned round 2 must not pass for it."""
    faults |= {("site-0", 2): "error", ("site-2", 3): "nan", ("site-2", 4): "nan", ("site-2", 5): "error"}
    faults["site-1", 2] = "error"
    run(dataclasses.replace(toys, sampling=Sampling(3, min_clients=2)), tmp_path / "run")
    kept = {site: sorted(p.name for p in (tmp_path / f"run/clients/{site}").iterdir()) for site in ("site-0", "site-2")}
    assert kept["site-0"] == ["round-00003.safetensors", "round-00004.safetensors"]
    assert kept["site-2"] == ["round-00001.safetensors"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"min_clients": 0}, "min_clients is 0; it must be at least 1"), ({"min_clients": 6}, "min_clients is 6"),
     ({"min_fraction": 1.1}, "min_fraction is 1.1"), ({"min_fraction": math.nan}, "min_fraction is nan")],
)  # fmt: skip
def test_a_quorum_that_cannot_be(settings, said):
    with pytest.raises(ConfigError, match=said):
        Sampling(5, **settings)


def test_a_quorum_of_more_clients_than_there_are(toys, tmp_path):
    with pytest.raises(ConfigError, match=r"sampling\.min_clients is 4, there are 3 clients"):
        run(dataclasses.replace(toys, sampling=Sampling(5, min_clients=4)), tmp_path / "run")


@pytest.mark.parametrize(
    ("least", "share", "chosen", "quorum"), [(1, 0, 5, 1), (2, 0.5, 5, 3), (1, 0.6, 5, 3), (1, 1, 7, 7)]
)
def test_quorum_by_hand(least, share, chosen, quorum):
    assert Sampling(5, min_clients=least, min_fraction=share).quorum(chosen) == quorum


def test_a_saved_experiment_with_the_quorum_where_it_was(toys, faults):
    saved = to_json(toys)
    saved["wire"]["quorum"] = 1
    assert from_json(saved) == toys
    saved["wire"]["quorum"] = 2
    with pytest.raises(ConfigError, match="quorum"):
        from_json(saved)


# --- benched ----------------------------------------------------------------------------------------------------------


def test_rejected_three_times_in_a_row_is_not_selected_again_also_after_resuming(toys, faults, tmp_path):
    """site-1's third reply is good, and counts its rejections anew; an error in between does not."""
    faults |= {("site-1", n): "nan" for n in (1, 2, 4, 5, 7, 8)} | {("site-1", 6): "error"}
    longer = dataclasses.replace(toys, rounds=9)

    class Stop(Terminal):
        def rounded(self, record, events):
            super().rounded(record, events)
            if record["round"] == 7:
                raise KeyboardInterrupt

    console = Console(file=io.StringIO(), width=120)
    with pytest.raises(KeyboardInterrupt), Stop(console) as follower:
        run(longer, tmp_path / "run", follower)
    resume(tmp_path / "run")
    told = lines(tmp_path / "run")
    assert [line["selected"] for line in told] == [["site-0", "site-1", "site-2"]] * 7 + [["site-0", "site-2"]] * 2
    assert [line["benched"] for line in told] == [[]] * 7 + [["site-1"]] * 2
    benched = [event for event in lines(tmp_path / "run", "events") if event["event"] == "benched"]
    reason = "train_loss is nan; it must be a finite number that a float32 can hold"
    assert benched == [{"round": 7, "client": "site-1", "reason": reason, "event": "benched"}]
    assert f"site-1 benched: {reason}" in console.file.getvalue()


def test_benched_in_a_round_that_is_abandoned(toys, faults, tmp_path):
    """All three attempts fail for one client; the run stops, and goes on without it."""
    faults |= {("site-1", n): "nan" for n in (2, 3, 4)}
    strict = dataclasses.replace(toys, sampling=Sampling(3, min_fraction=1.0))
    with pytest.raises(RoundError, match="2 of 3 selected clients counted, needed are 3"):
        run(strict, tmp_path / "run")
    resume(tmp_path / "run")
    told = list(RunDirectory(tmp_path / "run").rounds())
    assert [line["selected"] for line in told] == [["site-0", "site-1", "site-2"]] + [["site-0", "site-2"]] * 3
    assert len([event for event in lines(tmp_path / "run", "events") if event["event"] == "benched"]) == 1


def test_nobody_is_left(toys, faults, tmp_path):
    faults |= {(site, n): "count" for site in ("site-0", "site-1", "site-2") for n in (1, 2, 3)}
    with pytest.raises(RoundError, match="abandoned 3 times in a row"):
        run(toys, tmp_path / "run")
    with pytest.raises(RoundError, match="nobody is left to train: benched are site-0, site-1, site-2"):
        resume(tmp_path / "run")


@pytest.mark.parametrize(("changes", "rate"), [
    ({"fit": {"lr": 1e30}}, "fit.lr 1e+30"), ({"fit": {"head_lr": 7.0}}, "fit.head_lr 7.0"), ({}, "fit.lr 0.001"),
], ids=str)  # fmt: skip
def test_training_that_diverges_everywhere_is_not_tried_again(toys, faults, tmp_path, changes, rate):
    """The round is recorded once as abandoned; the error names the learning rate that is furthest from its default."""
    faults |= {(site, 2): "nan" for site in ("site-0", "site-1", "site-2")}
    made = dataclasses.replace(toys, fit=dataclasses.replace(toys.fit, **changes.get("fit", {})))
    said = rf"the loss became NaN at all 3 clients: the learning rate \({re.escape(rate)}\) is probably too high"
    with pytest.raises(RoundError, match=said):
        run(made, tmp_path / "run")
    assert [(line["round"], bool(line["abandoned"])) for line in lines(tmp_path / "run")] == [(1, False), (2, True)]


def test_training_that_diverges_at_some_clients_is_tried_again(toys, faults, tmp_path):
    faults |= {(site, 2): "nan" for site in ("site-0", "site-1")}
    run(dataclasses.replace(toys, sampling=Sampling(3, min_clients=2)), tmp_path / "run")
    assert [(line["round"], bool(line["abandoned"])) for line in lines(tmp_path / "run")][:3] == [
        (1, False), (2, True), (2, False)
    ]  # fmt: skip


# --- a state that is not finite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("where", "said"), [
    ("params", r"the server's new state is not finite \(params w\); the state before the round is kept"),
    ("scalar", r"the server's new state is not finite \(scalar size/x\)"),
])  # fmt: skip
def test_a_server_state_that_is_not_finite_is_never_committed(toys, faults, tmp_path, monkeypatch, where, said):
    """Whatever the server half makes of good replies: the round is abandoned, and the last checkpoint stays."""
    real = toy.ToyServer.aggregate

    def aggregate(self, round, replies):
        metrics = real(self, round, replies)
        if round == 3 and where == "params":
            self.params = {"w": self.params["w"] * torch.tensor([math.nan] + [1.0] * (toy.SIZE - 1))}
        return {**metrics, "margin": math.inf}

    state = toy.ToyServer.state
    spoilt = lambda self: Payload(state(self).groups, {**state(self).scalars, "size/x": [1.0, math.inf]})  # noqa: E731
    monkeypatch.setattr(toy.ToyServer, "aggregate", aggregate)
    if where == "scalar":
        monkeypatch.setattr(toy.ToyServer, "state", spoilt)
        monkeypatch.setattr(toy.ToyServer, "restore", lambda self, state: None)
    with pytest.raises(RoundError, match=said):
        run(toys, tmp_path / "run")
    told = lines(tmp_path / "run")
    assert [bool(line["abandoned"]) for line in told] == [False] * 2 * (where == "params") + [True] * 3
    if where == "params":
        assert told[0]["server"]["margin"] is None and told[0]["server"]["sum"] > 0
        found = load_checkpoint(tmp_path / "run/checkpoints")
        assert found.round == 2 and bool(found.server.group("params")["w"].isfinite().all())
        monkeypatch.setattr(toy.ToyServer, "aggregate", real)
        assert resume(tmp_path / "run")["rounds"] == 4


def test_a_run_whose_records_hold_silly_numbers_can_be_ended_and_read(toys, faults, tmp_path):
    """As runs may that were begun before replies were bounded: two rounds of 1.7e308 s have no finite sum."""
    folder = tmp_path / "run"
    run(dataclasses.replace(toys, rounds=2), folder)
    told = lines(folder)
    for line in told:
        line["seconds"] |= {"train": 1.7e308, "round": 1.7e308, "engine": 1.7e308}
        line["clients"]["site-0"]["report"] = {"test before aggregation": 1.7e308}
        line["clients"]["site-1"]["report"] = {"test before aggregation": 1.7e308}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    config = json.loads((folder / "config.json").read_text()) | {"status": "interrupted"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "summary.json").unlink()
    summary = resume(folder)
    assert summary["rounds"] == 2 and 0 <= summary["seconds"]["total"] < 1e4
    silly = {**summary, "seconds": {"total": 1.7e308, "train": 1.7e308, "evaluate": 0.1, "engine": 10**400}}
    (folder / "summary.json").write_text(json.dumps(silly))
    made = write_report([folder], tmp_path / "report.html")
    assert "1.7e+308" not in made.read_text() and "NaN" not in made.read_text()


def test_strikes_by_hand():
    strikes = {}
    for rejected in ("x", "x", None, "x", "x"):
        assert tally(strikes, {"clients": {"a": {"rejected": rejected}}}) == {}
    assert tally(strikes, {"clients": {"b": {"rejected": None}}}) == {}
    assert tally(strikes, {"clients": {"a": {"rejected": "last"}}}) == {"a": "last"} and strikes["a"] == BENCH
    assert tally(strikes, {"clients": {"a": {"rejected": "more"}}}) == {}


# --- words and numbers, and the client's side -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "kind", "is_one"),
    [(1, int, True), (1.0, int, False), (True, int, False), (True, float, False), (1, float, True), (0.5, float, True),
     (math.nan, float, False), (math.inf, float, False), ("1", float, False), (None, float, False), ([1], int, False),
     (-0.1, float, False), (3, int, False)],
)  # fmt: skip
def test_numbers(value, kind, is_one):
    assert number(value, 0, 2, kind) is is_one


def test_what_the_other_side_says_is_one_printable_line():
    assert one_line("a\nb\t c\x1b[31m\x00") == "a b c?[31m?"
    assert len(one_line("x" * 10**7)) == 1000


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_client_does_not_start_from_what_is_not_finite(value):
    check_sent(Payload({"params": {"w": torch.ones(2), "n": torch.ones(2, dtype=torch.int64)}}, {"t": math.inf}))
    with pytest.raises(PayloadError, match="the server sent what no client can start from: control c is not finite"):
        check_sent(Payload({"params": {"w": torch.ones(2)}, "control": {"c": torch.tensor([1.0, value])}}))


def test_a_server_that_has_diverged_is_refused_by_every_client(toys, faults, tmp_path, monkeypatch):
    monkeypatch.setattr(
        toy.ToyServer, "deliver", lambda self, _: Payload({"params": {"w": torch.full((50,), math.nan)}})
    )
    with pytest.raises(RoundError, match=r"site-0: PayloadError: the server sent .* params w is not finite"):
        run(toys, tmp_path / "run")


def test_a_client_checks_names_shapes_dtypes_and_experts_of_its_model():
    setup, context = tiny.setup(), tiny.context()
    params = setup.initial_params()
    key = next(k for k in params if ".experts." in k)
    for bad, error in [
        ({key: params[key].double()}, PayloadError), ({key: params[key][:1]}, ModelError), ({key: None}, ModelError),
    ]:  # fmt: skip
        with pytest.raises(error):
            setup.build({k: t for k, t in (params | bad).items() if t is not None}, context)
    blocks = list(setup.model.counts)
    for ids in ((99,), (-1,), (1, 1), ()):
        with pytest.raises(ModelError):
            setup.build(params, context, dict.fromkeys(blocks, ids))
    small, context = tiny.small_setup("cohort"), tiny.small_context(world="cohort")
    params = small.initial_params()
    with pytest.raises(PayloadError, match=r"is torch\.float64; of this model it must be torch\.float32"):
        small.build({k: t.double() for k, t in params.items()}, context)


def test_an_expectation_is_of_what_was_sent_and_head_rows_may_be_fewer():
    sent = Payload({"params": {"w": torch.ones(3), "head.t.a.bias": torch.ones(())}})
    likes = Server.expects(toy.ToyServer(tiny.setup()), tiny.infos()[0], sent)["params"]
    assert [(like.shape, like.dtype, like.needed) for like in likes.values()] == [
        ((3,), torch.float32, True),
        ((), torch.float32, False),
    ]
