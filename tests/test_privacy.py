"""Client-level differential privacy: the mean by hand, its sensitivity, the accountant against formulas of its own, the
account of a run, fresh noise, the budget; and the modes of telling usage."""

import dataclasses
import io
import json
import math
import random
import statistics
import time

import pytest
import runs
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from consilium import loop as running
from consilium import privacy as module
from consilium.algorithms.fedavg import FedAvgClient, FedAvgServer
from consilium.algorithms.fedmoe import FedMoE
from consilium.core import Algorithm, Payload, Sampling
from consilium.engine.account import Account
from consilium.engine.checkpoint import load_checkpoint
from consilium.errors import CheckpointError, ConfigError, DataError, PayloadError
from consilium.export import card
from consilium.loop import resume, run
from consilium.moe.merging import Merging
from consilium.params import WeightedMean
from consilium.prepare import prepare
from consilium.privacy import PoissonSampling, Privacy, PrivateMean, epsilon_spent, usage_told
from consilium.rundir import RunDirectory
from consilium.watch import Terminal

pytest.importorskip("dp_accounting", reason="the extra 'privacy' is not installed")

OLD = {"layer.q": torch.tensor([1.0, 1.0]), "b.experts.0.w": torch.tensor([2.0]), "count": torch.tensor([7])}


@pytest.fixture
def silent(monkeypatch):
    """No noise and everybody drawn: what the rest of the arithmetic comes to."""
    monkeypatch.setattr(torch, "randn", lambda shape, **_: torch.zeros(shape, dtype=torch.float64))
    monkeypatch.setattr(random.SystemRandom, "random", lambda self: 0.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.table(tmp_path_factory.mktemp("data"))


def private(data, /, rounds=3, method="FedAvg", **changes):
    settings = dict(noise=2.0, clip=0.5, epsilon=50.0, delta=1e-3) | changes
    return runs.experiment(data, method, rounds=rounds, privacy=Privacy(**settings))


def lines(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


# --- the mean ---------------------------------------------------------------------------------------------------------


def test_the_private_mean_by_hand(silent):
    """C = 1, m = 4, two reply. The first changes by (3, 4) and nothing of the expert: norm 5, to (0.6, 0.8). The
    second by (0, 0.3) and 0.4: norm 0.5, as it is. Trunk 1 + (0.6, 1.1) / 4, expert 2 + 0.4 / 4. Declared weights do
    not count, integers stay."""
    mean = PrivateMean(Privacy(noise=1, clip=1), OLD, 4)
    mean.add({"layer.q": torch.tensor([4.0, 5.0]), "count": torch.tensor([9])}, 1000)
    mean.add({"layer.q": torch.tensor([1.0, 1.3]), "b.experts.0.w": torch.tensor([2.4])}, 1)
    new = mean.mean(OLD)
    assert torch.allclose(new["layer.q"], torch.tensor([1.15, 1.275])) and new["b.experts.0.w"].item() == pytest.approx(
        2.1
    )
    assert new["count"] is OLD["count"] and mean.told() == {"clipped": 1.0}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.floats(-1e15, 1e15), min_size=3, max_size=3), max_size=4), st.data())
def test_one_client_moves_the_sum_by_the_clipping_norm_at_most(updates, data):
    """With and without a client, whatever it sends and whichever names: the sums differ by C at most (P1)."""
    names = data.draw(st.sets(st.sampled_from(["layer.q", "b.experts.0.w"])))
    x = data.draw(st.lists(st.floats(-1e15, 1e15), min_size=3, max_size=3))

    def summed(clients):
        mean = PrivateMean(Privacy(noise=1, clip=0.5), OLD, 4)
        for values, keys in clients:
            t = torch.tensor(values, dtype=torch.float64)
            mean.add({k: v for k, v in (("layer.q", t[:2]), ("b.experts.0.w", t[2:])) if k in keys}, 1)
        return mean._sums

    others = [(values, {"layer.q", "b.experts.0.w"}) for values in updates]
    without, with_ = summed(others), summed([*others, (x, names)])
    moved = math.sqrt(sum(float((with_[key] - without[key]).square().sum()) for key in with_))
    assert moved <= 0.5 * (1 + 1e-9) + 1e-9
    assert with_.keys() == without.keys()  # P2: the keys that are released do not depend on who has what


def test_the_noise_is_on_everything_and_has_its_size():
    """z C / m = 2 * 0.5 / 4 on 20,000 numbers, with the mean 0; also on an expert that nobody returned."""
    old = {"layer.q": torch.zeros(10_000), "b.experts.0.w": torch.zeros(10_000)}
    new = PrivateMean(Privacy(noise=2, clip=0.5), old, 4).mean(old)
    for t in new.values():
        assert float(t.std()) == pytest.approx(0.25, rel=0.05) and abs(float(t.mean())) < 0.01
    again = PrivateMean(Privacy(noise=2, clip=0.5), old, 4).mean(old)
    assert not torch.equal(new["layer.q"], again["layer.q"])
    torch.manual_seed(0)
    one = PrivateMean(Privacy(noise=2, clip=0.5), old, 4).mean(old)
    torch.manual_seed(0)
    assert not torch.equal(one["layer.q"], PrivateMean(Privacy(noise=2), old, 4).mean(old)["layer.q"])


class Normed(torch.nn.Sequential):
    """A convolution and a batch norm."""

    def __init__(self):
        super().__init__(torch.nn.Conv2d(1, 8, 3), torch.nn.BatchNorm2d(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_batch_norms_stay_finite_under_noise(dtype):
    """z = 1, C = 1, m = 5, 20 rounds of honest changes: variances stay positive, the output finite. Integer counters
    and flags stay what they are."""
    model = Normed().to(dtype).eval()
    with torch.no_grad():
        for seed in range(3):
            params = {**model.state_dict(), "flag": torch.tensor([True]), "steps": torch.tensor([3], dtype=torch.uint8)}
            for round in range(20):
                mean = PrivateMean(Privacy(noise=1, clip=1), params, 5)
                rng = torch.Generator().manual_seed(100 * seed + round)
                for _ in range(5):
                    change = {
                        key: t + (0.05 * torch.randn(t.shape, generator=rng)).to(t.dtype)
                        for key, t in params.items()
                        if t.dtype != torch.bool
                    }
                    mean.add(change, 1)
                params = mean.mean(params)
                assert float(params["1.running_var"].min()) > 0 and params["1.running_var"].dtype == dtype
            assert params["1.num_batches_tracked"] == 0 and params["flag"] and params["steps"] == 3
            model.load_state_dict({k: t for k, t in params.items() if k not in ("flag", "steps")})
            assert model(torch.ones(2, 1, 8, 8, dtype=dtype)).isfinite().all()


def test_large_running_statistics_leave_room_for_the_weights(silent):
    """C = 1: a change of 1,000 of a running mean is cut to sqrt(0.1), one of 0.9 of a weight stays: 1 at most."""
    old = {"w": torch.zeros(1), "norm.running_mean": torch.zeros(1), "norm.running_var": torch.ones(1)}
    mean = PrivateMean(Privacy(noise=1, clip=1), old, 1)
    mean.add({"w": torch.tensor([0.9]), "norm.running_mean": torch.tensor([1000.0])}, 1)
    new = mean.mean(old)
    assert new["w"].item() == pytest.approx(0.9) and new["norm.running_var"].item() == 1
    assert new["norm.running_mean"].item() == pytest.approx(0.1**0.5) and mean.told() == {"clipped": 1.0}
    again = PrivateMean(Privacy(noise=1, clip=1), old, 1)
    again.add({"w": torch.tensor([50.0]), "norm.running_var": torch.tensor([-50.0])}, 1)
    moved = again.mean(old)
    assert moved["w"].item() == pytest.approx(0.9**0.5) and moved["norm.running_var"].item() == pytest.approx(
        1 - 0.1**0.5
    )
    halved = PrivateMean(Privacy(noise=1, clip=100), old, 1)
    halved.add({"norm.running_var": torch.tensor([-50.0])}, 1)
    assert halved.mean(old)["norm.running_var"].item() == 0.5


def test_a_foreign_tensor_is_refused():
    for params in ({"other": torch.zeros(1)}, {"layer.q": torch.zeros(3)}):
        with pytest.raises(PayloadError):
            PrivateMean(Privacy(noise=1), OLD, 2).add(params, 1)


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_poisson_sampling_has_its_rate_and_no_seed():
    """Six clients at 1/2, 2,000 times: about 3, with the variance 1.5; equal seeds do not give equal choices."""
    chosen = Privacy(noise=1).sampled(Sampling(3), 6)
    assert isinstance(chosen, PoissonSampling) and chosen.rate == 0.5
    sizes = [len(chosen.choose(tiny.infos(), 1, 0)) for _ in range(2000)]
    assert statistics.mean(sizes) == pytest.approx(3, abs=0.2)
    assert statistics.variance(sizes) == pytest.approx(1.5, abs=0.3)
    assert chosen.quorum(0) == 0 and dataclasses.replace(chosen, min_clients=2).quorum(5) == 2
    assert Privacy(noise=1, sampling="fixed").sampled(Sampling(3), 6) == Sampling(3)
    assert Privacy().sampled(Sampling(3), 6) == Sampling(3)
    with pytest.raises(ConfigError, match="distinct_tasks"):
        Privacy(noise=1).sampled(Sampling(3, distinct_tasks=True), 6)


# --- the accountant ---------------------------------------------------------------------------------------------------


def gaussian_delta(epsilon, mu):
    """Balle and Wang 2018, Theorem 8: delta(epsilon) of a Gaussian mechanism with sensitivity / sigma = mu."""

    def phi(x):
        return math.erfc(-x / math.sqrt(2)) / 2  # exact in the tail, unlike NormalDist

    return phi(mu / 2 - epsilon / mu) - math.exp(epsilon) * phi(-mu / 2 - epsilon / mu)


def solved(delta_of, delta):
    low, high = 0.0, 100.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle) > delta else (low, middle)
    return high


@pytest.mark.parametrize(("z", "rounds"), [(4.0, 20), (1.0, 1), (0.7, 10)])
def test_epsilon_without_amplification_is_the_closed_form(z, rounds):
    """T Gaussian mechanisms are one with mu = sqrt(T) / z; within 1 %, and never below."""
    told = epsilon_spent(Privacy(noise=z, sampling="fixed", delta=1e-3), 12, 5, rounds, False)
    exact = solved(lambda e: gaussian_delta(e, math.sqrt(rounds) / z), 1e-3)
    assert exact <= told * (1 + 1e-6) and told == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize(("z", "q"), [(1.0, 0.1), (2.0, 0.5)])
def test_epsilon_of_a_sampled_round_is_the_integral(z, q):
    """One round, by summing [p - e^eps r]+ over a grid, p = (1-q) N(0, z) + q N(1, z) and r = N(0, z), both ways."""
    x = torch.linspace(-12 * z, 12 * z + 1, 400_001, dtype=torch.float64)
    r = torch.exp(-x.square() / (2 * z * z)) / (z * math.sqrt(2 * math.pi))
    p = (1 - q) * r + q * torch.exp(-(x - 1).square() / (2 * z * z)) / (z * math.sqrt(2 * math.pi))

    def delta_of(epsilon):
        e = math.exp(epsilon)
        return max(float(torch.trapezoid((a - e * b).clamp(min=0), x)) for a, b in ((p, r), (r, p)))

    told = epsilon_spent(Privacy(noise=z, delta=1e-3), 100, round(100 * q), 1, False)
    assert told == pytest.approx(solved(delta_of, 1e-3), rel=0.01)


FAULTS = [(0.8, 0.02, 200), (0.8, 0.01, 1000), (0.7, 0.01, 2000), (1.0, 0.05, 1000)]
"""Settings (z, q, rounds) at which epsilon was 3 to 172 % too large while the steps grew with the rounds."""
CORNERS = [(z, q, rounds) for z in (0.6, 4.0) for q in (0.01, 0.2) for rounds in (1, 2000)]
GRID = [
    (z, q, rounds)
    for z in (0.6, 0.8, 1.0, 1.5, 2.5, 4.0)
    for q in (0.01, 0.02, 0.05, 0.2, 1.0)
    for rounds in (1, 30, 300, 2000)
]


def compared_with_dp_accounting(z, q, rounds, delta):
    """The library's bounds from above and from below at a step that is small beside the loss of a round. They are less
    than 1 % apart."""
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    step = min(1e-3, q / z / 100) if rounds == 1 else min(1e-3, q / z / 20)
    if q == 1:
        step = 1e-3 if rounds < 2000 else 5e-3  # of one Gaussian that stands for all rounds
    began = time.process_time()
    told = epsilon_spent(Privacy(noise=z, delta=delta), 100, round(100 * q), rounds, False)
    took = time.process_time() - began
    bounds = []
    for above in (True, False):
        noise, more = (z / rounds**0.5, 1) if q == 1 else (z, rounds)
        loss = from_gaussian_mechanism(
            noise, pessimistic_estimate=above, value_discretization_interval=step, sampling_prob=q,
            use_connect_dots=above,
        )  # fmt: skip
        bounds.append(loss.self_compose(more).get_epsilon_for_delta(delta))
    high, low = bounds
    certain = 1e-3 if q == 1 and rounds == 2000 else 1e-6  # its steps show at epsilons of a thousand
    assert low * (1 - certain) <= told + 1e-9, "below what is certain"
    assert told <= 1.01 * high + 1e-5
    assert told >= 0.99 * high - 1e-5
    assert took < 2


@pytest.mark.parametrize("delta", [1e-5, 1e-3])
@pytest.mark.parametrize(("z", "q", "rounds"), FAULTS + CORNERS)
def test_epsilon_over_a_grid_is_that_of_dp_accounting(z, q, rounds, delta):
    compared_with_dp_accounting(z, q, rounds, delta)


@pytest.mark.slow
@pytest.mark.parametrize(("z", "q", "rounds"), GRID)
def test_epsilon_over_the_whole_grid(z, q, rounds):
    compared_with_dp_accounting(z, q, rounds, 1e-5)


@pytest.mark.parametrize(
    ("z", "q", "rounds"), [(1.0, 0.1, 50), (2.0, 0.2, 2000), (0.6, 0.02, 500), (4.0, 0.05, 2000), *FAULTS]
)
@pytest.mark.filterwarnings("ignore:Optimal order is the")  # of its search for where to look
def test_epsilon_of_many_sampled_rounds_is_that_of_opacus(z, q, rounds):
    """The estimate of Opacus' PRV accountant, which says how far it may be off: 0.01."""
    accountants = pytest.importorskip("opacus.accountants", reason="Opacus is not installed")
    other = accountants.PRVAccountant()
    other.history = [(z, q, rounds)]
    told = epsilon_spent(Privacy(noise=z, delta=1e-3), 100, round(100 * q), rounds, False)
    assert told == pytest.approx(float(other.get_epsilon(1e-3)), rel=0.01, abs=0.015)


def test_epsilon_of_hopeless_settings_is_found_at_once():
    """Noise a tenth and a thousandth of the clip, 100,000 rounds: thousands, or infinity, in a second."""
    began = time.process_time()
    for z, sampling in ((0.1, "poisson"), (1e-3, "poisson"), (0.1, "fixed"), (1e-3, "fixed")):
        assert epsilon_spent(Privacy(noise=z, delta=1e-5, sampling=sampling), 20, 5, 100_000, False) > 1000
    assert epsilon_spent(Privacy(noise=1e4, delta=0.4), 20, 5, 1000, False) == pytest.approx(0, abs=1e-4)
    assert time.process_time() - began < 5


def test_epsilon_grows_with_rounds_and_rate_and_falls_with_noise():
    def spent(z=1.0, cohort=5, rounds=4, **more):
        return epsilon_spent(Privacy(noise=z, delta=0.01, **more), 20, cohort, rounds, bool(more))

    assert 0 == spent(rounds=0) < spent(rounds=1) < spent() < spent(rounds=8)
    assert spent(z=2.0) < spent() < spent(z=0.5)
    assert spent(cohort=2) < spent() < spent(cohort=20)
    assert spent() < spent(usage="noised", usage_noise=3.0)  # charged to the same budget
    assert Privacy(noise=1).delta_for(100) == pytest.approx(100**-1.1)


@settings(max_examples=12, deadline=None)
@given(
    st.floats(0.7, 6), st.integers(1, 19), st.integers(1, 40), st.integers(1, 10), st.floats(1.05, 3),
    st.sampled_from(["poisson", "fixed"]),
)  # fmt: skip
def test_epsilon_never_falls_with_rounds_or_rate_nor_rises_with_noise(z, cohort, rounds, more, factor, sampling):
    """Whatever they are, within the accountant's own steps."""

    def spent(z, cohort, rounds):
        return epsilon_spent(Privacy(noise=z, delta=0.01, sampling=sampling), 20, cohort, rounds, False)

    here, least = spent(z, cohort, rounds), 0.999
    assert spent(z, cohort, rounds + more) >= least * here
    assert spent(z, cohort + 1, rounds) >= least * here
    assert here >= least * spent(factor * z, cohort, rounds)


# --- in a run ---------------------------------------------------------------------------------------------------------


def test_a_run_tells_what_it_spent(data, tmp_path):
    """Three rounds of rate 2/3: in every record, in the summary, in the account and on the card."""
    experiment = private(data)
    summary = run(experiment, tmp_path / "run")
    spent = [epsilon_spent(experiment.privacy, 3, 2, n, False) for n in (1, 2, 3)]
    records = lines(tmp_path / "run", "metrics.jsonl")
    assert [record["privacy"]["epsilon"] for record in records] == spent
    assert [line["round"] for line in lines(tmp_path / "run", "privacy.jsonl")] == [1, 2, 3]
    told = summary["privacy"]
    assert told["epsilon"] == spent[-1] and told["covers"] == ["weights"] and told["rate"] == pytest.approx(2 / 3)
    assert told["delta"] == 1e-3 and told["neighbours"] == "one client added or removed"
    said = card.private(told, experiment)
    assert f"epsilon {told['epsilon']:.4g} at delta" in said and "poisson" in said


def test_a_delta_that_is_too_large_is_told_of(data, tmp_path):
    """The default for 3 clients, 0.3; on the screen, in the records, in the summary, on the card. A tenth of 1 / N is
    small enough; where nothing is charged, delta does not matter."""
    lines_of = io.StringIO()
    with Terminal(Console(file=lines_of, width=400)) as watch:
        summary = run(private(data, rounds=1, delta=0), tmp_path / "run", watch)
    said = "privacy.delta is 0.299 (the default, 1 / N^1.1), which is not well below 1 / N = 0.333"
    assert said in lines_of.getvalue() and said in summary["privacy"]["warning"]
    assert all(said in record["privacy"]["warning"] for record in lines(tmp_path / "run", "metrics.jsonl"))
    assert said in card.private(summary["privacy"], private(data))
    assert "warning" not in run(private(data, rounds=1, delta=0.03), tmp_path / "small")["privacy"]
    for clients in (1, 2, 30, 10**6):
        assert "the default" in Privacy(noise=1).delta_warning(clients)
        assert Privacy(noise=1, delta=0.2 / clients).delta_warning(clients)
        assert Privacy(noise=1, delta=0.1 / clients).delta_warning(clients) is None
        assert Privacy(delta=0.9).delta_warning(clients) is None
    assert Privacy(usage="noised", usage_noise=1).delta_warning(30)


def test_two_runs_of_one_seed_have_other_noise(data, tmp_path):
    fixed = private(data, rounds=1, sampling="fixed")
    weights = {run(fixed, tmp_path / name)["weights"] for name in "ab"}
    assert len(weights) == 2
    plain = runs.experiment(data, rounds=1)
    assert len({run(plain, tmp_path / name)["weights"] for name in "cd"}) == 1


def test_a_run_ends_before_the_budget_is_exceeded(data, tmp_path):
    """The budget is what two rounds spend and a little: the third does not begin, and the second is scored."""
    two = epsilon_spent(private(data).privacy, 3, 2, 2, False)
    experiment = dataclasses.replace(private(data, epsilon=two * 1.01, rounds=3), evaluate_every=3)
    summary = run(experiment, tmp_path / "run")
    assert summary["rounds"] == 2 and summary["privacy"]["epsilon"] <= two * 1.01
    assert set(summary["clients"]["site-0"]) >= {"test"} and summary["mean"] is not None
    with pytest.raises(ConfigError, match="one round would spend"):
        run(private(data, epsilon=0.01), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_crashed_round_gets_fresh_noise_and_is_charged_again(data, tmp_path, monkeypatch):
    """Killed between the release of round 2's model and its checkpoint: the round is done again, with other noise, and
    the account has four attempts for three rounds."""
    experiment, released, real = private(data, sampling="fixed"), [], running.save_checkpoint

    def save(folder, round, server, *rest):
        released.append((round, server.group("params")["head.task.cat.weight"].clone()))
        if len(released) == 2:
            raise KeyboardInterrupt
        real(folder, round, server, *rest)

    monkeypatch.setattr(running, "save_checkpoint", save)
    with pytest.raises(KeyboardInterrupt):
        run(experiment, tmp_path / "run")
    summary = resume(tmp_path / "run")
    assert [round for round, _ in released] == [1, 2, 2, 3]
    assert not torch.equal(released[1][1], released[2][1])
    assert summary["privacy"]["attempts"] == 4 and summary["rounds"] == 3
    assert summary["privacy"]["epsilon"] == epsilon_spent(experiment.privacy, 3, 2, 4, False)


def test_an_account_that_was_lost_stops_the_run(data, tmp_path):
    experiment = private(data)
    run(experiment, tmp_path / "run")
    (tmp_path / "run/privacy.jsonl").write_text('{"round": 1}\n{"rou')  # torn: two attempts
    account = Account(tmp_path / "run", experiment, 3)
    assert account.attempts == 2
    with pytest.raises(CheckpointError, match="what was spent is not known"):
        account.check(3)


def test_a_round_that_draws_nobody_is_noise_alone(data, tmp_path, monkeypatch):
    monkeypatch.setattr(random.SystemRandom, "random", lambda self: 0.999)
    summary = run(private(data, rounds=2), tmp_path / "run")
    records = lines(tmp_path / "run", "metrics.jsonl")
    assert [record["selected"] for record in records] == [[], []] and not any(r["abandoned"] for r in records)
    assert summary["rounds"] == 2 and summary["privacy"]["attempts"] == 2
    head = FedAvgServer(tiny.setup()).params
    assert head  # zero rows at first; the noise has moved them
    assert summary["weights"] != run(runs.experiment(data, rounds=1), tmp_path / "plain")["weights"]


def test_an_absent_client_is_a_zero(data, tmp_path, monkeypatch, silent):
    """All three are drawn, one fails: the others' changes are divided by the expected two all the same."""
    real, changes, started = FedAvgClient.train, [], []

    def train(self, payload, context):
        if context.info.id == "site-1":
            raise DataError("no data today")
        reply, sent = real(self, payload, context), payload.group("params")
        started.append(sent)
        changes.append({key: (t - sent[key]).double() for key, t in reply.group("params").items()})
        return reply

    monkeypatch.setattr(FedAvgClient, "train", train)
    run(private(data, rounds=1, clip=0.1), tmp_path / "run")
    params = load_checkpoint(tmp_path / "run/checkpoints")[1].group("params")
    scales = [0.1 / math.sqrt(sum(float(c.square().sum()) for c in change.values())) for change in changes]
    assert len(scales) == 2 and max(scales) < 1
    for key, old in started[0].items():
        moved = sum(scale * change[key] for scale, change in zip(scales, changes, strict=True)) / 2
        assert torch.allclose(params[key].double(), old.double() + moved, atol=1e-6)


@pytest.mark.parametrize(
    "name", sorted(n for n, c in Algorithm.registry.items() if c.__module__.startswith("consilium."))
)
def test_every_method_is_private_or_refuses(name, tmp_path, monkeypatch):
    """Replies of which only "params" through `Setup.mean` matter: spoiling all else of them changes no bit of what the
    server releases. The others say what they read."""
    method = Algorithm.registry[name]
    if not method.merges or method().reads():
        return
    world = next(w for w in ("cohort", "moe", "mixed") if w in method.worlds)
    made = tiny.setup() if world == "moe" else tiny.small_setup(world)
    made = dataclasses.replace(made, privacy=Privacy(noise=1.0, sampling="fixed"))
    monkeypatch.setattr(module, "fresh_generator", lambda: torch.Generator().manual_seed(0))

    def released(spoil, folder):
        algorithm = method()
        engine = tiny.engine(algorithm.server(made), algorithm.client(made), made, folder)
        server, real = engine.server, engine.server.aggregate

        def replies(found):
            for client, reply in found:
                scalars = {"num_examples": 1, **({k: v for k, v in reply.scalars.items() if k.startswith("shape ")})}
                yield client, Payload(reply.groups, scalars if spoil else reply.scalars)

        server.aggregate = lambda round, found: real(round, replies(found))
        assert engine.round(1, test=False)["ledger"]["ok"] == 3
        return server.params

    assert tiny.same(released(False, tmp_path / "a"), released(True, tmp_path / "b"))


def test_what_noise_would_not_cover_is_refused(data):
    way_out = r"set algorithm.stage2 False \(--algorithm.no-stage2\), privacy.usage noised and privacy.usage_noise$"
    with pytest.raises(ConfigError, match=f"FedMoE's server goes by usage and validation scores .*; {way_out}"):
        private(data, method="FedMoE")
    with pytest.raises(ConfigError, match=r"cover; set privacy.usage noised and privacy.usage_noise$"):
        private(data, method=FedMoE(stage2=False))
    with pytest.raises(ConfigError, match=r"HFedMoE's server goes by .*; take a method that merges models alone"):
        private(data, method="HFedMoE")
    for name in ("SCAFFOLD", "Standalone"):
        with pytest.raises(ConfigError, match="does not merge models alone"):
            private(data, method=name)
    with pytest.raises(ConfigError, match="own clipping"):
        runs.experiment(data, privacy=Privacy(noise=1), merging=Merging(clip=1))
    with pytest.raises(ConfigError, match="goes by usage of"):
        private(data, method=FedMoE(stage2=False))
    private(data, method=FedMoE(stage2=False), usage="noised", usage_noise=1.0)
    private(data, method=FedMoE(stage1="none", stage2=False))
    for bad in (dict(noise=-1), dict(clip=0), dict(epsilon=0), dict(delta=1), dict(sampling="all"), dict(usage="no"),
                dict(usage="noised"), dict(usage_noise=1.0), dict(noise=math.inf)):  # fmt: skip
        with pytest.raises(ConfigError):
            Privacy(**bad)


# --- usage ------------------------------------------------------------------------------------------------------------

DEMAND = {"b": torch.tensor([5, 0, 9, 5]), "c": torch.tensor([0, 0, 0, 8])}


def test_the_modes_by_hand(monkeypatch):
    """Upper halves: 2 and of the equals the first; 3 and the first. Without noise, shares of a million."""
    assert usage_told(DEMAND, Privacy()) == DEMAND
    coarse = usage_told(DEMAND, Privacy(usage="coarse"))
    assert {block: t.tolist() for block, t in coarse.items()} == {"b": [1, 0, 1, 0], "c": [1, 0, 0, 1]}
    monkeypatch.setattr(torch, "randn", lambda shape, **_: torch.zeros(shape, dtype=torch.float64))
    noised = usage_told({"b": torch.tensor([1, 3])}, Privacy(usage="noised", usage_noise=1))
    assert noised["b"].tolist() == [250_000, 750_000] and noised["b"].dtype == torch.int64


@settings(max_examples=40, deadline=None)
@given(*[st.lists(st.integers(0, 1000), min_size=12, max_size=12)] * 2)
def test_a_clients_shares_change_by_sqrt_2l_at_most(before, after):
    """P4: the joint L2 sensitivity of L = 3 normalised histograms is at most sqrt(2 L), of any two clients."""

    def shares(n):
        x_LE = torch.tensor(n, dtype=torch.float64).reshape(3, 4)
        return x_LE / x_LE.sum(1, keepdim=True).clamp(min=1)

    assert float((shares(before) - shares(after)).norm()) <= math.sqrt(6) + 1e-9


def test_noised_usage_has_its_noise():
    """z_u sqrt(2 L) = 0.01 sqrt(4) = 0.02 on shares of 0.5, in 4,000 experts; and none below 0."""
    demand = {"b": torch.ones(2, dtype=torch.int64), "c": torch.ones(2, dtype=torch.int64)}
    mode = Privacy(usage="noised", usage_noise=0.01)
    told = torch.stack([usage_told(demand, mode)["b"] for _ in range(2000)]).double() / module.TOKENS
    assert float(told.std()) == pytest.approx(0.02, rel=0.1) and float(told.mean()) == pytest.approx(0.5, abs=0.002)
    strong = usage_told(demand, Privacy(usage="noised", usage_noise=100))
    assert min(int(t.min()) for t in strong.values()) >= 0


@pytest.mark.parametrize(
    "mode", [Privacy(usage="coarse"), Privacy(usage="noised", usage_noise=0.05)], ids=lambda m: m.usage
)
def test_fedmoe_goes_by_what_it_is_told(mode, data, tmp_path):
    """A whole run; the server never sees a count, and served tokens of nobody. Noised usage is charged."""
    experiment = runs.experiment(
        data, FedMoE(stage1="forward"), rounds=2, privacy=dataclasses.replace(mode, epsilon=1e4)
    )
    summary = run(experiment, tmp_path / "run")
    usage = RunDirectory(tmp_path / "run").structure()["usage"]
    for blocks in usage.values():
        for p_E in blocks.values():
            assert sum(p_E) == pytest.approx(1)
            if mode.usage == "coarse":
                assert sorted(p_E) == [0] * 4 + [0.25] * 4
    if mode.usage == "noised":
        told = summary["privacy"]
        assert told["covers"] == ["usage"] and told["epsilon"] == told["epsilon_usage"] > 0
        assert "No differential privacy of the weights" in card.private(told, experiment)
    else:
        assert "privacy" not in summary


def test_usage_and_weights_share_a_budget(data, tmp_path):
    """P4: both epsilons are told, and the joint one is above each."""
    method = FedMoE(stage1="forward", stage2=False)
    summary = run(private(data, rounds=2, method=method, usage="noised", usage_noise=5.0), tmp_path / "run")
    told = summary["privacy"]
    weights = epsilon_spent(Privacy(noise=2.0, delta=1e-3), 3, 2, 2, False)
    assert told["covers"] == ["weights", "usage"]
    assert told["epsilon"] > max(told["epsilon_usage"], weights) > 0


def test_modes_that_a_method_cannot_use_are_refused(data):
    for method in (FedMoE(usage="served"), FedMoE(weight="tokens"), Algorithm.registry["HFedMoE"]()):
        with pytest.raises(ConfigError, match="usage"):
            prepare(runs.experiment(data, method, privacy=Privacy(usage="coarse")))


def test_a_sites_own_setting_holds():
    """Whatever the server says: of two noises the larger, coarse before exact, noised before coarse. A site that says
    coarse refuses a server that charges noised usage, however small its noise."""
    exact, coarse, noised = Privacy(noise=1), Privacy(usage="coarse"), Privacy(usage="noised", usage_noise=2)
    assert exact.at_site(coarse) == Privacy(noise=1, usage="coarse")
    assert coarse.at_site(exact) == coarse and noised.at_site(exact) == noised
    assert coarse.at_site(noised) == noised
    small = Privacy(usage="noised", usage_noise=0.02, epsilon=1e6)
    assert small.at_site(noised).usage_noise == 2 and noised.at_site(small) == noised
    assert small.at_site(exact) == small
    for theirs in (small, noised):
        with pytest.raises(ConfigError, match="this site tells coarse usage"):
            theirs.at_site(coarse)
    told = Privacy(labels="names").at_site(Privacy(scores="none"))
    assert (told.labels, told.scores) == ("names", "none")
    assert Privacy(scores="none").at_site(Privacy(scores="coarse")).scores == "none"


# --- what it is for ---------------------------------------------------------------------------------------------------


def auc(present, absent):
    """How often a score of those present is above one of those absent."""
    scores = torch.tensor(present)[:, None], torch.tensor(absent)[None, :]
    return float((scores[0] > scores[1]).double().mean() + (scores[0] == scores[1]).double().mean() / 2)


def test_ten_canaries_are_found_without_noise_and_not_with_epsilon_1():
    """Canary i changes coordinate i alone, by more than the clipping norm: the worst client that there can be. Whoever
    has the model looks at that coordinate. epsilon is 1 for one round of everybody, delta 1e-5: the best attack on one
    Gaussian of mu = 1 / z has the AUC Phi(mu / sqrt 2) = 0.575."""
    mode, rng = Privacy(noise=3.74, clip=1.0, sampling="fixed", delta=1e-5), torch.Generator().manual_seed(1)
    assert epsilon_spent(mode, 20, 20, 1, False) == pytest.approx(1, abs=0.02)
    old, found = {"w": torch.zeros(40)}, {"mean": ([], []), "private": ([], [])}
    for trial in range(2000):
        canary, here = trial % 10, trial % 20 < 10
        updates = [0.1 * torch.randn(40, generator=rng) / 40**0.5 for _ in range(4)]
        updates += [3.0 * torch.nn.functional.one_hot(torch.tensor(canary), 40)] if here else []
        for name, mean in (("mean", WeightedMean()), ("private", PrivateMean(mode, old, 5))):
            for update in updates:
                mean.add({"w": update.float()}, 1)
            found[name][0 if here else 1].append(float(mean.mean(old)["w"][canary]))
    assert auc(*found["mean"]) > 0.8
    assert 0.5 < auc(*found["private"]) <= 0.61
