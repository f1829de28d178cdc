"""Bytes out of the middle of large files, with the files kept open."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from io import FileIO

_KEPT_OPEN = 64
"""Per thread. Opening is a round trip on a shared file system; a window of the order reads from a few shards."""

_open = threading.local()


def read_span(path: str, offset: int, length: int) -> bytes:
    """`length` bytes of the file from `offset` on.

    Raises:
        OSError: the file is gone, or ends before that.
    """
    content = os.pread(_file(path).fileno(), length, offset)
    if len(content) < length:
        raise OSError(f"ends {length - len(content)} bytes early")
    return content


def _file(path: str) -> FileIO:
    files: OrderedDict[str, FileIO] = _open.__dict__.setdefault("files", OrderedDict())
    if path in files:
        files.move_to_end(path)
        return files[path]
    file = files[path] = FileIO(path)
    if len(files) > _KEPT_OPEN:
        files.popitem(last=False)[1].close()
    return file
