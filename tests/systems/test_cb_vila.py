"""CB-ViLA's step: losses against slow re-computations, where gradients stop, warm-up, what a restart needs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vlscale.config import LOSSES, CbVilaSystem, CodebookOptions, MimOptions, Text, Vision
from vlscale.data.sample import Batch, Vocabulary
from vlscale.engine.writer import PlainWriter
from vlscale.errors import UserError
from vlscale.objectives.reconstruction import gumbel_noise, normalize_patches
from vlscale.systems.cb_vila import CbVila
from vlscale.systems.protocol import Choices, Progress

VOCABULARY = Vocabulary(size=40, pad=0, cls=1, sep=2, mask=3)
IMAGE_SIZE, PATCH, WIDTH, CODES = 32, 8, 24, 12
CELLS, MASKED = 16, 12


def config(**changes: Any) -> CbVilaSystem:
    overrides = {"embed_dim": WIDTH, "depth": 2, "num_heads": 3, "patch_size": PATCH}
    text = Text(
        width=WIDTH, heads=2, intermediate=32, text_layers=2, fusion_layers=2, max_positions=12, dropout=0.0, norm="pre"
    )
    mim = changes.pop("mim", MimOptions())
    base: dict[str, Any] = {
        "vision": Vision(model="vit_tiny_patch16_224", overrides=overrides),
        "text": text,
        "embed_dim": 8,
        "codebook": CodebookOptions(size=CODES, init_step=2, revive_after=10),
        "mim": mim,
        "warmup_steps": 3,
    }
    return CbVilaSystem(**(base | changes))


def system(seed: int = 0, contrast: bool = True, **changes: Any) -> CbVila:
    torch.manual_seed(seed)
    return CbVila(config(**changes), IMAGE_SIZE, VOCABULARY, contrast=contrast).train()


def batch(size: int = 4, length: int = 9, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCABULARY.size, (size, length), generator=generator)
    ids[:, 0] = VOCABULARY.cls
    mask = torch.ones_like(ids)
    for row in range(size):
        mask[row, length - row % 4 :] = 0
    images = torch.randn(size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return Batch(images, torch.where(mask == 1, ids, VOCABULARY.pad), mask, torch.arange(size))


def progress(step: int = 5, seed: int = 0) -> Progress:
    return Progress(step, 10, 4.0, torch.Generator().manual_seed(seed))


def patch_mask(size: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.rand(size, CELLS, generator=generator).argsort(1) < MASKED


def gradients(model: CbVila, loss: Tensor) -> dict[str, Tensor | None]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True), strict=True))


def reached(model: CbVila, loss: Tensor) -> set[str]:
    return {name for name, grad in gradients(model, loss).items() if grad is not None and grad.abs().sum() > 0}


def test_losses_are_those_that_weights_may_name_and_reach_every_parameter() -> None:
    model = system()
    output = model(batch(), progress())
    assert set(output.losses) == set(LOSSES["cb_vila"])
    assert all(loss.ndim == 0 and torch.isfinite(loss) for loss in output.losses.values())
    assert not any(metric.requires_grad for metric in output.metrics.values())
    torch.stack(list(output.losses.values())).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()


def test_mim_and_mlm_join_after_the_warm_up() -> None:
    model = system()
    assert set(model(batch(), progress(2)).losses) == {"itc", "itm", "codebook", "pixel"}
    assert set(model(batch(), progress(3)).losses) == set(LOSSES["cb_vila"])


def test_mim_moves_both_encoders_but_not_the_codebook() -> None:
    model = system()
    names = reached(model, model(batch(), progress()).losses["mim"])
    assert "codebook.codes" not in names
    for part in ("vision.vit.patch_embed.proj.weight", "text_encoder.layer.0.attention.self.query.weight"):
        assert part in names
    assert {"mask_embedding", "query_positions", "mim_head.weight"} <= names
    assert "pixel_head.weight" not in names


def test_pixel_moves_the_codebook_and_both_encoders() -> None:
    model = system()
    names = reached(model, model(batch(), progress()).losses["pixel"])
    assert {
        "codebook.codes",
        "vision.vit.patch_embed.proj.weight",
        "text_encoder.embeddings.word_embeddings.weight",
    } <= names
    assert "mim_head.weight" not in names


def test_with_a_shared_pass_the_codebook_learns_from_eq_3_s_second_term_alone() -> None:
    model = system(mim=MimOptions(share_pass=True))
    losses = model(batch(), progress()).losses
    assert "codebook.codes" not in reached(model, losses["pixel"])
    assert "codebook.codes" in reached(model, losses["codebook"])
    assert reached(model, losses["codebook"]) & {"vision.vit.patch_embed.proj.weight"}


def test_text_objectives_read_the_unquantised_image() -> None:
    model = system()
    losses = model(batch(), progress()).losses
    for name in ("itm", "mlm", "itc"):
        names = reached(model, losses[name])
        assert "codebook.codes" not in names
        assert "vision.vit.patch_embed.proj.weight" in names


def slow_cells(model: CbVila, pairs: Batch, values: Tensor, mask: Tensor, row: int) -> Tensor:
    """Fused states of one image's cells, cell by cell as the paper tells it; values [N, D]."""
    queries = torch.stack([model.mask_embedding if mask[row, n] else values[n] for n in range(CELLS)])
    queries = F.layer_norm(queries + model.query_positions, (WIDTH,), model.query_norm.weight, model.query_norm.bias)
    length = int(pairs.attention_mask[row].sum())
    text = model.text_encoder(pairs.input_ids[row : row + 1, :length], torch.ones(1, length, dtype=torch.int64))
    context = model.fusion_encoder.project_context(text)
    return model.fusion_encoder(queries[None], None, context)[0]


def test_mim_and_pixel_equal_a_slow_recomputation() -> None:
    model, pairs, mask = system(), batch(), patch_mask()
    noise = gumbel_noise(4 * (CELLS - MASKED), CODES, torch.Generator().manual_seed(3))
    losses = model(pairs, progress(), Choices(patch_mask=mask, gumbel_noise=noise)).losses
    codes, tau = model.codebook.codes, model.codebook.tau(progress().fraction)
    mim, pixel, used = [], [], 0
    for row in range(4):
        features = model.vision(pairs.images[row : row + 1])[0, 1:]
        distance = ((features[:, None] - codes) ** 2).sum(-1)  # [N, K]
        nearest = distance.argmin(1)
        sampled = codes[nearest].clone()
        for n in range(CELLS):
            if not mask[row, n]:
                sampled[n] = codes[(noise[used] - distance[n] / tau).argmax()]
                used += 1
        for values, found in ((codes[nearest], mim), (sampled, pixel)):
            fused = slow_cells(model, pairs, values, mask, row)
            for n in range(CELLS):
                if not mask[row, n]:
                    continue
                if found is mim:
                    found.append(-model.mim_head(fused[n]).log_softmax(0)[nearest[n]])
                else:
                    top, left = PATCH * (n // 4), PATCH * (n % 4)
                    true = pairs.images[row, :, top : top + PATCH, left : left + PATCH].flatten()
                    true = (true - true.mean()) / (true.var() + 1e-6).sqrt()
                    found.append(((model.pixel_head(fused[n]) - true) ** 2).mean())
    torch.testing.assert_close(losses["mim"], torch.stack(mim).mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["pixel"], torch.stack(pixel).mean(), rtol=1e-4, atol=1e-5)


def test_codebook_loss_counts_all_cells_masked_or_not() -> None:
    model, pairs = system(), batch()
    features = model.vision(pairs.images)[:, 1:].flatten(0, 1)
    nearest = model.codebook.codes[torch.cdist(features, model.codebook.codes).argmin(1)]
    slow = 1.25 * ((features - nearest) ** 2).mean()
    torch.testing.assert_close(model(pairs, progress()).losses["codebook"], slow, rtol=1e-4, atol=1e-6)


def test_itm_equals_a_slow_recomputation() -> None:
    model, pairs = system(), batch()
    images, texts = torch.tensor([1, 2, 3, 0]), torch.tensor([3, 0, 1, 2])
    loss = model(pairs, progress(), Choices(negative_images=images, negative_texts=texts)).losses["itm"]
    rows = [(b, b, 1) for b in range(4)]
    rows += [(b, int(images[b]), 0) for b in range(4)] + [(int(texts[b]), b, 0) for b in range(4)]
    slow = []
    for text, image, label in rows:
        length = int(pairs.attention_mask[text].sum())
        one = Batch(
            pairs.images[image : image + 1],
            pairs.input_ids[text : text + 1, :length],
            torch.ones(1, length, dtype=torch.int64),
            torch.zeros(1, dtype=torch.int64),
        )
        logits = model.match_logits(model.fuse(model.encode_text(one), model.encode_image(one)))
        slow.append(F.cross_entropy(logits, torch.tensor([label])))
    torch.testing.assert_close(loss, torch.stack(slow).mean(), rtol=1e-4, atol=1e-5)


def test_the_visual_cls_is_among_the_queries_only_when_asked() -> None:
    """Without it, masked cells of the input can't reach the prediction: only visible codes and the text do."""
    pairs, mask = batch(), patch_mask()
    for cls in (False, True):
        model = system(mim=MimOptions(cls=cls)).eval()
        captured: list[Tensor] = []
        model.fusion_encoder.register_forward_pre_hook(lambda _module, args, kept=captured: kept.append(args[0]))
        with torch.no_grad():
            model.predict_masked(pairs, model.encode_text(pairs), mask)
        assert captured[0].shape[1] == CELLS + cls


def test_wrong_widths_and_masks_are_refused() -> None:
    with pytest.raises(UserError, match=r"system\.text\.width"):
        system(text=Text(width=16, heads=2, text_layers=1, fusion_layers=1))
    with pytest.raises(UserError, match=r"system\.mim\.ratio"):
        system(mim=MimOptions(ratio=0.01))


def test_without_itc_there_is_no_first_stage_and_negatives_are_uniform() -> None:
    model, pairs = system(contrast=False).eval(), batch()
    assert model.similarity(model.encode_image(pairs), model.encode_text(pairs)) is None


def test_codes_start_and_statistics_survive_a_restart() -> None:
    model, other = system(), system(seed=1)
    for step in range(4):
        model(batch(8, seed=step), progress(step, seed=step))
        model.after_step(progress(step), PlainWriter())
    other.load_state_dict(model.state_dict())
    other.load_carried_state({name: value.clone() for name, value in model.carried_state().items()})
    first, again = (m(batch(8), progress(4)) for m in (model, other))
    assert all(torch.equal(first.losses[name], again.losses[name]) for name in first.losses)
    assert all(torch.equal(first.metrics[name], again.metrics[name]) for name in first.metrics)


def test_evaluation_does_not_count_as_use() -> None:
    model = system().eval()
    model(batch(), progress())
    model.after_step(progress(), PlainWriter())
    assert model.codebook.tracker.counts.sum() == 0


def test_single_pairs_and_equal_ids_survive() -> None:
    model = system()
    for pairs in (batch(1), batch(4)):
        pairs.image_ids = torch.zeros_like(pairs.image_ids)
        output = model(pairs, progress())
        assert all(torch.isfinite(loss) for loss in output.losses.values())
        assert output.metrics["itm_skipped"] == 3 * len(pairs)


def test_reconstruction_shows_the_true_picture_where_nothing_is_masked() -> None:
    model, pairs, mask = system().eval(), batch(), patch_mask()
    with torch.no_grad():
        original, masked, predicted = model.reconstruct(pairs, mask)
    assert torch.equal(original, pairs.images)
    cells = mask.view(4, 1, 4, 4).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3).expand_as(original)
    assert torch.equal(predicted[~cells], original[~cells])
    assert masked[cells].abs().max() == 0
    # A patch predicted as pure normalised noise of mean 0 keeps the true patch's mean: norm_pix is undone with it.
    with torch.no_grad():
        model.pixel_head.weight.zero_()
        model.pixel_head.bias.zero_()
        _, _, flat = model.reconstruct(pairs, mask)
    first = int(mask[0].nonzero()[0])
    top, left = PATCH * (first // 4), PATCH * (first % 4)
    patch = (0, slice(None), slice(top, top + PATCH), slice(left, left + PATCH))
    mean = normalize_patches(original[patch].flatten()[None, None]).mean
    torch.testing.assert_close(flat[patch], mean.expand(3, PATCH, PATCH).reshape(3, PATCH, PATCH))


class Syncs(TorchDispatchMode):
    """Counts the operations that make the host wait for the device."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if any(part in name for part in self.NAMES):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def test_a_step_never_waits_for_the_device() -> None:
    model = system()
    with Syncs() as syncs:
        output = model(batch(), progress())
        torch.stack(list(output.losses.values())).sum().backward()
        model.after_step(progress(), PlainWriter())
    assert not syncs.seen


def test_every_tensor_is_made_on_the_inputs_device() -> None:
    model, pairs = system(), batch()
    with FakeTensorMode() as mode:
        for part in model.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda")
                setattr(part, name, nn.Parameter(fake, requires_grad=parameter.requires_grad))
            for name, buffer in list(part.named_buffers(recurse=False)):
                setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda"))
        tracker = model.codebook.tracker
        tracker.counts = torch.empty(CODES, device="cuda")
        tracker.last_used = torch.empty(CODES, dtype=torch.int64, device="cuda")
        fields = (pairs.images, pairs.input_ids, pairs.attention_mask, pairs.image_ids)
        moved = Batch(*(torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in fields))
        output = model(moved, progress())
    assert mode is not None
    assert {value.device.type for value in (output.losses | output.metrics).values()} == {"cuda"}
