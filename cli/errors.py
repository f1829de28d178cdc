"""Bad input becomes one line on stderr and exit code 2, what breaks a run from outside one line and 1, Ctrl-C one line
and 130; a bug keeps its traceback."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from typer.exceptions import TyperException

from vlscale.errors import RunBroken, UserError

from . import launch

BROKEN = 1
USER_ERROR = 2
INTERRUPTED = 130
GRACE_SECONDS = 15.0
"""How long another rank waits for the launcher to end it before it prints an error of its own."""
BROKEN_SECONDS = 3.0
"""How long a rank that lost another one waits: the launcher is to see the other one's end first, and name it."""


def exit_code(command: Callable[[], int | None]) -> int:
    """Run a command and turn its outcome into an exit code.

    `command` returns its exit code or None; typer maps Ctrl-C to 130 itself.
    """
    try:
        code = command() or 0
    except UserError as error:
        _print_once(str(error))
        return USER_ERROR
    except RunBroken as error:
        if launch.has_company():
            time.sleep(BROKEN_SECONDS)
        print(f"vlscale: error: rank {launch.rank()}: {error}", file=sys.stderr, flush=True)
        return BROKEN
    except TyperException as error:
        _print_once(error.format_message())
        return error.exit_code
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED and launch.rank() == 0:
        print("vlscale: interrupted", file=sys.stderr)
    return code


def _print_once(message: str) -> None:
    """Print one line, on rank 0 at once.

    Mostly every rank fails alike, and the launcher ends the others as soon as rank 0 is gone; what only another rank
    ran into is printed by that rank after a pause, because nobody else would tell it.
    """
    line = " ".join(message.split())
    if not line:  # `vlscale eval` alone: its help is on the screen already
        return
    rank = launch.rank()
    if rank == 0:
        print(f"vlscale: error: {line}", file=sys.stderr, flush=True)
        return
    time.sleep(GRACE_SECONDS)
    print(f"vlscale: error on rank {rank}: {line}", file=sys.stderr, flush=True)
