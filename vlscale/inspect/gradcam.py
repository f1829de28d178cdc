"""Grad-CAM as pictures: an image, where its text as a whole finds evidence for the match, and where each word does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vlscale.data.sample import Batch, Sample
from vlscale.data.text import TextTokenizer
from vlscale.errors import UserError
from vlscale.inspect import pictures
from vlscale.inspect.cells import CutImage
from vlscale.inspect.heat_overlay import heat_overlay
from vlscale.inspect.usage import cut_images, normalized_batches, some_samples
from vlscale.interop.run import Run, load_run, run_samples
from vlscale.systems.gradcam import cls_layers, contrast_gradcam, gradcam, word_layers

PICTURE = "gradcam.png"
SIDE = 128
"""Pixels of a tile's longer side."""
COLUMNS = 7
GAP = 8
WIDTH = COLUMNS * (SIDE + GAP) - GAP


@dataclass(frozen=True, slots=True)
class Looked:
    """What to look at."""

    layer: int | None = None
    """None: the middle fusion layer, or the image encoder's last block."""
    head: int | None = None
    """None: the mean over all."""
    token: int | str | None = None
    """A token's number ([CLS] is 0) or a word; None: every word."""
    contrast: bool = False
    """The image encoder's [CLS] and the similarity, in place of the words and the match."""


class Word(NamedTuple):
    """A word of a text, or one of its tokens."""

    text: str
    tokens: list[int]
    """Rows of the text that are its pieces."""


class _Found(NamedTuple):
    """A pair and its maps."""

    image: CutImage
    caption: str
    score: str
    whole: np.ndarray
    """[rows, columns]."""
    words: list[tuple[Word, np.ndarray, float]]
    """Each with its map, the mean over its tokens, and its share of the map of the whole text."""
    layer: int
    """The one looked at."""


def inspect_gradcam(
    source: str,
    *,
    text: str | None = None,
    image: Path | None = None,
    data: str | None = None,
    split: str | None = None,
    image_root: str | None = None,
    count: int = 4,
    looked: Looked | None = None,
    out: Path | None = None,
) -> Path:
    """Draw Grad-CAM of one image and text, or of some images of a split with their own captions, or all with `text`.

    Args:
        source: run folder or checkpoint folder.
        image: a file; `text` has to be given with it. None: `count` images of the split.
        out: PNG, default `gradcam.png` in the run folder.

    Returns:
        The PNG.

    Raises:
        UserError: the system has no such maps, layer, head or token, or no image can be read.
    """
    looked = looked or Looked()
    if out is not None and (out.suffix.lower() != ".png" or out.is_dir()):
        raise UserError(f"--out {out}: expected the name of a .png file")
    if image is not None and not text:
        raise UserError(f"--image {image}: needs --text, the words to look for in it")
    run = load_run(source)
    layers = len((cls_layers if looked.contrast else word_layers)(run.system))
    if looked.contrast and looked.token is not None:
        raise UserError("--token: the contrast compares whole texts, it has no map of a word; leave --token or --itc")
    if image is not None:
        name, samples = "", [Sample(id=str(image), image=image)]
    else:
        name, samples = run_samples(run, data, split, image_root)
    pairs = [(sample, caption) for sample in samples for caption in ([text] if text else sample.captions)]
    where = repr(text) if text else f"the captions of split {name}"
    found: list[_Found] = []
    skipped: list[str] = []
    for some, left_out in _found(run, _asked(run.tokenizer, pairs, where, looked.token, count), looked):
        found += some
        skipped += left_out
    if not found:
        raise UserError(f"no image can be read: {skipped[0]}")
    lines = [
        _settings(run, looked, found[0].layer, layers),
        *(f"Left out: {PurePath(reason).name}" for reason in skipped),
    ]
    path = out or run.folder / PICTURE
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures.save_png(_sheet(found, lines), path)
    return path


def words_of(tokenizer: TextTokenizer, text: str) -> list[Word]:
    """The words of a text that are left after cleaning and cutting, with their rows in the encoded text."""
    pieces = tokenizer.pieces([text])[0]
    room = tokenizer.max_tokens - (2 if tokenizer.options.sep else 1)
    rows: dict[int, list[int]] = {}
    for row, word in enumerate(pieces.word_of[:room], start=1):  # row 0 is [CLS]
        rows.setdefault(word, []).append(row)
    return [Word(pieces.words[word], tokens) for word, tokens in rows.items()]


def chosen_words(tokenizer: TextTokenizer, text: str, token: int | str | None) -> list[Word]:
    """Every word, the words that are `token`, or the one row of this number; none where there is no such.

    A word may be given as people write it: it is cleaned as texts are.
    """
    words = words_of(tokenizer, text)
    if token is None:
        return words
    if isinstance(token, int):
        names = tokenizer.tokens(tokenizer.encode([text])[0][0])
        return [Word(names[token], [token])] if 0 <= token < len(names) else []
    wanted = [word.text for word in words_of(tokenizer, token)]
    return [word for word in words if [word.text] == wanted]


def _asked(
    tokenizer: TextTokenizer, pairs: list[tuple[Sample, str]], where: str, token: int | str | None, count: int
) -> list[tuple[Sample, str]]:
    """`count` images, each with its first text that has the token."""
    first: dict[str, tuple[Sample, str]] = {}
    for sample, text in pairs:
        if sample.id not in first and (token is None or chosen_words(tokenizer, text, token)):
            first[sample.id] = sample, text
    if not first and token is not None:
        raise UserError(f"--token {token}: not among the words of {where}")
    if not first:
        raise UserError(f"there are no words in {where}; give --text")
    return [first[sample.id] for sample in some_samples([sample for sample, _ in first.values()], count)]


def _found(run: Run, pairs: Sequence[tuple[Sample, str]], looked: Looked) -> Iterator[tuple[list[_Found], list[str]]]:
    """Maps of the pairs batch by batch, and the images that could not be read."""
    system: Any = run.system
    samples = [sample for sample, _ in pairs]
    for loaded, images in normalized_batches(samples, run.recipe.data, run.recipe.eval.batch_size, run.device):
        if not len(loaded.images):
            yield [], loaded.skipped
            continue
        captions = [pairs[index][1] for index in loaded.image_ids.tolist()]
        ids, mask = run.tokenizer.encode(captions)
        batch = replace(images, input_ids=ids.to(run.device), attention_mask=mask.to(run.device), texts=captions)
        cut = cut_images(loaded, system.cells(batch))
        yield (_contrast if looked.contrast else _match)(run, batch, cut, looked), loaded.skipped


def _match(run: Run, batch: Batch, images: Sequence[CutImage], looked: Looked) -> list[_Found]:
    system: Any = run.system
    cam = gradcam(system, batch, looked.layer, looked.head)
    odds = cam.match_logits.softmax(1)[:, 1].tolist()
    maps, whole = cam.maps.cpu().numpy(), cam.whole().cpu().numpy()
    found = []
    for row, (image, caption) in enumerate(zip(images, batch.texts, strict=True)):
        total = float(maps[row].sum()) or 1.0  # all maps may be 0
        words = [
            (word, maps[row, word.tokens].mean(axis=0), float(maps[row, word.tokens].sum()) / total)
            for word in chosen_words(run.tokenizer, caption, looked.token)
        ]
        found.append(_Found(image, caption, f"match: {100 * odds[row]:.1f} %", whole[row], words, cam.layer))
    return found


def _contrast(run: Run, batch: Batch, images: Sequence[CutImage], looked: Looked) -> list[_Found]:
    system: Any = run.system
    cam = contrast_gradcam(system, batch, looked.layer, looked.head)
    maps, similarity = cam.maps.cpu().numpy(), cam.similarity.tolist()
    return [
        _Found(image, caption, f"similarity over temperature: {value:.1f}", whole, [], cam.layer)
        for image, caption, value, whole in zip(images, batch.texts, similarity, maps, strict=True)
    ]


def _sheet(found: Sequence[_Found], lines: Sequence[str]) -> Image.Image:
    """A block per pair, what the maps are below."""
    notes = pictures.text_block([(line, pictures.FAINT) for line in lines], WIDTH, 12)
    return pictures.framed(pictures.stack([*map(_block, found), notes], 18), 16)


def _block(found: _Found) -> Image.Image:
    """Caption and score above the tiles: the image, the whole text's map, each word's."""
    plain = Image.fromarray(pictures.fitted(found.image.pixels, SIDE))
    tiles = [_tile(plain, "image", ""), _tile(heat_overlay(found.image, found.whole, SIDE), "whole text", "")]
    tiles += [
        _tile(heat_overlay(found.image, heat, SIDE), word.text, f"{100 * share:.0f} %")
        for word, heat, share in found.words
    ]
    head = pictures.text_block([(found.caption, pictures.INK), (found.score, pictures.FAINT)], WIDTH, 14)
    return pictures.stack([head, pictures.grid_of(tiles, COLUMNS, GAP)], 6)


def _tile(picture: Image.Image, name: str, share: str) -> Image.Image:
    label = pictures.text_block([(name, pictures.INK), (share, pictures.FAINT)], SIDE, 13)
    return pictures.stack([picture, label], 3)


def _settings(run: Run, looked: Looked, layer: int, layers: int) -> str:
    """What the maps are."""
    heads = "mean over the heads" if looked.head is None else f"head {looked.head}"
    where = f"{run.folder.resolve().name}, step {run.step}"
    number = f"{layer} (of 0 to {layers - 1})"
    if looked.contrast:
        return f"{where}. Grad-CAM of the similarity: block {number} of the image encoder, {heads}."
    token = "every word" if looked.token is None else f"token {looked.token}"
    return (
        f"{where}. Grad-CAM of the match: fusion layer {number}, {heads}, {token}. Every map "
        "has a scale of its own; percentages are shares of the whole text's map, to which [CLS] contributes too."
    )
