"""Packages over the network: pieces, interruptions, foreign answers; and a server and two sites as processes."""

import contextlib
import os
import signal

import pytest
import sites
from deployments import Deployment, free_port
from processes import until
from test_hub import files, new_hub

from consilium.errors import ConfigError, PackageError, PayloadError
from consilium.oneshot.hub import Hub, tree_digest

pytest.importorskip("flwr")
from consilium.engine.flower import offered
from consilium.oneshot import network
from consilium.oneshot.network import Collection

MINUTES = 60 * float(os.environ.get("CONSILIUM_TEST_PATIENCE", "1"))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(offered, "PIECE", 4000)
    monkeypatch.setattr(network, "PIECE", 4000)


def offer(folder, site, kind="expert"):
    """The settings of a site that offers its package."""
    settings = folder / site / "site.json"
    offered.save_offer(settings, site, files(kind)[site].read_bytes())
    return settings


def test_a_package_comes_in_pieces_and_goes_on_after_interruptions(tmp_path):
    hub, settings = new_hub(tmp_path / "hub"), offer(tmp_path, "north")
    size, offsets, said = files("expert")["north"].stat().st_size, [], None
    while said is None:
        collection = Collection(Hub.open(hub.folder), ["north", "south"])  # a new process each time
        offsets.append(collection.offset("north"))
        said = collection.take("north", offered.piece(settings, offsets[-1]))
    assert offsets == list(range(0, size, 4000)) and said.startswith("north: added, expert")
    assert collection.missing == ["south"] and not list(collection.incoming.iterdir())
    never = new_hub(tmp_path / "never")
    never.add(files("expert")["north"])
    assert tree_digest(hub.folder) == tree_digest(never.folder)


def test_a_site_that_offers_another_file_begins_anew(tmp_path):
    collection, settings = Collection(new_hub(tmp_path / "hub"), ["north"]), offer(tmp_path, "north")
    assert collection.take("north", offered.piece(settings, 0)) is None and collection.offset("north") == 4000
    offer(tmp_path, "north", "adapter")
    assert collection.take("north", offered.piece(settings, 4000)) is None
    assert collection.offset("north") == 0  # what had come of the other file is gone
    said = None
    while said is None:
        said = collection.take("north", offered.piece(settings, collection.offset("north")))
    assert said.startswith("north: added, adapter")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "south"}, "says that it is 'south'"),
        ({"size": 10**15}, "allowed are"),
        ({"size": True}, "allowed are"),
        ({"offset": -1}, "allowed are"),
        ({"bytes": "text"}, "a piece that is none"),
        ({"bytes": b"0" * 5000}, "a piece that is none"),
        ({"digest": "../../x"}, "no digest"),
        ({"digest": None}, "no digest"),
    ],
)
def test_foreign_answers_are_refused(tmp_path, change, said):
    collection, settings = Collection(new_hub(tmp_path / "hub"), ["north"]), offer(tmp_path, "north")
    with pytest.raises(PayloadError, match=said):
        collection.take("north", {**offered.piece(settings, 0), **change})
    assert not collection.incoming.exists()


def test_a_file_that_is_no_package_is_refused_once(tmp_path):
    collection, settings = Collection(new_hub(tmp_path / "hub"), ["north"]), tmp_path / "north/site.json"
    for blob, said in ((b"x" * 5000, "announces a header"), (files("expert")["south"].read_bytes(), "of another site")):
        offered.save_offer(settings, "north", blob)
        with pytest.raises(PackageError, match=said):
            while True:
                collection.take("north", offered.piece(settings, collection.offset("north")))
        assert collection.take("north", offered.piece(settings, 0)) is None  # not again
        assert collection.missing == ["north"] and collection.offset("north") == 0
    wrong = {**offered.piece(settings, 0), "digest": "0" * 64}
    collection.take("north", wrong)
    with pytest.raises(PackageError, match="arrived changed"):
        for _ in range(10):
            collection.take("north", {**offered.piece(settings, collection.offset("north")), "digest": "0" * 64})


def test_a_site_hands_over_what_it_offers_and_nothing_else(tmp_path):
    settings = offer(tmp_path, "north")
    for offset in (-1, 10**9, True, "0", None, 1.0):
        with pytest.raises(PayloadError, match="offset is"):
            offered.piece(settings, offset)
    with pytest.raises(ConfigError, match="another site or run"):
        offered.save_offer(settings, "south", b"")
    (settings.parent / offered.OFFERED).unlink()
    (settings.parent / offered.OFFERED).symlink_to("/etc/hostname")
    with pytest.raises(PayloadError, match="offers no package"):
        offered.piece(settings, 0)
    path = tmp_path / "south.safetensors"
    path.write_bytes(files("expert")["south"].read_bytes())
    with pytest.raises(ConfigError, match="is the package of south"):
        network.offer(path, "north", "127.0.0.1:1", None, tmp_path / "s", 9094)


def test_a_server_collects_packages_as_sites_come(tmp_path):
    """The server is killed between the two sites, and started again; TLS and a key for each."""
    from consilium.__main__ import main
    from consilium.certificates import site_key
    from consilium.oneshot.hub import create
    from consilium.oneshot.package import to_bytes

    with contextlib.chdir(tmp_path):
        assert main(["certificates", "keys", "--sites", "north,south"]) == 0
    create(tmp_path / "hub", str(sites.olmoe()), "float32", tmp_path / "keys/server", "1GB")
    for site in ("north", "south"):
        package = sites.signed("expert", site).signed(site_key(tmp_path / "keys" / site))
        (tmp_path / f"{site}.safetensors").write_bytes(to_bytes(package))
    with Deployment(tmp_path) as there:
        address = f"127.0.0.1:{there.port}"
        serve = f"server --one-shot hub --sites north,south --certificates keys --address {address}"

        def come(site):
            port = free_port()
            return there.start(
                f"client --one-shot {site}.safetensors --name {site} --server localhost:{there.port} "
                f"--certificates keys/{site} --port {port}"
            )

        def added(site):
            return lambda: (tmp_path / "hub/sites" / f"{site}.safetensors").exists()

        serving, _ = there.start(serve)
        come("north")
        until(added("north"), 4 * MINUTES, "the package of north", serving)
        serving.family.signal(signal.SIGKILL)
        serving.wait()
        again, log = there.start(serve)
        come("south")
        there.finished(again, 5 * MINUTES)
        assert "has the packages of north, south" in log.read_text()
    hub = Hub.open(tmp_path / "hub")
    assert hub.sites == ["north", "south"]
    assert hub.path("north").read_bytes() == (tmp_path / "north.safetensors").read_bytes()
