"""The page of a codebook folder: one `index.html` beside its PNGs, without scripts or outside resources.

Everything it says is read from `codebook.json` and `reconstructions.json`, so that either command can write it anew.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

from vlscale.errors import UserError
from vlscale.inspect import patch_page, shared_page
from vlscale.inspect.html import document, figure, table
from vlscale.interop.layout import write_text

PAGE = "index.html"
CODEBOOK = "codebook.json"
RECONSTRUCTIONS = "reconstructions.json"

__all__ = ["CODEBOOK", "PAGE", "RECONSTRUCTIONS", "document", "figure", "read_json", "replaced_folder", "write_page"]


def write_page(folder: Path) -> Path:
    """Write `index.html` of a folder from the JSON files that are in it; returns it."""
    book, pictures = read_json(folder / CODEBOOK), read_json(folder / RECONSTRUCTIONS)
    facts = (book or pictures or {}).get("facts", {})
    body = [
        f"<h1>{escape(str(facts.get('run', folder.name)))}</h1>",
        f'<p class="faint">What its codebook learned. Step {escape(str(facts.get("step", "?")))}.</p>',
        *(part for name, section in (book or {}).get("codebooks", {}).items() for part in _codebook(name, section)),
        *(_reconstructions(pictures) if pictures else []),
        *(_facts(book or pictures or {})),
    ]
    page = folder / PAGE
    write_text(page, document(f"{facts.get('run', folder.name)}: codebook", body))
    return page


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` when all went well.

    What an earlier page did not write itself (reconstructions, a reader's notes) is carried over.

    Raises:
        UserError: `folder` holds something else than such a page.
    """
    written = read_json(folder / CODEBOOK)
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not _is_page(folder))):
        raise UserError(f"{folder}: holds something else than a codebook's page; give --out a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    new.mkdir()
    try:
        yield new
        ours = set((written or {}).get("files", ())) | {CODEBOOK, PAGE}
        for entry in folder.iterdir() if folder.exists() else ():
            if entry.name not in ours and not (new / entry.name).exists():
                _copy(entry, new / entry.name)
        write_page(new)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _is_page(folder: Path) -> bool:
    return (folder / CODEBOOK).is_file() or (folder / RECONSTRUCTIONS).is_file()


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy2(source, target)


def _codebook(name: str, section: dict[str, Any]) -> list[str]:
    if "agreement" in section:  # only where images and texts share the codes
        return shared_page.codebook(name, section)
    return patch_page.codebook(name, section)


def _reconstructions(pictures: dict[str, Any]) -> list[str]:
    return ["<h2>Reconstructions</h2>", figure(pictures["picture"], pictures["caption"], "reconstructions")]


def _facts(content: dict[str, Any]) -> list[str]:
    rows = [(escape(str(key)), f"<code>{escape(str(value))}</code>") for key, value in content.get("facts", {}).items()]
    return ["<h2>Where this comes from</h2>", table(["", ""], rows, [False, False])]


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a page's JSON file; None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
