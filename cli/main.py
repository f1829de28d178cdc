"""The entry point: composes the commands. Importing it costs typer and nothing else."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer

from vlscale import __version__

from . import ablate, bench, compare, data, doctor, errors, finetune, first_run, inspect, launch, pretrain
from . import eval as evaluation

app = typer.Typer(
    name="vlscale",
    help="Pre-train vision-language models through DeepSpeed, evaluate them, and look at what their codebooks learned.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,  # importing rich would double the time of --help
    no_args_is_help=True,
)
app.command("pretrain")(pretrain.pretrain)
app.command("finetune", short_help="Teach a pre-trained run a task: vqa, nlvr2, snli-ve, retrieval, grounding.")(
    finetune.finetune
)
app.add_typer(evaluation.app, name="eval")
app.command("ablate", short_help="Rows of overrides × seeds, trained and evaluated, as one table.")(ablate.ablate)
app.command("compare", short_help="Curves and results of several runs, side by side.")(compare.compare)
app.command("codebook-inspect", short_help="What each codeword stands for, as a page of pictures.")(
    inspect.codebook_inspect
)
app.add_typer(inspect.app, name="inspect")
app.add_typer(data.app, name="data")
app.add_typer(bench.app, name="bench")
app.command("doctor", short_help="What would go wrong with a training on this machine, and how to put it right.")(
    doctor.doctor
)
app.command("first-run", short_help="From rendering the data to the pictures, ending with one table.")(
    first_run.first_run
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vlscale {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    local_rank: Annotated[
        int | None, typer.Option("--local_rank", "--local-rank", hidden=True, help="Set by the deepspeed launcher.")
    ] = None,
) -> None:
    """Options that stand before the command."""
    # The deepspeed launcher puts --local_rank first; the rank itself comes from the environment.


def main() -> int:
    """Run the command line; returns the exit code."""
    try:
        code = errors.exit_code(lambda: app(args=sys.argv[1:], prog_name="vlscale", standalone_mode=False))
    except Exception:
        if not launch.has_company():
            raise
        traceback.print_exc()
        code = 1
    if code and launch.has_company():
        # Torch's teardown of a process group takes many seconds while other ranks are alive, and only when this rank is
        # gone does the launcher end them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
