"""`vlscale doctor`: what would go wrong with a training, before it begins; one table, a way out for each mistake."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from . import launch, options, terminal
from .pretrain import DEFAULT_RECIPE, overrides_of

if TYPE_CHECKING:
    from vlscale.config import Recipe
    from vlscale.engine.checks_finding import Finding

_MARKS = {"ok": "✓", "warning": "⚠", "failed": "✗", "unknown": "–"}
_TITLES = {"here": "machine and data", "collective": "collective", "step": "dry step"}
_LATE = {
    "here": "--verbose shows how far it came; a slow file system? --timeout for more time",
    "collective": "do all ranks run, and reach MASTER_ADDR:MASTER_PORT (firewall, GLOO_ or NCCL_SOCKET_IFNAME)? "
    "--timeout for more time",
    "step": "--verbose shows how far it came; --timeout for more time",
}
"""What to do about a part that does not end."""
_STEP_FACTOR = 10
"""The dry step may take so many times --timeout: scenes are rendered and a tokenizer trained where they are missing."""
_POLL_SECONDS = 0.1
_TEARDOWN_SECONDS = 5.0
"""How long a process may go on when it has found everything."""
_SMALLEST_FREE = 1 << 30
"""Bytes of memory that the dry step leaves the machine …"""
_SMALLEST_SHARE = 0.1
"""… or this share of what was free before it, where that is less."""


def doctor(
    recipe: Annotated[
        str | None, typer.Argument(help="Name of a shipped recipe, or a YAML file; without one: the machine alone.")
    ] = None,
    ds_config: options.DsConfig = "auto",
    data: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="As for pretrain; default: the embedded scenes.")
    ] = None,
    image_root: options.ImageRoot = None,
    out: Annotated[Path | None, typer.Option(help="Run folder to be; default: runs/<recipe>.")] = None,
    nproc: options.Nproc = None,
    threads: options.RankThreads = None,
    overrides: options.Overrides = None,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds for the ranks to meet; the dry step may take ten times as long.")
    ] = 120,
    verbose: Annotated[bool, typer.Option("--verbose", help="Also print what the checks' processes say.")] = False,
    part: Annotated[str | None, typer.Option(hidden=True)] = None,
    notes: Annotated[Path | None, typer.Option(hidden=True)] = None,
    shared: Annotated[Path | None, typer.Option(hidden=True)] = None,
    local_rank: options.LocalRank = None,
) -> None:
    """Look at machine, folders, data and recipe before a training; exit code 1 when a check fails.

    Also under srun or torchrun, with the ranks that they start. Nothing is written to the run folder.
    """
    from vlscale.config import load_recipe

    if recipe is None and (data or image_root or overrides):
        recipe = DEFAULT_RECIPE
    resolved = None if recipe is None else load_recipe(recipe, overrides_of(overrides, data, image_root))
    folder = out or Path("runs") / ("" if resolved is None else resolved.name)
    if part is not None:
        assert notes is not None
        assert shared is not None
        _work(part.split(","), resolved, ds_config, folder, nproc, threads, notes, shared)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # by way of every `finally`
    findings = _findings(resolved, folder, launch.world_size(nproc), timeout, verbose)
    if launch.rank() > 0:
        return  # with another exit code srun would end rank 0 before its report
    _print(findings)
    if any(finding.state == "failed" for finding in findings):
        raise typer.Exit(1)


def _work(
    parts: list[str],
    recipe: Recipe | None,
    ds_config: str,
    out: Path,
    nproc: int | None,
    threads: int | None,
    notes: Path,
    shared: Path,
) -> None:
    """What a process of the doctor does: some parts of the examination, as one of the ranks where they ask for it."""
    world = launch.world_size(nproc)
    number = launch.set_threads(threads, world) if parts == ["here"] else launch.become_rank(world, threads)
    if number is None:
        return
    from vlscale.engine.checks_finding import Case
    from vlscale.engine.doctor import examine

    case = Case(recipe, ds_config, out, world, launch.local_world_size(world), number)
    examine(case, parts, notes if launch.rank() == 0 else None, shared)


def _findings(recipe: Recipe | None, out: Path, world: int, timeout: float, verbose: bool) -> list[Finding]:
    """Everything found, in the order to show it; beside ranks that a launcher started, only rank 0 finds something."""
    from vlscale.engine.doctor import COLLECTIVE, HERE, ORDER, STEP

    step = [] if recipe is None else [STEP]
    with _folders(out) as (own, shared):
        examination = _Examination(own, shared, timeout, verbose)
        if launch.joined():
            examination.run([COLLECTIVE, *step])  # the launcher's store takes one process group
        else:
            examination.run([COLLECTIVE], ranks=max(2, world))
            if step:
                examination.run(step)
        if launch.rank() == 0:
            examination.run([HERE])
        found = examination.findings()
    places = {name: place for place, name in enumerate(ORDER)}
    return sorted(found, key=lambda finding: places.get(finding.name, len(places)))


@contextmanager
def _folders(out: Path) -> Iterator[tuple[Path, Path]]:
    """A temporary folder of this process, and a path beside the run folder for what ranks write; both go in the end."""
    from vlscale.engine.room import existing_parent

    shared = existing_parent(out) / f".vlscale-doctor-{uuid.uuid4().hex[:8]}"
    with tempfile.TemporaryDirectory(prefix="vlscale-doctor-") as own:
        try:
            yield Path(own), shared
        finally:
            shutil.rmtree(shared, ignore_errors=True)  # often it was never made


@dataclass(frozen=True, slots=True)
class _Examination:
    """Runs parts of the examination in processes of their own and collects what they find."""

    own: Path
    shared: Path
    timeout: float
    verbose: bool

    def findings(self) -> list[Finding]:
        from vlscale.engine.checks_finding import read_notes

        return [finding for finding in read_notes(self._notes) if not finding.name.startswith("done ")]

    def run(self, parts: list[str], ranks: int | None = None) -> None:
        """Run parts, as `ranks` processes where it is given, until they are done; what ends otherwise is a finding."""
        from vlscale.engine.checks_finding import Finding, note

        main = launch.rank() == 0
        if main:
            terminal.note(f"doctor: {', '.join(_TITLES[part] for part in parts)} …")
        output = self.own / "output"
        with output.open("w", encoding="utf-8") as stream, _started(self._command(parts, ranks), ranks, stream) as work:
            stopped = self._watch(work, parts)
        said = output.read_text(encoding="utf-8", errors="replace")
        if self.verbose:
            print(said, file=sys.stderr, end="", flush=True)
        left = self._left(parts)
        if left and (main or work.returncode):
            problem, fix = stopped or (f"{_ending(work.returncode)}: {_reason(said)}", "its whole output: --verbose")
            if main:
                note(self._notes, [Finding(_TITLES[left[0]], "failed", problem, fix)])
            else:
                print(f"vlscale doctor: rank {launch.rank()}: {problem}", file=sys.stderr, flush=True)

    @property
    def _notes(self) -> Path:
        return self.own / "findings.jsonl"

    def _command(self, parts: list[str], ranks: int | None) -> list[str]:
        added = ["--part", ",".join(parts), "--notes", str(self._notes), "--shared", str(self.shared)]
        added += [] if ranks is None else ["--nproc", str(ranks)]  # the last one counts
        return [sys.executable, "-m", "vlscale.cli", *sys.argv[1:], *added]

    def _left(self, parts: list[str]) -> list[str]:
        """Parts that have not come to their end."""
        from vlscale.engine.checks_finding import read_notes
        from vlscale.engine.doctor import done

        entries = read_notes(self._notes)
        return [part for part in parts if done(part) not in entries]

    def _watch(self, work: subprocess.Popen[bytes], parts: list[str]) -> tuple[str, str] | None:
        """Wait for the end of all parts; why there is no waiting any more, and a way out, where it doesn't come."""
        from vlscale.engine.checks_storage import free_memory
        from vlscale.engine.room import shown_size

        began, before, done_since = time.monotonic(), free_memory(), math.inf
        while work.poll() is None:
            now, left = time.monotonic(), self._left(parts)
            if not left:
                done_since = min(done_since, now)
                if now - done_since > _TEARDOWN_SECONDS:
                    return None
            elif now - began > (limit := self._limit(parts, left[0])):
                return f"no answer within {limit:.0f} s", _LATE[left[0]]
            free = free_memory()
            if before and free and free < min(_SMALLEST_FREE, _SMALLEST_SHARE * before):
                fix = "lower train.micro_batch (what is missing to the global batch is accumulated), or fewer --nproc"
                return f"stopped: {shown_size(before - free)} of memory taken, {shown_size(free)} left", fix
            time.sleep(_POLL_SECONDS)
        return None

    def _limit(self, parts: list[str], left: str) -> float:
        """Seconds from the start to the end of a part; ranks other than 0 don't hear of ends, and wait for them all."""
        until = parts[: parts.index(left) + 1] if launch.rank() == 0 else parts
        return sum(self.timeout * (1 if part == "collective" else _STEP_FACTOR) for part in until)


@contextmanager
def _started(command: list[str], ranks: int | None, output: TextIO) -> Iterator[subprocess.Popen[bytes]]:
    """A process of the doctor; ended with the block, and with this process."""
    environment = dict(os.environ)
    if ranks is not None and 0 < launch.count_gpus() < ranks:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # NCCL wants a GPU for every rank: they meet over gloo
    work = subprocess.Popen(
        command,
        env=environment,
        stdout=output,
        stderr=output,
        start_new_session=True,
        preexec_fn=launch.end_with_parent,
    )
    try:
        yield work
    finally:
        launch.end([work])


def _ending(code: int) -> str:
    """How a process ended that was not done."""
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return "killed, mostly for want of memory"
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _reason(said: str) -> str:
    """The line of a process' output that says why it ended: an error's, else the last one."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt)\b|vlscale: error", line)]
    return (errors or lines or ["it said nothing"])[-1][:400]


def _print(findings: list[Finding]) -> None:
    """A table, or in a log plain lines; what to do stands below what was found."""
    if sys.stdout.isatty():
        from rich.markup import escape
        from rich.table import Table

        table = Table("", "check", "found", "how to put it right")
        for finding in findings:
            table.add_row(_MARKS[finding.state], *map(escape, (finding.name, finding.found, finding.fix)))
        terminal.print_rich(table)
    else:
        for finding in findings:
            print(f"{_MARKS[finding.state]} {finding.name}: {finding.found}")
            if finding.fix:
                print(f"    → {finding.fix}")
    states = Counter(finding.state for finding in findings)
    counts = [f"{states['ok']} fine", f"{states['warning']} to look at", f"{states['failed']} wrong"]
    print(", ".join([*counts, f"{states['unknown']} not checked"] if states["unknown"] else counts))
