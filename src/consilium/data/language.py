"""Data for causal language models from a file: prompts and responses, conversations, or plain text.

The formats and the rules are those of `textfile`. The user names the columns, and a client column or a partition deals
the rows. Rows without a value are left out and counted. A value that cannot be used is refused with its column and
line. `conversations` describes the formats of conversations in files. `causal` describes how they become tokens, and
the tokens to which the loss applies.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from consilium.constraints import OpenShare, PositiveFloat, PositiveInt, check_settings, forbid
from consilium.data.conversations import answer_of, chosen, conversation
from consilium.data.dialect import Dialect
from consilium.data.names import by_client, names_of
from consilium.data.sets import check_shares, digest, located
from consilium.data.table import Table, read_table
from consilium.data.task import TASK_NAME, ClientData, Federation, Form, Split, Task
from consilium.data.textfile import cut, look_alikes, usable
from consilium.errors import ConfigError, DataError
from consilium.kinds import DataSource, Gives

__all__ = ["COMPANIONS", "LanguageData"]

COMPANIONS = {
    "instruction": {"input": ("input",), "context": ("context",), "system": ("system",)},
    "question": {"context": ("context", "passage"), "choices": ("choices", "options")},
}
"""Columns that complete a prompt, as in Alpaca, Dolly, SQuAD, MMLU and ARC: name of the prompt's column -> role ->
names."""
_OPTIONAL = ("context", "input", "choices", "system")

Example = tuple[str, str, str]
"""The given text, the text to predict, and a key; rows with equal keys go to the same split."""


@dataclass(frozen=True)
class LanguageData(DataSource):
    """Clients whose data is instructions with responses, conversations, or plain text, in one file.

    Args:
        path: a .csv, .tsv, .json, .jsonl, .parquet or .xlsx file (text also as .gz or .zst); a folder of such files; or
            a directory of `datasets`, or owner/name on the hub; their splits are joined and dealt again.
        prompt: column of the prompt.
        response: column of the response to train on.
        context: column of a text that the prompt is about, put before the prompt; may be empty in a row. "": the column
            of that name if the prompt's column is "instruction" or "question"; "none": no such column is used.
        input: column of the input to which the prompt applies, put after the prompt; otherwise as context.
        choices: column of the answers to choose from, put after the prompt as "A. ..."; otherwise as context.
        system: column of the system message; may be empty in a row; otherwise as context.
        messages: column of conversations, instead of prompt and response: lists of {role, content} (OpenAI) or of
            {from, value} (ShareGPT), or such lists written in JSON.
        text: column of plain text, instead of both; needs fit.rows blocks, documents or packed.
        turns: answers of the assistant to use from a conversation: "all", each as an example with all messages before
            it, or only the "last".
        task: name of the task; also the prefix of the clients' ids if there is no client column.
        client: column with the client of each row; "" deals the rows by `partition`.
        metric: "token_accuracy" (share of tokens of the answer that rank first after the true tokens before them;
            perplexity is recorded too), or the score of generated answers, "token_f1" or "rouge2".
        partition: "iid"; "dirichlet" (skewed by `alpha`) or "pathological" (`kinds_per_client` kinds each) over the
            values of the column `kind`; used if `client` is "".
        kind: column with the subject of each row, for "dirichlet" and "pathological".
        clients: number of clients if `client` is "", >= 1.
        alpha: concentration of the Dirichlet partition, > 0; smaller is more skewed.
        kinds_per_client: number of kinds per client under "pathological", >= 1.
        validation: share of a client's rows for validation, in (0, 1); the rows for neither validation nor test are for
            training. each split gets at least one row.
        test: share of a client's rows for test, in (0, 1).
        separator: separator between the fields of a text file: one character, "tab" or "none"; "": recognised.
        quote: quote around the fields of a text file: one character, or "none" if quotes are ordinary characters; "":
            recognised.
        encoding: encoding of a text file, e.g. cp1252; "": recognised.
    """

    form: ClassVar[Form] = "text-to-text"  # This is the form of the model.
    gives: ClassVar[Gives] = "language"

    path: Path
    prompt: str = ""
    response: str = ""
    context: str = ""
    input: str = ""
    choices: str = ""
    system: str = ""
    messages: str = ""
    text: str = ""
    turns: Literal["all", "last"] = "all"
    task: str = "answer"
    client: str = ""
    metric: Literal["token_accuracy", "token_f1", "rouge2"] = "token_accuracy"
    partition: Literal["iid", "dirichlet", "pathological"] = "iid"
    kind: str = ""
    clients: PositiveInt = 10
    alpha: PositiveFloat = 0.3
    kinds_per_client: PositiveInt = 2
    validation: OpenShare = 0.1
    test: OpenShare = 0.1
    separator: str = ""
    quote: str = ""
    encoding: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", located(self.path))
        Dialect(self.separator, self.quote, self.encoding)
        self._check_columns()
        check_settings(self, "data.")
        forbid(
            self.text and self.metric != "token_accuracy",
            f"metric {self.metric!r} scores answers; plain text has none: use token_accuracy",
        )
        forbid(
            self.partition != "iid" and not self.client and not self.kind,
            f"partition {self.partition!r} needs --data.kind, a column of what the rows are about",
        )
        check_shares(self.validation, self.test)
        forbid(not TASK_NAME.fullmatch(self.task), f"task {self.task!r}: use 1 to 58 of letters, digits, '_', '-'")

    @property
    def plain(self) -> bool:
        """Return whether the data is plain text, without prompts."""
        return bool(self.text)

    def _check_columns(self) -> None:
        roles = [name for name in ("prompt", "response", *_OPTIONAL, "messages", "text") if getattr(self, name)]
        for name in ("messages", "text"):
            if name in roles and len(roles) > 1:
                other_options = ", ".join(f"data.{other}" for other in roles if other != name)
                raise ConfigError(f"data.{name} stands alone; leave {other_options} empty")
        if roles and not {"messages", "text"} & set(roles) and not (self.prompt and self.response):
            missing = "prompt" if not self.prompt else "response"
            raise ConfigError(f"data.{missing} is empty; name the columns of both, the prompt and the response")

    def load(self, seed: int) -> Federation:
        """Read, check and deal the rows. Equal files and seeds give equal results.

        Raises:
            DataError: if the file, a column or a value cannot be used, or no client has enough rows.
            ConfigError: if no column was named.
        """
        wanted_columns = [
            c for c in (self.prompt, self.response, self.messages, self.text, self.client, self.kind) if c
        ]
        wanted_columns += [column for role in _OPTIONAL if (column := getattr(self, role)) not in ("", "none")]
        table = read_table(self.path, Dialect(self.separator, self.quote, self.encoding), wanted_columns)
        if not (self.prompt or self.messages or self.text):
            has_preferences = {"chosen", "rejected"} <= {column.lower() for column in table.columns}
            raise ConfigError(
                "name the columns: --data.prompt and --data.response, or --data.messages, or --data.text; "
                f"{self.path.name} has {' | '.join(table.column_names)}"
                + ("; preferences are not trained on: name the chosen answers" if has_preferences else "")
            )
        columns = self.columns(table)
        examples, notes = self._examples(table, columns)
        owners: list[Any] = names_of(table.texts(self.client)) if self.client else []
        kinds: list[Any] = names_of(table.texts(self.kind)) if self.kind and not self.client else []
        values_by_column = {self.client: owners} if self.client else {self.kind: kinds} if self.kind else {}
        used_rows, row_notes = usable(table, values_by_column)
        notes += row_notes
        used_rows = [row for row in used_rows if examples[row]]
        if not used_rows:
            raise DataError(f"{self.path.name} has no row that can be used: {'; '.join(notes)}")
        parts, names = by_client([owners[row] for row in used_rows]) if self.client else ({}, {})
        parts = parts or self._divide([kinds[row] if kinds else "" for row in used_rows], seed)
        keys = [row_examples[0][2] if row_examples else "" for row_examples in examples]
        clients, skip_reasons = {}, {}
        for name, part in parts.items():
            client_rows = [used_rows[i] for i in part]
            splits = cut(client_rows, keys, self.validation, self.test, random.Random(f"{seed}:{name}"))
            if all(splits):
                task = Task(self.task, "language", (), self.metric)
                clients[name] = ClientData(task, *(_split(rows, examples) for rows in splits))
            else:
                skip_reasons[name] = f"{len(client_rows)} usable row(s), too few for training, validation and test"
        if not clients:
            reasons = "; ".join(f"{names.get(name, name)}: {reason}" for name, reason in list(skip_reasons.items())[:3])
            raise DataError(f"{self.path} has {len(table)} rows, but no client has enough of them ({reasons})")
        notes += look_alikes({"clients": {names.get(name, name) for name in parts}})
        return Federation(clients, skip_reasons, self.source(len(table)), names, tuple(notes))

    def columns(self, table: Table) -> dict[str, str]:
        """Return role -> column for every role that is used, including the columns that complete a prompt."""
        columns_by_role = {role: getattr(self, role) for role in ("prompt", "response", *_OPTIONAL, "messages", "text")}
        companions = COMPANIONS.get(self.prompt.lower(), {})
        columns_by_lowercase = {column.lower(): column for column in table.columns}
        taken_columns = {*columns_by_role.values(), self.client, self.kind}
        for role, names in companions.items():
            companion = next(
                (
                    columns_by_lowercase[name]
                    for name in names
                    if name in columns_by_lowercase and columns_by_lowercase[name] not in taken_columns
                ),
                "",
            )
            columns_by_role[role] = columns_by_role[role] or companion
        return {role: column for role, column in columns_by_role.items() if column not in ("", "none")}

    def source(self, rows: int) -> dict[str, Any]:
        """Return the origin of the data for a run's records: the file, its sha256, the columns and the row count."""
        names = ("prompt", "response", *_OPTIONAL, "messages", "text", "client", "kind", "partition")
        settings = {name: getattr(self, name) for name in names}
        return {"type": "LanguageData", "path": str(self.path), "sha256": digest(self.path), "rows": rows, **settings}

    def _divide(self, kinds: Sequence[str], seed: int) -> dict[str, list[int]]:
        from consilium.data.partition import divide

        parts = divide(kinds, self.clients, self.partition, self.alpha, self.kinds_per_client, seed)
        digits = max(2, len(str(self.clients - 1)))
        return {f"{self.task}-{i:0{digits}d}": part for i, part in enumerate(parts)}

    def _examples(self, table: Table, columns: dict[str, str]) -> tuple[list[list[Example]], list[str]]:
        """Return the examples of each row, none if a value is missing, and notes that count those rows."""
        notes = []
        for role in _OPTIONAL:
            if role in columns and not getattr(self, role):
                notes.append(
                    f"column {columns[role]!r} belongs to {self.prompt!r} and is used; --data.{role} none leaves it out"
                )
        unused_columns = [c for c in table.columns if c not in (*columns.values(), self.client, self.kind)]
        if unused_columns:
            notes.append(
                "columns that are not used: "
                f"{', '.join(unused_columns[:12])}{', ...' if len(unused_columns) > 12 else ''}"
            )
        if self.text:
            texts = table.filled(self.text)
            notes += usable(table, {self.text: texts})[1]
            return [[("", text, text)] if text else [] for text in texts], notes
        if self.messages:
            examples, conversation_notes = self._conversations(table)
            return examples, notes + conversation_notes
        return self._pairs(table, columns, notes), notes

    def _pairs(self, table: Table, columns: dict[str, str], notes: list[str]) -> list[list[Example]]:
        """Return the examples of prompts and responses, per row, and append to `notes`."""
        prompts, responses = table.cells(self.prompt), table.cells(self.response)
        extras = {role: table.filled(columns[role]) for role in ("context", "input", "system") if role in columns}
        options = table.cells(columns["choices"]) if "choices" in columns else []
        examples: list[list[Example]] = []
        values_by_column: dict[str, list[str | None]] = {self.prompt: [], self.response: []}
        for row in range(len(table)):
            location = f"{table.name} column {{!r}} {table.place(row)}"
            choices = chosen(options[row], location.format(columns["choices"])) if options and options[row] else []
            turns, prompt = self._asked(prompts[row], location.format(self.prompt))
            answer = self._answer(responses[row], choices, location.format(self.response))
            values_by_column[self.prompt].append(prompt)
            values_by_column[self.response].append(answer)
            if prompt is None or answer is None:
                examples.append([])
                continue
            choice_list = "\n".join(f"{letter}. {text}" for letter, text in choices)
            row_extras = {role: values[row] for role, values in extras.items()}
            question = "\n\n".join(
                part for part in (row_extras.get("context"), prompt, row_extras.get("input"), choice_list) if part
            )
            if system := row_extras.get("system"):
                turns = [{"role": "system", "content": system}, *turns]
            dialogue = json.dumps([*turns, {"role": "user", "content": question}], ensure_ascii=False)
            examples.append([(dialogue, answer, question)])
        notes += usable(table, values_by_column)[1]
        return examples

    @staticmethod
    def _asked(value: Any, where: str) -> tuple[list[dict[str, Any]], str | None]:
        """Return the earlier turns and the prompt; the prompt of a list of messages is the last message."""
        if isinstance(value, list):
            turns, _ = conversation(value, where)
            if not turns or turns[-1]["role"] != "user":
                raise DataError(f"{where} must end with a message of the user")
            return turns[:-1], turns[-1]["content"]
        if value is not None and not isinstance(value, str):
            raise DataError(f"{where} holds a {type(value).__name__}; text, numbers and booleans are read")
        return [], value if value and not value.isspace() else None

    @staticmethod
    def _answer(value: Any, choices: Sequence[tuple[str, str]], where: str) -> str | None:
        """Return the answer; the answer of a list of messages is its only message."""
        if isinstance(value, list) and value and isinstance(value[0], dict):
            turns, _ = conversation(value, where)
            if [turn["role"] for turn in turns] != ["assistant"]:
                raise DataError(f"{where} must hold one message of the assistant; use --data.messages for more")
            return turns[0]["content"]
        return answer_of(value, choices, where)

    def _conversations(self, table: Table) -> tuple[list[list[Example]], list[str]]:
        """Return the examples of conversations, per row, and notes on messages and rows that were left out."""
        examples: list[list[Example]] = []
        empty_count, silent_rows = 0, []
        for row, value in enumerate(table.cells(self.messages)):
            location = f"{table.name} column {self.messages!r} {table.place(row)}"
            is_blank = value is None or (isinstance(value, str) and not value.strip())
            turns, skip_count = ([], 0) if is_blank else conversation(value, location)
            examples.append(self._answers(turns))
            empty_count += skip_count
            silent_rows += [] if examples[-1] else [row]
        notes = [f"left out: {empty_count} empty message(s)"] if empty_count else []
        if silent_rows:
            notes.append(
                f"left out: {len(silent_rows)} of {len(table)} rows of {self.messages!r} without an answer of the "
                f"assistant, first {table.place(silent_rows[0])}"
            )
        return examples, notes

    def _answers(self, turns: list[dict[str, Any]]) -> list[Example]:
        """Return an example for each answer of the assistant, or only for the last one.

        A message at the beginning of a conversation is not an answer. Neither is a tool call, or a message with the
        weight 0 in OpenAI's format.
        """
        positions = [i for i, t in enumerate(turns) if i and t["role"] == "assistant" and t["content"].strip()]
        positions = [i for i in positions if not turns[i].get("tool_calls") and turns[i].get("weight", 1) != 0]
        if not positions:
            return []
        key = json.dumps(turns[: positions[0]], ensure_ascii=False)
        answer_positions = positions if self.turns == "all" else positions[-1:]
        return [(json.dumps(turns[:i], ensure_ascii=False), turns[i]["content"], key) for i in answer_positions]


def _split(rows: Sequence[int], examples: Sequence[Sequence[Example]]) -> Split:
    pairs = [(row, example) for row in rows for example in examples[row]]
    return Split([e[0] for _, e in pairs], [e[1] for _, e in pairs], [str(row) for row, _ in pairs])
