"""MVPTR's part of the recipe: three encoders, concept recovering, contrast, grounding and matching."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from vlscale.config.abilities import Abilities
from vlscale.config.bert import Bert
from vlscale.config.section import Section, Share


class Stacks(Bert):
    """The textual, the visual and the multimodal encoder, all of one size."""

    layers: PositiveInt = 6
    """Of each encoder; `fusion: merged` makes one encoder of twice as many."""


class Mcr(Section):
    """Masked concept recovering (section 3.2.1)."""

    cost: Literal["prob", "nll"] = "prob"
    """What the assignment of labels to slots minimises: `prob` 1 − p (eq. 1), `nll` −log p."""
    order: Literal["hungarian", "ordered"] = "hungarian"
    """`ordered` keeps every label at its own slot, as in the release."""
    tags: Share = 0.25
    """Share of the tags' word pieces that are masked; the release has 0.15."""
    phrases: Share = 0.25
    """Share of the phrases that are masked; the release has 0.15 and no loss."""


class Wpg(Section):
    """Weakly supervised phrase grounding (section 3.3.2)."""

    pool: Literal["max", "top3"] = "max"
    """A phrase's region: the nearest (eq. 6), or one of the nearest three at random (release)."""
    negatives: Literal["sampled", "hard"] = "sampled"
    """`sampled`: for every text another image, drawn from the contrast. `hard`: the pairs of ITM, row by row, which
    sets a text against another text's negative (release)."""
    margin: NonNegativeFloat = 0.2
    layer: NonNegativeInt = 2
    """Index of the multimodal layer whose states are grounded; 8, the ninth, suits `fusion: merged`."""


class Itm(Section):
    """Image-text matching (section 3.3.3)."""

    negatives: Literal["sampled", "hardest"] = "sampled"
    """Drawn from the contrast's softmax, or its highest (release). `fusion: merged` has no contrast: uniform draws."""


class Vsc(Section):
    """Visual semantic contrast (section 3.3.1)."""

    proj: bool = True
    """Project both [CLS] states by a matrix before they are compared, as in the release."""
    gather: bool = True
    """Compare with the pairs of all ranks; the release compares within each rank."""
    temperature: PositiveFloat = 0.07
    """Initial value of the learned divisor of the cosines."""


class MvptrSystem(Abilities):
    """MVPTR: words, phrases, tags and regions, aligned at several levels in two stages."""

    concepts: ClassVar[bool] = True
    stages: ClassVar[int] = 2

    name: Literal["mvptr"] = "mvptr"
    text: Stacks = Field(default_factory=Stacks)
    region_norm: bool = True
    """LayerNorm over the projected region."""
    stage: Literal[1, 2] = 2
    """1: MCR and VSC (eq. 10), the multimodal encoder and its heads rest. 2: all losses (eq. 11). With `train.stages`
    each stage sets it."""
    fusion: Literal["split", "merged"] = "split"
    """`split`: uni-modal encoders below the multimodal one. `merged`: one encoder over all tokens (Table 4)."""
    tags_in_fusion: bool = False
    """Keep the tags, without their [CLS], in the multimodal input (release, VQA); `merged` always has them."""
    clean_pass: bool = False
    """Encode the unmasked inputs once more for VSC, ITM and WPG; else they see the masked ones (release)."""
    mcr: Mcr = Field(default_factory=Mcr)
    vsc: Vsc = Field(default_factory=Vsc)
    wpg: Wpg = Field(default_factory=Wpg)
    itm: Itm = Field(default_factory=Itm)
    mlm_probability: Share = 0.15
    """Share of the word tokens masked for MLM; stage 1 masks none."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass: less memory, more time."""

    @property
    def skips_to_last(self) -> bool:
        """Stage 1 trains uni-modal encoders, which `fusion: merged` does not have."""
        return self.fusion == "merged"

    @property
    def multimodal_layers(self) -> int:
        """Layers of the encoder that sees both modalities."""
        return 2 * self.text.layers if self.fusion == "merged" else self.text.layers

    @model_validator(mode="after")
    def _parts_fit(self) -> MvptrSystem:
        if self.wpg.layer >= self.multimodal_layers:
            raise ValueError(
                f"wpg.layer {self.wpg.layer} does not exist: the multimodal encoder has layers 0 to "
                f"{self.multimodal_layers - 1}"
            )
        if self.fusion == "merged" and self.stage == 1:
            raise ValueError("stage 1 trains the uni-modal encoders, which fusion: merged does not have: use stage 2")
        return self
