"""What leaves a client: every method's real replies in every mode, a site against a server that asks for more, the
digest of a site's data, and the reasons of errors."""

import dataclasses
import hashlib
import itertools
import json
import math
import re
from functools import cache
from pathlib import Path

import pytest
import runs
import tiny
import torch

from consilium.algorithms.fedmoe import FedMoE
from consilium.algorithms.fedproto import FedProto
from consilium.core import COMMON_REVEALS, Algorithm, Client, Payload, Reveal
from consilium.data.task import Federation
from consilium.disclosure import check, disclosed, reason, without_paths
from consilium.engine import rounds
from consilium.engine.judge import objection
from consilium.engine.local import LocalEngine
from consilium.errors import CheckpointError, ConfigError, PayloadError
from consilium.privacy import Privacy

METHODS = {name: cls for name, cls in Algorithm.registry.items() if cls.__module__.startswith("consilium.")}
WORLDS = [(name, world) for name, cls in METHODS.items() for world in cls().worlds]
USAGE = [Privacy(), Privacy(usage="coarse"), Privacy(usage="noised", usage_noise=0.5)]
MODES = [
    dataclasses.replace(usage, labels=labels, scores=scores)
    for usage, labels, scores in itertools.product(USAGE, ("counts", "names"), ("exact", "coarse", "none"))
]
NEEDS_EXACT_USAGE = {"HFedMoE", "FedAMoLE", "FLAME", "FedPE", "Flux"}
NEEDS_SCORES = {"FedMoE", "AffinityMoE", "FedPE"}
UPDATES = {"params", "factors", "control", "prototypes"}
COSTS = {"steps", "experts", "footprint", "seconds_evaluate"}
SIZES = {"num_examples", "examples", "cut"}
SCORES = {
    "balanced",
    "validation",
    "train_loss",
    "perplexity",
    "bits_per_byte",
    "score",
    "report/test before aggregation",
    "full_k",
}
USAGES = {
    "demand",
    "contribution",
    "usage",
    "importance",
    "trained",
    "served",
    "token",
    "experts",
    "utility",
    "saliency",
}


def context(world, client="colour-00"):
    return tiny.context(client) if world == "moe" else tiny.small_context(client, world)


@cache
def sent(name, world):
    """The client half, what client colour-00 is sent to train in the second round and, if that is another stage, in the
    first, and what it is sent to score."""
    made = tiny.setup(clients_per_round=6) if world == "moe" else tiny.small_setup(world, clients_per_round=6)
    algorithm = METHODS[name]()
    server, client = algorithm.server(made), algorithm.client(dataclasses.replace(made, clients=()))
    first = {c.id: server.configure(1, made.clients)[c.id] for c in made.clients if c.id == "colour-00"}
    replies = {c: rounds.trained(client, payload, context(world, c), Privacy())[0] for c, payload in first.items()}
    server.aggregate(1, iter(replies.items()))
    info = next(c for c in made.clients if c.id == "colour-00")
    to_train = [server.configure(2, made.clients)["colour-00"], first["colour-00"]]
    if to_train[0].scalars.get("stage") == to_train[1].scalars.get("stage"):
        to_train.pop()
    return client, to_train, server.deliver(info)


def plain(value):
    return [float(x) for x in (value if isinstance(value, list) else [value])]


@pytest.fixture(autouse=True)
def _same_noise(monkeypatch):
    """Noise is drawn anew in every run, and once in a while all of it lies below 0."""
    monkeypatch.setattr("consilium.privacy.fresh_generator", lambda: torch.Generator().manual_seed(1))


# --- every method ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "world"), WORLDS)
def test_every_key_of_every_methods_replies_in_every_mode(name, world):
    """The real replies, and all that is in them: no key is unknown to this test, and what a mode promises is looked for
    in the values, not in the declarations."""
    client, to_train, to_score = sent(name, world)
    for privacy in MODES:
        refused = (name in NEEDS_EXACT_USAGE and privacy.usage != "exact") or (
            name in NEEDS_SCORES and privacy.scores == "none"
        )
        if refused:
            with pytest.raises(ConfigError, match="of which its server needs more"):
                check(client, privacy)
            with pytest.raises(ConfigError, match="of which its server needs more"):
                for payload in to_train:
                    rounds.trained(client, payload, context(world), privacy)
            continue
        check(client, privacy)
        for payload in to_train:
            reply = rounds.trained(client, payload, context(world), privacy)[0]
            look(reply, privacy, context(world))
            assert reply.scalars["num_examples"] == 9
        score = rounds.tested(client, to_score, context(world), privacy)[0]
        look(score, privacy, context(world))
        assert ("score" in score.scalars) == (privacy.scores != "none")


def look(payload, privacy, context):
    labels = context.data.task.labels
    usages = payload.groups.keys() & USAGES
    assert privacy.usage == "exact" or len(usages) <= 1, f"{usages} together tell more than one of them"
    for group, tensors in payload.groups.items():
        if group in UPDATES:
            continue
        if group == "counts":
            assert {int(n) for n in tensors.values()} == ({3} if privacy.labels == "counts" else {1})
            continue
        if group == "losses":
            assert privacy.scores != "none"
            for t in tensors.values() if privacy.scores == "coarse" else ():
                torch.testing.assert_close(t, (20 * t).round() / 20)
            continue
        assert group in usages, f"nobody knows what group {group} reveals"
        for n_E in tensors.values():
            if privacy.usage == "coarse":
                assert sorted(n_E.tolist()) == [0] * 4 + [1] * 4
            if privacy.usage == "noised":  # shares of a million, with noise of a million and more on each
                assert int(n_E.sum()) > 10_000
    for key, value in payload.scalars.items():
        if key in COSTS | SIZES or key.startswith("shape ") or key == "report/ensemble weight":
            continue
        if key in SCORES:
            assert privacy.scores != "none"
            for x in plain(value) if privacy.scores == "coarse" else ():
                assert x == pytest.approx(round(20 * x) / 20 if abs(x) < 1 else float(f"{x:.1e}"))
            continue
        if key.startswith("recall "):
            assert key[7:] in labels and privacy.labels == "counts" and privacy.scores == "exact"
            continue
        assert key.startswith("report/gate ") and key[12:] in labels, f"nobody knows what scalar {key} reveals"
        assert privacy.labels == "counts"


@pytest.mark.parametrize(("name", "world"), WORLDS)
def test_exact_settings_change_no_bit(name, world):
    client, (to_train, *_), _ = sent(name, world)
    reply = rounds.trained(client, to_train, context(world), Privacy())[0]
    torch.manual_seed(0)
    assert Privacy() == MODES[0]
    assert tiny.payloads_equal(disclosed(reply, client, Privacy()), reply)


@pytest.mark.parametrize("name", ["FD", "FedGH", "FedTGP"])
def test_counts_that_no_server_reads_are_not_sent(name):
    client, (to_train,), _ = sent(name, "mixed")
    reply = client.train(to_train, context("mixed"))
    assert reply.groups.keys() == {"prototypes"}
    assert not {"labels", "counts"} & reply.scalars.keys()


def test_without_counts_fedproto_takes_the_plain_mean():
    """Counts 1 and 3 become 1 and 1: (2 + 6) / 2 = 4, where Eq 6 gives 5."""
    client = FedProto().client(tiny.small_setup())
    server = FedProto().server(tiny.small_setup())
    replies = [
        (name, disclosed(Payload({"prototypes": {"a": torch.full((6,), x)}, "counts": {"a": torch.tensor(n)}}), client,
                         Privacy(labels="names")))
        for name, x, n in (("x", 2.0, 1), ("y", 6.0, 3))
    ]  # fmt: skip
    server.aggregate(1, iter(replies))
    assert (server.params["a"] == 4).all()


@pytest.mark.parametrize(("choice", "told"), [("contribution", "contribution"), ("usage", "demand")])
@pytest.mark.parametrize("privacy", USAGE[1:])
def test_affinitymoe_goes_by_the_one_measure_that_a_site_tells(choice, told, privacy):
    """The server ranks by it, also next to a site that tells both: a map for everybody, and likeness of all pairs."""
    made = tiny.setup(clients_per_round=6)
    algorithm = METHODS["AffinityMoE"](choice=choice)
    server, client = algorithm.server(made), algorithm.client(made)
    sent, replies = server.configure(1, made.clients), {}
    for place, (name, payload) in enumerate(sorted(sent.items())):
        own = privacy if place else Privacy()
        replies[name] = rounds.trained(client, payload, tiny.context(name), own)[0]
        assert objection(server, next(c for c in made.clients if c.id == name), payload, replies[name]) is None
        assert (replies[name].groups.keys() & {"demand", "contribution"} == {told}) == bool(place)
    server.aggregate(1, iter(replies.items()))
    for name, reply in replies.items():
        own = reply.groups["contribution" if choice == "contribution" else "demand"]
        for block, ids in server.map[name].items():
            worst = min(float(own[block][i]) for i in ids)
            assert all(float(own[block][i]) <= worst for i in range(len(own[block])) if i not in ids)
    assert all(0 <= s <= 1 and server.alike[a][a] == 1 for a, row in server.alike.items() for s in row.values())


@pytest.mark.parametrize("unused", [FedMoE(), FedMoE(stage1="forward")])
def test_fedmoe_sends_the_usage_that_it_goes_by(unused):
    made = tiny.setup()
    payload = unused.server(made).configure(1, made.clients)["colour-00"]
    assert unused.client(made).train(payload, tiny.context("colour-00")).groups.keys() == {"demand"}
    tokens = FedMoE(stage1="forward", weight="tokens")
    assert tokens.client(made).train(payload, tiny.context("colour-00")).groups.keys() == {"demand", "served"}
    with pytest.raises(ConfigError, match=r"sends 'served'.*Use privacy.usage 'exact'"):
        check(tokens.client(made), Privacy(usage="coarse"))


# --- a method from outside -----------------------------------------------------------------------------------------


class Outside(Client):
    """A client half that declares `reveals` and replies what it is told to."""

    def __init__(self, reply, **reveals):
        self.reply, self.reveals = reply, reveals

    def train(self, payload, context):
        return self.reply

    evaluate = train


@pytest.mark.parametrize(
    ("reply", "what"),
    [
        (Payload({"histogram": {"x": torch.ones(2)}}), "group 'histogram'"),
        (Payload(scalars={"labels": ["cat", "dog"]}), "scalar 'labels'"),
        (Payload(scalars={"report/mine": 1.0}), "scalar 'report/mine'"),
    ],
)
def test_what_is_not_declared_does_not_leave(reply, what):
    for call in (rounds.trained, rounds.tested):
        with pytest.raises(PayloadError, match=rf"the {what} of the reply is not declared in Outside\.reveals"):
            call(Outside(reply), Payload(), tiny.context(), Privacy())


def test_what_is_declared_is_lowered_by_its_kind():
    reply = Payload(
        {"mine": {"b": torch.tensor([5, 0, 9, 5])}},
        {"num_examples": 9, "loss a": 0.3333, "loss b": 12.345, "loss c": math.nan, "of labels": [3, 1]},
    )
    client = Outside(
        reply, mine=Reveal("usage", "less"), **{"loss *": Reveal("score"), "of labels": Reveal("labels", "less")}
    )
    told = rounds.trained(client, Payload(), tiny.context(), Privacy(usage="coarse", labels="names", scores="coarse"))[
        0
    ]
    assert told.group("mine")["b"].tolist() == [1, 0, 1, 0]
    assert told.scalars.pop("loss c") != told.scalars.get("loss c", 0)
    assert told.scalars == {"num_examples": 9, "loss a": 0.35, "loss b": 12.0, "of labels": [1, 1]}
    client = Outside(reply, mine=Reveal("usage"), **{"loss *": Reveal("score"), "of labels": Reveal("labels")})
    told = rounds.trained(client, Payload(), tiny.context(), Privacy(usage="coarse", labels="names", scores="none"))[0]
    assert not told.groups and told.scalars == {"num_examples": 9}


def test_a_kind_that_there_is_not_is_refused():
    with pytest.raises(ConfigError, match=r"Reveal\.kind is 'secret'"):
        Reveal("secret")
    assert all(isinstance(reveal, Reveal) for reveal in COMMON_REVEALS.values())


# --- a run ----------------------------------------------------------------------------------------------------------


def test_a_run_tells_no_more_than_its_settings(tmp_path):
    """In process, whole: nothing recorded is more exact than the setting, and without scores nobody is scored."""
    from consilium.loop import run
    from consilium.prepare import prepare as find_faults

    data = runs.table(tmp_path)
    run(runs.experiment(data, rounds=1, privacy=Privacy(scores="coarse")), tmp_path / "coarse")
    (record,) = map(json.loads, (tmp_path / "coarse/metrics.jsonl").read_text().splitlines())
    told = [x for one in record["clients"].values() for x in (one["train_loss"], one["validation"])]
    told += record["test"].values()
    assert told and all(x == pytest.approx(round(20 * x) / 20 if x < 1 else float(f"{x:.1e}")) for x in told)
    summary = run(runs.experiment(data, rounds=1, privacy=Privacy(scores="none")), tmp_path / "none")
    assert summary["mean"] is None
    with pytest.raises(ConfigError, match="sends 'validation'"):
        find_faults(runs.experiment(data, FedMoE(), privacy=Privacy(scores="none")))
    with pytest.raises(ConfigError, match="HFedMoEClient sends"):
        find_faults(runs.experiment(data, "HFedMoE", privacy=Privacy(usage="coarse")))


def test_no_engine_answers_past_the_gate():
    """An engine that is not told of settings tells all that is declared, and nothing else."""
    assert next(f for f in dataclasses.fields(LocalEngine) if f.name == "privacy").default_factory() == Privacy()


# --- a site against its server ---------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path):
    """(folder, ask): a site that says coarse usage, coarse scores and names of labels; `ask` sends it a message."""
    pytest.importorskip("flwr")
    import loopback
    from flwr.app import ConfigRecord, Message, RecordDict

    import consilium.engine.flower as flower
    from consilium.engine.flower.client import deployed
    from consilium.engine.flower.records import from_record, to_record
    from consilium.experiment import to_json

    data, folder = runs.table(tmp_path, clients=1), tmp_path / "at the site"
    grid = loopback.Loopback([{"site": str(folder / "site.json")}])

    def settle(**changes):
        own = runs.experiment(data, model=tiny.source(), privacy=Privacy(**changes))
        flower.save_site(folder / "site.json", "site-0", own)
        deployed.cache_clear()  # as in a new process

    def ask(kind, method, payload=None, **privacy):
        made = runs.experiment(data, method, model=tiny.source(), privacy=Privacy(**privacy))
        told = {"protocol": 1, "experiment": json.dumps(to_json(made)), "heads": "{}", "run": "x", "model": ""}
        content = RecordDict({"engine": ConfigRecord(told)})
        if payload is not None:
            told |= {"client": "site-0", "round": 1, "version": 0, "seed": 0, "cap": "1GB", "reply": "exact"}
            told |= {"zstd": False, "deadline": 99.0, "base": "", "hold": False}
            content = to_record(payload, told)
        (sent,) = grid.push_messages([Message(content, dst_node_id=100, message_type=kind)])
        (reply,) = grid.pull_messages([sent])
        if "failed" in reply.content:
            return reply.content["failed"]["reason"]
        return from_record(reply.content)[0] if payload is not None else dict(reply.content["engine"])

    settle(usage="coarse", labels="names", scores="coarse")
    return folder, settle, ask


def a_task(method):
    setup = tiny.setup(clients=(dataclasses.replace(tiny.infos()[0], id="site-0", task="task"),))
    setup = dataclasses.replace(setup, heads={"task": ("cat", "dog", "fish")})
    return method.server(setup).configure(1, setup.clients)["site-0"]


def test_a_site_that_says_coarse_tells_no_server_more(site):
    """A server that asks HFedMoE of it: refused when it is described and, by a server that does not ask, when it is to
    train. FedMoE by exact usage: upper halves. Noised usage with next to no noise: refused."""
    _, _, ask = site
    hfedmoe, fedmoe = METHODS["HFedMoE"](), FedMoE(stage1="forward")
    for answer in (ask("query.describe", hfedmoe), ask("train", hfedmoe, a_task(hfedmoe))):
        assert re.search("privacy.usage is 'coarse', but HFedMoEClient sends 'demand'", answer)
    noised = dict(usage="noised", usage_noise=0.02, epsilon=1e6)
    for answer in (ask("query.describe", fedmoe, **noised), ask("train", fedmoe, a_task(fedmoe), **noised)):
        assert "this site tells coarse usage" in answer
    reply = ask("train", fedmoe, a_task(fedmoe))
    assert reply.groups.keys() == {"demand"}
    for n_E in reply.group("demand").values():
        assert sorted(n_E.tolist()) == [0] * 4 + [1] * 4
    assert reply.scalars["validation"] * 20 == pytest.approx(round(reply.scalars["validation"] * 20))


def test_a_site_that_tells_no_scores_keeps_them_for_itself(site):
    """Its own copy of what it was delivered has the exact score."""
    from consilium.engine.codec import decode

    folder, settle, ask = site
    settle(scores="none")
    method = METHODS["FedAvg"]()
    told = ask("train", method, a_task(method)).scalars.keys() | ask("evaluate", method, a_task(method)).scalars.keys()
    assert not told & SCORES and "num_examples" in told
    kept = decode((folder / "delivered.safetensors").read_bytes())
    assert 0 <= kept.scalars["engine/score"] <= 1


def test_the_digest_of_a_sites_data_is_keyed(site):
    """The same data gives the same digest for as long as the state folder lives, and nobody else can compute it,
    neither without the secret nor another site with the same data."""
    folder, settle, ask = site
    from consilium.engine.flower import read_site

    first = ask("query.describe", METHODS["FedAvg"]())["fingerprint"]
    data = read_site(folder / "site.json")[1]
    plain = Federation({"site-0": data}).fingerprint
    settle()
    assert ask("query.describe", METHODS["FedAvg"]())["fingerprint"] == first
    assert first not in {plain, hashlib.sha256(plain.encode()).hexdigest()}
    assert (folder / "secret").stat().st_mode & 0o777 == 0o600 and len((folder / "secret").read_bytes()) == 32
    (folder / "secret").unlink()
    settle()
    assert ask("query.describe", METHODS["FedAvg"]())["fingerprint"] not in {first, plain}
    (folder / "secret").write_bytes(b"short")
    with pytest.raises(ConfigError, match="has 5 bytes, not 32"):
        settle()


# --- errors ---------------------------------------------------------------------------------------------------------


def test_a_sites_errors_have_no_paths(site, monkeypatch):
    """Errors of the package, of the system and of any library, and of a state that is lost."""
    folder, _, ask = site
    method = METHODS["FedAvg"]()
    for error in (
        FileNotFoundError(2, "No such file or directory", "/home/smith/patient notes/a b.csv"),
        RuntimeError(f"cannot open {folder}/data.json, nor C:\\Users\\smith\\x.csv"),
        CheckpointError(f"the state of client site-0 in {folder / 'x/round-1'} cannot be read: it is broken"),
        KeyError("/srv/wards/seven/notes"),
    ):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr("consilium.algorithms.fedavg.FedAvgClient.train", fail)
        answer = ask("train", method, a_task(method))
        assert answer.startswith(f"{type(error).__name__}: ") and "[path]" in answer
        for part in ("smith", "patient", "b.csv", "at the site", "wards", "seven", str(folder.parent)):
            assert part not in answer
    monkeypatch.undo()
    (folder / "data.json").unlink()
    from consilium.engine.flower.client import deployed

    deployed.cache_clear()
    answer = ask("query.describe", method)
    assert answer == "ConfigError: the site's settings in [path] cannot be read: FileNotFoundError"


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("cannot read /home/ann/x.csv: it is gone", "cannot read [path]: it is gone"),
        ("cannot read '/home/ann lee/my notes/x y.csv'", "cannot read '[path] y.csv'"),
        ("from /home/ann/a.csv to /home/ann/b.csv", "from [path]"),
        (r"open D:\wards\a.csv (\\nas\share\b.csv)", "open [path])"),
        ("file:///home/ann/x.csv and ~ann/y.csv", "[path]"),
        ("relative wards/seven/notes.csv here", "relative [path] here"),
        ("fit.lr is 1e+30; 1 / N^1.1, 3/4, a/b, google/switch-base-8", None),
        ("https://flower.ai/docs is no path; neither is '/etc' nor '../../x'", None),
        ("layer.0.w of 3 of 4 experts; 12 MB/s, and/or", None),
    ],
)
def test_paths_are_taken_out_of_a_text(text, without):
    assert without_paths(text) == (text if without is None else without)


def test_paths_that_are_known_are_taken_out_as_they_are():
    error = OSError(28, "No space left on device", "relative notes", None, "other notes")
    assert reason(error) == "OSError: [Errno 28] No space left on device: '[path]' -> '[path]'"
    assert without_paths("cannot read notes", ["notes"]) == "cannot read [path]"
    assert without_paths(f"in {Path.home()}", []) == "in [path]" or str(Path.home()) == "/"
    assert without_paths(f"in {Path.cwd()}") == "in [path]"
    assert without_paths("a.b", [None, "", ".", "/"]) == "a.b"


# --- the page ---------------------------------------------------------------------------------------------------------


def declared():
    """Method -> what its clients reveal beside what all do, without updates of models."""
    for name, world in WORLDS:
        client, _, _ = sent(name, world)
        yield name, {key for key, reveal in client.reveals.items() if reveal.kind in ("usage", "labels", "score")}


def test_security_says_what_each_method_reveals():
    """A line of the table for every method that says more than all do, with every key; no line of another."""
    page = (Path(__file__).parent.parent / "SECURITY.md").read_text()
    rows = dict(re.findall(r"^\| (\w+) \| (.*`.*) \|", page, re.M))
    for name, keys in declared():
        assert all(f"`{key}`" in rows.get(name, "") for key in keys), f"{name} reveals {keys}"
    assert set(rows) == {name for name, keys in declared() if keys} | {"FD", "FedGH", "FedTGP"}
