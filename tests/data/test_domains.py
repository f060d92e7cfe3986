"""The domains of installed text: what belongs where, that nothing stands twice, and that the cache gives it back."""

import hashlib

import pytest

from consilium.data import domains
from consilium.data.domains import Document, Domain, documents


@pytest.fixture
def installation(tmp_path, monkeypatch):
    """Two domains in a made-up site-packages: forty Python files of a public one, eight of a private one."""
    monkeypatch.setenv("CONSILIUM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "pack" / "tests").mkdir(parents=True)
    for i in range(60):
        text = "".join(f"value_{i}_{j} = compute_something({i}, {j})\n" for j in range(12))
        (tmp_path / "pack" / f"m{i:02d}.py").write_text(text)
    (tmp_path / "pack" / "copy.py").write_text((tmp_path / "pack" / "m07.py").read_text() + "tail = 1\n")
    (tmp_path / "pack" / "tests" / "test_it.py").write_text("assert something_is_true_of_it()\n" * 20)
    (tmp_path / "kernels").mkdir()
    for i in range(8):
        text = "".join(f"__global__ void kernel_{i}_{j}(float* x);\n" for j in range(600))
        (tmp_path / "kernels" / f"k{i}.cuh").write_text(text)
    made = (Domain("py", ("pack",), public=0.7), Domain("cuda", ("kernels",), (".cuh",)))
    monkeypatch.setattr(domains, "DOMAINS", {domain.name: domain for domain in made})
    monkeypatch.setattr(domains.sysconfig, "get_path", lambda key: str(tmp_path))
    domains._everything.cache_clear()
    yield tmp_path
    domains._everything.cache_clear()


def test_shards_depend_on_names_alone(installation):
    """By hand: the first eight bytes of blake2b("py/pack/m00.py") as a share of 2**64."""
    places = {d.place.partition(":")[0]: d.shard for d in documents("py", "public", "train", "validation", "test")}
    for name, shard in places.items():
        digest = hashlib.blake2b(f"py/{name}".encode(), digest_size=8).digest()
        share = int.from_bytes(digest, "big") / 2**64
        rest = (share - 0.7) / 0.3
        expected = "public" if share < 0.7 else "test" if rest < 0.4 else "validation" if rest < 0.55 else "train"
        assert shard == expected
    assert len(set(places.values())) == 4


def test_of_a_private_domain_nothing_is_public(installation):
    assert documents("cuda", "public") == []
    assert len(documents("cuda", "train", "validation", "test")) > 8  # files of 26 kB, in pieces of 16


def test_copies_and_tests_are_left_out(installation):
    places = [d.place for d in documents("py", "public", "train", "validation", "test")]
    copies = {"pack/m07.py:0", "pack/copy.py:0"} & set(places)
    assert len(copies) == 1  # whichever comes first; the public shard does
    assert not any("tests" in place for place in places)
    assert len(places) == 60


def test_pieces_are_cut_between_lines_and_lose_nothing(installation):
    found = [d for d in documents("cuda", "train", "validation", "test") if d.place.startswith("kernels/k3")]
    whole = "".join(d.text for d in sorted(found, key=lambda d: int(d.place.rpartition(":")[2])))
    assert whole == (installation / "kernels" / "k3.cuh").read_text()
    assert all(len(d.text) <= domains.PIECE and d.text.endswith("\n") for d in found)


def test_the_cache_gives_the_same(installation):
    first = documents("py", "public")
    domains._everything.cache_clear()
    (installation / "pack" / "m00.py").unlink()  # the cache is keyed by versions, not by files
    assert documents("py", "public") == first
    assert len(list((installation / "cache").glob("domains-*.json"))) == 1


def test_docstrings_alone(installation):
    text = f'"""{"A module about something. " * 5}"""\ndef f():\n    """Short."""\n    return 1\n'
    (installation / "pack" / "m00.py").write_text(text)
    found = domains._text(installation / "pack" / "m00.py", Domain("prose", ("pack",), docstrings=True))
    assert found == "A module about something. " * 5


def test_every_domain_is_installed_with_the_package():
    """What the real installation has: enough for three clients of each private domain with 20,000 test tokens."""
    domains._everything.cache_clear()
    for domain in domains.PRIVATE:
        sizes = {
            split: sum(len(d.text) for d in documents(domain.name, split)) for split in ("train", "validation", "test")
        }
        assert sizes["train"] > 90_000 and sizes["validation"] > 20_000 and sizes["test"] > 75_000, (domain.name, sizes)
    for domain in domains.PUBLIC:
        assert sum(len(d.text) for d in documents(domain.name, "public")) > 1_500_000, domain.name
        assert all(isinstance(d, Document) and d.shard == "public" for d in documents(domain.name, "public"))
