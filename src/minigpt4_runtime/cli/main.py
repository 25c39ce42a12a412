"""The command `minigpt4`: the list of commands, and the reporting of errors.

Owns   the exit status: 0 all went well, 1 an error or a picture that failed, 2 wrong usage,
       3 a graph whose .om is still to be made, 130 Ctrl-C.
Takes  the command line. Commands import heavy modules when they run, so that --help is quick.
Never  lets a traceback out, unless --debug asks for it.
"""

import os
import sys
import traceback
import warnings
from typing import Annotated, Any

import typer
import typer.core

from minigpt4_runtime.cli.bench import bench
from minigpt4_runtime.cli.chat import chat
from minigpt4_runtime.cli.convert import convert
from minigpt4_runtime.cli.demo import demo
from minigpt4_runtime.cli.describe import describe
from minigpt4_runtime.cli.describe_on_ray import complete_ray
from minigpt4_runtime.cli.doctor import doctor
from minigpt4_runtime.cli.evaluate import evaluate
from minigpt4_runtime.cli.explain import explain
from minigpt4_runtime.cli.export import export
from minigpt4_runtime.cli.fetch import fetch
from minigpt4_runtime.cli.inspect import inspect
from minigpt4_runtime.cli.merge import merge
from minigpt4_runtime.cli.models import models
from minigpt4_runtime.cli.options import flag
from minigpt4_runtime.cli.quantise import quantise
from minigpt4_runtime.cli.serve import serve
from minigpt4_runtime.cli.terminal import note, open_what_is_closed, print_anything, report
from minigpt4_runtime.cli.tune import tune
from minigpt4_runtime.cli.web import web
from minigpt4_runtime.errors import MiniGPT4Error


class _Commands(typer.core.TyperGroup):
    """The commands, with the words for a wrong value as they read best."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command. Typer begins some messages with the name of an exception."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")
            raise


# Plain help: drawing boxes would double the time of `minigpt4 --help`.
app = typer.Typer(
    name="minigpt4",
    cls=_Commands,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    describe, chat, serve, web, fetch, models, convert, quantise, tune, merge, inspect, demo,
    explain, doctor,
):  # fmt: skip
    app.command()(command)
app.command("quantize", hidden=True)(quantise)
app.add_typer(evaluate, name="evaluate")
app.add_typer(bench, name="bench")
app.add_typer(export)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        from minigpt4_runtime import __version__

        print(f"minigpt4-runtime {__version__}")
        raise typer.Exit


@app.callback()
def minigpt4(
    *,
    # `run` reads it from the command line; it is declared here for the help.
    debug: Annotated[bool, flag("Show the traceback of an error.", "--debug")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Run MiniGPT-4: describe and discuss pictures.

    Start with `minigpt4 describe PICTURE`: without --model the bundled demo model answers.
    """


def run() -> None:
    """Run the command line and end the process with its exit status."""
    debug = _move_debug_forward(sys.argv)
    complete_ray(sys.argv)
    open_what_is_closed()
    print_anything()
    if not (debug or sys.warnoptions):
        warnings.simplefilter("ignore")
    try:
        try:
            app(prog_name="minigpt4")
        except SystemExit:
            if sys.stdout:  # None where it is closed. Python would find out too late.
                sys.stdout.flush()
            raise
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        _give_up_stdout()  # Its reader has ended.
        sys.exit(1)
    except Exception as error:  # noqa: BLE001 — The last place that can report it.
        if debug:
            traceback.print_exception(error)
        if _comes_from_ctrl_c(error):
            sys.exit(130)
        _translate(error)
        _give_up_stdout()
        sys.exit(1)


def _move_debug_forward(arguments: list[str]) -> bool:
    """Move --debug, which may stand anywhere before a `--`, to the front."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    if "--debug" not in arguments[1:end]:
        return False
    arguments.remove("--debug")
    arguments.insert(1, "--debug")
    return True


def _comes_from_ctrl_c(error: BaseException | None) -> bool:
    """Ctrl-C while a package is imported: Python and torch wrap it in errors of their own."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _translate(error: Exception) -> None:
    if isinstance(error, MiniGPT4Error | OSError):
        report(error)
    else:
        note(
            f"error: {type(error).__name__}: {error}\n"
            "This is a bug in minigpt4, not in what you asked. The same command with --debug shows "
            "where it is; please report that."
        )


def _give_up_stdout() -> None:
    """Flush stdout, or drop it, so that a full disk causes no second error at Python's end."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    run()
