"""Commands of a deployment: the server's command and a site's command. Their keys are in `consilium.certificates`.

    server         Flower's SuperLink, which only knows the sites' keys, with one run in it: ours
    client         Flower's SuperNode at a site, pointing at the site's settings
    server_app     the ServerApp that the SuperLink starts: the rounds, in a run directory that a restart resumes

Flower provides transport, TLS, authentication and heartbeats. Its programs keep their own settings in a folder next to
the run (FLWR_HOME), install nothing, and end with the command that started them.
"""

import contextlib
import functools
import http.client
import json
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from consilium.addresses import Address, parse_address
from consilium.certificates import certified, check_key, owners
from consilium.core import CLIENT_ID
from consilium.engine import again
from consilium.engine.checkpoint import write_atomic
from consilium.engine.flower import Limits, save_site
from consilium.engine.flower import server_app as flower_app
from consilium.engine.interrupt import end_with_parent
from consilium.engine.starting import write_program
from consilium.errors import ConfigError, ConsiliumError, RoundError, first_line
from consilium.escape import print_line
from consilium.experiment import Experiment, from_json, to_json
from consilium.inside import open_here
from consilium.logs import flower_level, start_from_environment
from consilium.loop import check_same, serve
from consilium.rundir import RunDirectory

__all__ = [
    "App",
    "Limits",
    "become_node",
    "check_keys",
    "child",
    "client",
    "flower_environment",
    "in_time",
    "keep_serving",
    "listening",
    "program",
    "server",
    "server_app",
    "stop_serving",
]

log = logging.getLogger(__name__)

RESTARTS = 5
"""Maximum number of restarts of Flower's processes in a row without a completed round in between."""
PAUSE = 5.0
"""Seconds of pause before a restart, times the number of attempts in a row that made no progress."""
CLOCKS = 290.0
"""Largest allowed clock difference between a site and its server, in seconds; Flower's authentication allows 300."""
SETTINGS = "site.json"
"""File name of the site's settings, in its state folder."""
STOPPED = "stopped"
"""File in Flower's folder with the reason why the run ended by itself; it prevents a restart."""

WITH_PARENT = functools.partial(end_with_parent, signal.SIGTERM)

# --- the server -----------------------------------------------------------------------------------------------------


def server(
    experiment: Experiment,
    folder: Path,
    sites: Sequence[str],
    address: str,
    keys: Path | None,
    wait: float,
    out: Console,
) -> None:
    """Run an experiment over sites, or resume it, with a SuperLink that ends with this call.

    If one of Flower's processes ends before the run does, all of them are restarted and the run goes on (`RESTARTS`).

    Args:
        folder: the run directory; Flower's own files are in `<name>.flower` next to it.
        sites: names of the sites that take part.
        address: host:port to listen on.
        keys: the folder "server" of `certificates`; None: without TLS and without authentication.
        wait: seconds until all sites must be connected.

    Raises:
        ConfigError: for a site without a key, or a port in use.
        RoundError: if the run did not finish.
    """
    listen = parse_address(address, "--address")
    keys = keys and keys.absolute()
    check_keys(keys, sites, listen)
    if (folder / "config.json").exists() and check_same(folder, experiment)["status"] == "finished":
        print_line(out, f"{folder} is finished")
        return
    config = {"experiment": json.dumps(to_json(experiment)), "folder": str(folder.absolute()), "wait": wait}

    def finished() -> bool:
        return (folder / "config.json").exists() and RunDirectory(folder).config()["status"] == "finished"

    app = App("consilium.deployment:server_app", config, _home(folder), finished, lambda: _reached(folder))
    keep_serving(app, sites, listen, keys)


@dataclass(frozen=True)
class App:
    """A ServerApp that Flower's SuperLink restarts until its work is done.

    Args:
        name: "module:object".
        config: the app's configuration; sites and keys are added to it.
        home: folder for Flower's own files.
        finished: returns whether the work is done.
        reached: returns a text that changes whenever the work has made progress.
    """

    name: str
    config: Mapping[str, str | float]
    home: Path
    finished: Callable[[], bool]
    reached: Callable[[], str]


def check_keys(keys: Path | None, sites: Sequence[str], listen: Address) -> None:
    """Raise ConfigError unless every site has a key and the certificate covers this address.

    Nothing is checked if `keys` is None.
    """
    if keys:
        owners(keys, sites)
        _check_certificate(keys, listen)


def keep_serving(app: App, sites: Sequence[str], listen: Address, keys: Path | None) -> None:
    """Run a ServerApp in a SuperLink until its work is done.

    If one of Flower's processes ends before that, all of them are restarted (`RESTARTS`).

    Raises:
        RoundError: if the work is not done after the last restart.
    """
    home = app.home
    _write_app(home / "app", app, {**app.config, "sites": ",".join(sites), "keys": str(keys or "")})
    environment = _in_turn(home, "flwr-serverapp", flower_environment(home))
    if keys:
        _register(keys, sites, home, environment)
    (home / STOPPED).unlink(missing_ok=True)
    restarts_left, progress = RESTARTS, app.reached()
    while True:
        with _superlink(listen, keys, home, environment) as superlink:
            log.info("listening on %s; waiting for %s", listen, ", ".join(sites))
            process = subprocess.Popen(
                [program("flwr"), "run", str(home / "app"), "run", "--stream"], env=environment, preexec_fn=WITH_PARENT
            )
            try:
                while process.poll() is None and superlink.poll() is None:
                    time.sleep(0.5)
            finally:
                process.kill()
                process.wait()
        if app.finished():
            return
        previous_progress, progress = progress, app.reached()
        restarts_left = restarts_left - 1 if progress == previous_progress else RESTARTS
        if (home / STOPPED).exists() or restarts_left < 0:
            break
        log.warning("one of Flower's processes has ended, see %s; starting them again", home / "superlink.log")
        time.sleep(PAUSE * (RESTARTS - restarts_left))
    raise RoundError("the work has not finished, see above; the same command goes on with it")


def _check_certificate(keys: Path, listen: Address) -> None:
    """Raise ConfigError if the certificate does not cover the address that Flower's own processes connect to."""
    host, hosts = listen.from_here.host, certified(keys)
    if host not in hosts and f"*.{host.partition('.')[2]}" not in hosts:
        raise ConfigError(
            f"--address is {listen}, but the certificate in {keys} is for {', '.join(hosts)}: make it again with "
            f"`consilium certificates` and --hosts {host},..., or listen on 0.0.0.0"
        )


def _reached(folder: Path) -> str:
    """Return the name of the newest checkpoint of a run, or "" if there is none."""
    return max((path.name for path in folder.glob("checkpoints/round-*")), default="")


def _write_app(folder: Path, app: App, config: Mapping[str, str | float]) -> None:
    """Write a Flower app without any code of its own: it names two objects of the installed package."""
    lines = [
        "[project]",
        'name = "consilium-run"',
        'version = "1.0.0"',
        'description = "Rounds of a Consilium federation"',
        'license = "Apache-2.0"',
        "dependencies = []",
        "[tool.flwr.app]",
        'publisher = "consilium"',
        "[tool.flwr.app.components]",
        f"serverapp = {json.dumps(app.name)}",
        'clientapp = "consilium.engine.flower:client_app"',
        "[tool.flwr.app.config]",
        *(f"{key} = {json.dumps(value)}" for key, value in config.items()),
    ]
    write_atomic(folder / "pyproject.toml", ("\n".join(lines) + "\n").encode())


def _serve(grid: Any, config: Mapping[str, Any]) -> None:
    """Run the rounds, in the process that the SuperLink starts."""
    from consilium.watch import Terminal

    folder = Path(config["folder"])
    start_from_environment()
    with Terminal(Console()) as watch:
        try:
            experiment, sites = from_json(json.loads(config["experiment"])), config["sites"].split(",")
            keys = owners(Path(config["keys"]), sites) if config["keys"] else {}
            connected_sites: list[str] = []

            def came(site: str) -> None:
                connected_sites.append(site)
                log.info("%s is connected, %d of %d", site, len(connected_sites), len(sites))

            serve(experiment, folder, grid, sites, float(config["wait"]), watch, keys, came)
        except Exception as error:
            stop_serving(_home(folder), error)
            raise


def stop_serving(home: Path, error: Exception) -> None:
    """Record, from a ServerApp's process, that its work has ended by itself, so that it is not restarted."""
    write_atomic(home / STOPPED, repr(error).encode())
    if isinstance(error, ConsiliumError):
        log.error("%s", error)


def _home(folder: Path) -> Path:
    """Return the folder of Flower's own files, next to a run directory."""
    return (folder.parent / f"{folder.name}.flower").absolute()


server_app = flower_app(_serve)


@contextlib.contextmanager
def _superlink(
    listen: Address, keys: Path | None, home: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen]:
    """Run Flower's SuperLink, listening, with a configuration that points Flower's commands at it."""
    tls_settings = {"root-certificates": str(keys / "ca.crt")} if keys else {"insecure": True}
    lines = ["[superlink]", 'default = "run"', "[superlink.run]"]
    lines += [
        f"{key} = {json.dumps(value)}" for key, value in {"address": str(listen.from_here), **tls_settings}.items()
    ]
    write_atomic(home / "config.toml", ("\n".join(lines) + "\n").encode())
    command = [
        "flower-superlink",
        "--host",
        listen.host,
        "--port",
        str(listen.port),
        "--database",
        str(home / "state.db"),
    ]
    command += ["--disable-runtime-dependency-installation"]
    if keys:
        files = {"ca-certfile": "ca.crt", "certfile": "server.crt", "keyfile": "server.key"}
        command += [part for flag, name in files.items() for part in (f"--ssl-{flag}", str(keys / name))]
        command += ["--enable-supernode-auth"]
    else:
        command += ["--insecure"]
    with child(command, environment, home / "superlink.log") as superlink:
        listening(superlink, listen, home / "superlink.log")
        yield superlink


def _register(keys: Path, sites: Sequence[str], home: Path, environment: Mapping[str, str]) -> None:
    """Register the sites' keys in the SuperLink's database, before any site can reach it.

    A site whose key is unknown would be turned away for good. The database persists across restarts.
    """
    path = home / "registered.json"
    registered_keys = json.loads(path.read_text()) if path.exists() else {}
    new_keys = {site: key for site in sites if registered_keys.get(site) != (key := (keys / f"{site}.pub").read_text())}
    if not new_keys:
        return
    with socket.socket() as probe_socket:
        probe_socket.bind(("127.0.0.1", 0))
        port = probe_socket.getsockname()[1]
    with _superlink(Address("127.0.0.1", port), keys, home, environment):
        for site in new_keys:
            command = [program("flwr"), "supernode", "register", str(keys / f"{site}.pub"), "run", "--name", site]
            result = subprocess.run(command, env=environment, capture_output=True, text=True, preexec_fn=WITH_PARENT)
            output = result.stdout + result.stderr
            if result.returncode and "already in use" not in output:
                raise RoundError(f"site {site} could not be registered: {' '.join(output.split())[-300:]}")
    write_atomic(path, json.dumps({**registered_keys, **new_keys}).encode())


def listening(link: subprocess.Popen, listen: Address, log: Path) -> None:
    """Wait until a SuperLink accepts connections on its address.

    Raises:
        ConfigError: if it ends before that.
        RoundError: if it does not listen in time.
    """
    address = listen.from_here
    for _ in range(3600):
        if link.poll() is not None:
            line = (log.read_text().strip().splitlines() or ["no output"])[-1]
            raise ConfigError(
                f"Flower's SuperLink did not start ({line}), see {log}; is {listen} in use, or not of this machine?"
            )
        with contextlib.suppress(OSError), socket.create_connection((address.host, address.port), timeout=1):
            return
        time.sleep(0.1)
    raise RoundError(f"Flower's SuperLink does not listen on {listen}, see {log}")


# --- a site ---------------------------------------------------------------------------------------------------------


def client(
    experiment: Experiment, name: str, address: str, keys: Path | None, state: Path, port: int, limits: Limits
) -> NoReturn:
    """Replace this process by one that keeps Flower's SuperNode for this site running until it is ended.

    Args:
        experiment: the data, the model, the first memory, the device and the threads in it are the site's own.
        name: the site's name at the server.
        address: the server's host:port.
        keys: the site's folder of `certificates`; None: without TLS and without authentication.
        state: folder for the methods' state at the site, and for Flower's own files.
        port: port on which Flower's processes on this machine talk to each other, on 127.0.0.1 alone.
        limits: the most that the server may ask of the site.

    Raises:
        ConsiliumError: before anything is started, if the data cannot be used, or if the server can be reached and this
            machine's clock does not match its clock.
    """
    if not CLIENT_ID.fullmatch(name):
        raise ConfigError(f"--name is {name!r}; use 1 to 64 of A-Z a-z 0-9 . _ - and no leading dot")
    if keys:
        check_key(keys, name)
    save_site(state.absolute() / SETTINGS, name, experiment, limits)
    become_node(name, address, keys, state, port)


def become_node(name: str, address: str, keys: Path | None, state: Path, port: int) -> NoReturn:
    """Replace this process by a SuperNode for the site whose settings are in its state folder, see `client`."""
    address, settings = str(parse_address(address, "--server")), state.absolute() / SETTINGS
    command = [program("flower-supernode"), "--superlink", address, "--node-config", f'site="{settings}"']
    command += ["--host", "127.0.0.1", "--port", str(port)]
    if keys:
        in_time(address, keys / "ca.crt")
        command += ["--root-certificates", str(keys / "ca.crt"), "--auth-supernode-private-key", str(keys / "key")]
    else:
        command += ["--insecure"]
    home, command = state.absolute() / "flower", again.command(command)
    environment = {"FLWR_LOG_LEVEL": flower_level(), **_in_turn(home, "flwr-clientapp", flower_environment(home))}
    log.info("%s: waiting for the server at %s; Ctrl-C ends this", name, address)
    os.execve(command[0], command, environment)


def in_time(address: str, ca: Path) -> None:
    """Compare this machine's clock with the server's, because Flower's authentication does so too.

    Nothing is checked if the server cannot be reached yet.

    Raises:
        ConfigError: if the clocks are too far apart, or the server's certificate is not valid here and now.
    """
    server = parse_address(address)
    try:
        context = ssl.create_default_context(cafile=ca)
    except ssl.SSLError as error:
        raise ConfigError(f"{ca} cannot be read as a certificate: {first_line(error)}") from error
    connection = http.client.HTTPSConnection(server.host, server.port, timeout=5, context=context)
    try:
        connection.request("HEAD", "/")
        date_header = connection.getresponse().getheader("Date")
        gap = time.time() - parsedate_to_datetime(date_header).timestamp()
    except ssl.SSLCertVerificationError as error:
        now = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
        raise ConfigError(
            f"the certificate of {address} is refused ({error.verify_message}): {ca} is another server's, the "
            f"certificate is not for that name, or the clock of this machine, {now}, is wrong"
        ) from error
    except (OSError, http.client.HTTPException, TypeError, ValueError):
        return
    finally:
        connection.close()
    if abs(gap) > CLOCKS:
        side = "ahead of" if gap > 0 else "behind"
        raise ConfigError(
            f"the clock of this machine is {abs(gap):.0f} s {side} that of {address}; Flower's authentication allows "
            "300: set both, e.g. by NTP"
        )


# --- processes ------------------------------------------------------------------------------------------------------


def program(name: str) -> str:
    """Return the path of one of Flower's programs, which are installed next to this Python.

    Raises:
        ConfigError: if it is missing.
    """
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise ConfigError(f"{path} is missing: pip install 'consilium[flower]'")
    return str(path)


def flower_environment(home: Path) -> dict[str, str]:
    """Return the environment for one of Flower's programs.

    Its files are in `home`, it installs nothing, it sends no telemetry, and this Python comes first in PATH.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    overrides = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "TOKENIZERS_PARALLELISM": "false"}
    overrides["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"
    home.mkdir(parents=True, exist_ok=True)
    return {**os.environ, **overrides, "PATH": path, "FLWR_HOME": str(home.absolute())}


def _in_turn(home: Path, name: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which one of Flower's programs is started through `engine.starting`."""
    write_program(home / "bin", name, program(name))
    return {**environment, "PATH": f"{home / 'bin'}{os.pathsep}{environment['PATH']}"}


@contextlib.contextmanager
def child(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen]:
    """Run one of Flower's programs with its output in a file; on exit, terminate it, and kill it after 20 seconds."""
    with open_here(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, "ab") as file:
        process = subprocess.Popen(
            [program(command[0]), *command[1:]],
            env=environment, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, preexec_fn=WITH_PARENT,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
