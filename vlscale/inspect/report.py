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
from vlscale.inspect import shared_page
from vlscale.inspect.html import document, figure, table, word_shares
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
    """One codebook: numbers, histogram, overview, table, examples, pages per code, dead codes."""
    if "agreement" in section:  # only where images and texts share the codes
        return shared_page.codebook(name, section)
    size, dead = section["size"], section["dead"]
    numbers = [
        (f"{section['perplexity']:.1f}", "perplexity"),
        (f"{section['entropy']:.2f}", "entropy, nats"),
        (f"{size - len(dead)} of {size}", "codes in use"),
        (f"{100 * len(dead) / size:.1f} %", "never chosen"),
        (f"{section['codes_per_image']:.1f}", "different codes per image"),
        (f"{section['patches']:,}", f"patches of {section['images']:,} images"),
    ]
    tiles = "".join(f"<li><b>{escape(value)}</b><span>{escape(what)}</span></li>" for value, what in numbers)
    parts = [f"<h2>Codebook “{escape(name)}”</h2>", f'<ul class="numbers">{tiles}</ul>']
    parts.append(
        figure(section["histogram"], "How often each code is chosen, sorted, on a log scale.", "usage histogram")
    )
    if "overview" in section:
        caption = "A random draw of the patches of each code, outlined in their surroundings; rows are codes."
        parts += ["<h3>Codes at a glance</h3>", figure(section["overview"], caption, "overview of codes")]
    parts += ["<h3>Codes, most used first</h3>", _code_table(section)]
    if "examples" in section:
        caption = (
            "Held-out images and the codes of their cells. Similar codes have similar colours: the three main "
            "directions of the codebook, as red, green and blue."
        )
        parts += ["<h3>Images as codes</h3>", figure(section["examples"], caption, "images as codes")]
    drawn = [code for code in section["codes"] if "picture" in code]
    if drawn:
        parts += ["<h3>Patches of each code</h3>", "<p>Each patch alone, then outlined in its surroundings.</p>"]
        parts += [_one_code(code) for code in drawn]
    if dead:
        listing = ", ".join(map(str, dead))
        parts.append(
            f"<details><summary>{len(dead)} codes that no patch chose</summary><code>{listing}</code></details>"
        )
    return parts


def _code_table(section: dict[str, Any]) -> str:
    tagged = any(code["tags"] for code in section["codes"])
    worded = any(code["words"] for code in section["codes"])
    header = ["code", "patches", "share"] + ["word: share (everywhere)"] * worded + ["tag: share (everywhere)"] * tagged
    rows = []
    for code in section["codes"]:
        label = f'<a href="#code-{code["code"]}">{code["code"]}</a>' if "picture" in code else str(code["code"])
        row = [label, f"{code['count']:,}", f"{100 * code['share']:.2f} %"]
        rows.append(row + [word_shares(code["words"])] * worded + [word_shares(code["tags"])] * tagged)
    note = (
        "<p>In whose boxes the centres of a code's patches fall (the smallest box that holds them) more often than "
        "patches do everywhere; the largest excess first.</p>"
    )
    return (note if tagged else "") + table(header, rows, [True, True, True, False, False][: len(header)])


def _one_code(code: dict[str, Any]) -> str:
    caption = f"{code['count']:,} patches, {100 * code['share']:.2f} % of all, in {code['images']:,} images"
    shares = word_shares(code["words"] or code["tags"])
    return (
        f'<section class="code" id="code-{code["code"]}"><h3>Code {code["code"]}</h3>'
        + figure(code["picture"], caption, f"patches of code {code['code']}")
        + (f"<p>{shares}</p>" if shares else "")
        + "</section>"
    )


def _reconstructions(pictures: dict[str, Any]) -> list[str]:
    return ["<h2>Reconstructions</h2>", figure(pictures["picture"], pictures["caption"], "reconstructions")]


def _facts(content: dict[str, Any]) -> list[str]:
    rows = [(escape(str(key)), f"<code>{escape(str(value))}</code>") for key, value in content.get("facts", {}).items()]
    return ["<h2>Where this comes from</h2>", table(["", ""], rows, [False, False])]


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a page's JSON file; None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
