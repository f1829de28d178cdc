"""Folders of pictures that a command writes as a whole, in place of what it wrote before."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlscale.errors import UserError
from vlscale.interop import layout


def page_folder(result: Path) -> Path:
    """Folder of a result file's page: its name without the ending; where a run has that name, with `.page`."""
    folder = result.with_suffix("")
    return result.with_suffix(".page") if layout.holds_run(folder) else folder


@contextmanager
def replaced(folder: Path, mark: str) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` when all went well.

    Args:
        mark: name of a file that tells such a folder from any other; it has to be written.

    Raises:
        UserError: `folder` holds something else.
    """
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / mark).is_file())):
        raise UserError(f"{folder}: holds something else than such a page (no {mark} in it); give --out a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    new.mkdir()
    try:
        yield new
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
