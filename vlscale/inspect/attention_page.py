"""The page of `vlscale inspect attention`, from what `attention.json` holds."""

from __future__ import annotations

from html import escape
from typing import Any

from vlscale.inspect.html import document, figure, table

ABOUT = (
    "Attention inside the encoders, as in Fig. 4 of the paper. Phrases are tokens of their own behind the words, and "
    "tags stand before the regions. In the textual encoder a phrase should gather the words that say it; in the "
    "visual one a region should find its tag, which the text has words for too; in the multimodal encoder phrases and "
    "words look for regions. The paper’s point is that a word such as “area” alone finds the wrong region, and the "
    "right one through a phrase."
)
READING = (
    "Numbers are attention probabilities; a row sums to 100 % over everything that the encoder sees; the tables say "
    "how much of it the pictures leave out. Pieces of one word or tag are added up. Widths and colours have a scale of "
    "their own in every panel."
)


def page(content: dict[str, Any]) -> str:
    """The whole page."""
    facts = content["facts"]
    notes = [f"<p><b>{escape(note)}</b></p>" for note in content["notes"]]
    skipped = [f'<p class="faint">Left out: {escape(reason)}</p>' for reason in content["skipped"]]
    rows = [(escape(str(key)), f"<code>{escape(str(value))}</code>") for key, value in facts.items()]
    body = [
        f"<h1>{escape(str(facts['run']))}</h1>",
        f'<p class="faint">Who attends to whom. {escape(content["settings"])}.</p>',
        f"<p>{escape(ABOUT)}</p><p>{escape(READING)}</p>",
        *notes,
        *(part for pair in content["pairs"] for part in _pair(pair)),
        *skipped,
        "<h2>Where this comes from</h2>",
        table(["", ""], rows, [False, False]),
    ]
    return document(f"{facts['run']}: attention", body)


def _pair(pair: dict[str, Any]) -> list[str]:
    looking = "phrases" if pair["phrases"] else "words, as the vocabulary has no phrase of this caption,"
    captions = {
        "regions": f"Regions of the image, and how much the {looking} attend to each in the multimodal encoder: the "
        "thicker and redder, the more; the two strongest say their share.",
        "lists": "Phrases and words in the textual encoder, regions and tags in the visual one; in brackets the share "
        "of the strongest line. Regions are named where a box of the data covers the same place.",
        "matrix": "What each region gets of a phrase’s or word’s attention in the multimodal encoder.",
    }
    shares = [
        (escape(who), ", ".join(f"{escape(what)} {share:.0%}" for what, share in parts.items()))
        for who, parts in pair["shares"].items()
    ]
    return [
        f"<h2>{escape(pair['caption'])}</h2>",
        f'<p class="faint">Sample {escape(pair["sample"])}</p>',
        *(figure(pair["pictures"][name], text, f"{name}: {pair['caption']}") for name, text in captions.items()),
        table(["who looks", "at what, on average"], shares, [False, False]),
    ]
