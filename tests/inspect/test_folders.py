"""Where a page goes, and what it never replaces."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlscale.errors import UserError
from vlscale.inspect.folders import page_folder, replaced
from vlscale.interop import layout

PAGE = "index.html"


def write_page(folder: Path, text: str) -> None:
    with replaced(folder, PAGE) as new:
        (new / PAGE).write_text("begun")
        (new / PAGE).write_text(text, encoding="utf-8")


def test_a_page_takes_the_place_of_a_page_and_of_nothing_else(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    own = tmp_path / "result"
    assert page_folder(result, PAGE) == own
    own.mkdir()
    assert page_folder(result, PAGE) == own, "empty"
    (own / "notes.txt").write_text("mine")
    assert page_folder(result, PAGE) == tmp_path / "result.page"
    with pytest.raises(UserError, match="holds something else"), replaced(own, PAGE):
        raise AssertionError("nothing is written")
    (own / PAGE).write_text("")
    assert page_folder(result, PAGE) == own
    (own / layout.RECIPE).write_text("")
    assert page_folder(result, PAGE) == tmp_path / "result.page", "a run, whatever lies in it"


def test_what_went_wrong_leaves_the_old_page(tmp_path: Path) -> None:
    write_page(tmp_path / "page", "old")
    with pytest.raises(UnicodeEncodeError):
        write_page(tmp_path / "page", "new\ud800")
    assert [(path.name, (path / PAGE).read_text()) for path in tmp_path.iterdir()] == [("page", "old")]
