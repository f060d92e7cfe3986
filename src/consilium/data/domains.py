"""Code and technical text from the packages of every Consilium installation, read as files; nothing is imported or run.

A *domain* is one kind of text: the C++ headers of PyTorch, the CUDA kernels, the type stubs, the font metrics. Public
domains are split into a public shard, on which the shipped model was pretrained, and a shard for clients. Private
domains have no public text. A hash of the file's name decides the shard of a document, and its split at a client.

A document is a file, or a piece of one with at most 16 kB, cut between lines. Near-duplicates are removed: a document
is dropped if more than half of its characters are in lines of an earlier document; the public shard comes first. The
documents are cached under `~/.cache/consilium` (or `$CONSILIUM_CACHE`), keyed by the installed versions.
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
"""Maximum number of characters of a document; a longer line is a document of its own."""
_SHORT = 12
"""Lines with fewer characters are ignored when documents are compared."""
_CAPS = {"public": 5_000_000, "clients": 1_600_000}
"""Number of characters after which no further document of a domain is read, before duplicates are removed."""
_SKIPPED = {"tests", "test", "testing", "__pycache__", "_vendor", "externals", "extern", "site-packages"}
_FORMAT = 1


@dataclass(frozen=True)
class Domain:
    """One kind of text, and its location.

    Args:
        name: name of the domain.
        roots: folders below the installed packages; folders of the standard library begin with "stdlib/".
        endings: endings of the files' names.
        public: share of the files that belong to the public shard, in [0, 1); 0 for a private domain.
        tests: read only folders of tests; by default they are left out.
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
"""Domains with a public shard, on which the shipped model was pretrained."""

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
    """A piece of a file. `place` is its origin, e.g. "torch/include/ATen/Tensor.h:0"; `text` is unchanged."""

    domain: str
    shard: Shard
    place: str
    text: str


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages from which texts are read."""
    return {
        name: installed_version for name in ("python", *_PACKAGES) if (installed_version := version(name)) is not None
    }


@lru_cache(maxsize=2)
def _everything() -> dict[str, list[Document]]:
    key = hashlib.sha256(json.dumps([_FORMAT, versions(), repr(DOMAINS)]).encode()).hexdigest()[:16]
    path = cache_folder() / f"domains-{key}.json"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        all_documents = [Document(*row) for row in rows]
    except (OSError, ValueError, TypeError):
        all_documents = list(_deduplicated())
        store(path, [[d.domain, d.shard, d.place, d.text] for d in all_documents])
    return {name: [d for d in all_documents if d.domain == name] for name in DOMAINS}


def documents(domain: str, *shards: Shard) -> list[Document]:
    """Return the documents of a domain that belong to the given shards, in a fixed order; [] if nothing is installed.

    Raises:
        KeyError: if the domain is unknown.
    """
    return [document for document in _everything()[domain] if document.shard in shards]


def _deduplicated() -> Iterator[Document]:
    """Yield every document once: first the public shards, then the clients' shards, in the order of the domains."""
    documents_by_domain = {name: list(_read(domain)) for name, domain in DOMAINS.items()}
    seen_hashes: set[int] = set()
    for is_public in (True, False):
        for domain_documents in documents_by_domain.values():
            for document in domain_documents:
                if (document.shard == "public") is not is_public:
                    continue
                lines = [line for line in map(str.strip, document.text.splitlines()) if len(line) >= _SHORT]
                hashes = [_hash(line) for line in lines]
                known_length = sum(len(line) for line, h in zip(lines, hashes, strict=True) if h in seen_hashes)
                if 2 * known_length <= sum(map(len, lines)):
                    seen_hashes.update(hashes)
                    yield document


def _hash(text: str) -> int:
    """Return a hash that is the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _read(domain: Domain) -> Iterator[Document]:
    """Yield the documents of a domain, ordered by a hash of their names, up to `_CAPS`."""
    sizes = {"public": 0, "clients": 0}
    files = sorted(_files(domain), key=lambda item: _hash(item[0]))
    for name, path in files:
        pieces = list(_pieces(_text(path, domain)))
        has_few_files = len(files) < 40  # With few files, pieces instead of files are assigned to splits.
        for number, text in enumerate(pieces):
            shard = _shard(domain, f"{name}:{number}" if has_few_files else name)
            side = "public" if shard == "public" else "clients"
            if sizes[side] < _CAPS[side] and len(text) >= 200:
                sizes[side] += len(text)
                yield Document(domain.name, shard, f"{name}:{number}", text)


def _shard(domain: Domain, unit: str) -> Shard:
    """Return the shard of a file or a piece.

    The rest that is not public is split into 40 % test, 15 % validation and 45 % train.
    """
    position = _hash(f"{domain.name}/{unit}") / 2**64
    if position < domain.public:
        return "public"
    private_position = (position - domain.public) / (1 - domain.public)
    return "test" if private_position < 0.4 else "validation" if private_position < 0.55 else "train"


def _files(domain: Domain) -> Iterator[tuple[str, Path]]:
    """Yield the name relative to the packages, and the path, of every file of a domain."""
    for root in domain.roots:
        folder = _folder(root)
        if folder is None:
            continue
        for path in folder.rglob("*"):
            parts = path.relative_to(folder).parts
            lower_name = path.name.lower()
            folder_names = set(parts[:-1])
            if not lower_name.endswith(domain.endings) or not path.is_file() or folder_names & set(domain.skipped):
                continue
            if domain.tests != bool(folder_names & {"tests", "test"}) or (not domain.tests and folder_names & _SKIPPED):
                continue
            yield "/".join((root.rstrip("/"), *parts)), path


def _folder(root: str) -> Path | None:
    """Return the folder of a root; None if it is not installed.

    The name of a root such as "tokenizers.dist-info" does not contain the version.
    """
    if root.startswith("stdlib/"):
        return Path(sysconfig.get_path("stdlib")) / root.removeprefix("stdlib/")
    package, _, subfolder = root.partition("/")
    for key in ("purelib", "platlib"):
        base = Path(sysconfig.get_path(key))
        package_folder = base / package
        if package.endswith(".dist-info"):
            name = package.removesuffix(".dist-info")
            package_folder = next(iter(sorted(base.glob(f"{name}-*.dist-info"))), package_folder)
        if (package_folder / subfolder).is_dir():
            return package_folder / subfolder
    return None


def _text(path: Path, domain: Domain) -> str:
    """Return the text of a file, or its docstrings; "" if it cannot be read as UTF-8 or parsed."""
    try:
        text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError):
        return ""
    if not domain.docstrings:
        return text
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Other projects' code may contain invalid escapes.
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    node_types = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, node_types)]
    return "\n\n".join(text for text in docstrings if len(text) >= 80)


def _pieces(text: str) -> Iterator[str]:
    """Split a text between lines into pieces of at most `PIECE` characters; a longer line is a piece of its own."""
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
