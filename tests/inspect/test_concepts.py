"""Concepts on a map: the right rows under the right names, neighbours and statistics, the same picture every time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests import small_run
from tests.inspect.concept_run import COLOURS, SHAPES, make_run
from vlscale.data.concepts import PhraseRows, load_phrases
from vlscale.data.phrases import Origin, PhraseConcept, PhraseVocabulary
from vlscale.errors import UserError
from vlscale.inspect.concept_places import FEWEST, around_tags, hierarchy, neighbours, tsne
from vlscale.inspect.concept_table import Concept, ConceptTable, concept_table
from vlscale.inspect.concepts import CONTENT, inspect_concepts
from vlscale.interop.run import Run, load_run, run_samples
from vlscale.systems.concept_attention import as_reader


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("concepts"))


@pytest.fixture(scope="module")
def made(run: Path) -> Run:
    return load_run(run)


def phrases_of(made: Run) -> PhraseRows:
    assert made.recipe.data.concepts is not None
    found = load_phrases(made.recipe.data.concepts)
    assert found is not None
    return found


def table_of(made: Run, phrases: PhraseRows | None) -> ConceptTable:
    rows = as_reader(made.system, "run").concept_rows()
    return concept_table(run_samples(made, None, None)[1], phrases, made.tokenizer, rows, "test")


def content_of(page: Path) -> dict[str, Any]:
    return json.loads((page.parent / CONTENT).read_text(encoding="utf-8"))


def by_hand(vectors: list[list[float]], names: str) -> ConceptTable:
    """Concepts at given places; of two words an attribute, of three a relation."""
    concepts = []
    for name in names.split(", "):
        words = name.split()
        kind = ("tag", "attribute", "relation")[len(words) - 1]
        concepts.append(Concept(name, kind, 1, (words[0], words[-1]) if len(words) == 3 else (words[-1],)))  # type: ignore[arg-type]
    unit = np.array(vectors, dtype=np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    return ConceptTable(concepts, unit, np.roll(unit, 1, axis=0), None, {}, True)


def test_rows_of_the_table_have_the_right_names(made: Run) -> None:
    phrases = phrases_of(made)
    table = table_of(made, phrases)
    words, embedded = (part.detach() for part in as_reader(made.system, "run").concept_rows())
    names = [concept.name for concept in table.concepts]
    tags = table.of_kind("tag")
    assert {names[row] for row in tags} == {*COLOURS, *SHAPES}
    assert tags == list(range(len(tags)))
    for row, concept in enumerate(table.concepts):
        if concept.kind == "tag":
            ids = made.tokenizer.pieces([concept.name])[0].ids
            raw = words[ids].mean(0)
        else:
            raw = embedded[phrases.texts.index(concept.name)]
            start = words[made.tokenizer.pieces([concept.name])[0].ids].mean(0)
            np.testing.assert_allclose(table.of_words[row], start / start.norm(), atol=1e-5)
        np.testing.assert_allclose(table.unit[row], raw / raw.norm(), atol=1e-5)
    assert {names[row] for row in table.of_kind("attribute", "relation")} == set(phrases.texts)


def test_frequencies_are_those_of_the_data(made: Run) -> None:
    phrases = phrases_of(made)
    table = table_of(made, phrases)
    samples = run_samples(made, None, None)[1]
    for concept in table.concepts:
        if concept.kind == "tag":
            own = [sum(concept.name in tag.split() for tag in sample.tags) > 0 for sample in samples]
            assert concept.count == sum(own)
    texts = [phrases.of_caption(caption) for sample in samples for caption in sample.captions]
    assert table.part is not None
    assert table.part.texts == len(texts) == 23
    assert table.part.per_text == pytest.approx(np.mean([len(text) for text in texts]))
    assert table.part.unique == len(phrases)
    for found in table.frequent.values():
        for name, count in found:
            assert count == sum(phrases.texts.index(name) in text for text in texts)
    counts = [count for _, count in table.frequent["attribute"]]
    assert counts == sorted(counts, reverse=True)


def test_a_vocabulary_without_counts_takes_the_datas(made: Run) -> None:
    """MVPTR's public file, with the tokenizer's words before the phrases."""
    concepts = [PhraseConcept(0, "the", ("the",), 0), PhraseConcept(1, "red", ("red",), 0)]
    texts = phrases_of(made).texts
    concepts += [PhraseConcept(9 + number, text, tuple(text.split()), 0) for number, text in enumerate(texts)]
    extractor = phrases_of(made).vocabulary.origin
    origin = Origin(extractor.extractor, extractor.version, 0, 0, "")
    public = PhraseRows(PhraseVocabulary(concepts, origin, words=9))
    assert public.texts == texts
    table = table_of(made, public)
    assert not table.counted
    assert table.part is not None
    assert table.part.frequent[0] in texts
    counts = [concept.count for concept in table.concepts if concept.kind != "tag"]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == max(count for found in table.frequent.values() for _, count in found) > 0


def test_without_phrases_there_are_tags(made: Run) -> None:
    table = table_of(made, None)
    assert {concept.kind for concept in table.concepts} == {"tag"}
    assert table.part is None
    assert hierarchy(table) is None


def test_neighbours_are_the_nearest_by_cosine() -> None:
    table = by_hand([[1, 0], [0, 1], [1, 0.2], [1, 3], [-1, 0]], "box, dog, red box, red dog, no dog")
    assert [row for row, _ in neighbours(table, 0, 3)] == [2, 3, 1]
    assert neighbours(table, 0, 1)[0][1] == pytest.approx(1 / np.sqrt(1.04))
    assert neighbours(table, 0, 1)[0][0] != 0


def test_phrases_around_their_tags() -> None:
    vectors: list[list[float]] = [[1, 0], [0, 1], [1, 0.1], [1, 0.5], [0.2, 1], [1, 0.9]]
    table = by_hand(vectors, "box, dog, red box, big box, big dog, dog on box")
    found = hierarchy(table)
    assert found is not None
    assert found.phrases == 4
    assert found.nearest == 1.0
    assert found.chance == pytest.approx((1 + 1 + 1 + 2) / 8)
    pairs = [float(table.of_words[row] @ table.unit[row]) for row in range(2, 6)]
    assert found.to_words == pytest.approx(np.mean(pairs))
    wrong = by_hand([[1, 0], [0, 1], [0, 1], [0.1, 1], [1, 0], [1, 0.9]], "box, dog, red box, big box, big dog, x on y")
    assert hierarchy(wrong).nearest == 0.0  # type: ignore[union-attr]

    around = {table.concepts[one.tag].name: one for one in around_tags(table, [0, 1], [2, 3, 4, 5])}
    assert around["box"].phrases == [2, 3, 5]
    assert around["dog"].phrases == [4, 5]
    cosines = [table.unit[a] @ table.unit[b] for a, b in ((2, 3), (2, 5), (3, 5))]
    assert around["box"].together == pytest.approx(np.mean(cosines), abs=1e-6)
    to_tag = [table.unit[row] @ table.unit[0] for row in (2, 3, 5)]
    assert around["box"].to_tag == pytest.approx(np.mean(to_tag), abs=1e-6)
    assert [one.together for one in around.values()] == sorted((one.together for one in around.values()), reverse=True)


def test_the_map_keeps_groups_together_and_is_the_same_every_time() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 16, generator=generator).repeat_interleave(12, 0)
    vectors = torch.nn.functional.normalize(centres + 0.2 * torch.randn(36, 16, generator=generator), dim=1).numpy()
    places = tsne(vectors)
    assert places.shape == (36, 2)
    assert np.array_equal(places, tsne(vectors))
    apart = np.linalg.norm(places[:, None] - places, axis=2)
    np.fill_diagonal(apart, np.inf)
    assert (apart.argmin(axis=1) // 12 == np.arange(36) // 12).all()
    assert np.isfinite(tsne(vectors[:FEWEST])).all()


def test_a_page_of_a_run(run: Path) -> None:
    page = inspect_concepts(str(run))
    assert page == run / "concepts" / "index.html"
    content = content_of(page)
    first = {file.name: file.read_bytes() for file in page.parent.iterdir()}
    assert set(first) == {"index.html", CONTENT, "kinds.png", "objects.png", "frequent.png"}
    inspect_concepts(str(run))
    assert {file.name: file.read_bytes() for file in page.parent.iterdir()} == first
    assert Image.open(page.parent / "kinds.png").width > 1000
    vocabulary = content["vocabulary"]
    counts = [phrase.count for phrase in PhraseVocabulary.load(run / "phrases.jsonl")]
    assert vocabulary["unique_phrases"] == len(counts)
    assert vocabulary["mean_frequency"] == pytest.approx(np.mean(counts))
    assert vocabulary["per_text"] == pytest.approx(sum(counts) / 23)
    assert content["hierarchy"]["to_words"] == pytest.approx(1, abs=1e-4), "untrained: phrases are where they started"
    assert len(content["map"]["concepts"]) == 7 + len(counts)
    html = page.read_text(encoding="utf-8")
    assert "Fig. 6" in html
    assert str(run.parent) not in html, "a page is made to be passed on"


def test_fewer_phrases_on_the_map(run: Path, tmp_path: Path) -> None:
    content = content_of(inspect_concepts(str(run), count=2, out=tmp_path / "two"))
    kinds = [concept["kind"] for concept in content["map"]["concepts"]]
    assert len(kinds) == 7 + 2
    assert kinds[:7] == ["tag"] * 7


def test_a_run_without_phrases(tmp_path: Path) -> None:
    page = inspect_concepts(str(make_run(tmp_path, phrases=False)))
    assert "no vocabulary of phrases" in page.read_text(encoding="utf-8")
    assert {file.suffix for file in page.parent.iterdir()} == {".html", ".json", ".png"}


def test_what_cannot_be_mapped_is_one_line(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reads no phrases, tags or regions"):
        inspect_concepts(str(small_run.make_run(tmp_path, "albef")))
    data = tmp_path / "bare.jsonl"
    record = {"image": str(run.parent / "data" / "0.png"), "id": "a", "split": "test", "captions": ["there"]}
    data.write_text(json.dumps(record) + "\n")
    bare = make_run(tmp_path / "bare", phrases=False)
    with pytest.raises(UserError, match=f"0 tags and phrases in split test; a map needs {FEWEST}"):
        inspect_concepts(str(bare), data=str(data))
