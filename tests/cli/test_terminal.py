"""Progress in a log: plain lines now and then, none for what is short."""

from __future__ import annotations

import pytest

from vlscale.cli import terminal


def test_plain_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    with terminal.progress() as report:
        for second in range(40):
            clock[0] = second
            report("writing", 100 * second, 4000)
    assert capsys.readouterr().err.splitlines() == ["writing: 1,500 of 4,000", "writing: 3,000 of 4,000"]
