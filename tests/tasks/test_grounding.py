"""Grounding end to end: known scores, what is left out and counted, the file, the command line, the page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.data.concept_data import stored
from tests.data.corpus import shared
from tests.small_run import make_run as make_other_run
from tests.systems.fake_gpu import put_on_fake_gpu
from tests.systems.test_mvptr import batch_of, mvptr
from tests.tasks.grounding_data import (
    CORNER,
    DOG,
    LEFT,
    MAN,
    RIGHT,
    WAVE,
    WHOLE,
    Known,
    make_run,
    phrase,
    recipe_of,
    sample,
    write_data,
)
from tests.tasks.test_box_recall import slow
from vlscale.cli.main import main
from vlscale.config import Recipe
from vlscale.data.captions import vocabulary_of
from vlscale.data.sample import Sample, TarMember
from vlscale.data.sources.base import Notes
from vlscale.data.sources.registry import parse_source, read_source
from vlscale.data.spans import Annotated, SpanEncoder, phrase_words
from vlscale.data.text import TextTokenizer, build_tokenizer, clean_caption
from vlscale.errors import UserError
from vlscale.objectives.grounding import phrase_region_similarity
from vlscale.systems.protocol import offers
from vlscale.systems.registry import build_system
from vlscale.tasks import features
from vlscale.tasks.grounding import GroundingResult, evaluate_grounding, grounding_table, run_grounding
from vlscale.tasks.phrase_scores import ScoresRegions, repeated, with_phrase_boxes


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return recipe_of(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def tokenizer(recipe: Recipe) -> TextTokenizer:
    return build_tokenizer(recipe.data.tokenizer, [])


@pytest.fixture(autouse=True)
def fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same arithmetic on every machine."""
    monkeypatch.setattr(features.Precision, "of", lambda device, _system: features.Precision(device, torch.float32))


@pytest.fixture
def ground(recipe: Recipe, tokenizer: TextTokenizer) -> Callable[..., GroundingResult]:
    def run(system: Any, samples: list[Sample], **options: Any) -> GroundingResult:
        return evaluate_grounding(system, samples, recipe, tokenizer, batch_size=3, device="cpu", **options)

    return run


def leftmost(ids: list[int], box: list[float]) -> float:
    return -box[0] - box[2]


# --- known scores -----------------------------------------------------------------------------------------------------


def test_metrics_against_a_slow_loop(ground: Any, recipe: Recipe, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    def score(ids: list[int], box: list[float]) -> float:
        return (sum(ids) * 7919 % 101) * box[0] + (sum(ids) * 104729 % 97) * box[3] - len(ids) * box[2]

    grid = [(x / 4, y / 4, x / 4 + 0.4, y / 4 + 0.3) for x in range(3) for y in range(3)]
    samples = []
    for number in range(7):
        boxes = grid[: 2 + number]
        phrases = (
            phrase(DOG, (number / 10, 0.1, number / 10 + 0.3, 0.4), kinds=("animals",)),
            phrase(MAN, grid[number], grid[0], kinds=("people", "other")),
            phrase(("a man", 0), grid[1], caption=1),
        )
        samples.append(sample(tmp_path, number, boxes, phrases))
    encode = SpanEncoder(recipe.data, tokenizer)
    expected: list[dict[str, float]] = []
    for one in samples:
        regions = grid[: 2 + int(one.id[1:])]
        for said in one.phrases:
            texts = encode([Annotated(one, said.caption, (said,))])
            ids = texts.fields["input_ids"][0][texts.spans[0, 0]].tolist()
            order = sorted(regions, key=lambda box: -score(ids, torch.tensor(box).tolist()))
            expected.append(slow(order, said.boxes))
    system = Known(score)
    found = ground(system, samples).judgement
    mean = {name: 100 * sum(one[name] for one in expected) / len(expected) for name in expected[0]}
    assert found.metrics == pytest.approx(mean)
    assert 0 < mean["any_r1"] < 100
    people = [one for place, one in enumerate(expected) if place % 3 == 1]
    assert found.kinds["people"]["any_r5"] == pytest.approx(100 * sum(one["any_r5"] for one in people) / 7)
    assert found.kinds["people"] == found.kinds["other"]
    assert [found.kinds[kind]["phrases"] for kind in ("animals", "people", "other")] == [7, 7, 7]
    assert set(system.layers) == {2}
    assert max(system.rows) == 3
    assert sum(system.rows) == 14


def test_predictions_tell_every_phrase(ground: Any, tmp_path: Path) -> None:
    phrases = (phrase(DOG, LEFT, kinds=("animals",)), phrase(WAVE, RIGHT, CORNER))
    result = ground(Known(leftmost), [sample(tmp_path, 0, [RIGHT, LEFT], phrases)])
    dog, wave = result.judgement.predictions
    assert (dog["sample"], dog["image"], dog["caption_number"], dog["phrase"]) == ("s0", 0, 0, "A black dog")
    assert (dog["best_box"], dog["score"]) == ([0.0, 0.0, 0.5, 1.0], -0.5)
    assert dog["hit"] == dog["pointing"] == {"any": True, "merged": True}
    assert (wave["first_word"], wave["kinds"], wave["boxes"]) == (8, (), (RIGHT, CORNER))
    assert wave["hit"] == {"any": False, "merged": True}  # merged is the whole image
    assert wave["pointing"] == {"any": False, "merged": True}
    drawn = result.judgement.figure
    assert [one["text"] for one in drawn["regions"]] == ["A black dog", "the big wave", "black dog", "big wave"]
    assert [one["kind"] for one in drawn["regions"]] == ["phrase", "phrase", "concept", "concept"]
    assert all(one["box"] == list(LEFT) for one in drawn["regions"])


def test_a_tie_is_a_miss_and_shows_the_wrong_region(ground: Any, tmp_path: Path) -> None:
    one = sample(tmp_path, 0, [LEFT, RIGHT], (phrase(DOG, LEFT), phrase(MAN, RIGHT)))
    result = ground(Known(lambda ids, box: 1.0), [one]).judgement
    assert result.metrics["any_r1"] == 0
    assert result.metrics["any_r5"] == 100
    assert [row["best_box"] for row in result.predictions] == [list(RIGHT), list(LEFT)]
    assert result.baselines["random region"]["any_r1"] == 50


def test_concepts_count_among_the_tokens_of_a_phrase(ground: Any, tmp_path: Path) -> None:
    seen: list[int] = []

    def score(ids: list[int], box: list[float]) -> float:
        seen.append(len(ids))
        return 0.0

    samples = [sample(tmp_path, 0, [WHOLE], (phrase(DOG, LEFT), phrase(MAN, LEFT)))]
    ground(Known(score), samples)
    assert seen == [3, 4, 1, 1, 0]  # two phrases, two concepts, a slot without one
    seen.clear()
    result = ground(Known(score), samples, concepts=True)
    assert seen == [4, 4, 1, 1, 0]
    assert "concepts" in result.protocol["score"]


# --- uneven cases -----------------------------------------------------------------------------------------------------


def test_what_can_t_be_asked_is_counted(ground: Any, tmp_path: Path) -> None:
    beyond = " ".join(["a"] * 20 + ["big", "wave"])
    samples = [
        sample(tmp_path, 0, [LEFT, RIGHT], ()),
        sample(tmp_path, 1, [LEFT], (phrase(DOG, LEFT), phrase(MAN, unseen="nobox"), phrase(MAN, LEFT, RIGHT))),
        sample(tmp_path, 2, [RIGHT, LEFT], (phrase(("big wave", 20), LEFT),), captions=(beyond,)),
        sample(tmp_path, 3, [LEFT], (phrase(DOG, LEFT, caption=-1), phrase(DOG, LEFT, caption=9))),
        sample(tmp_path, 4, [LEFT, WHOLE], (phrase((",", 3), LEFT), phrase(("a cat", 4), LEFT))),
        replace(sample(tmp_path, 5, [LEFT], (phrase(DOG, LEFT),)), regions=broken_regions(tmp_path)),
        sample(tmp_path, 6, [], (phrase(DOG, LEFT),)),
    ]
    result = ground(Known(leftmost), samples)
    card, found = result.protocol, result.judgement
    assert (card["images"], card["captions"], card["phrases"]) == (4, 4, 5)
    assert (card["images_without_phrases"], card["phrases_without_box"], card["phrases_without_place"]) == (2, 1, 3)
    assert (card["phrases_without_words_left"], card["phrases_without_regions"]) == (2, 1)
    assert card["phrases_with_several_boxes"] == 1
    assert card["regions_per_image"] == 1.25  # 1, 2, 2 and 0
    [broken] = card["unreadable_images"]
    assert "5.png" in broken
    missed = [row for row in found.predictions if row["score"] is None]
    assert [row["phrase"] for row in missed] == ["big wave", ",", "A black dog"]
    assert not any(row["hit"]["any"] or row["hit"]["merged"] for row in missed)
    assert found.metrics["any_r1"] == found.metrics["any_r10"] == pytest.approx(100 * 2 / 5)
    assert found.baselines["upper bound"]["any_r1"] == pytest.approx(100 * 4 / 5)
    assert [row["image"] for row in found.predictions] == [1, 1, 2, 4, 6]


def broken_regions(folder: Path) -> TarMember:
    """Regions that are none."""
    return stored(folder / "broken.safetensors", b"no regions")


def test_nothing_to_ask_is_one_line(ground: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none of the 1 images has any.*entities:FOLDER"):
        ground(Known(leftmost), [sample(tmp_path, 0, [LEFT], ())])
    broken = replace(sample(tmp_path, 1, [LEFT], (phrase(DOG, LEFT),)), regions=broken_regions(tmp_path))
    with pytest.raises(UserError, match="none of the 1 images can be read"):
        ground(Known(leftmost), [broken])


def test_scores_that_are_not_finite_stop(ground: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not finite"):
        ground(Known(lambda ids, box: float("nan")), [sample(tmp_path, 0, [LEFT], (phrase(DOG, LEFT),))])


def test_own_boxes_are_those_of_phrases_too(recipe: Recipe, tmp_path: Path) -> None:
    stored_ones = sample(tmp_path, 0, [LEFT], (phrase(DOG, LEFT, RIGHT),), boxes=(RIGHT,))
    own = replace(stored_ones, regions=None)
    concepts = recipe.data.concepts
    assert concepts is not None
    pixels = recipe.data.model_copy(update={"concepts": concepts.model_copy(update={"pixels": 2})})
    assert with_phrase_boxes(own, pixels).boxes == (RIGHT, LEFT)
    assert with_phrase_boxes(own, recipe.data) is own
    assert with_phrase_boxes(stored_ones, pixels) is stored_ones


# --- the system that can ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"tags_in_fusion": True}, {"fusion": "merged"}])
def test_mvptr_compares_phrases_with_regions_wherever_they_stand(options: dict[str, Any]) -> None:
    system = mvptr(**options).eval()
    assert offers(system, ScoresRegions)
    batch = batch_of(3)
    spans = torch.zeros(3, 2, batch.input_ids.shape[1], dtype=torch.bool)
    spans[:, 0, 1:3] = True
    with torch.inference_mode():
        scores = system.phrase_region_scores(batch, spans)
        assert batch.region_mask is not None
        assert scores.shape == (3, 2, 4)
        assert torch.equal(scores == -torch.inf, ~batch.region_mask.bool()[:, None].expand(-1, 2, -1))
        assert not torch.equal(scores, system.phrase_region_scores(batch, spans, 0))
        image, text = system.encode_image(batch), system.encode_text(batch)
        fused = system.encoder.fuse(text.tokens, image.tokens, text.mask, image.mask, return_layers=True)
        slow_scores = phrase_region_similarity(fused.layers[2], spans, batch.region_mask)
        torch.testing.assert_close(scores, slow_scores)
        regions = fused.layers[2][1, -4]  # the first region of the second image
        mean = fused.layers[2][1, 1:3].mean(0)
        torch.testing.assert_close(scores[1, 0, 0], torch.cosine_similarity(mean, regions, dim=0))
    with pytest.raises(UserError, match=r"layer 99: .* 0 to "):
        system.phrase_region_scores(batch, spans, 99)


def test_scores_are_fp32_on_a_gpu_without_a_sync() -> None:
    system, batch = mvptr().eval(), batch_of(3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        put_on_fake_gpu(system)
        tensors = {
            f.name: torch.empty_like(value, device="cuda")
            for f in fields(batch)
            if isinstance(value := getattr(batch, f.name), torch.Tensor)
        }
        there = repeated(replace(batch, **tensors, sample_ids=["a", "b", "c"]), [2, 0, 2])
        spans = torch.empty(3, 2, there.input_ids.shape[1], dtype=torch.bool, device="cuda")
        scores = system.phrase_region_scores(there, spans)
        assert (scores.device.type, scores.dtype, tuple(scores.shape)) == ("cuda", torch.float32, (3, 2, 4))


def test_an_image_and_a_caption_score_alike_in_any_company(
    ground: Any, recipe: Recipe, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    system = build_system(recipe, vocabulary_of(tokenizer, recipe.data)).eval()
    phrases = (phrase(DOG, LEFT), phrase(MAN, RIGHT), phrase(("a man", 0), LEFT, caption=1))
    samples = [sample(tmp_path, number, [LEFT, RIGHT, WHOLE][: 1 + number % 3], phrases) for number in range(5)]
    together = [row["score"] for row in ground(system, samples).judgement.predictions]
    alone = [row["score"] for one in samples for row in ground(system, [one]).judgement.predictions]
    assert together == pytest.approx(alone, abs=1e-5)


# --- file, command line, page -----------------------------------------------------------------------------------------


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    run = make_run(tmp_path / "run", write_data(tmp_path / "data"))
    monkeypatch.setattr("sys.argv", ["vlscale", "eval", "grounding", "--from", str(run), "--zero-shot", "--count", "5"])
    assert main() == 0
    assert "upper bound" in capsys.readouterr().out
    path = run / "eval" / "grounding.json"
    result = json.loads(path.read_text())
    assert result["task"] == "grounding"
    assert result["metrics"].keys() == result["baselines"]["random region"].keys()
    card = result["protocol"]
    assert (card["layer"], card["split"], card["images"], card["phrases"]) == (2, "test", 5, 10)
    assert card["regions"] == "own boxes + whole image"
    assert card["regions_per_image"] == 3
    assert result["baselines"]["upper bound"]["any_r1"] == result["baselines"]["upper bound"]["merged_r1"] == 100
    assert result["baselines"]["random region"]["any_r1"] == pytest.approx(100 * (2 / 3 + 1) / 2)
    assert list(result["kinds"]) == ["animals"]
    lines = (run / "eval" / "grounding.predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["sample"] for line in lines] == [f"s{number // 2}" for number in range(10)]
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(grounding_table(path))
    assert f"{result['metrics']['any_r1']:.1f}" in console.export_text()

    page = run / "eval" / "grounding" / "index.html"
    html = page.read_text()
    assert "<b>" not in html, "captions are escaped"
    assert "&lt;b&gt;&amp; number" in html
    shown = set(re.findall(r'<img src="([^"]+)"', html))
    assert shown == {"concepts.png", "best-1.png", "worst-1.png", "drawn-1.png", "drawn-2.png", "drawn-3.png"}
    assert {entry.name for entry in page.parent.iterdir()} == shown | {"index.html"}

    again = run_grounding(str(run), zero_shot=True, out=tmp_path / "again.json")
    assert again.path.read_text() == path.read_text(), "nothing in the file depends on when it was made"
    first = run_grounding(str(run), zero_shot=True, first=2, layer=0, out=tmp_path / "first.json")
    card = json.loads(first.path.read_text())["protocol"]
    assert (card["first"], card["split_images"], card["images"], card["layer"]) == (2, 5, 2, 0)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", write_data(tmp_path / "data"))
    command = ["vlscale", "eval", "grounding", "--from", str(run), "--zero-shot"]
    notes = run / "eval" / "grounding" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    monkeypatch.setattr("sys.argv", command)
    assert main() == 0
    assert [entry.name for entry in notes.parent.iterdir()] == ["notes.txt"]
    assert (run / "eval" / "grounding.page" / "index.html").is_file()
    notes.unlink()
    for name in ("index.html", "old-7.png"):
        (notes.parent / name).touch()
    assert main() == 0
    assert not (notes.parent / "old-7.png").exists()
    assert not [entry for entry in (run / "eval").iterdir() if entry.name.startswith(".")]


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    data = str(write_data(tmp_path / "data"))
    run, other = make_run(tmp_path / "run", Path(data)), make_other_run(tmp_path / "other", count=4)
    plain = str(write_data(tmp_path / "plain", phrases=False))
    for arguments, hint in (
        (["--from", str(run)], "--zero-shot is missing"),
        (["--from", str(run), "--zero-shot", "--layer", "3"], "layer 3: the multimodal encoder has layers 0 to 2"),
        (["--from", str(run), "--zero-shot", "--layer", "-1"], "layer -1"),
        (["--from", str(run), "--zero-shot", "--first", "6"], "--first 6"),
        (["--from", str(run), "--zero-shot", "--out", str(tmp_path / "result")], "expected the name of a .json file"),
        (["--from", str(run), "--zero-shot", "--data", plain], "Flickr30k Entities"),
        (["--from", str(other), "--zero-shot"], "none of the 4 images has any"),
        (["--from", str(other), "--zero-shot", "--data", data, "--concepts"], "reads no phrase concepts"),
        (["--from", str(run), "--zero-shot", "--grid"], "--grid: small reads regions"),
    ):
        monkeypatch.setattr("sys.argv", ["vlscale", "eval", "grounding", *arguments])
        assert main() == 2
        error = capsys.readouterr().err
        assert error.startswith("vlscale: error: ")
        assert hint in error
        assert error.count("\n") == 1
    assert not (run / "eval").exists()


def test_published_phrases_have_their_place(tmp_path: Path) -> None:
    """Of the first 60 photographs of Flickr30k Entities; what a phrase says is what the caption says there."""
    flickr = shared("data/flickr8k")
    for kind, ending in (("Annotations", "xml"), ("Sentences", "txt")):
        (tmp_path / kind).mkdir()
        for file in sorted((flickr / kind).glob(f"*.{ending}"))[:60]:
            (tmp_path / kind / file.name).symlink_to(file)
    source = parse_source(f"entities:{tmp_path},images={flickr / 'images'}")
    phrases = 0
    for one in read_source(source, Notes()):
        for said in one.phrases:
            caption = one.captions[said.caption]
            words = phrase_words(caption, said)
            assert words is not None
            cleaned = clean_caption(caption, 1000).split(" ")
            assert [cleaned[word] for word in words] == clean_caption(said.text, 1000).split(" ")
            phrases += 1
    assert phrases > 700
