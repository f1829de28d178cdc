"""What concepts' embeddings learned: tags and phrases on a map, their neighbours, statistics (MVPTR, sections 4.5.2,
C.1, C.2; Fig. 6, Tables 5 and 8)."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vlscale.data.concepts import PhraseRows, load_phrases
from vlscale.data.phrases.statistics import summarise
from vlscale.data.phrases.vocabulary import PhraseVocabulary
from vlscale.errors import UserError
from vlscale.inspect import concept_pictures as draw
from vlscale.inspect.concept_places import FEWEST, AroundTag, around_tags, hierarchy, neighbours, tsne
from vlscale.inspect.concept_table import ConceptTable, Kind, concept_table
from vlscale.inspect.concepts_page import page
from vlscale.inspect.folders import replaced
from vlscale.inspect.usage import MAX_IMAGES, some_samples
from vlscale.interop.layout import write_json, write_text
from vlscale.interop.run import Run, load_run, run_samples
from vlscale.systems.concept_attention import as_reader

FOLDER, PAGE, CONTENT = "concepts", "index.html", "concepts.json"
TAGS = 60
"""Tags on the map, the most frequent."""
LABELLED: dict[Kind, int] = {"tag": 40, "attribute": 20, "relation": 20}
"""Concepts to name on the map where there is room, of each kind."""
LISTED: dict[Kind, int] = {"tag": 20, "attribute": 12, "relation": 12}
"""Concepts whose neighbours are listed."""
NEIGHBOURS = 6
COLOURED = 12
"""Tags whose phrases have a colour of their own, those with most phrases."""


def inspect_concepts(
    source: str,
    *,
    data: str | None = None,
    split: str | None = None,
    image_root: str | None = None,
    count: int = 400,
    out: Path | None = None,
) -> Path:
    """Map the embeddings of tags and phrases by t-SNE, list their neighbours and the phrases' statistics.

    Args:
        source: run folder or checkpoint folder.
        count: phrases on the map, the most frequent; TAGS tags join them.
        out: folder of the page, default `concepts/` in the run folder; replaced as a whole.

    Returns:
        Its `index.html`.

    Raises:
        UserError: the system reads no concepts, there are too few, the vocabulary can't read the captions, or `out`
            holds something else.
    """
    run = load_run(source)
    system = as_reader(run.system, source)
    split_name, samples = run_samples(run, data, split, image_root)
    seen = some_samples(samples, MAX_IMAGES)
    concepts = run.recipe.data.concepts
    assert concepts is not None
    phrases = load_phrases(concepts)
    table = concept_table(seen, phrases, run.tokenizer, system.concept_rows(), split_name)
    rows = [*table.of_kind("tag")[:TAGS], *table.of_kind("attribute", "relation")[:count]]
    if len(rows) < FEWEST:
        raise UserError(f"{source}: {len(rows)} tags and phrases in split {split_name}; a map needs {FEWEST}")
    facts = _facts(run, split_name, len(seen), len(samples))
    with replaced(out or run.folder / FOLDER, CONTENT) as folder:
        content = {
            "facts": facts,
            "map": _map(folder, table, rows, f"{facts['run']}, step {run.step}"),
            "hierarchy": None if (found := hierarchy(table)) is None else asdict(found),
            "neighbours": _neighbours(table),
            "vocabulary": None if phrases is None else _vocabulary(phrases),
            **_data(folder, table, f"Most frequent phrases in {len(seen):,} images of split {split_name}"),
        }
        write_json(folder / CONTENT, content)
        write_text(folder / PAGE, page(content))
    return (out or run.folder / FOLDER) / PAGE


def _map(folder: Path, table: ConceptTable, rows: list[int], title: str) -> dict[str, Any]:
    """Both pictures of the map, and the places it gives to the concepts."""
    concepts = [table.concepts[row] for row in rows]
    places = tsne(table.unit[rows])
    title = f"t-SNE of {len(rows)} concepts’ embeddings by cosine. {title}"
    at = {row: place for place, row in enumerate(rows)}
    wanted = [at[row] for kind, most in LABELLED.items() for row in table.of_kind(kind)[:most] if row in at]
    kinds, objects = "kinds.png", "objects.png"
    draw.draw_kinds(concepts, places, wanted, title, folder / kinds)
    around = around_tags(table, [row for row in rows if table.concepts[row].kind == "tag"], rows)
    largest = sorted(around, key=lambda one: -len(one.phrases))[:COLOURED]
    if largest:
        of_map = [replace(one, tag=at[one.tag], phrases=[at[row] for row in one.phrases]) for one in largest]
        draw.draw_objects(concepts, places, of_map, title, folder / objects)
    return {
        "kinds": kinds,
        "objects": objects if largest else None,
        "around": [_around(table, one) for one in around],
        "counted": table.counted,
        "concepts": [
            {"name": concept.name, "kind": concept.kind, "count": concept.count, "place": place.tolist()}
            for concept, place in zip(concepts, places, strict=True)
        ],
    }


def _around(table: ConceptTable, one: AroundTag) -> dict[str, Any]:
    name = table.concepts[one.tag].name
    return {"tag": name, "phrases": len(one.phrases), "to_tag": one.to_tag, "together": one.together}


def _neighbours(table: ConceptTable) -> list[dict[str, Any]]:
    """The nearest concepts of the most frequent ones, among all of the data's tags and the vocabulary's phrases."""
    found = []
    for kind, most in LISTED.items():
        for row in table.of_kind(kind)[:most]:
            near = neighbours(table, row, NEIGHBOURS)
            concept = table.concepts[row]
            found.append(
                {
                    "name": concept.name,
                    "kind": kind,
                    "count": concept.count,
                    "nearest": [
                        {"name": table.concepts[other].name, "kind": table.concepts[other].kind, "cosine": cosine}
                        for other, cosine in near
                    ],
                }
            )
    return found


def _vocabulary(phrases: PhraseRows) -> dict[str, Any]:
    """The vocabulary's own numbers (Table 8); how often its phrases come is None where its file does not tell."""
    origin = phrases.vocabulary.origin
    counts = [phrase.count for phrase in phrases.concepts]
    found = summarise(PhraseVocabulary(phrases.concepts, origin), (), counts)
    numbers = {name: getattr(found, name) for name in ("unique_phrases", "attributes")}
    known = ("all_phrases", "mean_frequency", "median_frequency", "attribute_occurrences")
    lists = ("frequent_attributes", "frequent_relations")  # in the order of the file, which is that of frequency
    numbers |= {name: getattr(found, name) if any(counts) else None for name in (*known, *lists)}
    per_text = found.all_phrases / origin.sentences if origin.sentences else None
    return numbers | {"per_text": per_text, "origin": asdict(origin)}


def _data(folder: Path, table: ConceptTable, title: str) -> dict[str, Any]:
    """Statistics of this data's phrases (Table 5), and a picture of the most frequent ones."""
    if table.part is None:
        return {"part": None}
    draw.draw_frequent(table, title, folder / "frequent.png")
    return {"part": asdict(table.part), "frequent": table.frequent, "frequent_picture": "frequent.png"}


def _facts(run: Run, split: str, seen: int, available: int) -> dict[str, Any]:
    return {
        "run": run.folder.resolve().name,
        "checkpoint": run.checkpoint.name,
        "step": run.step,
        "split": split,
        "images": f"{seen} of {available}",
    }
