"""`vlscale data show`: pictures, texts and boxes; broken samples are shown as such."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.data.corpus import picture, write_jsonl
from vlscale.cli.data import app
from vlscale.data.sheet import contact_sheet
from vlscale.errors import UserError


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for number in range(9):
        picture(number, 60 + number, 40).save(tmp_path / f"{number}.png")
    records = [
        {"image": f"{number}.png", "captions": [f"picture {number}"], "split": "val" if number > 6 else "train"}
        for number in range(9)
    ]
    return write_jsonl(tmp_path / "captions.jsonl", records)


def test_a_sheet_of_pictures(data: Path, tmp_path: Path) -> None:
    out = contact_sheet(str(data), tmp_path / "new" / "sheet.png", count=8)
    with Image.open(out) as sheet:
        assert (sheet.format, sheet.mode) == ("PNG", "RGB")
        assert sheet.width > 6 * 240
        assert 2 * 350 < sheet.height < 3 * 350
        assert np.asarray(sheet).std() > 20
    result = CliRunner().invoke(app, ["show", str(data), "--split", "val", "--out", str(tmp_path / "val.png")])
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "val.png") as sheet:
        assert sheet.width < 3 * 252 + 13


def test_boxes_are_drawn_where_they_are(tmp_path: Path) -> None:
    Image.new("RGB", (100, 50), "black").save(tmp_path / "a.png")
    records = [{"image": "a.png", "captions": ["x"], "boxes": [[0.5, 0, 1, 1]], "tags": ["right half"]}]
    contact_sheet(str(write_jsonl(tmp_path / "c.jsonl", records)), tmp_path / "sheet.png")
    pixels = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    red = np.argwhere((np.abs(pixels - (0xE6, 0x19, 0x4B)).sum(axis=2)) < 10)
    # 240 wide and 120 high, centred in a cell of 240 that starts at 12.
    assert (red.min(axis=0)[1], red.max(axis=0)[1]) == (12 + 120, 12 + 239)
    assert abs(red.max(axis=0)[0] - (12 + 60 + 119)) <= 1


def test_what_can_not_be_shown(data: Path, tmp_path: Path) -> None:
    (data.parent / "3.png").write_bytes(b"broken")
    assert contact_sheet(str(data), tmp_path / "sheet.png").is_file()
    with pytest.raises(UserError, match="no split 'test'; there are train, val"):
        contact_sheet(str(data), tmp_path / "sheet.png", split="test")
    with pytest.raises(UserError, match="no such file"):
        contact_sheet(str(tmp_path / "nothing"), tmp_path / "sheet.png")
