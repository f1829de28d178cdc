"""SOHO's neck against slow re-computations; the release's kinds have recordings in tests/parity."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from vlscale.codebooks.neck import VisualNeck, cell_size, valid_cells
from vlscale.config import Dictionary, Neck
from vlscale.errors import UserError
from vlscale.nn.sine import sine_positions

CHANNELS, WIDTH, SIZE = 6, 8, 16
KINDS = ["code", "sum", "gated"]
CPU = torch.device("cpu")


def neck(kind: str = "code", **options: object) -> VisualNeck:
    torch.manual_seed(0)
    dictionary = Dictionary(**{"size": SIZE, "gamma": 0.5, **options})  # type: ignore[arg-type]
    return VisualNeck(Neck(kind=kind), dictionary, CHANNELS, WIDTH).train()  # type: ignore[arg-type]


def everywhere(maps: int, rows: int, columns: int) -> Tensor:
    return torch.ones(maps, rows, columns, dtype=torch.bool)


def test_code_is_convolution_then_pooling_then_the_code() -> None:
    module, maps = neck(), torch.randn(2, CHANNELS, 5, 6)
    states = module(maps, everywhere(2, 2, 3))
    projected = torch.einsum("mchw,dc->mdhw", maps, module.conv.weight[:, :, 0, 0]) + module.conv.bias[:, None, None]
    cells = [projected[:, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].amax((2, 3)) for y in range(2) for x in range(3)]
    torch.testing.assert_close(states.features, torch.stack(cells, 1))
    assert torch.equal(states.indices, module.dictionary.assign(states.features))
    assert torch.equal(states.embeds, module.dictionary.codes[states.indices])


@pytest.mark.parametrize("kind", KINDS)
def test_without_quantising_the_features_are_the_embeddings(kind: str) -> None:
    maps, valid = torch.randn(2, CHANNELS, 4, 4), everywhere(2, 2, 2)
    module = neck(kind)
    states = module(maps, valid, quantise=False)
    assert torch.equal(states.embeds, states.features)
    assert states.indices is None
    before = module.dictionary.codes.clone()
    module.dictionary.after_step(1)
    assert torch.equal(module.dictionary.codes, before)

    without = neck(kind, use=False)
    assert without.dictionary is None
    assert not {"code_proj", "gate", "gate_norm", "dictionary"} & set(dict(without.named_children()))
    shared = {name: value for name, value in module.state_dict().items() if name in without.state_dict()}
    without.load_state_dict(shared)
    own = without(maps, valid)
    assert own.indices is None
    torch.testing.assert_close(own.embeds, states.embeds)


def test_masked_cells_get_the_embedding_before_positions_and_norm() -> None:
    module, embeds, valid = neck(), torch.randn(2, 6, WIDTH, requires_grad=True), everywhere(2, 2, 3)
    mask = torch.tensor([[True, False, False, True, False, False], [False] * 6])
    tokens = module.tokens(embeds, valid, mask)
    positions = sine_positions(valid, WIDTH)
    for image in range(2):
        for cell in range(6):
            state = module.mask_embed if mask[image, cell] else embeds[image, cell]
            slow = F.layer_norm(state + positions[image, cell], (WIDTH,), eps=1e-5)
            torch.testing.assert_close(tokens[image, cell], slow)
    (tokens * torch.randn_like(tokens)).sum().backward()
    assert torch.equal(embeds.grad.abs().sum(2) > 0, ~mask)  # type: ignore[union-attr]
    assert module.mask_embed.grad.abs().sum() > 0  # type: ignore[union-attr]
    assert torch.equal(module.tokens(embeds, valid, None), module.tokens(embeds, valid, torch.zeros_like(mask)))


def test_padding_reaches_neither_tokens_nor_dictionary() -> None:
    """The same images with more padding, of whatever content: same tokens where valid, same dictionary after."""
    tight, padded = neck(), neck()
    maps = torch.randn(2, CHANNELS, 4, 6)
    wide = 50 * torch.randn(2, CHANNELS, 8, 10)
    wide[:, :, :4, :6] = maps
    valid = torch.zeros(2, 4, 5, dtype=torch.bool)
    valid[:, :2, :3] = True
    states, more = tight(maps, everywhere(2, 2, 3)), padded(wide, valid)
    tokens = tight.tokens(states.embeds, everywhere(2, 2, 3), None)
    more_tokens = padded.tokens(more.embeds, valid, None)
    torch.testing.assert_close(more_tokens[:, valid[0].flatten()], tokens)
    for module in (tight, padded):
        module.dictionary.after_step(1)
    torch.testing.assert_close(tight.dictionary.codes, padded.dictionary.codes)
    assert torch.equal(tight.dictionary.tracker.counts, padded.dictionary.tracker.counts)


def test_sine_positions_by_loops() -> None:
    valid = torch.zeros(2, 3, 4, dtype=torch.bool)
    valid[0, :2, :3] = True
    valid[1] = True
    found, half = sine_positions(valid, WIDTH), WIDTH // 2
    assert found.dtype == torch.float32
    for image, (rows, columns) in enumerate(((2, 3), (3, 4))):
        for y in range(rows):
            for x in range(columns):
                slow = []
                for place, last in ((y + 1, rows), (x + 1, columns)):
                    angle = place / (last + 1e-6) * 2 * math.pi
                    for j in range(half):
                        wave = angle / 10000 ** (2 * (j // 2) / half)
                        slow.append(math.cos(wave) if j % 2 else math.sin(wave))
                torch.testing.assert_close(found[image, 4 * y + x], torch.tensor(slow), atol=1e-5, rtol=1e-5)


def resized(sizes: Tensor, canvas: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    pixels = torch.zeros(len(sizes), 1, *canvas)
    for mask, (height, width) in zip(pixels, sizes.tolist(), strict=True):
        mask[:, :height, :width] = 1
    return F.interpolate(pixels, size=grid, mode="nearest")[:, 0].bool()


@pytest.mark.parametrize("canvas", [(64, 64), (608, 1024), (640, 640), (192, 96), (928, 608)])
@pytest.mark.parametrize("square", [False, True])
def test_valid_cells_are_the_resized_mask_of_pixels(canvas: tuple[int, int], square: bool) -> None:
    grid = (canvas[0] // 64, canvas[1] // 64)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.stack([torch.randint(1, side + 1, (40,), generator=generator) for side in canvas], 1)
    edges = torch.tensor([[round(y * canvas[0] / grid[0]), canvas[1]] for y in range(1, grid[0] + 1)])
    sizes = torch.cat([sizes, edges, edges + 1, torch.tensor([canvas])]).clamp(max=torch.tensor(canvas))
    found = valid_cells(sizes, canvas, grid, square, len(sizes), CPU)
    assert torch.equal(found, resized(sizes, (canvas[0], canvas[0]) if square else canvas, grid))
    assert found[:, 0, 0].all(), "every image has a cell"


def test_images_without_sizes_fill_the_canvas() -> None:
    assert valid_cells(None, (128, 256), (2, 4), False, 3, CPU).sum() == 3 * 2 * 4
    assert valid_cells(None, (128, 128), (2, 2), True, 3, CPU).sum() == 3 * 2 * 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("native", [False, True], ids=["autocast", "native"])
def test_half_precision(kind: str, native: bool) -> None:
    """bf16 as the engine runs it: the dictionary's part stays exact, every parameter gets a gradient."""
    module = neck(kind)
    if native:
        module.bfloat16()
    maps, valid = torch.randn(2, CHANNELS, 4, 6), everywhere(2, 2, 3)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 0] = True
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = module(maps.bfloat16(), valid)
        tokens = module.tokens(states.embeds, valid, mask)
    assert torch.equal(states.indices, module.dictionary.assign(states.features.float()))
    (tokens.float() * torch.randn(tokens.shape)).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert tokens.isfinite().all()


def test_batch_norms_can_be_synchronised() -> None:
    module = nn.SyncBatchNorm.convert_sync_batchnorm(neck("gated"))
    assert isinstance(module.norm, nn.SyncBatchNorm)
    assert isinstance(module.gate_norm, nn.SyncBatchNorm)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in module.modules())


def test_what_cannot_be_is_refused() -> None:
    assert cell_size(19, 32) == (9, 16)
    with pytest.raises(UserError, match=r"data.aspect: a feature map of 1 x 4"):
        neck()(torch.randn(1, CHANNELS, 1, 4), everywhere(1, 0, 2))
    with pytest.raises(UserError, match=r"system.text.width: 10 "):
        VisualNeck(Neck(), Dictionary(size=SIZE), CHANNELS, 10)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("kind", KINDS)
def test_it_keeps_to_the_gpu(kind: str) -> None:
    """Mixed devices and questions to the device raise under fake tensors."""
    module = neck(kind, update="release")
    with FakeTensorMode():
        for part in module.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                setattr(part, name, nn.Parameter(torch.empty(parameter.shape, device="cuda")))
            for name, buffer in list(part.named_buffers(recurse=False)):
                setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda"))
        sizes = torch.empty(2, 2, dtype=torch.int64, device="cuda")
        for given in (sizes, None):
            valid = valid_cells(given, (128, 192), (2, 3), True, 2, torch.device("cuda"))
            states = module(torch.empty(2, CHANNELS, 4, 6, device="cuda"), valid)
            tokens = module.tokens(states.embeds, valid, torch.empty(2, 6, dtype=torch.bool, device="cuda"))
            assert {tokens.device.type, states.features.device.type, valid.device.type} == {"cuda"}
