"""A site's training: what moves and what does not, resuming to the same bits, memory, differential privacy."""

import math
from dataclasses import replace

import pytest
import sites
import torch

from consilium.data.task import Split
from consilium.errors import BudgetError, CheckpointError, ConfigError, DataError
from consilium.oneshot.base import digest_of, frozen_tensors
from consilium.oneshot.dp import Private, _add_clipped
from consilium.oneshot.evaluate import alone
from consilium.oneshot.train import STATE, Training, site_data, train

KINDS = [("adapter", "olmoe"), ("gated", "olmoe"), ("expert", "olmoe"), ("adapter", "llama"), ("expert", "llama")]


def made(folder, kind, model="olmoe", site="north", **settings):
    where = sites.olmoe() if model == "olmoe" else sites.dense(model)
    return sites.package(folder, site, Training(kind, rank=4, gate_steps=6, save_every=3, **settings), where, rounds=2)


@pytest.mark.parametrize(("kind", "model"), KINDS)
def test_a_training_that_is_killed_goes_on_to_the_same_bits(tmp_path, monkeypatch, kind, model):
    """Stopped after every stretch in turn, also between the two stages, until it ends."""
    whole = made(tmp_path / "whole", kind, model)
    from consilium.oneshot.train import Trainer

    save, stops = Trainer._save, 0

    def save_and_stop(self, *args):
        save(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_save", save_and_stop)
    for _ in range(20):
        try:
            parts = made(tmp_path / "parts", kind, model)
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops == (5 if kind == "gated" else 3)  # 8 steps of two passes and 6 of gates, in stretches of 3
    assert digest_of(parts.tensors) == digest_of(whole.tensors)
    assert {**parts.metadata, "settings": None} == {**whole.metadata, "settings": None}


def test_gates_move_alone_in_their_stage(tmp_path):
    plain, gated = made(tmp_path / "a", "adapter"), made(tmp_path / "b", "gated")
    assert all(torch.equal(plain.tensors[name], gated.tensors[name]) for name in plain.tensors)
    gates = gated.part("gate")
    assert set(gates) == set(gated.pairs()) and all(gate.abs().sum() > 0 for gate in gates.values())


def test_the_gate_begins_at_one_half(tmp_path):
    trainer = sites.trainer(tmp_path, "north", Training("gated", rank=4))
    before = sites.logits(trainer.model)
    trainer._add_gates()
    module = next(iter(trainer.adapted.values()))
    assert torch.equal(module.weigh(torch.randn(3, module.a[0].shape[1])), torch.full((3, 1), 0.5))
    assert torch.equal(sites.logits(trainer.model), before)  # B is zero


def test_an_untrained_part_changes_nothing_and_training_helps(tmp_path):
    for kind, model in KINDS:
        where = sites.olmoe() if model == "olmoe" else sites.dense(model)
        trainer = sites.trainer(
            tmp_path / f"{kind}{model}", "north", Training(kind, rank=4, gate_steps=2), where, rounds=2
        )
        frozen = digest_of(frozen_tensors(trainer.model))
        if kind != "expert":
            assert torch.allclose(sites.logits(trainer.model), sites.logits(sites.base(model).model()), atol=1e-6)
        trainer.run(tmp_path / f"{kind}{model}")
        assert trainer.best[0] < trainer.before
        if kind != "gated":
            assert digest_of(frozen_tensors(trainer.model)) == frozen


def test_a_dense_models_mixture_of_one_expert_is_the_dense_model():
    base = sites.base("llama")
    assert torch.allclose(sites.logits(base.open_model()), sites.logits(base.model()), atol=1e-5)


def test_the_state_of_another_training_is_refused(tmp_path):
    made(tmp_path, "adapter")
    with pytest.raises(CheckpointError, match="of another training"):
        made(tmp_path, "adapter", alpha=2.0)
    (tmp_path / "state-north" / STATE).write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="cannot be read"):
        made(tmp_path, "adapter")


def test_memory_is_asked_for_before_anything_is_loaded(tmp_path):
    experiment = sites.experiment(tmp_path, "north")
    data = site_data(experiment)
    for kind in ("adapter", "expert"):
        with pytest.raises(BudgetError, match="training a part"):
            train(replace(experiment, memory=("1MB",)), "north", Training(kind), tmp_path / kind, data)
    for model in (None, sites.dense()):
        here = sites.experiment(tmp_path, "north", model, rounds=1)
        train(replace(here, memory=("100MB",)), "north", Training("expert"), tmp_path / f"{model and 1}", data)


def test_data_of_several_clients_must_say_whose(tmp_path):
    experiment = sites.experiment(tmp_path, "north")
    several = replace(experiment, data=replace(experiment.data, clients=2))
    with pytest.raises(DataError, match="answer-00, answer-01"):
        site_data(several)
    assert len(site_data(several, "answer-01").train) == 16


# --- differential privacy ---------------------------------------------------------------------------------------------


def test_rows_are_clipped_one_by_one():
    """Gradients (3, 4) of norm 5 and (0.3, 0.4) of norm 0.5, clipped to 1: (0.6, 0.8) + (0.3, 0.4)."""
    sums = [torch.zeros(1), torch.zeros(1)]
    _add_clipped(sums, (torch.tensor([3.0]), torch.tensor([4.0])), 1.0)
    _add_clipped(sums, (torch.tensor([0.3]), torch.tensor([0.4])), 1.0)
    _add_clipped(sums, (None, torch.zeros(1)), 1.0)
    assert torch.allclose(torch.cat(sums), torch.tensor([0.9, 1.2]))


def test_epsilon_is_in_the_card_and_no_score(tmp_path):
    pytest.importorskip("dp_accounting")
    package = made(tmp_path, "expert", dp_noise=1.0)
    told = package.card["privacy"]
    assert "validation" not in package.card and told["steps"] == 8 and told["rate"] == 8 / 32
    assert 0.5 < told["epsilon"] < 20 and told["delta"] == pytest.approx(32**-1.1)
    assert Private(2.0).told(32, 8, 8)["epsilon"] < told["epsilon"] < Private(1.0).told(32, 8, 16)["epsilon"]


def test_epsilon_is_that_of_opacus():
    accountants = pytest.importorskip("opacus.accountants", reason="Opacus is not installed")
    pytest.importorskip("dp_accounting")
    accountant = accountants.PRVAccountant()
    accountant.history = [(1.1, 0.1, 60)]
    ours = Private(1.1, delta=1e-5).told(1000, 100, 60)["epsilon"]
    assert ours == pytest.approx(accountant.get_epsilon(1e-5), rel=0.03)


def test_noise_moves_weights_by_what_it_promises(tmp_path, monkeypatch):
    """With SGD of rate 1 and a loss of no rows (every row is left out), a step is the noise alone: deviation
    z C / (expected rows)."""
    from consilium.oneshot import dp

    trainer = sites.trainer(tmp_path, "north", Training("adapter", rank=8, dp_noise=2.0), optimizer="sgd", clip=0.0)
    monkeypatch.setattr(dp.secrets.SystemRandom, "random", lambda self: 1.0)
    before = {path: p.detach().clone() for path, p in trainer.trainable.items()}
    dp.fit_private(trainer.model, trainer.rows, 1, 1.0, trainer.setup, trainer.context, Private(2.0, clip=0.5))
    moved = torch.cat([(p.detach() - before[path]).flatten() for path, p in trainer.trainable.items()])
    expected = 2.0 * 0.5 / 8  # 32 rows at the rate 8 / 32
    assert float(moved.std()) == pytest.approx(expected, rel=0.05) and abs(float(moved.mean())) < expected / 20


def test_what_differential_privacy_does_not_cover_is_refused():
    for settings in (dict(kind="gated"), dict(moments=True)):
        with pytest.raises(ConfigError, match="dp_noise covers"):
            Training(**settings, dp_noise=1.0)
    with pytest.raises(ConfigError, match="dp_clip"):
        Training(dp_noise=1.0, dp_clip=0.0).private  # noqa: B018
    assert math.isinf(Private(1e-3).told(100, 10, 1000)["epsilon"])


def test_a_site_with_a_memory_of_its_rows_is_found_out(tmp_path):
    """Trained for long on one sentence, a part reproduces it; the public model does not."""
    from consilium.oneshot.evaluate import Domains
    from consilium.oneshot.trust import extraction

    experiment = sites.experiment(tmp_path, "north", rounds=25)
    data = site_data(experiment)
    row = Split(data.train.texts[:1] * 32, ["the old house is near the very old house again and again"] * 32, [])
    data = replace(data, train=row, validation=Split(row.texts[:4], row.targets[:4], []))
    package = train(experiment, "north", Training("expert", save_every=100), tmp_path / "state", data)
    rows = Domains(experiment, {"north": data}, "train").rows["north"]
    prefix = len(rows.sources[0]) + 1
    base = sites.base()
    assert extraction(base.model(), rows, prefix, 8, most=4)["reproduced"] == 0
    found = extraction(alone(base, package), rows, prefix, 8, most=4)
    assert found == {"rows": 4, "reproduced": 1.0, "longest": 8}
