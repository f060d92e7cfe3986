"""Withdrawing equals never having joined, by sha256, in any order; adding changes nobody else's part."""

import itertools
import json
import tempfile
from pathlib import Path

import pytest
import sites
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from consilium.certificates import certificates, site_key
from consilium.errors import ConfigError, PackageError
from consilium.oneshot.build import Building, write
from consilium.oneshot.evaluate import Domains, fit_router
from consilium.oneshot.hub import Hub, create, tree_digest
from consilium.oneshot.package import file_digest, read, to_bytes

NAMES = ("coast", "north", "south")


def files(kind):
    """Site -> the file of its package, made once."""
    folder = tiny.root / "oneshot-files"
    folder.mkdir(exist_ok=True)
    found = {}
    for site in NAMES:
        found[site] = folder / f"{kind}-{site}.safetensors"
        if not found[site].exists():
            found[site].write_bytes(to_bytes(sites.signed(kind, site)))
    return found


def new_hub(folder):
    """An empty hub, of which the expensive part is made once."""
    made = tiny.root / "oneshot-hub.json"
    if not made.exists():
        made.write_bytes(
            (
                create(tiny.root / "oneshot-hub", str(sites.olmoe()), "float32", None, "1GB").folder / "hub.json"
            ).read_bytes()
        )
    (folder / "sites").mkdir(parents=True)
    (folder / "hub.json").write_bytes(made.read_bytes())
    return Hub.open(folder)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.booleans(), st.sampled_from(NAMES)), max_size=8))
def test_any_order_of_adding_and_withdrawing_leaves_the_hub_of_who_is_there(steps):
    packages = files("adapter")
    with tempfile.TemporaryDirectory() as folder:
        hub, members = new_hub(Path(folder) / "a"), set()
        for add, site in steps:
            others = {name: file_digest(hub.path(name)) for name in members - {site}}
            if add and site not in members:
                hub.add(packages[site])
                members.add(site)
            elif add:
                with pytest.raises(PackageError, match="withdraw it before"):
                    hub.add(packages[site])
            elif site in members:
                hub.withdraw(site)
                members.remove(site)
            else:
                with pytest.raises(PackageError, match="has no package"):
                    hub.withdraw(site)
            assert others == {name: file_digest(hub.path(name)) for name in others}
        never = new_hub(Path(folder) / "b")
        for site in sorted(members, reverse=True):
            never.add(packages[site])
        assert tree_digest(hub.folder) == tree_digest(never.folder)
        assert hub.sites == sorted(members)


ROUTERS = [
    ("adapter", "uniform"), ("adapter", "arrow"), ("gated", "phatgoose"), ("gated", "ridge"), ("gated", "lorahub"),
    ("expert", "flexolmo"), ("expert", "ridge"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "router"), ROUTERS)
def test_a_model_built_after_a_withdrawal_is_that_of_a_hub_that_never_had_the_site(tmp_path, kind, router):
    """Every order of three sites of whom one leaves; the same for routers fitted over all sites, which are fitted
    again."""
    packages, rows = files(kind), Domains.of(sites.experiment(tmp_path, "north"), "validation")
    building, digests = Building(router, tries=3), set()
    orders = list(itertools.permutations(NAMES))
    for number, order in enumerate(orders[:: 1 if router in ("uniform", "flexolmo") else 5]):
        hub = new_hub(tmp_path / f"hub-{number}")
        for site in order:
            hub.add(packages[site])
        hub.withdraw("north")
        digests.add(built(hub, building, rows, tmp_path / f"built-{number}"))
    never = new_hub(tmp_path / "never")
    for site in ("south", "coast"):
        never.add(packages[site])
    assert digests == {built(never, building, rows, tmp_path / "built-never")}
    again = json.loads((tmp_path / "built-never/oneshot.json").read_text())
    assert again["joint"] == (router == "lorahub")


def built(hub, building, rows, folder):
    """The digest of the model that a hub gives."""
    members, base = hub.packages(), sites.base()
    write(
        folder,
        base,
        members,
        building,
        fit_router(base, members, building, rows if router_needs_rows(building) else None),
    )
    return tree_digest(folder)


def router_needs_rows(building):
    return building.router in ("lorahub", "ridge")


def test_only_sites_whose_keys_the_hub_was_given_may_add(tmp_path):
    certificates(tmp_path / "keys", (), ["north", "south"])
    hub = create(tmp_path / "hub", str(sites.olmoe()), "float32", tmp_path / "keys/server", "1GB")
    package = sites.signed("adapter", "north")
    path = tmp_path / "north.safetensors"
    path.write_bytes(to_bytes(package))  # by a key of its own
    with pytest.raises(PackageError, match="not signed by the key that this hub has of site north"):
        hub.add(path)
    path.write_bytes(to_bytes(package.signed(site_key(tmp_path / "keys/south"))))
    with pytest.raises(PackageError, match="not signed by the key"):
        hub.add(path)
    path.write_bytes(to_bytes(package.signed(site_key(tmp_path / "keys/north"))))
    assert hub.add(path).site == "north" and hub.sites == ["north"]
    assert read(hub.path("north")).metadata == hub.package("north").metadata


def test_a_hub_notices_what_was_changed_in_its_folder(tmp_path):
    hub = new_hub(tmp_path / "hub")
    hub.add(files("adapter")["north"])
    blob = hub.path("north").read_bytes()
    hub.path("south").write_bytes(blob)
    with pytest.raises(PackageError, match="signed as the package of north"):
        hub.package("south")
    hub.path("south").unlink()
    hub.path("north").write_bytes(blob[:-1] + bytes([blob[-1] ^ 1]))
    with pytest.raises(PackageError, match="other tensors"):
        hub.packages()
    hub.path("coast").symlink_to(files("adapter")["coast"])
    with pytest.raises(Exception, match="symbolic link"):
        Hub.open(hub.folder)
    with pytest.raises(PackageError, match="is no hub"):
        Hub.open(tmp_path)
    with pytest.raises(ConfigError, match="not empty"):
        create(tmp_path, str(sites.olmoe()), "float32", None, "1GB")


def test_what_a_killed_process_left_half_written_goes(tmp_path):
    hub, never = new_hub(tmp_path / "a"), new_hub(tmp_path / "b")
    (hub.folder / "sites/.south.safetensors.tmp").write_bytes(b"half")
    for one in (hub, never):
        one.add(files("adapter")["north"])
    assert tree_digest(hub.folder) == tree_digest(never.folder)


def test_two_processes_cannot_add_one_site_twice(tmp_path):
    """The lock is of the hub's file; the second waits and then finds the site there."""
    import threading

    hub, done = new_hub(tmp_path / "hub"), []

    def add():
        try:
            done.append(Hub.open(hub.folder).add(files("adapter")["north"]).site)
        except PackageError:
            done.append("refused")

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == ["north", "refused", "refused", "refused"]
