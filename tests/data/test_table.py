"""Tables of every format: the same rows give the same characters, rows and clients; what is odd is read or refused."""

import bz2
import csv
import dataclasses
import gzip
import json
import lzma
import time

import numpy as np
import openpyxl
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from consilium.data.arrays import Scale
from consilium.data.dialect import Dialect, decode, parse
from consilium.data.names import names_of
from consilium.data.table import number_of, read_table
from consilium.data.textfile import TextFileData
from consilium.errors import DataError

# What Excel's XML can hold; and a carriage return, which it cannot hold as it is.
CHARACTERS = st.characters(codec="utf-8", exclude_categories=("Cs", "Cc"), include_characters="\t\n\"',;|=\\")
VALUES = st.one_of(
    st.text(CHARACTERS, max_size=12),
    st.sampled_from(
        ["007", "1e5", "NaN", "null", "2024-03-01", "true", str(2**53 + 1), "1,5", " ill ", "=1+1", "\u2028"]
    ),
    st.none(),
)


def write_all(folder, columns, rows):
    """The rows in every format, each by the library that people use."""
    paths = {ending: folder / f"rows.{ending}" for ending in ("csv", "tsv", "jsonl", "json", "parquet", "xlsx")}
    for ending, separator in (("csv", ","), ("tsv", "\t")):
        with paths[ending].open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter=separator)
            writer.writerow(columns)
            writer.writerows(rows)
    objects = [dict(zip(columns, row, strict=True)) for row in rows]
    paths["jsonl"].write_text("".join(json.dumps(o, ensure_ascii=False) + "\n" for o in objects), encoding="utf-8")
    paths["json"].write_text(json.dumps(objects, indent=1), encoding="utf-8")
    arrays = {name: pa.array([row[i] for row in rows], pa.string()) for i, name in enumerate(columns)}
    pq.write_table(pa.table(arrays), paths["parquet"])
    book = openpyxl.Workbook()
    for row, values in enumerate([columns, *rows], 1):
        for column, value in enumerate(values, 1):
            if value is not None:
                cell = book.active.cell(row, column)
                cell.value, cell.data_type = value, "s"
    book.save(paths["xlsx"])
    return paths


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.text(CHARACTERS, min_size=1, max_size=9), VALUES, VALUES), min_size=1, max_size=6))
@example([('"a" b', "x", None), ("c\nd", '"', "'")])
@example([("a;b", "c;d", "e;f"), ("a;b", "c;d", "e|f")])
def test_every_format_gives_the_same_characters(tmp_path_factory, rows):
    """As many rows as Python's own reader of CSV finds, and every text character by character."""
    folder = tmp_path_factory.mktemp("rows")
    paths = write_all(folder, ["text", "label", "site"], rows)
    with paths["csv"].open(newline="", encoding="utf-8") as file:
        n = sum(1 for row in csv.reader(file) if row) - 1
    for ending, path in paths.items():
        table = read_table(path)
        assert table.column_names == ["text", "label", "site"], ending
        assert len(table) == n == len(rows), ending
        for i, column in enumerate(table.column_names):
            expected = [row[i] or None for row in rows]
            assert [text or None for text in table.texts(column)] == expected, (ending, column)
            assert names_of(table.texts(column)) == names_of(expected)


def test_every_format_gives_the_same_federation(tmp_path):
    """Labels that look like numbers, clients that look like dates, and a text that looks like nothing at all."""
    rows = [
        (f' {i} "quoted", and;more\n', ("007", "1e5", "Köln ", None)[i % 4], f"2024-03-0{i % 3 + 1}") for i in range(80)
    ]
    prints = set()
    for ending, path in write_all(tmp_path, ["text", "label", "site"], rows).items():
        federation = TextFileData(path, client="site").load(0)
        assert list(federation.clients) == ["2024-03-01", "2024-03-02", "2024-03-03"], ending
        assert {data.task.labels for data in federation.clients.values()} == {("007", "1e5", "Köln")}
        assert len(federation.notes) == 1 and federation.notes[0].startswith("left out: 20 rows of 80"), ending
        prints.add(federation.fingerprint)
    assert len(prints) == 1


TYPED = {
    "int": ([1, 20, 2**53 + 1], ["1", "20", str(2**53 + 1)]),
    "float": ([0.5, 100000.0, None], ["0.5", "100000.0", None]),
    "bool": ([True, False, None], ["true", "false", None]),
    "text": (["007", "1e5", "NaN"], ["007", "1e5", "NaN"]),
}


@pytest.mark.parametrize("kind", TYPED)
def test_types_of_a_format_become_their_characters(tmp_path, kind):
    values, expected = TYPED[kind]
    pq.write_table(pa.table({"a": values}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"a": value}) + "\n" for value in values))
    for ending in ("parquet", "jsonl"):
        assert read_table(tmp_path / f"a.{ending}").texts("a") == expected, ending
    if kind != "int":  # a number of Excel has 15 digits
        pandas.DataFrame({"a": pandas.Series(values, dtype=object)}).to_excel(tmp_path / "a.xlsx", index=False)
        found = read_table(tmp_path / "a.xlsx").texts("a")
        assert found[:2] == [text.removesuffix(".0") if kind == "float" else text for text in expected[:2]]


def test_numbers_of_json_are_the_characters_of_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1e5}\n{"a": 1.50}\n{"a": 12345678901234567890}\n{"a": NaN}\n{"a": "x"}\n{"b": [1, 2.5]}\n')
    table = read_table(path)
    assert table.texts("a") == ["1e5", "1.50", "12345678901234567890", None, "x", None]
    assert table.cells("b")[-1] == [1, 2.5]
    with pytest.raises(DataError, match=r"a\.jsonl column 'b' line 6 holds a list; text, numbers and booleans"):
        table.texts("b")


def test_classes_of_a_parquet_file_have_their_names(tmp_path):
    from datasets import ClassLabel, Dataset, Features

    rows = Dataset.from_dict({"y": [1, 0, None]}, Features({"y": ClassLabel(names=["no", "yes"])}))
    rows.to_parquet(tmp_path / "a.parquet")
    assert read_table(tmp_path / "a.parquet").texts("y") == ["yes", "no", None]
    frame = pandas.DataFrame({"y": pandas.Categorical(["b", "a", None])})
    frame.to_parquet(tmp_path / "b.parquet")
    assert read_table(tmp_path / "b.parquet").texts("y") == ["b", "a", None]


ODD = {
    "no quotes, tabs": ('a\tb\n"x\ty\nz\tsay "w"\n"p\tq\n', ["a", "b"], [['"x', "y"], ["z", 'say "w"'], ['"p', "q"]]),
    "a line break in quotes": ('a,b\r\n"x\r\ny",z\r\n', ["a", "b"], [["x\r\ny", "z"]]),
    "semicolons, decimal commas": ("a;b\n1,5;2,5\n1;2\n", ["a", "b"], [["1,5", "2,5"], ["1", "2"]]),
    "pipes": ("a|b\n1, 2|3; 4\n", ["a", "b"], [["1, 2", "3; 4"]]),
    "carriage returns alone": ("a,b\rx,y\rz,w\r", ["a", "b"], [["x", "y"], ["z", "w"]]),
    "one column": ("text\nhello, world\nwell; then\n", ["text"], [["hello, world"], ["well; then"]]),
    "one column, quoted": ('text\n"a\nb"\n', ["text"], [["a\nb"]]),
    "empty lines": ("\na,b\n\nx,y\n\n\n", ["a", "b"], [["x", "y"]]),
    "no line break at the end": ("a,b\nx,y", ["a", "b"], [["x", "y"]]),
    "a column without a name": (",b\n0,x\n", ["column 1", "b"], [["0", "x"]]),
    "blanks around names": (" a , b\nx , y\n", ["a", "b"], [["x ", " y"]]),
    "Excel's hint": ("sep=;\na;b\nx,y;z\n", ["a", "b"], [["x,y", "z"]]),
    "a separator in a name": ('"a, b";c\n1;2\n', ["a, b", "c"], [["1", "2"]]),
    "quotes after blanks": ('a, b\n"x, y", "z, w"\n', ["a", "b"], [["x, y", "z, w"]]),
    "backslash before quotes": ('a,b\n"say \\"x, y\\"",z\n', ["a", "b"], [['say "x, y"', "z"]]),
    "all quoted": ('"a"\t"b"\n"x"\t"y ""z"""\n', ["a", "b"], [["x", 'y "z"']]),
    "a zero byte": ("a,b\nx\0y,z\n", ["a", "b"], [["x\0y", "z"]]),
    "line separators of Unicode": ("a,b\nx\u2028y\x85,z\x0b\n", ["a", "b"], [["x\u2028y\x85", "z\x0b"]]),
    "nothing but a header": ("a,b\n", ["a", "b"], []),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_files_are_read_whole(name):
    text, header, rows = ODD[name]
    found = parse(text, "odd.csv", Dialect())
    assert list(found.columns) == header
    assert [list(row) for row in zip(*(c.to_pylist() for c in found.columns.values()), strict=True)] == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\nx,y\nx,y,z\nx\n", r"odd\.csv line 3 has 3 fields, the header has 2 \(fields between ','"),
        ("a,b\n\nx\n", r"odd\.csv line 3 has 1 fields, the header has 2"),
        ('a,b\n"x\ny",z\n1,2,3\n', r"odd\.csv line 4 has 3 fields, the header has 2"),
        ('a,b\n"x, z",w\nx,"y\n', r"odd\.csv line 3 has a quote that is not closed"),
        ('a,b\n"x, z",w\n"x"y,"z, w"\n', r"odd\.csv line 3 has text behind a closing quote"),
        ("a,b, a\n", r"names the column 'a' twice, at places 1 and 3; rename one of them"),
        ("\n\n", "is empty; its first line must name the columns"),
    ],
)
def test_what_cannot_be_read_whole_is_refused_with_the_line(text, message):
    with pytest.raises(DataError, match=message) as caught:
        parse(text, "odd.csv", Dialect())
    assert "\n" not in str(caught.value)


def test_lines_are_those_of_an_editor(tmp_path):
    (tmp_path / "a.csv").write_text('a,b\n"x\ny",1\n\nz,2\n')
    table = read_table(tmp_path / "a.csv")
    assert [table.place(row) for row in range(2)] == ["line 2", "line 5"]


def test_a_dialect_that_is_named_is_taken(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("a^b\n'x^y'^z\n", encoding="cp1251")
    assert read_table(path, Dialect("^", "'")).texts("a") == ["x^y"]
    assert read_table(path, Dialect("none", "none")).column_names == ["a^b"]
    assert read_table(path, Dialect("^", "'")).form == "fields between '^', quoted by ', utf-8"


TEXTS = {
    "German": ("text;label\nÄrztin prüft Größe;krank\n", "cp1252", "Windows-1252"),
    "French": ("texte;classe\nélève à l’hôpital, cœur;un\n", "cp1252", "Windows-1252"),
    "signs": ("text,label\n5 € – “quoted” … 3 m²,a\n", "cp1252", "Windows-1252"),
    "mark": ("text;a\nKöln;b\n", "utf-8-sig", "utf-8"),
    "UTF-16": ("text;a\nKöln 咳嗽;b\n", "utf-16", "utf-16"),
    "UTF-16 without a mark": ("text;a\nKöln in the west;b\n", "utf-16-be", "utf-16-be"),
    "UTF-32": ("text;a\nKöln;b\n", "utf-32", "utf-32"),
    "Russian": ("текст;класс\nболит голова;да\n", "cp1251", ""),
    "Polish": ("tekst;klasa\nżółć i łąka;źle\n", "cp1250", ""),
    "Czech": ("text;třída\nPříliš žluťoučký kůň;ano\n", "cp1250", ""),
    "Turkish": ("metin;sınıf\nçok güzel şehir;ığdır\n", "cp1254", ""),
    "Chinese": ("文本,标签\n患者咳嗽发热,是\n", "gb18030", ""),
    "Japanese": ("テキスト,ラベル\n患者は咳,はい\n", "shift_jis", ""),
    "DOS": ("text;a\nGröße für Köln;b\n", "cp850", ""),
}


@pytest.mark.parametrize("name", TEXTS)
def test_an_encoding_is_told_or_asked_for(name):
    """Never is a text of one language read as if it were of another."""
    text, codec, told = TEXTS[name]
    data = text.encode(codec)
    if told:
        assert decode(data, "a.csv") == (text, told)
    else:
        with pytest.raises(DataError, match=r"a\.csv is not UTF-8 at byte \d+ in line \d; .*--data\.encoding cp1252"):
            decode(data, "a.csv")
    assert decode(data, "a.csv", codec)[0] == text
    with pytest.raises(DataError, match="is not ascii at byte"):
        decode("ä".encode(), "a.csv", "ascii")


def test_packed_files(tmp_path):
    plain = b"text,label\nhello,a\n"
    packed = {
        "gz": gzip.compress(plain), "bz2": bz2.compress(plain), "xz": lzma.compress(plain),
        "zst": zstandard.compress(plain),
    }  # fmt: skip
    for ending, data in packed.items():
        (tmp_path / f"a.csv.{ending}").write_bytes(data)
        assert read_table(tmp_path / f"a.csv.{ending}").texts("text") == ["hello"], ending
        (tmp_path / f"b.csv.{ending}").write_bytes(data[:-9])
        with pytest.raises(DataError, match=rf"b\.csv\.{ending} cannot be read as csv"):
            read_table(tmp_path / f"b.csv.{ending}")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "hello"}\n'))
    assert read_table(tmp_path / "a.jsonl.gz").texts("text") == ["hello"]


def test_a_folder_of_files_is_one_table(tmp_path):
    """Parts in the order of their names, names of folders as columns; litter and marks are no parts."""
    for site in ("north", "south"):
        (tmp_path / f"site={site}").mkdir()
        pq.write_table(pa.table({"n": [1, 2]}), tmp_path / f"site={site}" / "part-0.parquet")
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / ".DS_Store").touch()
    table = read_table(tmp_path)
    assert table.texts("site") == ["north", "north", "south", "south"] and table.texts("n") == ["1", "2", "1", "2"]
    pq.write_table(pa.table({"m": [1]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match=r"differ in the column 'm'"):
        read_table(tmp_path)
    (tmp_path / "odd.csv").write_text("n\n1\n")
    with pytest.raises(DataError, match="of more than one kind"):
        read_table(tmp_path)


def test_an_excel_book_has_one_sheet_of_rows(tmp_path):
    book = openpyxl.Workbook()
    book.active.append(["text", "n", "day"])
    book.active.append(["a", 7, pandas.Timestamp("2024-03-01")])
    book.active.append([None, None, None])
    book.active.append(["b", 0.5, pandas.Timestamp("2024-03-01 10:30")])
    book.create_sheet("empty")
    book.save(tmp_path / "a.xlsx")
    table = read_table(tmp_path / "a.xlsx")
    assert table.texts("n") == ["7", "0.5"] and table.texts("day") == ["2024-03-01", "2024-03-01 10:30:00"]
    assert table.place(1) == "line 4"
    book["empty"].append(["x"])
    book.save(tmp_path / "a.xlsx")
    with pytest.raises(DataError, match=r"a\.xlsx has 2 sheets with rows \(Sheet, empty\); save the one"):
        read_table(tmp_path / "a.xlsx")
    (tmp_path / "b.xlsx").write_text("no workbook")
    with pytest.raises(DataError, match="cannot be read as an Excel workbook"):
        read_table(tmp_path / "b.xlsx")


def test_leaf(tmp_path):
    """The benchmark's format: a client's data under its name; lists of one length are columns."""
    told = {
        "users": ["u1", "u2"], "num_samples": [2, 1],
        "user_data": {"u1": {"x": [[0.5, 1], [2, 3]], "y": [7, 8]}, "u2": {"x": [[4, 5]], "y": [7]}},
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(told))
    table = read_table(tmp_path / "a.json")
    assert table.column_names == ["user", "x0", "x1", "y"]
    assert table.texts("user") == ["u1", "u1", "u2"] and table.texts("x0") == ["0.5", "2", "4"]
    told["user_data"]["u1"]["y"].pop()
    (tmp_path / "a.json").write_text(json.dumps(told))
    with pytest.raises(DataError, match="user 'u1' has no lists x and y of equal length"):
        read_table(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}\n{"a": 3}', "line 1 names 'a' twice in one object|names 'a' twice"),
        ('{"a": 1}\n{"a": 2,', "cannot be read as json: .* in line 2, column"),
        ('{"a": 1}\n[2]\n', "line 2 is a list, not an object"),
        ("[" * 100_000, "cannot be read as json"),
        ('{"a": {"b": 1}}', "neither an object a line, nor an array"),
    ],
)
def test_json_that_cannot_be_used(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("values", "numbers"),
    [
        (["1,5", "2", "1.234,5", ""], [1.5, 2, 1234.5, np.nan]), (["1.5", "1e3", "NA"], [1.5, 1000, np.nan]),
        (["1,234.5", "12"], [1234.5, 12]), (["1,234,567", "0.5"], [1234567, 0.5]), (["-0,25", "3.5"], [-0.25, 3.5]),
    ],
)  # fmt: skip
def test_numbers_with_commas(tmp_path, values, numbers):
    (tmp_path / "a.tsv").write_text("\n".join(["n\tb", *(f"{value}\tx" for value in values)]))
    assert np.array_equal(read_table(tmp_path / "a.tsv").numbers("n"), numbers, equal_nan=True)


@pytest.mark.parametrize("value", ["1,234", "1_000", "x", "1,2,3", "inf", "12,34,5"])
def test_what_is_no_number_or_may_be_two_is_refused(tmp_path, value):
    (tmp_path / "a.tsv").write_text(f"n\tb\n1\tx\n{value}\tx\n")
    with pytest.raises(DataError, match=r"a\.tsv column 'n' .*line 3"):
        read_table(tmp_path / "a.tsv").numbers("n")
    assert number_of("1.234", comma=False) == 1.234


def test_a_wide_table_takes_seconds(tmp_path):
    """20,000 columns of 3 rows took three quarters of an hour."""
    path = tmp_path / "wide.csv"
    columns = [f"gene{i}" for i in range(20_000)]
    path.write_text("\n".join([",".join(columns), *(",".join(["0.5"] * len(columns)) for _ in range(3))]))
    started = time.process_time()
    table = read_table(path)
    assert np.stack([table.numbers(column) for column in columns]).sum() == 30_000
    assert time.process_time() - started < 10


def test_a_long_field_is_read(tmp_path):
    (tmp_path / "a.csv").write_text(f"a,b\n{'x' * 300_000},y\n")
    assert len(read_table(tmp_path / "a.csv").texts("a")[0]) == 300_000
    assert csv.field_size_limit() == 131_072


def test_a_column_that_no_training_row_has_counts_as_zero_elsewhere():
    """Mean and deviation of 1, 3 are 2 and 1; of a column without values nothing is known, whatever comes later."""
    scale = Scale.of(("a", "b"), np.array([[1.0, np.nan], [3.0, np.nan]]))
    later = scale.standardised(np.array([[4.0, 250.0], [np.nan, -1e6]]))
    assert later[:, 0].tolist() == [2.0, 0.0] and abs(later[:, 1]).max() < 1e-20
    assert Scale.of_json(json.loads(json.dumps(dataclasses.asdict(scale)))) == scale
