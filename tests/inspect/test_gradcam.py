"""Pictures of Grad-CAM: heat on the right pixels, words with their own tokens, and one line for what can't be drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.inspect.aspect_run import SHAPES, make_aspect_run
from tests.small_run import make_run
from tests.systems.test_soho import soho
from vlscale.data.text import TextTokenizer
from vlscale.errors import UserError
from vlscale.inspect import gradcam
from vlscale.inspect.cells import CutImage
from vlscale.inspect.gradcam import COLUMNS, PICTURE, Looked, chosen_words, inspect_gradcam, words_of
from vlscale.inspect.heat_overlay import heat_overlay, spread
from vlscale.interop.run import load_run
from vlscale.systems.soho import Soho


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("small"), "albef")


@pytest.fixture(scope="module")
def tokenizer(run: Path) -> TextTokenizer:
    return load_run(run).tokenizer


@pytest.mark.parametrize("size", [(64, 64), (52, 37), (64, 24)])
def test_heat_lies_on_the_pixels_of_its_cell(size: tuple[int, int]) -> None:
    """8 × 8 cells of 8 pixels, some of them padding, drawn three times as large."""
    height, width = size
    image = CutImage(np.full((height, width, 3), 90, np.uint8), 8, 8, (64, 64))
    for row, column in ((0, 0), (2, 1), (6, 2), (5, 0)):
        heat = np.zeros((8, 8))
        heat[row, column] = 0.02
        seen = spread(image, heat, 3 * height, 3 * width)
        y, x = np.argwhere(seen >= seen.max() - 1e-6).mean(axis=0) / 24
        if (row + 1) * 8 <= height:
            assert int(y) == row
            assert int(x) == column
            assert seen.max() > 0.9
        drawn = np.asarray(heat_overlay(image, heat, 3 * max(size))).astype(int).sum(axis=-1)
        assert drawn.shape == (3 * height, 3 * width)
        assert drawn[seen > 0.9].min() > drawn[seen < 0.1].max()


def test_no_heat_is_dark_and_padding_sets_no_scale() -> None:
    image = CutImage(np.full((32, 64, 3), 90, np.uint8), 8, 8, (64, 64))
    assert not spread(image, np.zeros((8, 8)), 32, 64).any()
    heat = np.zeros((8, 8))
    heat[1, 1], heat[7, 7] = 1.0, 100.0
    assert spread(image, heat, 32, 64).max() > 0.9


def test_words_are_made_of_their_pieces(tokenizer: TextTokenizer) -> None:
    text = "There is, thereone, PICTURE three-one"
    words = words_of(tokenizer, text)
    assert [word.text for word in words] == ["there", "is", "thereone", "picture", "three", "one"]
    names = tokenizer.tokens(tokenizer.encode([text])[0][0])
    for word in words:
        assert "".join(names[row] for row in word.tokens).replace("##", "") == word.text
    assert any(len(word.tokens) > 1 for word in words)
    assert [row for word in words for row in word.tokens] == list(range(1, len(names)))
    long = " ".join(["thereone"] * 25)
    assert words_of(tokenizer, long)[-1].tokens[-1] == tokenizer.max_tokens - 1
    assert tokenizer.encode([long])[0].shape[1] == tokenizer.max_tokens


def test_one_word_or_token_can_be_chosen(tokenizer: TextTokenizer) -> None:
    text = "one and one and two"
    assert [word.text for word in chosen_words(tokenizer, text, "One!")] == ["one", "one"]
    assert chosen_words(tokenizer, text, 0) == [("[CLS]", [0])]
    assert chosen_words(tokenizer, text, 99) == []
    assert chosen_words(tokenizer, text, "three") == []
    assert chosen_words(tokenizer, text, "one and") == []


def test_some_images_of_a_split(run: Path) -> None:
    """The same bytes every time, nothing else in the folder."""
    before = set(run.iterdir())
    picture = inspect_gradcam(str(run), count=3)
    assert picture == run / PICTURE
    assert set(run.iterdir()) == before | {picture}
    first = picture.read_bytes()
    assert Image.open(picture).width >= COLUMNS * gradcam.SIDE
    inspect_gradcam(str(run), count=3)
    assert picture.read_bytes() == first


def test_settings_change_the_maps(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sheets: list[tuple[list[Any], list[str]]] = []
    draw = gradcam._sheet
    monkeypatch.setattr(gradcam, "_sheet", lambda found, lines: sheets.append((found, lines)) or draw(found, lines))
    file = run.parent / "data" / "3.png"
    kinds = (Looked(), Looked(layer=1), Looked(head=1), Looked(token="two"), Looked(token=0), Looked(contrast=True))
    for number, looked in enumerate(kinds):
        out = tmp_path / f"{number}.png"
        assert inspect_gradcam(str(run), text="one <b>and</b> two", image=file, looked=looked, out=out) == out
    middle, last, head, word, token, contrast = (found[0] for found, _ in sheets)
    assert [word.text for word, _, _ in middle.words] == ["one", "<b>and<", "b>", "two"]
    assert not np.allclose(middle.whole, head.whole)
    assert not any(heat.any() for _, heat, _ in last.words), "the match reads [CLS] alone after the last layer"
    assert [heat.tolist() for _, heat, _ in word.words] == [middle.words[-1][1].tolist()]
    shares = sum(share for _, _, share in (*middle.words, *token.words))
    assert shares == pytest.approx(1.0, abs=1e-5)
    assert contrast.words == []
    assert contrast.whole.shape == (4, 4)
    lines = [line for _, (line, *_) in sheets]
    assert all(line.startswith("run, step 3.") for line in lines)
    assert "fusion layer 0 (of 0 to 1), mean over the heads, every word" in lines[0]
    assert "fusion layer 1" in lines[1]
    assert "head 1" in lines[2]
    assert "token two" in lines[3]
    assert "block 0 (of 0 to 0) of the image encoder" in lines[5]


def test_padded_images_of_many_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A joint transformer over the cells of a convolutional network."""
    made = make_aspect_run(tmp_path)
    torch.manual_seed(0)
    system = Soho(soho().config, 64, made.tokenizer.vocabulary).eval()
    monkeypatch.setattr(gradcam, "load_run", lambda source: replace(made, system=system))
    found: list[Any] = []
    draw = gradcam._sheet
    monkeypatch.setattr(gradcam, "_sheet", lambda some, lines: found.extend(some) or draw(some, lines))
    inspect_gradcam("aspect", count=8, out=tmp_path / "maps.png")
    assert len(found) == len(SHAPES) - 1, "one has no caption"
    for one in found:
        shown = one.image.visible().reshape(one.image.rows, one.image.columns)
        assert one.whole.shape == shown.shape
        assert not one.whole[~shown].any()
        assert one.whole[shown].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": Path("x.png")}, "--image x.png: needs --text"),
        ({"out": Path("maps")}, "--out maps: expected the name of a .png file"),
        ({"looked": Looked(layer=2)}, "layer 2: there are 2 of them"),
        ({"looked": Looked(head=7)}, "head 7: there are 2 of them"),
        ({"looked": Looked(token="zebra")}, "--token zebra: not among the words of the captions of split test"),
        ({"looked": Looked(token=99), "text": "one"}, "--token 99: not among the words of 'one'"),
        ({"looked": Looked(token="one", contrast=True)}, "leave --token or --itc"),
    ],
)
def test_mistakes_are_one_line(run: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        inspect_gradcam(str(run), **options)


def test_a_broken_image_is_named(run: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"no image can be read: .*broken\.png: cannot identify"):
        inspect_gradcam(str(run), text="one", image=broken)
