"""SOHO's part of the recipe: backbone, neck, visual dictionary and masked visual modelling."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from vlscale.config.abilities import Abilities
from vlscale.config.bert import Bert
from vlscale.config.section import Section, Share
from vlscale.config.upkeep import Upkeep


class Backbone(Section):
    """The convolutional network (timm) that sees the image."""

    model: str = "resnet101"
    """timm model name of a network with feature maps."""
    init: Literal["pretrained", "random"] | str = "random"
    """`pretrained` fetches timm's weights, `random` starts from scratch, a path loads a local file."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Passed to timm."""
    frozen_stages: NonNegativeInt = 1
    """Never trained: 1 is the stem and the first stage, as in the release; 0 trains all."""
    freeze_epochs: NonNegativeFloat = 10
    """The whole network rests so long, its BatchNorm in evaluation mode (section 3.2, cold start)."""


class Neck(Section):
    """From the last feature map to visual tokens."""

    kind: Literal["code", "sum", "gated"] = "code"
    """`code` is the paper's: 1 × 1 convolution, pooling, dictionary (eq. 3 and 5). `sum` and `gated` are the release's:
    pooling, convolution, BatchNorm, and the code added to or mixed with the feature."""
    repeat: bool = False
    """Repeat each map once per text before the neck: BatchNorm and dictionary count it so often, as in the release."""


class Dictionary(Upkeep):
    """The visual dictionary (section 3.2). The paper starts from random codes, few of which are ever nearest to a
    feature, and revives none."""

    use: bool = True
    """Without it the features themselves are the tokens, and there is no MVM (Table 7's first row)."""
    size: PositiveInt = 2048
    update: Literal["paper", "release"] = "paper"
    """`paper`: eq. 4 once per optimizer step. `release`: moving counts and sums, inside every training forward."""
    gamma: Share = 0.99
    """Momentum of eq. 4."""
    decay: Share = 0.4
    """Momentum of the release's counts and sums."""

    @model_validator(mode="after")
    def _release_has_no_upkeep(self) -> Dictionary:
        if self.update == "release" and (self.init != "random" or self.revive_after):
            raise ValueError("init kmeans and revive_after need update: paper; the release's sums would undo them")
        return self


class Mvm(Section):
    """Masked visual modelling (section 3.3)."""

    masking: Literal["index", "cell"] = "index"
    """`index`: per image one of the indices in it, every cell that has it. `cell`: one cell position per batch, and in
    an image, with `probability`, every cell that shares its index (release)."""
    probability: Share = 0.015
    """Only of `cell`."""
    head: Literal["linear", "cosine"] = "linear"
    """`cosine`: cosines to the codes without temperature (release)."""
    pairs: Literal["positive", "all"] = "positive"
    """Pairs that MLM and MVM learn from; `all` are also the mismatched ones (release)."""


class Joint(Bert):
    """The one transformer over words and visual tokens."""

    layers: PositiveInt = 12


class SohoSystem(Abilities):
    """SOHO: a visual dictionary learned end to end from pixels."""

    padded_inputs: ClassVar[bool] = True
    many_texts: ClassVar[bool] = True

    name: Literal["soho"] = "soho"
    backbone: Backbone = Field(default_factory=Backbone)
    neck: Neck = Field(default_factory=Neck)
    dictionary: Dictionary = Field(default_factory=Dictionary)
    mvm: Mvm = Field(default_factory=Mvm)
    text: Joint = Field(default_factory=Joint)
    mlm_probability: Share = 0.15
    """Share of the word tokens masked for MLM."""
    checkpoint_activations: bool = False
    """Recompute activations of the transformer in the backward pass: less memory, more time."""
