"""Detectors as region extractors, compared with what torchvision and transformers make of the same images."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessor,
    ResNetConfig,
)

from vlscale.data.sample import Sample
from vlscale.errors import UserError
from vlscale.nn import roi_detector
from vlscale.nn.detectors import make_extractor
from vlscale.nn.extraction import DETECTIONS, SCORE, parse_spec, weights_hash, workable

CPU = torch.device("cpu")
SMALL = "fasterrcnn_mobilenet_v3_large_320_fpn"
SIZES = ((96, 160), (120, 90), (96, 160))


def images(sizes: tuple[tuple[int, int], ...] = SIZES) -> list[Tensor]:
    """Patches of random colours, so that no two places look alike."""
    generator = torch.Generator().manual_seed(3)
    patches = [torch.randint(0, 256, (1, 3, 5, 7), generator=generator, dtype=torch.uint8) for _ in sizes]
    return [F.interpolate(one, size=size, mode="nearest")[0] for one, size in zip(patches, sizes, strict=True)]


def samples(number: int) -> list[Sample]:
    return [Sample(str(index), Path(f"{index}.jpg")) for index in range(number)]


def random_detector(classes: int | None = None) -> Any:
    """Random weights that see something: BatchNorm knows the images, and some detections are sure."""
    torch.manual_seed(0)
    model: Any = models.get_model(SMALL, weights=None, weights_backbone=None, num_classes=classes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
    with torch.no_grad():
        resized, _ = model.eval().transform([image.float() / 255 for image in images()])
        model.backbone.train()(resized.tensors)
        model.roi_heads.box_predictor.cls_score.weight *= 30
        model.roi_heads.box_predictor.bbox_pred.weight *= 30
    return model.eval()


@pytest.fixture(scope="module")
def coco_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    torch.save(random_detector().state_dict(), path)
    return path


def test_detections_are_torchvisions_and_features_those_of_the_final_boxes(coco_weights: Path) -> None:
    extractor = make_extractor(f"torchvision:{SMALL}", str(coco_weights), CPU)
    assert (extractor.name, extractor.width) == (f"torchvision:{SMALL}", 1024)
    model = random_detector()
    names = roi_detector.published(SMALL).meta["categories"]
    found = extractor.extract(images(), samples(3))
    for image, regions in zip(images(), found, strict=True):
        height, width = image.shape[1:]
        pixels = image.float() / 255
        with torch.no_grad():
            (expected,) = model([pixels])
            resized, _ = model.transform([pixels])
            maps = model.backbone(resized.tensors)
        assert 0 < len(regions) == len(expected["boxes"]) <= DETECTIONS
        size = torch.tensor([width, height, width, height])
        torch.testing.assert_close(regions.boxes * size, expected["boxes"], rtol=0, atol=2e-2)
        torch.testing.assert_close(regions.confidences, expected["scores"], rtol=0, atol=1e-4)
        assert float(regions.confidences.min()) >= SCORE
        assert float(regions.features.float().std(0).mean()) > 0.05  # so that the wrong boxes would be noticed
        assert regions.tags == tuple({"N/A": ""}.get(names[label], names[label]) for label in expected["labels"])
        rows, columns = resized.image_sizes[0]
        for index in range(0, len(regions), 7):
            box = regions.boxes[index : index + 1] * torch.tensor([columns, rows, columns, rows])
            with torch.no_grad():
                feature = model.roi_heads.box_head(model.roi_heads.box_roi_pool(maps, [box], resized.image_sizes))
            torch.testing.assert_close(regions.features[index].float(), feature[0], rtol=2e-3, atol=2e-3)


def test_results_are_on_the_cpu_in_the_files_types_and_inside_the_image(coco_weights: Path) -> None:
    (regions,) = make_extractor(f"torchvision:{SMALL}", str(coco_weights), CPU).extract(images()[:1], samples(1))
    assert (regions.features.dtype, regions.boxes.dtype) == (torch.float16, torch.float32)
    assert regions.confidences.dtype == torch.float32
    assert not regions.features.requires_grad
    assert regions.boxes.min() >= 0
    assert regions.boxes.max() <= 1
    assert bool((regions.boxes[:, 2:] > regions.boxes[:, :2]).all())


def test_what_is_found_does_not_depend_on_the_neighbours(coco_weights: Path) -> None:
    extractor = make_extractor(f"torchvision:{SMALL}", str(coco_weights), CPU)
    together = extractor.extract(images(), samples(3))
    for image, regions in zip(images(), together, strict=True):
        (alone,) = extractor.extract([image], samples(1))
        torch.testing.assert_close(alone.boxes, regions.boxes, rtol=0, atol=1e-4)
        assert alone.tags == regions.tags


def test_extreme_images_and_images_without_detections_pass(tmp_path: Path) -> None:
    model = random_detector()
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight.zero_()
        model.roi_heads.box_predictor.cls_score.bias.zero_()
    torch.save(model.state_dict(), tmp_path / "unsure.pth")
    extractor = make_extractor(f"torchvision:{SMALL}", str(tmp_path / "unsure.pth"), CPU)
    for regions in extractor.extract(images(((1, 1), (1, 3000), (64, 64))), samples(3)):
        assert regions.features.shape == (0, 1024)
        assert regions.boxes.shape == (0, 4)
    assert extractor.extract([], []) == []


def test_thin_images_are_stretched_and_others_left_alone() -> None:
    thin, plain = images(((2, 1000), (30, 50)))
    assert workable(thin).shape == (3, 10, 1000)
    assert torch.equal(workable(thin)[:, 5:], thin[:, 1:].expand(-1, 5, -1))
    assert workable(plain) is plain


def test_classes_other_than_cocos_are_numbers_or_come_from_a_file(tmp_path: Path) -> None:
    save_file(random_detector(4).state_dict(), tmp_path / "own.safetensors")
    weights = str(tmp_path / "own.safetensors")
    tags = make_extractor(f"torchvision:{SMALL}", weights, CPU).extract(images(), samples(3))[0].tags
    assert tags
    assert set(tags) <= {"class 1", "class 2", "class 3"}
    names = tmp_path / "names.txt"
    for lines in ("cat\ndog\nold hat\n", "background\ncat\ndog\nold hat\n"):
        names.write_text(lines)
        named = make_extractor(f"torchvision:{SMALL},classes={names}", weights, CPU).extract(images(), samples(3))
        mapped = {"class 1": "cat", "class 2": "dog", "class 3": "old hat"}
        assert named[0].tags == tuple(mapped[tag] for tag in tags)
    names.write_text("cat\n")
    with pytest.raises(UserError, match="expected a name a line, 3 without background, got 1"):
        make_extractor(f"torchvision:{SMALL},classes={names}", weights, CPU)


def test_mask_r_cnn_works_by_its_box_head() -> None:
    extractor: Any = make_extractor("torchvision:maskrcnn_resnet50_fpn", "random", CPU, mean=(0.5,) * 3)
    assert extractor.width == 1024
    assert not extractor._model.roi_heads.has_mask()
    assert extractor._model.transform.image_mean == [0.5, 0.5, 0.5]


def test_weights_that_were_not_fetched_are_one_line_with_what_to_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError) as error:
        make_extractor("torchvision:fasterrcnn_resnet50_fpn_v2", None, CPU)
    text = str(error.value)
    assert "https://download.pytorch.org/models/fasterrcnn_resnet50_fpn_v2_coco-" in text
    assert "--weights" in text
    assert "\n" not in text
    assert not list(tmp_path.rglob("*.pth"))


def test_weights_that_torchvision_fetched_are_used_as_it_uses_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first Faster R-CNN was trained without an epsilon; a file without that origin keeps the usual one."""
    name = "fasterrcnn_resnet50_fpn"
    state = models.get_model(name, weights=None, weights_backbone=None, num_classes=3).state_dict()
    kept = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(kept, tmp_path / "own.pth")
    start = hashlib.sha256((tmp_path / "own.pth").read_bytes()).hexdigest()[:8]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "own.pth").rename(tmp_path / "checkpoints" / f"coco-{start}.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for digits, epsilon in ((start, 0.0), ("00000000", 1e-5)):
        weights = SimpleNamespace(url=f"https://x.org/coco-{digits}.pth", meta={"categories": ["", "a", "b"]})
        monkeypatch.setattr(roi_detector, "published", lambda _, weights=weights: weights)
        given = None if digits == start else str(tmp_path / "checkpoints" / f"coco-{start}.pth")
        extractor: Any = make_extractor(f"torchvision:{name}", given, CPU)
        norms = [module for module in extractor._model.modules() if isinstance(module, nn.BatchNorm2d)]
        assert {module.eps for module in norms} == {epsilon}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("rpn.head.bbox_pred.bias"), "rpn.head.bbox_pred.bias is missing"),
        (lambda state: state.update(extra=torch.zeros(1)), "extra has no place"),
        (lambda state: state.pop(roi_detector.CLASSES), "expected the weights of"),
        (lambda state: state.update({"rpn.head.bbox_pred.bias": torch.zeros(1)}), "size mismatch for rpn.head"),
    ],
)
def test_weights_of_another_model_are_one_line(coco_weights: Path, tmp_path: Path, change: Any, message: str) -> None:
    state = torch.load(coco_weights, weights_only=True)
    change(state)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(UserError, match=message) as error:
        make_extractor(f"torchvision:{SMALL}", str(tmp_path / "other.pth"), CPU)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "weights", "message"),
    [
        ("yolo:v9", None, "no kind 'yolo'; there are torchvision, detr, grid"),
        ("torchvision", None, "expected KIND:MODEL"),
        ("torchvision:retinanet_resnet50_fpn", None, "has no RoI head"),
        ("torchvision:fasterrcnn", None, "torchvision has no detector 'fasterrcnn'"),
        (f"torchvision:{SMALL},size=3", None, "torchvision has no option 'size'; it has classes"),
        (f"torchvision:{SMALL}", "/nowhere.pth", "no such file"),
        ("detr:/nowhere/detr", None, "no such folder"),
        ("detr:/nowhere/detr", "x.pth", "leave --weights out"),
    ],
)
def test_mistakes_are_one_line(spec: str, weights: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        make_extractor(spec, weights, CPU)
    assert "\n" not in str(error.value)


def test_two_numbers_are_no_colour() -> None:
    with pytest.raises(UserError, match="mean: expected three numbers, got 2"):
        make_extractor("grid:resnet18", "random", CPU, mean=(0.5, 0.5))


def test_specifications_are_taken_apart() -> None:
    spec = parse_spec("boxes+grid:resnet18.a1_in1k@3x5,size=320")
    assert (spec.kind, spec.model, spec.cells) == ("boxes+grid", "resnet18.a1_in1k", (3, 5))
    assert spec.options == {"size": "320"}
    assert parse_spec("detr:/data/run@3x3").model == "/data/run@3x3"
    assert parse_spec("torchvision:m,classes=/a,b/c.txt").options == {"classes": "/a,b/c.txt"}


def test_the_hash_sees_names_types_shapes_and_every_weight() -> None:
    state = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(3), "c": torch.ones(2, dtype=torch.bfloat16)}
    whole = weights_hash(state)
    assert len(whole) == 64
    assert weights_hash(dict(reversed(state.items()))) == whole
    changed = state["b"].clone()
    changed[1, 2] += 1e-6
    others = [
        {**state, "b": changed},
        {**state, "b": state["b"].reshape(3, 2)},
        {**state, "a": torch.tensor(3, dtype=torch.int32)},
        {"d": state["b"], "a": state["a"], "c": state["c"]},
    ]
    assert len({whole, *(weights_hash(other) for other in others)}) == 5


BACKBONE = ResNetConfig(
    embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
)
TINY: dict[str, Any] = {
    "use_timm_backbone": False,
    "backbone_config": BACKBONE,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_queries": 12,
    "id2label": {0: "N/A", 1: "person", 2: "red hat"},
    "label2id": {"N/A": 0, "person": 1, "red hat": 2},
}


def save_queries(folder: Path, sigmoid: bool) -> None:
    torch.manual_seed(0)
    model: Any = (
        ConditionalDetrForObjectDetection(ConditionalDetrConfig(**TINY))
        if sigmoid
        else DetrForObjectDetection(DetrConfig(**TINY))
    )
    with torch.no_grad():
        model.class_labels_classifier.weight.normal_(0, 3)
        for layer in model.bbox_predictor.layers:
            layer.weight.normal_(0, 0.5)
    model.save_pretrained(folder)
    DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(folder)


@pytest.mark.parametrize("sigmoid", [False, True], ids=["detr", "conditional"])
def test_queries_are_transformers_detections(tmp_path: Path, sigmoid: bool) -> None:
    save_queries(tmp_path / "tiny", sigmoid)
    extractor = make_extractor(f"detr:{tmp_path / 'tiny'}", None, CPU)
    assert (extractor.name, extractor.width) == ("detr:tiny", 16)
    found = extractor.extract(images(), samples(3))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "tiny")
    model = AutoModelForObjectDetection.from_pretrained(tmp_path / "tiny").eval()
    for image, regions in zip(images(), found, strict=True):
        with torch.no_grad():
            output = model(**processor(images=[image], return_tensors="pt"))
        expected = by_hand(output, sigmoid)
        assert 0 < len(regions) == len(expected) <= 12
        for index, (score, query, label) in enumerate(expected):
            x, y, width, height = output.pred_boxes[0, query].tolist()
            box = torch.tensor([x - width / 2, y - height / 2, x + width / 2, y + height / 2]).clamp(0, 1)
            torch.testing.assert_close(regions.boxes[index], box, rtol=0, atol=1e-4)
            state = output.last_hidden_state[0, query]
            torch.testing.assert_close(regions.features[index].float(), state, rtol=2e-3, atol=2e-3)
            assert float(regions.confidences[index]) == pytest.approx(score, abs=1e-4)
            assert regions.tags[index] == ("", "person", "red hat")[label]


def by_hand(output: Any, sigmoid: bool) -> list[tuple[float, int, int]]:
    """Score, query and class of every detection, the best first."""
    found = []
    for query, logits in enumerate(output.logits[0].tolist()):
        row = torch.tensor(logits, dtype=torch.float64)
        assert len(row) == (3 if sigmoid else 4)
        chances = (1 / (1 + (-row).exp()) if sigmoid else row.exp() / row.exp().sum())[:3].tolist()
        if max(chances) >= SCORE:
            found.append((max(chances), query, chances.index(max(chances))))
    return sorted(found, reverse=True)


def test_an_incomplete_detr_is_refused_instead_of_filled_at_random(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    save_queries(tmp_path / "tiny", False)
    before = make_extractor(f"detr:{tmp_path / 'tiny'}", None, CPU).weights_hash
    file = tmp_path / "tiny" / "model.safetensors"
    state = load_file(file)
    name = "class_labels_classifier.bias"
    save_file({**state, name: state[name] + 1}, file, {"format": "pt"})
    assert make_extractor(f"detr:{tmp_path / 'tiny'}", None, CPU).weights_hash != before
    del state[name]
    save_file(state, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"{name} .of 1. is missing"):
        make_extractor(f"detr:{tmp_path / 'tiny'}", None, CPU)
    (tmp_path / "tiny" / "config.json").unlink()
    with pytest.raises(UserError, match="can't be loaded"):
        make_extractor(f"detr:{tmp_path / 'tiny'}", None, CPU)


def test_features_that_are_no_numbers_name_the_sample(coco_weights: Path, tmp_path: Path) -> None:
    state = torch.load(coco_weights, weights_only=True)
    state["roi_heads.box_head.fc7.weight"] *= 1e9
    state[roi_detector.CLASSES] *= 1e-9  # so that boxes and scores stay what they were
    state["roi_heads.box_predictor.bbox_pred.weight"] *= 1e-9
    torch.save(state, tmp_path / "huge.pth")
    extractor = make_extractor(f"torchvision:{SMALL}", str(tmp_path / "huge.pth"), CPU)
    with pytest.raises(UserError, match="sample 0: features beyond float16"):
        extractor.extract(images()[:1], samples(1))
