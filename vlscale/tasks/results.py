"""A result file with its predictions beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlscale.errors import UserError
from vlscale.interop.layout import write_json, write_text


def check_result_path(out: Path | None) -> None:
    """Refuse a name that predictions and page can't be named after.

    Raises:
        UserError: it is none of a .json file.
    """
    if out is not None and (out.suffix != ".json" or out.is_dir()):
        raise UserError(f"--out {out}: expected the name of a .json file")


def write_result(path: Path, content: dict[str, Any], predictions: Iterable[dict[str, Any]]) -> Path:
    """Write both; returns the file of predictions, a line of JSON each.

    JSON can hold halves of characters, files and fonts can't: a question mark stands for each.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.with_suffix(".predictions.jsonl")
    write_text(lines, "".join(json.dumps(_whole(one), ensure_ascii=False) + "\n" for one in predictions))
    write_json(path, _whole(content))
    return lines


def _whole(content: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(content, ensure_ascii=False).encode("utf-8", "replace"))
