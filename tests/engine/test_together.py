"""Clients that work in step: what each would do alone, to the order of sums; errors, memory and seconds as alone."""

from dataclasses import replace

import pytest
import torch

from consilium import scoring
from consilium.algorithms.fedavg import FedAvg
from consilium.algorithms.fedprox import FedProx
from consilium.algorithms.fml import FML
from consilium.algorithms.lgfedavg import LGFedAvg
from consilium.algorithms.pfedmoe import pFedMoE
from consilium.algorithms.standalone import Standalone
from consilium.batched import stackable
from consilium.core import ClientInfo, Sampling
from consilium.data.arrays import ImageData
from consilium.engine.checkpoint import ClientStore
from consilium.engine.local import LocalEngine
from consilium.engine.meeting import in_step
from consilium.experiment import Experiment
from consilium.fit import Fit
from consilium.models.cohort import CNN, Cohort, SplitModel
from consilium.recipes.digits import SMALL_FIT

SHAPE = {"width": 8, "kernel": 3, "padding": 1}
ONE, MIXED = Cohort(("mnist-5",), small="mnist-5", **SHAPE), Cohort(("mnist-4", "mnist-5"), small="mnist-5", **SHAPE)
PLAIN = Fit(lr=0.1, head_lr=0.1, batch_size=16, epochs=2, **SMALL_FIT)
ADAM = Fit(batch_size=16, epochs=2, weight_decay=0.1, clip=0.5, label_smoothing=0.1)
MOMENTUM = replace(PLAIN, momentum=0.9, weight_decay=0.01)
CASES = {  # not AdamW with batch norms: it makes steps of the noise that is the gradient of a bias before them
    "pFedMoE": (pFedMoE(eta_phi=0.05), ONE, PLAIN),
    "pFedMoE, two architectures": (pFedMoE(), MIXED, PLAIN),
    "pFedMoE, AdamW and clipping": (pFedMoE(norm="layer"), ONE, ADAM),
    "pFedMoE, momentum": (pFedMoE(norm="group"), ONE, MOMENTUM),
    "pFedMoE, one row in a batch": (pFedMoE(), ONE, replace(PLAIN, batch_size=8)),
    "FedAvg": (FedAvg(), ONE, MOMENTUM),
    "LG-FedAvg": (LGFedAvg(), MIXED, PLAIN),
    "Standalone": (Standalone(), MIXED, ADAM),
}


def engine_of(algorithm, model, fit, folder, together, augment="none"):
    made = Experiment(
        "small", algorithm, ImageData(clients=6, examples=300, augment=augment), model, fit, sampling=Sampling(6)
    )
    federation = made.data.load(made.seed)
    infos = tuple(
        ClientInfo(client, len(data.train), data.task.name, architecture=model.architecture(i))
        for i, (client, data) in enumerate(federation.clients.items())
    )
    labels = [(data.task.name, data.task.labels) for data in federation.clients.values()]
    setup = made.setup(labels, infos, federation.shape)
    server, client = algorithm.server(setup), algorithm.client(setup)
    return LocalEngine(server, client, infos, federation, ClientStore(folder), made.seed, together=together)


def both(tmp_path, case, together=6, augment="none", rounds=2):
    engines = [engine_of(*case, tmp_path / str(n), n, augment) for n in (1, together)]
    records = [[engine.round(number, test=True) for number in range(1, rounds + 1)] for engine in engines]
    return engines, records


@pytest.mark.parametrize("name", CASES)
def test_in_step_is_what_each_does_alone(name, tmp_path, monkeypatch):
    from consilium import batched

    stacked = []
    monkeypatch.setattr(batched, "_fit", lambda jobs, fit=batched._fit: stacked.append(len(jobs)) or fit(jobs))
    (alone, together), records = both(tmp_path, CASES[name])
    assert sum(stacked) == 12, "all six clients were in a stack, in both rounds"
    for key, tensor in alone.server.params.items():
        assert torch.allclose(tensor, together.server.params[key], rtol=0, atol=1e-5), key
    for client in alone.clients:
        ours, theirs = (engine.store.load(client).params for engine in (together, alone))
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert torch.allclose(tensor, ours[key], rtol=1e-5, atol=1e-5), (client, key)
    for one, six in zip(*records, strict=True):
        assert one["test"] == six["test"]
        for client, told in one["clients"].items():
            other = six["clients"][client]
            assert told["validation"] == other["validation"] and told["steps"] == other["steps"]
            assert told["train_loss"] == pytest.approx(other["train_loss"], abs=1e-5)
            assert told["report"] == pytest.approx(other["report"], abs=1e-4)


def test_augmented_batches_are_those_of_each_alone(tmp_path):
    (alone, together), _ = both(tmp_path, CASES["pFedMoE"], augment="crop")
    for key, tensor in alone.server.params.items():
        assert torch.allclose(tensor, together.server.params[key], rtol=0, atol=1e-5), key


@pytest.mark.parametrize("algorithm", [FML(), FedProx()])
def test_a_method_with_a_loss_or_a_correction_of_its_own_is_trained_one_by_one_to_the_bit(algorithm, tmp_path):
    model = MIXED if isinstance(algorithm, FML) else ONE
    (alone, together), _ = both(tmp_path, (algorithm, model, PLAIN))
    assert all(torch.equal(tensor, together.server.params[key]) for key, tensor in alone.server.params.items())


@pytest.mark.parametrize("name", CASES)
def test_rows_filled_in_for_the_cpu_change_nothing(name, tmp_path, monkeypatch):
    """A batch's rows come in sixteens, whatever the clients hold: last batches, of one row too, and evaluation."""
    seen, called = [], SplitModel.forward
    monkeypatch.setattr(
        SplitModel, "forward", lambda model, batch: seen.append(len(batch["x"])) or called(model, batch)
    )
    filled, plain = (engine_of(*CASES[name], tmp_path / kind, 1) for kind in ("filled", "plain"))
    records = [filled.round(1, test=True)]
    assert seen and not any(rows % 16 for rows in seen)
    monkeypatch.setattr(scoring, "EVEN", 1)
    records.append(plain.round(1, test=True))
    assert any(rows % 16 for rows in seen)
    assert records[0]["test"] == records[1]["test"]
    for client in filled.clients:
        ours, theirs = (engine.store.load(client).params for engine in (filled, plain))
        for key, tensor in [*theirs.items(), *plain.server.params.items()]:
            assert torch.allclose(tensor, ours.get(key, filled.server.params.get(key)), rtol=1e-5, atol=1e-5), key


def test_a_model_whose_rows_may_see_each_other_is_not_stacked():
    class Centred(CNN):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    assert stackable(SplitModel(CNN((1, 8, 8), ONE, 2, 2, 4), "t", ("a", "b")))
    assert not stackable(SplitModel(Centred((1, 8, 8), ONE, 2, 2, 4), "t", ("a", "b")))
    assert not stackable(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)))
    assert not stackable(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout()))


def test_seconds_are_shared_by_those_who_worked_in_step(tmp_path):
    engine = engine_of(*CASES["FedAvg"], tmp_path, 6)
    record = engine.round(1, test=True)
    seconds = record["seconds"]
    assert 0 < seconds["train"] <= seconds["round"] and seconds["train"] + seconds["evaluate"] <= seconds["round"]


def double(jobs):
    return [2 * job for job in jobs]


def test_who_meets_is_answered_with_all_others_at_the_same_point():
    met = []

    def work(jobs):
        met.append(list(jobs))
        return double(jobs)

    def party(n):
        return lambda meet: sum(meet(work, 10 * n + i) for i in range(n))

    assert in_step([party(3), party(1), party(2)]) == [186, 20, 82]
    assert met == [[30, 10, 20], [31, 21], [32]]


def test_the_generator_of_each_is_as_if_it_were_alone():
    def party(seed):
        def call(meet):
            torch.manual_seed(seed)
            first = torch.rand(1).item()
            meet(double, torch.rand(1).item())
            return first, torch.rand(1).item()

        return call

    torch.manual_seed(7)
    before = torch.get_rng_state()
    together = in_step([party(1), party(2)])
    assert torch.equal(before, torch.get_rng_state())
    assert together == [in_step([party(1)])[0], in_step([party(2)])[0]]


def test_an_error_of_one_ends_all_and_leaves_no_thread():
    import threading

    def bad(meet):
        meet(double, 1)
        raise ValueError("no")

    before = threading.active_count()
    with pytest.raises(ValueError, match="no"):
        in_step([lambda meet: meet(double, meet(double, 1)), bad, lambda meet: meet(double, 1)])
    with pytest.raises(ZeroDivisionError):
        in_step([lambda meet: meet(lambda jobs: 1 / 0, 1), lambda meet: meet(double, 1)])
    assert threading.active_count() == before
