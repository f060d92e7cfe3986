"""Folders do not lead elsewhere: links in run directories, states and models, and names of files in their indices."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import runs
import tiny
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file, save_file

from consilium.__main__ import main
from consilium.algorithms.fedavg import FedAvg
from consilium.data.images import read_images
from consilium.data.sets import open_set
from consilium.engine.checkpoint import append_json, write_atomic
from consilium.errors import CheckpointError, ConfigError, DataError, ModelError
from consilium.inside import refuse_links
from consilium.loop import resume, run
from consilium.moe.build import ModelSource
from consilium.prepare import Prepared
from consilium.report import write_report
from consilium.tracking import Tracking


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A finished run of one round."""
    folder = tmp_path_factory.mktemp("inside")
    run(runs.experiment(runs.table(folder), FedAvg(), rounds=1), folder / "run")
    return folder / "run"


@pytest.fixture
def model(tmp_path):
    return Path(shutil.copytree(tiny.source().path, tmp_path / "model"))


# --- run directories --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["report.html", ".report.html.tmp", "report.html.part", "metrics.jsonl", "clients/x", "w"]
)
def test_no_command_follows_a_link_out_of_a_run(short, tmp_path, capsys, name):
    folder, victim = tmp_path / "run", tmp_path / "victim"
    shutil.copytree(short, folder)
    victim.write_text("mine")
    (folder / "clients").mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(victim)
    for command in (["report"], ["resume"], ["export", "--out", str(tmp_path / "m")]):
        assert main([command[0], str(folder), *command[1:]]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "is a symbolic link" in said
    for call in (lambda: Tracking(folder), lambda: refuse_links(folder)):
        with pytest.raises(CheckpointError, match="is a symbolic link"):
            call()
    assert victim.read_text() == "mine" and not (tmp_path / "m").exists()


def test_the_report_of_several_runs_writes_beside_links(short, tmp_path):
    """The folder above is no run directory: nothing in it is followed either."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in ("a", "b"):
        shutil.copytree(short, tmp_path / name)
    for name in (".report.html.tmp", "report.html.part", "report.csv", "report.html"):
        (tmp_path / name).symlink_to(victim)
    page = write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "report.html")
    assert victim.read_text() == "mine" and not page.is_symlink() and not (tmp_path / "report.csv").is_symlink()


def test_a_run_may_be_a_link_and_hold_links_of_a_tracker(short, tmp_path):
    shutil.copytree(short, tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "run/wandb/offline-run-1").mkdir(parents=True)
    (tmp_path / "run/wandb/latest-run").symlink_to("offline-run-1")
    refuse_links(tmp_path / "link")
    (tmp_path / "run/wandb/out").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match="out is a symbolic link"):
        refuse_links(tmp_path / "link")


def test_files_are_never_written_through_a_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in (".x.json.tmp", "x.json", "x.jsonl"):
        (tmp_path / name).symlink_to(victim)
    write_atomic(tmp_path / "x.json", b"{}")
    with pytest.raises(CheckpointError, match=r"x\.jsonl cannot be written"):
        append_json(tmp_path / "x.jsonl", {})
    assert victim.read_text() == "mine" and (tmp_path / "x.json").read_text() == "{}"


# --- sites ------------------------------------------------------------------------------------------------------------


def test_the_state_of_another_site_is_refused(tmp_path, capsys):
    flower = pytest.importorskip("consilium.engine.flower")
    experiment = runs.experiment(runs.table(tmp_path))
    flower.save_site(tmp_path / "south/site.json", "site-0", experiment)
    before = {path: path.read_bytes() for path in (tmp_path / "south").iterdir()}
    with pytest.raises(ConfigError, match="south is the state of site site-0, not site-1; choose another --state"):
        flower.save_site(tmp_path / "south/site.json", "site-1", experiment)
    assert {path: path.read_bytes() for path in (tmp_path / "south").iterdir()} == before
    flower.save_site(tmp_path / "south/site.json", "site-0", experiment)
    (tmp_path / "south/site.json").write_text("[" * 10**5)
    with pytest.raises(ConfigError, match=r"site\.json cannot be read"):
        flower.save_site(tmp_path / "south/site.json", "site-0", experiment)
    (tmp_path / "south/data.json").unlink()
    (tmp_path / "south/data.json").symlink_to(tmp_path / "victim")
    with pytest.raises(CheckpointError, match="is a symbolic link"):
        flower.save_site(tmp_path / "south/site.json", "site-0", experiment)


# --- runs that never began, and what is exported ----------------------------------------------------------------------


def test_a_run_that_never_began_leaves_no_directory(tmp_path, monkeypatch):
    experiment = runs.experiment(runs.table(tmp_path), FedAvg())

    def broken(*_):
        raise DataError("a row that no client can use")

    monkeypatch.setattr(Prepared, "engine", broken)
    with pytest.raises(DataError, match="no client can use"):
        run(experiment, tmp_path / "new/runs/x")
    assert not (tmp_path / "new").exists()
    (tmp_path / "there").mkdir()
    (tmp_path / "there/log.txt").write_text("kept")
    with pytest.raises(DataError):
        run(experiment, tmp_path / "there")
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["log.txt"]


def test_a_model_without_a_tokenizer_leaves_no_directory(tmp_path, model, capsys):
    for path in model.iterdir():
        if "token" in path.name:
            path.unlink()
    source = dataclasses.replace(tiny.source(), path=str(model))
    with pytest.raises(ModelError, match="has no tokenizer"):
        run(runs.experiment(runs.table(tmp_path), FedAvg(), model=source), tmp_path / "new/x")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_an_export_has_the_permissions_of_the_umask(short, tmp_path, mask, capsys):
    before = os.umask(mask)
    try:
        assert main(["export", str(short), "--client", "site-0", "--out", str(tmp_path / "m")]) == 0
    finally:
        os.umask(before)
    for path in (tmp_path / "m", *(tmp_path / "m").rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path


# --- models -----------------------------------------------------------------------------------------------------------

BEHAVIOUR = [
    "chat_template.jinja", "merges.txt", "special_tokens_map.json", "added_tokens.json", "card.json",
    "generation_config.json", "model.safetensors.index.json", "sentencepiece.bpe.model", "preprocessor_config.json",
    "additional_chat_templates/rag.jinja", "vocab.bpe", "a name of tomorrow",
]  # fmt: skip


@pytest.mark.parametrize("name", BEHAVIOUR)
def test_every_file_that_changes_a_models_behaviour_is_in_its_fingerprint(model, name):
    found = [ModelSource(str(model)).fingerprint]
    (model / name).parent.mkdir(exist_ok=True)
    for text in ('{"weight_map": {}}', '{"weight_map": {}} ', None):
        (model / name).write_text(text) if text else (model / name).unlink()
        found.append(ModelSource(str(model)).fingerprint)
    assert len(set(found)) == 3 and found[0] == found[3]


def test_every_file_of_a_model_as_it_is_saved_is_in_its_fingerprint(model):
    whole = ModelSource(str(model)).fingerprint
    for path in [path for path in model.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert ModelSource(str(model)).fingerprint != whole, path
        path.write_bytes(content)
    for name in ("README.md", "LICENSE", "LICENSE.txt", ".gitattributes", ".cache/x", "picture.PNG", "docs/a.md"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("x")
    assert ModelSource(str(model)).fingerprint == whole


def test_another_chat_template_is_refused_on_resume(tmp_path, model, capsys):
    from test_resume import Stop

    source = dataclasses.replace(tiny.source(), path=str(model))
    with pytest.raises(KeyboardInterrupt):
        run(runs.experiment(runs.table(tmp_path), FedAvg(), model=source), tmp_path / "run", Stop("rounded", 1))
    (model / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(CheckpointError, match=r"the model has changed since the run began .*template"):
        resume(tmp_path / "run")
    (model / "chat_template.jinja").unlink()
    resume(tmp_path / "run")


def test_a_run_of_a_version_with_another_fingerprint_is_told_so(tmp_path, monkeypatch):
    from test_resume import Stop

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(ModelSource, "fingerprint", "sha256:00")
        run(runs.experiment(runs.table(tmp_path), FedAvg()), tmp_path / "run", Stop("rounded", 1))
    with pytest.raises(CheckpointError, match=r"by an earlier version .* cannot be compared; resume it with that"):
        resume(tmp_path / "run")


def sharded(model, shard):
    """A model whose weights are in one shard of that name."""
    (model / shard).parent.mkdir(exist_ok=True)
    tensors = load_file(model / "model.safetensors")
    save_file(tensors, model / shard, {"format": "pt"})
    (model / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("shard", ["../elsewhere/x.safetensors", "{here}/elsewhere/x.safetensors"])
def test_a_shard_outside_of_the_folder_is_refused(model, shard):
    sharded(model, shard.format(here=model.parent))
    with pytest.raises(ModelError, match=r"index\.json names '.*', which is outside of"):
        ModelSource(str(model)).load()
    for text in ("[]", "[" * 10**5, '{"weight_map": {"a": 1}}'):
        (model / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ModelError, match=r"index\.json"):
            ModelSource(str(model)).load()


def test_a_shard_in_the_folder_is_read(model):
    sharded(model, "part/x.safetensors")
    assert ModelSource(str(model), dtype=tiny.source().dtype).load()


def test_a_link_out_of_a_model_is_refused_but_for_the_hubs_cache(model, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    shutil.move(model / "model.safetensors", tmp_path / "elsewhere/w")
    (model / "model.safetensors").symlink_to(tmp_path / "elsewhere/w")
    with pytest.raises(ModelError, match=r"model\.safetensors leads to .*elsewhere/w, outside of"):
        ModelSource(str(model)).fingerprint  # noqa: B018
    cached = tmp_path / "models--a--b"
    (cached / "blobs").mkdir(parents=True)
    (cached / "snapshots").mkdir()
    shutil.move(model, cached / "snapshots/0123")
    shutil.move(tmp_path / "elsewhere/w", cached / "blobs/w")
    link = cached / "snapshots/0123/model.safetensors"
    link.unlink()
    link.symlink_to("../../blobs/w")
    assert ModelSource(str(cached / "snapshots/0123")).load()


def test_adapters_for_another_model_are_refused(model, tmp_path):
    """transformers would read the base that they name, wherever it lies."""
    told = {"base_model_name_or_path": str(tmp_path), "peft_type": "LORA"}
    (model / "adapter_config.json").write_text(json.dumps(told))
    with pytest.raises(ModelError, match="holds adapters"):
        ModelSource(str(model)).load()


# --- data -------------------------------------------------------------------------------------------------------------


def test_a_data_set_that_leads_outside_is_refused(tmp_path):
    rows = Dataset.from_dict({"text": ["SECRET1"]})
    rows.save_to_disk(tmp_path / "secret")
    rows.save_to_disk(tmp_path / "set")
    assert open_set(tmp_path / "set")[0]["text"] == "SECRET1"
    state = json.loads((tmp_path / "set/state.json").read_text())
    name = state["_data_files"][0]["filename"]
    for outside in (f"../secret/{name}", f"{tmp_path}/secret/{name}", 7):
        state["_data_files"][0]["filename"] = outside
        (tmp_path / "set/state.json").write_text(json.dumps(state))
        with pytest.raises(DataError, match="which is outside of"):
            open_set(tmp_path / "set")
    DatasetDict({"train": rows}).save_to_disk(tmp_path / "sets")
    (tmp_path / "sets/dataset_dict.json").write_text('{"splits": ["../secret"]}')
    with pytest.raises(DataError, match=r"names '\.\./secret', which is outside of"):
        open_set(tmp_path / "sets")
    (tmp_path / "sets/dataset_dict.json").write_text("[" * 10**5)
    with pytest.raises(DataError, match="RecursionError"):
        open_set(tmp_path / "sets")


def npz(path, x):
    y = np.arange(len(x)) % 2
    np.savez_compressed(path, x_train=x, y_train=y, x_test=x, y_test=y)
    return path


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    bomb = npz(tmp_path / "bomb.npz", np.zeros((40, 1024, 1024), np.uint8))
    with pytest.raises(DataError, match=r"bomb\.npz has [\d,]+ bytes and unpacks to 83,88\d,\d+; at most 200 times"):
        read_images(bomb)
    noise = np.random.default_rng(0).integers(0, 256, (8, 16, 16), np.uint8)
    good = npz(tmp_path / "good.npz", noise)
    assert len(read_images(good)) == 16
    monkeypatch.setattr("consilium.data.images.free_memory", lambda: 5000)
    with pytest.raises(DataError, match="5,000 are free, of which half may be used"):
        read_images(good)


def test_a_header_that_announces_another_size_is_refused(tmp_path):
    import zipfile

    good = npz(tmp_path / "good.npz", np.zeros((4, 8, 8), np.uint8))
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(tmp_path / "bad.npz", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "x_train.npy":
                was, wanted = b"(4, 8, 8), }", b"(1000000000000000,), }"
                content = content.replace(was + b" " * (len(wanted) - len(was)), wanted)
                assert wanted in content
            new.writestr(name, content)
    with pytest.raises(DataError, match=r"x_train announces 1,000,000,000,000,128 bytes, .* and has 384"):
        read_images(tmp_path / "bad.npz")
