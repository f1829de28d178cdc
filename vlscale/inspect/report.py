"""The page of a codebook folder: one `index.html` beside its PNGs, without scripts or outside resources.

Everything it says is read from `codebook.json` and `reconstructions.json`, so that either command can write it anew.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

from vlscale.errors import UserError
from vlscale.interop.layout import write_text

PAGE = "index.html"
CODEBOOK = "codebook.json"
RECONSTRUCTIONS = "reconstructions.json"

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222831; background: #fff; margin: 2rem auto; max-width: 1180px;
  padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; }
h3 { font-size: 1.02rem; margin: 1.8rem 0 .3rem; }
p, figcaption { color: #4a5360; max-width: 62rem; } figure { margin: 1rem 0; } img { max-width: 100%; height: auto; }
figure img { border: 1px solid #e4e7eb; border-radius: 6px; background: #fff; }
.numbers { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; padding: 0; list-style: none; }
.numbers li { border: 1px solid #e4e7eb; border-radius: 8px; padding: .55rem 1rem; min-width: 7.5rem; }
.numbers b { display: block; font-size: 1.35rem; font-weight: 600; }
.numbers span { color: #687280; font-size: .85rem; }
table { border-collapse: collapse; font-size: .92rem; } th { text-align: left; font-weight: 600; color: #4a5360; }
th, td { padding: .28rem 1rem .28rem 0; border-bottom: 1px solid #eceff2; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
a { color: #1f5fa8; }
.faint { color: #7b8591; } .whole { white-space: nowrap; }
details { margin: .8rem 0; } code { font-size: .9em; overflow-wrap: anywhere; }
.code { border-top: 1px solid #eceff2; padding-top: .4rem; }
"""


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


def document(title: str, body: Iterable[str]) -> str:
    """A whole HTML page; `title` is escaped here, the body's parts are HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def figure(source: str, caption: str, alt: str) -> str:
    """An image with a caption; all three are escaped."""
    return (
        f'<figure><a href="{escape(source)}"><img src="{escape(source)}" alt="{escape(alt)}"></a>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[bool]) -> str:
    """A table of cells that are HTML already."""
    kind = [' class="n"' if right else "" for right in numeric]
    head = "".join(f"<th{k}>{escape(name)}</th>" for k, name in zip(kind, header, strict=True))
    lines = ["".join(f"<td{k}>{cell}</td>" for k, cell in zip(kind, row, strict=True)) for row in rows]
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


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
        rows.append(row + [_shares(code["words"])] * worded + [_shares(code["tags"])] * tagged)
    note = (
        "<p>In whose boxes the centres of a code's patches fall (the smallest box that holds them) more often than "
        "patches do everywhere; the largest excess first.</p>"
    )
    return (note if tagged else "") + table(header, rows, [True, True, True, False, False][: len(header)])


def _shares(shares: list[dict[str, Any]]) -> str:
    def one(item: dict[str, Any]) -> str:
        everywhere = f'<span class="faint">({100 * item["everywhere"]:.0f} %)</span>'
        return f'<span class="whole">{escape(item["tag"])} {100 * item["share"]:.0f} % {everywhere}</span>'

    return ", ".join(map(one, shares))


def _one_code(code: dict[str, Any]) -> str:
    caption = f"{code['count']:,} patches, {100 * code['share']:.2f} % of all, in {code['images']:,} images"
    shares = _shares(code["words"] or code["tags"])
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
