"""An experiment as JSON and back, what a run leaves in its directory, what is refused before anything is written."""

import dataclasses
import json
import math
import types
import typing
from pathlib import Path

import pytest
import runs
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from consilium.algorithms.fedavg import FedAvg
from consilium.algorithms.fedmoe import FedMoE
from consilium.algorithms.fedproto import FedProto
from consilium.algorithms.pfedmoe import pFedMoE
from consilium.algorithms.randommoe import RandomMoE
from consilium.core import Algorithm, Sampling
from consilium.data.arrays import ImageData, TableData
from consilium.data.task import ClientData, Federation, Split, Task
from consilium.data.textfile import TextFileData
from consilium.engine.checkpoint import load_checkpoint
from consilium.errors import BudgetError, ConfigError, ConsiliumError, DataError, ModelError, RoundError
from consilium.experiment import DATA, Experiment, from_json, to_json
from consilium.fit import Fit
from consilium.kinds import DataSource
from consilium.loop import resume, run
from consilium.models.cohort import Cohort
from consilium.moe.build import ModelSource
from consilium.params import checksum
from consilium.prepare import Prepared
from consilium.recipes.digits import pfedmoe_table
from consilium.rundir import RunDirectory
from consilium.versions import git_revision

# --- as JSON and back -------------------------------------------------------------------------------------------------


def values(hint):
    """Values of an annotation, as hypothesis draws them."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(values, args))
    if origin is tuple:
        return st.lists(values(args[0]), max_size=3).map(tuple)
    if hint is Path:
        return st.text("abc./-_ ü", min_size=1, max_size=8).map(Path)
    if hint is float:
        return st.floats(0, 1, exclude_min=True) | st.integers(1, 3)
    if dataclasses.is_dataclass(hint):
        return made(hint)
    return {int: st.integers(1, 9), bool: st.booleans(), str: st.text("abc", max_size=4), type(None): st.none()}[hint]


@st.composite
def made(draw, cls):
    """Instances of a dataclass whose constructor may refuse a draw: each field is drawn, or left at its default."""
    hints = typing.get_type_hints(cls)
    required = {"path": Path("a.csv")} if "path" in hints and cls is not ModelSource else {}
    kept = dict(required)
    for field in dataclasses.fields(cls):
        value = draw(st.none() | values(hints[field.name]))
        try:
            cls(**kept | {field.name: value})
        except (ConsiliumError, TypeError, AttributeError):
            continue
        if value is not None:
            kept[field.name] = value
    return cls(**kept)


def round_trip(experiment):
    return from_json(json.loads(json.dumps(to_json(experiment), allow_nan=False)))


TENSORS = ("ImageData", "TableData")


@pytest.mark.parametrize(
    ("algorithm", "data"),
    [
        (name, data)
        for name, cls in sorted(Algorithm.registry.items())
        for data in DATA
        if set(cls.worlds) & ({"cohort", "mixed"} if data in TENSORS else {"moe"})
    ],
)
@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow])
@given(draw=st.data())
def test_every_experiment_comes_back_from_json(algorithm, data, draw):
    source = draw.draw(made(DATA[data]))
    form = source.form or draw.draw(st.sampled_from(["classification", "text-to-text"]))
    model = dataclasses.replace(draw.draw(made(ModelSource)), form=form)
    if data in TENSORS:
        many = "mixed" in Algorithm.registry[algorithm].worlds
        model = Cohort(("cnn-1", "mlp-1") if many else ("mnist-2",), width=draw.draw(st.integers(1, 99)))
    exact = {} if data in TENSORS else {"precision": "float32"}
    memories = st.lists(st.sampled_from(["60MB", "12GiB", "1.5 GB", "7B"]), max_size=0 if data in TENSORS else 3)
    fit = dataclasses.replace(draw.draw(made(Fit)), rows="packed", **exact)  # fits all that language models read
    if not Algorithm.registry[algorithm].merges:  # rules that take pairs of adapters together are refused
        fit = dataclasses.replace(fit, lora=dataclasses.replace(fit.lora, rule="mean", ranks="equal"))
    experiment = Experiment(
        name=draw.draw(st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", fullmatch=True)),
        algorithm=draw.draw(made(Algorithm.registry[algorithm])),
        data=source,
        model=model,
        fit=fit,
        sampling=draw.draw(made(Sampling)),
        rounds=draw.draw(st.integers(1, 10**6)),
        memory=draw.draw(memories.map(tuple)),
        seed=draw.draw(st.integers(-(2**70), 2**70)),
        strict=draw.draw(st.booleans()),
    )
    back = round_trip(experiment)
    assert back == experiment
    assert repr(back) == repr(experiment)  # equal is not enough: 1 == 1.0 == True


def saved(**changes):
    return to_json(runs.experiment(Path("a.csv"))) | changes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "Experimint"}, "unknown type 'Experimint'"),
        ({"algorithm": {"type": "FedAvgg"}}, "unknown type 'FedAvgg'"),
        ({"algorithm": {"experts": 3}}, "unknown type None"),
        ({"roundz": 3}, "does not fit this version"),
        ({"fit": {"type": "Fit", "lrr": 0.1}}, "does not fit this version"),
        ({"rounds": "x"}, r"Experiment\.rounds is 'x'; it must be a whole number"),
        ({"rounds": 2.5}, r"Experiment\.rounds is 2\.5; it must be a whole number"),
        ({"rounds": True}, r"Experiment\.rounds is True; it must be a whole number"),
        ({"rounds": 0}, "rounds is 0; it must be at least 1"),
        ({"memory": [60]}, r"Experiment\.memory is \(60,\)"),
        ({"model": None}, r"Experiment\.model is None; it must be of type Model"),
        ({"fit": {"type": "Fit", "optimizer": "adam"}}, r"Fit\.optimizer is 'adam'; it must be one of adamw, sgd; did"),
        ({"data": {"type": "Fit"}}, r"Experiment\.data is Fit"),
        ({"data": {"type": "DocstringData", "tasks": "topic"}}, r"DocstringData\.tasks is 'topic'"),
    ],
)  # fmt: skip
def test_a_saved_experiment_that_does_not_fit(change, message):
    with pytest.raises(ConfigError, match=message):
        from_json(saved(**change))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**20) | st.floats(allow_nan=True) | st.text(max_size=5)
    | st.sampled_from(["FedMoE", "Fit", "../x", "auto", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "lr", "path", "x"]), inner),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=400)
@given(st.data())
def test_whatever_is_saved_is_an_experiment_or_one_error(data):
    """One to three values, anywhere in a saved experiment, become any other, or go, or are joined by an unknown one."""
    tree = saved(algorithm=to_json(data.draw(st.sampled_from([FedAvg(), FedMoE()]))), memory=["1GB"])
    for _ in range(data.draw(st.integers(1, 3))):
        place = tree
        while True:
            key = data.draw(st.sampled_from(sorted(place)))
            if not isinstance(place[key], dict) or not place[key] or data.draw(st.booleans()):
                break
            place = place[key]
        how = data.draw(st.sampled_from(["change", "change", "remove", "add"]))
        if how == "remove" and len(place) > 1:
            del place[key]
        else:
            place[f"{key}{'x' * (how == 'add')}"] = data.draw(JSON)
    try:
        made = from_json(tree)
    except ConfigError as error:
        assert str(error)
    else:
        assert from_json(to_json(made)) == made or made != made  # NaN


def test_something_else_that_was_saved():
    with pytest.raises(ConfigError, match="saved is Fit; give an Experiment"):
        from_json(to_json(Fit()))


# --- refused before anything is written -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", ".hidden", "../x", "a/b", "two words", "x" * 65, "ü", "a\n", "..", "."])
def test_a_bad_name(name):
    with pytest.raises(ConfigError, match=r"name is .* use 1 to 64 of"):
        runs.experiment(Path("a.csv"), name=name)


@pytest.mark.parametrize("name", ["a", "_", "-x", "A.b-c_9", "x" * 64, "0..1"])
def test_a_good_name(name):
    assert runs.experiment(Path("a.csv"), name=name).name == name


@pytest.mark.parametrize("field", ["rounds", "evaluate_every", "threads"])
def test_counts_start_at_one(field):
    with pytest.raises(ConfigError, match=f"{field} is 0; it must be at least 1"):
        runs.experiment(Path("a.csv"), **{field: 0})


def test_forms_that_differ():
    with pytest.raises(ConfigError, match="asks for text-to-text, the model is set up for classification"):
        runs.experiment(Path("a.csv"), data=TextFileData(path=Path("a.csv"), form="text-to-text"))


@dataclasses.dataclass(frozen=True)
class NoClients(DataSource):
    gives = "labelled texts"
    form = ""

    def load(self, seed):
        return types.SimpleNamespace(clients={}, skipped={})


BAD = {
    "no such model": (ModelError, r"neither a directory", {"model": ModelSource("./nowhere")}),
    "not a file": (DataError, r"nowhere\.csv is not a file", {"data": TextFileData(path=Path("nowhere.csv"))}),
    "no client": (DataError, r"no client has any data", {"data": NoClients()}),
    "device": (
        ConfigError,
        r"device (is )?'cuda:77'.*(use cpu, cuda|no CUDA GPU; use --device cpu)",
        {"device": "cuda:77"},
    ),
    "no device at all": (ConfigError, r"device 'abacus' cannot be used", {"device": "abacus"}),
    "fit of one device": (
        BudgetError,
        r"no device can hold one expert per layer, not even site-0: needs .*, has 1\.0 MB",
        {"algorithm": FedAvg(experts="fit"), "memory": ("1MB",)},
    ),
    "smallest sub-MoE": (
        BudgetError,
        r"client site-1 cannot hold the smallest sub-MoE, one expert per layer: needs",
        {"algorithm": FedMoE(), "memory": ("1GB", "1MB")},
    ),
    "nobody holds it all": (
        BudgetError,
        r"no client can hold the model: 3 are unable, e\.g\. site-0 needs .*, has 2\.0 MB, lacks .*; give more memory",
        {"algorithm": FedAvg(), "memory": ("2MB",)},
    ),
    "nobody holds one": (BudgetError, r"3 are unable", {"algorithm": RandomMoE(), "memory": ("2MB",)}),
    "too many experts": (ConfigError, r"experts is 9; allowed are 1\.\.8", {"algorithm": FedAvg(experts=9)}),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_run_is_found_before_anything_is_written(tmp_path, case):
    kind, message, changes = BAD[case]
    experiment = runs.experiment(runs.table(tmp_path), **changes)
    with pytest.raises(kind, match=message) as caught:
        run(experiment, tmp_path / "runs/short")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["table.jsonl"]


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(ConfigError, match=r"runs/short cannot be made: Not a directory; choose another --out"):
        run(runs.experiment(runs.table(tmp_path)), tmp_path / "runs/short")


# --- a run's directory ------------------------------------------------------------------------------------------------


class Following:
    """A watch that looks into the directory after each round."""

    def __init__(self, folder):
        self.folder, self.lines, self.rounds, self.steps, self.records = folder, [], [], [], []

    def started(self, experiment, setup, federation, first):
        self.clients = {c.id for c in setup.clients}
        assert first == 1 and set(federation.clients) == self.clients

    def step(self, *step):
        self.steps.append(step)

    def rounded(self, record, events):
        self.records.append(json.loads(json.dumps(record)))
        self.lines.append([json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()])
        self.rounds.append(load_checkpoint(self.folder / "checkpoints")[0])
        assert RunDirectory(self.folder).config()["status"] == "running"
        for event in events:
            assert event["round"] == record["round"] and event["client"] in self.clients


@pytest.fixture(scope="module")
def fedmoe(tmp_path_factory):
    """FedMoE on devices of 8, 2 and 3 experts a layer, an empty client among four."""
    folder = tmp_path_factory.mktemp("fedmoe")
    data = runs.table(folder)
    with data.open("a") as file:
        file.write(json.dumps({"text": "alone", "label": "cat", "site": "site-9"}) + "\n")
    experiment = runs.experiment(data, FedMoE(stage1_epochs=1, alpha=1.0), memory=runs.memory(8, 2, 3))
    watch = Following(folder / "run")
    summary = run(experiment, folder / "run", watch)
    return experiment, folder / "run", summary, watch


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_files_of_a_finished_run(fedmoe):
    experiment, folder, summary, _ = fedmoe
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "partition.json", "metrics.jsonl", "events.jsonl", "structure.jsonl", "summary.json",
        "checkpoints", ".lock",
    }  # fmt: skip
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {
        "round-00002.safetensors",
        "round-00003.safetensors",
    }
    config = RunDirectory(folder).config()
    assert config["status"] == "finished" and from_json(config["experiment"]) == experiment
    assert config["versions"]["torch"] == torch.__version__
    assert json.loads((folder / "summary.json").read_text()) == summary


def test_metrics_and_checkpoint_are_there_after_every_round(fedmoe):
    _, _, _, watch = fedmoe
    assert watch.rounds == [1, 2, 3]
    assert [[line["round"] for line in seen] for seen in watch.lines] == [[1], [1, 2], [1, 2, 3]]
    assert watch.lines[-1] == watch.records  # what is shown is what is written


def test_an_empty_client_is_skipped_and_counted(fedmoe):
    _, folder, summary, _ = fedmoe
    partition = json.loads((folder / "partition.json").read_text())
    assert set(partition["clients"]) == {"site-0", "site-1", "site-2"}
    assert list(partition["skipped"]) == list(summary["skipped"]) == ["site-9"]
    assert all(client["memory_bytes"] > 0 for client in partition["clients"].values())


def test_the_summary_adds_up(fedmoe):
    _, folder, summary, _ = fedmoe
    records = lines(folder / "metrics.jsonl")
    last = records[-1]
    assert summary["algorithm"] == "FedMoE" and summary["rounds"] == 3 and summary["coverage"] == "3/3"
    for way in ("bytes_down", "bytes_up"):
        assert summary[way] == sum(c[way] for r in records for c in r["clients"].values()) > 0
    assert summary["peak_rss_bytes"] == max(r["peak_rss_bytes"] for r in records) > 50e6
    assert summary["tasks"] == {"task": {"metric": "accuracy", "score": last["scores"]["task"], "clients": 3}}
    assert summary["mean"] == last["scores"]["mean"]
    for id, client in summary["clients"].items():
        assert client["test"] == last["test"][id] and client["reason"] is None and client["state"] is None
        held = list(RunDirectory(folder).structure()["rounds"].values())[-1][id]
        assert client["experts"] == [len(ids) for ids in held.values()]
        assert client["peak_bytes_model"] <= client["memory_bytes"]
    sizes = {client: sum(values["experts"]) for client, values in summary["clients"].items()}
    assert 2 <= sizes["site-1"] <= sizes["site-2"] < sizes["site-0"] <= 16
    assert summary["experts"] == {"start": records[0]["experts_mean"], "end": last["experts_mean"]}


def test_seconds_add_up(fedmoe):
    """Training, evaluation and engine are all of a round; the rounds and the writing of the last are the total."""
    _, folder, summary, _ = fedmoe
    records = lines(folder / "metrics.jsonl")
    for record in records:
        seconds = record["seconds"]
        assert seconds["round"] == pytest.approx(seconds["train"] + seconds["evaluate"] + seconds["engine"])
    for key in ("train", "evaluate"):
        assert summary["seconds"][key] == pytest.approx(sum(r["seconds"][key] for r in records))
    total = summary["seconds"]
    assert total["total"] == pytest.approx(total["train"] + total["evaluate"] + total["engine"])
    assert total["total"] > sum(r["seconds"]["round"] for r in records)


def test_structure_and_events_tell_the_same_story(fedmoe):
    _, folder, _, _ = fedmoe
    structure = RunDirectory(folder).structure()
    assert next(iter(structure["rounds"])) == "1" and len(structure["blocks"]) == 2
    for held in structure["rounds"].values():
        assert set(held) == {"site-0", "site-1", "site-2"}
        for blocks in held.values():
            assert all(ids == sorted(set(ids)) and ids[0] >= 0 and ids[-1] < 8 for ids in blocks.values())
    first = [e for e in lines(folder / "events.jsonl") if e["event"] == "structure"]
    assert {e["client"]: e["experts"] for e in first} == {
        client: sum(map(len, held.values())) for client, held in structure["rounds"]["1"].items()
    }
    assert all(math.isclose(sum(p), 1) for blocks in structure["usage"].values() for p in blocks.values())


def test_the_weights_are_those_of_the_last_checkpoint(fedmoe):
    _, folder, summary, _ = fedmoe
    _, state, _, _ = load_checkpoint(folder / "checkpoints")
    assert summary["weights"] == checksum(state.group("params"))


def test_clients_that_cannot_hold_the_model_are_named_and_counted(tmp_path):
    experiment = runs.experiment(runs.table(tmp_path), memory=runs.memory(8, 2, 8), rounds=2, evaluate_every=2)
    summary = run(experiment, tmp_path / "run")
    assert summary["coverage"] == "2/3"
    assert summary["clients"]["site-1"]["test"] is None
    assert summary["clients"]["site-1"]["reason"].startswith("cannot hold the model: needs ")
    first, second = lines(tmp_path / "run/metrics.jsonl")
    assert first["test"] is None and set(second["test"]) == {"site-0", "site-2"}
    assert set(first["unable"]) == {"site-1"}
    assert not (tmp_path / "run/structure.jsonl").exists()


def test_standalone_sends_nothing_and_keeps_its_models_on_disk(tmp_path):
    summary = run(runs.experiment(runs.table(tmp_path), "Standalone", rounds=2), tmp_path / "run")
    assert summary["bytes_down"] == summary["bytes_up"] == 0
    states = {c: values["state"] for c, values in summary["clients"].items() if values["state"]}
    assert len(states) >= 2 and len(set(states.values())) == len(states)
    assert {p.parent.name for p in (tmp_path / "run/clients").glob("*/*.safetensors")} == set(states)


def test_the_seed_decides_the_bits(tmp_path):
    data = runs.table(tmp_path)
    small = dict(model=tiny.source(num_experts=4), rounds=1)
    a, b, c = (
        run(runs.experiment(data, seed=seed, strict=strict, **small), tmp_path / f"{seed}{strict}")["weights"]
        for seed, strict in ((1, False), (1, True), (2, False))
    )
    assert a == b != c


def test_a_run_in_which_everybody_diverges_stops_and_leaves_valid_json(tmp_path):
    fit = Fit(lr=1e30, head_lr=1e30, optimizer="sgd", clip=0.0, batch_size=4, max_length=12)
    experiment = runs.experiment(runs.table(tmp_path), fit=fit, rounds=2, model=tiny.source(num_experts=4))
    with pytest.raises(RoundError, match=r"the loss became NaN at all 2 clients: the learning rate \(fit\.lr 1e\+30\)"):
        run(experiment, tmp_path / "run")
    told = lines(tmp_path / "run/metrics.jsonl")
    assert [r["ledger"]["rejected"] for r in told] == [2]
    assert told[-1]["clients"]["site-0"]["train_loss"] is None
    assert "NaN" not in (tmp_path / "run/metrics.jsonl").read_text()


def test_a_directory_that_holds_a_run_is_refused(fedmoe):
    experiment, folder, _, _ = fedmoe
    with pytest.raises(ConfigError, match="already holds a run: resume it, or choose another --name or --out"):
        run(experiment, folder)


def test_another_process_that_was_quicker_is_not_overrun(tmp_path, monkeypatch):
    """Both find an empty directory; this one gets the lock when the other has finished."""
    experiment = runs.experiment(runs.table(tmp_path))
    real = Prepared.of

    def slow(experiment):
        (tmp_path / "run").mkdir()
        (tmp_path / "run/config.json").write_text("the other's")
        return real(experiment)

    monkeypatch.setattr(Prepared, "of", slow)
    with pytest.raises(ConfigError, match="already holds a run"):
        run(experiment, tmp_path / "run")
    assert (tmp_path / "run/config.json").read_text() == "the other's"


def test_memory_is_dealt_in_id_order_and_cycled(tmp_path):
    data = runs.table(tmp_path, clients=5)
    prepared = Prepared.of(runs.experiment(data, memory=("1GB", "2GB")))
    assert [i.memory_bytes for i in prepared.infos] == [10**9, 2 * 10**9, 10**9, 2 * 10**9, 10**9]


def test_heads_are_the_union_of_the_clients_labels(tmp_path, monkeypatch):
    def client(task, labels):
        split = Split([f"{label} here" for label in labels], list(labels))
        return ClientData(Task(task, "classification", labels, "accuracy"), split, split, split)

    held = {"a": client("x", ("p", "q")), "b": client("x", ("q", "r")), "c": client("y", ("p", "s"))}
    monkeypatch.setattr(TextFileData, "load", lambda *_: Federation(held))
    prepared = Prepared.of(runs.experiment(Path("any.csv")))
    assert prepared.setup.heads == {"x": ("p", "q", "r"), "y": ("p", "s")}


def test_the_revision_is_of_this_source_or_none(tmp_path, monkeypatch):
    import subprocess

    from consilium import versions as module

    assert git_revision() is None or len(git_revision()) == 40
    outside = tmp_path / "site-packages/consilium/versions.py"
    outside.parent.mkdir(parents=True)
    outside.touch()
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x", "--allow-empty"],
    ):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    monkeypatch.setattr(module, "__file__", str(outside))
    assert git_revision() is None  # an installation inside somebody else's repository


# --- small models -----------------------------------------------------------------------------------------------------


def small(**changes):
    """Two rounds of three clients with digits and three architectures."""
    settings = dict(
        name="small",
        algorithm=pFedMoE(m=4),
        data=ImageData(clients=3),
        model=Cohort(("mnist-5", "mlp-3"), "mlp-3", width=8, kernel=3, padding=1),
        fit=Fit(lr=0.05, head_lr=0.05, optimizer="sgd", balance=0.0),
        sampling=Sampling(2),
        rounds=2,
    )
    return Experiment(**settings | changes)


def test_a_run_of_small_models(tmp_path):
    summary = run(small(), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    clients = json.loads((tmp_path / "run" / "partition.json").read_text())["clients"]
    assert [c["architecture"] for c in clients.values()] == ["mnist-5", "mlp-3", "mnist-5"]
    assert (
        summary["coverage"] == "3/3" and summary["experts"] is None and summary["mean"] == lines[-1]["scores"]["mean"]
    )
    reports = [[c["report"] for c in line["clients"].values()] for line in lines]
    means = [sum(r["test before aggregation"] for r in told) / 2 for told in reports]
    assert summary["best_round_before_aggregation"] == max(means)
    for line in lines:
        for client, entry in line["clients"].items():
            held = {label for label, n in clients[client]["label_counts"].items() if n}
            assert {key[5:] for key in entry["report"] if key.startswith("gate ")} == held
    assert all(entry["bytes_down"] == entry["bytes_up"] > 0 for line in lines for entry in line["clients"].values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": FedAvg()}, r"FedAvg cannot train mnist-5, mlp-3: it is for .* one small model for all"),
        ({"algorithm": FedMoE()}, "it is for one mixture-of-experts model for all"),
        ({"model": ModelSource()}, "ImageData cannot feed a ModelSource"),
        ({"memory": ("1GB",)}, "there is no memory model of small models"),
    ],
)
def test_worlds_that_do_not_fit(changes, message):
    with pytest.raises(ConfigError, match=message):
        small(**changes)


def test_small_models_need_their_kind_of_data(tmp_path):
    with pytest.raises(ConfigError, match="FedProto cannot train docstring-switch"):
        runs.experiment(tmp_path / "a.csv", FedProto(), model=ModelSource())
    with pytest.raises(ConfigError, match=r"fit\.precision bfloat16 is for small models; use model\.dtype"):
        runs.experiment(tmp_path / "a.csv", fit=Fit(precision="bfloat16"))
    with pytest.raises(ConfigError, match="TextFileData cannot feed a Cohort"):
        runs.experiment(tmp_path / "a.csv", model=Cohort(("cnn-1",)))
    with pytest.raises(ConfigError, match="has no experts; leave it at 'all'"):
        run(small(algorithm=FedAvg(experts=2), model=Cohort(("mlp-1",))), tmp_path / "run")


def test_augmentation_follows_from_client_and_round(tmp_path):
    """The same bits through bytes, and after an interruption; other bits than without, in every client's training."""

    class Stop:
        def started(self, *_): ...

        def step(self, *_): ...

        def rounded(self, record, events):
            raise KeyboardInterrupt

    def weights(folder):
        return json.loads((folder / "summary.json").read_text())["weights"]

    made = small(data=ImageData(clients=3, examples=60, augment="crop-flip"))
    run(made, tmp_path / "whole")
    run(dataclasses.replace(made, strict=True), tmp_path / "strict")
    with pytest.raises(KeyboardInterrupt):
        run(made, tmp_path / "stopped", Stop())
    resume(tmp_path / "stopped")
    run(dataclasses.replace(made, data=ImageData(clients=3, examples=60)), tmp_path / "plain")
    assert weights(tmp_path / "whole") == weights(tmp_path / "strict") == weights(tmp_path / "stopped")
    assert weights(tmp_path / "whole") != weights(tmp_path / "plain")
    assert runs.outcome(tmp_path / "whole") == runs.outcome(tmp_path / "stopped")


def test_a_run_on_a_table(tmp_path):
    rows = [f"{'ab'[i % 2]},{i % 7},{i % 3},{i % 4}" for i in range(60)]
    (tmp_path / "t.csv").write_text("\n".join(["site,age,dose,grade", *rows]) + "\n")
    data = TableData(tmp_path / "t.csv", target="grade", client="site", positive=True)
    for method in (pFedMoE(m=4), FedProto()):
        folder = tmp_path / type(method).__name__
        summary = run(dataclasses.replace(pfedmoe_table(), data=data, algorithm=method, rounds=1), folder)
        assert summary["coverage"] == "2/2" and 0 <= summary["mean"] <= 1
