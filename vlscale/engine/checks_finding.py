"""What a check of `vlscale doctor` found, and how a check that breaks becomes a finding itself."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from vlscale.config import Recipe
from vlscale.errors import UserError

State = Literal["ok", "warning", "failed", "unknown"]


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check."""

    name: str
    state: State
    """`warning`: training works, but not as it should; `unknown`: the check couldn't be done, `found` says why."""
    found: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Case:
    """What is to be trained, and how."""

    recipe: Recipe | None
    """None: the machine alone is looked at."""
    ds_config: str
    out: Path
    """The run folder, there or not."""
    world: int
    """Ranks in all …"""
    local_world: int
    """… and on this machine."""
    threads: int

    @property
    def nodes(self) -> int:
        """Machines, as far as the launcher tells."""
        return -(-self.world // self.local_world)


def guarded(name: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """The check's findings; a mistake or a bug in it becomes one, so that the other checks are still made."""
    try:
        return check()
    except UserError as error:
        return [Finding(name, "failed", _one_line(str(error)))]
    except Exception as error:
        traceback.print_exc()
        reason = _one_line(f"{type(error).__name__}: {error}")
        return [Finding(name, "failed", reason, "the whole traceback: --verbose")]


def note(file: Path, findings: list[Finding]) -> None:
    """Append to a file of findings, a line each."""
    with file.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(asdict(finding)) + "\n" for finding in findings)


def read_notes(file: Path) -> list[Finding]:
    """Findings that `note` has written; none where there is no file."""
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [Finding(**json.loads(line)) for line in lines if line.endswith("\n")]  # its writer may be at it


def shown_names(names: list[str], most: int = 5) -> str:
    """A few names, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _one_line(text: str) -> str:
    return " ".join(text.split())[:600]
