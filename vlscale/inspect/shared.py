"""What a data set makes of a codebook that images and texts share: which codes each of them chooses, and how often the
two of a pair agree (CODIS)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from scipy.cluster.hierarchy import leaves_list, linkage
from torch import Tensor

from vlscale.codebooks.health import entropy
from vlscale.codebooks.protocol import Codebook
from vlscale.data.sample import Batch, Sample
from vlscale.data.text import TextTokenizer, clean_caption
from vlscale.errors import UserError
from vlscale.inspect.tags import TagShare
from vlscale.inspect.usage import SEED, Usage, normalized_batches, usage_of
from vlscale.interop.run import Run
from vlscale.systems.protocol import System

MAX_TEXTS = 5000
"""Captions that are looked at; from more so many are drawn with `SEED`."""
NEAREST_CODES = 5
"""Codes of an image among which its text's code is looked for, besides the nearest."""
MIN_WORD = 3
"""Captions of a code that a word must be in to be characteristic of it."""
MIN_RATIO = 1.5
"""How much more often it must be in them than in all captions."""


@runtime_checkable
class SharesCodes(Protocol):
    """A system with a codebook that image and text of a pair are both described by."""

    def codebook_pairs(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Per codebook `encode_image(batch).pooled` and `encode_text(batch).pooled`, [B, d] each, unit length."""
        ...


@runtime_checkable
class SharedCodebook(Codebook, Protocol):
    """A codebook over whole images and texts that are transported to it."""

    def unit_codes(self) -> Tensor:
        """[K, d] fp32, unit length."""
        ...

    def similarities(self, features: Tensor) -> Tensor:
        """Cosines of unit features [B, d] to the codes, [B, K] fp32."""
        ...

    def transported(self, features: Tensor) -> Tensor:
        """How features [B, d] are spread over the codes, G · T of the optimal transport plan, [B, K] fp32."""
        ...


@dataclass(slots=True)
class Encoded:
    """A data set's images and captions, each encoded once."""

    pixels: np.ndarray
    """[I, H, W, 3] uint8, as the system saw them."""
    images: Tensor
    """[I, d] float32, unit length, on the CPU."""
    captions: list[str]
    """T of them."""
    texts: Tensor
    """[T, d] float32, unit length, on the CPU."""
    image_of: np.ndarray
    """[T] int64: the image of every caption; a caption and its image are a pair."""
    available: int
    """Captions that the images have."""
    skipped: list[str]
    """Images that can't be read: `path: reason`."""


@dataclass(slots=True)
class Choices:
    """Which codes of one codebook are chosen."""

    image_cosines: np.ndarray
    """[I, K] float32."""
    text_cosines: np.ndarray
    """[T, K] float32."""
    images: np.ndarray
    """[I] int64: the code of every image."""
    texts: np.ndarray
    """[T] int64: the code of every caption."""
    pairs: np.ndarray
    """[T, 2] int64: the codes of a caption's image and of the caption."""

    @property
    def size(self) -> int:
        return self.image_cosines.shape[1]

    def usage(self) -> dict[str, Usage]:
        """Of images, of texts, and of both, where the two weigh the same however many captions an image has."""
        images, texts = usage_of(self.images, self.size), usage_of(self.texts, self.size)
        # As in training, where every pair gives one of each.
        counts = images.counts * len(self.texts) + texts.counts * len(self.images)
        both = Usage(counts, entropy(torch.from_numpy(counts)).item())
        return {"images": images, "texts": texts, "both": both}


@dataclass(slots=True)
class Agreement:
    """Shares of pairs, in [0, 1]."""

    share: float
    """Image and text choose the same code."""
    chance: float
    """The same if texts were dealt out to the images anew: Σ p_image(k) p_text(k), over pairs."""
    near: float
    """The text's code is among the image's `NEAREST_CODES` nearest ones."""
    near_chance: float


@dataclass(slots=True)
class Spread:
    """Transport plans of a few pairs over the codes that they choose."""

    pairs: np.ndarray
    """[G] int64: captions, in the order of their images' codes."""
    codes: np.ndarray
    """[C] int64: similar ones side by side."""
    images: np.ndarray
    """[G, C] float32, G · T of the images."""
    texts: np.ndarray
    """[G, C] float32, G · T of the captions."""
    overlap: float
    """What an image's row and its caption's row have in common over all codes, in [0, 1], averaged."""
    overlap_chance: float
    """The same for images and captions of any two rows."""


def shared_codebooks(system: System) -> dict[str, SharedCodebook]:
    """Those of the system's codebooks that images and texts share."""
    if not isinstance(system, SharesCodes):
        return {}
    return {name: book for name, book in system.codebooks().items() if isinstance(book, SharedCodebook)}


@torch.inference_mode()
def encode_pairs(run: Run, system: System, samples: list[Sample]) -> Encoded:
    """Features of every readable image and of its captions, in fp32.

    Raises:
        UserError: no image can be read, or none has a caption.
    """
    kept: list[int] = []
    pixels: list[Tensor] = []
    images: list[Tensor] = []
    skipped: list[str] = []
    for loaded, batch in normalized_batches(samples, run.recipe.data, run.recipe.eval.batch_size, run.device):
        kept += loaded.image_ids.tolist()
        pixels.append(loaded.images)
        skipped += loaded.skipped
        images.append(system.encode_image(batch).pooled.float().cpu())
    if not kept:
        raise UserError(f"none of the {len(samples)} images can be read, the first is {skipped[0]}; check --image-root")
    captions = [(row, caption) for row, index in enumerate(kept) for caption in samples[index].captions]
    if not captions:
        raise UserError(f"none of the {len(kept)} images has a caption, and the codebook is shared by images and texts")
    chosen = _drawn(captions, MAX_TEXTS)
    texts = [caption for _, caption in chosen]
    return Encoded(
        torch.cat(pixels).permute(0, 2, 3, 1).contiguous().numpy(),
        torch.cat(images),
        texts,
        _encode_texts(system, texts, run.tokenizer, run.recipe.eval.batch_size, run.device),
        np.array([row for row, _ in chosen], dtype=np.int64),
        len(captions),
        skipped,
    )


def _drawn(captions: list[tuple[int, str]], limit: int) -> list[tuple[int, str]]:
    if len(captions) <= limit:
        return captions
    chosen = np.random.default_rng(SEED).choice(len(captions), size=limit, replace=False)
    return [captions[index] for index in np.sort(chosen)]


def _encode_texts(
    system: System, captions: Sequence[str], tokenizer: TextTokenizer, batch_size: int, device: torch.device
) -> Tensor:
    """[T, d] float32 on the CPU."""
    pooled = []
    for start in range(0, len(captions), batch_size):
        input_ids, mask = tokenizer.encode(captions[start : start + batch_size])
        count = len(input_ids)
        nothing = torch.zeros(count, 3, 0, 0, device=device)
        batch = Batch(nothing, input_ids.to(device), mask.to(device), torch.arange(count, device=device))
        pooled.append(system.encode_text(batch).pooled.float().cpu())
    return torch.cat(pooled)


@torch.inference_mode()
def choose_codes(book: SharedCodebook, encoded: Encoded) -> Choices:
    """The code of every image and caption, and the cosines to all codes."""
    device = book.codes.device
    images, texts = encoded.images.to(device), encoded.texts.to(device)
    image_codes, text_codes = book.assign(images).cpu().numpy(), book.assign(texts).cpu().numpy()
    return Choices(
        book.similarities(images).cpu().numpy(),
        book.similarities(texts).cpu().numpy(),
        image_codes,
        text_codes,
        np.stack([image_codes[encoded.image_of], text_codes], axis=1),
    )


def agreement_of(choices: Choices, image_of: np.ndarray) -> Agreement:
    """How often the images and texts of the pairs choose alike; image_of [T]."""
    near = np.argsort(-choices.image_cosines, axis=1, kind="stable")[:, :NEAREST_CODES]  # [I, 5]
    image_codes, text_codes = choices.pairs.T
    count, size = len(text_codes), choices.size
    by_image = np.bincount(image_codes, minlength=size) / count
    by_text = np.bincount(text_codes, minlength=size) / count
    by_near = np.bincount(near[image_of].flatten(), minlength=size) / count
    return Agreement(
        float((image_codes == text_codes).mean()),
        float(by_image @ by_text),
        float((near[image_of] == text_codes[:, None]).any(axis=1).mean()),
        float(by_near @ by_text),
    )


@torch.inference_mode()
def spread_pairs(book: SharedCodebook, encoded: Encoded, choices: Choices, count: int) -> Spread:
    """Plans of at most `count` pairs, each of another image: of the images together, and of the captions together."""
    order = np.random.default_rng(SEED).permutation(len(encoded.captions))
    first = np.sort(np.unique(encoded.image_of[order], return_index=True)[1])  # one caption per image, in drawn order
    pairs = order[first[:count]]
    codes = side_by_side(book, np.unique(choices.pairs[pairs]))
    place = {code: index for index, code in enumerate(codes.tolist())}
    pairs = np.array(sorted(pairs.tolist(), key=lambda pair: [place[code] for code in choices.pairs[pair].tolist()]))
    device = book.codes.device
    images = book.transported(encoded.images[encoded.image_of[pairs]].to(device))
    texts = book.transported(encoded.texts[pairs].to(device))
    common = torch.stack([torch.minimum(row, texts).sum(1) for row in images])  # [G, G]
    overlap, chance = common.diagonal().mean().item(), common.mean().item()
    return Spread(pairs, codes, images[:, codes].cpu().numpy(), texts[:, codes].cpu().numpy(), overlap, chance)


@torch.inference_mode()
def side_by_side(book: SharedCodebook, codes: np.ndarray) -> np.ndarray:
    """Codes [C] ordered so that similar ones are neighbours: the leaves of a clustering of their cosines."""
    if len(codes) < 3:
        return codes
    vectors = book.unit_codes()[torch.from_numpy(codes)].cpu().double().numpy()
    return codes[leaves_list(linkage(vectors, "average", metric="cosine", optimal_ordering=True))]


class WordTable:
    """Which words the captions of a code have more often than all captions."""

    def __init__(self, captions: Sequence[str], max_words: int) -> None:
        self._words = [set(clean_caption(caption, max_words).split()) for caption in captions]
        self._everywhere = Counter(word for words in self._words for word in words)

    def of(self, members: np.ndarray, top: int = 6) -> list[TagShare]:
        """Words of the captions `members` [n] that are in at least `MIN_WORD` of them, by their log-odds against all.

        Odds are of captions with the word to captions without; 1/2 is added to every count. Only words that the
        members have `MIN_RATIO` times as often as all captions.
        """
        own = Counter(word for index in members for word in self._words[index])
        n, total = len(members), len(self._words)

        def log_odds(word: str) -> float:
            inside = (own[word] + 0.5) / (n - own[word] + 0.5)
            everywhere = (self._everywhere[word] + 0.5) / (total - self._everywhere[word] + 0.5)
            return float(np.log(inside / everywhere))

        frequent = [word for word, count in own.items() if count >= MIN_WORD]
        shares = {word: TagShare(word, own[word] / n, self._everywhere[word] / total) for word in frequent}
        excess = [word for word in frequent if shares[word].share >= MIN_RATIO * shares[word].everywhere]
        return [shares[word] for word in sorted(excess, key=lambda word: (-log_odds(word), word))[:top]]
