"""DETR and its kin, as transformers saves them, as region extractors: a query is a region."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torchvision.ops import box_convert
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from vlscale.data.regions import Regions, strongest
from vlscale.data.sample import Sample
from vlscale.errors import UserError
from vlscale.nn.extraction import (
    DETECTIONS,
    SCORE,
    Spec,
    equal_shapes,
    to_regions,
    weights_hash,
    workable,
)


class QueryDetector:
    """DETR, Conditional, Deformable and RT-DETR …: each query's last hidden state in the decoder, box and best class.

    A classifier with one output more than there are classes has the class "no object" last and a softmax (DETR);
    others judge each class by itself, with a sigmoid.
    """

    def __init__(
        self,
        spec: Spec,
        device: torch.device,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        """Load `spec.model`: a folder, or a name whose files are in Hugging Face's cache; nothing is fetched.

        Args:
            mean, std: instead of those in the folder's image processor.

        Raises:
            UserError: it isn't there, is no object detector, or lacks weights.
        """
        self._model: Any = _load_model(spec)
        self._processor: Any = _from_folder(AutoImageProcessor, spec)
        # A folder is called by its last part: the place means nothing on another machine.
        self.name = f"{spec.kind}:{Path(spec.model).resolve().name if Path(spec.model).is_dir() else spec.model}"
        self.weights_hash = weights_hash(self._model.state_dict())
        self.width: int = self._model.config.hidden_size
        self._colours = {
            key: list(value) for key, value in (("image_mean", mean), ("image_std", std)) if value is not None
        }
        self._spec, self._device = spec, device
        self._model.to(device).eval()

    @torch.no_grad()
    def extract(self, images: list[Tensor], samples: list[Sample]) -> list[Regions]:
        """At most DETECTIONS queries per image with a score of SCORE or more, the best first; see the protocol."""
        inputs = [self._prepare(workable(image)) for image in images]
        found: dict[int, Regions] = {}
        for group in equal_shapes([one["pixel_values"] for one in inputs]):
            batch = {key: torch.cat([inputs[index][key] for index in group]) for key in inputs[group[0]]}
            states, boxes, scores, labels = self._detect(batch)
            for place, index in enumerate(group):
                keep = scores[place] >= SCORE
                kept = states[place][keep], boxes[place][keep], scores[place][keep], self._names(labels[place][keep])
                found[index] = strongest(to_regions(*kept, self._spec, samples[index]), DETECTIONS)
        return [found[index] for index in range(len(images))]

    def _prepare(self, image: Tensor) -> dict[str, Tensor]:
        """uint8 [3, H, W] → the model's inputs for it alone, unpadded: `pixel_values` [1, 3, h, w] and others."""
        inputs = self._processor(
            images=[image], input_data_format="channels_first", return_tensors="pt", **self._colours
        )
        return {key: value.to(self._device) for key, value in inputs.items()}

    def _detect(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inputs of I images of one size → hidden states [I, Q, d], boxes [I, Q, 4], scores [I, Q], classes [I, Q]."""
        output = self._model(**batch)
        states, logits = output.last_hidden_state, output.logits.float()
        if states.shape[:2] != logits.shape[:2]:
            raise UserError(
                f"{self._spec.text}: {type(self._model).__name__} keeps no hidden state per query; "
                "use DETR, Conditional DETR, Deformable DETR or RT-DETR"
            )
        closed = logits.shape[2] == self._model.config.num_labels + 1
        chances = logits.softmax(-1)[..., :-1] if closed else logits.sigmoid()
        scores, labels = chances.max(-1)
        return states, box_convert(output.pred_boxes, "cxcywh", "xyxy"), scores, labels

    def _names(self, labels: Tensor) -> list[str]:
        names = [self._model.config.id2label.get(label, f"class {label}") for label in labels.tolist()]
        return ["" if name == "N/A" else name for name in names]


def _load_model(spec: Spec) -> Any:
    model, info = _from_folder(AutoModelForObjectDetection, spec, output_loading_info=True)
    # transformers would start what a file lacks at random, with a warning.
    lacking = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if lacking:
        raise UserError(
            f"{spec.text}: {lacking[0]} (of {len(lacking)}) is missing in the weights, or has another shape"
        )
    return model


def _from_folder(kind: Any, spec: Spec, **options: Any) -> Any:
    try:
        return kind.from_pretrained(spec.model, local_files_only=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if Path(spec.model).is_dir():
            reason = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise UserError(f"{spec.text}: can't be loaded: {reason}") from None
        raise UserError(
            f"{spec.text}: no such folder, nor a model of that name in Hugging Face's cache, and nothing is fetched "
            "unasked; give the folder with config.json, preprocessor_config.json and model.safetensors"
        ) from None
