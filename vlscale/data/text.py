"""Text → token ids: the releases' cleaning of captions and questions, and a tokenizer trained here or fetched."""

from __future__ import annotations

import json
import os
import re
import socket
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

import numpy as np
import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from vlscale.config import Tokenizer
from vlscale.data.sample import Vocabulary
from vlscale.errors import UserError

PAD, UNK, CLS, SEP, MASK = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TOKENIZER_FILE = "tokenizer.json"
"""The `tokenizers` library's own format."""
OPTIONS_FILE = "vocabulary.json"
"""Special ids and the recipe's options, beside it."""

_DROPPED = str.maketrans({**dict.fromkeys(",.'!?\"()*#:;~"), "-": " ", "/": " "})
_DROPPED |= dict.fromkeys(range(0xD800, 0xE000))  # halves of characters: JSON can hold them, the tokenizer can't
_RUNS = re.compile(r"\s{2,}")


def clean_caption(text: str, max_words: int) -> str:
    """Lower case, punctuation dropped, - and / to spaces, single spaces, at most `max_words` words (as ALBEF's)."""
    text = text.lower().translate(_DROPPED).replace("<person>", "person")
    return _first_words(_RUNS.sub(" ", text).rstrip("\n").strip(" "), max_words)


def clean_question(text: str, max_words: int) -> str:
    """As the release cleans questions: runs of spaces stay, and count as empty words."""
    return _first_words(text.lower().translate(_DROPPED).rstrip(" "), max_words)


def _first_words(text: str, limit: int) -> str:
    words = text.split(" ")
    return " ".join(words[:limit]) if len(words) > limit else text


class Pieces(NamedTuple):
    """A cleaned text as word pieces, uncut and without special tokens."""

    ids: list[int]
    words: list[str]
    """The text split at spaces."""
    word_of: list[int]
    """Index in `words` of each id."""


class TextTokenizer:
    """Texts to padded ids and back: `[CLS] words`, with [SEP] at the end where the options say so."""

    def __init__(self, backend: FastTokenizer, options: Tokenizer, vocabulary: Vocabulary) -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.options = options
        self.vocabulary = vocabulary

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest text, [CLS] included."""
        return self.options.max_tokens

    def cut_as(self, options: Tokenizer) -> TextTokenizer:
        """The same vocabulary for texts of another length, with or without [SEP].

        Raises:
            UserError: the options are those of another vocabulary.
        """
        for key in ("name", "vocab_size"):
            own, asked = getattr(self.options, key), getattr(options, key)
            if own != asked:
                raise UserError(f"data.tokenizer.{key}: {asked}, but the run that this begins with has {own}: keep it")
        return TextTokenizer(self._backend, options, self.vocabulary)

    def encode(self, texts: Sequence[str], pad_to: int | None = None) -> tuple[Tensor, Tensor]:
        """Cleaned, cut and padded texts: ids and mask, both [B, L] int64; L is `pad_to` or the longest length."""
        cleaned = [clean_caption(text, self.options.max_words) for text in texts]
        encodings = self._backend.encode_batch_fast(cleaned, add_special_tokens=False)
        room = self.max_tokens - (2 if self.options.sep else 1)
        end = [self.vocabulary.sep] if self.options.sep else []
        rows = [[self.vocabulary.cls, *encoding.ids[:room], *end] for encoding in encodings]
        length = pad_to or max((len(row) for row in rows), default=1)
        ids = np.full((len(rows), length), self.vocabulary.pad, dtype=np.int64)
        mask = np.zeros((len(rows), length), dtype=np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
        return torch.from_numpy(ids), torch.from_numpy(mask)

    def pieces(self, texts: Sequence[str]) -> list[Pieces]:
        """Cleaned texts as word pieces that know their words; `max_tokens` does not cut them."""
        cleaned = [clean_caption(text, self.options.max_words) for text in texts]
        encodings = self._backend.encode_batch(cleaned, add_special_tokens=False)
        return [
            Pieces(encoding.ids, text.split(" "), [text.count(" ", 0, start) for start, _ in encoding.offsets])
            for text, encoding in zip(cleaned, encodings, strict=True)
        ]

    def knows(self, text: str) -> bool:
        """Whether the text has a token for everything in it."""
        unknown = self._backend.token_to_id(UNK)
        (pieces,) = self.pieces([text])
        return bool(pieces.ids) and unknown not in pieces.ids

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The words of one text, special tokens left out."""
        v = self.vocabulary
        return self._backend.decode([i for i in _integers(ids) if i not in {v.pad, v.cls, v.sep, v.mask}])

    def tokens(self, ids: Sequence[int] | Tensor) -> list[str]:
        """One string per id, special tokens and ## included."""
        return [self._backend.id_to_token(i) or "" for i in _integers(ids)]

    def save(self, folder: Path) -> None:
        """Write both files into `folder`, each beside its place and renamed."""
        folder.mkdir(parents=True, exist_ok=True)
        v = self.vocabulary
        special = {"size": v.size, "pad": v.pad, "cls": v.cls, "sep": v.sep, "mask": v.mask}
        content = {"vocabulary": special, "options": self.options.model_dump(mode="json")}
        _write(folder / TOKENIZER_FILE, self._backend.to_str(pretty=True))
        _write(folder / OPTIONS_FILE, json.dumps(content, indent=2) + "\n")

    @staticmethod
    def load(folder: Path) -> TextTokenizer:
        """Read what `save` wrote.

        Raises:
            UserError: a file is missing or broken, or the two don't fit each other.
        """
        backend = _read_backend(folder / TOKENIZER_FILE)
        path = folder / OPTIONS_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            vocabulary = Vocabulary(**content["vocabulary"])
            options = Tokenizer.model_validate(content["options"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: not a saved vocabulary ({_one_line(error)}); expected the run's own file"
            ) from None
        _check_vocabulary(vocabulary, backend, path)
        return TextTokenizer(backend, options, vocabulary)


def build_tokenizer(options: Tokenizer, texts: Iterable[str]) -> TextTokenizer:
    """The recipe's tokenizer: a Hugging Face name, a local folder or vocab.txt, or WordPiece trained on `texts`.

    Raises:
        UserError: the named one can't be had here or lacks [CLS], [SEP], [MASK] or [PAD]; there is no text to train on.
    """
    if options.name is None:
        return _trained(options, texts)
    place = Path(options.name).expanduser()
    if place.is_file() and place.suffix == ".txt":
        return _of_words(place.read_text(encoding="utf-8").splitlines(), options, str(place))
    if (place / OPTIONS_FILE).is_file():
        saved = TextTokenizer.load(place)
        return TextTokenizer(saved._backend, options, saved.vocabulary)
    return _fetched(options)


def _trained(options: Tokenizer, texts: Iterable[str]) -> TextTokenizer:
    """WordPiece over the cleaned texts; the same tokens and ids in every process (see `_characters`)."""
    tokenizer = _bert_pipeline(models.WordPiece(unk_token=UNK))
    words: Counter[str] = Counter()
    for text in texts:
        cleaned = tokenizer.normalizer.normalize_str(clean_caption(text, options.max_words))
        words.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(cleaned))
    if not words:
        raise UserError("data.tokenizer: no words to train a vocabulary on; give captions or name a tokenizer")
    characters = _characters(words, options.vocab_size)
    alphabet = [*characters, *(f"##{character}" for character in characters)]
    if options.vocab_size < len(SPECIAL) + len(alphabet):
        raise UserError(
            f"data.tokenizer.vocab_size: {options.vocab_size} is less than the {len(SPECIAL) + len(alphabet)} special "
            "tokens and characters of the captions; make it larger"
        )
    trainer = trainers.WordPieceTrainer(
        vocab_size=options.vocab_size, special_tokens=[*SPECIAL, *alphabet], show_progress=False
    )
    # A word with a rarer character becomes [UNK] anyway; here it would bring that character back.
    known = sorted(word for word in words if not set(word) - set(characters))
    ordered = (word for word in known for _ in range(words[word]))
    tokenizer.train_from_iterator(ordered, trainer)
    vocabulary = tokenizer.get_vocab()
    return _of_words(sorted(vocabulary, key=vocabulary.__getitem__), options, "the trained vocabulary")


def _characters(words: Counter[str], vocab_size: int) -> list[str]:
    """The characters that get a token and a ## token, sorted; where they are too many the rare ones go.

    The library's trainer numbers them by hash order otherwise, and breaks ties between merges by those numbers: two
    trainings would differ. Given as special tokens they get their ids from this list.
    """
    counts: Counter[str] = Counter()
    for word, n in words.items():
        for character in word:
            counts[character] += n
    frequent = sorted(counts, key=lambda character: (-counts[character], character))
    return sorted(frequent[: max(64, vocab_size // 8)])


def _bert_pipeline(model: models.WordPiece) -> FastTokenizer:
    tokenizer = FastTokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def _of_words(words: list[str], options: Tokenizer, source: str) -> TextTokenizer:
    """A WordPiece tokenizer from its tokens in the order of their ids."""
    vocabulary = {word: index for index, word in enumerate(words)}
    missing = [token for token in SPECIAL if token not in vocabulary]
    if missing:
        raise UserError(
            f"data.tokenizer: {source} lacks {', '.join(missing)}; expected a BERT vocabulary, a token a line"
        )
    tokenizer = _bert_pipeline(models.WordPiece(vocabulary, unk_token=UNK))
    tokenizer.add_special_tokens(list(SPECIAL))
    ids = Vocabulary(len(words), vocabulary[PAD], vocabulary[CLS], vocabulary[SEP], vocabulary[MASK])
    return TextTokenizer(tokenizer, options, ids)


def _fetched(options: Tokenizer) -> TextTokenizer:
    """A fast tokenizer of `transformers`, from a local folder, its cache or its hub."""
    name = str(options.name)
    tokenizer = _auto_tokenizer(name)
    ids: dict[str, Any] = {kind: getattr(tokenizer, f"{kind}_token_id", None) for kind in ("pad", "cls", "sep", "mask")}
    missing = [kind for kind, value in ids.items() if value is None]
    if missing or not getattr(tokenizer, "is_fast", False):
        lack = f"has no {', '.join(missing)} token" if missing else "has no fast version"
        raise UserError(f"data.tokenizer.name: {name} {lack}; use a BERT-like one such as bert-base-uncased")
    size = max(tokenizer.get_vocab().values()) + 1
    backend = FastTokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    return TextTokenizer(backend, options, Vocabulary(size=size, **ids))


def _auto_tokenizer(name: str) -> Any:
    """What is on this machine first; the hub only if it answers, for its client retries for a minute."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, use_fast=True, local_files_only=True)
    except Exception as error:  # transformers raises OSError, ValueError, ImportError … for what it can't find
        local = _one_line(error)
    instead = "give a local folder, a vocab.txt, or null to train one on the captions"
    if Path(name).expanduser().exists():
        raise UserError(f"data.tokenizer.name: {name} holds no tokenizer ({local}); {instead}")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UserError(f"data.tokenizer.name: {name}: no such file or folder; {instead}")
    if not _hub_answers():
        raise UserError(f"data.tokenizer.name: {name} is not on this machine and the hub can't be reached; {instead}")
    try:
        return AutoTokenizer.from_pretrained(name, use_fast=True)
    except Exception as error:
        raise UserError(f"data.tokenizer.name: {name} can't be loaded ({_one_line(error)}); {instead}") from None


def _hub_answers() -> bool:
    """Whether Hugging Face's hub can be tried: something listens there, or a proxy is set that may know the way."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    endpoint = urlsplit(constants.ENDPOINT)
    if endpoint.scheme in getproxies():
        return True
    port = endpoint.port or (443 if endpoint.scheme == "https" else 80)
    try:
        with socket.create_connection((endpoint.hostname or "", port), timeout=5):
            return True
    except OSError:
        return False


def _read_backend(path: Path) -> FastTokenizer:
    try:
        return FastTokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the Rust library raises bare Exception
        raise UserError(
            f"{path}: not a tokenizer file ({_one_line(error)}); expected the run's own tokenizer.json"
        ) from None


def _check_vocabulary(vocabulary: Vocabulary, backend: FastTokenizer, path: Path) -> None:
    size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    if vocabulary.size != size:
        raise UserError(f"{path}: size {vocabulary.size}, but {TOKENIZER_FILE} beside it has {size} tokens")
    for kind in ("pad", "cls", "sep", "mask"):
        if not 0 <= getattr(vocabulary, kind) < size:
            raise UserError(f"{path}: {kind} is {getattr(vocabulary, kind)}, expected an id below {size}")


def _integers(ids: Sequence[int] | Tensor) -> list[int]:
    return ids.tolist() if isinstance(ids, Tensor) else [int(i) for i in ids]


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
