"""Rules of merging by hand, by property, and in a run in which one client lies."""

import dataclasses
import io
import itertools
import json
import math

import pytest
import runs
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from consilium.algorithms.fedavg import FedAvg, FedAvgClient
from consilium.algorithms.fedmoe import FedMoE
from consilium.algorithms.hfedmoe import HFedMoE
from consilium.algorithms.randommoe import RandomMoE
from consilium.core import Algorithm, Payload, Sampling
from consilium.engine.checkpoint import load_checkpoint
from consilium.errors import ConfigError, DataError, PayloadError
from consilium.experiment import from_json, to_json
from consilium.fit import Fit
from consilium.loop import run
from consilium.moe.lora import Lora
from consilium.moe.merging import Merging, RobustMean, group_of, krum, median_of, trimmed_mean
from consilium.params import WeightedMean
from consilium.rundir import RunDirectory
from consilium.watch import Terminal

TRUNK, EXPERT, OTHER, ROW = "layer.q", "b.experts.0.w", "b.experts.1.w", "b.router.0.weight"
OLD = {TRUNK: torch.zeros(2), EXPERT: torch.zeros(2), OTHER: torch.tensor([7.5, -0.0]), ROW: torch.zeros(2)}
RULES = ("median", "trimmed", "krum")


def merged(updates, merging, old=OLD, weights=None):
    """(new parameters, what is told) of updates name -> numbers, float32."""
    mean = RobustMean(merging, old, WeightedMean())
    for place, update in enumerate(updates):
        tensors = {key: torch.tensor(values) if isinstance(values, list) else values for key, values in update.items()}
        mean.add(tensors, 1 if weights is None else weights[place])
    return mean.mean(old), mean.told()


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_the_median_by_hand():
    """Of 1, 9, 4: 4. Of 1, 2, 10, 100: (2 + 10) / 2 = 6."""
    assert median_of(torch.tensor([[1.0], [9.0], [4.0]])).item() == 4
    assert median_of(torch.tensor([[1.0], [100.0], [10.0], [2.0]])).item() == 6


def test_the_trimmed_mean_by_hand():
    """Of -50, 1, 3, 8, 900 without the largest and the smallest: (1 + 3 + 8) / 3 = 4; without two each: 3."""
    x = torch.tensor([[900.0], [1.0], [-50.0], [8.0], [3.0]])
    assert trimmed_mean(x, 1).item() == 4
    assert trimmed_mean(x, 2).item() == 3


def test_krum_by_hand():
    """Numbers 0, 1, 2, 4, 100; f = 1, so each is scored by its n - f - 2 = 2 nearest others.

        0: 1 + 4 = 5    1: 1 + 1 = 2    2: 1 + 4 = 5    4: 4 + 9 = 13    100: 96^2 + 98^2

    Krum takes 1; multi-Krum of two takes 1 and, of the equals 0 and 2, the first.
    """
    x = torch.tensor([0.0, 1.0, 2.0, 4.0, 100.0], dtype=torch.float64)
    squared = (x[:, None] - x[None, :]).square()
    assert krum(squared, 1, 1) == [1]
    assert krum(squared, 1, 2) == [0, 1]


def test_krum_takes_an_experts_tensors_together():
    """In each tensor alone another client would be nearest; the distances of both tensors are summed.

    u = 0, 1, 2, 4, 100 as above; v = 0, 50, 0, 0, 0 makes client 1 lose: scores 0: 4 + 16 = 20, 2: 4 + 4 = 8,
    4: 4 + 16 = 20. Client 2 is taken: u = 2, v = 0.
    """
    old = {"b.experts.0.u": torch.zeros(1), "b.experts.0.v": torch.zeros(1)}
    u, v = (0.0, 1.0, 2.0, 4.0, 100.0), (0.0, 50.0, 0.0, 0.0, 0.0)
    updates = [{"b.experts.0.u": [a], "b.experts.0.v": [b]} for a, b in zip(u, v, strict=True)]
    new, _ = merged(updates, Merging("krum"), old)
    assert (new["b.experts.0.u"].item(), new["b.experts.0.v"].item()) == (2, 0)


def test_needs():
    """f = 2, m = 4: median and trimmed mean 5; Krum max(7, 8) = 8."""
    assert [Merging(rule, attackers=2, chosen=4).needs for rule in ("mean", *RULES)] == [1, 5, 5, 8]
    assert [Merging(rule).needs for rule in ("mean", *RULES)] == [1, 3, 3, 5]


@pytest.mark.parametrize("rule", RULES)
def test_with_too_few_contributors_the_old_expert_stays(rule):
    """Five have the trunk, expert 0 and its row; one fewer than the rule needs has expert 1: it stays, and is
    counted; so is nobody's."""
    needs = Merging(rule).needs
    updates = [{TRUNK: [1.0, 1.0], EXPERT: [2.0, 2.0], ROW: [3.0, 3.0]} for _ in range(5)]
    for update in updates[: needs - 1]:
        update[OTHER] = [1e6, 1e6]
    new, told = merged(updates, Merging(rule))
    assert [new[key][0].item() for key in (TRUNK, EXPERT, ROW)] == [1, 2, 3]
    assert new[OTHER] is OLD[OTHER]
    assert told == {"experts_kept": 1, "others_kept": 0, "parts": told["parts"]} and told["parts"] > 1
    updates[4] |= {OTHER: [1e6, 1e6]}
    assert merged(updates, Merging(rule))[0][OTHER][0] == 1e6  # honest: whoever agree, win


def test_weight_zero_is_no_contributor():
    """Three returned the expert, one of them with weight 0: two are too few, and the trunk of two is so as well."""
    updates = [{TRUNK: [1.0, 1.0], EXPERT: [2.0, 2.0]}] * 3
    new, told = merged(updates, Merging("median"), weights=[5, 0, 5])
    assert new[TRUNK] is OLD[TRUNK] and told == {"experts_kept": 1, "others_kept": 1, "parts": 2}


def test_clipping_by_hand():
    """Expert (3, 4) of norm 5 to norm 1: (0.6, 0.8). Trunk (0, 0.5) stays. Row (30, 40) to 10: (6, 8)."""
    update = {TRUNK: [0.0, 0.5], EXPERT: [3.0, 4.0], ROW: [30.0, 40.0]}
    new, told = merged([update], Merging(clip=1, clip_router=10))
    assert torch.allclose(new[EXPERT], torch.tensor([0.6, 0.8])) and torch.allclose(new[ROW], torch.tensor([6.0, 8.0]))
    assert torch.equal(new[TRUNK], torch.tensor([0.0, 0.5]))
    assert told == {"clipped": 1.0, "norm": 0.5}


def test_the_router_is_clipped_apart_and_as_one():
    """Rows (3, 0) and (0, 4) are a change of norm 5 together: to 1, (0.6, 0) and (0, 0.8); an expert is not touched."""
    old = {"b.router.0.weight": torch.zeros(2), "b.router.1.weight": torch.zeros(2), EXPERT: torch.zeros(2)}
    update = {"b.router.0.weight": [3.0, 0.0], "b.router.1.weight": [0.0, 4.0], EXPERT: [1e3, 0.0]}
    new, _ = merged([update], Merging(clip_router=1), old)
    flat = [x for key in old for x in new[key].tolist()]
    assert flat == pytest.approx([0.6, 0, 0, 0.8, 1e3, 0])


def test_uniform_counts_heads():
    """1 with 900 examples and 3 with 100: by examples 1.2, alike 2."""
    updates = [{TRUNK: [1.0, 1.0]}, {TRUNK: [3.0, 3.0]}]
    assert merged(updates, Merging(uniform=True), weights=[900, 100])[0][TRUNK][0] == 2


def test_groups():
    names = ["a.b.experts.3.down.lora_A", "a.b.router.3.weight", "head.t.a.b.weight", "head.t.a.b.bias", "norm.weight"]
    groups = [group_of(name) for name in names]
    assert groups == ["a.b.experts.3", "a.b.router.3", "head.t.a.b", "head.t.a.b", "trunk"]


# --- by property ------------------------------------------------------------------------------------------------------

NUMBERS = st.floats(-100, 100, width=32)
VECTORS = st.lists(NUMBERS, min_size=2, max_size=2)
ROUNDS = st.lists(st.fixed_dictionaries({TRUNK: VECTORS}, optional={EXPERT: VECTORS, OTHER: VECTORS}),
                  min_size=1, max_size=7)  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(ROUNDS, st.sampled_from(["median", "trimmed"]), st.randoms())
def test_the_order_of_replies_does_not_matter(updates, rule, rng):
    shuffled = list(updates)
    rng.shuffle(shuffled)
    a, b = merged(updates, Merging(rule)), merged(shuffled, Merging(rule))
    assert all(torch.allclose(a[0][key], b[0][key], atol=1e-5) for key in OLD) and a[1] == b[1]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 2),
    st.data(),
    st.sampled_from(["median", "trimmed"]),
    st.lists(st.lists(st.floats(-1e30, 1e30), min_size=2, max_size=2), min_size=2, max_size=2),
)
def test_attackers_cannot_leave_the_range_of_the_honest(f, data, rule, lies):
    """Every coordinate of median and trimmed mean lies within the honest ones, whatever f clients send."""
    honest = data.draw(st.lists(VECTORS, min_size=f + 1, max_size=6))
    new, _ = merged([{EXPERT: x} for x in honest + lies[:f]], Merging(rule, attackers=f))
    x = torch.tensor(honest, dtype=torch.float32)
    assert (new[EXPERT] >= x.amin(0) - 1e-4).all() and (new[EXPERT] <= x.amax(0) + 1e-4).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(VECTORS, min_size=4, max_size=6), st.floats(1e3, 1e9), st.booleans(), st.randoms())
def test_krum_takes_no_client_that_is_far_from_all(honest, far, negative, rng):
    """One client outside the diameter of the honest, by more than that, is never taken."""
    lie = [-far if negative else far] * 2
    updates = [{EXPERT: x} for x in honest] + [{EXPERT: lie}]
    rng.shuffle(updates)
    new, _ = merged(updates, Merging("krum"))
    assert any(torch.equal(new[EXPERT], torch.tensor(x, dtype=torch.float32)) for x in honest)


@settings(max_examples=40, deadline=None)
@given(ROUNDS, st.lists(st.integers(1, 1000), min_size=7, max_size=7))
def test_a_large_bound_changes_no_bit(updates, weights):
    """Clipping at 1e9 is the weighted mean, bit for bit."""
    plain = WeightedMean()
    for update, weight in zip(updates, weights, strict=False):
        plain.add({key: torch.tensor(x) for key, x in update.items()}, weight)
    new, _ = merged(updates, Merging(clip=1e9, clip_router=1e9), weights=weights)
    assert tiny.same(new, plain.mean(OLD))


@settings(max_examples=40, deadline=None)
@given(VECTORS, st.floats(1e-3, 200))
def test_clipping_bounds_the_norm_and_keeps_the_direction(x, bound):
    """The norm is at most C; the change points where it did; within C not a bit changes."""
    new = merged([{EXPERT: x}], Merging(clip=bound))[0][EXPERT].double()
    x = torch.tensor(x, dtype=torch.float32).double()
    assert float(new.norm()) <= bound * (1 + 1e-6)
    if float(x.norm()) <= bound:
        assert torch.equal(new, x)
    assert float(new @ x) == pytest.approx(float(new.norm() * x.norm()), rel=1e-5, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(VECTORS, st.integers(5, 7), st.sampled_from(RULES))
def test_identical_updates_give_that_update(x, n, rule):
    new, told = merged([{EXPERT: x}] * n, Merging(rule))
    assert torch.allclose(new[EXPERT], torch.tensor(x, dtype=torch.float32), rtol=1e-6)
    assert told["experts_kept"] == 0


def test_all_dtypes_and_shapes_survive_the_spool():
    """bfloat16, 0-d and rows of one storage; the result has the server's dtype."""
    fused = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    old = {"head.t.a.bias": torch.zeros(()), "b.experts.0.w": fused[0] * 0, "b.experts.1.w": fused[1] * 0}
    update = {"head.t.a.bias": torch.tensor(2.0), "b.experts.0.w": fused[0], "b.experts.1.w": fused[1]}
    new, _ = merged([update] * 3, Merging("median"), old)
    assert tiny.same(new, update)


def test_the_files_go_with_the_merge(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mean = RobustMean(Merging("median"), OLD, WeightedMean())
    mean.add({TRUNK: torch.ones(2)}, 1)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    del mean
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("params", "weight"),
    [({"other": torch.zeros(2)}, 1), ({TRUNK: torch.zeros(1)}, 1), ({TRUNK: torch.zeros(2)}, math.nan),
     ({TRUNK: torch.zeros(2)}, -1)],
)  # fmt: skip
def test_what_is_not_the_servers_is_refused(params, weight):
    with pytest.raises(PayloadError):
        RobustMean(Merging("median"), OLD, WeightedMean()).add(params, weight)


# --- in a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.table(tmp_path_factory.mktemp("data"), clients=5)


@pytest.fixture
def liar(monkeypatch):
    """Client site-2 answers with a million times its change; empty it to make it honest."""
    real, liars = FedAvgClient.train, ["site-2"]

    def train(self, payload, context):
        reply = real(self, payload, context)
        if context.info.id not in liars:
            return reply
        sent = payload.group("params")
        params = {key: sent[key] + 1e6 * (t - sent[key]) for key, t in reply.group("params").items()}
        return Payload({**reply.groups, "params": params}, reply.scalars)

    monkeypatch.setattr(FedAvgClient, "train", train)
    return liars


_number = itertools.count()


def final(experiment, tmp_path):
    """(the largest weight of the server at the end, the records) of a run."""
    folder = tmp_path / str(next(_number))
    run(experiment, folder)
    params = load_checkpoint(folder / "checkpoints")[1].group("params")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return max(float(t.abs().max()) for t in params.values()), lines


@pytest.mark.parametrize("merging", [
    Merging("median"), Merging("trimmed"), Merging("krum"), Merging("krum", chosen=2), Merging(clip=1, clip_router=0.1)
], ids=lambda m: f"{m.rule}{m.chosen}{m.clip:g}")  # fmt: skip
def test_one_liar_of_five_does_not_wreck_the_model(merging, data, liar, tmp_path):
    """Its changes are 1e6 times too large: the plain mean is thrown far off, every rule stays where honest weights
    are."""
    experiment = runs.experiment(data, sampling=Sampling(5), rounds=1)
    attacked, lines = final(dataclasses.replace(experiment, merging=merging), tmp_path)
    assert lines[0]["ledger"]["ok"] == 5  # a lie, and no broken reply
    if merging.clip:
        assert lines[0]["server"]["clipped"] >= 1
    else:
        assert lines[0]["server"]["experts_kept"] == lines[0]["server"]["others_kept"] == 0
    wrecked, _ = final(experiment, tmp_path)
    liar.clear()
    honest, _ = final(experiment, tmp_path)
    assert attacked < honest + 1 < 100 < wrecked


def test_experts_of_few_stay_in_a_run(data, tmp_path):
    """Of eight experts everybody has two at random: the record says how many had fewer than three contributors."""
    experiment = runs.experiment(data, RandomMoE(experts=2), rounds=1, sampling=Sampling(5), merging=Merging("median"))
    folder = tmp_path / "few"
    run(experiment, folder)
    held = RunDirectory(folder).structure()["rounds"]["1"]
    holders = {}
    for blocks in held.values():
        for block, ids in blocks.items():
            for e in ids:
                holders[block, e] = holders.get((block, e), 0) + 1
    few = sum(n < 3 for n in holders.values())
    told = json.loads((folder / "metrics.jsonl").read_text())["server"]
    assert few > 0 and told.pop("parts") > 2 * few
    assert told == {"experts_kept": few, "others_kept": few}  # an expert and its router row


@pytest.mark.parametrize(
    "name", sorted(n for n, c in Algorithm.registry.items() if c.__module__.startswith("consilium."))
)
def test_every_method_merges_by_the_rule_or_refuses(name, monkeypatch, tmp_path):
    """Whoever says that it merges asks `Setup.mean` in every round with replies."""
    method = Algorithm.registry[name]
    if not method.merges:
        return
    changes = {"stage1": "none"} if name == "FedMoE" else {"router": "plain"} if name == "HFedMoE" else {}
    world = next(w for w in ("cohort", "moe", "mixed") if w in method.worlds)
    made = tiny.setup() if world == "moe" else tiny.small_setup(world)
    asked, real = [], RobustMean.mean
    monkeypatch.setattr(RobustMean, "mean", lambda self, previous: asked.append(1) or real(self, previous))
    made = dataclasses.replace(made, merging=Merging("median"))
    algorithm = method(**changes)
    engine = tiny.engine(algorithm.server(made), algorithm.client(made), made, tmp_path)
    before = {key: t.clone() for key, t in engine.server.params.items()}
    record = engine.round(1, test=False)
    assert record["ledger"]["ok"] == 3 and len(asked) == 1
    assert "experts_kept" in record["server"]
    assert any(not torch.equal(engine.server.params[key], before[key]) for key in before)


def test_what_does_not_go_together_is_refused(data):
    base = runs.experiment(data)
    with pytest.raises(ConfigError, match="needs 3 contributors"):
        dataclasses.replace(base, merging=Merging("median"))
    with pytest.raises(ConfigError, match="SCAFFOLD's server does not merge"):
        runs.experiment(data, "SCAFFOLD", merging=Merging(clip=1))
    with pytest.raises(ConfigError, match="'svd' is a mean of its own"):
        fit = Fit(lora=Lora(rank=2, rule="svd"))
        dataclasses.replace(base, sampling=Sampling(5), fit=fit, merging=Merging("median"))
    with pytest.raises(ConfigError, match="router 'plain'"):
        HFedMoE().server(dataclasses.replace(tiny.setup(), merging=Merging(clip=1)))
    for bad in (dict(rule="mode"), dict(attackers=0), dict(chosen=0), dict(clip=-1.0), dict(clip_router=math.inf)):
        with pytest.raises(ConfigError):
            Merging(**bad)


@pytest.mark.parametrize(("merging", "sampling", "most"), [
    (Merging("krum", attackers=2), Sampling(7), 5), (Merging("median"), Sampling(5, distinct_tasks=True), 1),
], ids=["clients", "tasks"])  # fmt: skip
def test_a_rule_that_no_round_can_satisfy_is_refused(data, tmp_path, merging, sampling, most):
    """Before anything is written: five clients of one task cannot be seven, nor three of different tasks."""
    made = runs.experiment(data, sampling=sampling, merging=merging)
    with pytest.raises(ConfigError, match=rf"needs {merging.needs} contributors, but .* has at most {most}: nothing"):
        run(made, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("terminal", [False, True])
def test_the_line_of_a_round_says_how_many_parts_were_kept(data, tmp_path, terminal):
    """Three of five clients reply, and every part needs five: the model stays as it is."""
    merging = Merging("krum", attackers=1)
    made = runs.experiment(data, "FedAvg", rounds=1, sampling=Sampling(5), merging=merging)
    out, real = io.StringIO(), FedAvgClient.train

    def train(self, payload, context):
        if context.info.id in ("site-0", "site-1"):
            raise DataError("no data today")
        return real(self, payload, context)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FedAvgClient, "train", train)
        with Terminal(Console(file=out, width=300, force_terminal=terminal, no_color=True)) as watch:
            run(made, tmp_path / "run", watch)
    told = json.loads((tmp_path / "run/metrics.jsonl").read_text())["server"]
    parts = int(told["parts"])
    assert told["experts_kept"] + told["others_kept"] == parts > 10
    assert f"{parts} of {parts} parts kept: too few contributors" in out.getvalue()


def test_saved_and_given_back(data):
    experiment = runs.experiment(data, FedAvg(), merging=Merging("mean", clip=2.5))
    assert from_json(json.loads(json.dumps(to_json(experiment)))) == experiment
    saved = to_json(runs.experiment(data, FedMoE()))
    del saved["merging"], saved["privacy"]  # of an older version
    assert from_json(saved).merging.plain
