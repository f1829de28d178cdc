"""Convolutional backbones: their maps, what never trains, what rests, and where weights come from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vlscale.config import Backbone
from vlscale.errors import UserError
from vlscale.nn.cnn import CnnEncoder

NARROW: dict[str, Any] = {"channels": (8, 8, 16, 24)}
EFFICIENT = "tf_efficientnet_lite0"
FIRST_STAGE = {"resnet18": ("conv1.", "bn1.", "layer1."), EFFICIENT: ("conv_stem.", "bn1.", "blocks.0.")}
MODELS = [pytest.param("resnet18", NARROW, id="resnet18"), pytest.param(EFFICIENT, {}, id=EFFICIENT)]


def encoder(model: str = "resnet18", overrides: dict[str, Any] | None = None, **changes: Any) -> CnnEncoder:
    torch.manual_seed(0)
    overrides = (NARROW if model == "resnet18" else {}) if overrides is None else overrides
    return CnnEncoder(Backbone(model=model, overrides=overrides, **changes))


def images(size: tuple[int, int] = (64, 64), number: int = 2) -> Tensor:
    return torch.randn(number, 3, *size, generator=torch.Generator().manual_seed(1))


def buffers(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.named_buffers()}


def moved(before: dict[str, Tensor], net: nn.Module) -> set[str]:
    return {name for name, value in net.named_buffers() if not torch.equal(before[name], value)}


def with_gradient(net: nn.Module) -> set[str]:
    return {name for name, parameter in net.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(("model", "overrides"), MODELS)
def test_maps_have_the_promised_width_and_stride(model: str, overrides: dict[str, Any]) -> None:
    cnn = encoder(model, overrides).eval()
    assert cnn.reduction == 32
    with torch.no_grad():
        assert cnn(images((64, 96))).shape == (2, cnn.width, 2, 3)
    assert cnn.width == (24 if model == "resnet18" else 1280)


def test_the_stride_is_the_networks_own() -> None:
    dilated = encoder(overrides={**NARROW, "output_stride": 16}).eval()
    assert dilated.reduction == 16
    assert dilated(images()).shape == (2, 24, 4, 4)


@pytest.mark.parametrize(("model", "overrides"), MODELS)
def test_stem_and_first_stage_never_train(model: str, overrides: dict[str, Any]) -> None:
    cnn = encoder(model, overrides, frozen_stages=1).train()
    everything = {name for name, _ in cnn.net.named_parameters()}
    frozen = {name for name in everything if name.startswith(FIRST_STAGE[model])}
    assert {name for name, p in cnn.net.named_parameters() if not p.requires_grad} == frozen
    before = buffers(cnn.net)
    cnn(images()).square().sum().backward()
    assert with_gradient(cnn.net) == everything - frozen
    assert moved(before, cnn.net) == {name for name in before if not name.startswith(FIRST_STAGE[model])}


def test_more_stages_and_none() -> None:
    for stages, names in ((0, ()), (2, ("conv1", "bn1", "layer1", "layer2"))):
        cnn = encoder(frozen_stages=stages).train()
        assert {n.split(".")[0] for n, p in cnn.net.named_parameters() if not p.requires_grad} == set(names)
        norms = [(n, m) for n, m in cnn.net.named_modules() if isinstance(m, nn.BatchNorm2d)]
        assert all(module.training == (not name.startswith(names)) for name, module in norms)


@pytest.mark.parametrize(("model", "overrides"), MODELS)
def test_rest_and_waking(model: str, overrides: dict[str, Any]) -> None:
    cnn = encoder(model, overrides, frozen_stages=1).train()
    trained = {name for name, p in cnn.net.named_parameters() if p.requires_grad}
    cnn.rest(True)
    cnn.rest(True)
    cnn.eval()
    cnn.train()  # wakes nobody
    before = buffers(cnn.net)
    assert not cnn(images()).requires_grad
    assert not moved(before, cnn.net)
    cnn.rest(False)
    cnn.rest(False)
    assert {name for name, p in cnn.net.named_parameters() if p.requires_grad} == trained
    cnn(images()).square().sum().backward()
    assert with_gradient(cnn.net) == trained
    assert moved(before, cnn.net) == {name for name in before if not name.startswith(FIRST_STAGE[model])}


def test_resting_maps_are_those_of_evaluation() -> None:
    cnn = encoder().train()
    cnn(images())  # running statistics that differ from a batch's
    with torch.no_grad():
        expected = cnn.eval()(images())
        cnn.train().rest(True)
        assert torch.equal(cnn(images()), expected)
        cnn.rest(False)
        assert not torch.allclose(cnn(images()), expected, atol=1e-3)
        cnn.rest(True)
        cnn.eval().rest(False)  # waking in evaluation is no reason to use a batch's statistics
        assert not any(module.training for module in cnn.modules())


def test_a_ready_network_keeps_its_weights() -> None:
    source = encoder()
    taken = CnnEncoder(Backbone(model="unread", init="unread", frozen_stages=3), net=source.net).eval()
    assert taken.net is source.net
    assert torch.equal(taken(images()), source.eval()(images()))
    assert {n.split(".")[0] for n, p in taken.net.named_parameters() if p.requires_grad} == {"layer4"}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_by_name(tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    source, file = encoder(frozen_stages=0).train(), tmp_path / f"weights.{suffix}"
    source(images())
    # no order is needed, and the classifier has no place
    weights = dict(reversed(source.net.state_dict().items())) | {
        "fc.weight": torch.zeros(5, 24),
        "fc.bias": torch.zeros(5),
    }
    if suffix == "pth":
        torch.save({"state_dict": weights, "epoch": 3}, file)
    else:
        save_file({name: value.contiguous() for name, value in weights.items()}, file)
    with caplog.at_level(logging.INFO, "vlscale.nn.cnn"):
        torch.manual_seed(7)
        loaded = CnnEncoder(Backbone(model="resnet18", overrides=NARROW, init=str(file)))
    assert "taken by name" in caplog.text
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images()), source.eval()(images()))
    assert not loaded.net.conv1.weight.requires_grad


def foreign(net: nn.Module) -> dict[str, Tensor]:
    """The same tensors under names of another code base, with a classifier behind them; no BatchNorm counters."""
    own = {name: value for name, value in net.state_dict().items() if not name.endswith("num_batches_tracked")}
    renamed = {f"_part{index}.{name.rpartition('.')[2]}": value for index, (name, value) in enumerate(own.items())}
    return renamed | {"_fc.weight": torch.zeros(7, 24), "_fc.bias": torch.zeros(7)}


def test_foreign_weights_in_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = encoder().train()
    source(images())
    torch.save(foreign(source.net), tmp_path / "foreign.pth")
    torch.manual_seed(7)
    loaded = CnnEncoder(Backbone(model="resnet18", overrides=NARROW, init=str(tmp_path / "foreign.pth")))
    assert "taken in order" in caplog.text
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images()), source.eval()(images()))


def swap(weights: dict[str, Tensor], first: int, second: int) -> dict[str, Tensor]:
    items = list(weights.items())
    items[first], items[second] = items[second], items[first]
    return dict(items)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    net = encoder().net
    own, other, file = net.state_dict(), foreign(net), tmp_path / "wrong.pth"
    last = list(other)[-3]
    wrong: list[tuple[Any, str]] = [
        ({**own, "layer2.0.bn1.bias": torch.zeros(3)}, r"layer2\.0\.bn1\.bias: expected \(8,\), found \(3,\)"),
        ({n: v for n, v in own.items() if n != "bn1.weight"}, r"bn1\.weight: expected \(64,\), found nothing"),
        ({**own, "layer5.0.conv1.weight": torch.zeros(3, 3, 3, 3)}, r"layer5\.0\.conv1\.weight .* has no place"),
        ({**own, "a.weight": torch.zeros(2, 3), "b.weight": torch.zeros(3, 2)}, r"a\.weight \(2, 3\) has no place"),
        (swap(other, 0, 1), r"in order conv1\.weight \(64, 3, 7, 7\) meets _part1\.weight \(64,\)"),
        # a running mean and a variance have one shape: their kinds tell them apart
        (swap(other, 3, 4), r"in order bn1\.running_mean \(64,\) meets _part4\.running_var \(64,\)"),
        (dict(list(other.items())[:-3]), r"in order layer4\.1\.bn2\.running_var \(24,\) meets the end"),
        ({**other, "z.bias": other[last]}, r"_fc\.weight \(7, 24\) has no place"),
        ({"epoch": 3}, "expected a state dict"),
        ([1, 2], "expected a state dict"),
    ]
    for weights, message in wrong:
        torch.save(weights, file)
        with pytest.raises(UserError, match=rf"system\.backbone\.init: .*wrong\.pth.*{message}"):
            encoder(init=str(file))
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("no weights at all")
        with pytest.raises(UserError, match=rf"{name}: can't be read as weights: ."):
            encoder(init=str(tmp_path / name))
    save_file(other, tmp_path / "sorted.safetensors")
    with pytest.raises(UserError, match=r"sorted\.safetensors: conv1\.weight is missing, .* give a torch file"):
        encoder(init=str(tmp_path / "sorted.safetensors"))
    with pytest.raises(UserError, match="no such file; use random, pretrained or a weights file"):
        encoder(init=str(tmp_path / "absent.pth"))


def test_wrong_models_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"system\.backbone: timm can't build 'no_such_model'"):
        encoder("no_such_model")
    for model in ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"):
        with pytest.raises(UserError, match=rf"system\.backbone\.model: {model} gives no feature map"):
            encoder(model)
    for model, stages in (("resnet18", 4), (EFFICIENT, 7)):
        with pytest.raises(UserError, match=rf"frozen_stages: {stages + 1}, but {model} has {stages} stages"):
            encoder(model, frozen_stages=stages + 1)

    def unreachable(*_arguments: Any, **_options: Any) -> None:
        raise OSError("cannot find the requested files\nmore lines")

    monkeypatch.setattr("vlscale.nn.cnn.timm.create_model", unreachable)
    with pytest.raises(UserError, match=r"timm can't build 'resnet18': cannot find the requested files$"):
        encoder(init="pretrained")


def test_half_precision_weights_take_float_images() -> None:
    assert encoder().eval().bfloat16()(images()).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize(("model", "overrides"), MODELS)
def test_a_forward_keeps_to_the_gpu(model: str, overrides: dict[str, Any]) -> None:
    cnn = encoder(model, overrides).train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in cnn.modules():
            for tensors in (module._parameters, module._buffers):
                for name, value in tensors.items():
                    if value is not None:
                        fake = torch.empty_like(value, device="cuda")
                        tensors[name] = nn.Parameter(fake) if isinstance(value, nn.Parameter) else fake
        assert cnn(torch.empty(2, 3, 64, 64, device="cuda")).device.type == "cuda"
        cnn.rest(True)
