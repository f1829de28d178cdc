"""Examples and targets of tasks on the embedded scenes: against what the samples say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vlscale.config import Data, Scenes, load_recipe
from vlscale.config.tasks import TASKS, EntailmentTask, GroundingTask, Nlvr2Task, RetrievalTask, VqaTask
from vlscale.data.answers import answer_vocabulary, normalise, save_answers, soft_scores, spelled
from vlscale.data.captions import vocabulary_of
from vlscale.data.examples import ENTAILMENT, TRUTH, examples_of
from vlscale.data.open import read_data, read_pairs
from vlscale.data.sample import Question, Sample
from vlscale.data.stream import Stream, evaluation_batches
from vlscale.data.targets import answer_tokens, make_targets
from vlscale.data.text import TextTokenizer, build_tokenizer
from vlscale.errors import UserError

TASK_OF = {"vqa": VqaTask(), "snli-ve": EntailmentTask(), "nlvr2": Nlvr2Task(), "grounding": GroundingTask()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    patch = pytest.MonkeyPatch()
    patch.setenv("VLSCALE_CACHE", str(tmp_path_factory.mktemp("cache")))
    section = load_recipe("mvptr_tiny").data.model_copy(
        update={"scenes": Scenes(train=40, test=8, val=6), "workers": 0}
    )
    read_data(section)
    yield section
    patch.undo()


@pytest.fixture(scope="module")
def plain(data: Data) -> Data:
    return data.model_copy(update={"concepts": None, "image_size": 32})


@pytest.fixture(scope="module")
def tokenizer(data: Data) -> TextTokenizer:
    return build_tokenizer(data.tokenizer, (text for sample in read_data(data) for text in sample.captions))


def stream(examples: Any, data: Data, tokenizer: TextTokenizer, **options: Any) -> Any:
    sizes: dict[str, int] = {"seed": 0, "global_batch": 6, "micro_batch": 6}
    return next(iter(Stream(examples, data, tokenizer, **sizes, **options)))


def test_every_question_hypothesis_statement_and_caption_is_an_example(data: Data) -> None:
    corpus, pairs = read_data(data), read_pairs(data)
    train = [sample for sample in corpus if sample.split == "train"]
    for name, expected in (
        ("vqa", [(q.id, q.text) for sample in train for q in sample.questions]),
        ("snli-ve", [(s.id, s.text) for sample in train for s in sample.statements]),
        ("grounding", [(f"{s.id}#{n}", c) for s in train for n, c in enumerate(s.captions)]),
        ("nlvr2", [(s.id, s.text) for pair in pairs if pair.split == "train" for s in pair.statements]),
    ):
        found = examples_of(pairs if name == "nlvr2" else corpus, TASK_OF[name], ("train",))  # type: ignore[arg-type]
        assert [(example.id, *example.captions) for example in found] == expected
        assert len({example.id for example in found}) == len(found)
    assert len(examples_of(corpus, RetrievalTask(), ("train",))) == len(train)


def test_examples_without_an_answer_are_for_test_splits(tmp_path: Path) -> None:
    asked = Sample("a", tmp_path / "a.png", questions=(Question("1", "what?"), Question("2", "who?", ("a cat",))))
    from vlscale.data.corpus import as_corpus

    corpus = as_corpus([asked])
    assert [one.id for one in examples_of(corpus, VqaTask(), ("train",))] == ["2"]
    assert [one.id for one in examples_of(corpus, VqaTask(), ("train",), labelled=False)] == ["1", "2"]
    with pytest.raises(UserError, match=r"no hypothesis with a label in split train; .* train \(1\)"):
        examples_of(corpus, EntailmentTask(), ("train",))


def test_classes(plain: Data, tokenizer: TextTokenizer) -> None:
    for name, classes in (("snli-ve", ENTAILMENT), ("nlvr2", TRUTH)):
        task: Any = TASK_OF[name]
        corpus = read_pairs(plain) if name == "nlvr2" else read_data(plain)
        examples = examples_of(corpus, task, ("train",))
        batch = stream(examples, plain, tokenizer, targets=make_targets(task, plain, tokenizer))
        label_of = {one.id: one.statements[0].label for one in examples}
        assert [classes[label] for label in batch.targets["labels"]] == [label_of[name] for name in batch.sample_ids]
        assert (batch.right is None) is (name == "snli-ve")


def test_the_right_images_are_those_of_the_pairs(plain: Data, tokenizer: TextTokenizer) -> None:
    augment = plain.augment.model_copy(update={"crop_scale": (1.0, 1.0), "flip": False, "randaugment": None})
    still = plain.model_copy(update={"augment": augment})
    examples = examples_of(read_pairs(plain), Nlvr2Task(), ("train",))
    batch = stream(examples, still, tokenizer)
    by_id = {example.id: example for example in examples}
    pairs = [by_id[name] for name in batch.sample_ids]
    (expected,) = evaluation_batches(pairs, still, len(pairs))
    assert expected.right is not None
    assert batch.right is not None
    for ours, theirs in ((batch.images, expected.images), (batch.right.images, expected.right.images)):
        assert (ours.int() - theirs.int()).abs().float().mean() < 1
    assert not torch.equal(batch.images, batch.right.images)
    moved = batch.to("meta")
    assert moved.right is not None
    assert moved.right.images.device.type == "meta"


def test_answers_as_scores_and_as_words(plain: Data, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    examples = examples_of(read_data(plain), VqaTask(), ("train",))
    known = answer_vocabulary((one.questions[0] for one in examples), min_count=1)
    path = tmp_path / "answers.json"
    save_answers(path, known[:-3])
    by_id = {example.id: example.questions[0] for example in examples}
    scores = stream(examples, plain, tokenizer, targets=make_targets(VqaTask(mode="classify"), plain, tokenizer, path))
    words = stream(examples, plain, tokenizer, targets=make_targets(VqaTask(), plain, tokenizer, path))
    for row, name in enumerate(scores.sample_ids):
        expected = soft_scores(by_id[name].answers)
        found = {known[number]: float(scores.targets["scores"][row, number]) for number in range(len(known) - 3)}
        assert found == {answer: expected.get(answer, 0.0) for answer in known[:-3]}
        own = words.targets["answer_of"] == row
        assert float(words.targets["answer_weights"][own].sum()) == pytest.approx(1)
        said = [tokenizer.decode(ids) for ids in words.targets["answer_ids"][own]]
        assert said == [word(answer) for answer in dict.fromkeys(map(normalise, by_id[name].answers))]
    ids, mask = answer_tokens(["2", "a very large red ball"], tokenizer, longest=5)
    v = tokenizer.vocabulary
    assert tokenizer.decode(ids[0]) == "two", "captions spell numbers: the digit has no token"
    assert ids[:, 0].tolist() == [v.cls, v.cls]
    assert ids[1, -1] == v.sep
    assert mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    pieces = vocabulary_of(tokenizer, plain, path).answer_pieces
    assert [tokenizer.decode(list(one)) for one in pieces] == [word(answer) for answer in known[:-3]]


def test_regions_overlap_with_the_phrases_boxes(data: Data, tokenizer: TextTokenizer) -> None:
    assert data.concepts is not None
    section = data.model_copy(update={"concepts": data.concepts.model_copy(update={"phrases": None})})
    task = GroundingTask()
    examples = examples_of(read_data(section), task, ("train",))
    batch = stream(examples, section, tokenizer, targets=make_targets(task, section, tokenizer))
    by_id = {example.id: example for example in examples}
    overlaps, regions = batch.targets["overlaps"], batch.region_boxes
    assert regions is not None
    for row, name in enumerate(batch.sample_ids):
        phrases = [phrase for phrase in by_id[name].phrases if phrase.boxes]
        for slot, phrase in enumerate(phrases):
            for region, box in enumerate(regions[row].tolist()):
                slow = max(_overlap(box, list(own)) for own in phrase.boxes)
                assert float(overlaps[row, slot, region]) == pytest.approx(slow, abs=1e-5)
            said = tokenizer.decode(batch.input_ids[row][batch.targets["spans"][row, slot]])
            assert not said or said in phrase.text.replace("-", " ")
        assert not batch.targets["grounded"][row, len(phrases) :].any()
    assert batch.targets["grounded"].any(1).all()


def test_every_task_says_what_it_lacks(tmp_path: Path) -> None:
    from vlscale.data.corpus import as_corpus

    corpus = as_corpus([Sample("a", tmp_path / "a.png", captions=("a dog",))])
    for name in TASKS:
        if name != "retrieval":
            with pytest.raises(UserError, match=f"give data for {name}"):
                examples_of(corpus, TASK_OF[name], ("train",))  # type: ignore[arg-type]


def word(answer: str) -> str:
    """As captions spell it; no caption has a "z", so "zero" is the one answer whose only token is [UNK]."""
    return "" if answer == "0" else spelled(answer)


def _overlap(box: list[float], other: list[float]) -> float:
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    shared = max(0.0, width) * max(0.0, height)
    areas = [(one[2] - one[0]) * (one[3] - one[1]) for one in (box, other)]
    return shared / max(sum(areas) - shared, 1e-12)
