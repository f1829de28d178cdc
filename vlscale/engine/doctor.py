"""`vlscale doctor`: is everything there that a training needs, before it begins?

Three parts, each run in a process of its own, so that nothing that hangs or is killed takes the report with it: HERE
looks at the machine, the folder and the data; COLLECTIVE and STEP are run by every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from vlscale.engine.checks_finding import Case, Finding, guarded, note

Check = Callable[[], list[Finding]]

HERE, COLLECTIVE, STEP = "here", "collective", "step"
ORDER = (
    *("versions", "torchvision", "accelerator", "--ds-config", "backend", "meeting point", "open files", "/dev/shm"),
    *("run folder", "disk", "memory", "batch", "data", "data, left out", "samples", "steps"),
)
"""How findings are listed; others follow."""


def examine(case: Case, parts: Iterable[str], notes: Path | None, shared: Path) -> None:
    """Make the checks of some parts and write each finding down at once; an entry `done` ends a part.

    Args:
        parts: of HERE, COLLECTIVE and STEP; for the last two every rank calls this.
        notes: file that findings are written to. None on ranks other than 0: what fails there ends the process, and
            with it the part.
        shared: folder beside the run folder that takes what ranks write; rank 0's counts.
    """
    checks = {HERE: _here, COLLECTIVE: _collective, STEP: _step}
    for part in parts:
        for name, check in checks[part](case, shared).items():
            if notes is None:
                check()
            else:
                note(notes, guarded(name, check))
        if notes is not None:
            note(notes, [done(part)])


def done(part: str) -> Finding:
    """The entry that ends a part."""
    return Finding(f"done {part}", "ok", "")


# Each check imports what it needs: where a package is missing, its checks fail and not all.


def _here(case: Case, shared: Path) -> dict[str, Check]:
    from vlscale.engine import checks_machine as machine
    from vlscale.engine import checks_storage as storage

    checks: dict[str, Check] = {
        "versions": machine.versions,
        "accelerator": partial(machine.accelerator, case),
        "--ds-config": partial(machine.ds_config, case),
        "backend": machine.backend,
        "meeting point": partial(machine.meeting_point, case),
        "open files": machine.open_files,
        "/dev/shm": partial(machine.shared_memory, case),
        "run folder": partial(storage.run_folder, case),
    }
    if case.recipe is not None:
        checks["disk"] = partial(storage.disk, case)
        checks["memory"] = partial(storage.memory, case)
        checks["batch"] = partial(_batch, case)
        checks["data"] = partial(_data, case)
    return checks


def _collective(case: Case, shared: Path) -> dict[str, Check]:
    return {"collective": _meet, "shared folder": partial(_see_files, shared)}


def _step(case: Case, shared: Path) -> dict[str, Check]:
    return {"dry step": partial(_train, case, shared)}


def _batch(case: Case) -> list[Finding]:
    from vlscale.engine.checks_data import batch

    return batch(case)


def _data(case: Case) -> list[Finding]:
    from vlscale.engine.checks_data import data_and_steps

    return data_and_steps(case)


def _meet() -> list[Finding]:
    from vlscale.engine.checks_ranks import collective

    return collective()


def _see_files(shared: Path) -> list[Finding]:
    from vlscale.engine.checks_ranks import shared_files

    return shared_files(shared)


def _train(case: Case, shared: Path) -> list[Finding]:
    from vlscale.engine.checks_ranks import dry_step

    return dry_step(case, shared)
