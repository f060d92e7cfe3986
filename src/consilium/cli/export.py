"""The commands `consilium export`, `consilium predict` and `consilium chat`."""

from consilium.cli.parsing import parse
from consilium.escape import terminal


def run_exported(command: str, args: list[str]) -> None:
    """Parse the arguments of a command, run it, and print its lines.

    Args:
        command: "Export", "Predict" or "Chat".
    """
    from consilium.export import commands

    for line in parse(getattr(commands, command), args, f"consilium {command.lower()}").lines():
        print(terminal(line, keep="\t\n"), flush=True)  # unlike rich, print keeps tabs and wraps nothing


def export_command(args: list[str]) -> None:
    """consilium export"""
    run_exported("Export", args)


def predict_command(args: list[str]) -> None:
    """consilium predict"""
    run_exported("Predict", args)


def chat_command(args: list[str]) -> None:
    """consilium chat"""
    run_exported("Chat", args)
