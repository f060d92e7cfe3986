"""The entry point of the command line: `main` dispatches to the commands.

Flags and their help come from the dataclasses, through tyro. An error is one line, and the exit code is then 2. A
command is imported only when it is called: torch and transformers take seconds, which help and mistyped commands should
not.
"""

import importlib
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from consilium.cli.screen import out, say
from consilium.constraints import nearest
from consilium.errors import ConfigError, ConsiliumError
from consilium.logs import to_screen
from consilium.plugins import add_file, import_plugins

__all__ = ["main", "take_imports"]

HELP = """[bold]consilium[/bold]: federated fine-tuning of mixture-of-experts models

  consilium run RECIPE|FILE.json \\[flags]   run an experiment; FILE.json is a saved one (a run's config.json)
  consilium compare RECIPE \\[flags]          run several methods on the same data and weights, and compare them
  consilium resume RUN                       continue an interrupted run, to the same bits
  consilium report RUN \\[RUN ...]             write report.html for one run, or one that compares several
  consilium list                             recipes, algorithms, shipped models
  consilium inspect MODEL \\[--memory 12GiB]  layers, experts and bytes of a model, and what fits a device

  consilium plan RECIPE|FILE.json \\[flags]  memory, bytes, steps and time of every client, before a run

  consilium upcycle MODEL --out DIR          a dense model as a mixture of experts: copies of its feed-forward networks
  consilium data PATH                        columns, labels and split of a file or of images, and the command to run
  consilium export RUN --client A --out DIR  a client's model for plain transformers; at a site: of its --state folder
  consilium predict DIR --text "..."         labels or texts of an exported model; --image, --table
  consilium chat DIR                         talk to an exported language model

  consilium expert train RECIPE --name A     a site's part of a federation of one exchange, as one signed file
  consilium hub init|add|withdraw|build HUB  put such parts together as one model, and take them out again

  consilium certificates DIR --sites A,B     keys for a server and its sites, on machines of their own
  consilium server RECIPE --sites A,B        run an experiment over sites, or go on with it
  consilium client RECIPE --name A           take part as a site, with its own data
  consilium server|client --one-shot ...     packages of sites over the network, into a hub, as sites come

  consilium completion bash|zsh              completion of commands, recipes and flags in a shell

  consilium COMMAND --help                   the flags of a command; with a recipe, those of its experiment
  consilium COMMAND --import FILE.py         methods or recipes of your own; --algorithm FILE.py:MyMethod
"""

COMMANDS = {
    "run": "run:run_command",
    "compare": "compare:compare_command",
    "resume": "run:resume_command",
    "report": "report:report_command",
    "list": "report:list_command",
    "inspect": "model:inspect_command",
    "plan": "model:plan_command",
    "upcycle": "model:upcycle_command",
    "data": "data:data_command",
    "export": "export:export_command",
    "predict": "export:predict_command",
    "chat": "export:chat_command",
    "expert": "oneshot:expert_command",
    "hub": "oneshot:hub_command",
    "certificates": "sites:certificates_command",
    "server": "sites:server_command",
    "client": "sites:client_command",
    "completion": "completion:completion_command",
    "complete": "completion:complete_command",
}
"""Command -> module and function; the function takes the arguments after the command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code.

    The exit code is 0 if the command is done, 2 for a user error, 130 if interrupted, and 141 if the reader of stdout
    closed the pipe.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if argv is None:  # in a process of its own, SIGTERM from `kill` or a job queue acts like Ctrl-C
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not args or args[0] in ("-h", "--help", "help"):
        out.print(HELP, highlight=False, soft_wrap=True)
        return 0
    if args[0] in ("--version", "-V", "version"):
        from importlib.metadata import version

        print(f"consilium {version('consilium')}")
        return 0
    try:
        args = take_imports(args)
        if args[0] not in COMMANDS:
            hint = nearest(args[0], COMMANDS, "; ")
            raise ConfigError(f"unknown command {args[0]!r}; allowed are {', '.join(COMMANDS)}{hint}")
        with to_screen(say), warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: say(f"warning: {message}")
            module, _, function = COMMANDS[args[0]].partition(":")
            getattr(importlib.import_module(f"consilium.cli.{module}"), function)(args[1:])
    except BrokenPipeError:  # the reader, e.g. `| head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ConsiliumError, OSError) as error:
        say(str(error))
        return 2
    except KeyboardInterrupt as stop:
        say(f"interrupted{stop}")
        return 130
    return 0


def take_imports(args: Sequence[str]) -> list[str]:
    """Take --import FILE.py out of the arguments, and the file out of --algorithm FILE.py:CLASS.

    Both are imported later, or at once if `consilium.experiment` is already imported.
    """
    other_args, remaining = [], list(args)
    while remaining:
        arg = remaining.pop(0)
        name, _, value = arg.partition("=")
        if name not in ("--import", "--algorithm"):
            other_args.append(arg)
            continue
        if not value and not remaining:
            raise ConfigError(f"{name} needs a value")
        value = value or remaining.pop(0)
        file, colon, method = value.rpartition(":")
        if name == "--import" or (colon and file.endswith(".py")):
            add_file(Path(file if colon and file.endswith(".py") else value))
        if name == "--algorithm":
            other_args += [name, method if file.endswith(".py") else value]
    if "consilium.experiment" in sys.modules:  # it imports plugins as it is loaded, which is over by now
        import_plugins()
    return other_args
