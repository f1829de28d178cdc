"""Rows of a TSV by number and key, with and without published offsets."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from tests.data.sources.layouts import write
from vlscale.data.sources.tsv_file import TsvFile
from vlscale.errors import UserError

CONTENT = b"a\t1\tx\nbb\t2\t" + b"y" * 2000 + b"\r\n" + b"k" * 1500 + b"\t3\nbb\t4"
STARTS = "0\n6\n2013\n3516\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "features.tsv", CONTENT)


@pytest.mark.parametrize("starts", [None, STARTS])
def test_rows(file: Path, starts: str | None) -> None:
    if starts is not None:
        write(file.with_suffix(".lineidx"), starts)
    rows = TsvFile(file)
    assert len(rows) == 4
    assert rows[3] == [b"bb", b"4"]
    assert rows[0] == [b"a", b"1", b"x"]
    assert rows[1][2] == b"y" * 2000
    assert [rows.row_of(key) for key in (b"a", b"bb", b"k" * 1500, b"none")] == [0, 1, 2, None]
    for number in (-1, 4):
        with pytest.raises(IndexError, match="has 4 rows"):
            rows[number]
    assert pickle.loads(pickle.dumps(rows))[3] == rows[3]


def test_lines_in_turn_know_their_offsets(file: Path) -> None:
    found = list(TsvFile(file).lines())
    assert [(number, offset) for number, offset, _ in found] == [(1, 0), (2, 6), (3, 2013), (4, 3516)]
    assert all(CONTENT[offset:].startswith(line) for _, offset, line in found)
    assert found[1][2].endswith(b"y")


@pytest.mark.parametrize(
    "starts",
    ["", "x\n", "0\n6\n", "6\n2013\n3516\n", "0\n2013\n6\n3516\n", "0\n6\n2013\n3517\n", "0\n6\n2013\n99999\n"],
)
def test_offsets_of_another_file_are_refused(file: Path, starts: str) -> None:
    beside = write(file.with_suffix(".lineidx"), starts)
    with pytest.raises(UserError) as caught:
        len(TsvFile(file))
    assert str(caught.value).startswith(f"{beside}: ")


def test_an_offset_in_the_middle_that_is_wrong_is_found_when_its_row_is_read(file: Path) -> None:
    write(file.with_suffix(".lineidx"), STARTS.replace("2013", "2000"))
    rows = TsvFile(file)
    assert rows[0] == [b"a", b"1", b"x"]
    for number in (1, 2):
        with pytest.raises(UserError, match=r"features\.lineidx: row \d of .* is not where it says"):
            rows[number]


def test_an_empty_file_and_none(tmp_path: Path) -> None:
    assert len(TsvFile(write(tmp_path / "a.tsv", ""))) == 0
    with pytest.raises(UserError, match=r"b\.tsv: can't be read"):
        len(TsvFile(tmp_path / "b.tsv"))
