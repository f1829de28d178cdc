"""Folders of pictures that a command writes as a whole, in place of what it wrote before."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlscale.errors import UserError
from vlscale.interop import layout


def page_folder(result: Path, mark: str) -> Path:
    """Folder of a result file's page: its name without the ending; where something else has that name, with `.page`."""
    folder = result.with_suffix("")
    return folder if _may_be_replaced(folder, mark) else result.with_suffix(".page")


@contextmanager
def replaced(folder: Path, mark: str) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` when all went well.

    Args:
        mark: name of a file that tells such a folder from any other; it has to be written.

    Raises:
        UserError: `folder` holds something else.
    """
    if not _may_be_replaced(folder, mark):
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


def _may_be_replaced(folder: Path, mark: str) -> bool:
    """Whether there is nothing, an empty folder, or one with the mark that is no run."""
    if not folder.exists():
        return True
    return folder.is_dir() and (not any(folder.iterdir()) or (folder / mark).is_file()) and not layout.holds_run(folder)
