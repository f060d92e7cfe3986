"""The commands `consilium certificates`, `consilium server` and `consilium client`: sites on machines of their own."""

import dataclasses
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consilium.addresses import Address, parse_address
from consilium.cli.parsing import number, read_command, split_options, whole_number
from consilium.cli.screen import finish, out, say
from consilium.errors import ConfigError
from consilium.escape import print_line
from consilium.logs import start

if TYPE_CHECKING:
    from consilium.experiment import Experiment


LOGGING = {"--log-level": "info", "--log-file": ""}
"""Options of the commands that run for days, with their defaults."""


def start_logging(options: dict[str, str]) -> None:
    """Log from --log-level on, on stdout and in --log-file if it is given."""
    start(options["--log-level"], Path(options["--log-file"]) if options["--log-file"] else None)


def certificates_command(args: list[str]) -> None:
    """consilium certificates DIR --sites A,B [--hosts NAME,ADDRESS]"""
    if not args or args[0].startswith("-"):
        out.print(certificates_command.__doc__, markup=False, highlight=False)
        raise SystemExit(0) if args[:1] in (["-h"], ["--help"]) else ConfigError("name a folder for the keys")
    options, other_args = split_options(args[1:], {"--sites": "", "--hosts": ""})
    if other_args:
        raise ConfigError(f"unknown argument {other_args[0]!r}; allowed are --sites and --hosts")
    try:
        from consilium.certificates import certificates
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is missing: pip install 'consilium[flower]'") from error
    folder, hosts = Path(args[0]), [host for host in re.split(r"[,;\s]+", options["--hosts"]) if host]
    crt = folder / "server/server.crt"
    old_certificate = crt.read_bytes() if crt.exists() else b""
    site_folders = certificates(folder, hosts, site_names(options["--sites"]))
    if old_certificate and crt.read_bytes() != old_certificate:
        say(
            f"the list of hosts is another: {crt} is new, and only {folder / 'server/ca.crt'} trusts it; send it "
            "to every site in place of its ca.crt (keys stay as they are)"
        )
    for site_folder in site_folders:
        print_line(out, f"{site_folder} is for that site alone: send it over a secure channel")
    print_line(out, f"{folder / 'server'} is for the server")


def server_command(args: list[str]) -> None:
    """consilium server RECIPE|FILE.json --sites A,B --certificates DIR [--algorithm NAME] [--address HOST:PORT]
    [--wait S] [--out DIR] [--insecure] [--log-level LEVEL] [--log-file FILE] [flags of the experiment]"""
    if any(arg.partition("=")[0] == "--one-shot" for arg in args):
        return collect_packages(args)
    option_defaults = {
        "--sites": "",
        "--certificates": "",
        "--address": "0.0.0.0:8000",
        "--wait": "600",
        "--out": "runs",
        **LOGGING,
    }
    insecure, args = split_insecure(args)
    command = read_command(
        args, "server", server_command.__doc__, {"--algorithm": "", **option_defaults}, ("--insecure",)
    )
    experiment, options = command.experiment, command.options
    start_logging(options)
    deployment = load_deployment()
    sites, wait = _server_sites(options), whole_number(options, "--wait", 1)
    keys = keys_folder(options, insecure, parse_address(options["--address"], "--address"), "server")
    folder = Path(options["--out"]) / experiment.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        deployment.server(experiment, folder, sites, options["--address"], keys, wait, out)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("; the same command goes on with the run") from None
    finish([folder])


def collect_packages(args: list[str]) -> None:
    """consilium server --one-shot HUB --sites A,B --certificates DIR [--address HOST:PORT] [--insecure]
    [--log-level LEVEL] [--log-file FILE]"""
    option_defaults = {"--one-shot": "", "--sites": "", "--certificates": "", "--address": "0.0.0.0:8000", **LOGGING}
    options, insecure = _one_shot_options(args, option_defaults)
    start_logging(options)
    sites = _server_sites(options)
    load_deployment()  # raises if a package is missing
    from consilium.oneshot.network import collect

    keys = keys_folder(options, insecure, parse_address(options["--address"], "--address"), "server")
    try:
        collect(Path(options["--one-shot"]), sites, options["--address"], keys, out)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("; the same command goes on collecting") from None


def _one_shot_options(args: list[str], option_defaults: dict[str, str]) -> tuple[dict[str, str], int]:
    """Return the options of a command with --one-shot, and how often --insecure was given."""
    options, other_args = split_options(args, option_defaults)
    insecure, other_args = split_insecure(other_args)
    if other_args:
        raise ConfigError(
            f"unknown argument {other_args[0]!r}; with --one-shot allowed are "
            f"{', '.join(option_defaults)} and --insecure"
        )
    return options, insecure


def _server_sites(options: dict[str, str]) -> list[str]:
    """Return the sites of a server, which needs at least one."""
    sites = site_names(options["--sites"])
    if not sites:
        raise ConfigError("--sites is empty; name the sites, e.g. --sites north,south")
    return sites


def offer_package(args: list[str]) -> None:
    """consilium client --one-shot FILE --name A --server HOST:PORT --certificates DIR [--state DIR] [--port N]
    [--insecure] [--log-level LEVEL] [--log-file FILE]"""
    option_defaults = {
        "--one-shot": "",
        "--name": "",
        "--server": "",
        "--certificates": "",
        "--state": "",
        "--port": "9094",
        **LOGGING,
    }
    options, insecure = _one_shot_options(args, option_defaults)
    start_logging(options)
    load_deployment()
    from consilium.oneshot.network import offer

    keys = keys_folder(options, insecure, parse_address(options["--server"], "--server"), None)
    state = Path(options["--state"] or f"offer-{options['--name']}")
    port = whole_number(options, "--port", 1)
    offer(Path(options["--one-shot"]), options["--name"], options["--server"], keys, state, port)


def client_command(args: list[str]) -> None:
    """consilium client RECIPE|FILE.json --name A --server HOST:PORT --certificates DIR [--state DIR] [--port N]
    [--insecure] [--max-lr X] [--max-epochs N] [--max-steps N] [--max-batch-size N] [--max-tokens N] [--max-seconds S]
    [--max-rounds N] [--max-bytes SIZE] [--max-memory SIZE] [--max-state SIZE] [--max-days N]
    [--log-level LEVEL] [--log-file FILE]
    [flags of the experiment: --data.*, --model.*, --memory, --device]"""
    if any(arg.partition("=")[0] == "--one-shot" for arg in args):
        return offer_package(args)
    option_defaults = {"--name": "", "--server": "", "--certificates": "", "--state": "", "--port": "9094", **LOGGING}
    deployment = load_deployment()
    limit_defaults = {
        f"--max-{field.replace('_', '-')}": value for field, value in dataclasses.asdict(deployment.Limits()).items()
    }
    option_defaults |= {flag: str(value) for flag, value in limit_defaults.items()}
    insecure, args = split_insecure(args)
    command = read_command(args, "client", client_command.__doc__, option_defaults, ("--insecure",))
    experiment, options = command.experiment, command.options
    start_logging(options)
    if not args[0].endswith(".json"):
        experiment = of_one_client(experiment, command.flags)
    keys = keys_folder(options, insecure, parse_address(options["--server"], "--server"), None)
    state = Path(options["--state"] or f"site-{options['--name']}")
    limits: dict[str, Any] = {}
    for flag, value in limit_defaults.items():
        limit = options[flag] if isinstance(value, str) else number(options, flag)
        limits[flag[6:].replace("-", "_")] = whole_number(options, flag, 1) if type(value) is int else limit
    port = whole_number(options, "--port", 1)
    deployment.client(
        experiment, options["--name"], options["--server"], keys, state, port, deployment.Limits(**limits)
    )


def of_one_client(experiment: "Experiment", given: Collection[str]) -> "Experiment":
    """Treat a site's data as that of one client, unless its flags say how to partition it."""
    data = experiment.data
    if "--data.clients" in given or not hasattr(data, "clients") or len(getattr(data, "tasks", ())) > 1:
        return experiment
    is_skewed = "--data.partition" not in given and getattr(data, "partition", "") in ("pathological", "dirichlet")
    data = dataclasses.replace(data, clients=1, **({"partition": "iid"} if is_skewed else {}))
    return dataclasses.replace(experiment, data=data)


def site_names(text: str) -> list[str]:
    """Return the sites named by --sites.

    Raises:
        ConfigError: if a name is not valid or occurs twice.
    """
    from consilium.core import CLIENT_ID

    names = [name.strip() for name in text.split(",")] if text else []
    for name in names:
        if not CLIENT_ID.fullmatch(name):
            raise ConfigError(f"--sites names {name!r}; give names of A-Z a-z 0-9 . _ - separated by commas")
    if len(set(names)) < len(names):
        raise ConfigError(f"--sites names a site twice: {text}")
    return names


def load_deployment() -> Any:
    try:
        from consilium import deployment
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is missing: pip install 'consilium[flower]'") from error
    return deployment


def split_insecure(args: list[str]) -> tuple[int, list[str]]:
    """Return how often --insecure was given, and the other arguments."""
    return args.count("--insecure"), [arg for arg in args if arg != "--insecure"]


def keys_folder(options: dict[str, str], insecure: int, address: Address, part: str | None) -> Path | None:
    """Return the folder of keys, or None if plain text was requested.

    Plain text needs --insecure once on loopback, and twice elsewhere.
    """
    if not insecure:
        if not options["--certificates"]:
            raise ConfigError("--certificates is missing: name the folder that `consilium certificates` made")
        return Path(options["--certificates"]) / part if part else Path(options["--certificates"])
    if insecure < 2 and not address.is_loopback:
        raise ConfigError(
            f"{address.host} is not this machine: --insecure would send models in plain text and let anybody take "
            "part; use --certificates, or say --insecure twice"
        )
    return None
