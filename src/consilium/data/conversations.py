"""Converters from the published formats of conversations to Consilium's own: lists of {"role", "content"}.

OpenAI      {"role", "content"}; roles system, developer, user, assistant, tool; content a text or a list of parts
ShareGPT    {"from", "value"}; from human, gpt, system, ...
choices     a list of texts, or ARC's {"label": [...], "text": [...]}; the answer by its letter, place or text
SQuAD       answers as {"text": [...], "answer_start": [...]}
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from consilium.errors import DataError

__all__ = ["answer_of", "chosen", "conversation"]

_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "User", "Human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "bard", "Assistant"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response"), "tool"),
}
_ALLOWED = "system, developer, user (human), assistant (gpt), tool"


def conversation(value: Any, where: str) -> tuple[list[dict[str, Any]], int]:
    """Return the turns of one row, and the number of empty messages that were left out.

    Args:
        value: a list of turns, or such a list written in JSON.
        where: name of the row for error messages.

    Raises:
        DataError: if the value is not a list of turns, a role is unknown, or a part is not a text.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{where} is no JSON: {error}") from error
    if isinstance(value, Mapping) and isinstance(value.get("messages"), list):
        value = value["messages"]
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        raise DataError(f"{where} holds a {type(value).__name__}; it must be a list of {{role, content}}")
    turns, empty_count = [], 0
    for number, turn in enumerate(value):
        turn = {key: v for key, v in turn.items() if v is not None}
        if "role" not in turn and "from" in turn:
            turn = {"role": turn.pop("from"), "content": turn.pop("value", ""), **turn}
        role = turn.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise DataError(f"{where} turn {number} has role {role!r}; allowed are {_ALLOWED}")
        content = _content(turn.get("content", ""), f"{where} turn {number}")
        turn |= {"role": _ROLES[role], "content": content}
        if content.strip() or turn.get("tool_calls") or turn.get("function_call"):
            turns.append(turn)
        else:
            empty_count += 1
    return turns, empty_count


def _content(value: Any, where: str) -> str:
    """Return the text of a message; the texts of a list of parts are concatenated."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise DataError(f"{where} holds a {type(value).__name__} where its text should be")
    texts = []
    for part in value:
        part = {"text": part} if isinstance(part, str) else part
        text = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            kind = part.get("type", type(part).__name__) if isinstance(part, Mapping) else type(part).__name__
            raise DataError(f"{where} has a part of type {kind!r}; only texts are read")
        texts.append(text)
    return "".join(texts)


def chosen(value: Any, where: str) -> list[tuple[str, str]]:
    """Return the choices of a question as (letter, text).

    Raises:
        DataError: if the value is not a list of texts.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{where} holds a text that is no JSON list of choices") from error
    letters: Sequence[Any] = [chr(65 + i) for i in range(26)]
    if isinstance(value, Mapping):
        letters, value = value.get("label", letters), value.get("text")
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise DataError(f"{where} holds no list of choices; write a list of texts, or {{label, text}}")
    return [(str(letter), text) for letter, text in zip(letters, value, strict=False)]


def answer_of(value: Any, choices: Sequence[tuple[str, str]], where: str) -> str | None:
    """Return the text of an answer, or None if there is none.

    For a choice, the text is its letter and its text. For SQuAD's list of answers, it is the first.

    Raises:
        DataError: if the answer is none of the choices, or is nested in another way.
    """
    if isinstance(value, Mapping):
        value = value.get("text")
    if isinstance(value, list):
        value = value[0] if value else None
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, str):
        raise DataError(f"{where} holds a {type(value).__name__}; text, numbers and booleans are read")
    if not choices:
        return value
    for index, (letter, text) in enumerate(choices):
        if value in (letter, text) or (value == str(index) and value not in dict(choices)):
            return f"{letter}. {text}"
    raise DataError(f"{where} is {value!r}, which is none of the choices {', '.join(letter for letter, _ in choices)}")
