"""The flags of `consilium expert` and `consilium hub`, and their output."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from consilium.engine.checkpoint import write_atomic
from consilium.errors import ConfigError
from consilium.escape import one_line
from consilium.experiment import Experiment, from_json, to_json
from consilium.moe.budget import human
from consilium.oneshot.build import Building, Format
from consilium.oneshot.hub import Hub, create
from consilium.oneshot.package import check_site, file_digest
from consilium.oneshot.routers import JOINT, Router
from consilium.oneshot.train import Training

__all__ = ["ROOMS", "ReadExperiment", "Rows"]

ReadExperiment = Callable[[str, Sequence[str], str], Experiment]
"""(recipe or saved experiment, flags, name of the command) -> the experiment."""
Positional = tyro.conf.Positional


@dataclass(frozen=True)
class Rows:
    """An experiment that was read for a command; only its data, and the conversion of the data to tokens, are used."""

    experiment: Experiment | None = None

    def of(self, hub: Hub) -> Any:
        """Return the rows as domains for a hub's model, or None if there are none."""
        from consilium.oneshot.evaluate import Domains

        if self.experiment is None:
            return None
        return Domains.of(replace(self.experiment, model=hub.base.source, memory=()))

    def needed(self, hub: Hub, what: str) -> Any:
        """Return the rows; raise ConfigError if there are none."""
        if self.experiment is None:
            raise ConfigError(f"{what} needs rows: name a recipe by --rows, with its --data flags")
        return self.of(hub)


# --- at a site --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Train:
    """Train this site's part on its own data, next to the frozen public model, and write it as one signed file.

    The recipe says how data is read and trained; its flags follow: --data.*, --model.*, --fit.*, --memory, --device,
    --seed. The same command continues a training that was interrupted.

    Args:
        name: name of this site.
        out: file to write.
        state: folder for the training's state and, unless --key is given, the site's key; default: site-NAME.
        key: folder with the site's key, as `consilium certificates` makes it.
        client: client of the data to train on; needed if the data has several clients.
        about: description of the data, for people.
        licence: licence of the package.
        contact: contact for questions.
        part: what is trained.
    """

    name: str
    out: Path
    state: Path | None = None
    key: Path | None = None
    client: str = ""
    about: str = ""
    licence: str = ""
    contact: str = ""
    part: Annotated[Training, tyro.conf.arg(name="")] = field(default_factory=Training)

    def lines(self, rows: Rows) -> Iterator[str]:
        """Run the command and yield its output."""
        from consilium.certificates import site_key
        from consilium.oneshot.package import to_bytes
        from consilium.oneshot.train import site_data, train

        if rows.experiment is None:
            raise ConfigError("name a recipe: consilium expert train RECIPE --name A --out FILE")
        if self.out.exists():
            raise ConfigError(f"{self.out} is there already; choose another --out, or remove it first")
        check_site(self.name)
        state = self.state or Path(f"site-{self.name}")
        key = site_key(self.key or state)
        data = site_data(rows.experiment, self.client)
        card = {name: text for name in ("about", "licence", "contact") if (text := getattr(self, name))}
        messages: list[str] = []
        package = train(rows.experiment, self.name, self.part, state, data, card, messages.append).signed(key)
        write_atomic(self.out, to_bytes(package))
        yield from messages[-1:]
        size = self.out.stat().st_size
        yield f"{self.out}: {package.kind}, router part {package.router}, {package.examples} examples, {human(size)}"


@dataclass(frozen=True)
class Memory:
    """Test how much text of this site's training data a package reveals, before it is submitted.

    Args:
        package: the file.
        client: client of the data to test on.
        prefix: tokens of the prompt.
        length: tokens that must be reproduced.
        most: maximum number of rows to test.
    """

    package: Annotated[Path, Positional]
    client: str = ""
    prefix: int = 32
    length: int = 32
    most: int = 100

    def lines(self, rows: Rows) -> Iterator[str]:
        """Run the command and yield its output."""
        from consilium.oneshot.base import Base
        from consilium.oneshot.evaluate import Domains, alone
        from consilium.oneshot.package import read
        from consilium.oneshot.train import site_data
        from consilium.oneshot.trust import extraction

        if rows.experiment is None:
            raise ConfigError("name a recipe by --rows, with the --data flags of the training")
        package = read(self.package)
        data = site_data(rows.experiment, self.client)
        domains = Domains(rows.experiment, {package.site: data}, "train")
        base = Base(rows.experiment.model)
        for name, model in (("public model", base.model()), ("with the package", alone(base, package))):
            result = extraction(model, domains.rows[package.site], self.prefix, self.length, self.most)
            yield (
                f"{name}: {100 * result['reproduced']:.1f} % of {result['rows']} rows reproduced over {self.length} "
                f"tokens, at most {result['longest']} tokens"
            )


# --- at the hub -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Init:
    """Create a hub for a public model.

    Args:
        hub: folder to create.
        model: a directory, a shipped model's name, or a hub name.
        dtype: dtype in which sites train.
        keys: folder with <site>.pub of every site that may add, the part `server` of `consilium certificates`; default:
            any site may, with any key.
        max_bytes: largest package.
    """

    hub: Annotated[Path, Positional]
    model: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    keys: Path | None = None
    max_bytes: str = "8GB"

    def lines(self, rows: Rows) -> Iterator[str]:
        """Run the command and yield its output."""
        hub = create(self.hub, self.model, self.dtype, self.keys, self.max_bytes)
        part_kinds = "adapters and whole experts" if hub.layout.experts else "adapters"
        yield f"{self.hub}: takes {part_kinds} for {self.model} ({hub.layout.frozen[:12]})"


@dataclass(frozen=True)
class Add:
    """Check packages and add them; nothing of other sites changes.

    Args:
        hub: folder of the hub.
        packages: files of sites.
    """

    hub: Annotated[Path, Positional]
    packages: Annotated[tuple[Path, ...], Positional]

    def lines(self, rows: Rows) -> Iterator[str]:
        """Run the command and yield its output."""
        if not self.packages:
            raise ConfigError("no package named; give at least one file")
        hub = Hub.open(self.hub)
        for path in self.packages:
            package = hub.add(path)
            yield f"{package.site}: added, {package.kind}, {package.examples} examples, {human(package.nbytes)}"


@dataclass(frozen=True)
class Withdraw:
    """Remove everything that sites submitted; the hub then equals one that never had them.

    Args:
        hub: folder of the hub.
        sites: names of the sites.
    """

    hub: Annotated[Path, Positional]
    sites: Annotated[tuple[str, ...], Positional]

    def lines(self, rows: Rows) -> Iterator[str]:
        """Run the command and yield its output."""
        hub = Hub.open(self.hub)
        for site in self.sites:
            hub.withdraw(site)
            yield f"{site}: withdrawn; models that were built with it must be built again (hub build --again)"


@dataclass(frozen=True)
class List:
    """List the packages of a hub.

    Args:
        hub: folder of the hub.
    """

    hub: Annotated[Path, Positional]

    def lines(self, rows: Rows) -> Iterator[str]:
        """Run the command and yield its output."""
        hub = Hub.open(self.hub)
        for site, package in hub.packages().items():
            digest = file_digest(hub.path(site))[:12]
            about = f"  {one_line(package.card.get('about', ''), 60)}".rstrip()
            summary = f"{package.kind}  {package.router}  {package.examples} examples  {human(package.nbytes)}"
            yield f"{site}  {summary}  {digest}{about}"
        yield f"{len(hub.sites)} sites"


@dataclass(frozen=True)
class Build:
    """Combine packages into one model.

    Args:
        hub: folder of the hub.
        out: directory to write; it must be new or empty.
        format: auto: for plain transformers or PEFT if they compute the same model, else for this package.
        again: a built model; its settings and rows are used, with the sites that are here now.
        how: the router.
    """

    hub: Annotated[Path, Positional]
    out: Path
    format: Format = "auto"
    again: Path | None = None
    how: Annotated[Building, tyro.conf.arg(name="")] = field(default_factory=Building)

    def lines(self, rows: Rows) -> Iterator[str]:
        """Run the command and yield its output."""
        from consilium.oneshot.build import can_move, write
        from consilium.oneshot.built import record_of
        from consilium.oneshot.evaluate import fit_router

        hub, building = Hub.open(self.hub), self.how
        if self.again is not None:
            record = record_of(self.again)
            settings = record["building"]
            settings["sites"] = tuple(site for site in settings["sites"] if site in hub.sites)
            building = Building(**settings)
            rows = Rows(from_json(record["rows"])) if record.get("rows") else Rows()
        packages, base, public_domains = hub.packages(building.sites), hub.base, rows.of(hub)
        router_tensors = fit_router(base, packages, building, public_domains)
        rows_record = {"rows": to_json(rows.experiment)} if rows.experiment is not None else {}
        form = write(self.out, base, packages, building, router_tensors, self.format, rows_record)
        joint = "; fitted over all sites: build it again after a withdrawal" if building.router in JOINT else ""
        yield f"{self.out}: {len(packages)} sites, router {building.router}, format {form}{joint}"
        if building.router == "flexolmo" and building.apart and len(packages) > 1 and not can_move(packages):
            yield (
                "note: rows that sites trained apart are not calibrated against each other; packages trained with "
                "--moments, at all sites, let the hub move them apart"
            )
        if (self.out / "consilium.json").exists():
            yield f'try it: consilium predict {self.out} --text "..."'


@dataclass(frozen=True)
class Evaluate:
    """Score the public model, every package and routers on rows by domain, and measure each site's contribution.

    Args:
        hub: folder of the hub.
        routers: routers in the matrix; default: all that the packages support.
        worth: the router with which contributions are measured; default: the best on these rows.
        out: file for the scores, JSON; `consilium hub report` takes it.
    """

    hub: Annotated[Path, Positional]
    routers: tuple[Router, ...] = ()
    worth: Router | None = None
    out: Path = Path("scores.json")

    def lines(self, rows: Rows) -> Iterator[str]:
        """Run the command and yield its output."""
        from consilium.oneshot.evaluate import contributions, matrix

        hub = Hub.open(self.hub)
        domains = rows.needed(hub, "evaluate")
        base, packages = hub.base, hub.packages()
        routers = self.routers or fitting(packages)
        table = matrix(base, packages, [Building(router) for router in routers], domains, domains)
        means = {name: sum(scores.values()) / len(scores) for name, scores in table.items()}
        best_router = self.worth or min(routers, key=lambda router: means[f"router {router}"])
        gains_by_site = contributions(base, packages, Building(best_router), domains, domains)
        result = {"unit": domains.unit, "matrix": table, "router": best_router, "contributions": gains_by_site}
        write_atomic(self.out, (json.dumps(result, indent=1) + "\n").encode())
        names = list(domains.rows)
        yield f"{domains.unit}: {', '.join(names)}"
        for name, scores in table.items():
            yield f"{name}: {', '.join(f'{scores[d]:.3f}' for d in names)}"
        for site, gains in gains_by_site.items():
            yield f"without {site}, router {best_router}: {', '.join(f'{gains[d]:+.3f}' for d in names)}"


def fitting(packages: Any) -> tuple[Router, ...]:
    """Return the routers that need nothing but these packages and rows."""
    from consilium.errors import PackageError
    from consilium.oneshot.build import kind_of

    routers = []
    for router in ("uniform", "arrow", "phatgoose", "flexolmo", "ridge"):
        try:
            kind_of(packages, router)
        except PackageError:
            continue
        routers.append(router)
    return tuple(routers)


@dataclass(frozen=True)
class Check:
    """Look for poisoned packages by their scores on public rows and the size of their weights.

    Args:
        hub: folder of the hub.
    """

    hub: Annotated[Path, Positional]

    def lines(self, rows: Rows) -> Iterator[str]:
        """Run the command and yield its output."""
        from consilium.oneshot.trust import check

        hub = Hub.open(self.hub)
        for finding in check(hub.base, hub.packages(), rows.of(hub)):
            summary = "; ".join(finding.reasons) or "nothing found"
            yield f"{finding.site}: {summary} (norm {finding.norm:.3g})"


@dataclass(frozen=True)
class Report:
    """Write one page about a hub, for a browser without network: sites, their parts and licences, and scores.

    Args:
        hub: folder of the hub.
        scores: the file that `consilium hub evaluate` wrote.
        out: file to write.
    """

    hub: Annotated[Path, Positional]
    scores: Path | None = None
    out: Path = Path("hub.html")

    def lines(self, rows: Rows) -> Iterator[str]:
        """Run the command and yield its output."""
        from consilium.oneshot.report import page

        hub = Hub.open(self.hub)
        evaluation = json.loads(self.scores.read_text()) if self.scores else {}
        write_atomic(self.out, page(hub, evaluation).encode())
        yield f"report: {self.out}"


ROOMS: dict[str, dict[str, Any]] = {
    "expert": {"train": Train, "memory": Memory},
    "hub": {
        "init": Init, "add": Add, "withdraw": Withdraw, "list": List, "build": Build, "evaluate": Evaluate,
        "check": Check, "report": Report,
    },
}  # fmt: skip
"""Command -> its subcommands."""
