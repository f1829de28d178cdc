"""Pieces of a page: the frame, figures, tables. Without scripts or outside resources."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

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
table { border-collapse: collapse; font-size: .92rem; display: block; max-width: 100%; overflow-x: auto;
  margin-bottom: .8rem; } th { text-align: left; font-weight: 600; color: #4a5360; }
th, td { padding: .28rem 1rem .28rem 0; border-bottom: 1px solid #eceff2; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
a { color: #1f5fa8; }
td .shares { display: inline-block; min-width: 18rem; }
.faint { color: #7b8591; } .whole { white-space: nowrap; }
details { margin: .8rem 0; } code { font-size: .9em; overflow-wrap: anywhere; }
.chosen td { color: #222831; font-weight: 600; }
.legend { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .35rem 1rem; padding: 0;
  list-style: none; font-size: .92rem; font-variant-numeric: tabular-nums; }
.legend i { display: inline-block; width: 1.05em; height: 1.05em; margin-right: .4em; vertical-align: -.15em;
  border: 1px solid #0003; border-radius: 3px; }
.maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 0 1.4rem; }
.code { border-top: 1px solid #eceff2; padding-top: .4rem; }
"""


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


def word_shares(shares: Sequence[dict[str, Any]]) -> str:
    """Words or tags with their share here and, in brackets, everywhere, as HTML."""

    def one(item: dict[str, Any]) -> str:
        everywhere = f'<span class="faint">({100 * item["everywhere"]:.0f} %)</span>'
        return f'<span class="whole">{escape(item["tag"])} {100 * item["share"]:.0f} % {everywhere}</span>'

    return f'<span class="shares">{", ".join(map(one, shares))}</span>' if shares else ""
