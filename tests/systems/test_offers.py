"""What a system offers, itself or through the one inside it."""

from __future__ import annotations

from typing import Any, Protocol

from vlscale.systems.protocol import offers


class Looks(Protocol):
    @property
    def layer(self) -> int: ...

    def look(self) -> str: ...


class Inside:
    layer = 2

    def look(self) -> str:
        return "seen"


class Around:
    def __init__(self, system: object) -> None:
        self.system = system

    def __getattr__(self, name: str) -> Any:
        return getattr(self.system, name)


def test_what_is_delegated_counts() -> None:
    assert offers(Inside(), Looks)
    assert offers(Around(Inside()), Looks)
    assert not offers(Around(object()), Looks)
    assert not offers(object(), Looks)
