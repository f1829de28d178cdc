"""The recipe's `data`: where samples come from and how they become tensors."""

from __future__ import annotations

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from vlscale.config.section import PositiveShare, Section

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


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
    """Area of the random crop as a share of the image; (1, 1) resizes the whole image. Not read where `data.aspect` is
    given: SOHO does not crop."""
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    """Aspect ratios of the random crop."""
    flip: bool = True
    """Mirror half of the images, but never one whose caption says left or right."""
    randaugment: tuple[NonNegativeInt, NonNegativeInt] | None = (2, 7)
    """Number of operations and magnitude; null switches it off."""


class Aspect(Section):
    """Inputs that keep their aspect ratio: resized, padded, and batched with others of a similar shape."""

    short: PositiveInt = 600
    """Length of the shorter side in pixels …"""
    long: PositiveInt = 1000
    """… unless the longer one would exceed this."""
    multiple: PositiveInt = 64
    """A batch is padded to the next multiple of this, right and below."""
    window: PositiveInt = 4096
    """Samples of the order that are sorted by aspect ratio before steps are cut."""

    @model_validator(mode="after")
    def _ordered(self) -> Aspect:
        if self.short > self.long:
            raise ValueError(f"short {self.short} is more than long {self.long}: swap them")
        return self


class Texts(Section):
    """Texts that come with every image."""

    positive: PositiveInt = 1
    """Its own captions, drawn without repetition while there are enough."""
    negative: NonNegativeInt = 0
    """Captions of other images, one each."""
    coin: bool = False
    """Each of the positive + negative texts is one or the other with probability ½ (SOHO's release)."""

    @model_validator(mode="after")
    def _coin_has_texts(self) -> Texts:
        if self.coin and self.per_image == 1:
            raise ValueError("coin: one text per image can't be a match and a mismatch: raise positive or negative")
        return self

    @property
    def per_image(self) -> int:
        return self.positive + self.negative


class Scenes(Section):
    """The embedded data set, used when no data is given."""

    train: PositiveInt = 8000
    test: NonNegativeInt = 500
    seed: NonNegativeInt = 0


class Data(Section):
    """Where samples come from and how they become tensors."""

    path: str | None = None
    """A source, a data recipe (.yaml, or a shipped corpus by name) or a folder made by `vlscale data`; none means the
    embedded scenes."""
    image_root: str | None = None
    """Folder that image paths are relative to; default: beside the file, else images/ beside it. Of a data recipe: the
    folder that all its paths are relative to."""
    skip_broken_shards: bool = False
    """Go on without shards that are missing or damaged, instead of an error at the start."""
    window: PositiveInt = 65536
    """Samples that are shuffled together; data of that size or smaller is shuffled as a whole."""
    image_size: PositiveInt = 256
    """Side of the square input in pixels; not read where `aspect` is given."""
    aspect: Aspect | None = None
    """Keep the aspect ratio instead of making images square."""
    texts: Texts = Field(default_factory=Texts)
    second_view: bool = False
    """Give the momentum teacher a crop of its own (CODIS; TCL does): images are decoded once and augmented twice."""
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    augment: Augmentation = Field(default_factory=Augmentation)
    tokenizer: Tokenizer = Field(default_factory=Tokenizer)
    workers: NonNegativeInt = 2
    """Loader processes per rank; 0 loads in the training process. The order does not depend on it."""
    scenes: Scenes = Field(default_factory=Scenes)
