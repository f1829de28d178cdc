"""Phrase concepts of captions (MVPTR, section 3.1.1): extractors, the vocabulary, its statistics."""

from vlscale.data.phrases.base import CaptionExtractor, Extractor, PhraseTuple, is_phrase, phrase_text
from vlscale.data.phrases.build import Built, Corpora, build_phrases, frequent_phrases, open_corpora
from vlscale.data.phrases.compare import Agreement, Comparison, Side, compare, some_captions
from vlscale.data.phrases.light import LightExtractor
from vlscale.data.phrases.own import DataExtractor
from vlscale.data.phrases.parser import ParserExtractor
from vlscale.data.phrases.registry import FROM_CAPTIONS, NAMES, caption_extractor, make_extractor
from vlscale.data.phrases.spice import SpiceExtractor, write_spice_input
from vlscale.data.phrases.statistics import Part, Statistics
from vlscale.data.phrases.vocabulary import Origin, PhraseConcept, PhraseVocabulary

__all__ = [
    "FROM_CAPTIONS",
    "NAMES",
    "Agreement",
    "Built",
    "CaptionExtractor",
    "Comparison",
    "Corpora",
    "DataExtractor",
    "Extractor",
    "LightExtractor",
    "Origin",
    "ParserExtractor",
    "Part",
    "PhraseConcept",
    "PhraseTuple",
    "PhraseVocabulary",
    "Side",
    "SpiceExtractor",
    "Statistics",
    "build_phrases",
    "caption_extractor",
    "compare",
    "frequent_phrases",
    "is_phrase",
    "make_extractor",
    "open_corpora",
    "phrase_text",
    "some_captions",
    "write_spice_input",
]
