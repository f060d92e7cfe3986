"""Files of rows: what is read, how it is dealt, and what is refused with column and row."""

import csv
import json
import re
from pathlib import Path

import datasets
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium.data.textfile import TextFileData, cut, read_columns
from consilium.errors import ConfigError, DataError

ROWS = [{"text": f"text number {i}", "label": "good" if i % 2 else "bad", "site": f"site {i % 3}"} for i in range(60)]


def write(path: Path, rows: list[dict]) -> Path:
    """The rows as the format that the path's ending names."""
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_rows_that_are_left_out_are_counted(tmp_path):
    """One row of a label of its own, at one of the three sites."""
    rows = [*ROWS, {"text": "alone", "label": "odd", "site": "site 1"}]
    federation = TextFileData(write(tmp_path / "rows.csv", rows), client="site").load(0)
    assert federation.source["left_out"] == {"site-1": 1}


def test_the_path_does_not_depend_on_where_the_run_is_resumed(tmp_path, monkeypatch):
    write(tmp_path / "rows.csv", ROWS)
    monkeypatch.chdir(tmp_path)
    data = TextFileData(Path("rows.csv"), client="site")
    monkeypatch.chdir("/")
    assert data.path == tmp_path / "rows.csv" and len(data.load(0).clients) == 3


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".ndjson", ".parquet"])
def test_every_format_gives_the_same_federation(tmp_path, ending):
    federation = TextFileData(write(tmp_path / f"rows{ending}", ROWS), client="site").load(0)
    assert list(federation.clients) == ["site-0", "site-1", "site-2"]
    assert federation.fingerprint == TextFileData(write(tmp_path / "rows.csv", ROWS), client="site").load(0).fingerprint
    client = federation.clients["site-1"]
    assert client.task.labels == ("bad", "good")
    assert {name: len(split) for name, split in client.splits()} == {"train": 12, "validation": 3, "test": 5}
    for _, split in client.splits():
        for text, target, row in zip(split.texts, split.targets, split.rows, strict=True):
            assert ROWS[int(row)] == {"text": text, "label": target, "site": "site 1"}


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "pathological"])
def test_rows_are_dealt_without_a_client_column(tmp_path, partition):
    path = write(tmp_path / "rows.jsonl", ROWS)
    data = TextFileData(path, task="mood", partition=partition, clients=4, alpha=1.0)
    federation = data.load(7)
    names = {f"mood-{i:02d}" for i in range(4)}
    assert set(federation.clients) | set(federation.skipped) == names
    rows = [row for client in federation.clients.values() for _, split in client.splits() for row in split.rows]
    assert len(rows) == len(set(rows))
    assert federation.fingerprint == data.load(7).fingerprint


def test_text_to_text_rows_have_their_own_metric(tmp_path):
    path = write(tmp_path / "rows.csv", ROWS)
    kind = {"form": "text-to-text", "target": "site", "clients": 3}
    task = next(iter(TextFileData(path, **kind).load(0).clients.values())).task
    assert (task.labels, task.metric) == ((), "token_f1")
    task = next(iter(TextFileData(path, **kind, metric="rouge2").load(0).clients.values())).task
    assert task.metric == "rouge2"


def test_numbers_and_booleans_are_labels_and_codes_keep_their_zeros(tmp_path):
    rows = [{"text": f"text {i}", "label": i % 2, "flag": i % 2 == 0, "code": f"00{i % 2}"} for i in range(12)]
    json_ = write(tmp_path / "rows.jsonl", rows)
    assert set(read_columns(json_, ["label"])["label"]) == {"0", "1"}
    assert set(read_columns(json_, ["flag"])["flag"]) == {"true", "false"}
    assert set(read_columns(write(tmp_path / "rows.csv", rows), ["code"])["code"]) == {"000", "001"}


def test_a_missing_column_lists_the_columns_there_are(tmp_path):
    path = write(tmp_path / "rows.csv", ROWS)
    with pytest.raises(DataError, match=r"no column 'lable' \(did you mean 'label'\?\); it has text \| label \| site"):
        TextFileData(path, target="lable").load(0)
    with pytest.raises(DataError, match=r"no column 'xyz'; it has text \| label \| site"):
        TextFileData(path, client="xyz").load(0)


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("column", ["text", "label", "site"])
def test_empty_values_in_used_columns_are_left_out_and_counted(tmp_path, ending, column):
    """Rows 7 and 9 lack a value: lines 9 and 11 of a CSV file, lines 8 and 10 of JSONL."""
    rows = [dict(row) for row in ROWS]
    rows[7][column] = None
    rows[9][column] = None
    federation = TextFileData(write(tmp_path / f"rows{ending}", rows), client="site").load(0)
    used = {row for client in federation.clients.values() for _, split in client.splits() for row in split.rows}
    assert used == {str(row) for row in range(60)} - {"7", "9"}
    place = {".csv": "line 9", ".jsonl": "line 8", ".parquet": "row 8"}[ending]
    assert federation.notes == (f"left out: 2 rows of 60 without a value of '{column}' (empty 2), first {place}",)
    assert federation.partition()["notes"] == list(federation.notes)


def test_blank_text_is_empty_and_unused_columns_may_be(tmp_path):
    rows = [{**row, "note": None if i else "x"} for i, row in enumerate(ROWS)]
    assert not TextFileData(write(tmp_path / "rows.csv", rows), client="site").load(0).notes
    rows[3]["text"] = "   "
    federation = TextFileData(write(tmp_path / "rows.csv", rows), client="site").load(0)
    assert "1 row of 60 without a value of 'text'" in federation.notes[0] and "first line 5" in federation.notes[0]
    with pytest.raises(DataError, match="no row that can be used; left out: 60 rows of 60 without a value of 'text'"):
        TextFileData(write(tmp_path / "rows.csv", [{**row, "text": ""} for row in rows])).load(0)


def test_every_client_answers_in_all_labels_unless_asked_otherwise(tmp_path):
    """Site 1 has rows of two labels of three; the third it answers all the same, or says loudly that it does not."""
    rows = [
        {**row, "label": "fine" if row["site"] != "site 1" and i % 5 == 0 else row["label"]}
        for i, row in enumerate(ROWS)
    ]
    path = write(tmp_path / "rows.csv", rows)
    everybody = TextFileData(path, client="site").load(0)
    assert {client.task.labels for client in everybody.clients.values()} == {("bad", "fine", "good")}
    assert not everybody.notes and not everybody.source["left_out"]
    own = TextFileData(path, client="site", own_labels=True).load(0)
    assert own.clients["site-1"].task.labels == ("bad", "good")
    assert any(note.startswith("site 1 answers in 2 of 3 labels, not in 'fine'") for note in own.notes)
    declared = TextFileData(path, client="site", labels=("good", "bad", "fine", "odd")).load(0)
    assert {client.task.labels for client in declared.clients.values()} == {("good", "bad", "fine", "odd")}


def test_a_client_of_one_label_takes_part(tmp_path):
    """With its own labels alone it could not, and clients fewer than asked for are counted."""
    rows = [{**row, "label": "abc"[i % 3]} for i, row in enumerate(ROWS)]
    path = write(tmp_path / "rows.csv", rows)
    how = {"partition": "dirichlet", "alpha": 0.3, "clients": 4}
    own = TextFileData(path, **how, own_labels=True).load(3)
    everybody = TextFileData(path, **how).load(3)
    assert len(own.clients) < len(everybody.clients)
    assert any(re.match(r"\d of the 4 clients asked for have enough rows; ask for fewer", note) for note in own.notes)


def test_a_text_keeps_every_character(tmp_path):
    rows = [{**row, "text": f"    if x:\r\n\treturn {i} \n"} for i, row in enumerate(ROWS)]
    for ending in (".csv", ".tsv", ".jsonl", ".parquet"):
        federation = TextFileData(write(tmp_path / f"rows{ending}", rows), client="site").load(0)
        for client in federation.clients.values():
            for text, row in zip(client.train.texts, client.train.rows, strict=True):
                assert text == rows[int(row)]["text"]


def test_a_label_that_is_not_declared_is_refused_with_the_row(tmp_path):
    rows = [dict(row) for row in ROWS]
    rows[5]["label"] = "goood"
    path = write(tmp_path / "rows.csv", rows)
    message = (
        r"column 'label' line 7: label 'goood' is not declared \(did you mean 'good'\?\); declared are bad \| good"
    )
    with pytest.raises(DataError, match=message):
        TextFileData(path, labels=("bad", "good")).load(0)


def test_empty_clients_are_skipped_and_counted(tmp_path):
    rows = [*ROWS, {"text": "alone", "label": "good", "site": "tiny"}]
    federation = TextFileData(write(tmp_path / "rows.csv", rows), client="site").load(0)
    assert list(federation.skipped) == ["tiny"] and "too few" in federation.skipped["tiny"]
    assert "tiny" not in federation.clients


def test_too_few_rows_is_an_error(tmp_path):
    with pytest.raises(DataError, match="cannot be dealt to 10 clients"):
        TextFileData(write(tmp_path / "rows.csv", ROWS[:6])).load(0)
    with pytest.raises(DataError, match="has 6 rows, but no client has enough of them"):
        TextFileData(write(tmp_path / "rows.csv", ROWS[:6]), clients=3).load(0)


def test_one_label_is_no_classification(tmp_path):
    rows = [{**row, "label": "good"} for row in ROWS]
    with pytest.raises(DataError, match="only the label 'good'"):
        TextFileData(write(tmp_path / "rows.csv", rows)).load(0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.txt", "text,label\n", "ends in '.txt'; readable are .csv"),
        ("rows.csv", "", "is empty; its first line must name the columns"),
        ("rows.csv.gz", "text,label\n", "cannot be read as csv"),
        ("rows.csv", "text,label\n", "has no rows"),
        ("rows.csv", "text,text\na,b\n", "names the column 'text' twice"),
        ("rows.jsonl", '{"text": 1}\n{"tex', "cannot be read as json"),
        ("rows.parquet", "not parquet", "cannot be read as parquet"),
    ],
)
def test_unreadable_files_are_refused_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        TextFileData(tmp_path / name).load(0)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_nested_column_are_refused(tmp_path):
    with pytest.raises(DataError, match="is not a file"):
        TextFileData(tmp_path / "none.csv").load(0)
    path = write(tmp_path / "rows.jsonl", [{"text": ["a"], "label": "x"}] * 3)
    with pytest.raises(DataError, match="column 'text' line 1 holds a list"):
        TextFileData(path).load(0)


def test_client_names_that_would_share_an_id_get_two(tmp_path):
    rows = [{**row, "site": ("a b", "a/b")[i % 2]} for i, row in enumerate(ROWS)]
    federation = TextFileData(write(tmp_path / "rows.csv", rows), client="site").load(0)
    assert sorted(federation.names.values()) == ["a b", "a/b"] and set(federation.names) == set(federation.clients)
    assert federation.partition()["names"] == federation.names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "regression"}, "one of classification, text-to-text"),
        ({"partition": "packages"}, "one of iid, dirichlet, pathological"),
        ({"form": "text-to-text", "partition": "dirichlet"}, "needs labels"),
        ({"form": "text-to-text", "labels": ("a", "b")}, "labels are for classification"),
        ({"metric": "rouge2"}, "does not fit classification"),
        ({"form": "text-to-text", "metric": "accuracy"}, "does not fit text-to-text"),
        ({"test": 0.9, "validation": 0.2}, "together below 1"),
        ({"clients": 0}, "clients is 0; it must be at least 1"),
        ({"alpha": -1.0}, "alpha is -1.0"),
        ({"task": "a task"}, "use 1 to 58 of letters"),
        ({"where": "site"}, "where .site.: write COLUMN=VALUE"),
        ({"rows": -1}, "rows is -1; it must be at least 0"),
        ({"separator": "ab"}, "data.separator is 'ab'; it must be one character"),
        ({"encoding": "utf-9"}, "data.encoding is 'utf-9', which is unknown"),
        ({"own_labels": True, "common": True}, "leave data.own-labels out"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(ConfigError, match=message):
        TextFileData(Path("rows.csv"), **changes)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["a", "A ", "b", "c", "d e", "f", "g"]), max_size=40), st.integers(0, 9))
def test_equal_texts_stay_in_one_split_and_no_row_is_lost(texts, seed):
    import random

    parts = cut(list(range(len(texts))), texts, 0.2, 0.3, random.Random(seed))
    assert sorted(row for part in parts for row in part) == list(range(len(texts)))
    where = [{texts[row].strip().lower() for row in part} for part in parts]
    assert not (where[0] & where[1] or where[0] & where[2] or where[1] & where[2])


def test_some_rows_of_a_value(tmp_path):
    """Of the 20 rows of one site 12 are drawn: others with another seed, the same again with the same."""
    path = write(tmp_path / "rows.parquet", ROWS)
    data = TextFileData(path, where="site=site 1", rows=12, clients=1)
    drawn = [
        {row for client in data.load(seed).clients.values() for _, split in client.splits() for row in split.rows}
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 12
    assert all(int(row) % 3 == 1 for row in drawn[0])
    assert data.load(0).source["used"] == 12
    with pytest.raises(DataError, match=r"rows\.parquet has no row with site=nowhere"):
        TextFileData(path, where="site=nowhere").load(0)


def test_one_test_set_for_all(tmp_path):
    """A quarter of the 60 rows is tested, 5 by each of three clients, whatever these hold; all labels are everybody's.

    No row is in two splits, and none that a client could be given is left out.
    """
    rows = [{**row, "label": "good" if row["site"] == "site 1" else row["label"]} for row in ROWS]
    path = write(tmp_path / "rows.csv", rows)
    federation = TextFileData(path, client="site", common=True).load(0)
    splits = [split for client in federation.clients.values() for _, split in client.splits()]
    used = [row for split in splits for row in split.rows]
    assert len(used) == len(set(used)) == 60 and not federation.source["left_out"]
    assert [len(client.test) for client in federation.clients.values()] == [5, 5, 5]
    assert {client.task.labels for client in federation.clients.values()} == {("bad", "good")}
    assert set(federation.clients["site-1"].train.targets) == {"good"}
    alone = TextFileData(path, client="site", own_labels=True).load(0)
    assert "site-1" in alone.skipped


@pytest.mark.parametrize("form", ["disk", "splits", "hub"])
def test_texts_of_a_datasets_directory_or_the_hub(tmp_path, monkeypatch, form):
    """Splits are joined; classes have their names; a name on the hub stays what it is."""
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict(
        {"text": [f"text {i}" for i in range(40)], "label": [i % 2 for i in range(40)]}, features
    )
    split = datasets.DatasetDict({"train": rows.select(range(30)), "test": rows.select(range(30, 40))})
    path = tmp_path / "set"
    if form == "hub":
        monkeypatch.setattr(datasets, "load_dataset", lambda name: {"someone/notes": split}[name])
        path = Path("someone/notes")
    else:
        (rows if form == "disk" else split).save_to_disk(path)
    data = TextFileData(path, clients=2)
    federation = data.load(0)
    texts = [text for client in federation.clients.values() for _, part in client.splits() for text in part.texts]
    assert sorted(texts) == sorted(rows["text"]) and data.path == path
    assert {client.task.labels for client in federation.clients.values()} == {("no", "yes")}
    assert federation.source["rows"] == 40 and bool(federation.source["sha256"]) == (form != "hub")


@pytest.mark.parametrize("name", ["notes.csv", "notes.jsonl", "notes.parquet"])
def test_a_pointer_of_git_lfs_is_named(tmp_path, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    (tmp_path / name).write_text(pointer)
    with pytest.raises(DataError, match=rf"{name} is a Git LFS pointer of {len(pointer)} bytes: run git lfs pull"):
        read_columns(tmp_path / name, [])
