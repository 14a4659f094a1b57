"""The command ``moe-prefill``: its subcommands, and one place where errors become messages and exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ..config import EngineConfig
from ..errors import MoePrefillError, RowError
from ..jobs import merge_shards
from ..tasks.taskfile import CONFIGS
from .bench import bench
from .calibrate import calibrate
from .commands import run_task
from .fields import keyword, make_command, parameters_of
from .flags import ENGINE_FLAGS, JOB_FLAGS, PLAN_ENGINE_FLAGS, PLAN_FLAGS, TASK_FLAGS, RunOptions, typed_flag
from .plan import PlanOptions, plan
from .report import show_metrics
from .run_batch import run_batch
from .serve import api_key, serve
from .simulate import simulate_command

EXIT_BUG = 70  # an error that is not the user's
EXIT_INTERRUPTED = 130
EXIT_PIPE = 141

app = typer.Typer(
    name="moe-prefill",
    help="Label, choose, select, rank and score tables with Mixture-of-Experts language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

_DOCS = {
    "classify": "One of the labels for every row, with the probability of each.",
    "choose": "One of a row's options, which are named A, B, ... in the prompt.",
    "select": "All candidates that apply to a row.",
    "rank": "The candidates of a row from best to worst, with scores.",
    "score": "Log-probabilities of a continuation, a document, or given token ids.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; every error ends here, with one message."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = app(args=arguments, prog_name="moe-prefill", standalone_mode=False)
    except MoePrefillError as error:
        return _told(error, arguments)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit would fail again
        return EXIT_PIPE
    except Exception as error:
        return _other(error)
    if code == EXIT_INTERRUPTED:  # typer turns Ctrl-C into this code
        _say("interrupted. Finished windows of an output file are kept: go on with --resume", "yellow")
    return code if isinstance(code, int) else 0


def _told(error: MoePrefillError, arguments: Sequence[str]) -> int:
    if "--debug" in arguments:
        traceback.print_exc()
    code, message = f"{error.code}: " if isinstance(error, RowError) else "", str(error)
    if error.setting is not None and (flag := typed_flag(error.setting, arguments)):
        message = flag + message.removeprefix(error.setting)
    _say(f"error: {code}{message}", "red")
    return error.exit_code


def _other(error: Exception) -> int:
    """Typer's own errors know how to show themselves; anything else is a bug of ours."""
    if hasattr(error, "show") and isinstance(code := getattr(error, "exit_code", None), int):
        error.show()
        return code
    if type(error).__name__ == "Abort":
        return EXIT_INTERRUPTED
    traceback.print_exc()
    _say(
        "this is a bug in moe-prefill. Please report the lines above with the command and the output of "
        "`moe-prefill --version`; finished windows are kept, and --resume goes on",
        "red",
    )
    return EXIT_BUG


def _say(message: str, style: str) -> None:
    Console(stderr=True, highlight=False).print(Text(message, style=style), soft_wrap=True)


def _add_task(kind: str) -> None:
    source = keyword(
        "source", Annotated[str, typer.Argument(metavar="INPUT", help="A file, a glob, a directory of shards, or -.")]
    )
    model = parameters_of(EngineConfig, ENGINE_FLAGS)
    config = CONFIGS[kind]
    parameters = [source, *parameters_of(RunOptions, JOB_FLAGS), *parameters_of(config, TASK_FLAGS), *model]

    def run(source: str, **values: Any) -> None:
        run_task(kind, source, values)

    app.command(kind)(make_command(parameters, run, _DOCS[kind]))


for _kind in CONFIGS:
    _add_task(_kind)


app.command("calibrate")(calibrate)


app.command("bench")(bench)


_plan_parameters = [*parameters_of(EngineConfig, PLAN_ENGINE_FLAGS), *parameters_of(PlanOptions, PLAN_FLAGS)]
app.command("plan")(make_command(_plan_parameters, plan, str(plan.__doc__)))


app.command("simulate")(simulate_command)


app.command("serve")(serve)


app.command("run-batch")(run_batch)


app.command("api-key")(api_key)


@app.command("merge")
def merge(
    shards: Annotated[list[Path], typer.Argument(help="The outputs of --shard 1/N to N/N, in any order.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The whole output; same format as the shards.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Put the outputs of all shards of a job together."""
    merged = merge_shards(shards, output, overwrite=overwrite)
    console = Console(highlight=False)
    if merged.metrics:
        show_metrics(merged.metrics, console)
    counts = merged.counts
    console.print(f"{counts.rows:,} rows, {counts.num_errors:,} with errors -> {output}", markup=False, soft_wrap=True)


@app.callback(invoke_without_command=True)
def _root(show_version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    if show_version:
        try:
            print(f"moe-prefill {version('moe-prefill')}")
        except PackageNotFoundError:
            print("moe-prefill, not installed")
        raise typer.Exit
