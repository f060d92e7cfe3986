"""The folder of a hub: one public model, and one file for each site.

    hub.json                        the public model, what packages for it look like, and what the hub takes
    sites/<site>.safetensors        the package, byte for byte as the site signed it
    keys/<site>.pub                 if the hub was given its sites' keys: only these sites may add

A hub contains nothing else: `build` writes everything that depends on several sites elsewhere. Adding a site therefore
changes no byte of another's, and withdrawing a site leaves, bit for bit, a hub that never had it.
"""

import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from consilium.core import CLIENT_ID
from consilium.engine.checkpoint import remove_unfinished, write_atomic
from consilium.errors import ConfigError, PackageError
from consilium.inside import refuse_links
from consilium.moe.budget import bytes_of
from consilium.moe.build import ModelSource
from consilium.oneshot.base import Base
from consilium.oneshot.layout import Layout
from consilium.oneshot.package import Package, read, read_with_bytes

__all__ = ["Hub", "create", "tree_digest"]

FILE, FORMAT, ENDING = "hub.json", 1, ".safetensors"


@dataclass(frozen=True)
class Hub:
    """A hub in a folder; `Hub.open` checks it."""

    folder: Path
    told: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path) -> "Hub":
        """Open the hub in a folder.

        Raises:
            PackageError: if the folder is not a hub, or the hub is broken.
        """
        try:
            settings = json.loads((folder / FILE).read_text())
            if settings["format"] != FORMAT:
                raise PackageError(f"{folder} has format {settings['format']}; this version reads {FORMAT}")
            refuse_links(folder)
            Layout.from_json(settings["layout"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PackageError(
                f"{folder} is no hub ({type(error).__name__}); make one by `consilium hub init`"
            ) from error
        return cls(folder, settings)

    @cached_property
    def layout(self) -> Layout:
        """Return the layout of packages for the public model."""
        return Layout.from_json(self.told["layout"])

    @property
    def base(self) -> Base:
        """Return the public model.

        Raises:
            PackageError: if the files at its place are not those that the hub was made with.
        """
        source = ModelSource(self.told["model"], "text-to-text", self.layout.dtype)
        if source.fingerprint != self.layout.fingerprint:
            raise PackageError(f"the model {self.told['model']} is another one than the hub was made for")
        return Base(source)

    @property
    def max_bytes(self) -> int:
        """Return the size of the largest package that the hub accepts."""
        return bytes_of(self.told["max_bytes"])

    @property
    def sites(self) -> list[str]:
        """Return the names of the sites that have a package here, sorted."""
        return sorted(path.name.removesuffix(ENDING) for path in (self.folder / "sites").glob(f"*{ENDING}"))

    def path(self, site: str) -> Path:
        """Return the file of a site's package."""
        if not CLIENT_ID.fullmatch(site):
            raise ConfigError(f"site {site!r} is not allowed: use 1 to 64 of A-Z a-z 0-9 . _ -")
        return self.folder / "sites" / f"{site}{ENDING}"

    def package(self, site: str) -> Package:
        """Read and check the package of a site.

        Raises:
            PackageError: if the site has none, or the file has changed.
        """
        path = self.path(site)
        if not path.is_file():
            raise PackageError(f"{self.folder} has no package of {site}; it has {', '.join(self.sites) or 'none'}")
        package = read(path, self.layout, self.max_bytes)
        self._check_owner(package, path)
        if package.site != site:
            raise PackageError(f"{path} is signed as the package of {package.site}")
        return package

    def packages(self, sites: tuple[str, ...] = ()) -> dict[str, Package]:
        """Return site -> package of these sites, sorted; (): of all sites."""
        return {site: self.package(site) for site in sorted(sites or self.sites)}

    def add(self, path: Path) -> Package:
        """Check a package, then copy it into the hub; no other file changes.

        Raises:
            PackageError: for a package that cannot be accepted, or a site that has one already.
        """
        package, blob = read_with_bytes(path, self.layout, self.max_bytes)
        self._check_owner(package, path)
        target = self.path(package.site)
        with self._locked():
            if target.exists():
                raise PackageError(f"site {package.site} has a package here; withdraw it before another is added")
            write_atomic(target, blob)
        return package

    def withdraw(self, site: str) -> None:
        """Remove everything that the site submitted.

        Raises:
            PackageError: if it has no package here.
        """
        with self._locked():
            if not self.path(site).is_file():
                raise PackageError(f"{self.folder} has no package of {site}; it has {', '.join(self.sites) or 'none'}")
            self.path(site).unlink()

    def _check_owner(self, package: Package, path: Path) -> None:
        keys = self.folder / "keys"
        if not keys.is_dir():
            return
        key_file = keys / f"{package.site}.pub"
        if not key_file.is_file() or key_file.read_text().split()[:2] != package.key.split()[:2]:
            raise PackageError(f"{path} is not signed by the key that this hub has of site {package.site}")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock the hub against other processes, and remove half-written files of a process that was killed."""
        with (self.folder / FILE).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            remove_unfinished(self.folder)
            yield


def create(folder: Path, model: str, dtype: str, keys: Path | None, max_bytes: str) -> Hub:
    """Create a hub for a public model.

    Args:
        model: a shipped model's name, a directory or a hub name.
        dtype: dtype in which sites train.
        keys: folder with <site>.pub of every site that may add, as `consilium certificates` makes `server`; None: any
            site may, with any key.
        max_bytes: largest package, e.g. "2GB".

    Raises:
        ConfigError: if the folder is not empty, or `keys` has no keys.
        ModelError: for a model that cannot be extended.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty: choose another folder for the hub")
    bytes_of(max_bytes)
    key_files = sorted(keys.glob("*.pub")) if keys is not None else []
    if keys is not None and not key_files:
        raise ConfigError(f"{keys} holds no <site>.pub; it is the folder `server` of `consilium certificates`")
    source = ModelSource(model, "text-to-text", dtype)  # type: ignore[arg-type]
    layout = Layout.of(Base(source))
    model_path = str(Path(model).absolute()) if Path(model).is_dir() else model
    settings = {"format": FORMAT, "model": model_path, "max_bytes": max_bytes, "layout": asdict(layout)}
    for path in key_files:
        write_atomic(folder / "keys" / path.name, path.read_bytes())
    (folder / "sites").mkdir(parents=True, exist_ok=True)
    write_atomic(folder / FILE, (json.dumps(settings, indent=1, sort_keys=True) + "\n").encode())
    return Hub(folder, settings)


def tree_digest(folder: Path) -> str:
    """Return the sha256 (hex) of all names and contents below a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        digest.update(f"{path.relative_to(folder).as_posix()}\0{content}\0".encode())
    return digest.hexdigest()
