"""Statements about pairs of embedded scenes: right, balanced within every sentence, read back as NLVR2's are."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from tests.data import scene_reader
from vlscale.config import Data, Scenes
from vlscale.data import scenes
from vlscale.data.open import read_data, read_pairs
from vlscale.data.sample import Sample
from vlscale.data.scene_pairs import OF_EACH, pair_sets
from vlscale.data.sources import nlvr2

COUNTS = {"train": 160, "val": 40, "test": 60}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "set"
    return scenes.render_scenes(out, COUNTS["train"], COUNTS["test"], seed=2, workers=1, val=COUNTS["val"])


@pytest.fixture(scope="module")
def pairs(folder: Path) -> list[Sample]:
    return list(read_pairs(Data(path=str(folder))))


def test_every_statement_is_what_its_label_says(folder: Path, pairs: list[Sample]) -> None:
    lines = (folder / "captions.jsonl").read_text().splitlines()
    records = {str(folder / record["image"]): record for record in map(json.loads, lines)}
    turned = 0
    for sample in pairs:
        left, right = records[str(sample.image)], records[str(sample.second)]
        assert left["split"] == right["split"] == sample.split
        assert left is not right
        statement = sample.statements[0]
        true = scene_reader.judged(left, right, statement.text)
        assert statement.label == str(true).lower(), statement.text
        if not statement.text.startswith("in the "):  # of a pair turned round, these may be hard to tell
            turned += true != scene_reader.judged(right, left, statement.text)
    assert turned > 0.1 * len(pairs)  # left and right matter


def test_every_sentence_is_true_of_half_of_its_pairs(pairs: list[Sample]) -> None:
    """So a model that reads sentences alone is right half of the time, and consistent never."""
    sets: dict[str, list[Sample]] = defaultdict(list)
    for sample in pairs:
        sets["-".join(sample.statements[0].id.split("-")[:2])].append(sample)
    for found in sets.values():
        assert len({sample.statements[0].text for sample in found}) == 1
        assert Counter(sample.statements[0].label for sample in found) == {"true": OF_EACH, "false": OF_EACH}
        assert len({(sample.image, sample.second) for sample in found}) == 2 * OF_EACH
    assert Counter(sample.split for sample in pairs) == {split: 4 * number for split, number in COUNTS.items()}
    sentences = [found[0].statements[0].text for found in sets.values()]
    assert max(Counter(sentences).values()) < 0.08 * len(sentences)


def test_ids_are_made_as_nlvr2_makes_them(pairs: list[Sample]) -> None:
    assert len({sample.id for sample in pairs}) == len(pairs)
    for sample in pairs:
        match = re.fullmatch(nlvr2._IDENTIFIER, sample.statements[0].id)
        assert match is not None
        assert (match[1], match[2]) == (sample.id, sample.split)


def test_the_places_of_true_pairs_tell_nothing(pairs: list[Sample]) -> None:
    by_place: Counter[str] = Counter(s.id.split("-")[2] for s in pairs if s.statements[0].label == "true")
    assert all(abs(by_place[str(place)] / len(pairs) - 1 / 8) < 0.03 for place in range(4))


def test_sets_are_a_function_of_scenes_and_seed() -> None:
    few = [plan.scene for plan in scenes.plan_scenes({"test": 40}, seed=1)]
    first = pair_sets(few, 10, "a")
    assert pair_sets(few, 20, "a")[:10] == first
    assert pair_sets(few, 10, "b") != first
    assert pair_sets(few[:1], 10, "a") == []
    assert all(pair.left != pair.right for found in pair_sets(few[:3], 5, "a") for pair in found.pairs)


def test_pairs_stay_out_of_what_pretraining_reads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(sample.second is None for sample in read_data(Data(path=str(folder))))
    assert len(read_pairs(Data(path=str(folder / "pairs.jsonl")))) == 4 * sum(COUNTS.values())
    monkeypatch.setenv("VLSCALE_CACHE", str(folder.parent / "cache"))
    data = Data(scenes=Scenes(train=20, test=10, seed=5))
    assert read_data(data).splits() == {"train": 20, "test": 10, "val": 10}
    assert read_pairs(data).splits() == {"train": 80, "test": 40, "val": 40}
