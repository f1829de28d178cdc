"""Pictures of attention: the right numbers beside the right names, one page, and one line for what can't be drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import small_run
from tests.inspect.concept_run import BOXES, PLAIN, make_run
from vlscale.data.open import read_data
from vlscale.data.sample import Sample
from vlscale.errors import UserError
from vlscale.inspect.attention import CONTENT, inspect_attention
from vlscale.inspect.concept_pairs import WHOLE, PairReader, region_names
from vlscale.interop.run import load_run
from vlscale.systems.concept_attention import as_reader, concept_attention


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("split"))


def content_of(page: Path) -> dict[str, Any]:
    return json.loads((page.parent / CONTENT).read_text(encoding="utf-8"))


def test_names_and_numbers_are_those_of_the_sample(run: Path, tmp_path: Path) -> None:
    page = inspect_attention(str(run), sample="id-3", layer=0, head=1, out=tmp_path / "one")
    (pair,) = content_of(page)["pairs"]
    assert pair["caption"] == "a white box on a red dog"
    assert pair["words"] == ["a", "white", "box", "on", "a", "red", "dog"]
    assert pair["phrases"] == ["white box", "red dog", "box on dog"]
    assert pair["tags"] == ["white box", "red dog"]
    assert pair["regions"] == ["white box", "red dog", WHOLE]
    assert pair["boxes"] == [*map(list, BOXES), [0.0, 0.0, 1.0, 1.0]]

    made = load_run(run)
    sample = next(sample for sample in read_data(made.recipe.data) if sample.id == "id-3")
    batch = PairReader(made).pair(sample, sample.captions[0]).batch
    assert batch.tag_places is not None
    assert batch.phrase_places is not None
    found = concept_attention(as_reader(made.system, "run"), batch, 0, 1)
    tokens = made.tokenizer.tokens(batch.input_ids[0, :14].clamp(max=made.tokenizer.vocabulary.size - 1))
    spelt = {"white": [], "dog": []}  # type: dict[str, list[int]]
    for word in spelt:  # the pieces that spell it, found by hand
        for start in range(len(tokens)):
            for end in range(start + 1, len(tokens) + 1):
                if "".join(tokens[start:end]).replace("##", "") == word and not tokens[start].startswith("##"):
                    spelt[word] = list(range(start, end))
    text, visual, regions = found.textual[0, 0], found.visual[0, 0], found.text_to_regions[0, 0]
    for number, phrase in enumerate(pair["phrases"]):
        row = batch.phrase_places[0].tolist().index(number + 1)
        for word, pieces in spelt.items():
            at = pair["words"].index(word)
            assert pair["phrase_to_words"][number][at] == pytest.approx(float(text[row, pieces].sum()), abs=1e-5), (
                phrase
            )
        np.testing.assert_allclose(pair["phrase_to_regions"][number], regions[row, :3], atol=1e-5)
    np.testing.assert_allclose(pair["word_to_regions"][1], regions[spelt["white"], :3].mean(0), atol=1e-5)
    columns = [place for place, tag in enumerate(batch.tag_places[0].tolist()) if tag == 2]
    for region in range(3):
        row = visual[batch.tag_places.shape[1] + region]
        assert pair["region_to_tags"][region][1] == pytest.approx(float(row[columns].sum()), abs=1e-5)


def test_some_samples_on_one_page(run: Path) -> None:
    """The same bytes every time, an older page replaced; captions with phrases first."""
    page = inspect_attention(str(run), count=2)
    assert page == run / "attention" / "index.html"
    content = content_of(page)
    assert content["settings"] == "layer 1 (of 0 to 1) of every encoder, mean over the heads"
    assert content["notes"] == []
    assert all(pair["phrases"] for pair in content["pairs"])
    for pair in content["pairs"]:
        assert len(pair["shares"]) == 4
        assert all(sum(shares.values()) == pytest.approx(1, abs=1e-4) for shares in pair["shares"].values())
    first = {file.name: file.read_bytes() for file in page.parent.iterdir()}
    assert len(first) == 2 + 2 * 3
    assert inspect_attention(str(run), count=2) == page
    assert {file.name: file.read_bytes() for file in page.parent.iterdir()} == first
    inspect_attention(str(run), count=1)
    assert len(list(page.parent.iterdir())) == 2 + 3


def test_a_caption_without_phrases(run: Path, tmp_path: Path) -> None:
    """Words look in their place; what the caption says is text, neither HTML nor a formula."""
    page = inspect_attention(str(run), sample="id-2", out=tmp_path / "plain")
    (pair,) = content_of(page)["pairs"]
    assert pair["caption"] == PLAIN
    assert pair["phrases"] == []
    assert set(pair["shares"]) == {"regions, visual encoder", "words, multimodal encoder"}
    html = page.read_text(encoding="utf-8")
    assert PLAIN not in html
    assert "there &lt;and&gt; $here$ $now$" in html


def test_one_encoder_for_everything(tmp_path: Path) -> None:
    run = make_run(tmp_path, fusion="merged")
    content = content_of(inspect_attention(str(run), count=1))
    assert content["settings"].startswith("layer 3 (of 0 to 3) of the one encoder")
    assert "one encoder for everything" in content["notes"][0]
    (pair,) = content["pairs"]
    assert pair["shares"]["phrases, textual encoder"]["the other modality"] > 0
    assert pair["shares"]["regions, visual encoder"]["the other modality"] > 0
    assert pair["shares"]["words, multimodal encoder"]["tags"] > 0
    for shares in pair["shares"].values():
        assert sum(shares.values()) == pytest.approx(1, abs=1e-4)


def test_a_first_stage_without_phrases(tmp_path: Path) -> None:
    run = make_run(tmp_path, phrases=False, stage=1)
    content = content_of(inspect_attention(str(run), count=2))
    assert "not trained" in content["notes"][0]
    assert all(pair["phrases"] == [] for pair in content["pairs"])


def test_regions_are_called_what_the_data_calls_them() -> None:
    known = Sample("s", Path("x.png"), boxes=((0.0, 0.0, 0.4, 0.4), (0.5, 0.5, 1.0, 1.0)), tags=("dog", "cat"))
    boxes = [[0.0, 0.0, 0.4, 0.3], [0.1, 0.1, 0.45, 0.45], [0.5, 0.5, 1, 1], [0, 0, 1, 0.9], [0.7, 0.1, 0.9, 0.2]]
    assert region_names(known, np.array(boxes)) == ["dog", "", "cat", WHOLE, ""]
    assert region_names(Sample("s", Path("x.png")), np.array([[0.3, 0.3, 0.3, 0.3]])) == [""]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample": "no"}, "--sample no: split test has no such sample (the first is id-0)"),
        ({"layer": 2}, "layer 2: there are 2 of them"),
        ({"head": 2}, "head 2: there are 2 of them"),
        ({"split": "train"}, "split 'train' is empty"),
    ],
)
def test_mistakes_are_one_line(run: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        inspect_attention(str(run), out=tmp_path / "page", **options)
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_system_without_concepts_says_so(tmp_path: Path) -> None:
    run = small_run.make_run(tmp_path, "albef")
    with pytest.raises(UserError, match=r"reads no phrases, tags or regions"):
        inspect_attention(str(run))


def test_another_folder_is_left_alone(run: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        inspect_attention(str(run), count=1, out=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_unreadable_images_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for number in range(12):
        if number != 5:
            (tmp_path / "data" / f"{number}.png").write_bytes(b"no picture")
    content = content_of(inspect_attention(str(run), count=2))
    assert [pair["sample"] for pair in content["pairs"]] == ["id-5"]
    assert len(content["skipped"]) == 11
    (tmp_path / "data" / "5.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="no sample can be drawn, 12 tried"):
        inspect_attention(str(run))
