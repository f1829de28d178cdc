"""`vlscale ablate`: rows of overrides × seeds, each trained and evaluated in processes of its own, and one table."""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Annotated

import typer

from vlscale.engine.signals import EXIT_CODES
from vlscale.errors import UserError

from . import errors, launch, terminal
from .pretrain import overrides_of

if TYPE_CHECKING:
    from vlscale.engine.ablation import Plan, Run

PROGRAM = (sys.executable, "-m", "vlscale.cli")
LAUNCHED = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_PROCID",
    "SLURM_STEP_ID",
)
"""What tells a process that a launcher started it: the runs start their own ranks."""
PROMPT = "$"
"""Begins the line of the log that names a command."""
SIGNAL_SECONDS = 1.0
"""Who signals a whole process group reaches us just after our children."""
STOP_SECONDS = 120.0
"""How long a run may take to finish its step and save when this command is ended."""
TABLE_LOCK = "table.lock"


def ablate(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or a YAML file.")],
    rows: Annotated[str, typer.Option(metavar="FILE", help="Named rows of overrides: a YAML file, or a shipped name.")],
    seeds: Annotated[int, typer.Option(help="Runs per row: the recipe's train.seed, and the ones after it.")] = 3,
    only: Annotated[list[int] | None, typer.Option(metavar="N", help="Run row N alone; repeatable.")] = None,
    task: Annotated[
        int | None, typer.Option(metavar="I", help="Of these runs the I-th alone, from 1: for a job array.")
    ] = None,
    list_runs: Annotated[bool, typer.Option("--list", help="Print the runs, a line each, and run nothing.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of all runs; default: runs/<recipe>-<rows>.")] = None,
    data: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Data of all rows; default: the embedded scenes.")
    ] = None,
    image_root: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Folder that image paths are relative to.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key in all rows; repeatable."),
    ] = None,
    ds_config: Annotated[
        str, typer.Option(help="DeepSpeed config: a shipped name, a JSON file, or auto (what this machine can do).")
    ] = "auto",
    jobs: Annotated[int, typer.Option(help="Runs at a time.")] = 1,
    threads: Annotated[int | None, typer.Option(help="CPU threads per rank; default: the cores shared out.")] = None,
) -> None:
    """Train RECIPE once per row and seed, evaluate, and compare; interrupted, the same command goes on."""
    for name, value in (("--seeds", seeds), ("--jobs", jobs), ("--threads", threads)):
        if value is not None and value < 1:
            raise UserError(f"{name} {value}: expected at least 1")
    if launch.has_company():
        raise UserError("vlscale ablate starts its runs itself: start one task of it, or one per row with --only")
    from vlscale.engine import ablation, ablation_table

    file = ablation.read_rows(rows, recipe)
    plan = ablation.make_plan(file, recipe, overrides_of(overrides, data, image_root), seeds, out)
    chosen = _chosen(plan.runs(ablation.choose(file, only or [])), task)
    if list_runs:
        for run in chosen:
            print(f"{_name(plan, run)}: {run.folder}{', finished' if run.finished else ''}")
        return
    ablation_table.collect(plan)  # a folder that does not fit is found before anything runs
    waiting = [run for run in chosen if not run.finished]
    print(f"{plan.out}: {len(waiting)} of {len(chosen)} runs to do", flush=True)
    options = _thread_options(threads, jobs)
    work = [Job(run, _name(plan, run), _commands(plan, run, ds_config, options)) for run in waiting]
    run_jobs(work, jobs, partial(_finish, plan))
    _update(plan, show=not (work and sys.stdout.isatty()))  # else it is on the screen already
    print(plan.out / ablation_table.MARKDOWN_NAME)


def _chosen(runs: list[Run], task: int | None) -> list[Run]:
    if task is None:
        return runs
    if not 1 <= task <= len(runs):
        raise UserError(f"--task {task}: there are runs 1 to {len(runs)}, see --list")
    return [runs[task - 1]]


def _finish(plan: Plan, job: Job) -> None:
    """After a job's last command."""
    from vlscale.engine import ablation

    ablation.finish(job.run)
    print(f"{job.name}: {time.monotonic() - job.began:.0f} s", flush=True)
    _update(plan, show=sys.stdout.isatty())


def _update(plan: Plan, show: bool) -> None:
    """Write the table of all that is there, and show it."""
    from vlscale.engine import ablation_table

    plan.out.mkdir(parents=True, exist_ok=True)
    with (plan.out / TABLE_LOCK).open("w") as lock:
        # Of tasks of an array that finish together, the last to write has seen what all did.
        fcntl.flock(lock, fcntl.LOCK_EX)
        outcomes = ablation_table.collect(plan)
        ablation_table.write(plan, outcomes)
    if show:
        terminal.print_rich(ablation_table.as_table(plan, outcomes))


@dataclass
class Job:
    """One run on its way: its commands are run one after the other."""

    run: Run
    name: str
    commands: list[list[str]]
    began: float = 0.0
    process: subprocess.Popen[bytes] | None = None
    held: list[IO[str]] = field(default_factory=list)
    """The folder's lock and the log."""

    def start(self) -> None:
        """Claim the folder and start the first command.

        Raises:
            UserError: another process is at this run.
        """
        from vlscale.engine import ablation

        self.began = time.monotonic()
        self.held.append(ablation.claim(self.run))
        self.held.append(self.run.log.open("a", encoding="utf-8"))
        print(f"{self.name}: {self.run.log}", flush=True)
        self.next_command()

    def next_command(self) -> bool:
        """Start the next command; False when there is none left."""
        if not self.commands:
            return False
        arguments, log = self.commands.pop(0), self.held[-1]
        print(PROMPT, shlex.join(["vlscale", *arguments]), file=log, flush=True)
        environment = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
        # A session of its own: Ctrl-C reaches it once, through us, not a second time from the terminal.
        self.process = subprocess.Popen(
            [*PROGRAM, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=launch.end_with_parent,
        )
        return True

    def close(self) -> None:
        """Give folder and log free."""
        for file in self.held:
            file.close()
        self.held.clear()


def run_jobs(work: Sequence[Job], at_a_time: int, done: Callable[[Job], None]) -> None:
    """Run the jobs, some at a time, and call `done` after each; whatever ends this ends the processes, which save.

    Raises:
        UserError: a process stopped on bad input, or another one is at a run.
        typer.Exit: a process failed (code 1), or SIGTERM (143) or SIGUSR1 (85) came.
        KeyboardInterrupt: SIGINT came.
    """
    waiting, active = deque(work), list[Job]()
    with _received_signals() as received:
        try:
            while waiting or active:
                while waiting and len(active) < at_a_time:
                    active.append(waiting.popleft())
                    active[-1].start()
                for job in list(active):
                    if _ended(job, received):
                        done(job)
                        job.close()
                        active.remove(job)
                _stop_if_told(received)
                time.sleep(launch.POLL_SECONDS)
        finally:
            launch.end([job.process for job in active if job.process is not None], STOP_SECONDS)
            for job in active:
                job.close()


def _ended(job: Job, received: list[int]) -> bool:
    """Whether the last command of a job is done; starts the next one where there is one."""
    assert job.process is not None
    code = job.process.poll()
    if code is None:
        return False
    if code == 0:
        return not job.next_command()
    if code < 0 or code > 128 or code in launch.STOPPED:
        time.sleep(SIGNAL_SECONDS)
    _stop_if_told(received)
    line = f"{job.name} failed: {_reason(job.run.log, code)}; see {job.run.log}"
    if code == errors.USER_ERROR:
        raise UserError(line)
    print(f"vlscale: error: {line}", file=sys.stderr, flush=True)
    raise typer.Exit(1)


def _reason(log: Path, code: int) -> str:
    """The process' own line where it has one, else how it ended."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    last = log.read_text(encoding="utf-8", errors="replace").rpartition(f"{PROMPT} vlscale ")[2]
    said = [line for line in last.splitlines() if line.startswith("vlscale: error")]
    return said[-1].partition(": error")[2].partition(": ")[2] if said else f"exit code {code}"


@contextmanager
def _received_signals() -> Iterator[list[int]]:
    """SIGINT, SIGTERM and SIGUSR1 are noted while the block runs, so that nothing is cut off in the middle."""
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, remember) for number in launch.FORWARDED}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _stop_if_told(received: list[int]) -> None:
    if not received:
        return
    if received[0] == signal.SIGINT:
        raise KeyboardInterrupt
    raise typer.Exit(EXIT_CODES[signal.Signals(received[0])])


def _name(plan: Plan, run: Run) -> str:
    return f"row {run.row.number}/{len(plan.file.rows)} {run.row.name!r}, seed {run.seed + 1}/{plan.seeds}"


def _commands(plan: Plan, run: Run, ds_config: str, options: list[str]) -> list[list[str]]:
    """Train, or go on where an interruption left it, then evaluate."""
    from vlscale.engine.ablation import OPTIONS

    train = ["pretrain", plan.recipe, "--out", str(run.folder), "--resume", "auto", "--ds-config", ds_config, *options]
    for pair in run.overrides:
        train += ["--set", pair]
    source = ["--from", str(run.folder), *options]
    return [train, *(["eval", task, *source, *OPTIONS.get(task, ())] for task in run.tasks)]


def _thread_options(threads: int | None, jobs: int) -> list[str]:
    """`--threads` of every run: as asked, else the cores shared out among all ranks that run at a time."""
    if threads is None and jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
        given = os.environ.get("SLURM_CPUS_PER_TASK", "")
        cores = int(given) if given.isdigit() else launch.count_cores()
        threads = max(1, cores // (jobs * max(1, launch.count_gpus())))
    return [] if threads is None else ["--threads", str(threads)]
