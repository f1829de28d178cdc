"""The recipe: its schema, how it is found, overridden, resolved and written beside a run.

Imports neither torch nor deepspeed. Unknown keys are errors; every field says what it is and in which unit.
"""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from vlscale.errors import UserError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """A part of the recipe: unknown keys are refused, docstrings under fields are their help."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Vision(Section):
    """The vision transformer (timm)."""

    model: str = "deit_base_patch16_224.fb_in1k"
    """timm model name; `init` decides whether its weights are fetched."""
    init: Literal["pretrained", "random"] | str = "random"
    """`pretrained` fetches timm's weights, `random` starts from scratch, a path loads a local file."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Passed to timm: embed_dim, depth, num_heads, patch_size, mlp_ratio …"""


class Text(Section):
    """Text encoder and fusion encoder, BERT-compatible."""

    width: PositiveInt = 768
    heads: PositiveInt = 12
    intermediate: PositiveInt = 3072
    """Width of the feed-forward layers."""
    text_layers: PositiveInt = 6
    fusion_layers: PositiveInt = 6
    max_positions: PositiveInt = 512
    """Rows of the position table."""
    dropout: Share = 0.1
    """Hidden and attention dropout."""
    norm: Literal["post", "pre"] = "post"
    """`post` is BERT's; `pre` learns faster from scratch."""
    init: str = "random"
    """`random`, or a Hugging Face BERT name or local folder: first layers → text, last → fusion."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Text:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}: change one of them")
        return self


class Teacher(Section):
    """Momentum teacher, queues and distillation (ALBEF section 3.3)."""

    momentum: Share = 0.995
    queue_size: PositiveInt = 65536
    alpha: Share = 0.4
    """Weight of the teacher's targets; rises linearly from 0 over epoch 0."""


class CodebookOptions(Section):
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
    init_step: PositiveInt = 100
    """Step after which k-means of its batch's features replaces the random codes."""
    revive_after: NonNegativeInt = 100
    """A code unused for so many steps is re-seeded from a feature of the batch; 0 switches revival off."""
    revive_until: Share = 0.7
    """Share of the steps after which no code is revived any more: revival moves MIM's targets."""


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


class _VitSystem(Section):
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


SystemConfig = Annotated[AlbefSystem | CbVilaSystem, Field(discriminator="name")]


class Tokenizer(Section):
    """How words become ids."""

    name: str | None = None
    """Hugging Face name or local path; none trains a WordPiece vocabulary on the training captions."""
    vocab_size: PositiveInt = 30522
    """Upper limit of a vocabulary trained here."""
    max_words: PositiveInt = 30
    max_tokens: PositiveInt = 25
    """Tokens of a text, [CLS] included; what is longer is cut."""
    sep: bool = False
    """End texts with [SEP]; ALBEF's release does not."""


class Augmentation(Section):
    """Training augmentation; evaluation only resizes."""

    crop_scale: tuple[PositiveShare, PositiveShare] = (0.2, 1.0)
    """Area of the random crop as a share of the image; (1, 1) resizes the whole image."""
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    """Aspect ratios of the random crop."""
    flip: bool = True
    """Mirror half of the images, but never one whose caption says left or right."""
    randaugment: tuple[NonNegativeInt, NonNegativeInt] | None = (2, 7)
    """Number of operations and magnitude; null switches it off."""


class Scenes(Section):
    """The embedded data set, used when no data is given."""

    train: PositiveInt = 8000
    test: NonNegativeInt = 500
    seed: NonNegativeInt = 0


class Data(Section):
    """Where samples come from and how they become tensors."""

    path: str | None = None
    """A jsonl file or a folder made by `vlscale data`; none means the embedded scenes."""
    image_root: str | None = None
    """Folder that image paths are relative to; default: beside the file, else images/ beside it."""
    image_size: PositiveInt = 256
    """Side of the square input in pixels."""
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    augment: Augmentation = Field(default_factory=Augmentation)
    tokenizer: Tokenizer = Field(default_factory=Tokenizer)
    workers: NonNegativeInt = 2
    """Loader processes per rank; 0 loads in the training process. The order does not depend on it."""
    scenes: Scenes = Field(default_factory=Scenes)


class Train(Section):
    """Length, batch, optimizer and schedule."""

    epochs: PositiveFloat | None = 30
    max_steps: PositiveInt | None = None
    """Optimizer steps; wins over `epochs`."""
    seed: NonNegativeInt = 0
    global_batch: PositiveInt = 512
    """Pairs per optimizer step over all ranks and accumulation steps."""
    micro_batch: PositiveInt | None = None
    """Pairs per rank and forward pass; default global_batch / ranks. The quotient is accumulated."""
    lr: PositiveFloat = 1e-4
    """Peak learning rate."""
    warmup_lr: NonNegativeFloat = 1e-5
    """Learning rate at step 0, rising linearly to `lr` …"""
    warmup_steps: NonNegativeInt = 1000
    """… in so many steps."""
    min_lr: NonNegativeFloat = 1e-5
    """Learning rate at the end of the cosine."""
    weight_decay: NonNegativeFloat = 0.02
    betas: tuple[float, float] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    clip: NonNegativeFloat = 0.0
    """Largest gradient norm; 0 does not clip."""
    max_bad_steps: PositiveInt = 20
    """Stop after so many steps in a row with a non-finite loss or gradient."""


class Checkpoint(Section):
    """When the run is saved."""

    every: PositiveInt = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep: PositiveInt = 3
    """Newest checkpoints that are kept."""


class Evaluation(Section):
    """Defaults of `vlscale eval` for this recipe."""

    rerank: NonNegativeInt = 128
    """First-stage candidates per query that ITM re-ranks."""
    itm_score: Literal["logit", "odds"] = "logit"
    """Re-rank by the logit of class 1, as ALBEF's release, or by the odds of a match: class 1 minus class 0."""
    batch_size: PositiveInt = 64


class Recipe(Section):
    """Everything that a run depends on, besides the DeepSpeed config."""

    name: str
    system: SystemConfig
    weights: dict[str, float] = Field(default_factory=dict)
    """Weight of each loss by name; a loss not named counts with weight 1."""
    data: Data = Field(default_factory=Data)
    train: Train = Field(default_factory=Train)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    eval: Evaluation = Field(default_factory=Evaluation)

    @model_validator(mode="after")
    def _parts_fit(self) -> Recipe:
        known = LOSSES[self.system.name]
        unknown = sorted(set(self.weights) - set(known))
        if unknown:
            raise ValueError(
                f"weights: {', '.join(unknown)} is no loss of {self.system.name}; it has {', '.join(known)}"
            )
        longest, rows = self.data.tokenizer.max_tokens, self.system.text.max_positions
        if longest > rows:
            raise ValueError(f"data.tokenizer.max_tokens: {longest} tokens, but system.text.max_positions is {rows}")
        return self


LOSSES: dict[str, tuple[str, ...]] = {
    "albef": ("itc", "itm", "mlm"),
    "cb_vila": ("itc", "itm", "mlm", "mim", "pixel", "codebook"),
}
"""Names that `weights` may use, per system; each system's test holds its forward to them."""


def recipe_names() -> list[str]:
    """Names of the recipes that ship with vlscale."""
    folder = resources.files("vlscale.recipes")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name_or_path: str, overrides: list[str] | None = None) -> Recipe:
    """Read a shipped recipe by name or a YAML file by path and apply `KEY=VALUE` overrides.

    Raises:
        UserError: unknown recipe, unreadable file, unknown key or wrong value; one line that names the key.
    """
    tree, source = _read(name_or_path)
    for override in overrides or []:
        apply_override(tree, override)
    return parse_recipe(tree, source)


def parse_recipe(tree: dict[str, Any], source: str) -> Recipe:
    """Validate a recipe's tree; `source` names it in errors."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: {_first_error(error)}") from None


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one dotted key of the tree in place: `train.lr=1e-4`. The value is read as YAML."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise UserError(f"--set {override}: expected KEY=VALUE, such as train.lr=1e-4")
    node = tree
    *parents, leaf = key.strip().split(".")
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"--set {override}: {parent} is a value, not a section")
        node = child
    try:
        node[leaf] = _number_or(yaml.safe_load(text))
    except yaml.YAMLError:
        raise UserError(f"--set {override}: the value is not YAML; put quotes around it") from None


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe beside a run, atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    os.replace(temporary, path)


def cache_dir() -> Path:
    """Folder for rendered data: `VLSCALE_CACHE`, else the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vlscale"
    return Path(os.environ.get("VLSCALE_CACHE", default)).expanduser()


def _read(name_or_path: str) -> tuple[dict[str, Any], str]:
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"}:
        if not path.is_file():
            raise UserError(f"{path}: no such recipe file")
        text, source = path.read_text(encoding="utf-8"), str(path)
    elif name_or_path in recipe_names():
        text = (resources.files("vlscale.recipes") / f"{name_or_path}.yaml").read_text(encoding="utf-8")
        source = f"recipe {name_or_path}"
    else:
        raise UserError(
            f"no recipe {name_or_path!r}: use one of {', '.join(recipe_names())}, or a path ending in .yaml"
        )
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{source}: expected a mapping of sections (system, data, train, …)")
    tree.setdefault("name", path.stem)
    _numbers(tree)
    return tree, source


def _numbers(node: Any) -> None:
    """Turn YAML 1.1's string readings of 1e-4 into numbers, everywhere."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in list(items):
        if isinstance(value, dict | list):
            _numbers(value)
        else:
            node[key] = _number_or(value)


def _number_or(value: Any) -> Any:
    """`1e-4` is a string to YAML 1.1 and a number to everyone who types it."""
    if isinstance(value, str):
        try:
            return float(value) if any(c in value for c in "eE") and value[:1] in "+-.0123456789" else value
        except ValueError:
            return value
    return value


def _first_error(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part not in LOSSES)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown key; see `vlscale pretrain --dry-run` for the keys there are"
    elif first["type"] not in {"value_error", "missing"}:
        message = f"{message}, got {first['input']!r}"
    return f"{where}: {message}" if where else message
