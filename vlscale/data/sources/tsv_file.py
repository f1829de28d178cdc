"""TSV files with an offset per line beside them, as VinVL and Oscar use them: any row without reading those before."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from vlscale.errors import UserError

_KEY_BYTES = 512
"""Read at once in search of a row's first column: rows are huge, keys are not."""


class TsvFile:
    """Rows of a TSV by number or by key; where no .lineidx lies beside it, one is made in memory.

    The file is opened for every read, so that it can be handed to other processes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._starts: array[int] | None = None
        self._rows: dict[bytes, int] | None = None

    def __len__(self) -> int:
        return len(self._index()) - 1

    def __getitem__(self, number: int) -> list[bytes]:
        """The columns of a row, counted from 0.

        Raises:
            IndexError: there is no such row.
            UserError: the file can't be read, or its .lineidx is another file's.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"{self.path} has {len(self)} rows, no row {number}")
        with self._open() as file:
            return self._line(file, number).rstrip(b"\r\n").split(b"\t")

    def row_of(self, key: bytes) -> int | None:
        """Number of the first row whose first column is `key`; reads every row's key when first asked.

        Raises:
            UserError: see __getitem__.
        """
        if self._rows is None:
            self._rows = {}
            with self._open() as file:
                for number, start in enumerate(self._index()[:-1]):
                    self._rows.setdefault(_first_column(file, start), number)
        return self._rows.get(key)

    def lines(self) -> Iterator[tuple[int, int, bytes]]:
        """Number (from 1), offset and content of every line that is not blank, one after the other.

        Raises:
            UserError: the file can't be read.
        """
        offset = 0
        with self._open() as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, offset, line.rstrip(b"\r\n")
                offset += len(line)

    def _open(self) -> BinaryIO:
        try:
            return self.path.open("rb")
        except OSError as error:
            raise UserError(f"{self.path}: can't be read ({error.strerror or error}); expected a TSV file") from None

    def _index(self) -> array[int]:
        """Where every row starts, then the file's size."""
        if self._starts is None:
            beside = self.path.with_suffix(".lineidx")
            with self._open() as file:
                starts = self._published(beside) if beside.is_file() else array("q", _starts(file))
                starts.append(os.fstat(file.fileno()).st_size)
                self._starts = starts
                if len(self):  # the first and the last row tell whether it is this file's at all
                    self._line(file, 0)
                    self._line(file, len(self) - 1)
        return self._starts

    def _published(self, beside: Path) -> array[int]:
        """The offsets in a .lineidx."""
        try:
            starts = array("q", map(int, beside.read_bytes().split()))
        except (OSError, ValueError, OverflowError):
            raise UserError(f"{beside}: expected a byte offset a line; delete the file to do without") from None
        if not starts or starts[0] or any(later <= earlier for earlier, later in pairwise(starts)):
            raise UserError(f"{beside}: expected offsets from 0 upwards; delete the file to do without")
        return starts

    def _line(self, file: BinaryIO, number: int) -> bytes:
        """The row's bytes, if it starts and ends where lines do."""
        start, end = self._index()[number : number + 2]
        before = min(start, 1)  # a byte that belongs to the row before, and ends it
        file.seek(start - before)
        content = file.read(max(0, end - start + before))
        line = content[before:]
        fits = len(line) == end - start and content[:before] in {b"", b"\n"}
        ends = {len(line) - 1} if number < len(self) - 1 else {len(line) - 1, -1}
        if not fits or line.find(b"\n") not in ends:
            beside = self.path.with_suffix(".lineidx")
            raise UserError(f"{beside}: row {number + 1} of {self.path} is not where it says; delete or remake it")
        return line


def _starts(file: BinaryIO) -> Iterator[int]:
    """Offset of every line."""
    offset = 0
    for line in file:
        yield offset
        offset += len(line)


def _first_column(file: BinaryIO, start: int) -> bytes:
    file.seek(start)
    key = b""
    while content := file.read(_KEY_BYTES):
        column, end, _ = content.replace(b"\n", b"\t").partition(b"\t")
        key += column
        if end:
            break
    return key
