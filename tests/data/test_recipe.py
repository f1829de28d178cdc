"""Data recipes: sources joined, other people's test sets dropped, mistakes named; and how sources are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.data.corpus import picture, write_jsonl
from vlscale.config import Data
from vlscale.data.open import absolute, load_sources, read_data
from vlscale.data.recipe import corpus_names, load_data_recipe
from vlscale.data.shard_plan import plan_shards
from vlscale.data.shard_writer import write_shards
from vlscale.data.sources.base import COMMON_KEYS, FILE_KEYS, Source
from vlscale.data.sources.registry import FORMATS, parse_source
from vlscale.errors import UserError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two small data sets: `mine` with names of photographs elsewhere, and `tests` whose photographs must not train."""
    (tmp_path / "images").mkdir()
    for number in range(6):
        picture(number).save(tmp_path / "images" / f"{number}.png")
    mine = [
        {"image": f"{n}.png", "id": f"mine {n}", "captions": ["x"], "aliases": [f"vg:{n}", f"coco:{n}"]}
        for n in range(6)
    ]
    tests = [
        {"image": "not here.jpg", "captions": ["x"], "split": split, "aliases": [alias]}
        for split, alias in [("test", "coco:1"), ("val", "flickr:3"), ("val", "coco:4"), ("train", "coco:5")]
    ]
    write_jsonl(tmp_path / "mine.jsonl", mine)
    write_jsonl(tmp_path / "tests.jsonl", tests)
    return tmp_path


def recipe(folder: Path, **tree: Any) -> str:
    path = folder / "corpus.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def test_photographs_of_test_sets_are_dropped_and_counted(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = recipe(root, sources=["mine.jsonl"], exclude=[{"path": "tests.jsonl", "only": ["val", "test"]}])
    assert [sample.id for sample in read_data(Data(path=path))] == ["mine 0", "mine 2", "mine 3", "mine 5"]
    assert "mine.jsonl: images of an excluded set, dropped: 2" in caplog.text
    # Made into shards, without them and with them.
    plan, _, missing = plan_shards([path], 1 << 20, None)
    assert write_shards(plan, root / "without", missing, 1).samples == 4
    everything = recipe(root, sources=["mine.jsonl"], exclude=["jsonl:tests.jsonl"])
    assert len(read_data(Data(path=everything))) == 3
    plan, _, missing = plan_shards([str(root / "mine.jsonl")], 1 << 20, None)
    assert write_shards(plan, root / "with", missing, 1).samples == 6
    both = recipe(root, sources=["with", "shards:without"], exclude=["tests.jsonl"])
    assert len(read_data(Data(path=both))) == 3 + 3


def test_splits(root: Path) -> None:
    sources: list[Any] = ["mine.jsonl", {"path": "mine.jsonl", "split": "val"}]
    assert read_data(Data(path=recipe(root, sources=sources))).splits() == {"train": 6, "val": 6}
    write_jsonl(root / "parts.jsonl", [{"image": f"elsewhere/{n}.png", "captions": [], "split": "val"} for n in (1, 3)])
    found = read_data(Data(path=f"jsonl:{root}/mine.jsonl,splits={root}/parts.jsonl"))
    assert found.splits() == {"train": 4, "val": 2}
    assert len(read_data(Data(path=f"jsonl:{root}/mine.jsonl,splits={root}/parts.jsonl,only=val"))) == 2
    assert len(read_data(Data(path=f"jsonl:{root}/mine.jsonl,splits={root}/parts.jsonl,only=val+train"))) == 6


def test_texts_made_of_questions_and_tags(root: Path) -> None:
    asked = {"id": "q", "text": "what is it?", "answers": ["cat", "dog", "dog"]}
    records = [
        {
            "image": "0.png",
            "captions": [],
            "questions": [asked, {"id": "r", "text": "and now?"}],
            "tags": ["a", "b", "a"],
        },
        {"image": "1.png", "captions": ["its own"], "tags": ["c"]},
    ]
    file = write_jsonl(root / "asked.jsonl", records)
    expected = {"questions": ("what is it? dog", "and now?"), "tags": ("a, b",)}
    for key, texts in expected.items():
        samples = read_data(Data(path=f"jsonl:{file},text={key}"))
        assert [sample.captions for sample in samples] == [texts, ("its own",)]


def test_boxes_of_another_source(root: Path) -> None:
    boxes = [
        {"image": "gone.png", "captions": [], "aliases": [f"coco:{n}"], "boxes": [[0, 0, 1, 1]], "tags": [f"thing {n}"]}
        for n in (1, 4)
    ]
    write_jsonl(root / "boxes.jsonl", boxes)
    samples = read_data(Data(path=f"jsonl:{root}/mine.jsonl,boxes={root}/boxes.jsonl"))
    assert [sample.tags for sample in samples] == [(), ("thing 1",), (), (), ("thing 4",), ()]
    assert samples[1].boxes == ((0, 0, 1, 1),)
    assert samples[1].captions == ("x",)
    with pytest.raises(UserError, match="no boxes of photographs with a name"):
        read_data(Data(path=f"jsonl:{root}/mine.jsonl,boxes={root}/tests.jsonl"))


def test_splits_know_coco_images_by_their_number(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "000000000042.jpg")
    write_jsonl(tmp_path / "a.jsonl", [{"image": "000000000042.jpg", "captions": ["x"]}])
    other = [{"image": "COCO_val2014_000000000042.jpg", "captions": ["x"], "split": "restval"}]
    write_jsonl(tmp_path / "b.jsonl", other)
    assert read_data(Data(path=f"jsonl:{tmp_path}/a.jsonl,splits={tmp_path}/b.jsonl")).splits() == {"restval": 1}


def test_keys_that_shards_have_no_use_for(root: Path) -> None:
    plan, _, missing = plan_shards([str(root / "mine.jsonl")], 1 << 20, None)
    write_shards(plan, root / "shards", missing, 1)
    for key in ("images", "split", "splits", "text", "boxes"):
        value = "tags" if key == "text" else str(root)
        with pytest.raises(UserError, match=f"shards reads no key '{key}'"):
            read_data(Data(path=f"shards:{root}/shards,{key}={value}"))
    with pytest.raises(UserError, match=r"with --image-root: shards reads no key 'images'"):
        read_data(Data(path=f"{root}/shards", image_root=str(root)))


def test_where_paths_are_relative_to(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    assert len(read_data(Data(path=recipe(elsewhere, root=str(root), sources=["mine.jsonl"])))) == 6
    path = recipe(elsewhere, sources=["mine.jsonl"])
    assert len(read_data(Data(path=path, image_root=str(root)))) == 6
    with pytest.raises(UserError, match=r"corpus\.yaml, source 1: .*mine\.jsonl: no such file"):
        read_data(Data(path=path))


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"sources": []}, "sources: "),
        ({"source": ["mine.jsonl"]}, "sources: Field required"),
        ({"sources": ["mine.jsonl"], "colour": 1}, "colour: unknown key"),
        ({"sources": [{"path": "mine.jsonl", "wieght": 2}]}, "source 1: wieght: unknown key"),
        ({"sources": ["mine.jsonl", {"path": "mine.jsonl", "weight": 0}]}, "source 2: weight: "),
        ({"sources": [{"path": "mine.jsonl", "questions": "q.json"}]}, "source 1: jsonl reads no key 'questions'"),
        ({"sources": [{"format": "xml", "path": "mine.jsonl"}]}, "source 1: no format 'xml'; there are "),
        ({"sources": ["nothing.jsonl"]}, "source 1: "),
        ({"sources": ["mine.jsonl"], "root": "/nowhere"}, "root /nowhere: no such folder"),
        ({"sources": ["mine.jsonl"], "exclude": ["no.json"]}, "exclude 1: "),
        ([1], "valid dictionary"),
    ],
)
def test_a_mistake_is_one_line(root: Path, tree: Any, expected: str) -> None:
    path = root / "corpus.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError) as caught:
        read_data(Data(path=str(path)))
    assert str(caught.value).startswith(str(path))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_exclusion_that_excludes_nothing_is_an_error(root: Path) -> None:
    write_jsonl(root / "anonymous.jsonl", [{"image": "a.jpg", "captions": ["x"]}])
    with pytest.raises(UserError, match="names no photograph that another source could share"):
        read_data(Data(path=recipe(root, sources=["mine.jsonl"], exclude=["anonymous.jsonl"])))


def test_yaml_that_is_none(root: Path) -> None:
    (root / "corpus.yaml").write_text("sources: [")
    with pytest.raises(UserError, match=r"corpus\.yaml: not YAML"):
        read_data(Data(path=str(root / "corpus.yaml")))
    with pytest.raises(UserError, match=r"none\.yaml: can't be read .*expected a data recipe, or one of albef_4m"):
        read_data(Data(path=str(root / "none.yaml")))


@pytest.mark.parametrize("name", corpus_names())
def test_shipped_corpora_are_well_formed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLSCALE_DATA", raising=False)
    with pytest.raises(UserError, match=f"corpus {name}: where are its data sets"):
        load_data_recipe(name)
    monkeypatch.setenv("VLSCALE_DATA", str(tmp_path))
    sources, excluded = load_data_recipe(name)
    assert {source.format for source in sources} >= {"karpathy"}
    assert all(source.path.startswith(str(tmp_path)) for source in (*sources, *excluded))
    assert [(Path(source.path).name, source.only) for source in excluded] == [
        ("dataset_coco.json", ["val", "test"]),
        ("dataset_flickr30k.json", ["val", "test"]),
    ]
    assert absolute(name) == name


def test_how_sources_are_written(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    source = parse_source("jsonl:a, b=c/mine.jsonl,images=images,only=val+test,weight=0.5")
    assert (source.path, source.images, source.only, source.weight) == (
        "a, b=c/mine.jsonl",
        "images",
        ["val", "test"],
        0.5,
    )
    assert parse_source(source.spec()) == source
    assert parse_source("mine.jsonl").format == "jsonl"
    assert absolute("mine.jsonl") == str(root / "mine.jsonl")
    assert absolute("jsonl:mine.jsonl,images=images") == f"jsonl:{root}/mine.jsonl,images={root}/images"
    (root / "odd:name.jsonl").write_text((root / "mine.jsonl").read_text())
    assert parse_source("odd:name.jsonl").path == "odd:name.jsonl"
    with pytest.raises(UserError, match="no format 'cocoo'; there are"):
        parse_source("cocoo:mine.jsonl")
    (root / "x.json").write_text("{}")
    with pytest.raises(UserError, match="is none of the known formats"):
        parse_source("x.json")
    with pytest.raises(UserError, match="both name the image folder"):
        load_sources("jsonl:mine.jsonl,images=images", str(root))


def test_every_key_of_a_source_is_read_by_someone() -> None:
    read = set(COMMON_KEYS).union(*(entry.keys for entry in FORMATS.values()))
    assert read == set(Source.model_fields)
    assert set(FILE_KEYS) <= set(Source.model_fields)
