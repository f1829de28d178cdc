"""The extractors by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlscale.data.phrases.base import CaptionExtractor, Extractor
from vlscale.data.phrases.light import LightExtractor
from vlscale.data.phrases.own import DataExtractor
from vlscale.data.phrases.parser import ParserExtractor
from vlscale.data.phrases.spice import SpiceExtractor
from vlscale.errors import UserError

FROM_CAPTIONS: dict[str, type[CaptionExtractor]] = {"light": LightExtractor, "parser": ParserExtractor}
"""Those that need nothing but the words."""
NAMES = (*FROM_CAPTIONS, "spice", "data")


def make_extractor(name: str, spice: Sequence[Path] = ()) -> Extractor:
    """The extractor.

    Args:
        spice: SPICE's output files, for `spice` alone.

    Raises:
        UserError: no such extractor, its library is not installed, or the files don't fit it.
    """
    if name == "spice" and not spice:
        raise UserError("--extractor spice: expected SPICE's output; give it as --spice FILE")
    if name != "spice" and spice:
        raise UserError(f"--spice: expected --extractor spice with it, got --extractor {name}; leave one out")
    if name == "spice":
        return SpiceExtractor(spice)
    return DataExtractor() if name == "data" else caption_extractor(name)


def caption_extractor(name: str) -> CaptionExtractor:
    """An extractor that needs nothing but captions.

    Raises:
        UserError: there is none of that name, or its library is not installed.
    """
    if name in FROM_CAPTIONS:
        return FROM_CAPTIONS[name]()
    if name in NAMES:
        raise UserError(f"extractor {name}: reads more than captions; expected one of {', '.join(FROM_CAPTIONS)}")
    raise UserError(f"--extractor: expected one of {', '.join(NAMES)}, got {name!r}")
