"""A malicious server against a site: real messages, the real client half, and exact counts of what the site did."""

import dataclasses
import itertools
import json
import os
import re
import time
from pathlib import Path

import loopback
import pytest
import runs
import tables
import tiny
import torch
from flwr.app import Message
from torch.optim.optimizer import register_optimizer_step_post_hook

import consilium.engine.flower as flower
from consilium.algorithms.fd import FD
from consilium.algorithms.fedapen import FedAPEN, FedAPENClient, learned_share
from consilium.algorithms.fedavg import FedAvg
from consilium.algorithms.fedkd import FedKD
from consilium.algorithms.fedmoe import FedMoE
from consilium.algorithms.fedmrl import FedMRL
from consilium.algorithms.fedproto import FedProto
from consilium.algorithms.fedprox import FedProx
from consilium.algorithms.fedtgp import FedTGP
from consilium.algorithms.pfedmoe import pFedMoE
from consilium.core import Algorithm, Payload, Sampling, Work
from consilium.data.language import LanguageData
from consilium.engine.flower.limits import ELSEWHERE, check_texts, costs_of, prune_runs
from consilium.engine.flower.records import PROTOCOL, to_record
from consilium.errors import BudgetError, ConfigError, PayloadError, RoundError
from consilium.experiment import Experiment, Wire, from_json, to_json
from consilium.fit import Fit
from consilium.loop import serve
from consilium.moe.lora import Lora
from consilium.work import COSTS


@pytest.fixture
def steps():
    """Real steps of any optimiser, as they are made."""
    made = []
    handle = register_optimizer_step_post_hook(lambda *_: made.append(1))
    yield made
    handle.remove()


def site(folder: Path, own: Experiment, name: str = "north", **limits) -> loopback.Loopback:
    """One site of this name with these limits."""
    flower.save_site(folder / "state/site.json", name, own, flower.Limits(**limits))
    return loopback.Loopback([{"site": str(folder / "state/site.json")}])


def small(tmp_path, method, **changes) -> Experiment:
    """An experiment with the table of the site "north", 18 rows of it for training."""
    (folder := tmp_path / "own").mkdir()
    tables.written(folder)
    made = tables.experiment(folder / "north/ill.csv", method)
    model = dataclasses.replace(made.model, architectures=("mlp-3",))
    return dataclasses.replace(made, model=model, sampling=Sampling(1), fit=Fit(batch_size=4), **changes)


def refused(made, grid, tmp_path, name="north") -> str:
    """Why the run of this experiment came to nothing."""
    with pytest.raises(RoundError) as told:
        serve(made, tmp_path / "run", grid, [name], 1.0)
    return str(told.value)


# --- steps ------------------------------------------------------------------------------------------------------------


def test_steps_of_a_share_that_is_learned(tmp_path, steps, monkeypatch):
    """FedAPEN: what one message asks for is one sum, wherever it is spent: 15 for the share, and those of training."""
    shares = []
    real = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args: shares.append(1) or real(*args))
    made = small(tmp_path, FedAPEN(steps=10**9))
    own = dataclasses.replace(made, algorithm=FedAPEN())
    grid = site(tmp_path, own, steps=20)
    assert "algorithm.steps 1e+09, this site allows 20 (--max-steps)" in refused(made, grid, tmp_path)
    assert not steps and not shares
    made = dataclasses.replace(made, algorithm=FedAPEN(steps=15), fit=Fit(batch_size=3), rounds=2)
    assert "the work takes 21 steps, this site allows 20 (--max-steps)" in refused(made, grid, tmp_path)
    assert len(steps) == 6  # of the first round, in which nothing has been received before
    assert len(shares) == 15 + 3 * 15  # scoring after it, and three attempts at the second


def test_a_share_ends_at_its_limit_and_at_the_deadline():
    z, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    work = Work(steps=20)
    with pytest.raises(BudgetError, match="1000000000 steps, this site allows 20"):
        learned_share(z, z, y, 0.5, FedAPEN(steps=10**9, eta=0.001), work)
    assert work.done == 0
    learned_share(z, z, y, 0.5, FedAPEN(steps=20, eta=0.001), work)
    assert work.done == 20
    work, start = Work(deadline=0.2), time.monotonic()
    with pytest.raises(BudgetError, match=r"the round's deadline of 0\.2 s has passed after \d+ of 1000000000 steps"):
        learned_share(z, z, y, 0.5, FedAPEN(steps=10**9, eta=0.001), work)
    assert work.done > 0 and time.monotonic() - start < 5


def test_the_deadline_binds_a_client_half(tmp_path):
    """FedAPEN, as its client does it: 10**9 steps end with the deadline."""
    setup, own = tiny.small_setup(), tiny.small_context()
    half = FedAPENClient(setup, FedAPEN(steps=10**9))
    sent = FedAPEN().server(setup).deliver(own.info)
    half.train(sent, own)
    late = dataclasses.replace(own, work=Work(deadline=0.3))
    with pytest.raises(BudgetError, match="deadline"):
        half.train(sent, late)
    assert late.work.done > 0


def test_steps_of_a_first_stage(tmp_path, steps):
    """FedMoE: epochs of stage one are steps, too; the site sees before the first that they are too many."""
    data = runs.table(tmp_path)
    made = runs.experiment(data, FedMoE(stage1_epochs=60), model=tiny.source(num_experts=4), sampling=Sampling(1))
    grid = site(tmp_path, made, "site-1", steps=5)
    assert "steps, this site allows 5 (--max-steps)" in refused(made, grid, tmp_path, "site-1")
    assert not steps


def test_steps_of_blocks(tmp_path, steps):
    """Rows are not examples: five documents are many blocks. A row of a billion tokens is refused."""
    (tmp_path / "own.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} " + "see a house " * 90}) + "\n" for i in range(5))
    )
    data = LanguageData(path=tmp_path / "own.jsonl", text="text", clients=1)
    made = runs.experiment(
        tmp_path / "own.jsonl", FedAvg(), data=data, model=tiny.source("olmoe", "text-to-text"),
        fit=Fit(rows="blocks", max_length=8, target_length=2, batch_size=4), sampling=Sampling(1),
    )  # fmt: skip
    grid = site(tmp_path, made, "north", steps=5)
    assert "steps, this site allows 5 (--max-steps)" in refused(made, grid, tmp_path)
    made = dataclasses.replace(made, name="long", fit=dataclasses.replace(made.fit, target_length=10**9))
    (tmp_path / "long").mkdir()
    assert "1000000008 tokens" in refused(made, site(tmp_path, made), tmp_path / "long")
    assert not steps


# --- tokens, seconds, memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"tokens": 30}, r"tokens or more, this site allows 30 \(--max-tokens\)"),
        ({"seconds": 1e-9}, r"more than 1e-09 s, this site allows 0 \(--max-seconds\)"),
        ({"memory": "1KB"}, r"the small model takes [\d,]+ bytes, this site allows 1,000 \(--max-memory\)"),
    ],
)
def test_work_that_no_setting_shows(limits, said, tmp_path, steps):
    made = small(tmp_path, FedProto())
    with pytest.raises(RoundError, match=said):
        serve(made, tmp_path / "run", site(tmp_path, made, **limits), ["north"], 1.0)
    assert len(steps) <= 3 * (30 // 4)


def test_a_generated_text_ends_at_the_limit(monkeypatch):
    """An answer may have 10,000 tokens; the model writes as many as are left, and one more."""
    setup = tiny.setup(tiny.source("switch_transformers", "text-to-text"), target_length=10_000)
    own = tiny.context(form="text-to-text")
    model = setup.build(setup.initial_params(), own)
    monkeypatch.setattr(model.backbone.generation_config, "eos_token_id", None)
    batch = setup.encode(own, own.data.test).batch(range(4), torch.device("cpu"), prompt=True)
    work = Work(tokens=40)
    with pytest.raises(BudgetError, match="44 tokens or more, this site allows 40"):
        model.generate(batch, 10_000, work.read)
    assert work.seen == 44


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fit": Fit(max_length=10**9)}, "--max-memory"),
        ({"fit": Fit(batch_size=4096, max_length=10**6)}, "--max-memory"),
        ({"algorithm": FedMoE(lora_rank=10**9)}, "--max-memory"),
        ({"fit": Fit(lora=Lora(rank=10**9))}, "rank"),
    ],
)
def test_lengths_and_ranks_of_a_mixture(change, said, tmp_path, steps):
    made = runs.experiment(runs.table(tmp_path), model=tiny.source(num_experts=4), sampling=Sampling(1), **change)
    grid = site(tmp_path, dataclasses.replace(made, fit=Fit()), "site-1", memory="1GB")
    try:
        serve(made, tmp_path / "run", grid, ["site-1"], 1.0)
    except (RoundError, ConfigError, BudgetError) as error:
        assert said in str(error)
    else:
        pytest.fail("the site did it")
    assert not steps


def test_widths_of_small_models(tmp_path, steps, monkeypatch):
    """pFedMoE's gate and FedMRL's representation: a billion units are refused before one of them is made."""
    made = small(tmp_path, pFedMoE(m=10**9, gate_input="features"))
    made_params = []
    monkeypatch.setattr("consilium.algorithms.pfedmoe.initial", lambda *args: made_params.append(args))
    assert "the small model takes " in (said := refused(made, site(tmp_path, made), tmp_path))
    assert "(--max-memory)" in said and not steps and not made_params
    made = dataclasses.replace(made, algorithm=FedMRL(d1=10**9))
    with pytest.raises(RoundError, match="d1 is 1000000000; it must be at most 6"):
        serve(made, tmp_path / "run-2", site(tmp_path, made), ["north"], 1.0)


def test_factors_that_would_unfold_into_a_large_matrix():
    """FedKD: two thin factors of a few kB are a matrix of 40 GB; a client multiplies what has its model's shape."""
    setup, own = tiny.small_setup(), tiny.small_context()
    half, sent = FedKD().client(setup), FedKD().server(setup).deliver(own.info)
    key = next(key for key, t in FedKD().server(setup).params.items() if t.ndim > 1)
    thin = {f"{key}/u": torch.ones(100_000, 1), f"{key}/s": torch.ones(1), f"{key}/v": torch.ones(1, 100_000)}
    whole = {k: t for k, t in FedKD().server(setup).params.items() if k != key}
    for shape in ([100_000, 100_000], list(FedKD().server(setup).params[key].shape)):
        bad = Payload({"params": whole, "factors": thin}, {**sent.scalars, f"shape {key}": shape})
        for work in (half.train, half.evaluate):
            with pytest.raises(PayloadError, match=r"neither whole|do not agree"):
                work(bad, own)


# --- what a server may say at all -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "name"),
    [(FD, "gamma"), (FedProto, "lam"), (FedTGP, "lam"), (FedProx, "mu"), (Fit, "weight_decay"), (Fit, "balance"),
     (Wire, "deadline")],
)  # fmt: skip
@pytest.mark.parametrize("value", [1e300, 1e9, float("inf"), float("nan"), -1.0])
def test_factors_and_deadlines_have_a_range(method, name, value, tmp_path):
    """Also in what a server has written by hand."""
    value = 1e9 if (name, value) == ("deadline", 1e9) else value
    with pytest.raises(ConfigError, match=f"{name} is .*; it must be (within|at least|greater)"):
        method(**{name: value})
    saved = to_json(runs.of_world("cohort", tmp_path / "none", FD()))
    part = {"Fit": "fit", "Wire": "wire"}.get(method.__name__, "algorithm")
    saved[part] = to_json(method()) | {name: value}
    with pytest.raises(ConfigError, match=f"{name} is .*; it must be"):
        from_json(json.loads(json.dumps(saved)))


@pytest.mark.parametrize("method", [cls for cls in Algorithm.registry.values() if "consilium." in cls.__module__])
def test_every_setting_that_reaches_a_site_is_known_to_it(method, tmp_path):
    """What is declared is read; a field without a declaration is refused by the site, by name."""
    world = method.worlds[0]
    made = runs.of_world(world, runs.table(tmp_path), method())
    found = list(costs_of(made))
    names = {name for name, _, _ in found}
    assert {cost for _, cost, _ in found} <= COSTS and len(names) == len(found)
    assert {f"algorithm.{field.name}" for field in dataclasses.fields(method)} <= names
    assert {"fit.lr", "fit.lora.rank", "wire.cap", "rounds"} <= names

    @dataclasses.dataclass(frozen=True)
    class Undeclared:
        speed: float = 1.0

    with pytest.raises(ConfigError, match=r"x\.speed does not say what it costs a site"):
        list(costs_of(Undeclared(), "x."))
    assert all(reason for reason in ELSEWHERE.values())


@pytest.mark.parametrize("deadline", [0.0, -1.0, float("inf"), float("nan")])
def test_a_deadline_of_a_message_that_is_none(deadline, tmp_path):
    """With one that is no number a site would work for ever."""
    made = small(tmp_path, FedProto())
    grid = site(tmp_path, made)
    told = {
        "protocol": PROTOCOL, "experiment": json.dumps(to_json(made)), "heads": "{}", "run": "r1", "model": "",
        "client": "north", "round": 1, "version": 0, "seed": 0, "cap": "1GB", "reply": "exact", "zstd": False,
        "deadline": deadline, "base": "", "hold": False,
    }  # fmt: skip
    (sent,) = grid.push_messages([Message(to_record(Payload(), told), dst_node_id=100, message_type="train")])
    (reply,) = grid.pull_messages([sent])
    assert re.search("deadline .*; it must be a number of seconds", reply.content["failed"]["reason"])


def asked(made: Experiment, grid, content_of) -> str:
    """Send a site one message to train with the content that `content_of(told)` makes; returns its refusal."""
    told = {
        "protocol": PROTOCOL, "experiment": json.dumps(to_json(made)), "heads": "{}", "run": "r1", "model": "",
        "client": "north", "round": 1, "version": 0, "seed": 0, "cap": "512GB", "reply": "exact", "zstd": False,
        "deadline": 60.0, "base": "", "hold": False,
    }  # fmt: skip
    (sent,) = grid.push_messages([Message(content_of(told), dst_node_id=100, message_type="train")])
    (reply,) = grid.pull_messages([sent])
    return str(reply.content["failed"]["reason"])


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        (40, r"the blob of group 'g4' unfolds to 500\d\d\d bytes; at most 499\d\d\d are allowed"),
        (1, r"the blob of group 'g0' unfolds to 24\d{6} bytes; at most 2500000 are allowed"),
        (65, "the message has 65 groups; at most 64 are allowed"),
    ],
    ids=["the sum", "one group", "too many groups"],
)
def test_groups_that_unfold_are_bounded_at_a_site_by_their_sum(tmp_path, monkeypatch, groups, said):
    """The server allows 512 GB. Of 40 groups of 500 kB that take 100 bytes each, a site that takes 2.5 MB unfolds
    four, and none of a message with too many."""
    from consilium.engine.flower import records

    made = small(tmp_path, "pFedMoE")
    grid = site(tmp_path, made, bytes="2.5MB")
    unfolded = []
    real = records.zstandard.decompress
    monkeypatch.setattr(
        records.zstandard, "decompress", lambda *a, **k: (lambda b: unfolded.append(len(b)) or b)(real(*a, **k))
    )

    def content(told):
        size = 6_000_000 if groups == 1 else 125_000
        many = {f"g{i}": {"w": torch.zeros(size)} for i in range(groups)}
        return to_record(Payload(many), told, compress=True)

    assert re.search(said, asked(made, grid, content))
    assert len(unfolded) == (4 if groups == 40 else 0) and sum(unfolded) < 2_500_000


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_site_starts_from_no_number_that_is_none(tmp_path, value):
    """As a real server half sends it, but for one number."""
    made = small(tmp_path, "pFedMoE")
    grid = site(tmp_path, made)
    server = made.algorithm.server(made.setup({"ill": ("much", "none", "some")}.items(), shape=(2,)))
    params = {key: tensor.clone() for key, tensor in server.params.items()}
    next(tensor for tensor in params.values() if tensor.is_floating_point()).view(-1)[0] = value
    reason = asked(made, grid, lambda told: to_record(Payload({"params": params}), told))
    assert re.search("what no client can start from: params .* is not finite", reason)


@pytest.mark.parametrize(
    ("experiment", "heads", "said"),
    [
        ("x" * 16_000_001, "", r"settings and labels are 16\.0 MB; at most 16\.0 MB"),
        ("", "x" * 16_000_001, r"settings and labels are 16\.0 MB"),
        ("", json.dumps({"ill": [str(i) for i in range(100_001)]}), "names 100,002 labels; at most 100,000"),
    ],
)
def test_settings_and_labels_that_are_too_many(experiment, heads, said):
    with pytest.raises(PayloadError, match=said):
        check_texts(experiment, heads)
    check_texts("x" * 1000, json.dumps({"ill": [str(i) for i in range(99_000)]}))


# --- what former runs leave -------------------------------------------------------------------------------------------


def run_folder(state: Path, name: str, size: int, days: float) -> Path:
    folder = state / name / "north"
    folder.mkdir(parents=True)
    (folder / "round-00001.safetensors").write_bytes(b"x" * size)
    for path in (folder / "round-00001.safetensors", folder, folder.parent):
        os.utime(path, (time.time() - 86_400 * days,) * 2)
    return folder.parent


def test_former_runs_go_by_age_and_by_size(tmp_path):
    run_folder(tmp_path, "old", 10, 31)
    run_folder(tmp_path, "a1", 400_000, 3)
    run_folder(tmp_path, "a2", 400_000, 2)
    run_folder(tmp_path, "a3", 400_000, 1)
    run_folder(tmp_path, "now", 10**6, 99)
    run_folder(tmp_path, "flower", 10**6, 99)
    run_folder(tmp_path, "not-a-run", 10**6, 99)
    (tmp_path / "elsewhere").symlink_to(tmp_path.parent)
    prune_runs(tmp_path, "now", days=30, most=1_000_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a2", "a3", "elsewhere", "flower", "not-a-run", "now"]
    prune_runs(tmp_path, "now", days=30, most=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "flower", "not-a-run", "now"]


def test_so_many_former_runs_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr("consilium.engine.flower.limits.FOLDERS", 2)
    for i in range(5):
        run_folder(tmp_path, f"a{i}", 1, i)
    prune_runs(tmp_path, "a4", days=30, most=10**9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a0", "a1", "a4"]


def test_new_tokens_do_not_fill_the_disk(tmp_path):
    """Every run has a new token and leaves a client's state; there is room for two former ones, and the one at work."""
    made = small(tmp_path, FedProto(), evaluate_every=2)
    grid, state, folders = site(tmp_path, made), tmp_path / "state", []

    def size(folder):
        return sum(path.stat().st_size for path in [folder, *folder.rglob("*")])

    for i in range(5):
        serve(made, tmp_path / f"run-{i}", grid, ["north"], 1.0)
        folders.append({path for path in state.iterdir() if path.is_dir()})
        if i == 0:
            (first,) = folders[0]
            grid = site(tmp_path, made, state=f"{int(2.5 * size(first))}B")
    assert [len(found) for found in folders] == [1, 2, 3, 3, 3]
    assert first not in folders[-1] and all(len(after - before) == 1 for before, after in itertools.pairwise(folders))


def test_flowers_own_folder_is_no_run(tmp_path):
    made = small(tmp_path, FedProto())
    grid = site(tmp_path, made)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("consilium.loop.uuid.uuid4", lambda: type("U", (), {"hex": "flower"}))
        assert "the run's token is 'flower'" in refused(made, grid, tmp_path)


def test_a_small_model_without_a_limit_is_not_measured():
    """A simulation does not make a module only to count its numbers."""
    tiny.small_setup().admit_small(lambda: pytest.fail("made"), tiny.small_context())
