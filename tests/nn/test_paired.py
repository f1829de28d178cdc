"""One text over two images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vlscale.config import Text
from vlscale.nn.bert import FusionEncoder, KeyValue, select_context
from vlscale.nn.paired import PairedFusionEncoder
from vlscale.nn.teacher import Teacher

CONTEXT = 10


def options(norm: str = "post") -> Text:
    sizes = {"width": 16, "heads": 4, "intermediate": 24, "text_layers": 1, "fusion_layers": 2, "max_positions": 12}
    return Text(**sizes, dropout=0.0, norm=norm)  # type: ignore[arg-type]


def encoder(norm: str = "post", checkpointing: bool = False) -> PairedFusionEncoder:
    torch.manual_seed(1)
    built = PairedFusionEncoder(options(norm), CONTEXT, checkpointing)
    for parameter in built.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return built


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Three texts, four images."""
    torch.manual_seed(0)
    mask = torch.ones(3, 6).long()
    mask[1, 4:] = 0
    return torch.randn(3, 6, 16), mask, torch.randn(4, 5, CONTEXT)


FIRST, SECOND = torch.tensor([0, 1, 1]), torch.tensor([2, 2, 3])


def pair(module: PairedFusionEncoder, images: Tensor) -> tuple[list[KeyValue], list[KeyValue]]:
    context = module.project_context(images)
    return select_context(context, FIRST), select_context(context, SECOND)


def by_hand(module: PairedFusionEncoder, states: Tensor, mask: Tensor, images: Tensor) -> Tensor:
    """Layer by layer, the images projected for every pair of layers anew."""
    bias = torch.zeros(3, 1, 1, 6).masked_fill(mask[:, None, None] == 0, -1e9)
    layers = list(module.layer)
    for index, layer in enumerate(layers):
        image = images[(FIRST, SECOND)[index % 2]]
        projections = layers[index - index % 2].crossattention.self  # type: ignore[union-attr]
        states = layer(states, bias, projections.project(image))  # type: ignore[union-attr, operator]
    return module.final_norm(states)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_even_layers_see_the_first_image_odd_ones_the_second(norm: str) -> None:
    module, (states, mask, images) = encoder(norm), inputs()
    fused = module(states, mask, *pair(module, images))
    assert torch.allclose(fused, by_hand(module, states, mask, images), atol=1e-5)
    only = module(states, mask, *pair(module, images), cls_only=True)
    assert torch.allclose(only, fused[:, :1], atol=1e-5)
    swapped = module(states, mask, *reversed(pair(module, images)))
    assert (swapped - fused).abs().max() > 1e-2


def test_a_pair_s_keys_and_values_are_one_parameter() -> None:
    """Stored once, so that no checkpoint or optimizer meets a tensor under two names; its gradient is the sum."""
    module, (states, mask, images) = encoder(), inputs()
    names = [name for name, _ in module.named_parameters() if "crossattention.self.key" in name]
    assert names == [f"layer.{index}.crossattention.self.key.{part}" for index in (0, 2) for part in ("weight", "bias")]
    gradients = []
    for both in ((True, True), (True, False), (False, True)):
        module.zero_grad()
        first, second = pair(module, images)
        parts = [
            kv if wanted else [KeyValue(*(t.detach() for t in layer)) for layer in kv]
            for kv, wanted in zip((first, second), both, strict=True)
        ]
        module(states, mask, *parts).square().mul(torch.arange(16)).sum().backward()
        gradients.append(module.get_parameter(names[0]).grad.clone())  # type: ignore[union-attr]
    assert torch.allclose(gradients[0], gradients[1] + gradients[2], atol=1e-3)
    assert all(gradient.abs().max() > 1e-3 for gradient in gradients)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_starts_from_fusion_layers_twice(norm: str) -> None:
    fusion, module = FusionEncoder(options(norm), CONTEXT), encoder(norm)
    module.start_from(fusion)
    own, given = module.state_dict(), fusion.state_dict()
    for name, value in own.items():
        room, _, rest = name.partition(".")
        number, _, rest = rest.partition(".")
        source = f"layer.{int(number) // 2}.{rest}" if room == "layer" else name
        assert torch.equal(value, given[source]), name
    assert {name.split(".", 2)[2] for name in own if name.startswith("layer.0.")} == {
        name.split(".", 2)[2] for name in given if name.startswith("layer.0.")
    }
    shallow = FusionEncoder(options().model_copy(update={"fusion_layers": 1}), CONTEXT)
    with pytest.raises(ValueError, match="4 layers in pairs can't start from 1"):
        module.start_from(shallow)


def test_a_teacher_can_copy_it() -> None:
    module = encoder()
    teacher = Teacher({"paired_encoder": module}, momentum=0.5)
    before = {name: value.clone() for name, value in teacher.state().items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    teacher.update()
    assert all(torch.allclose(value, before[name] + 0.5, atol=1e-6) for name, value in teacher.state().items())


def test_recomputing_activations_keeps_the_gradients() -> None:
    states, mask, images = inputs()
    gradients = []
    for checkpointing in (False, True):
        module = encoder(checkpointing=checkpointing)
        module(states, mask, *pair(module, images), cls_only=True).square().mul(torch.arange(16)).sum().backward()
        gradients.append([p.grad for p in module.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.allclose(plain, recomputed, atol=1e-5)
