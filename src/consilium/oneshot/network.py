"""One exchange over the network: the server collects packages as sites connect, over days, and adds them to its hub.

    offer     at a site: a SuperNode that submits one file, and nothing else
    collect   at the server: a SuperLink, and `server_app` in it, which asks connected sites for missing packages

A package is sent in pieces. Received pieces are kept in `<hub>.incoming`, so a transfer resumes if the site, the server
or the network was away. A complete file is checked like any other package. Its name must be that of the site that sent
it, and the site is identified by its key.
"""

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from consilium.addresses import parse_address
from consilium.certificates import check_key, owners
from consilium.deployment import SETTINGS, App, become_node, check_keys, keep_serving, stop_serving
from consilium.engine.flower import PIECE, Roster, ask, failed, save_offer
from consilium.engine.flower import server_app as flower_app
from consilium.engine.judge import number
from consilium.errors import ConfigError, PackageError, PayloadError
from consilium.escape import one_line, print_line
from consilium.logs import start_from_environment
from consilium.oneshot.hub import Hub
from consilium.oneshot.package import check_site, read_with_bytes

__all__ = ["Collection", "collect", "offer", "server_app"]

log = logging.getLogger(__name__)
POLL, ANSWER = 2.0, 120.0
"""Seconds between polls for connected sites, and seconds that a site has to send one piece."""


def offer(package: Path, name: str, address: str, keys: Path | None, state: Path, port: int) -> NoReturn:
    """Replace this process by a SuperNode that sends this package when the server asks, see `deployment.client`.

    Raises:
        PackageError: for a file that is no package.
        ConfigError: for the package or the key of another site.
    """
    check_site(name)
    site_package, blob = read_with_bytes(package)
    if site_package.site != name:
        raise ConfigError(
            f"{package} is the package of {site_package.site}, --name is {name}; they must be of one site"
        )
    if keys:
        check_key(keys, name)
    save_offer(state.absolute() / SETTINGS, name, blob)
    become_node(name, address, keys, state, port)


def collect(folder: Path, sites: Sequence[str], address: str, keys: Path | None, out: Console) -> None:
    """Wait for the packages of these sites, or resume waiting, until the hub has all of them."""
    hub, listen = Hub.open(folder), parse_address(address, "--address")
    keys = keys and keys.absolute()
    check_keys(keys, sites, listen)

    def finished() -> bool:
        return set(sites) <= set(Hub.open(folder).sites)

    def reached() -> str:
        incoming = Collection(hub, sites).incoming
        return f"{hub.sites} {sum(p.stat().st_size for p in incoming.glob('*')) if incoming.exists() else 0}"

    if finished():
        print_line(out, f"{folder} has the packages of {', '.join(sites)}")
        return
    home = (folder.parent / f"{folder.name}.flower").absolute()
    app = App("consilium.oneshot.network:server_app", {"folder": str(folder.absolute())}, home, finished, reached)
    keep_serving(app, sites, listen, keys)
    print_line(out, f"{folder} has the packages of {', '.join(sites)}")


@dataclass
class Collection:
    """The packages that are being received for a hub.

    Args:
        sites: names of the expected sites.
        refused: site -> why its package was not accepted; the site is asked again when it offers another file.
    """

    hub: Hub
    sites: Sequence[str]
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def incoming(self) -> Path:
        """Return the folder of received pieces, next to the hub."""
        return self.hub.folder.parent / f"{self.hub.folder.name}.incoming"

    @property
    def missing(self) -> list[str]:
        """Return the sites whose packages are not in the hub."""
        return [site for site in self.sites if site not in self.hub.sites]

    def offset(self, site: str) -> int:
        """Return how many bytes of a site's file have been received."""
        part = self._part(site)
        return part.stat().st_size if part is not None else 0

    def take(self, site: str, told: Mapping[str, Any]) -> str | None:
        """Store one piece, and return a line to print when the file is complete.

        Raises:
            PayloadError: for a malformed piece.
            PackageError: for a complete file that is not accepted.
        """
        size, offset, digest, blob = (told.get(name) for name in ("size", "offset", "digest", "bytes"))
        if told.get("name") != site:
            raise PayloadError(f"the node of {site} says that it is {one_line(told.get('name'), 64)!r}")
        if not number(size, 1, self.hub.max_bytes, int) or not number(offset, 0, size, int):
            raise PayloadError(f"{site} offers {one_line(size, 40)} bytes; allowed are 1 to {self.hub.max_bytes}")
        if not isinstance(blob, bytes) or len(blob) > min(PIECE, size - offset):
            raise PayloadError(f"{site} sent a piece that is none")
        if not isinstance(digest, str) or len(digest) != 64 or not digest.isalnum():
            raise PayloadError(f"{site} sent no digest of its file")
        if self.refused.get(site, "").startswith(digest):
            return None
        part = self.incoming / f"{site}.{digest}"
        if offset != (part.stat().st_size if part.exists() else 0):  # another file's, or a duplicate
            self._clear(site, part)
            return None
        self._clear(site, part)
        part.parent.mkdir(exist_ok=True)
        with part.open("ab") as file:
            file.write(blob)
        return self._whole(site, part, digest) if part.stat().st_size == size else None

    def _whole(self, site: str, part: Path, digest: str) -> str:
        with part.open("rb") as file:
            actual_digest = hashlib.file_digest(file, "sha256").hexdigest()
        try:
            if actual_digest != digest:
                raise PackageError(f"the file of {site} arrived changed")
            if read_with_bytes(part, self.hub.layout, self.hub.max_bytes)[0].site != site:
                raise PackageError(f"{site} sent the package of another site")
            package = self.hub.add(part)
        except PackageError as error:
            self.refused[site] = f"{digest} {error}"
            raise
        finally:
            part.unlink()
        return f"{site}: added, {package.kind}, {package.examples} examples"

    def _part(self, site: str) -> Path | None:
        return next(iter(self.incoming.glob(f"{site}.{'?' * 64}")), None)

    def _clear(self, site: str, kept: Path) -> None:
        """Remove pieces of other files that the site offered before."""
        for path in self.incoming.glob(f"{site}.{'?' * 64}"):
            if path != kept:
                path.unlink()


def gather(collection: Collection, roster: Roster, said: Any) -> None:
    """Ask every missing site that is connected for its next piece, once each."""
    nodes = {site: node for site, node in roster.nodes().items() if site in collection.missing}
    for site, node in sorted(nodes.items()):
        request = {"offset": collection.offset(site)}
        for _, reply in ask(roster.grid, [node], "package", request, ANSWER, roster.poll):
            try:
                if reason := failed(reply):
                    raise PayloadError(f"{site} cannot hand over its package: {reason}")
                if line := collection.take(site, dict(reply.content.config_records.get("engine", {}))):
                    said(line)
            except (PayloadError, PackageError) as error:
                if collection.refused.get(f"said {site}") != str(error):
                    said(one_line(error))
                collection.refused[f"said {site}"] = str(error)


def _serve(grid: Any, config: Mapping[str, Any]) -> None:
    """Collect until all packages are there, in the process that the SuperLink starts."""
    start_from_environment()
    folder = Path(config["folder"])
    home = (folder.parent / f"{folder.name}.flower").absolute()
    try:
        sites = str(config["sites"]).split(",")
        keys = owners(Path(config["keys"]), sites) if config["keys"] else {}
        collection, roster = Collection(Hub.open(folder), sites), Roster(grid, keys=keys)
        while collection.missing:
            former_state = sum(collection.offset(site) for site in collection.missing), collection.missing
            gather(collection, roster, log.info)
            if former_state == (sum(collection.offset(site) for site in collection.missing), collection.missing):
                time.sleep(POLL)
    except Exception as error:
        stop_serving(home, error)
        raise


server_app = flower_app(_serve)
