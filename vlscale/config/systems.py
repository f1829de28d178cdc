"""The recipe's `system`: sizes and options of each system and of the parts they share."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from vlscale.config.abilities import Abilities
from vlscale.config.bert import Bert
from vlscale.config.mvptr import MvptrSystem
from vlscale.config.section import PositiveShare, Section, Share
from vlscale.config.soho import SohoSystem
from vlscale.config.upkeep import Upkeep


class Vision(Section):
    """The vision transformer (timm)."""

    model: str = "deit_base_patch16_224.fb_in1k"
    """timm model name; `init` decides whether its weights are fetched."""
    init: Literal["pretrained", "random"] | str = "random"
    """`pretrained` fetches timm's weights, `random` starts from scratch, a path loads a local file."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Passed to timm: embed_dim, depth, num_heads, patch_size, mlp_ratio …"""


class Text(Bert):
    """Text encoder and fusion encoder."""

    text_layers: PositiveInt = 6
    fusion_layers: PositiveInt = 6


class Teacher(Section):
    """Momentum teacher, queues and distillation (ALBEF section 3.3)."""

    momentum: Share = 0.995
    queue_size: PositiveInt = 65536
    alpha: Share = 0.4
    """Weight of the teacher's targets; rises linearly from 0 over epoch 0."""


class CodebookOptions(Upkeep):
    """CB-ViLA's codebook (paper, eq. 1 and 3) and its health."""

    size: PositiveInt = 3072
    beta: NonNegativeFloat = 0.25
    """Weight of the commitment term."""
    reduction: Literal["mean", "sum"] = "mean"
    """`mean` averages the squared distance over dimensions; `sum` is eq. 3 to the letter."""
    tau_start: PositiveFloat = 1.0
    tau_end: PositiveFloat = 0.1
    """Gumbel temperature, in units of the squared L2 distance, from start to end …"""
    tau_until: PositiveShare = 0.8
    """… reached after this share of the steps."""
    init: Literal["kmeans", "random"] = "kmeans"
    revive_after: NonNegativeInt = 100


class MimOptions(Section):
    """Masked image modelling and the pixel term (paper, eq. 4 and section III-A)."""

    ratio: Share = 0.75
    """Share of the patches masked in every image."""
    cls: bool = False
    """Give the visual CLS to the queries, as Fig. 1's caption may be read; it leaks the unmasked image."""
    norm_pix: bool = True
    """Normalise each target patch by its own mean and deviation, as in MAE."""
    share_pass: bool = False
    """One fusion pass on z_q for MIM and pixel; the codebook then learns from eq. 3's second term alone."""
    block: PositiveInt = 1
    """Side, in patches, of the squares that are masked together; 1 masks single patches as in the paper."""


class TransportOptions(Section):
    """How features are transported to the codes (CODIS)."""

    solver: Literal["ipot", "sinkhorn", "pot"] = "ipot"
    """`ipot` solves the unregularised problem, `sinkhorn` the entropic one; `pot` is POT on the host, slow."""
    beta: PositiveFloat = 0.5
    """IPOT's proximal weight."""
    epsilon: PositiveFloat = 0.05
    """Sinkhorn's regularisation, in units of the cost 1 − cosine."""
    iterations: PositiveInt = 50
    marginals: Literal["global", "local"] = "global"
    """Spread the features of all ranks evenly over the codes, or each rank's own."""


class PrototypeOptions(Upkeep):
    """CODIS's codebook, shared by both modalities (slides, part 1). No revival: the transport gives every code its
    share."""

    size: PositiveInt = 4000
    temperature: PositiveFloat = 0.1
    """Divisor of the similarities to the codes in L_i2p and L_t2p."""
    feature: Literal["teacher", "student"] = "teacher"
    """Whose features are transported."""
    transport: TransportOptions = Field(default_factory=TransportOptions)


class AlignOptions(Section):
    """CODIS's teacher-student contrast (slides, part 2)."""

    intra: bool = True
    """Also against the own modality's teacher; without it L_align is ALBEF's ITC."""
    reduce: Literal["sum", "mean"] = "sum"
    """Of the four terms; without intra terms the mean of two, as ALBEF's."""


class _VitSystem(Abilities):
    asks_images: ClassVar[bool] = True

    vision: Vision = Field(default_factory=Vision)
    text: Text = Field(default_factory=Text)
    embed_dim: PositiveInt = 256
    """Width of the shared space of the contrastive projections."""
    temperature: PositiveFloat = 0.07
    """Initial value of the learned divisor of similarities."""
    mlm_probability: Share = 0.15
    """Share of the word tokens masked for MLM."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass: less memory, more time."""


class AlbefSystem(_VitSystem):
    """ALBEF: ITC + ITM + MLM with momentum distillation."""

    name: Literal["albef"] = "albef"
    teacher: Teacher = Field(default_factory=Teacher)


class CbVilaSystem(_VitSystem):
    """CB-ViLA: a codebook learned by a language-conditioned VQ-VAE."""

    name: Literal["cb_vila"] = "cb_vila"
    codebook: CodebookOptions = Field(default_factory=CodebookOptions)
    mim: MimOptions = Field(default_factory=MimOptions)
    warmup_steps: NonNegativeInt = 1000
    """Steps with ITC, ITM and the pixel/codebook terms only; then MIM and MLM join."""


class CodisSystem(_VitSystem):
    """CODIS: a codebook shared by image and text, learned through optimal transport."""

    second_view: ClassVar[bool] = True

    name: Literal["codis"] = "codis"
    teacher: Teacher = Field(default_factory=Teacher)
    align: AlignOptions = Field(default_factory=AlignOptions)
    codebook: PrototypeOptions = Field(default_factory=PrototypeOptions)


SystemConfig = Annotated[
    AlbefSystem | CbVilaSystem | CodisSystem | MvptrSystem | SohoSystem, Field(discriminator="name")
]

LOSSES: dict[str, tuple[str, ...]] = {
    "albef": ("itc", "itm", "mlm"),
    "cb_vila": ("itc", "itm", "mlm", "mim", "pixel", "codebook"),
    "codis": ("align", "itm", "mlm", "code"),
    "mvptr": ("mcr_v", "mcr_s", "vsc", "itm", "mlm", "wpg"),
    "soho": ("itm", "mlm", "mvm"),
}
"""Names that `weights` may use, per system; each system's test holds its forward to them."""
