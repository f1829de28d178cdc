"""The page of `vlscale inspect concepts`, from what `concepts.json` holds."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from vlscale.inspect.html import document, figure, table

ABOUT = (
    "Embeddings of concepts as the encoders get them, before position and context: rows of the one table that words, "
    "tags and phrases share (Fig. 6 of the paper, appendix C.2). The paper draws common tags and the phrases that "
    "contain them, and finds phrases around the tag they contain; wide clouds for “man” and “car”, which act in many "
    "scenes, narrow ones for “clock” and “pizza”, which belong to few; and “couch”, “dog” and “cat” side by side, "
    "since they are often in one home."
)
START = (
    "A phrase’s embedding starts as the mean of its words’, so phrases lie around their tags before anything is "
    "learned. What training made of it is the difference to that start."
)


def page(content: dict[str, Any]) -> str:
    """The whole page."""
    facts = content["facts"]
    rows = [(escape(str(key)), f"<code>{escape(str(value))}</code>") for key, value in facts.items()]
    body = [
        f"<h1>{escape(str(facts['run']))}</h1>",
        f'<p class="faint">What its concepts’ embeddings learned. Step {escape(str(facts["step"]))}.</p>',
        f"<p>{escape(ABOUT)}</p>",
        *_map(content["map"]),
        *_hierarchy(content["hierarchy"]),
        *_around(content["map"]["around"]),
        *_neighbours(content["neighbours"]),
        *_vocabulary(content["vocabulary"]),
        *_data(content),
        "<h2>Where this comes from</h2>",
        table(["", ""], rows, [False, False]),
    ]
    return document(f"{facts['run']}: concepts", body)


def _map(found: dict[str, Any]) -> list[str]:
    source = "captions that the vocabulary was counted on" if found["counted"] else "captions of this data"
    kinds = (
        "Tags are words of the data’s object tags. Phrases are attributes (“red box”) and relations (“dog on "
        f"bench”), the most frequent ones in the {source}. Lines join a phrase with the tags that it is about: an "
        "attribute with its object, a relation with both. The most frequent concepts are named where there is room. "
        "t-SNE keeps neighbours together; distances between groups mean little, sizes of groups too."
    )
    parts = ["<h2>Map</h2>", figure(found["kinds"], kinds, "t-SNE of tags and phrases by kind")]
    if found["objects"]:
        objects = "The same places. Phrases have the colour of the tag they are about, for the tags with most phrases."
        parts.append(figure(found["objects"], objects, "t-SNE of phrases by their object"))
    return parts


def _hierarchy(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    numbers = [
        (f"{found['nearest']:.1%}", "of these phrases are nearest to a tag that they contain"),
        (f"{found['of_words']:.1%}", "would be, as the mean of their words"),
        (f"{found['chance']:.1%}", "by chance"),
        (f"{found['to_words']:.3f}", "mean cosine of a phrase to the mean of its words"),
        (f"{found['phrases']:,}", "phrases contain a tag of the data"),
    ]
    tiles = "".join(f"<li><b>{escape(value)}</b><span>{escape(what)}</span></li>" for value, what in numbers)
    return ["<h2>Phrases around their tags</h2>", f"<p>{escape(START)}</p>", f'<ul class="numbers">{tiles}</ul>']


def _around(found: list[dict[str, Any]]) -> list[str]:
    if not found:
        return []
    rows = [
        [escape(one["tag"]), f"{one['phrases']:,}", f"{one['together']:.3f}", f"{one['to_tag']:.3f}"] for one in found
    ]
    note = "Tags whose phrases lie closest together come first; cosines of the embeddings, over the phrases on the map."
    header = ["tag", "phrases about it", "mean cosine of two of them", "mean cosine to the tag"]
    return [f"<p>{escape(note)}</p>", table(header, rows, [False, True, True, True])]


def _neighbours(found: list[dict[str, Any]]) -> list[str]:
    rows = []
    for one in found:
        near = (
            f'<span class="whole">{escape(other["name"])} <span class="faint">{other["cosine"]:.2f}</span></span>'
            for other in one["nearest"]
        )
        rows.append([escape(one["name"]), one["kind"], f"{one['count']:,}", ", ".join(near)])
    note = (
        "Of the most frequent concepts, by cosine, among all tags of the data and all phrases of the vocabulary. Tags"
        " are counted in images, phrases in sentences."
    )
    header = ["concept", "kind", "count", "nearest concepts"]
    return ["<h2>Nearest neighbours</h2>", f"<p>{note}</p>", table(header, rows, [False, False, True, False])]


def _vocabulary(found: dict[str, Any] | None) -> list[str]:
    """Table 8."""
    if found is None:
        return ["<h2>Phrases</h2>", "<p>This run has no vocabulary of phrases.</p>"]
    origin = found["origin"]
    rows = [
        ("unique phrases", f"{found['unique_phrases']:,}"),
        ("sentences that each was found in, at least", f"{origin['min_count']:,}"),
        ("sentences counted", _number(origin["sentences"] or None, ",.0f")),
        ("all phrases", _number(found["all_phrases"], ",.0f")),
        (
            "mean / median frequency, sentences",
            f"{_number(found['mean_frequency'])} / {_number(found['median_frequency'])}",
        ),
        ("phrases per text", _number(found["per_text"], ".3f")),
        ("attributes among unique phrases", f"{found['attributes']:.1%}"),
        ("attributes among all phrases", _number(found["attribute_occurrences"], ".1%")),
        ("frequent attributes", _listed(found["frequent_attributes"])),
        ("frequent relations", _listed(found["frequent_relations"])),
        ("extractor", f"{origin['extractor']} {origin['version']}"),
    ]
    note = "Of the run’s vocabulary, on the captions it was made of (the paper’s Table 8)."
    return [
        "<h2>Phrases of the vocabulary</h2>",
        f"<p>{note}</p>",
        table(["", ""], [[escape(name), escape(value)] for name, value in rows], [False, False]),
    ]


def _data(content: dict[str, Any]) -> list[str]:
    """Table 5."""
    part = content["part"]
    if part is None:
        return []
    row = [
        escape(part["name"]),
        f"{part['images']:,}",
        f"{part['texts']:,}",
        f"{part['unique']:,}",
        f"{part['per_text']:.3f}",
        f"{part['coverage']:.1%}",
        f"{part['over_limit']:.1%}",
        escape(", ".join(part["frequent"][:6])),
    ]
    header = ["data", "images", "texts", "unique phrases", "phrases per text", "with a phrase", "over 5", "frequent"]
    note = "How the vocabulary’s phrases serve this data (the paper’s Table 5)."
    return [
        "<h2>Phrases in this data</h2>",
        f"<p>{note}</p>",
        table(header, [row], [False, True, True, True, True, True, True, False]),
        figure(
            content["frequent_picture"], "The most frequent phrases, by the texts that have them.", "frequent phrases"
        ),
    ]


def _number(value: float | None, shown: str = ",.1f") -> str:
    return "not known" if value is None else format(value, shown)


def _listed(names: Iterable[str] | None) -> str:
    return "not known" if names is None else ", ".join(names)
