"""Reading documentation from source text: hand-made trees, and once the real standard library."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilium.data import source
from consilium.data.source import Doc, digests, extract, mask, read, words
from consilium.errors import DataError

MODULE = '''"""Tools to read and to write the things of a shop."""
import os

if os.name == "posix":
    def open_shop(name):
        """Open the shop of that name, as open_shop always did.

        More text."""
        handle = os.open(name, os.O_RDONLY)
        return handle

class Shop:
    """A shop that sells things to people."""

    @property
    def owner(self):
        """Whoever owns the shop at this time."""
        return self._owner

    @classmethod
    def from_file(cls, path):
        """Read a shop from a file of goods."""
        return cls(path)

    @staticmethod
    def tax(value):
        """What the state takes of a value."""
        return value

    async def close(self):
        """Close the shop for today, please."""
        def inner():
            """Nested functions are not documents."""

    def short(self):
        """Too short."""

    class Till:
        """Where the money of the shop lies."""

def test_shop():
    """Tests are not documentation of anything."""
'''


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONSILIUM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tree(tmp_path, monkeypatch, files: dict[str, str]) -> None:
    """Make `tmp_path/shop` the source of the package "rich"."""
    for name, text in files.items():
        path = tmp_path / "shop" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(source, "_root", lambda package: tmp_path / "shop")


def test_every_kind_of_documented_object_is_found():
    docs = {doc.name: doc for doc in extract(MODULE, "shop", "shop.tools")}
    assert {name: doc.kind for name, doc in docs.items()} == {
        "": "module",
        "open_shop": "function",
        "Shop": "class",
        "Shop.owner": "property",
        "Shop.from_file": "classmethod",
        "Shop.tax": "staticmethod",
        "Shop.close": "method",
        "Shop.Till": "class",
    }
    doc = docs["open_shop"]
    assert doc.row == "shop.tools:open_shop"
    assert doc.text == "Open the shop of that name, as NAME always did. More text."
    assert doc.summary == "Open the shop of that name, as open_shop always did."
    assert doc.body == "        handle = os.open(name, os.O_RDONLY)\n        return handle"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("get_item", ["get", "item"]),
        ("_get_HTTPServer2", ["get", "http", "server2"]),
        ("Class.toJson", ["to", "json"]),
        ("__init__", ["init"]),
        ("x", ["x"]),
        ("", []),
    ],
)
def test_names_split_into_words(name, parts):
    assert words(name) == parts


@pytest.mark.parametrize(
    ("text", "name", "masked"),
    [
        ("Like numpy.linalg.norm, for NumPy arrays.", "f", "Like PKG, for PKG arrays."),
        ("Use np.array, plt.plot and pd.", "f", "Use PKG, PKG and pd."),
        ("The sklearnish numpyro stays.", "f", "The sklearnish numpyro stays."),
        ("Calls get_item to Get or get; see get().", "A.get_item", "Calls NAME to Get or get; see NAME()."),
        ("try_get and get_all, not target.", "get_item", "NAME and NAME, not target."),
        ("Head\n====\n\n   body ``x``", "f", "Head body ``x``"),
    ],
)  # fmt: skip
def test_masking_takes_what_gives_the_answer_away(text, name, masked):
    assert mask(text, name) == masked


@given(st.text(max_size=1200), st.text(alphabet="abc_XY", max_size=12))
def test_a_masked_text_is_short_and_has_single_spaces(text, name):
    found = mask(text, name)
    assert len(found) <= source.TEXT_CHARACTERS
    assert found == " ".join(found.split())


def test_copies_have_one_key_whatever_their_case_and_punctuation():
    one = Doc("p", "m", "f", "function", "Return the NAME, now.", "", "")
    two = Doc("q", "n", "g", "method", "return  the name  now", "", "")
    other = Doc("q", "n", "g", "method", "return the value now", "", "")
    assert one.key == two.key != other.key


def test_reading_skips_tests_and_broken_files_and_keeps_copies_once(tmp_path, monkeypatch, cache):
    alone = '"""One more module with a text of its own."""'
    files = {
        "__init__.py": MODULE,
        "copy.py": MODULE,
        "sub/more.py": alone,
        "tests/helpers.py": '"""Nobody should ever read this text."""',
        "test_x.py": '"""Nobody should ever read that text."""',
        "broken.py": "def (",
        "binary.py": "\x00",
    }
    tree(tmp_path, monkeypatch, files)
    docs = read("rich")
    assert sorted({doc.module for doc in docs}) == ["rich", "rich.sub.more"]
    assert len(docs) == 9
    assert all(doc.package == "rich" for doc in docs)


def test_the_cache_is_json_and_is_used(tmp_path, monkeypatch, cache):
    tree(tmp_path, monkeypatch, {"__init__.py": MODULE})
    docs = read("rich")
    assert all(isinstance(json.loads(file.read_text()), list) for file in cache.iterdir())
    monkeypatch.setattr(source, "_parse", lambda package: pytest.fail("parsed again"))
    assert read("rich") == docs
    assert digests("rich") == [doc.key for doc in docs]


@pytest.mark.parametrize("content", ["", "[[1, 2]]", "{}x"])
def test_a_broken_cache_is_read_anew(tmp_path, monkeypatch, cache, content):
    tree(tmp_path, monkeypatch, {"__init__.py": MODULE})
    docs = read("rich")
    for file in cache.iterdir():
        file.write_text(content)
    assert read("rich") == docs


def test_warming_reads_what_is_missing_in_processes_of_their_own(monkeypatch, cache):
    monkeypatch.setattr(source, "cores", lambda: 2)
    source.warm(("click", "tqdm", "no-such-package"))
    assert {file.name.split("-")[1] for file in cache.iterdir()} == {"click", "tqdm"}
    before = source._parse("click")
    monkeypatch.setattr(source, "_parse", lambda package: pytest.fail("parsed again"))
    assert source.read("click") == before
    monkeypatch.setattr(source.subprocess, "run", lambda *_, **__: pytest.fail("warmed again"))
    source.warm(("click", "tqdm"))


def test_a_package_that_cannot_be_warmed_is_read_all_the_same(monkeypatch, cache):
    monkeypatch.setattr(source, "cores", lambda: 2)
    monkeypatch.setattr(source.sys, "executable", "false")
    source.warm(("click", "tqdm"))
    assert not cache.exists()
    assert len(source.read("click")) > 10


def test_a_read_only_home_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CONSILIUM_CACHE", str(tmp_path / "file" / "cache"))
    tree(tmp_path, monkeypatch, {"__init__.py": MODULE})
    assert len(read("rich")) == len(digests("rich")) == 8


def test_a_missing_package_is_absent_and_an_unknown_one_refused(monkeypatch):
    monkeypatch.setattr(source, "version", lambda package: None)
    assert read("rich") == [] == digests("rich")
    with pytest.raises(DataError, match="'os' is not a source"):
        read("os")


def test_nothing_is_imported_to_find_a_package(tmp_path, monkeypatch, cache):
    bomb = 'raise RuntimeError("imported")\nclass Shop:\n    """A shop that sells things to people."""\n'
    tree(tmp_path, monkeypatch, {"__init__.py": bomb})
    assert [doc.name for doc in read("rich")] == ["Shop"]


def test_the_standard_library_has_documents():
    """The real thing: one package of the standard library, found by its folder."""
    import sysconfig
    from pathlib import Path

    text = (Path(sysconfig.get_path("stdlib")) / "json" / "decoder.py").read_text(encoding="utf-8")
    docs = {doc.name: doc for doc in extract(text, "python", "json.decoder")}
    assert docs["JSONDecoder"].kind == "class"
    assert docs["JSONDecoder.decode"].text.startswith("Return the Python representation") or docs[
        "JSONDecoder.decode"
    ].text.startswith("Return the PKG representation")
