"""Convolutional networks by timm name, with stages that stay frozen and a rest for the whole (SOHO, section 3.2)."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vlscale.config import Backbone
from vlscale.errors import UserError

_log = logging.getLogger(__name__)

PROBE = 64
"""Side in pixels of the blank image that tells a network's width and stride."""

COUNTER = "num_batches_tracked"
"""BatchNorm's counter: nothing reads it at a fixed momentum, and older files lack it."""

SAFETENSORS = ".safetensors"

TENSOR_KINDS = {"weight", "bias", "running_mean", "running_var"}


class CnnEncoder(nn.Module):
    """A timm network without pooling and classifier: images → feature map.

    The stem and the first `frozen_stages` stages never train: no gradient from the start, so that no optimizer owns
    them, and their BatchNorm always uses its stored statistics. Everything else is trainable until `rest(True)`.
    """

    def __init__(self, options: Backbone, net: nn.Module | None = None) -> None:
        """Build `options.model`, or take over `net`.

        Args:
            options: the network, its start, and how many stages never train.
            net: a ready network with timm's `forward_features`, `num_features` and `group_matcher`, whose weights
                stay as they are; `options` then only gives `frozen_stages`.

        Raises:
            UserError: timm can't build it, it has no feature map or too few stages, or its weights don't fit.
        """
        super().__init__()
        self.net: Any = _create(options) if net is None else net
        width, reduction = _measure(self.net, options.model)
        self.width: int = width
        """Channels of the map."""
        self.reduction: int = reduction
        """Pixels of the image per cell of the map, along each side."""
        if net is None and options.init not in {"random", "pretrained"}:
            _load_local(self.net, Path(options.init))
        self._frozen = _first_stages(self.net, options)
        self._resting = False
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_(name not in self._frozen)
        self._set_batch_norms()

    def forward(self, images: Tensor) -> Tensor:
        """images [I, 3, H, W] float, normalised → [I, C, H / reduction, W / reduction], rounded up."""
        # Native half precision casts parameters, not inputs; elsewhere this does nothing.
        return self.net.forward_features(images.to(next(self.net.parameters()).dtype))

    def rest(self, resting: bool) -> None:
        """Put the network to rest (no gradient, BatchNorm on stored statistics) or wake all but the frozen stages.

        Outlives `.train()` and `.eval()`. Costs nothing where it changes nothing, so that every step may call it.
        """
        if resting == self._resting:
            return
        self._resting = resting
        for name, parameter in self.net.named_parameters():
            if name not in self._frozen:
                parameter.requires_grad_(not resting)
        self._set_batch_norms()

    def train(self, mode: bool = True) -> CnnEncoder:
        """As `nn.Module.train`, but BatchNorm that is frozen or at rest stays in evaluation mode."""
        super().train(mode)
        self._set_batch_norms()
        return self

    def _set_batch_norms(self) -> None:
        awake = self.training and not self._resting
        for name, module in self.net.named_modules():
            if isinstance(module, _BatchNorm):
                module.train(awake and f"{name}.weight" not in self._frozen)


def _create(options: Backbone) -> Any:
    try:
        return timm.create_model(
            options.model,
            pretrained=options.init == "pretrained",
            num_classes=0,
            global_pool="",
            **options.overrides,
        )
    except (RuntimeError, TypeError, AssertionError, ValueError, OSError) as error:
        raise UserError(f"system.backbone: timm can't build {options.model!r}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _measure(net: Any, model: str) -> tuple[int, int]:
    """Channels and stride of the last map, seen on one blank image."""
    like, training = next(net.parameters()), net.training
    net.eval()
    try:
        with torch.no_grad():
            features = net.forward_features(torch.zeros(1, 3, PROBE, PROBE, device=like.device, dtype=like.dtype))
        shape = tuple(features.shape)
    except (RuntimeError, TypeError, AssertionError, ValueError, AttributeError):
        shape = ()
    net.train(training)
    if len(shape) != 4 or shape[1] != net.num_features or shape[2] != shape[3] or PROBE % shape[3]:
        raise UserError(
            f"system.backbone.model: {model} gives no feature map [C, H / stride, W / stride] of an RGB image; "
            "use a convolutional network of timm such as resnet101"
        )
    return shape[1], PROBE // shape[3]


def _first_stages(net: Any, options: Backbone) -> frozenset[str]:
    """Names of the parameters of the stem and the first `frozen_stages` stages, by timm's own grouping."""
    if not options.frozen_stages:
        return frozenset()
    groups = group_parameters(net, net.group_matcher(coarse=True))  # group 0 is the stem
    if options.frozen_stages >= len(groups):
        raise UserError(
            f"system.backbone.frozen_stages: {options.frozen_stages}, but {options.model} has {len(groups) - 1} stages"
        )
    return frozenset(name for group in range(options.frozen_stages + 1) for name in groups[group])


def _load_local(net: nn.Module, path: Path) -> None:
    """Start from a file: by name, or in order where a torch file shares no name with the network."""
    given = {name: value for name, value in read_weights(path).items() if not name.endswith(COUNTER)}
    own = {name: value for name, value in net.state_dict().items() if not name.endswith(COUNTER)}
    foreign = not own.keys() & given.keys()
    if foreign and path.suffix == SAFETENSORS:
        raise UserError(
            f"system.backbone.init: {path}: {next(iter(own))} is missing, as is every other name of the network, and "
            "safetensors sorts its tensors: rename them, or give a torch file, whose order can be used"
        )
    chosen = _in_order(own, given, path) if foreign else _by_name(own, given, path)
    net.load_state_dict(chosen, strict=False)  # only the counters are missing
    if foreign:
        _log.warning("%s: its names are foreign; %d tensors taken in order", path, len(chosen))
    else:
        _log.info("%s: %d tensors taken by name", path, len(chosen))


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict on the CPU: safetensors, or a torch file (read without running it), bare or in a training state.

    Raises:
        UserError: no such file, not readable, or something other than names and tensors in it.
    """
    if not path.is_file():
        raise UserError(f"system.backbone.init: {path}: no such file; use random, pretrained or a weights file")
    try:
        if path.suffix == SAFETENSORS:
            weights: Any = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
        raise UserError(f"system.backbone.init: {path}: can't be read as weights: {_first_line(error)}") from None
    for wrapper in ("model", "state_dict"):
        if isinstance(weights, dict) and isinstance(weights.get(wrapper), dict):
            weights = weights[wrapper]
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"system.backbone.init: {path}: expected a state dict, names and tensors alone")
    return weights


def _by_name(own: dict[str, Tensor], given: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    for name, value in own.items():
        if name not in given or given[name].shape != value.shape:
            found = tuple(given[name].shape) if name in given else "nothing"
            raise UserError(f"system.backbone.init: {path}: {name}: expected {tuple(value.shape)}, found {found}")
    _check_rest({name: value for name, value in given.items() if name not in own}, path)
    return {name: given[name] for name in own}


def _in_order(own: dict[str, Tensor], given: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    names = list(given)
    for index, (name, value) in enumerate(own.items()):
        theirs = names[index] if index < len(names) else None
        if theirs is None or given[theirs].shape != value.shape or not _same_kind(name, theirs):
            found = "the end" if theirs is None else f"{theirs} {tuple(given[theirs].shape)}"
            raise UserError(
                f"system.backbone.init: {path}: no names of the network in it, and in order {name} "
                f"{tuple(value.shape)} meets {found}"
            )
    _check_rest({name: given[name] for name in names[len(own) :]}, path)
    return {name: given[theirs] for name, theirs in zip(own, names, strict=False)}


def _same_kind(name: str, other: str) -> bool:
    """Whether two names may mean the same tensor: a running mean is no bias of the same shape."""
    kinds = {name.rpartition(".")[2], other.rpartition(".")[2]}
    return len(kinds) == 1 or not kinds <= TENSOR_KINDS


def _check_rest(rest: dict[str, Tensor], path: Path) -> None:
    """What a file may hold beyond the network: one classifier, a matrix (or 1 × 1 convolution) and its bias."""
    if not rest:
        return
    shapes = sorted((tuple(value.shape) for value in rest.values()), key=len, reverse=True)
    matrix = len(shapes[0]) in {2, 4} and shapes[0][2:] in {(), (1, 1)}
    if not matrix or shapes[1:] not in ([], [shapes[0][:1]]):
        name, value = next(iter(rest.items()))
        raise UserError(f"system.backbone.init: {path}: {name} {tuple(value.shape)} has no place in the network")
