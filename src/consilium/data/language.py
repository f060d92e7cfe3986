"""Data for causal language models that lies in a file: prompts and responses, conversations, or plain text.

The formats and the rules are those of `textfile`: columns are named by the user, rows are dealt by a client column or
by a partition, what cannot be used is refused with column and row. How conversations become tokens, and what the loss
is on, is in `causal`.
"""

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from consilium.data.sets import digest, located
from consilium.data.task import TASK_NAME, ClientData, Federation, Form, Split, Task
from consilium.data.textfile import by_client, cut, read_rows, strings
from consilium.errors import ConfigError, DataError

__all__ = ["LanguageData"]

_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class LanguageData:
    """Clients whose data is instructions with responses, conversations, or plain text, in one file.

    Args:
        path: a .csv, .tsv, .jsonl, .ndjson or .parquet file; or a directory of `datasets`, or owner/name on the hub,
            whose splits are joined, and dealt anew.
        prompt: column of what is asked.
        response: column of what is to be answered.
        context: column of a text that the prompt is about, put before it; may be empty in a row. "": none.
        system: column of the system message; may be empty in a row. "": none.
        messages: instead of prompt and response, a column of conversations: lists of {role, content}, or such lists
            written in JSON; roles are system, user, assistant, tool.
        text: instead of both, a column of plain text; needs fit.rows blocks, documents or packed.
        turns: of a conversation, "all" answers of the assistant, each an example with all that was said before, or
            the "last".
        task: name of the task; also the beginning of the clients' ids when there is no client column.
        client: column that says which client a row belongs to; "" deals the rows by `partition`.
        metric: "token_accuracy" (how many tokens of the answer rank first after the true ones before them; perplexity
            is recorded beside it), or the score of generated answers, "token_f1" or "rouge2".
        partition: "iid"; "dirichlet" (skewed by `alpha`) or "pathological" (`kinds_per_client` kinds each) over the
            values of the column `kind`; used when `client` is "".
        kind: column of what the rows are about, for those two partitions.
        clients: number of clients when `client` is "".
        validation: share of a client's rows; what neither validates nor tests is for training. Each split gets at least
            one row.
        test: share of a client's rows, likewise.
    """

    form: ClassVar[Form] = "text-to-text"  # of the model

    path: Path
    prompt: str = ""
    response: str = ""
    context: str = ""
    system: str = ""
    messages: str = ""
    text: str = ""
    turns: Literal["all", "last"] = "all"
    task: str = "answer"
    client: str = ""
    metric: Literal["token_accuracy", "token_f1", "rouge2"] = "token_accuracy"
    partition: Literal["iid", "dirichlet", "pathological"] = "iid"
    kind: str = ""
    clients: int = 10
    alpha: float = 0.3
    kinds_per_client: int = 2
    validation: float = 0.1
    test: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", located(self.path))
        self._check_columns()
        for name, allowed in (
            ("turns", ("all", "last")),
            ("metric", ("token_accuracy", "token_f1", "rouge2")),
            ("partition", ("iid", "dirichlet", "pathological")),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"data.{name} is {getattr(self, name)!r}; allowed are {', '.join(allowed)}")
        if self.text and self.metric != "token_accuracy":
            raise ConfigError(f"metric {self.metric!r} scores answers; plain text has none: use token_accuracy")
        if self.partition != "iid" and not self.client and not self.kind:
            raise ConfigError(f"partition {self.partition!r} needs --data.kind, a column of what the rows are about")
        if not (0 < self.validation < 1 and 0 < self.test < 1 and self.validation + self.test < 1):
            raise ConfigError(
                f"validation {self.validation} and test {self.test} must be above 0 and together below 1, as shares"
            )
        for name, least in (("clients", 1), ("kinds_per_client", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not self.alpha > 0 or math.isinf(self.alpha):
            raise ConfigError(f"alpha is {self.alpha}; it must be a positive number")
        if not TASK_NAME.fullmatch(self.task):
            raise ConfigError(f"task {self.task!r}: use 1 to 58 of letters, digits, '_', '-'")

    @property
    def plain(self) -> bool:
        """Whether the data is plain text, without prompts."""
        return bool(self.text)

    def _check_columns(self) -> None:
        given = [
            name for name in ("prompt", "response", "context", "system", "messages", "text") if getattr(self, name)
        ]
        for name in ("messages", "text"):
            if name in given and len(given) > 1:
                others = ", ".join(f"data.{other}" for other in given if other != name)
                raise ConfigError(f"data.{name} stands alone; leave {others} empty")
        if given and not {"messages", "text"} & set(given) and not (self.prompt and self.response):
            missing = "prompt" if not self.prompt else "response"
            raise ConfigError(f"data.{missing} is empty; name the columns of both, the prompt and the response")

    def load(self, seed: int) -> Federation:
        """Read, check and deal the rows; equal for equal files and seeds.

        Raises DataError when the file, a column or a value cannot be used, or no client has enough rows, and
        ConfigError when no column was named.
        """
        named = [c for c in (*self._columns(), self.client, self.kind) if c]
        rows = read_rows(self.path, named)
        if not self._columns():
            raise ConfigError(
                "name the columns: --data.prompt and --data.response, or --data.messages, or --data.text; "
                f"{self.path.name} has {' | '.join(rows.column_names)}"
            )
        examples = self._examples(rows)
        keys = [of_row[0][2] for of_row in examples]
        held = self._divide(rows, seed)
        clients, skipped = {}, {}
        for name, mine in held.items():
            parts = cut(mine, keys, self.validation, self.test, random.Random(f"{seed}:{name}"))
            if all(parts):
                task = Task(self.task, "language", (), self.metric)
                clients[name] = ClientData(task, *(_split(part, examples) for part in parts))
            else:
                skipped[name] = f"{len(mine)} usable row(s), too few for training, validation and test"
        if not clients:
            reasons = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:3])
            raise DataError(f"{self.path} has {len(rows)} rows, but no client has enough of them ({reasons})")
        return Federation(clients, skipped, self.source(len(rows)))

    def source(self, rows: int) -> dict[str, Any]:
        """What a run was read from: the file with its sha256, the columns, and the number of rows."""
        names = ("prompt", "response", "context", "system", "messages", "text", "client", "kind", "partition")
        chosen = {name: getattr(self, name) for name in names}
        return {"type": "LanguageData", "path": str(self.path), "sha256": digest(self.path), "rows": rows, **chosen}

    def _columns(self) -> list[str]:
        return [c for c in (self.prompt, self.response, self.context, self.system, self.messages, self.text) if c]

    def _divide(self, rows: Any, seed: int) -> dict[str, list[int]]:
        from consilium.data.partition import divide

        if self.client:
            return by_client(strings(self.path, self.client, rows[self.client][:]), f"column {self.client!r}")
        kinds = strings(self.path, self.kind, rows[self.kind][:]) if self.kind else [""] * len(rows)
        parts = divide(kinds, self.clients, self.partition, self.alpha, self.kinds_per_client, seed)
        digits = max(2, len(str(self.clients - 1)))
        return {f"{self.task}-{i:0{digits}d}": part for i, part in enumerate(parts)}

    def _examples(self, rows: Any) -> list[list[tuple[str, str, str]]]:
        """Of each row its examples: what is given, what is to be predicted, and what keeps equal rows in one split."""
        if self.text:
            return [[("", text, text)] for text in strings(self.path, self.text, rows[self.text][:])]
        if self.messages:
            turns = [self._conversation(row, value) for row, value in enumerate(rows[self.messages][:])]
            return [self._answers(row, conversation) for row, conversation in enumerate(turns)]
        prompts = strings(self.path, self.prompt, rows[self.prompt][:])
        responses = strings(self.path, self.response, rows[self.response][:])
        contexts, systems = self._optional(rows, self.context), self._optional(rows, self.system)
        examples = []
        for prompt, response, context, system in zip(prompts, responses, contexts, systems, strict=True):
            asked = f"{context}\n\n{prompt}" if context else prompt
            turns = [{"role": "system", "content": system}] if system else []
            given = json.dumps([*turns, {"role": "user", "content": asked}], ensure_ascii=False)
            examples.append([(given, response, asked)])
        return examples

    def _optional(self, rows: Any, column: str) -> list[str]:
        values = rows[column][:] if column else [""] * len(rows)
        blank = {i for i, v in enumerate(values) if v is None or v != v or (isinstance(v, str) and not v.strip())}
        filled = strings(self.path, column, ["-" if i in blank else v for i, v in enumerate(values)])
        return ["" if i in blank else text for i, text in enumerate(filled)]

    def _conversation(self, row: int, value: Any) -> list[dict[str, Any]]:
        """The turns of one row, checked; keys without a value are left out."""
        where = f"{self.path.name} column {self.messages!r} row {row}"
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise DataError(f"{where} is no JSON: {error.msg} at character {error.pos}") from error
        if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
            raise DataError(f"{where} holds a {type(value).__name__}; it must be a list of {{role, content}}")
        turns = [{key: v for key, v in turn.items() if v is not None} for turn in value]
        for number, turn in enumerate(turns):
            if turn.get("role") not in _ROLES:
                raise DataError(f"{where} turn {number} has role {turn.get('role')!r}; allowed are {', '.join(_ROLES)}")
            content = turn.setdefault("content", "")
            if not isinstance(content, str) or not (content.strip() or turn.get("tool_calls")):
                raise DataError(f"{where} turn {number} ({turn['role']}) has no text; fill or remove it")
        return turns

    def _answers(self, row: int, turns: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
        """An example for each answer of the assistant to something, or for the last; calls of tools are no answers."""
        places = [i for i, t in enumerate(turns) if i and t["role"] == "assistant" and t["content"].strip()]
        places = [i for i in places if not turns[i].get("tool_calls")]
        if not places:
            raise DataError(
                f"{self.path.name} column {self.messages!r} row {row} has no answer of the assistant; remove it"
            )
        asked = json.dumps(turns[: places[0]], ensure_ascii=False)
        chosen = places if self.turns == "all" else places[-1:]
        return [(json.dumps(turns[:i], ensure_ascii=False), turns[i]["content"].strip(), asked) for i in chosen]


def _split(rows: Sequence[int], examples: Sequence[Sequence[tuple[str, str, str]]]) -> Split:
    chosen = [(row, example) for row in rows for example in examples[row]]
    return Split([e[0] for _, e in chosen], [e[1] for _, e in chosen], [str(row) for row, _ in chosen])
