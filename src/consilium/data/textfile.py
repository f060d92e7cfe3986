"""Data sets of texts from a file (see `table` for the formats) or from the hub.

The user names the columns. Rows are dealt to clients by a client column, or by a partition. A row without text, label
or client is left out and counted. Any other value that cannot be used is refused with its column and line.
"""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from consilium.constraints import NonNegativeInt, OpenShare, PositiveFloat, PositiveInt, check_settings, forbid, nearest
from consilium.data.dialect import Dialect
from consilium.data.names import alike, by_client, name_of, names_of, without
from consilium.data.sets import check_shares, digest, located
from consilium.data.table import Table, read_table
from consilium.data.task import TASK_NAME, ClientData, Federation, Metric, Split, Task
from consilium.errors import DataError
from consilium.kinds import DataSource, Gives

__all__ = ["TextFileData", "cut", "look_alikes", "read_columns", "usable"]


@dataclass(frozen=True)
class TextFileData(DataSource):
    """Clients with data from one file.

    Args:
        path: a .csv, .tsv, .json, .jsonl, .parquet or .xlsx file (text also as .gz or .zst); a folder of such files; or
            a directory of `datasets`, or owner/name on the hub; their splits are joined and dealt again.
        text: column of the input text.
        target: column of the label (classification; `--data.label` is accepted too) or of the answer (text-to-text).
        form: "classification" or "text-to-text".
        task: name of the task; also the prefix of the clients' ids if there is no client column.
        client: column with the client of each row; "" deals the rows by `partition`.
        labels: labels in which all clients answer; others are refused. (): the labels in the file. sites with files of
            their own must set them to answer in the labels of all sites.
        metric: "": accuracy for classification and token_f1 for text-to-text; "rouge2": for summaries.
        partition: "iid", "dirichlet" (label skew by `alpha`) or "pathological" (`labels_per_client` labels each);
            used if `client` is "". text-to-text has no labels, so it takes only "iid".
        clients: number of clients if `client` is "", >= 1.
        alpha: concentration of the Dirichlet partition, > 0; smaller is more skewed.
        labels_per_client: number of labels per client under "pathological", >= 2.
        validation: share of a client's rows for validation, in (0, 1); the rows for neither validation nor test are for
            training. each split gets at least one row.
        test: share of a client's rows for test, in (0, 1).
        where: "COLUMN=VALUE" uses only the rows with that value; "": all rows.
        rows: maximum number of rows to use, drawn by the seed, >= 0; 0: all.
        own_labels: let each client answer only in the labels of its own training rows, and test it on these; by default
            every client answers in all labels of the federation.
        common: draw a share `test` of the rows used before the rest is dealt, and test every client on an equal part of
            it; the mean score is then the score on one test set for all.
        smallest: minimum number of rows of a label, >= 1; a label with fewer is left out, with its rows. with
            `own_labels`, also the minimum number of training rows at a client.
        separator: separator between the fields of a text file: one character, "tab" or "none"; "": recognised.
        quote: quote around the fields of a text file: one character, or "none" if quotes are ordinary characters; "":
            recognised.
        encoding: encoding of a text file, e.g. cp1252; "": recognised.
    """

    gives: ClassVar[Gives] = "labelled texts"

    path: Path
    text: str = "text"
    target: str = "label"
    form: Literal["classification", "text-to-text"] = "classification"
    task: str = "task"
    client: str = ""
    labels: tuple[str, ...] = ()
    metric: Literal["", "accuracy", "token_f1", "rouge2"] = ""
    partition: Literal["iid", "dirichlet", "pathological"] = "iid"
    clients: PositiveInt = 10
    alpha: PositiveFloat = 0.3
    labels_per_client: Annotated[int, Ge(2)] = 2
    validation: OpenShare = 0.15
    test: OpenShare = 0.25
    where: str = ""
    rows: NonNegativeInt = 0
    own_labels: bool = False
    common: bool = False
    smallest: PositiveInt = 2
    separator: str = ""
    quote: str = ""
    encoding: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", located(self.path))
        Dialect(self.separator, self.quote, self.encoding)
        check_settings(self, "data.")
        is_generated = self.form == "text-to-text"
        forbid(
            is_generated and self.partition != "iid" and not self.client,
            f"partition {self.partition!r} needs labels; text-to-text takes iid or a client column",
        )
        forbid(is_generated and self.labels, "labels are for classification; leave them out for text-to-text")
        forbid(
            self.metric and (self.metric == "accuracy") == is_generated,
            f"metric {self.metric!r} does not fit {self.form}; leave it empty for the form's own metric",
        )
        forbid(
            self.common and self.own_labels,
            "data.common tests all clients on the same rows; leave data.own-labels out",
        )
        check_shares(self.validation, self.test)
        forbid(self.where and not re.fullmatch("[^=]+=.*", self.where), f"where {self.where!r}: write COLUMN=VALUE")
        forbid(not TASK_NAME.fullmatch(self.task), f"task {self.task!r}: use 1 to 58 of letters, digits, '_', '-'")

    def load(self, seed: int) -> Federation:
        """Read, check and deal the rows. Equal files and seeds give equal results.

        Raises:
            DataError: if the file, a column, a value or a label cannot be used, or no client has enough rows.
        """
        column, _, value = self.where.partition("=")
        wanted_columns = [c for c in (self.text, self.target, self.client, column) if c]
        table = read_table(self.path, Dialect(self.separator, self.quote, self.encoding), wanted_columns)
        texts: list[Any] = table.filled(self.text)
        is_classification = self.form == "classification"
        targets: list[Any] = (
            names_of(table.texts(self.target), self.labels) if is_classification else table.filled(self.target)
        )
        owners: list[Any] = names_of(table.texts(self.client)) if self.client else []
        values_by_column = {self.text: texts, self.target: targets} | ({self.client: owners} if self.client else {})
        used_rows, notes = usable(table, values_by_column)
        if column:
            filter_values = names_of(table.texts(column))
            used_rows = [row for row in used_rows if filter_values[row] == name_of(value)]
            if not used_rows:
                raise DataError(f"{self.path.name} has no row with {self.where}")
        if is_classification:
            self._check_labels(table, targets, used_rows, notes)
        if 0 < self.rows < len(used_rows):
            used_rows = sorted(random.Random(f"{seed}:rows").sample(used_rows, self.rows))
        label_counts = Counter(targets[row] for row in used_rows) if is_classification else Counter()
        rare_labels = {label: n for label, n in label_counts.items() if n < self.smallest and label not in self.labels}
        n_used, common_rows = len(used_rows), []
        if self.common:
            used_rows = [row for row in used_rows if targets[row] not in rare_labels]
            used_rows, _, common_rows = cut(used_rows, texts, 0, self.test, random.Random(f"{seed}:common"))
            random.Random(f"{seed}:deal").shuffle(common_rows)
        parts, names = by_client([owners[row] for row in used_rows]) if self.client else ({}, {})
        parts = parts or self._divide(used_rows, targets, seed)
        rows_by_client = {name: [used_rows[i] for i in part] for name, part in parts.items()}
        splits: dict[str, list[list[int]]] = {}
        for index, (name, rows) in enumerate(rows_by_client.items()):
            rng = random.Random(f"{seed}:{name}")
            kept = [row for row in rows if targets[row] not in rare_labels]
            splits[name] = self._splits(kept, texts, targets, rng, sorted(common_rows[index :: len(rows_by_client)]))
        trained_counts = (
            Counter(targets[row] for parts in splits.values() for row in parts[0]) if is_classification else Counter()
        )
        labels = self.labels or tuple(sorted(trained_counts))
        clients, skip_reasons, left_out_counts = {}, {}, {}
        for name, parts in splits.items():
            outcome = self._client(parts, texts, targets, labels, len(rows_by_client[name]))
            if isinstance(outcome, ClientData):
                clients[name] = outcome
                kept = sum(len(split) for key, split in outcome.splits() if key != "test" or not self.common)
                left_out_counts |= {name: len(rows_by_client[name]) - kept} if kept < len(rows_by_client[name]) else {}
            else:
                skip_reasons[name] = outcome
        if not clients:
            reasons = "; ".join(f"{names.get(name, name)}: {reason}" for name, reason in list(skip_reasons.items())[:3])
            raise DataError(f"{self.path} has {len(table)} rows, but no client has enough of them ({reasons})")
        if untrained_labels := [label for label in label_counts if label not in rare_labels and label not in labels]:
            notes.append(
                f"left out: the rows of labels that no client has for training ({', '.join(untrained_labels[:5])})"
            )
        notes += self._notes(rare_labels, left_out_counts, clients, skip_reasons, labels, names)
        notes += look_alikes({"labels": labels, "clients": {names.get(name, name) for name in rows_by_client}})
        source = self.source(len(table)) | {"used": n_used, "left_out": left_out_counts}
        return Federation(clients, skip_reasons, source, names, tuple(notes))

    def _notes(
        self,
        rare: Mapping[str, int],
        left_out: Mapping[str, int],
        clients: Mapping[str, ClientData],
        skipped: Mapping[str, str],
        labels: Sequence[str],
        names: Mapping[str, str],
    ) -> list[str]:
        """Return notes, as sentences, on the labels and the clients that are left out."""
        notes = []
        if rare:
            label_list = ", ".join(f"{label!r}" for label in sorted(rare)[:5]) + (", ..." if len(rare) > 5 else "")
            row_count = sum(rare.values())
            notes.append(
                f"left out: {_rows(row_count)} of {len(rare)} label(s) with fewer than {self.smallest} rows "
                f"({label_list})"
            )
        for name, data in clients.items() if self.own_labels and self.form == "classification" else ():
            if missing_labels := [label for label in labels if label not in data.task.labels]:
                label_list = ", ".join(repr(label) for label in missing_labels[:5]) + (
                    ", ..." if len(missing_labels) > 5 else ""
                )
                notes.append(
                    f"{names.get(name, name)} answers in {len(data.task.labels)} of {len(labels)} labels, not in "
                    f"{label_list} ({_rows(left_out.get(name, 0))} left out); without --data.own-labels it answers "
                    "in all"
                )
        if skipped and not self.client:
            notes.append(
                f"{len(clients)} of the {self.clients} clients asked for have enough rows; ask for fewer clients"
                + (", or a larger --data.alpha" if self.partition == "dirichlet" else "")
            )
        return notes

    def source(self, rows: int) -> dict[str, Any]:
        """Return the origin of the data for a run's records: the file, its sha256, the columns and the row count.

        `load` adds "used", the number of rows that `where` and `rows` select, and "left_out": client -> number of rows
        with labels that are too rare to be trained and tested at that client.
        """
        settings = {k: getattr(self, k) for k in ("text", "target", "client", "form", "partition", "where")}
        return {"type": "TextFileData", "path": str(self.path), "sha256": digest(self.path), "rows": rows, **settings}

    def _check_labels(self, table: Table, targets: Sequence[str], used: Sequence[int], notes: Sequence[str]) -> None:
        for row in used if self.labels else ():
            if targets[row] not in self.labels:
                hint = nearest(targets[row], self.labels, " (", ")")
                location = f"{table.name} column {self.target!r} {table.place(row)}"
                raise DataError(
                    f"{location}: label {targets[row]!r} is not declared{hint}; declared are {' | '.join(self.labels)}"
                )
        labels = {targets[row] for row in used}
        if len(labels) < 2 and len(self.labels) < 2:
            suffix = "".join(f"; {note}" for note in notes)
            raise DataError(
                f"column {self.target!r} has only the label {min(labels)!r}; classification needs two{suffix}"
            )

    def _divide(self, used: Sequence[int], targets: Sequence[str], seed: int) -> dict[str, list[int]]:
        from consilium.data.partition import divide

        labels = [targets[row] if self.form == "classification" else "" for row in used]
        parts = divide(labels, self.clients, self.partition, self.alpha, self.labels_per_client, seed)
        digits = max(2, len(str(self.clients - 1)))
        return {f"{self.task}-{i:0{digits}d}": part for i, part in enumerate(parts)}

    def _splits(
        self,
        rows: list[int],
        texts: Sequence[str],
        targets: Sequence[str],
        rng: random.Random,
        common: list[int],
    ) -> list[list[int]]:
        """Split one client's rows into training, validation and test, or take `common` for test.

        Rows of equal text go to the same split.
        """
        if self.own_labels and self.form == "classification":
            counts = Counter(targets[row] for row in rows)
            rows = [row for row in rows if counts[targets[row]] >= self.smallest]
        if not rows:
            return [[], [], []]
        if self.common:
            return [*cut(rows, texts, self.validation, 0, rng)[:2], common]
        return cut(rows, texts, self.validation, self.test, rng)

    def _client(
        self, parts: list[list[int]], texts: Sequence[str], targets: Sequence[str], labels: tuple[str, ...], rows: int
    ) -> ClientData | str:
        """Return one client's data, or a string with the reason why it has none."""
        if not rows:
            return "no rows"
        if any(not part for part in parts):
            return f"{sum(map(len, parts))} usable row(s), too few for training, validation and test"
        if self.form == "classification":
            counts = Counter(targets[row] for row in parts[0])
            if self.own_labels:
                minimum = min(self.smallest, max(counts.values()))
                labels = tuple(label for label in labels if counts[label] >= minimum)
                if len(labels) < 2:
                    return f"{rows} rows with {len(labels)} usable label(s); classification needs two"
            parts = [[row for row in part if targets[row] in labels] for part in parts]
            if any(not part for part in parts):
                return f"{rows} rows, too few of the trained labels for validation and test"
        else:
            labels = ()
        metric: Metric = self.metric or ("accuracy" if self.form == "classification" else "token_f1")
        splits = [Split([texts[i] for i in p], [targets[i] for i in p], [str(i) for i in p]) for p in parts]
        return ClientData(Task(self.task, self.form, labels, metric), *splits)


def _rows(n: int) -> str:
    return f"{n} row{'' if n == 1 else 's'}"


def usable(table: Table, needed: Mapping[str, Sequence[str | None]]) -> tuple[list[int], list[str]]:
    """Return the rows that have a value in every needed column, and notes that count the others.

    Args:
        needed: column -> one value per row, None if it is missing.

    Raises:
        DataError: if no row is left.
    """
    used_rows, notes = list(range(len(table))), []
    for column, values in needed.items():
        missing_rows = [row for row in range(len(table)) if values[row] is None]
        if missing_rows:
            spellings = without(table.cells(column), missing_rows)
            notes.append(
                f"left out: {_rows(len(missing_rows))} of {len(table)} without a value of {column!r} "
                f"({spellings}), first {table.place(missing_rows[0])}"
            )
            used_rows = [row for row in used_rows if values[row] is not None]
    if not used_rows:
        raise DataError(f"{table.name} has no row that can be used; {'; '.join(notes)}")
    return used_rows, notes


def look_alikes(names: Mapping[str, Collection[str]]) -> list[str]:
    """Return a note for each kind of names (labels, clients) if some of them differ only in spelling."""
    notes = []
    for kind, kind_names in names.items():
        if groups := alike(kind_names):
            examples = "; ".join(" and ".join(map(repr, group)) for group in groups[:4])
            suffix = f"; and {len(groups) - 4} more" if len(groups) > 4 else ""
            notes.append(
                f"{kind} that differ only by case, blanks, accents or look-alikes, are they one? {examples}{suffix}"
            )
    return notes


def read_columns(path: Path, wanted: Sequence[str]) -> dict[str, list[str | None]]:
    """Return the texts of the wanted columns, one entry per row, None for null.

    Raises:
        DataError: as `read_table`, or if a value is nested or binary.
    """
    table = read_table(path, None, wanted)
    return {column: table.texts(column) for column in wanted}


def cut(rows: list[int], texts: Sequence[str], validation: float, test: float, rng: random.Random) -> list[list[int]]:
    """Split rows into training, validation and test; rows of equal text stay together.

    Texts are equal if they differ only by case and whitespace. A share of 0 gives no rows.
    """
    groups = defaultdict(list)
    for row in rows:
        groups[" ".join(texts[row].lower().split())].append(row)
    order = sorted(groups)
    rng.shuffle(order)
    group_counts = [max(1, round(len(order) * share)) if share else 0 for share in (test, validation)]
    parts = [order[sum(group_counts) :], order[group_counts[0] : sum(group_counts)], order[: group_counts[0]]]
    return [sorted(row for key in part for row in groups[key]) for part in parts]
