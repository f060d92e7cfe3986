"""Sites with small models of their own architectures and a table each, over Flower's messages in this process."""

import json
import re
from dataclasses import replace
from pathlib import Path

import loopback
import pytest
import runs
import tables
from tables import CHOSEN, NAMES

import consilium.engine.flower as flower
from consilium.algorithms.fedproto import FedProto
from consilium.algorithms.pfedmoe import pFedMoE
from consilium.core import Algorithm
from consilium.data.arrays import ImageData
from consilium.data.task import Federation
from consilium.engine.flower.records import from_record
from consilium.engine.flower.site import check_model, relabelled
from consilium.errors import ConfigError, DataError, RoundError
from consilium.experiment import Experiment, from_json
from consilium.export.cohort import Own, Small
from consilium.export.cohort import write as write_own
from consilium.export.deployed import Finished, delivered
from consilium.loop import run, serve
from consilium.models.cohort import Cohort

METHODS = {name: cls for name, cls in Algorithm.registry.items() if cls.__module__.startswith("consilium.")}
MIXED = [name for name, cls in METHODS.items() if "mixed" in cls.worlds]


def of_a_site(made: Experiment, folder: Path, name: str, **model) -> Experiment:
    """Its own side of it: its file, its architecture."""
    cohort = replace(made.model, **{"architectures": (CHOSEN[name],), **model})
    own = replace(made.data, path=folder / name / "ill.csv")
    return replace(made, algorithm=pFedMoE(), data=own, model=cohort)


@pytest.fixture
def sites(tmp_path):
    """(experiment, Grid): three sites whose settings are kept; nodes in no order."""
    made = tables.experiment(tables.written(tmp_path))
    grid = loopback.Loopback([])
    for name in ("west", "east", "north"):
        settings = tmp_path / name / "state/site.json"
        flower.save_site(settings, name, of_a_site(made, tmp_path, name))
        grid.configs.append({"site": str(settings)})
    return made, grid


@pytest.mark.parametrize("method", MIXED)
def test_every_method_gives_the_bits_of_one_machine(method, sites, tmp_path):
    made, grid = replace(sites[0], algorithm=Algorithm.registry[method]()), sites[1]
    run(made, tmp_path / "local")
    serve(made, tmp_path / "run", grid, NAMES, 1.0)
    local, over = runs.bits(tmp_path / "local"), runs.bits(tmp_path / "run")
    assert over["summary"]["weights"] == local["summary"]["weights"]
    assert over["summary"]["tasks"] == local["summary"]["tasks"]
    for here, there in zip(local["metrics"], over["metrics"], strict=True):
        assert {**here, "server": None} == {**there, "server": None} and not here["missing"]
    told = over["partition"]
    assert {name: client["architecture"] for name, client in told["clients"].items()} == CHOSEN
    assert told["clients"]["west"]["labels"] == ["none", "some"] and told["shape"] == [2]
    assert not (tmp_path / "run/clients").exists()
    for name in NAMES:
        kept = list((tmp_path / name / "state").glob("*/*/round-*"))
        assert bool(kept) == bool(local["summary"]["clients"][name]["state"])


def test_what_is_private_stays_at_the_site(sites, tmp_path, monkeypatch):
    """pFedMoE: of all that a site answers, only the shared extractor is tensors; no row of its table is in it."""
    made, grid = sites
    seen = []
    real = grid.pull_messages
    monkeypatch.setattr(grid, "pull_messages", lambda ids: [seen.append(reply) or reply for reply in real(ids)])
    serve(made, tmp_path / "run", grid, NAMES, 1.0)
    replies = [from_record(reply.content)[0] for reply in seen if "payload" in reply.content]
    keys = {key for reply in replies for group in reply.groups.values() for key in group}
    assert len(replies) == 3 * 2 + 3 * 2 and keys and all(key.startswith("shared.") for key in keys)
    (kept,) = (tmp_path / "west/state").glob("*/west/round-00002*")
    assert b"private." in kept.read_bytes() and b"gate." in kept.read_bytes()
    with pytest.raises(ConfigError, match="are at its sites: export them there"):
        Finished.of(tmp_path / "run")


@pytest.mark.parametrize("method", MIXED)
def test_a_site_exports_the_model_that_one_machine_would(method, sites, tmp_path):
    """To the bit, with the scale of its columns; or, where clients predict with several, for the same reason not."""
    made, grid = replace(sites[0], algorithm=Algorithm.registry[method]()), sites[1]
    run(made, tmp_path / "local")
    with pytest.raises(ConfigError, match="has no model yet"):
        Own.of_site(*delivered(tmp_path / "west/state"))
    serve(made, tmp_path / "run", grid, NAMES, 1.0)
    there, here = Own.of_site(*delivered(tmp_path / "west/state")), Own.of_run(Finished.of(tmp_path / "local"), "west")
    assert (there.rounds, there.scale) == (here.rounds, here.scale) and there.scale.columns == ("a", "b")
    try:
        said = write_own(tmp_path / "m", here)
    except ConfigError as error:
        with pytest.raises(ConfigError, match=re.escape(str(error))):
            write_own(tmp_path / "n", there)
        return
    assert write_own(tmp_path / "n", there) == [note.replace("/m", "/n") for note in said]
    for name in ("model.safetensors", "README.md"):
        assert (tmp_path / "m" / name).read_bytes() == (tmp_path / "n" / name).read_bytes()
    rows = tmp_path / "west/ill.csv"
    assert Small.of(tmp_path / "n").labelled_rows(rows) == Small.of(tmp_path / "m").labelled_rows(rows)


def test_what_is_kept_is_what_was_read(sites, tmp_path):
    """The site's own rows alone, to the bit, in files for its owner's eyes."""
    made, _ = sites
    for name in NAMES:
        whole = made.data.load(made.seed).clients[name]
        given, data = flower.read_site(tmp_path / name / "state/site.json")
        assert from_json(given["experiment"]) == of_a_site(made, tmp_path, name)
        again = relabelled(data, whole.task.labels)
        assert Federation({name: again}).fingerprint == Federation({name: whole}).fingerprint
        assert len(data.train.x) == 30 and (tmp_path / name / "state/data.safetensors").stat().st_mode & 0o777 == 0o600
    images = ImageData(clients=3, examples=60)
    small = Cohort(("mnist-5",), kernel=3, padding=1)
    flower.save_site(tmp_path / "i/site.json", "digits-01", replace(made, data=images, model=small))
    data = flower.read_site(tmp_path / "i/site.json")[1]
    assert Federation({"a": data}).fingerprint == Federation({"a": images.load(0).clients["digits-01"]}).fingerprint


def changed(tmp_path, name, change):
    """The site starts again with other settings."""
    settings = tmp_path / name / "state/site.json"
    flower.save_site(settings, name, change(from_json(json.loads(settings.read_text())["experiment"])))


def write(folder, text):
    folder.mkdir()
    (folder / "ill.csv").write_text(text)
    return folder / "ill.csv"


ROWS = "".join(f"{i},{i % 3},{i},{('none', 'some')[i % 2]},west\n" for i in range(30))


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda o, p: replace(o, data=replace(o.data, path=write(p, "a,b,c,grade,site\n" + ROWS))), ConfigError,
         "the sites east and west cannot learn together: the shape, of one example, is 2 at east and 3 at west"),
        (lambda o, p: replace(o, data=replace(o.data, path=o.data.path.rename(o.data.path.with_name("sick.csv")))),
         ConfigError, "the task, which is called like the data's file, is ill at east and sick at west"),
        (lambda o, p: replace(o, data=replace(o.data, path=write(p, (o.data.path.read_text().replace("none", "0")
                                                                     .replace("some", "1"))))),
         ConfigError, r"site west has no label in common with any other: 0, 1, but much, none, some at east"),
        (lambda o, p: replace(o, model=replace(o.model, width=5)), RoundError,
         r"a site cannot take part: ConfigError: model\.width is 5 at the site and 6 at the server"),
    ],
    ids=["shape", "task", "labels", "width"],
)  # fmt: skip
def test_who_cannot_learn_with_the_others_is_refused_by_name(change, error, said, sites, tmp_path):
    made, grid = sites
    changed(tmp_path, "west", lambda own: change(own, tmp_path / "other"))
    with pytest.raises(error, match=said):
        serve(made, tmp_path / "run", grid, NAMES, 1.0)
    assert not (tmp_path / "run").exists()


def test_a_site_chooses_one_architecture_and_in_a_cohort_that_of_all(sites, tmp_path):
    made, grid = sites
    with pytest.raises(ConfigError, match=r"a site has one model: choose --model\.architectures of mlp-1, mlp-3"):
        flower.save_site(tmp_path / "x/site.json", "west", made)
    with pytest.raises(ConfigError, match=r"examples have shape \(2,\); a CNN needs"):
        flower.save_site(tmp_path / "x/site.json", "west", replace(made, model=Cohort(("cnn-1",))))
    assert not (tmp_path / "x").exists()
    alike = replace(made, model=replace(made.model, architectures=("mlp-3",)), algorithm=FedProto())
    with pytest.raises(RoundError, match=r"the architecture is mlp-[12] at the site, and mlp-3 is the one"):
        serve(alike, tmp_path / "run", grid, NAMES, 1.0)


def test_labels_of_all_sites_in_the_runs_order(sites, tmp_path):
    _, data = flower.read_site(tmp_path / "west/state/site.json")
    assert data.task.labels == ("none", "some")
    again = relabelled(data, ["much", "none", "some"])
    assert again.task.labels == ("much", "none", "some") == again.test.labels
    assert again.train.targets == data.train.targets and again.train.y.tolist() == [
        i + 1 for i in data.train.y.tolist()
    ]
    with pytest.raises(DataError, match=r"\['some'\] are not among those of the run: none"):
        relabelled(data, ["none"])


@pytest.mark.parametrize("name", ["os:getcwd", "owner/model"])
def test_a_server_has_nothing_imported_at_a_site(name, sites, tmp_path):
    """A function or a model of the hub may be a site's own architecture; a server that names one is refused."""
    made, grid = sites
    theirs = replace(made, model=replace(made.model, architectures=("mlp-3", name)))
    with pytest.raises(RoundError, match=f"the server names the architecture '{name}'; a site builds those of cnn-1"):
        serve(theirs, tmp_path / "run", grid, NAMES, 1.0)
    own = replace(made.model, architectures=(name,))
    check_model(own, replace(own, architectures=("mlp-3", name)))
