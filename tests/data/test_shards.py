"""Shards: what goes in comes out, the same bytes however often it was interrupted, and damage is found and named."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image
from typer.testing import CliRunner

from tests.data.corpus import picture, write_jsonl
from vlscale.cli.data import app
from vlscale.config import Data
from vlscale.data.open import read_data, training_split
from vlscale.data.sample import SampleError, TarMember
from vlscale.data.shard_plan import parse_size, plan_shards
from vlscale.data.shard_writer import Plan, write_shards
from vlscale.data.shards import Manifest, open_shards, read_manifest
from vlscale.data.validate import validate
from vlscale.errors import UserError

COUNT = 40
SIZE = 1 << 16


def make_data(folder: Path, count: int = COUNT) -> Path:
    """Noisy pictures of about 10 KB, every fifth without caption, every tenth in val."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    records: list[dict[str, Any]] = []
    for number in range(count):
        noise = rng.integers(0, 256, (60, 60, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.{'png' if number % 3 else 'jpg'}")
        records.append(
            {
                "image": f"{number}.{'png' if number % 3 else 'jpg'}",
                "id": f"id {number}",
                "captions": [] if number % 5 == 4 else [f"caption {number} é", f"another {number}"],
                "split": "val" if number % 10 == 0 else "train",
                "boxes": [[0.1, 0.2, 0.3, 1 / 3]],
                "tags": ["dog"],
                "tuples": [["big", "dog"]],
                "questions": [{"id": "q", "text": "what?", "answers": ["dog", "cat"], "kind": "other"}],
                "statements": [{"id": "s", "text": "a dog", "label": "entailment"}],
                "phrases": [
                    {"text": "dog", "boxes": [[0, 0, 1, 1]], "caption": 0, "entity": "7", "kinds": ["animals"]}
                ],
                "aliases": [f"coco:{number}"],
                "licence": number,
            }
        )
    return write_jsonl(folder / "captions.jsonl", records)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def write(source: Path | str, out: Path, workers: int = 2, report: Any = None, **options: Any) -> Manifest:
    plan, _, missing = plan_shards([str(source)], options.pop("max_size", SIZE), options.pop("resize", None))
    return write_shards(plan, out, missing, workers, report)


@pytest.fixture(scope="module")
def shards(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "shards"
    write(data, out)
    return out


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_what_goes_in_comes_out(data: Path, shards: Path) -> None:
    manifest = read_manifest(shards)
    assert (manifest.samples, manifest.captions, manifest.splits) == (COUNT, 2 * 32, {"val": 4, "train": 36})
    assert len(manifest.shards) > 4
    before, after = read_data(Data(path=str(data))), read_data(Data(path=str(shards)))
    assert after.splits() == {"train": 36, "val": 4}
    by_id = {sample.id: sample for sample in before}
    for sample in after:
        original = by_id.pop(sample.id)
        for name in ("captions", "split", "boxes", "tags", "tuples", "questions", "statements", "phrases", "aliases"):
            assert getattr(sample, name) == getattr(original, name), name
        assert sample.extra == {"licence": original.extra["licence"]}
        assert isinstance(sample.image, TarMember)
        assert isinstance(original.image, Path)
        assert sample.image.read() == original.image.read_bytes()
        assert sample.image.name.endswith(original.image.suffix)
    assert not by_id
    # Within a split the order is the source's.
    train = [sample.id for sample in before if sample.split == "train"]
    assert [sample.id for sample in after.select(["train"], captioned=False)] == train
    captioned = [sample.id for sample in before if sample.split == "train" and sample.captions]
    assert [sample.id for sample in training_split(after)] == captioned


def test_the_manifest_tells_the_truth(shards: Path) -> None:
    manifest = read_manifest(shards)
    for entry in manifest.shards:
        path = shards / entry.name
        assert path.stat().st_size == entry.bytes <= SIZE
        assert hashlib.sha256(path.read_bytes()).hexdigest() == entry.sha256
        samples = list(webdataset.WebDataset(str(path), shardshuffle=False).decode("pil"))
        assert len(samples) == entry.samples
        assert sum(len(sample["json"]["captions"]) for sample in samples) == entry.captions
        assert sum(bool(sample["json"]["captions"]) for sample in samples) == entry.captioned
        assert all(sample.get("png", sample.get("jpg")).size == (60, 60) for sample in samples)
    assert manifest.bytes == sum(path.stat().st_size for path in shards.glob("*.tar"))


def test_sizes_are_known_without_reading(shards: Path) -> None:
    corpus = open_shards(shards)
    assert {corpus.size_of(index) for index in range(len(corpus))} == {(60, 60)}


@pytest.mark.parametrize("workers", [1, 3])
def test_equal_input_gives_equal_bytes(data: Path, shards: Path, tmp_path: Path, workers: int) -> None:
    write(data, tmp_path / "again", workers)
    assert contents(tmp_path / "again") == contents(shards)
    before = {path: path.stat().st_mtime_ns for path in shards.iterdir()}
    assert write(data, shards) == read_manifest(shards)  # nothing is left to do
    assert {path: path.stat().st_mtime_ns for path in shards.iterdir()} == before


@pytest.mark.parametrize("stop", [0, 1, 9, 20, 33, COUNT - 5])
def test_an_interrupted_writing_goes_on(data: Path, shards: Path, tmp_path: Path, stop: int) -> None:
    out, done = tmp_path / "out", []

    def interrupt(split: str, count: int) -> None:
        done.append(split)
        if len(done) > stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(data, out, report=interrupt)
    assert not (out / "manifest.json").exists()
    finished = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    write(data, out)
    assert contents(out) == contents(shards)
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == finished


def test_killed_again_and_again(data: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = "import sys; from vlscale.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "data", "shards", str(data), "--out", str(out), "--max-size", str(SIZE)]
    command += ["--workers", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    kills = 0
    for attempt in range(5):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        before = len(list(out.glob("*.tar"))) if out.exists() else 0
        while process.poll() is None:
            # One or two shards after the last time: while files are written, renamed, noted.
            if out.exists() and len(list(out.glob("*.tar"))) > before + attempt % 2:
                process.kill()
            time.sleep(0.0005)
        kills += process.wait() < 0
    assert kills >= 2
    assert subprocess.run(command, env=environment, check=False, capture_output=True).returncode == 0
    assert contents(out) == contents(shards)


def test_other_plans_do_not_go_on_in_the_same_folder(data: Path, shards: Path, tmp_path: Path) -> None:
    def interrupt(split: str, count: int) -> None:
        if count > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(data, tmp_path / "out", report=interrupt)
    with pytest.raises(UserError, match="unfinished shards of other sources or options"):
        write(data, tmp_path / "out", resize=32)
    with pytest.raises(UserError, match=r"holds a manifest\.json of something else"):
        write(data, shards, max_size=2 * SIZE)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").touch()
    with pytest.raises(UserError, match="is not empty"):
        write(data, tmp_path / "full")
    next(iter((tmp_path / "out").glob("*.tar"))).unlink()
    with pytest.raises(UserError, match="finished before and now missing or changed"):
        write(data, tmp_path / "out")


def test_images_that_come_while_it_was_interrupted_are_noticed(tmp_path: Path) -> None:
    source = make_data(tmp_path / "data")
    tsv = tmp_path / "pairs.tsv"
    tsv.write_text("".join(f"caption {n}\thttp://x.org/{n}.png\n" for n in range(COUNT)))
    spec = f"cc:{tsv},images={source.parent}"

    def interrupt(split: str, count: int) -> None:
        if count > 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(spec, tmp_path / "out", report=interrupt)
    picture(0).save(source.parent / "0.png")  # was missing: it is a JPEG in this data
    with pytest.raises(UserError, match="or other images are there by now"):
        write(spec, tmp_path / "out")


def test_two_writers_do_not_share_a_folder(data: Path, tmp_path: Path) -> None:
    def second(split: str, count: int) -> None:
        with pytest.raises(UserError, match="another process is writing there"):
            write(data, tmp_path / "out")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(data, tmp_path / "out", report=second)


@pytest.mark.parametrize("content", [b"", b'{"sources": [', b"torn at the end"])
def test_a_torn_line_of_progress(data: Path, shards: Path, tmp_path: Path, content: bytes) -> None:
    def interrupt(split: str, count: int) -> None:
        if count > 15:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    if content.startswith(b"torn"):
        with pytest.raises(KeyboardInterrupt):
            write(data, out, report=interrupt)
        content = (out / ".progress.jsonl").read_bytes() + content
    out.mkdir(exist_ok=True)
    (out / ".progress.jsonl").write_bytes(content)
    write(data, out)
    assert contents(out) == contents(shards)


def test_resized_images(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(1, 200, 100).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    picture(2, 300, 90).save(tmp_path / "wide.png")
    picture(3, 40, 30).save(tmp_path / "small.png")
    names = ["turned.jpg", "wide.png", "small.png"]
    source = write_jsonl(tmp_path / "c.jsonl", [{"image": name, "captions": ["x"]} for name in names])
    write(source, tmp_path / "out", resize=50)
    corpus = open_shards(tmp_path / "out")
    assert [corpus.size_of(index) for index in range(3)] == [(50, 100), (167, 50), (40, 30)]
    for index, name in enumerate(names):
        image = corpus[index].image
        assert isinstance(image, TarMember)
        stored = Image.open(io.BytesIO(image.read()))
        assert stored.size == corpus.size_of(index)
        assert not stored.getexif()
        if name == "small.png":
            assert image.read() == (tmp_path / name).read_bytes()
    upright = picture(1, 200, 100).rotate(-90, expand=True).resize((50, 100))
    assert (
        np.abs(np.asarray(Image.open(io.BytesIO(corpus[0].image.read()))).astype(int) - np.asarray(upright)).mean() < 6
    )


def test_broken_and_missing_images_are_left_out_and_named(data: Path, tmp_path: Path) -> None:
    lines = data.read_text().splitlines()
    folder = tmp_path / "data"
    make_data(folder)
    (folder / "6.jpg").write_bytes((folder / "6.jpg").read_bytes()[:900])
    (folder / "7.png").unlink()
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    manifest = write(folder / "captions.jsonl", tmp_path / "out")
    assert (manifest.samples, manifest.left_out) == (COUNT - 2, {"missing": 0, "unreadable": 2})
    listed = (tmp_path / "out" / "left_out.txt").read_text().splitlines()
    assert listed[0].startswith(f"{folder / '6.jpg'}: ")
    assert listed[1] == f"{folder / '7.png'}: no such file"
    for name in os.listdir(folder):
        if not name.endswith("jsonl"):
            (folder / name).write_bytes(b"")
    with pytest.raises(UserError, match="no sample could be written; first: "):
        write(folder / "captions.jsonl", tmp_path / "none")


def test_pairs_of_images(tmp_path: Path) -> None:
    for number in (0, 1):
        picture(number).save(tmp_path / f"{number}.png")
    record = {"image": "0.png", "second": "1.png", "statements": [{"id": "s", "text": "two", "label": "true"}]}
    write(write_jsonl(tmp_path / "c.jsonl", [record]), tmp_path / "out")
    (sample,) = open_shards(tmp_path / "out")
    assert isinstance(sample.image, TarMember)
    assert isinstance(sample.second, TarMember)
    assert sample.image.read() == (tmp_path / "0.png").read_bytes()
    assert sample.second.read() == (tmp_path / "1.png").read_bytes()
    assert len(list(webdataset.WebDataset(str(tmp_path / "out" / "train-00000.tar"), shardshuffle=False))) == 1


def copy(shards: Path, place: Path) -> Path:
    place.mkdir()
    for path in shards.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    return place


def test_damage_is_found_before_the_first_step(shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = copy(shards, tmp_path / "copy")
    first, second, third = sorted(place.glob("train-*.tar"))[:3]
    with first.open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(UserError, match=r"train-00000\.tar: the shard has 5,000 bytes, .*skip_broken_shards=true"):
        open_shards(place)
    second.unlink()
    third.with_suffix(".idx.npy").write_bytes(b"garbage")
    corpus = read_data(Data(path=str(place), skip_broken_shards=True))
    lost = sum(
        entry.samples for entry in read_manifest(place).shards if entry.name in {first.name, second.name, third.name}
    )
    assert len(corpus) == COUNT - lost
    assert "the shard is missing; its" in caplog.text
    assert len([record for record in caplog.records if "left out" in record.message]) == 3
    problems = validate_problems(place)
    assert len([problem for problem in problems if "sha256" in problem or "can't be read" in problem]) >= 3


def validate_problems(place: Path) -> list[str]:
    from vlscale.data.shard_check import check_shards

    return check_shards(place)


def test_validate_checks_every_byte(shards: Path, tmp_path: Path) -> None:
    assert validate(shards).problems == []
    place = copy(shards, tmp_path / "copy")
    tar = place / "train-00001.tar"
    content = bytearray(tar.read_bytes())
    content[3000] ^= 1
    tar.write_bytes(bytes(content))
    assert any(f"{tar}: its sha256 is not the manifest's" in problem for problem in validate_problems(place))
    place = copy(shards, tmp_path / "index")
    index = place / "train-00001.idx.npy"
    rows = np.load(index)
    rows["image"][0] += 1
    np.save(index, rows)
    assert validate_problems(place) == [f"{index}: the index does not fit the tar"]
    place = copy(shards, tmp_path / "manifest")
    tree = json.loads((place / "manifest.json").read_text())
    tree["captions"] += 1
    tree["shards"][0]["captions"] += 2
    (place / "manifest.json").write_text(json.dumps(tree))
    (place / "stranger.tar").touch()
    assert len(validate_problems(place)) == 3
    result = CliRunner().invoke(app, ["validate", str(place)])
    assert result.exit_code == 1
    assert "stranger.tar: not in the manifest" in result.output


def test_a_sample_that_got_lost_says_so(shards: Path, tmp_path: Path) -> None:
    place = copy(shards, tmp_path / "copy")
    corpus = open_shards(place)
    for tar in place.glob("*.tar"):
        tar.write_bytes(tar.read_bytes()[:2000])
    with pytest.raises(SampleError, match=r"ends .* bytes early|JSON record"):
        corpus.sample(len(corpus) - 1)
    assert "train-" in corpus.where(len(corpus) - 1)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda tree: tree.pop("shards"), "shards"),
        (lambda tree: tree.update(version=99), "version 99"),
        (lambda tree: tree["shards"][0].update(name="../../etc/passwd.tar"), "passwd"),
        (lambda tree: tree["shards"][0].update(samples="many"), "samples"),
        (lambda tree: tree["shards"][0].update(colour="red"), "colour"),
    ],
)
def test_a_wrong_manifest_is_one_line(shards: Path, tmp_path: Path, change: Any, expected: str) -> None:
    place = copy(shards, tmp_path / "copy")
    tree = json.loads((place / "manifest.json").read_text())
    change(tree)
    (place / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=expected) as caught:
        open_shards(place)
    assert "manifest.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_one_line(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vlscale.data.shard_writer.write_index", full)
    with pytest.raises(UserError, match=r"No space left on device.*goes on after the finished shards"):
        write(data, tmp_path / "out")


def test_sizes_and_splits_that_can_not_be(data: Path, tmp_path: Path) -> None:
    assert [parse_size(text) for text in ("256MB", "1GiB", "100000", "0.5 gb")] == [
        256 * 10**6,
        2**30,
        10**5,
        5 * 10**8,
    ]
    for text in ("", "big", "-1", "10", "1TB"):
        with pytest.raises(UserError, match=f"--max-size {text}: expected"):
            parse_size(text)
    with pytest.raises(UserError, match="split 'a/b': shards are named by it"):
        plan_shards([f"jsonl:{data},split=a/b"], SIZE, None)
    with pytest.raises(UserError, match="weight 2: shards hold every sample once"):
        plan_shards([f"jsonl:{data},weight=2"], SIZE, None)
    with pytest.raises(UserError, match="no sample"):
        plan_shards([f"jsonl:{data},only=nothing"], SIZE, None)


def test_only_some_splits(data: Path, shards: Path, tmp_path: Path) -> None:
    manifest = write(f"jsonl:{data},only=val", tmp_path / "out")
    assert manifest.splits == {"val": 4}
    assert read_data(Data(path=f"shards:{shards},only=val")).splits() == {"val": 4}
    with pytest.raises(UserError, match=r"split 'train' is empty, no record has it; splits there are: val \(4\)"):
        training_split(read_data(Data(path=str(tmp_path / "out"))))


def test_the_plan_reads_anew_each_time(data: Path) -> None:
    plan, splits, missing = plan_shards([str(data)], SIZE, None)
    assert isinstance(plan, Plan)
    assert [len(list(plan.read())) for _ in range(2)] == [COUNT, COUNT]
    assert (dict(splits), missing) == ({"val": 4, "train": 36}, [])
