"""On a GPU: the three systems run and resume there, clients in step learn what each learns alone, promised bytes hold,
and a base in 4 bits trains. `pytest -m gpu`."""

import dataclasses
import gc

import pytest
import runs
import tiny
import torch

from consilium.algorithms.fedavg import FedAvg
from consilium.algorithms.fedmoe import FedMoE
from consilium.algorithms.hfedmoe import HFedMoE
from consilium.algorithms.pfedmoe import pFedMoE
from consilium.core import ClientContext, ClientInfo, ClientState, Sampling
from consilium.data.arrays import ImageData
from consilium.experiment import Experiment
from consilium.fit import Fit
from consilium.loop import resume, run
from consilium.models.cohort import Cohort
from consilium.moe.addressing import select
from consilium.moe.lora import Lora
from consilium.recipes.digits import SMALL_FIT
from consilium.training import fit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _float32_is_float32():
    torch.backends.cudnn.allow_tf32 = False


def cohort(**changes):
    fit = Fit(lr=0.1, head_lr=0.1, batch_size=16, **SMALL_FIT)
    model = Cohort(("mnist-4", "mnist-5"), small="mnist-5", width=8, kernel=3, padding=1)
    settings = dict(rounds=3, sampling=Sampling(8), device="cuda")
    return Experiment("digits", pFedMoE(), ImageData(clients=8), model, fit, **settings | changes)


class Stop:
    """Ends the run after its second round."""

    def started(self, *told):
        pass

    step = written = started

    def rounded(self, record, events):
        if record["round"] == 2:
            raise KeyboardInterrupt


def final(folder):
    from consilium.engine.checkpoint import load_checkpoint

    return load_checkpoint(folder / "checkpoints").server.group("params")


def test_clients_in_step_one_by_one_and_on_the_cpu_learn_the_same(tmp_path):
    run(cohort(), tmp_path / "in step")
    run(cohort(workers=1), tmp_path / "alone")
    run(cohort(device="cpu"), tmp_path / "cpu")
    ours = final(tmp_path / "in step")
    for other in ("alone", "cpu"):
        for key, tensor in final(tmp_path / other).items():
            assert torch.allclose(tensor, ours[key], rtol=0, atol=1e-4), (other, key)
    records = [runs.outcome(tmp_path / name)["metrics"][-1] for name in ("in step", "alone", "cpu")]
    scores = [record["scores"]["mean"] for record in records]
    assert max(scores) - min(scores) < 0.02


def test_a_run_is_resumed(tmp_path):
    """To what it would have become, up to the order of sums, which a GPU leaves open."""
    run(cohort(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(cohort(), tmp_path / "parts", Stop())
    resume(tmp_path / "parts")
    whole, parts = final(tmp_path / "whole"), final(tmp_path / "parts")
    assert all(torch.allclose(tensor, parts[key], rtol=0, atol=1e-4) for key, tensor in whole.items())


@pytest.mark.parametrize("method", [FedMoE(stage1_epochs=1), HFedMoE(), FedAvg()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("model_type", tiny.FAMILIES)
def test_methods_run_over_every_family(method, model_type, tmp_path):
    """The same names and shapes as on the CPU; numbers that are any."""
    made = runs.experiment(
        runs.table(tmp_path), method, model=tiny.source(model_type), rounds=2, device="cuda", sampling=Sampling(3)
    )
    run(made, tmp_path / "gpu")
    run(dataclasses.replace(made, device="cpu"), tmp_path / "cpu")
    ours, theirs = final(tmp_path / "gpu"), final(tmp_path / "cpu")
    assert ours.keys() == theirs.keys() and all(t.isfinite().all() for t in ours.values())


def large(model_type, **fit):
    """8 experts of 786,432 parameters in two layers."""
    wide = {"d_ff": 1024, "d_model": 384} if model_type == "switch_transformers" else {"intermediate_size": 1024}
    if model_type != "switch_transformers":
        wide |= {"hidden_size": 256}
    return tiny.setup(tiny.source(model_type, **wide), batch_size=8, **fit)


def peak_of(setup, counts, trained, built=False):
    """Bytes that the GPU held at most in a client's training of those experts; built: once the model is there."""
    held = {block: tuple(range(n)) for block, n in counts.items()}
    data = tiny.federation().clients["animal-00"]
    info = ClientInfo("animal-00", len(data.train), "animal")
    context = ClientContext(info, data, torch.device("cuda"), 0, ClientState())
    params = select(setup.initial_params(), "animal", held)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = setup.build(params, context, held)
    if built:
        torch.cuda.reset_peak_memory_stats()
    choose = None if trained is None else lambda tap: {b: range(min(trained, counts[b])) for b in tap.held}
    fit(model, setup.encode(context, data.train), setup.fit, context, choose=choose)
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25, 0.125])
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("model_type", ["switch_transformers", "mixtral"])
def test_training_stays_within_the_promised_bytes(model_type, mode, share, capsys):
    setup = large(model_type, lora=Lora(rank=8 if mode == "lora" else 0))
    counts = {block: max(1, int(n * share)) for block, n in setup.model.counts.items()}
    counts = {block: max(n, setup.least[block]) for block, n in counts.items()}
    for trained in (None, 1):
        each = None if trained is None else trained * len(counts)
        promised = setup.footprint(counts, trained=each).total
        measured = peak_of(setup, counts, trained)
        with capsys.disabled():
            print(f"\n{model_type} {mode} {share:g} trained {trained}: {measured / 1e6:.1f} of {promised / 1e6:.1f} MB")
        assert measured <= promised


def test_a_base_in_4_bits_trains_and_is_smaller(tmp_path):
    pytest.importorskip("bitsandbytes")
    lora = Lora(rank=4, base="nf4")
    made = runs.experiment(runs.table(tmp_path), HFedMoE(), model=tiny.source("mixtral"), rounds=2, device="cuda")
    run(dataclasses.replace(made, fit=dataclasses.replace(made.fit, lora=lora)), tmp_path / "nf4")
    assert all(t.isfinite().all() for t in final(tmp_path / "nf4").values())
    held = {block: tuple(range(n)) for block, n in large("mixtral").model.counts.items()}
    counts = {block: len(ids) for block, ids in held.items()}
    setups = [large("mixtral", lora=Lora(rank=4, base=base)) for base in ("nf4", "full")]
    four, full = (peak_of(setup, counts, None, built=True) for setup in setups)
    assert four < 0.7 * full
