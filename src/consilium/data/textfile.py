"""Any data set that lies in a file: CSV, TSV, JSONL or Parquet, read through `datasets`, offline.

Columns are named by the user. Rows are dealt to clients by a client column, or by a partition. What cannot be used
is refused with the column and the row; nothing is dropped silently, and only what is empty is skipped, and counted.
"""

import csv
import difflib
import json
import math
import random
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from consilium.data.sets import digest, is_directory, is_hub_name, located, rows_of
from consilium.data.task import TASK_NAME, ClientData, Federation, Form, Metric, Split, Task
from consilium.errors import ConfigError, DataError, first_line
from consilium.pointers import refuse_pointer

__all__ = ["TextFileData", "by_client", "cut", "read_columns", "read_rows", "strings"]

_READERS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class TextFileData:
    """Clients whose data lies in one file.

    Args:
        path: a .csv, .tsv, .jsonl, .ndjson or .parquet file; or a directory of `datasets`, or owner/name on the hub,
            whose splits are joined, and dealt anew.
        text: column of the input text.
        target: column of the label (classification; `--data.label` is taken too) or of the answer (text-to-text).
        form: "classification" or "text-to-text".
        task: name of the task; also the beginning of the clients' ids when there is no client column.
        client: column that says which client a row belongs to; "" deals the rows by `partition`.
        labels: the labels that are allowed; () takes those the file has.
        metric: "" is accuracy for classification and token_f1 for text-to-text; "rouge2" for summaries.
        partition: "iid", "dirichlet" (label skew by `alpha`) or "pathological" (`labels_per_client` labels each);
            used when `client` is "". Text-to-text has no labels, so only "iid".
        clients: number of clients when `client` is "".
        validation: share of a client's rows; what neither validates nor tests is for training. Each split gets at least
            one row.
        test: share of a client's rows, likewise.
        where: "COLUMN=VALUE" uses the rows with that value alone; "" all.
        rows: so many of the rows at most, drawn by the seed; 0: all.
        common: every client answers in all labels of the rows used, and is tested on an equal part of `test` of them,
            drawn evenly before the rest is dealt: the mean score is then that of one test set for all.
        smallest: a client with fewer rows, or a label with fewer training rows at a client, is skipped or dropped.
    """

    path: Path
    text: str = "text"
    target: str = "label"
    form: Form = "classification"
    task: str = "task"
    client: str = ""
    labels: tuple[str, ...] = ()
    metric: Literal["", "accuracy", "token_f1", "rouge2"] = ""
    partition: Literal["iid", "dirichlet", "pathological"] = "iid"
    clients: int = 10
    alpha: float = 0.3
    labels_per_client: int = 2
    validation: float = 0.15
    test: float = 0.25
    where: str = ""
    rows: int = 0
    common: bool = False
    smallest: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", located(self.path))
        if self.form not in ("classification", "text-to-text"):
            raise ConfigError(f"form {self.form!r}: use classification or text-to-text")
        if self.partition not in ("iid", "dirichlet", "pathological"):
            raise ConfigError(f"partition {self.partition!r}: use iid, dirichlet or pathological")
        if self.form == "text-to-text" and self.partition != "iid" and not self.client:
            raise ConfigError(f"partition {self.partition!r} needs labels; text-to-text takes iid or a client column")
        if self.form == "text-to-text" and self.labels:
            raise ConfigError("labels are for classification; leave them out for text-to-text")
        if (self.metric == "accuracy") != (self.form == "classification") and self.metric:
            raise ConfigError(
                f"metric {self.metric!r} does not fit {self.form}; leave it empty for the form's own metric"
            )
        if self.metric not in ("", "accuracy", "token_f1", "rouge2"):
            raise ConfigError(f"metric {self.metric!r}: use accuracy, token_f1 or rouge2")
        if not (0 < self.validation < 1 and 0 < self.test < 1 and self.validation + self.test < 1):
            raise ConfigError(
                f"validation {self.validation} and test {self.test} must be above 0 and together below 1, as shares"
            )
        for name, least in (("clients", 1), ("labels_per_client", 2), ("rows", 0), ("smallest", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not self.alpha > 0 or math.isinf(self.alpha):
            raise ConfigError(f"alpha is {self.alpha}; it must be a positive number")
        if self.where and not re.fullmatch("[^=]+=.*", self.where):
            raise ConfigError(f"where {self.where!r}: write COLUMN=VALUE")
        if not TASK_NAME.fullmatch(self.task):
            raise ConfigError(f"task {self.task!r}: use 1 to 58 of letters, digits, '_', '-'")

    def load(self, seed: int) -> Federation:
        """Read, check and deal the rows; equal for equal files and seeds.

        Raises DataError when the file, a column, a value or a label cannot be used, or no client has enough rows.
        """
        column, _, value = self.where.partition("=")
        columns = read_columns(self.path, [c for c in (self.text, self.target, self.client, column) if c])
        texts, targets = columns[self.text], columns[self.target]
        self._check_labels(targets)
        used = [row for row in range(len(texts)) if not column or columns[column][row] == value]
        if not used:
            raise DataError(f"{self.path.name} has no row with {self.where}")
        if 0 < self.rows < len(used):
            used = sorted(random.Random(f"{seed}:rows").sample(used, self.rows))
        labels = tuple(sorted({targets[row] for row in used})) if self.common else ()
        common: list[int] = []
        if self.common:
            used, _, common = cut(used, texts, 0, self.test, random.Random(f"{seed}:common"))
            random.Random(f"{seed}:deal").shuffle(common)
        owners = [columns[self.client][row] for row in used] if self.client else []
        parts = by_client(owners, f"column {self.client!r}") if self.client else self._divide(used, targets, seed)
        held = {name: [used[i] for i in part] for name, part in parts.items()}
        clients, skipped, left_out = {}, {}, {}
        for place, (name, rows) in enumerate(held.items()):
            rng = random.Random(f"{seed}:{name}")
            data = self._client(rows, texts, targets, rng, labels, sorted(common[place :: len(held)]))
            if isinstance(data, ClientData):
                clients[name] = data
                kept = sum(len(split) for key, split in data.splits() if key != "test" or not self.common)
                left_out |= {name: len(rows) - kept} if kept < len(rows) else {}
            else:
                skipped[name] = data
        if not clients:
            reasons = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:3])
            raise DataError(f"{self.path} has {len(texts)} rows, but no client has enough of them ({reasons})")
        return Federation(
            clients, skipped, self.source(len(texts)) | {"used": len(used) + len(common), "left_out": left_out}
        )

    def source(self, rows: int) -> dict[str, Any]:
        """What a run was read from: the file with its sha256, the columns, and the number of rows.

        `load` adds "used", the rows that `where` and `rows` leave, and "left_out": client -> rows of labels too rare
        there to be trained and tested.
        """
        chosen = {k: getattr(self, k) for k in ("text", "target", "client", "form", "partition", "where")}
        return {"type": "TextFileData", "path": str(self.path), "sha256": digest(self.path), "rows": rows, **chosen}

    def _check_labels(self, targets: Sequence[str]) -> None:
        for row, target in enumerate(targets if self.labels else ()):
            if target not in self.labels:
                close = difflib.get_close_matches(target, self.labels, 1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise DataError(
                    f"column {self.target!r} row {row}: label {target!r} is not declared{hint}; "
                    f"declared are {' | '.join(self.labels)}"
                )
        if self.form == "classification" and len(set(targets)) < 2:
            raise DataError(f"column {self.target!r} has only the label {targets[0]!r}; classification needs two")

    def _divide(self, used: Sequence[int], targets: Sequence[str], seed: int) -> dict[str, list[int]]:
        from consilium.data.partition import divide

        labels = [targets[row] if self.form == "classification" else "" for row in used]
        parts = divide(labels, self.clients, self.partition, self.alpha, self.labels_per_client, seed)
        digits = max(2, len(str(self.clients - 1)))
        return {f"{self.task}-{i:0{digits}d}": part for i, part in enumerate(parts)}

    def _client(
        self,
        rows: list[int],
        texts: Sequence[str],
        targets: Sequence[str],
        rng: random.Random,
        labels: tuple[str, ...],
        common: list[int],
    ) -> ClientData | str:
        """One client's splits; a string says why it has none. Equal texts go to one split.

        Args:
            labels: of all clients, common: this one's test rows, if these are set for all; else empty.
        """
        if not rows:
            return "no rows"
        if self.form == "classification" and not labels:  # a label too rare to train on is not this client's
            counts = Counter(targets[row] for row in rows)
            rows = [row for row in rows if counts[targets[row]] >= self.smallest]
        if self.common:
            parts = [*cut(rows, texts, self.validation, 0, rng)[:2], common]
        else:
            parts = cut(rows, texts, self.validation, self.test, rng)
        if any(not part for part in parts):
            return f"{len(rows)} usable row(s), too few for training, validation and test"
        if self.form == "classification" and not labels:
            counts = Counter(targets[row] for row in parts[0])
            labels = tuple(
                sorted(label for label, n in counts.items() if n >= min(self.smallest, max(counts.values())))
            )
            if len(labels) < 2:
                return f"{len(rows)} rows with {len(labels)} usable label(s); classification needs two"
            parts = [[row for row in part if targets[row] in labels] for part in parts]
            if any(not part for part in parts):
                return f"{len(rows)} rows, too few of the trained labels for validation and test"
        metric: Metric = self.metric or ("accuracy" if self.form == "classification" else "token_f1")
        splits = [Split([texts[i] for i in p], [targets[i] for i in p], [str(i) for i in p]) for p in parts]
        return ClientData(Task(self.task, self.form, labels, metric), *splits)


def read_columns(path: Path, wanted: Sequence[str]) -> dict[str, list[str]]:
    """The wanted columns as strings, one entry per row; rows count from 0, without the header.

    Raises DataError as `read_rows`, for a column whose values are not text, numbers or booleans, and for empty values
    (with count and first row).
    """
    rows = read_rows(path, wanted)
    return {column: strings(path, column, rows[column][:]) for column in wanted}


def read_rows(path: Path, wanted: Sequence[str]) -> Any:
    """The file, directory of `datasets` or data set on the hub as a `datasets.Dataset` that has the wanted columns.

    Raises DataError for a missing or unreadable file, an unknown ending, no rows, or a missing column (with what there
    is).
    """
    if is_directory(path) or is_hub_name(path):
        rows = rows_of(path)
    elif not path.is_file():
        raise DataError(f"{path} is not a file; give a {', '.join(_READERS)} file, or a directory of `datasets`")
    elif path.suffix.lower() not in _READERS:
        raise DataError(f"{path.name} ends in {path.suffix!r}; readable are {', '.join(_READERS)}")
    else:
        refuse_pointer(path, DataError)
        rows = _open(path)
    for column in wanted:
        if column not in rows.column_names:
            close = difflib.get_close_matches(column, rows.column_names, 1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise DataError(f"{path.name} has no column {column!r}{hint}; it has {' | '.join(rows.column_names)}")
    if not len(rows):
        raise DataError(f"{path.name} has no rows")
    return rows


def _open(path: Path) -> Any:
    """The file as a `datasets.Dataset`, without a copy in the shared cache."""
    from datasets import Dataset, disable_progress_bars, enable_progress_bars
    from datasets.exceptions import DatasetGenerationError
    from datasets.utils.tqdm import are_progress_bars_disabled

    kind = _READERS[path.suffix.lower()]
    quiet = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        if kind == "csv":
            return _csv(path)
        reader = {"json": Dataset.from_json, "parquet": Dataset.from_parquet}[kind]
        with tempfile.TemporaryDirectory() as cache:
            return reader(str(path), cache_dir=cache, keep_in_memory=True)
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except (DatasetGenerationError, ValueError, OSError, KeyError) as error:
        cause = error.__cause__ or error
        reason = first_line(cause)
        raise DataError(f"{path.name} cannot be read as {kind}: {reason}") from error
    finally:
        if not quiet:
            enable_progress_bars()


def _csv(path: Path) -> Any:
    """Every column as text, so that 007 and "NA" stay what the file says (`Dataset.from_csv` would guess types)."""
    import pandas
    from datasets import Dataset, Features, Value

    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(newline="", encoding="utf-8-sig") as file:
        header = next(csv.reader(file, delimiter=separator), [])
        if len(set(header)) < len(header):
            twice = next(name for name in header if header.count(name) > 1)
            raise DataError(f"{path.name} names the column {twice!r} twice; rename one of them")
        file.seek(0)
        rows = pandas.read_csv(file, sep=separator, dtype=str, keep_default_na=False, na_values=[""], index_col=False)
    features = Features({name: Value("string") for name in rows.columns})
    return Dataset.from_pandas(rows, features=features, preserve_index=False)


def strings(path: Path, column: str, values: Sequence[Any]) -> list[str]:
    """The values of a column as strings without blanks around them; raises DataError as `read_columns`."""
    empty = [i for i, v in enumerate(values) if v is None or (isinstance(v, str) and not v.strip()) or v != v]
    if empty:
        raise DataError(
            f"{path.name} column {column!r} is empty in {len(empty)} of {len(values)} rows, first in row {empty[0]}; "
            "fill or remove them"
        )
    odd = next((i for i, v in enumerate(values) if not isinstance(v, str | int | float | bool)), None)
    if odd is not None:
        kind = type(values[odd]).__name__
        raise DataError(f"{path.name} column {column!r} row {odd} holds a {kind}; text, numbers and booleans are read")
    return [v.strip() if isinstance(v, str) else json.dumps(v) for v in values]


def by_client(owners: Sequence[str], where: str) -> dict[str, list[int]]:
    """Client id -> places of its rows, by the client's name in each row, which stands `where`.

    Raises DataError when two names become one id.
    """
    from consilium.data.partition import divide_by_client

    parts = divide_by_client(owners)
    held = {_client_id(name): part for name, part in parts.items()}
    if len(held) < len(parts):
        raise DataError(f"{where} has client names that differ only in characters not allowed")
    return held


def _client_id(name: str) -> str:
    """A client column's value as an id: other characters become "-", and long names are cut."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip(".")[:64] or "client"


def cut(rows: list[int], texts: Sequence[str], validation: float, test: float, rng: random.Random) -> list[list[int]]:
    """Rows for training, validation and test; rows of equal text stay together. A share of 0 is no row."""
    groups = defaultdict(list)
    for row in rows:
        groups[" ".join(texts[row].lower().split())].append(row)
    order = sorted(groups)
    rng.shuffle(order)
    held = [max(1, round(len(order) * share)) if share else 0 for share in (test, validation)]
    cuts = [order[sum(held) :], order[held[0] : sum(held)], order[: held[0]]]
    return [sorted(row for key in cut for row in groups[key]) for cut in cuts]
