"""Completion of commands, recipes and flags in a shell: `consilium completion bash` prints a script for the shell."""

from collections.abc import Sequence

from consilium.cli.catalogue import flags_of_recipe, read_catalogue
from consilium.cli.parsing import OWN
from consilium.errors import ConfigError

__all__ = ["complete_command", "completion_command", "suggestions"]

SCRIPT = """_consilium() {
    local IFS=$'\\n'
    COMPREPLY=($(consilium complete -- "${COMP_WORDS[@]:1:$COMP_CWORD}" 2>/dev/null))
}
complete -o bashdefault -o default -F _consilium consilium
"""
SHELLS = {"bash": SCRIPT, "zsh": f"autoload -U +X bashcompinit && bashcompinit\n{SCRIPT}"}
WITH_RECIPE = ("run", "compare", "plan", "server", "client")


def completion_command(args: list[str]) -> None:
    """consilium completion bash|zsh"""
    if args in (["-h"], ["--help"]):
        print(f'{completion_command.__doc__}\n\nadd to ~/.bashrc: eval "$(consilium completion bash)"')
        return
    if len(args) != 1 or args[0] not in SHELLS:
        raise ConfigError(f"completion is for {' and '.join(SHELLS)}, not {' '.join(args) or 'nothing'!r}")
    print(SHELLS[args[0]], end="")


def complete_command(args: list[str]) -> None:
    """consilium complete -- WORD ... [the word that is being written]"""
    from consilium.cli.app import COMMANDS

    words = args[1:] if args[:1] == ["--"] else args
    print(*suggestions(words, [name for name in COMMANDS if name != "complete"]), sep="\n")


def suggestions(words: Sequence[str], commands: Sequence[str]) -> list[str]:
    """Return the words that can replace the last word.

    Args:
        words: words after `consilium`; the last one is being written, and may be empty.
    """
    prefix, earlier_words = (words[-1] if words else ""), list(words[:-1])
    if not earlier_words:
        candidates: Sequence[str] = commands
    elif earlier_words[0] not in WITH_RECIPE:
        candidates = []
    elif len(earlier_words) == 1:
        candidates = list(read_catalogue()["recipes"])
    elif earlier_words[-1] in ("--algorithm", "--algorithms"):
        candidates = list(read_catalogue()["algorithms"])
    else:
        candidates = (
            [*OWN, *(flag.name for flag in flags_of_recipe(earlier_words[1]) or [])] if prefix.startswith("-") else []
        )
    return sorted(word for word in candidates if word.startswith(prefix))
