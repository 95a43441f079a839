"""The command's frame: its subcommands, its version, and how failures become four lines and an exit code."""

from __future__ import annotations

import errno
import io
import os
import shlex
import signal
import sys
from types import FrameType
from typing import Annotated, NoReturn

import typer

from .. import __version__
from . import calibrate, check, coefficients, demo, diff, evaluate, extract_lora, init, listing, merge, plan, profile
from .terminal import fail, listening_terminal

app = typer.Typer(
    name="sensmerge",
    help="Merge fine-tuned language models with coefficients measured from data (Sens-Merging, arXiv 2502.12420).",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)
app.command("calibrate")(calibrate.calibrate)
app.command("profile")(profile.profile)
app.command("coefficients")(coefficients.coefficients)
app.command("init")(init.init)
app.command("plan")(plan.plan)
app.command("merge")(merge.merge)
app.command("check")(check.check)
app.command("diff")(diff.diff)
app.command("evaluate")(evaluate.evaluate)
app.command("extract-lora")(extract_lora.extract_lora)
app.command("list")(listing.listing)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sensmerge {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Options of the command itself."""


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived: unwind, so that partial work is cleaned up, and exit with 128 + the signal's number.

    Not KeyboardInterrupt, which the argument parser would turn into an exit of its own.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.exit_code = 128 + number


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    # A second signal must not interrupt the cleaning up after the first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Stopped(number)


def _hold_standard_streams() -> None:
    """Open what the shell has closed, and let no character stop an output.

    A closed stream would give its number to the next file that is opened: to weights, into which messages would then be written.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _check_current_folder() -> None:
    try:
        os.getcwd()  # noqa: PTH109  # what all relative paths ask
    except OSError as error:
        fail(
            f"the current folder cannot be found any more\n  where: {os.environ.get('PWD', '.')}\n  why:   {error}\n"
            "  fix:   cd ~, then run the command with paths that begin with /",
            2,
        )


def main() -> None:
    """Run the command line and exit: 0 done, 130/143 interrupted, else the error's own code (see sensmerge.errors)."""
    from ..errors import SensmergeError

    _hold_standard_streams()
    _check_current_folder()
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    try:
        with listening_terminal():
            returned = app(standalone_mode=False)
    except SensmergeError as error:
        _fail_for_too_many_files(error)
        fail(str(error), error.exit_code)
    except Stopped as stopped:
        fail(
            f"stopped by {signal.Signals(stopped.number).name}\n  where: {' '.join(sys.argv[:2])}\n"
            "  why:   no output was left half done, and what was measured and merged so far is kept\n"
            f"  fix:   the same command goes on from here: {shlex.join(['sensmerge', *sys.argv[1:]])}",
            stopped.exit_code,
        )
    except MemoryError as error:
        fail(
            f"there is not enough memory\n  where: {' '.join(sys.argv[:2])}\n  why:   {error or 'an allocation failed'}\n"
            "  fix:   close other programs, or merge with fewer threads: --jobs 1",
            6,
        )
    except BrokenPipeError:
        # The reader of our output has gone (`sensmerge … | head`): not a failure worth a word.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        _fail_for_too_many_files(error)
        _fail_usage_or_bug(error)
    sys.exit(returned if isinstance(returned, int) else 0)


def _fail_for_too_many_files(error: Exception) -> None:
    """Name the limit, whatever was to be opened when it was reached; returns if that is not what happened."""
    causes = [each.__cause__ for each in (error, *getattr(error, "errors", ()))]
    for each in (error, *causes):
        if isinstance(each, OSError) and each.errno in (errno.EMFILE, errno.ENFILE):
            fail(
                f"too many files are open at once\n  where: {' '.join(sys.argv[:2])}\n"
                f"  why:   {each}; every file of every model stays open while it is merged\n"
                "  fix:   ulimit -n 4096, then run the same command again; or write fewer, larger files: --shard-size 5GB",
                6,
            )


def _fail_usage_or_bug(error: Exception) -> NoReturn:
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.format_message(), file=sys.stderr)  # type: ignore[attr-defined]
        sys.exit(2)
    if hasattr(error, "format_message") and hasattr(error, "ctx"):
        context = error.ctx
        command = context.command_path if context is not None else "sensmerge"
        fail(
            f"{error.format_message()}\n  where: {command}\n  why:   the command line cannot be understood\n"
            f"  fix:   {command} --help",
            2,
        )
    import traceback

    traceback.print_exc()
    fail(
        f"this is a bug in sensmerge: {error!r}\n  where: the traceback above\n  why:   no input should cause it\n"
        "  fix:   please report it with the command, the recipe and the traceback",
        1,
    )
