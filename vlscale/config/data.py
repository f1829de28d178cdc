"""The recipe's `data`: where samples come from and how they become tensors."""

from __future__ import annotations

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

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
    """Side of the square input in pixels."""
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    augment: Augmentation = Field(default_factory=Augmentation)
    tokenizer: Tokenizer = Field(default_factory=Tokenizer)
    workers: NonNegativeInt = 2
    """Loader processes per rank; 0 loads in the training process. The order does not depend on it."""
    scenes: Scenes = Field(default_factory=Scenes)
