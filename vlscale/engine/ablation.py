"""Ablations: a file of named rows of overrides, the runs that they make, and what of these is there already.

OUT/<row>/seed-<n>/        a run folder; its train.seed is the recipe's plus n
OUT/<row>/seed-<n>/log.txt what training and evaluation printed
OUT/<row>/seed-<n>/finished.json   written last: trained to the end and evaluated
"""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import IO, Any

import yaml
from pydantic import Field, ValidationError

from vlscale.config import Recipe, Section, load_recipe
from vlscale.engine import checkpoint, start
from vlscale.errors import UserError
from vlscale.interop import layout

RETRIEVAL = "retrieval"
LOG = "log.txt"
FINISHED = "finished.json"
LOCK = "ablate.lock"
EVALUATIONS: dict[str, tuple[str, ...]] = {
    RETRIEVAL: tuple(
        f"{score}{name}"
        for score in ("itc_", "", "sum_")
        for name in (*(f"{way}_r{k}" for way in ("t2i", "i2t") for k in (1, 5, 10)), "rsum")
    ),
    "grounding": ("any_r1", "any_r5", "any_r10", "any_pointing", "merged_r1", "merged_r5", "merged_r10"),
}
"""What a row file may ask for: the metrics of eval/<task>.json, those of retrieval by their name alone, others as
`<task>.<name>`. Only the evaluations that it asks for are run."""
OPTIONS: dict[str, tuple[str, ...]] = {"grounding": ("--zero-shot",)}
"""Arguments of `vlscale eval <task>` in an ablation."""
METRICS = (
    *EVALUATIONS[RETRIEVAL],
    *(f"{task}.{name}" for task, names in EVALUATIONS.items() if task != RETRIEVAL for name in names),
)
DEFAULT_METRICS = ("itc_t2i_r1", "itc_i2t_r1", "itc_rsum", "t2i_r1", "i2t_r1", "rsum")
_PACKAGE = "vlscale.recipes.ablations"
_SEED_FOLDER = re.compile(r"seed-(\d+)")


class _RowText(Section):
    """A row as it is written."""

    name: str = Field(min_length=1)
    set: list[str] = Field(default_factory=list)
    """Overrides as `--set` takes them; none means the recipe as it is."""


class _RowsText(Section):
    """The file."""

    title: str = ""
    metrics: list[str] = Field(default_factory=lambda: list(DEFAULT_METRICS), min_length=1)
    """Columns of the table, see `METRICS`."""
    rows: list[_RowText] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class Row:
    """A named list of overrides; its number starts at 1, as `--only` counts."""

    number: int
    name: str
    overrides: tuple[str, ...]

    @property
    def folder(self) -> str:
        """The name in lower case, whatever is neither letter nor digit turned into dashes."""
        return re.sub(r"[\W_]+", "-", self.name.lower()).strip("-")

    def __str__(self) -> str:
        return f"row {self.number} {self.name!r}"


@dataclass(frozen=True, slots=True)
class RowFile:
    """Rows, and the columns to compare them by."""

    source: str
    """Names the file in errors."""
    stem: str
    title: str
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Evaluations that the columns come from."""
        asked = dict.fromkeys(metric.rpartition(".")[0] or RETRIEVAL for metric in self.metrics)
        return tuple(asked)


@dataclass(frozen=True, slots=True)
class Run:
    """One row trained with one seed."""

    row: Row
    seed: int
    """0 is the recipe's own."""
    folder: Path
    recipe: Recipe
    overrides: tuple[str, ...]
    """All of them, common ones first and train.seed last."""
    tasks: tuple[str, ...] = (RETRIEVAL,)
    """Evaluations that follow the training."""

    def result(self, task: str) -> Path:
        """Result file of an evaluation."""
        return self.folder / "eval" / f"{task}.json"

    @property
    def log(self) -> Path:
        return self.folder / LOG

    @property
    def finished(self) -> bool:
        """Whether it was trained to the end and evaluated."""
        return (self.folder / FINISHED).is_file() and all(self.result(task).is_file() for task in self.tasks)


@dataclass(frozen=True, slots=True)
class Plan:
    """What the command line asks for."""

    file: RowFile
    recipe: str
    common: tuple[str, ...]
    base: Recipe
    """The recipe with the common overrides."""
    seeds: int
    out: Path

    def runs(self, rows: Sequence[Row]) -> list[Run]:
        """Runs asked for: the first seed of every row comes first, so that a table stopped early compares all rows."""
        return [self.run(row, seed) for seed in range(self.seeds) for row in rows]

    def known_runs(self, row: Row) -> list[Run]:
        """A row's runs that have a folder, also seeds beyond those asked for."""
        folder = self.out / row.folder
        names = [_SEED_FOLDER.fullmatch(entry.name) for entry in folder.iterdir()] if folder.is_dir() else []
        return [self.run(row, seed) for seed in sorted(int(name[1]) for name in names if name)]

    def run(self, row: Row, seed: int) -> Run:
        overrides = (*self.common, *row.overrides, f"train.seed={self.base.train.seed + seed}")
        folder = self.out / row.folder / f"seed-{seed}"
        return Run(row, seed, folder, load_recipe(self.recipe, list(overrides)), overrides, self.file.tasks)


def ablation_names() -> list[str]:
    """Names of the row files that ship with vlscale."""
    folder = resources.files(_PACKAGE)
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_rows(name_or_path: str, recipe: str = "") -> RowFile:
    """Read a shipped row file by name, or a YAML file by path, also one beside the recipe.

    Args:
        recipe: the recipe's name or path.

    Raises:
        UserError: no such file, not YAML, an unknown key or metric, or rows that share a name or a folder.
    """
    text, source = _find(name_or_path, recipe)
    try:
        tree = yaml.safe_load(text)
        parsed = _RowsText.model_validate(tree)
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not YAML: {str(error).splitlines()[0]}") from None
    except ValidationError as error:
        raise UserError(f"{source}: {_explain(error, tree)}") from None
    for metric in parsed.metrics:
        if metric not in METRICS:
            raise UserError(f"{source}: metrics: no {metric!r}; there are {', '.join(METRICS)}")
    rows = tuple(Row(number, row.name, tuple(row.set)) for number, row in enumerate(parsed.rows, start=1))
    _require_distinct(rows, source)
    stem = Path(name_or_path).stem
    return RowFile(source, stem, parsed.title or stem, tuple(parsed.metrics), rows)


def make_plan(file: RowFile, recipe: str, common: Sequence[str], seeds: int, out: Path | None) -> Plan:
    """Check every row's overrides against the recipe, before anything runs.

    Args:
        common: overrides that hold for all rows; a row's own come after them.
        out: default `runs/<recipe>-<row file>`.

    Raises:
        UserError: the recipe, a common override or one of a row's is wrong, or a row sets the seed.
    """
    base = load_recipe(recipe, list(common))
    for row in file.rows:
        try:
            resolved = load_recipe(recipe, [*common, *row.overrides])
        except UserError as error:
            raise UserError(f"{file.source}: {row}: {error}") from None
        if resolved.train.seed != base.train.seed:
            raise UserError(f"{file.source}: {row}: sets train.seed; every row runs with the same seeds, see --seeds")
    return Plan(file, recipe, tuple(common), base, seeds, out or Path("runs") / f"{base.name}-{file.stem}")


def choose(file: RowFile, only: Sequence[int]) -> list[Row]:
    """The rows of these numbers, all when there are none.

    Raises:
        UserError: a number that no row has.
    """
    for number in only:
        if not 1 <= number <= len(file.rows):
            raise UserError(f"--only {number}: {file.source} has rows 1 to {len(file.rows)}")
    return [row for row in file.rows if not only or row.number in only]


def require_same(run: Run) -> None:
    """Refuse a folder that holds a run of another recipe.

    A run that has no checkpoint yet has nothing to lose and starts anew. Evaluation counts once it was done.

    Raises:
        UserError: names the first key that differs.
    """
    source = run.folder / layout.RECIPE
    if not source.is_file() or not (run.finished or layout.complete_checkpoints(run.folder)):
        return
    found, wanted = load_recipe(str(source)), start.absolute_paths(run.recipe.stages[-1])
    checkpoint.require_same(wanted, found, source)
    if run.finished:
        before, now = found.eval.model_dump(), wanted.eval.model_dump()
        for key in now:
            if before[key] != now[key]:
                raise UserError(
                    f"{source}: the run was evaluated with eval.{key}={before[key]}, now it is {now[key]}: "
                    f"pass --set eval.{key}={json.dumps(before[key])}, or start anew in another --out"
                )


def claim(run: Run) -> IO[str]:
    """Make the run's folder and hold it until the file is closed or this process ends.

    Raises:
        UserError: another process holds it.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    lock = (run.folder / LOCK).open("w", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError(
            f"{run.folder}: another vlscale ablate is at it; wait for it, or share rows with --only"
        ) from None
    return lock


def finish(run: Run) -> None:
    """Say that a run was trained to the end and evaluated; a result alone may be that of an earlier checkpoint."""
    layout.write_json(run.folder / FINISHED, {"train_seconds": _step_seconds(run)})


def _step_seconds(run: Run) -> float:
    """Seconds of all steps that count, over however many interruptions: setting up and saving not included."""
    seconds = 0.0
    stages = len(run.recipe.stages)
    for stage in range(1, stages + 1):
        with (layout.stage_folder(run.folder, stage, stages) / layout.METRICS_JSONL).open(encoding="utf-8") as lines:
            for line in lines:
                seconds += run.recipe.train.global_batch / json.loads(line)["images_per_s"]
    return seconds


def _find(name_or_path: str, recipe: str) -> tuple[str, str]:
    """Text of a row file and its name for errors."""
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"}:
        beside = Path(recipe).parent / path
        found = next((place for place in (path, beside) if place.is_file()), None)
        if found is None:
            raise UserError(f"--rows {path}: no such file")
        return found.read_text(encoding="utf-8"), str(found)
    if name_or_path in ablation_names():
        text = (resources.files(_PACKAGE) / f"{name_or_path}.yaml").read_text(encoding="utf-8")
        return text, f"ablation {name_or_path}"
    raise UserError(f"--rows {name_or_path}: use one of {', '.join(ablation_names())}, or a path ending in .yaml")


def _explain(error: ValidationError, tree: Any) -> str:
    """The first thing that pydantic found wrong, with the row's number and name."""
    first = error.errors()[0]
    where, keys = list(first["loc"]), "title, metrics and rows"
    prefix = ""
    if len(where) > 1 and where[0] == "rows":
        index, keys = int(where[1]), "name and set"
        text = tree["rows"][index]
        name = f" {text['name']!r}" if isinstance(text, dict) and "name" in text else ""
        prefix, where = f"row {index + 1}{name}: ", where[2:]
    key = ".".join(map(str, where))
    if first["type"] == "extra_forbidden":
        return f"{prefix}unknown key {key}; there are {keys}"
    if first["type"] == "missing":
        return f"{prefix}{key} is missing"
    return f"{prefix}{key + ': ' if key else ''}{first['msg']}, got {first['input']!r}"


def _require_distinct(rows: Sequence[Row], source: str) -> None:
    """A row is known by its folder: no two may share one."""
    seen: dict[str, Row] = {}
    for row in rows:
        if not row.folder:
            raise UserError(f"{source}: {row}: the name needs a letter or a digit, it becomes the row's folder")
        other = seen.setdefault(row.folder, row)
        if other is not row:
            what = "name" if other.name == row.name else f"folder name {row.folder}"
            raise UserError(f"{source}: {row}: has the same {what} as {other}; rename one")
