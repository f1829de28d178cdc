import csv
import json
import math
from pathlib import Path

from vlscale.engine.monitor import CsvLog, Monitor, cut_back


def table(path: Path) -> list[list[str]]:
    with path.open(newline="") as stream:
        return list(csv.reader(stream))


def test_every_step_is_a_line_in_full_precision(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, 2, 0, ("itc",))
    monitor.log({"step": 1, "loss": 0.1 + 0.2, "itc": math.nan, "images_per_s": 1.0})
    # Readable while the run goes on: each line is flushed.
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 0.1 + 0.2
    assert table(tmp_path / "metrics.csv")[1][1] == repr(0.1 + 0.2)
    monitor.log({"step": 2, "loss": 1.0, "itc": math.inf, "images_per_s": 1.0})
    monitor.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert json.loads(text.splitlines()[0])["itc"] is None
    assert [row[2] for row in table(tmp_path / "metrics.csv")] == ["itc", "nan", "inf"]


def test_a_column_may_appear_later(tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "metrics.csv")
    log.write({"step": 1, "a": 0.5})
    log.write({"step": 2, "b": 2.0, "a": 1.0})
    log.write({"step": 3, "b": 3.0})
    log.close()
    assert table(tmp_path / "metrics.csv") == [
        ["step", "a", "b"],
        ["1", "0.5", ""],
        ["2", "1.0", "2.0"],
        ["3", "", "3.0"],
    ]


def test_logs_are_cut_back_to_the_checkpoint_and_go_on(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, 9, 0, ())
    for step in (1, 2, 3):
        monitor.log({"step": step, "loss": float(step), "images_per_s": 1.0})
        monitor.note_skipped_images(step, [f"{step}.jpg: broken"])
    monitor.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "lo')  # killed while writing
    with (tmp_path / "metrics.csv").open("a") as stream:
        stream.write("4")
    monitor = Monitor(tmp_path, 9, 2, ())
    monitor.log({"step": 3, "loss": 30.0, "images_per_s": 1.0})
    monitor.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [row[:2] for row in table(tmp_path / "metrics.csv")[1:]] == [["1", "1.0"], ["2", "2.0"], ["3", "30.0"]]
    assert (tmp_path / "skipped_images.txt").read_text().splitlines() == ["1\t1.jpg: broken", "2\t2.jpg: broken"]


def test_cutting_back_to_nothing_leaves_a_usable_run(tmp_path: Path) -> None:
    cut_back(tmp_path, 0)
    monitor = Monitor(tmp_path, 9, 0, ())
    monitor.log({"step": 1, "loss": 1.0, "images_per_s": 1.0})
    monitor.close()
    cut_back(tmp_path, 0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert table(tmp_path / "metrics.csv") == [["step", "loss", "images_per_s"]]


def test_tensorboard_gets_the_scalars(tmp_path: Path) -> None:
    import pytest

    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monitor = Monitor(tmp_path, 9, 0, ())
    monitor.log({"step": 1, "loss": 1.5, "images_per_s": 1.0})
    monitor.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.5)]
