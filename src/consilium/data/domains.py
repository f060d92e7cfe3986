"""Code and technical text that every installation of Consilium carries, read file by file; nothing is imported or run.

A *domain* is one kind of text: the C++ headers of PyTorch, the CUDA kernels, the type stubs, the font metrics. Public
domains are split into a public shard, on which the shipped model was pretrained, and a shard for clients. Of private
domains no text is public. Which shard, and which split of a client, a document belongs to is a hash of its file's name.

A document is a file, or a piece of at most 16 kB of one, cut between lines. Near-duplicates are removed: a document is
dropped if more than half of its characters stand in lines that an earlier document has, the public shard being first.
The documents are cached under `~/.cache/consilium` (or `$CONSILIUM_CACHE`), keyed by the installed versions.
"""

import ast
import hashlib
import json
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from consilium.data.source import cache_folder, store, version

__all__ = ["DOMAINS", "PRIVATE", "PUBLIC", "Document", "Domain", "documents", "versions"]

Shard = Literal["public", "train", "validation", "test"]

PIECE = 16_000
"""Characters of a document at most."""
_SHORT = 12
"""Lines with fewer characters do not tell whether two documents are alike."""
_CAPS = {"public": 5_000_000, "clients": 1_600_000}
"""Characters that are read of a domain at most, before duplicates are removed."""
_SKIPPED = {"tests", "test", "testing", "__pycache__", "_vendor", "externals", "extern", "site-packages"}
_FORMAT = 1


@dataclass(frozen=True)
class Domain:
    """One kind of text, and where it lies.

    Args:
        name: of the domain.
        roots: folders below the installed packages ("stdlib/" begins those of the standard library).
        endings: of the files' names.
        public: share of the files that belong to the public shard; 0 for a private domain.
        tests: read folders of tests alone; by default they are left out.
        skipped: further folders that are left out.
        docstrings: take the docstrings of Python files instead of the files.
    """

    name: str
    roots: tuple[str, ...]
    endings: tuple[str, ...] = (".py",)
    public: float = 0.0
    tests: bool = False
    skipped: tuple[str, ...] = ()
    docstrings: bool = False


_SHARE = 0.7
_LIBRARY = ("encodings", "idlelib", "lib2to3", "pydoc_data", "ensurepip")
PUBLIC = (
    Domain("cpp-aten", ("torch/include/ATen", "torch/include/c10"), (".h",), _SHARE, skipped=("ops", "vec")),
    Domain("cpp-torch", ("torch/include/torch/csrc",), (".h",), _SHARE),
    Domain("cpp-arrow", ("pyarrow/include",), (".h",), _SHARE),
    Domain("py-torch", ("torch",), public=_SHARE),
    Domain("py-transformers", ("transformers",), public=_SHARE),
    Domain("py-pandas", ("pandas",), public=_SHARE),
    Domain("py-scipy", ("scipy", "sklearn"), public=_SHARE),
    Domain("py-sympy", ("sympy",), public=_SHARE),
    Domain("py-stdlib", ("stdlib/",), public=_SHARE, skipped=_LIBRARY),
    Domain("py-tests", ("numpy", "pandas", "networkx"), public=_SHARE, tests=True),
    Domain("stubs", ("numpy", "torch", "pandas", "matplotlib"), (".pyi",), _SHARE),
    Domain("prose", ("numpy", "matplotlib", "networkx"), public=_SHARE, docstrings=True),
)
"""Domains with a public shard, from which the shipped model was pretrained."""

PRIVATE = (
    Domain("cuda", ("torch/include",), (".cuh",)),
    Domain("cython", ("scipy", "pyarrow", "sklearn", "numpy"), (".pyx", ".pxd", ".pxi")),
    Domain("yaml", ("torchgen",), (".yaml",)),
    Domain("simd", ("torch/include/ATen/cpu/vec",), (".h",)),
    Domain("metrics", ("matplotlib/mpl-data/fonts",), (".afm",)),
    Domain("doctest", ("nltk",), (".doctest",), tests=True),
    Domain("lexers", ("pygments/lexers",)),
    Domain("codecs", ("stdlib/encodings",)),
    Domain("generated-c", ("fontTools",), (".c",)),
    Domain("cmake", ("torch/share",), (".cmake",)),
    Domain("json", ("tokenizers.dist-info", "hf_xet.dist-info"), (".json",)),
    Domain("idna", ("idna",)),
)
"""Domains without any public text."""

DOMAINS = {domain.name: domain for domain in (*PUBLIC, *PRIVATE)}
_PACKAGES = (
    "torch", "pyarrow", "transformers", "pandas", "scipy", "scikit-learn", "sympy", "numpy", "networkx", "matplotlib",
    "nltk", "pygments", "fonttools", "pillow", "tokenizers", "hf-xet", "idna",
)  # fmt: skip


@dataclass(frozen=True)
class Document:
    """A piece of a file. `place` says where it came from, e.g. "torch/include/ATen/Tensor.h:0"; `text` is unchanged."""

    domain: str
    shard: Shard
    place: str
    text: str


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """The installed packages that texts are read from, with their versions, and Python's own."""
    return {name: found for name in ("python", *_PACKAGES) if (found := version(name)) is not None}


@lru_cache(maxsize=2)
def _everything() -> dict[str, list[Document]]:
    key = hashlib.sha256(json.dumps([_FORMAT, versions(), repr(DOMAINS)]).encode()).hexdigest()[:16]
    path = cache_folder() / f"domains-{key}.json"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        found = [Document(*row) for row in rows]
    except (OSError, ValueError, TypeError):
        found = list(_deduplicated())
        store(path, [[d.domain, d.shard, d.place, d.text] for d in found])
    return {name: [d for d in found if d.domain == name] for name in DOMAINS}


def documents(domain: str, *shards: Shard) -> list[Document]:
    """Return the documents of a domain that belong to the given shards, in a fixed order; [] if nothing is installed.

    Raises:
        KeyError: for an unknown domain.
    """
    return [document for document in _everything()[domain] if document.shard in shards]


def _deduplicated() -> Iterator[Document]:
    """Every document once: the public shards first, then the clients' in the order of the domains."""
    read = {name: list(_read(domain)) for name, domain in DOMAINS.items()}
    seen: set[int] = set()
    for public in (True, False):
        for found in read.values():
            for document in found:
                if (document.shard == "public") is not public:
                    continue
                lines = [line for line in map(str.strip, document.text.splitlines()) if len(line) >= _SHORT]
                hashes = [_hash(line) for line in lines]
                known = sum(len(line) for line, h in zip(lines, hashes, strict=True) if h in seen)
                if 2 * known <= sum(map(len, lines)):
                    seen.update(hashes)
                    yield document


def _hash(text: str) -> int:
    """A hash that is the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _read(domain: Domain) -> Iterator[Document]:
    """The documents of a domain, ordered by a hash of their names, up to `_CAPS`."""
    taken = {"public": 0, "clients": 0}
    files = sorted(_files(domain), key=lambda item: _hash(item[0]))
    for name, path in files:
        pieces = list(_pieces(_text(path, domain)))
        few = len(files) < 40  # then pieces, not files, are what a split is made of
        for number, text in enumerate(pieces):
            shard = _shard(domain, f"{name}:{number}" if few else name)
            side = "public" if shard == "public" else "clients"
            if taken[side] < _CAPS[side] and len(text) >= 200:
                taken[side] += len(text)
                yield Document(domain.name, shard, f"{name}:{number}", text)


def _shard(domain: Domain, unit: str) -> Shard:
    """Where a file, or a piece of one, belongs: of what is not public, 40 % test, 15 % validate, the rest trains."""
    place = _hash(f"{domain.name}/{unit}") / 2**64
    if place < domain.public:
        return "public"
    rest = (place - domain.public) / (1 - domain.public)
    return "test" if rest < 0.4 else "validation" if rest < 0.55 else "train"


def _files(domain: Domain) -> Iterator[tuple[str, Path]]:
    """Name below the packages, and path, of every file of a domain."""
    for root in domain.roots:
        folder = _folder(root)
        if folder is None:
            continue
        for path in folder.rglob("*"):
            parts = path.relative_to(folder).parts
            low = path.name.lower()
            inside = set(parts[:-1])
            if not low.endswith(domain.endings) or not path.is_file() or inside & set(domain.skipped):
                continue
            if domain.tests != bool(inside & {"tests", "test"}) or (not domain.tests and inside & _SKIPPED):
                continue
            yield "/".join((root.rstrip("/"), *parts)), path


def _folder(root: str) -> Path | None:
    """The folder of a root; None if it is not installed. The version is not part of a root's name."""
    if root.startswith("stdlib/"):
        return Path(sysconfig.get_path("stdlib")) / root.removeprefix("stdlib/")
    package, _, rest = root.partition("/")
    for key in ("purelib", "platlib"):
        base = Path(sysconfig.get_path(key))
        found = base / package
        if package.endswith(".dist-info"):
            name = package.removesuffix(".dist-info")
            found = next(iter(sorted(base.glob(f"{name}-*.dist-info"))), found)
        if (found / rest).is_dir():
            return found / rest
    return None


def _text(path: Path, domain: Domain) -> str:
    """The text of a file, or its docstrings; "" where it cannot be read as UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError):
        return ""
    if not domain.docstrings:
        return text
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    return "\n\n".join(text for text in found if len(text) >= 80)


def _pieces(text: str) -> Iterator[str]:
    """A text in pieces of at most `PIECE` characters, cut between lines; a longer line stands alone."""
    piece: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        if size + len(line) > PIECE and piece:
            yield "".join(piece)
            piece, size = [], 0
        piece.append(line)
        size += len(line)
    if piece:
        yield "".join(piece)
