"""HTML of a codebook that images and texts share, from its section of `codebook.json`."""

from __future__ import annotations

from html import escape
from typing import Any

from vlscale.inspect.html import figure, table, word_shares


def codebook(name: str, section: dict[str, Any]) -> list[str]:
    """Agreement, usage, transport, the matrix of agreement, table and examples of codes, codes without use."""
    parts = [
        f"<h2>Codebook “{escape(name)}”, shared by images and texts</h2>",
        _agreement(section),
        _usage_table(section),
        figure(section["histogram"], "How often each code is chosen, sorted, on a log scale.", "usage histograms"),
        *_transport(section),
        *_matrix(section),
        "<h3>Codes, most used first</h3>",
        _code_table(section),
    ]
    drawn = [code for code in section["codes"] if "picture" in code]
    if drawn:
        note = (
            "The nearest images and captions by cosine to the code. Framed images and captions in bold choose it; "
            "the others have a code that is nearer still."
        )
        parts += ["<h3>What each code stands for</h3>", f"<p>{note}</p>"]
        parts += [_one_code(code) for code in drawn]
    return parts + _unused(section)


def _agreement(section: dict[str, Any]) -> str:
    found = section["agreement"]
    near = f"text's code among the image's {found['nearest']} nearest"
    numbers = [
        (_percent(found["share"]), f"pairs agree; by chance {_percent(found['chance'])}"),
        (_percent(found["near"]), f"{near}; by chance {_percent(found['near_chance'])}"),
        (f"{section['size'] - len(section['dead'])} of {section['size']}", "codes in use"),
        (f"{section['usage']['both']['perplexity']:.1f}", "perplexity, both together"),
        (f"{found['pairs']:,}", f"pairs of {section['images']:,} images"),
    ]
    tiles = "".join(f"<li><b>{escape(value)}</b><span>{escape(what)}</span></li>" for value, what in numbers)
    note = (
        "A pair is an image and one of its captions; it agrees where both choose the same code, the one of the highest "
        "cosine. By chance: if the captions were dealt out to the images anew."
    )
    return f'<ul class="numbers">{tiles}</ul><p>{note}</p>'


def _usage_table(section: dict[str, Any]) -> str:
    rows = []
    for kind, number in (("images", section["images"]), ("texts", section["texts"]), ("both", None)):
        usage = section["usage"][kind]
        dead = len(usage["dead"])
        row = [kind, "" if number is None else f"{number:,}", f"{usage['perplexity']:.1f}", f"{usage['entropy']:.2f}"]
        rows.append([*row, f"{section['size'] - dead}", f"{dead} ({_percent(dead / section['size'])})"])
    header = ["chosen by", "how many", "perplexity", "entropy, nats", "codes in use", "never chosen"]
    note = "<p>In “both”, images and texts weigh the same, however many captions an image has.</p>"
    return table(header, rows, [False, True, True, True, True, True]) + note


def _transport(section: dict[str, Any]) -> list[str]:
    plan = section.get("plan")
    if not plan:
        return []
    pairs, size = len(plan["pairs"]), section["size"]
    caption = (
        f"How {pairs} images, and the caption of each in the same row, are spread over the codes by optimal transport "
        "with the run's own solver: equal panels mean that both are sent to the same codes. Columns are the codes that "
        "these images and captions choose, similar ones side by side. G · T sums to 1 over all codes in a row and to "
        f"{pairs} / {size} in a column, since every code gets the same share; {_percent(plan['image_mass'])} of it "
        f"(images) and {_percent(plan['text_mass'])} (texts) is drawn. Over all codes, an image and its caption have "
        f"{_percent(plan['overlap'])} in common, any image and caption {_percent(plan['overlap_chance'])}."
    )
    return ["<h3>Transport to the codes</h3>", figure(plan["picture"], caption, "transport plans")]


def _matrix(section: dict[str, Any]) -> list[str]:
    matrix = section.get("matrix")
    if not matrix:
        return []
    held = sum(map(sum, matrix["counts"]))
    caption = (
        f"Pairs by the code of the image and the code of the text, for the {len(matrix['codes'])} most used codes, "
        f"similar ones side by side; {held:,} of {section['agreement']['pairs']:,} pairs are between these. "
        "Agreement is the diagonal."
    )
    return ["<h3>Agreement code by code</h3>", figure(matrix["picture"], caption, "agreement matrix")]


def _code_table(section: dict[str, Any]) -> str:
    header = [
        "code",
        "images",
        "texts",
        "its images’ pairs agree",
        "its texts’ pairs agree",
        "words: share (everywhere)",
    ]
    rows, rule = [], section["word_rule"]
    for code in section["codes"]:
        label = f'<a href="#code-{code["code"]}">{code["code"]}</a>' if "picture" in code else str(code["code"])
        row = [label, f"{code['images']:,}", f"{code['texts']:,}"]
        row += [_percent(code["image_agreement"]), _percent(code["text_agreement"])]
        rows.append([*row, word_shares(code["words"])])
    note = (
        "<p>Words are those of the largest log-odds: captions with the word to captions without, among the captions "
        f"that choose the code against all captions; in {rule['captions']} of the code’s captions at least, and "
        f"{rule['ratio']} times as often there as everywhere.</p>"
    )
    return note + table(header, rows, [True, True, True, True, True, False])


def _one_code(code: dict[str, Any]) -> str:
    cosines = [near["cosine"] for near in code["nearest_images"]]
    caption = f"Chosen by {code['images']:,} images and {code['texts']:,} texts. "
    if code["image_pairs"]:
        caption += f"Of the {code['image_pairs']:,} pairs whose image chooses it, {code['agreed']:,} agree. "
    caption += f"Cosines of the images shown: {cosines[0]:.3f} to {cosines[-1]:.3f}."
    rows = "".join(
        f'<tr{_chosen(near)}><td class="n">{near["cosine"]:.3f}</td><td>{escape(near["text"])}</td></tr>'
        for near in code["nearest_texts"]
    )
    words = [
        f"<p>{what}: {word_shares(found)}</p>"
        for what, found in (("Texts that choose it", code["words"]), ("Captions of its images", code["image_words"]))
        if found
    ]
    return (
        f'<section class="code" id="code-{code["code"]}"><h3>Code {code["code"]}</h3>'
        + figure(code["picture"], caption, f"images of code {code['code']}")
        + "".join(words)
        + f'<table><tr><th class="n">cosine</th><th>caption</th></tr>{rows}</table></section>'
    )


def _chosen(near: dict[str, Any]) -> str:
    return ' class="chosen"' if near["chooses"] else ""


def _unused(section: dict[str, Any]) -> list[str]:
    """Codes that nothing chooses, and those that one modality alone does."""
    images, texts = (set(section["usage"][kind]["dead"]) for kind in ("images", "texts"))
    kinds = {
        "that neither an image nor a text chose": images & texts,
        "that texts chose and no image did": images - texts,
        "that images chose and no text did": texts - images,
    }
    return [
        f"<details><summary>{len(codes)} codes {escape(what)}</summary>"
        f"<code>{', '.join(map(str, sorted(codes)))}</code></details>"
        for what, codes in kinds.items()
        if codes
    ]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"
