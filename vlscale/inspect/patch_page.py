"""HTML of a codebook over image patches, from its section of `codebook.json`."""

from __future__ import annotations

from html import escape
from typing import Any

from vlscale.inspect.html import figure, table, word_shares


def codebook(name: str, section: dict[str, Any]) -> list[str]:
    """One codebook: numbers, histogram, overview, table, examples, index maps, patches per code, codes without use."""
    size, dead = section["size"], section["dead"]
    numbers = [
        (f"{section['perplexity']:.1f}", "perplexity"),
        (f"{section['entropy']:.2f}", "entropy, nats"),
        (f"{size - len(dead)} of {size}", "codes in use"),
        (f"{100 * len(dead) / size:.1f} %", "never chosen"),
        *([(f"{100 * section['zero_norm_share']:.1f} %", "of zero norm")] if "zero_norm" in section else []),
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
    if "index_maps" in section:
        parts += _index_maps(section["index_maps"], {code["code"] for code in drawn})
    if drawn:
        parts += ["<h3>Patches of each code</h3>", "<p>Each patch alone, then outlined in its surroundings.</p>"]
        parts += [_one_code(code) for code in drawn]
    parts += _listed(dead, "that no patch chose")
    return parts + _listed(section.get("zero_norm", []), "of (almost) zero norm")


def _listed(codes: list[int], what: str) -> list[str]:
    """Numbers of codes, folded; nothing where there are none."""
    listing = ", ".join(map(str, codes))
    summary = f"<summary>{len(codes)} codes {escape(what)}</summary>"
    return [f"<details>{summary}<code>{listing}</code></details>"] if codes else []


def _index_maps(found: dict[str, Any], drawn: set[int]) -> list[str]:
    """Legend and maps; indices that have a section of their own, `drawn`, lead there."""
    note = (
        f"Every cell in the colour of its index, the same in all of these images. There are {found['different']} "
        f"different indices in them; here are the {len(found['legend'])} most frequent ones, with their share of these "
        "images’ cells and, in brackets, of all cells. The rarer an index, the closer its colour is to another’s."
    )
    entries = "".join(_legend_entry(entry, entry["code"] in drawn) for entry in found["legend"])
    maps = "".join(
        figure(
            entry["picture"],
            f"{entry['caption']} ({entry['different']} different indices in {entry['cells']} cells)",
            "an image and its index map",
        )
        for entry in found["maps"]
    )
    picture = f'<a href="{escape(found["picture"])}">The legend as a picture</a>'
    return [
        "<h3>Index maps</h3>",
        f"<p>{escape(note)}</p>",
        f'<ul class="legend">{entries}</ul>',
        f'<p class="faint">{picture}</p>',
        f'<div class="maps">{maps}</div>',
    ]


def _legend_entry(entry: dict[str, Any], linked: bool) -> str:
    number = f'<a href="#code-{entry["code"]}">{entry["code"]}</a>' if linked else str(entry["code"])
    shares = f'{100 * entry["share"]:.1f} % <span class="faint">({100 * entry["everywhere"]:.1f} %)</span>'
    return f'<li><i style="background: {escape(entry["colour"])}"></i><b>{number}</b> {shares}</li>'


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
