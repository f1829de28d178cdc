"""The recipe's `data`: where samples come from and how they become tensors."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from vlscale.config.section import PositiveShare, Section

AUTO = "auto"
"""Value of `concepts.phrases`: made of the training captions."""
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


class Concepts(Section):
    """Words with phrases, and object tags with regions, in place of pixels (MVPTR).

    Nothing is cropped, mirrored or augmented, for the regions' boxes would have to follow; no image is decoded but for
    `pixels`. So `augment` and `image_size` are not read, nor are `tokenizer.max_tokens` and `tokenizer.sep`.
    """

    phrases: str | None = None
    """Vocabulary of phrases: written by `vlscale data phrases`, or MVPTR's id2phrase (.json); `auto` makes one of the
    training captions, with the light extractor. None: no phrases."""
    min_count: PositiveInt = 50
    """Captions that a phrase of `phrases: auto` occurs in."""
    max_words: Annotated[int, Field(ge=3)] = 35
    """Word pieces of a text, [CLS] and [SEP] among them; what is longer is cut."""
    max_phrases: NonNegativeInt = 5
    """Phrases of a text. Where there are more, training draws some anew every epoch, evaluation takes the first."""
    max_tags: Annotated[int, Field(ge=2)] = 20
    """Word pieces of the object tags, [CLS] and [SEP] among them; what is longer is cut."""
    max_regions: PositiveInt = 50
    """Regions of an image, the most confident first."""
    region_width: PositiveInt = 2048
    """Numbers of a region's feature, without the six of its box."""
    pixels: PositiveInt | None = None
    """Side n of a square: samples without regions get their own boxes and the whole image, each resized to n × n pixels
    whose 3 · n · n normalised values are the feature. Needs no detector; meant for the embedded scenes."""

    @property
    def positions(self) -> int:
        """Rows of the position table that texts and tags need."""
        return max(self.max_words + self.max_phrases, self.max_tags)

    @model_validator(mode="after")
    def _pixels_fit(self) -> Concepts:
        if self.pixels is not None and self.region_width != 3 * self.pixels**2:
            raise ValueError(
                f"pixels: squares of side {self.pixels} give regions 3 · {self.pixels}² = {3 * self.pixels**2} numbers "
                f"wide, but region_width is {self.region_width}: make it {3 * self.pixels**2}"
            )
        return self


class Scenes(Section):
    """The embedded data set, used when no data is given."""

    train: PositiveInt = 8000
    test: NonNegativeInt = 500
    val: NonNegativeInt | None = None
    """Scenes to choose the best epoch by; None: as many as for the test."""
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
    concepts: Concepts | None = None
    """Give phrases, object tags and regions instead of images."""
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    augment: Augmentation = Field(default_factory=Augmentation)
    blind: bool = False
    """Show no image: each is of the mean colour, regions and tags are taken away. How far words alone come."""
    tokenizer: Tokenizer = Field(default_factory=Tokenizer)
    workers: NonNegativeInt = 2
    """Loader processes per rank; 0 loads in the training process. The order does not depend on it."""
    scenes: Scenes = Field(default_factory=Scenes)

    @model_validator(mode="after")
    def _concepts_alone(self) -> Data:
        if self.concepts is None:
            return self
        if self.aspect is not None or self.second_view:
            key = "second_view" if self.second_view else "aspect"
            raise ValueError(f"concepts: no image is decoded for them, but {key} is about images: remove one")
        if self.texts.per_image > 1:
            raise ValueError(f"concepts: one text per image, but texts asks for {self.texts.per_image}: remove texts")
        return self
