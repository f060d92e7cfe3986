"""A reader of the documentation in every Python installation. It uses `ast`; nothing is imported or run.

A package is found through `importlib` metadata only, parsed once, and cached as JSON under `~/.cache/consilium`
(or `$CONSILIUM_CACHE`), keyed by its version. Parsing all packages takes a minute, and `warm` distributes this work
over the machine's cores: `python -m consilium.data.source NAME ...` caches the named packages.

Texts are masked here, once and in the same way for every task, so that equal texts are equal for every task:

- every package's own name, import alias and dotted path becomes PKG (for all packages, not only the text's own,
  because otherwise the absence of a name would reveal the package);
- the documented object's own name becomes NAME, and so does an identifier that contains its verb.
"""

import ast
import hashlib
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from importlib import metadata
from pathlib import Path

from consilium.errors import DataError
from consilium.machine import cores

__all__ = [
    "PACKAGES",
    "PUBLIC",
    "Doc",
    "cache_folder",
    "digests",
    "extract",
    "mask",
    "read",
    "store",
    "version",
    "warm",
    "words",
]

PUBLIC = ("torch", "transformers", "sympy")
"""Packages with only public documentation, which no client ever holds."""

PACKAGES = (
    "PIL", "absl", "accelerate", "anyio", "charset_normalizer", "click", "contourpy", "datasets", "dateutil",
    "dill", "docstring_parser", "filelock", "flwr_datasets", "fontTools", "fsspec", "httpcore", "httpx",
    "huggingface_hub", "jinja2", "joblib", "markdown_it", "matplotlib", "mpl_toolkits", "mpmath", "narwhals",
    "networkx", "nltk", "numpy", "packaging", "pandas", "peft", "psutil", "pyarrow", "pydantic", "pydantic_core",
    "pygments", "pyparsing", "python", "regex", "requests", "rich", "scipy", "seaborn", "setuptools", "sklearn",
    "tokenizers", "tqdm", "typer", "tyro", "urllib3", "yaml",
)  # fmt: skip
"""Packages split between the public shard and the clients, by module. "python" is the standard library."""

_DISTRIBUTIONS = {
    "PIL": "pillow", "absl": "absl-py", "dateutil": "python-dateutil", "fontTools": "fonttools",
    "markdown_it": "markdown-it-py", "mpl_toolkits": "matplotlib", "sklearn": "scikit-learn", "yaml": "pyyaml",
}  # fmt: skip
_SKIPPED_FOLDERS = {
    "tests", "test", "testing", "site-packages", "_vendor", "vendored", "externals", "extern", "idlelib", "lib2to3",
    "ensurepip", "__pycache__",
}  # fmt: skip
_ALIASES = (
    "np", "pd", "plt", "sns", "nx", "pa", "tf", "mpl", "jnp", "sp", "ds", "hf", "Image",
)  # fmt: skip
_OTHER_NAMES = (
    "scikit-learn", "pytorch", "hugging", "huggingface", "pillow", "cpython", "jax", "tensorflow", "seaborn",
    "fonttools", "pyplot",
)  # fmt: skip

TEXT_CHARACTERS, BODY_CHARACTERS = 400, 600
_FORMAT = 4


@dataclass(frozen=True)
class Doc:
    """A documented object.

    `text` is masked and cut to 400 characters. `summary` is the first paragraph as one line of at most 200 characters,
    unmasked.
    """

    package: str
    module: str
    name: str
    kind: str
    text: str
    summary: str
    body: str

    @property
    def row(self) -> str:
        """Return the origin of the documentation, e.g. "numpy.linalg:norm"."""
        return f"{self.module}:{self.name}"

    @property
    def key(self) -> str:
        """Return a digest of the normalised text; documents with equal keys are copies of each other."""
        normal_text = re.sub(r"[\W_]+", " ", self.text.lower()).strip()
        return hashlib.sha256(normal_text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def words(name: str) -> list[str]:
    """Split an identifier into lower-case words: `_get_HTTPServer2` -> get, http, server2."""
    spaced_name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|_+", " ", name.rsplit(".", 1)[-1])
    return spaced_name.lower().split()


_NAMES = "|".join(sorted({re.escape(n) for n in (*PUBLIC, *PACKAGES, *_OTHER_NAMES)}, key=len, reverse=True))
_PACKAGE = re.compile(rf"(?<![\w.])(?:(?:{_NAMES})(?:\.\w+)*(?!\w)|(?:{'|'.join(_ALIASES)})(?:\.\w+)+)", re.IGNORECASE)
_FIRST_WORDS = {re.split(r"\W", name.lower())[0] for name in (*PUBLIC, *PACKAGES, *_OTHER_NAMES, *_ALIASES)}
_RULE = re.compile(r"([-=~*#^_.\"'`])\1{2,}")


def mask(text: str, name: str) -> str:
    """Mask the parts of `text` that would reveal the answers (see the module docstring), collapse whitespace, and cut.

    Args:
        name: name of the documented object.
    """
    text = _RULE.sub(" ", " ".join(text.split()))[: 2 * TEXT_CHARACTERS]
    short_name = name.rsplit(".", 1)[-1]
    # The plain searches avoid compiling a pattern per name, because most texts do not mention their own name.
    if len(short_name) > 2 and short_name in text:
        text = re.sub(rf"(?<!\w){re.escape(short_name)}(?!\w)", "NAME", text)
    name_words = words(short_name)
    if name_words and any(
        fragment in text for fragment in (f"_{name_words[0]}", f"{name_words[0]}_", f"{name_words[0]}(")
    ):
        verb = re.escape(name_words[0])
        text = re.sub(rf"(?<!\w)(?:\w+_{verb}|(?:\w+_)?{verb}_\w+|{verb}(?=\())(?!\w)", "NAME", text)
    if not _FIRST_WORDS.isdisjoint(re.findall(r"\w+", text.lower())):
        text = _PACKAGE.sub("PKG", text)
    text = " ".join(text.split())
    return text if len(text) <= TEXT_CHARACTERS else text[:TEXT_CHARACTERS].rsplit(" ", 1)[0]


def extract(source: str, package: str, module: str) -> Iterator[Doc]:
    """Yield the module and every documented function, method and class in it, except nested functions and tests.

    Raises:
        SyntaxError: if `ast.parse` raises it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Other projects' code may contain invalid escapes.
        tree = ast.parse(source)
    lines = source.splitlines()
    yield from _document(tree, "module", package, module, "", lines)
    yield from _walk(tree.body, False, package, module, "", lines)


def _walk(
    body: list[ast.stmt], inside: bool, package: str, module: str, prefix: str, lines: list[str]
) -> Iterator[Doc]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from _document(node, "class", package, module, prefix + node.name, lines)
            yield from _walk(node.body, True, package, module, f"{prefix}{node.name}.", lines)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if not node.name.startswith("test_"):
                yield from _document(node, _kind(node, inside), package, module, prefix + node.name, lines)
        elif isinstance(node, ast.If | ast.Try):
            branches = node.body + node.orelse + [s for h in getattr(node, "handlers", []) for s in h.body]
            yield from _walk(branches, inside, package, module, prefix, lines)


def _kind(node: ast.FunctionDef | ast.AsyncFunctionDef, inside: bool) -> str:
    if not inside:
        return "function"
    for decorator in node.decorator_list:
        target = decorator.func if isinstance(decorator, ast.Call) else decorator
        name = target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", "")
        if name.endswith("property") or name in ("setter", "getter"):
            return "property"
        if name in ("classmethod", "staticmethod"):
            return name
    return "method"


def _document(node: ast.AST, kind: str, package: str, module: str, name: str, lines: list[str]) -> Iterator[Doc]:
    text = ast.get_docstring(node)
    if not text or len(text) < 30 or len(text.split()) < 4:
        return
    masked_text = mask(text, name or module)
    if len(masked_text.split()) < 4:
        return
    summary = " ".join(text.strip().split("\n\n", 1)[0].split())[:200]
    body = ""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and len(node.body) > 1:
        start = node.body[1].lineno - 1
        body = "\n".join(lines[start : node.end_lineno])[:BODY_CHARACTERS]
    yield Doc(package, module, name, kind, masked_text, summary, body)


def version(package: str) -> str | None:
    """Return the installed version of a package, or None if it is not installed."""
    if package == "python":
        return platform.python_version()
    try:
        return metadata.version(_DISTRIBUTIONS.get(package, package))
    except metadata.PackageNotFoundError:
        return None


def _root(package: str) -> Path | None:
    if package == "python":
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(package)  # A top-level name is found without an import.
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _parse(package: str) -> list[Doc]:
    root, unique_docs, seen_keys = _root(package), [], set()
    if root is None:
        return []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED_FOLDERS.intersection(parts) or any(p.startswith("test_") for p in parts):
            continue
        module = ".".join(p for p in ((package, *parts) if package != "python" else parts) if p != "__init__")
        try:
            docs = list(extract(path.read_text(encoding="utf-8", errors="replace"), package, module))
        except (SyntaxError, ValueError, RecursionError, OSError):
            continue  # The file is for another version of Python, or a template, so it cannot be read.
        for doc in docs:
            if doc.key not in seen_keys:  # Copies inside a package are kept once.
                seen_keys.add(doc.key)
                unique_docs.append(doc)
    return unique_docs


def cache_folder() -> Path:
    """Return the folder of the cache for texts of installed packages."""
    return Path(os.environ.get("CONSILIUM_CACHE") or Path.home() / ".cache" / "consilium")


def _cache(package: str, ending: str) -> Path:
    python_version = platform.python_version()
    return cache_folder() / f"docs-{package}-{version(package)}-py{python_version}-v{_FORMAT}.{ending}"


def read(package: str) -> list[Doc]:
    """Return all documents of a package, in file order, each text once; an empty list if it is not installed.

    Raises:
        DataError: if the package is not in PUBLIC or PACKAGES.
    """
    if package not in PUBLIC and package not in PACKAGES:
        raise DataError(f"package {package!r} is not a source; use one of: {', '.join(sorted((*PUBLIC, *PACKAGES)))}")
    if version(package) is None:
        return []
    try:
        rows = json.loads(_cache(package, "json").read_text(encoding="utf-8"))
        return [Doc(package, *row) for row in rows]
    except (OSError, ValueError, TypeError):
        docs = _parse(package)
        store(_cache(package, "json"), [astuple(doc)[1:] for doc in docs])
        store(_cache(package, "keys.json"), [doc.key for doc in docs])
        return docs


def warm(packages: Sequence[str]) -> None:
    """Cache the packages that are not cached yet, with one process per core; `read` handles packages that fail here."""
    missing_packages = [p for p in packages if version(p) is not None and not _cache(p, "json").exists()]
    workers = min(len(missing_packages), cores())
    if workers < 2:
        return

    def cache(package: str) -> None:
        subprocess.run([sys.executable, "-m", __spec__.name, package], capture_output=True, check=False)

    with ThreadPoolExecutor(workers) as threads:
        list(threads.map(cache, missing_packages))


def digests(package: str) -> list[str]:
    """Return the keys of `read(package)` without loading the texts if they are cached."""
    if version(package) is None:
        return []
    docs = None if _cache(package, "json").exists() else read(package)
    try:
        return json.loads(_cache(package, "keys.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return [doc.key for doc in docs or read(package)]


def store(path: Path, rows: list) -> None:
    """Write rows as JSON to a temporary file and rename it, so that a reader never sees a partial file.

    A folder that is not writable is not an error; then nothing is cached.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump(rows, file)
        Path(file.name).replace(path)
    except OSError:
        return


if __name__ == "__main__":
    for name in sys.argv[1:]:
        read(name)
