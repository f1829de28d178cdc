"""One line and exit code 2 for bad input, one line and 130 for Ctrl-C, a traceback for bugs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from typer.exceptions import TyperException

from vlscale.cli import errors
from vlscale.errors import UserError


def raising(error: BaseException) -> None:
    raise error


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert errors.exit_code(lambda: raising(UserError("a.yaml: train.lr:\n  expected a number"))) == 2
    assert capsys.readouterr().err == "vlscale: error: a.yaml: train.lr: expected a number\n"


def test_a_rank_other_than_0_says_who_it_is_and_only_after_a_pause(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(errors.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "3")
    assert errors.exit_code(lambda: raising(UserError("only here"))) == 2
    assert waited == [errors.GRACE_SECONDS]
    assert capsys.readouterr().err == "vlscale: error on rank 3: only here\n"


def test_wrong_usage_is_one_line_with_typers_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert errors.exit_code(lambda: raising(TyperException("No such option"))) == 1
    assert capsys.readouterr().err == "vlscale: error: No such option\n"


@pytest.mark.parametrize("command", [lambda: 130, lambda: raising(KeyboardInterrupt())], ids=["typer", "bare"])
def test_ctrl_c_is_one_line(
    command: Callable[[], int | None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert errors.exit_code(command) == 130
    assert capsys.readouterr().err == "vlscale: interrupted\n"


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        errors.exit_code(lambda: raising(ZeroDivisionError()))
