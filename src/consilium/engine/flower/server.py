"""The server's end: a Grid from Flower's simulation runtime or from a deployment, and the descriptions of its sites."""

import importlib.util
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from queue import Queue
from typing import Any

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from consilium.core import ClientId
from consilium.engine.flower.client import client_app
from consilium.engine.flower.described import checked_description, checked_name
from consilium.engine.flower.heap import give_back_at_once
from consilium.engine.flower.roster import Roster, ask, failed
from consilium.engine.starting import started
from consilium.errors import ConfigError, PayloadError, RoundError
from consilium.experiment import Experiment
from consilium.machine import cores
from consilium.models.cohort import ARCHITECTURES

__all__ = ["describe", "one_cohort", "server_app", "simulation"]

ON_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's switch for clusters. With "0", Ray makes none, and its processes take 127.0.0.1 as the machine's address.
(Setting `_node_ip_address="127.0.0.1"` does not do this: Ray turns it into the address that others reach.)"""


@contextmanager
def simulation(experiment: Experiment, clients: int) -> Iterator[Grid]:
    """Run a simulation, and yield a Grid with `clients` client ends as nodes in Ray's worker processes.

    As many clients run at a time as there are cores for `experiment.threads` each, or GPUs for one each. A worker that
    dies is started again, and its client is missing until it is back. Ray is started for this run alone and listens on
    loopback alone, unless RAY_ADDRESS names a cluster. In that case the run directory must be on a disk that the whole
    cluster shares. A cluster's ports have no authentication by default: put it behind a firewall, or set
    RAY_AUTH_MODE=token.

    Raises:
        ConfigError: if Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("engine flower needs Ray for a simulation: pip install 'consilium[simulation]'")
    if "RAY_ADDRESS" not in os.environ:
        os.environ.setdefault(ON_LOOPBACK, "0")  # ray reads it on import, and so do its processes
    from flwr.simulation import run_simulation

    grids: Queue[Grid | BaseException] = Queue()
    end_event = threading.Event()
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        grids.put(grid)
        end_event.wait()

    resources = {
        "num_cpus": min(experiment.threads, cores()),
        "num_gpus": float(experiment.device.startswith("cuda")),
        "max_restarts": -1,  # Flower makes these options of the workers: Ray restarts one that dies
    }

    def work(folder: str) -> None:
        # The folder is removed afterwards; its path must be short because of the sockets in it.
        local_settings = {"num_cpus": cores(), "include_dashboard": False, "_temp_dir": folder}
        init_args = {} if "RAY_ADDRESS" in os.environ else local_settings
        try:
            run_simulation(
                server, client_app, clients, backend_config={"client_resources": resources, "init_args": init_args}
            )
        except BaseException as error:
            grids.put(RoundError(f"Flower's simulation has failed ({error}); see its messages above"))
        else:
            grids.put(RoundError("Flower's simulation ended before the run did; see its messages above"))

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        thread = threading.Thread(target=work, args=(folder,), daemon=True)
        thread.start()
        try:
            grid = grids.get()
            while not isinstance(grid, BaseException) and len(list(grid.get_node_ids())) < clients:
                if not thread.is_alive():
                    grid = grids.get()
                time.sleep(0.05)  # Flower starts the ServerApp before its nodes
            if isinstance(grid, BaseException):
                raise grid
            yield _watched(grid, thread, grids)
        finally:
            end_event.set()
            thread.join()


def _watched(grid: Grid, thread: threading.Thread, grids: "Queue[Grid | BaseException]") -> Grid:
    """Return the Grid, which stops waiting for answers when the simulation has ended, because Ray may fail to start."""
    pull = grid.pull_messages

    def checked(message_ids: Iterable[str]) -> Iterable[Message]:
        if not thread.is_alive():
            raise grids.get()
        return pull(message_ids)

    grid.pull_messages = checked
    return grid


def server_app(serve: Callable[[Grid, dict[str, Any]], None]) -> ServerApp:
    """Return a ServerApp that passes its Grid and the run's settings to `serve`; it has its process to itself."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        started()
        give_back_at_once()
        serve(grid, dict(context.run_config))

    return app


def describe(
    roster: Roster,
    sites: Sequence[ClientId],
    told: dict[str, Any],
    seconds: float,
    came: Callable[[ClientId], None] | None = None,
) -> dict[ClientId, dict[str, Any]]:
    """Wait until all sites are connected, and return what each may tell the server: see `client.describe`.

    Raises:
        RoundError: if a site is not connected, or has not answered, within `seconds`, or cannot take part.
    """
    deadline = time.monotonic() + seconds
    descriptions: dict[ClientId, dict[str, Any]] = {}
    while True:
        strangers = roster.strangers()
        for node, reply in ask(roster.grid, list(strangers), "describe", told, seconds, roster.poll):
            if reply.has_error():
                continue
            metadata = reply.content.config_records.get("engine", {})
            sender = _who(roster, node, metadata)
            if reason := failed(reply):
                raise RoundError(f"{sender} cannot take part: {reason}")
            try:
                description = checked_description(metadata)
            except PayloadError as error:
                raise RoundError(
                    f"{sender} cannot take part: what it says of itself is not allowed: {error}"
                ) from error
            name = description["name"]
            if roster.enter(node, strangers[node], name) and name in sites:
                descriptions[name] = description
                if came is not None:
                    came(name)
        missing_sites = {site: roster.refused.get(site, "") for site in sites if site not in descriptions}
        if not missing_sites:
            roster.nodes()  # raises an error for two nodes of one name
            return {site: descriptions[site] for site in sorted(sites)}
        if time.monotonic() > deadline:
            names = ", ".join(f"{site} ({refusal})" if refusal else site for site, refusal in missing_sites.items())
            raise RoundError(f"not connected within {seconds:g} s: {names}; start their clients, then the server again")
        time.sleep(roster.poll)


def _who(roster: Roster, node: int, told: Mapping[str, Any]) -> str:
    """Return a name for a node in a message: the owner of its key, else the name that the node gives."""
    try:
        return f"site {roster.owners.get(node) or checked_name(told.get('name'))}"
    except PayloadError:
        return "a site"


def one_cohort(found: Mapping[ClientId, Mapping[str, Any]]) -> tuple[int, ...]:
    """Return the shape of an example, if the sites' descriptions (`describe`) let their small models learn together.

    Raises:
        ConfigError: naming two sites that do not go together, and the difference, or a site with an unknown
            architecture.
    """
    names = list(found)
    first_site, first_description = names[0], found[names[0]]
    for site in names[1:]:
        for key, hint in (("shape", "of one example"), ("task", "which is called like the data's file")):
            site_value, first_value = found[site][key], first_description[key]
            if site_value != first_value:
                raise ConfigError(
                    f"the sites {first_site} and {site} cannot learn together: the {key}, {hint}, is "
                    f"{_plain(first_value)} at {first_site} and {_plain(site_value)} at {site}"
                )
    for site in names:
        other_labels = {label for other_site in names if other_site != site for label in found[other_site]["labels"]}
        if other_labels and not other_labels & set(found[site]["labels"]):
            other_site = next(name for name in names if name != site)
            raise ConfigError(
                f"site {site} has no label in common with any other: {', '.join(found[site]['labels'])}, but "
                f"{', '.join(found[other_site]['labels'])} at {other_site}; call the classes alike"
            )
    for site, description in found.items():
        if description["architecture"] not in ARCHITECTURES:
            raise ConfigError(
                f"site {site} has the architecture {description['architecture']!r}, which the server does not know"
            )
    return tuple(int(side) for side in first_description["shape"])


def _plain(value: Any) -> str:
    return " x ".join(map(str, value)) or "that of a text" if isinstance(value, list) else str(value)
