"""`consilium export`, `consilium predict` and `consilium chat`."""

from typing import TYPE_CHECKING

from consilium.cli.parsing import parse
from consilium.escape import terminal

if TYPE_CHECKING:
    pass


def run_exported(command: str, args: list[str]) -> None:
    """consilium export | predict | chat"""
    from consilium.export import commands

    for line in parse(getattr(commands, command), args, f"consilium {command.lower()}").lines():
        print(terminal(line, keep="\t\n"), flush=True)  # no line of rich's: tabs stay, and nothing is wrapped


def export_command(args: list[str]) -> None:
    """consilium export"""
    run_exported("Export", args)


def predict_command(args: list[str]) -> None:
    """consilium predict"""
    run_exported("Predict", args)


def chat_command(args: list[str]) -> None:
    """consilium chat"""
    run_exported("Chat", args)
