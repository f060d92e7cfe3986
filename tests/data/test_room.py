"""Small files that unfold to more than the memory are refused before, or while, they are unpacked."""

import bz2
import gzip
import lzma
import tracemalloc
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from consilium.data import room
from consilium.data.columns import read_parquet
from consilium.data.table import read_table
from consilium.errors import DataError

LITTLE = 8_000_000
"""Free memory of these tests, in bytes; a file may unfold to 4 MB."""


@pytest.fixture(autouse=True)
def _a_small_machine(monkeypatch):
    monkeypatch.setattr(room, "free_memory", lambda: LITTLE)


def refused(path, reader=read_table):
    assert path.stat().st_size < 100_000
    tracemalloc.start()
    try:
        with pytest.raises(
            DataError, match=r"unfolds to [\d,]+ or more.*; 8,000,000 are free, of which half may be used"
        ):
            reader(path)
        assert tracemalloc.get_traced_memory()[1] < 40_000_000
    finally:
        tracemalloc.stop()


TEXT = b"text,label\n" + b"aaaaaaaa,b\n" * 1_000_000
PACKED = {
    "csv.gz": gzip.compress,
    "csv.bz2": bz2.compress,
    "csv.xz": lzma.compress,
    "csv.zst": zstandard.compress,
}


@pytest.mark.parametrize("ending", PACKED)
def test_a_packed_text(ending, tmp_path, monkeypatch):
    path = tmp_path / f"x.{ending}"
    path.write_bytes(PACKED[ending](TEXT))
    refused(path)
    path.write_bytes(PACKED[ending](TEXT[:11_011]))
    assert len(read_table(path)) == 1000


@pytest.mark.parametrize(
    "columns",
    [
        {"n": pa.array([7] * 1_000_000)},
        {"t": pa.array(["x" * 1000] * 10_000)},
        {"t": pa.array([b"x" * 1000] * 10_000)},
        {"t": pa.array([["x" * 1000] * 5] * 2000)},
        {"t": pa.array([{"a": "x" * 1000}] * 10_000)},
        {"t": pa.array([[("k", "x" * 1000)]] * 10_000, pa.map_(pa.string(), pa.string()))},
    ],
    ids=["rows", "texts", "bytes", "lists", "structs", "maps"],
)
def test_a_parquet_file_of_repeated_values(columns, tmp_path):
    """Dictionaries and run lengths: 8 to 10 MB in some kB."""
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table(columns), path, compression="zstd")
    refused(path)
    refused(path, lambda path: read_parquet(path, 8, "t", "", ""))


def test_a_parquet_file_with_room_is_read_though_its_longest_text_might_have_been_repeated(tmp_path):
    """A single text of 100 kB next to 9,999 short ones: 10,000 x 100 kB at worst, 0.7 MB in truth."""
    path = tmp_path / "x.parquet"
    texts = ["x" * 100_000, *[f"t{i % 50}" for i in range(9_999)], None]
    pq.write_table(pa.table({"t": texts, "n": list(range(10_001))}), path)
    assert read_table(path).texts("t") == texts


def test_a_workbook(tmp_path):
    pytest.importorskip("openpyxl")
    path = tmp_path / "x.xlsx"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/sharedStrings.xml", b"<sst>" + b" " * 6_000_000)
    refused(path)
