"""Grids and given boxes as regions: where they are, what they are called, and what of the map they hold."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from vlscale.config import Backbone
from vlscale.data.regions import pack, strongest, unpack
from vlscale.data.sample import Phrase, Sample
from vlscale.errors import UserError
from vlscale.nn.cnn import CnnEncoder
from vlscale.nn.detectors import make_extractor
from vlscale.nn.grids import box_means, cell_boxes, given_boxes

CPU = torch.device("cpu")
MODEL = "resnet10t"
SAMPLE = Sample("1", Path("1.jpg"))
SQUARE = (0.25, 0.25, 0.75, 0.75)


def images(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    save_file(CnnEncoder(Backbone(model=MODEL, frozen_stages=0)).net.state_dict(), path)
    return str(path)


def feature_map(image: Tensor, weights: str, side: int = 224) -> Tensor:
    """The network's map [1, d, h, w] of one image, made step by step."""
    encoder = CnnEncoder(Backbone(model=MODEL, init=weights, frozen_stages=0)).eval()
    small = F.interpolate(image[None].float(), size=(side, side), mode="bicubic", antialias=True).clamp(0, 255).round()
    mean = torch.tensor(encoder.net.pretrained_cfg["mean"])[:, None, None]
    std = torch.tensor(encoder.net.pretrained_cfg["std"])[:, None, None]
    with torch.no_grad():
        return encoder((small / 255 - mean) / std)


def close(found: Tensor, expected: Tensor) -> None:
    """Equal but for float16 and a grey level of the resized image."""
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02 * float(expected.std()))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5), (7, 7)])
def test_cells_tile_the_image_row_by_row(rows: int, columns: int) -> None:
    boxes = cell_boxes((rows, columns))
    painted = torch.zeros(rows * 10, columns * 10)
    for number, (x1, y1, x2, y2) in enumerate((boxes * torch.tensor([columns, rows] * 2) * 10).round().int().tolist()):
        assert float(painted[y1:y2, x1:x2].sum()) == 0
        painted[y1:y2, x1:x2] = number + 1
    assert bool((painted > 0).all())
    assert painted[::10, ::10].flatten().tolist() == list(range(1, rows * columns + 1))


def test_a_cells_feature_is_the_mean_of_the_map_there(weights: str) -> None:
    extractor = make_extractor(f"grid:{MODEL}@2x3,size=192", weights, CPU)
    assert (extractor.name, extractor.width) == (f"grid:{MODEL}@2x3,size=192", 512)
    given = images((100, 150), (300, 80))
    for image, regions in zip(given, extractor.extract(given, [SAMPLE] * 2), strict=True):
        whole = feature_map(image, weights, 192)[0]  # [512, 6, 6]
        for index, (x1, y1, x2, y2) in enumerate((regions.boxes * 6).round().int().tolist()):
            close(regions.features[index], whole[:, y1:y2, x1:x2].mean((1, 2)))
        assert regions.tags == ("",) * 6
        assert float(regions.confidences.abs().max()) == 0


def test_the_map_is_the_grid_itself_unless_it_has_too_many_cells(weights: str) -> None:
    (image,) = images((64, 64))
    (own,) = make_extractor(f"grid:{MODEL}", weights, CPU).extract([image], [SAMPLE])
    close(own.features, feature_map(image, weights)[0].flatten(1).T)
    small: Any = make_extractor(f"grid:{MODEL},size=96", weights, CPU)
    assert (small.name, len(small.extract([image], [SAMPLE])[0])) == (f"grid:{MODEL}@3x3,size=96", 9)
    large = make_extractor(f"grid:{MODEL},size=320", weights, CPU)
    assert large.name == f"grid:{MODEL}@7x7,size=320"


def test_colours_are_timms_or_given(weights: str) -> None:
    (image,) = images((224, 224))
    expected = feature_map(image, weights)
    encoder = CnnEncoder(Backbone(model=MODEL, init=weights, frozen_stages=0)).eval()
    with torch.no_grad():
        plain = encoder(image[None].float() / 255)
    (regions,) = make_extractor(f"grid:{MODEL}", weights, CPU, mean=(0, 0, 0), std=(1, 1, 1)).extract([image], [SAMPLE])
    close(regions.features, plain[0].flatten(1).T)
    assert not torch.allclose(plain, expected, rtol=0.1)


def test_a_box_on_one_colour_has_it_and_on_a_ramp_its_middle() -> None:
    ramp = torch.arange(8.0).expand(8, 8) + 0.5  # the value at x of the map is x
    maps = torch.stack([torch.stack([torch.full((8, 8), 3.0), ramp, ramp.T]), torch.zeros(3, 8, 8)])
    boxes = torch.tensor([[0.25, 0.25, 0.5, 0.75], [0.125, 0.5, 0.75, 0.625], [0.5, 0.5, 0.5, 0.5]])
    first, second = box_means(maps, [boxes, boxes[:0]])
    torch.testing.assert_close(first, torch.tensor([[3.0, 3.0, 4.0], [3.0, 3.5, 4.5], [3.0, 4.0, 4.0]]))
    assert second.shape == (0, 3)


def test_boxes_of_the_data_are_read_from_the_map(weights: str) -> None:
    sample = replace(SAMPLE, boxes=(SQUARE, (0, 0, 1, 1)), tags=("cat", "room"))
    image, other = images((120, 160), (50, 50))
    extractor = make_extractor(f"boxes:{MODEL},size=256", weights, CPU)
    found, none = extractor.extract([image, other], [sample, SAMPLE])
    whole = feature_map(image, weights, 256)[0]  # [512, 8, 8]
    # The square's samples lie evenly between the middles of cells; those of its rim are read with what is outside.
    close(found.features[1], means_by_hand(whole, (0, 0, 8, 8)))
    close(found.features[0], means_by_hand(whole, (2, 2, 6, 6)))
    assert found.tags == ("cat", "room")
    assert found.confidences.tolist() == [1, 1]
    assert none.features.shape == (0, 512)
    assert len(unpack(pack(none))) == 0


def means_by_hand(maps: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """Mean of bilinear readings at 14 × 14 points of a box, given in cells of the map [d, h, w]."""
    x1, y1, x2, y2 = box
    total = torch.zeros(len(maps))
    for row in range(14):
        for column in range(14):
            y = y1 + (row + 0.5) * (y2 - y1) / 14 - 0.5
            x = x1 + (column + 0.5) * (x2 - x1) / 14 - 0.5
            y, x = min(max(y, 0.0), maps.shape[1] - 1.0), min(max(x, 0.0), maps.shape[2] - 1.0)
            top, left = int(y), int(x)
            below, right = min(top + 1, maps.shape[1] - 1), min(left + 1, maps.shape[2] - 1)
            dy, dx = y - top, x - left
            total += (1 - dy) * ((1 - dx) * maps[:, top, left] + dx * maps[:, top, right])
            total += dy * ((1 - dx) * maps[:, below, left] + dx * maps[:, below, right])
    return total / 196


def test_phrases_give_their_boxes_once_each_under_their_kind() -> None:
    hat, dog = (0.1, 0.1, 0.2, 0.2), (0.5, 0.5, 0.9, 0.9)
    phrases = (
        Phrase("A man", (SQUARE,), kinds=("people",)),
        Phrase("two things", (hat, dog), kinds=("other",)),
        Phrase("his dog", (dog,), kinds=("other", "animals")),
        Phrase("him", (SQUARE,), kinds=("people",)),
        Phrase("the day", unseen="notvisual", kinds=("notvisual",)),
    )
    found = given_boxes(replace(SAMPLE, phrases=phrases))
    torch.testing.assert_close(found.boxes, torch.tensor([SQUARE, hat, dog]))
    assert found.tags == ("people", "", "animals")
    both = given_boxes(replace(SAMPLE, phrases=phrases, boxes=(dog,), tags=("poodle",), confidences=(0.5,)))
    torch.testing.assert_close(both.boxes, torch.tensor([dog, SQUARE, hat]))
    assert both.tags == ("poodle", "people", "")
    assert both.confidences.tolist() == [1, 1, 1]
    alone = given_boxes(replace(SAMPLE, boxes=(dog, hat), tags=("a", "b"), confidences=(0.5, 0.25)))
    assert alone.confidences.tolist() == [0.5, 0.25]
    assert given_boxes(replace(SAMPLE, boxes=(dog,), tags=("outdoors", "summer"))).tags == ("",)


def test_cells_come_after_the_boxes(weights: str) -> None:
    sample = replace(SAMPLE, boxes=(SQUARE,), tags=("cat",))
    given = images((60, 60), (80, 40))
    both = make_extractor(f"boxes+grid:{MODEL}@3x3", weights, CPU).extract(given, [sample, SAMPLE])
    boxes = make_extractor(f"boxes:{MODEL}", weights, CPU).extract(given, [sample, SAMPLE])
    grid = make_extractor(f"grid:{MODEL}@3x3", weights, CPU).extract(given, [sample, SAMPLE])
    for all_three, first, second in zip(both, boxes, grid, strict=True):
        torch.testing.assert_close(all_three.features, torch.cat([first.features, second.features]))
        torch.testing.assert_close(all_three.boxes, torch.cat([first.boxes, second.boxes]))
        assert all_three.tags == first.tags + second.tags
    assert (len(both[0]), len(both[1])) == (10, 9)
    assert strongest(both[0], 1).tags == ("cat",)


def test_extreme_images_pass(weights: str) -> None:
    given = images((1, 1), (1, 2000), (2000, 1))
    found = make_extractor(f"grid:{MODEL}@2x2", weights, CPU).extract(given, [SAMPLE] * 3)
    assert [len(regions) for regions in found] == [4, 4, 4]
    assert make_extractor(f"grid:{MODEL}", weights, CPU).extract([], []) == []


def test_random_weights_are_asked_for_warned_of_and_always_the_same(caplog: pytest.LogCaptureFixture) -> None:
    state = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        first = make_extractor(f"grid:{MODEL}", "random", CPU)
    assert "RANDOM weights" in caplog.text
    assert first.weights_hash == make_extractor(f"boxes:{MODEL}", "random", CPU).weights_hash
    assert torch.equal(torch.get_rng_state(), state)


def test_the_hash_changes_with_one_weight(weights: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    state = load_file(weights)
    state["conv1.0.weight"][0, 0, 0, 0] += 1e-3
    save_file(state, tmp_path / "other.safetensors")
    before = make_extractor(f"grid:{MODEL}", weights, CPU).weights_hash
    assert make_extractor(f"grid:{MODEL}", str(tmp_path / "other.safetensors"), CPU).weights_hash != before


@pytest.mark.parametrize(
    ("spec", "given", "message"),
    [
        (f"grid:{MODEL}", None, "no weights; give --weights FILE"),
        (f"grid:{MODEL}", "/nowhere.pth", r"^grid:resnet10t: /nowhere.pth: no such file"),
        ("grid:no_such_net", "random", "^grid:no_such_net: timm can't build"),
        ("boxes:vit_tiny_patch16_224", "random", "gives no feature map"),
        (f"grid:{MODEL},size=8", "random", "size=8: expected pixels, 32 to 4096"),
        (f"grid:{MODEL},size=large", "random", "size=large: expected pixels"),
        (f"grid:{MODEL},classes=x", "random", "grid has no option 'classes'; it has size"),
    ],
)
def test_mistakes_are_one_line(spec: str, given: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        make_extractor(spec, given, CPU)
    assert "\n" not in str(error.value)
    assert "system." not in str(error.value)
