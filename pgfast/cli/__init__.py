"""The `pgfast` command. Subcommands are imported only when they are typed."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from typing import Any, NoReturn

import click

from pgfast.errors import PgfastError

BUILT_IN = {
    "answer": "pgfast.cli.ask:answer",
    "generate": "pgfast.cli.ask:generate",
    "caption": "pgfast.cli.tasks:caption",
    "ocr": "pgfast.cli.tasks:ocr",
    "detect": "pgfast.cli.detect:detect",
    "segment": "pgfast.cli.segment:segment",
    "question": "pgfast.cli.tasks:question",
    "batch": "pgfast.batch.cli:batch",
    "inspect": "pgfast.cli.inspection:inspect",
    "doctor": "pgfast.cli.doctor:doctor",
    "serve": "pgfast.server.cli:serve",
}
ENTRY_POINTS = "pgfast.commands"
"""Group through which export, train and bench join."""
USER_ERROR = 2


class LazyGroup(click.Group):
    """Finds subcommands by name: built-in ones first, then installed entry points."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all subcommands; nothing is imported."""
        return sorted({*BUILT_IN, *(point.name for point in _entry_points())})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one subcommand."""
        if cmd_name in BUILT_IN:
            module, name = BUILT_IN[cmd_name].split(":")
            command: Any = getattr(importlib.import_module(module), name)
        else:
            # importlib.metadata takes tens of milliseconds, so built-in commands never reach it
            point = next((point for point in _entry_points() if point.name == cmd_name), None)
            command = point.load() if point else None
        return command if isinstance(command, click.Command) else None


def _entry_points() -> Any:
    from importlib.metadata import entry_points

    return entry_points(group=ENTRY_POINTS)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pgfast", message="%(prog)s %(version)s")
def cli() -> None:
    """Ask a PaliGemma model questions about pictures."""


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 fine, 1 a check failed, 2 something the user can mend, 130 interrupted."""
    from .logs import name_the_program

    name_the_program()
    try:
        result = cli.main(args, prog_name="pgfast", standalone_mode=False)
        sys.stdout.flush()
        sys.exit(result if isinstance(result, int) else 0)
    except PgfastError as error:
        fail(str(error))
    except click.ClickException as error:
        error.show()
        sys.exit(USER_ERROR)
    except (click.Abort, KeyboardInterrupt):
        print("pgfast: interrupted", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        # what was printed could not be delivered; the interpreter must not try again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:  # the reader went away (a pipe into head); click, too, exits with 1 then
            sys.exit(1)
        fail(str(error))


def printable(text: str) -> str:
    """One line without control characters: names in messages may come from a stranger's bundle."""
    return "".join(char if char.isprintable() else " " for char in " ".join(text.split()))


def fail(message: str) -> NoReturn:
    """Print one line to stderr and exit with 2."""
    print(f"pgfast: error: {printable(message)}", file=sys.stderr)
    sys.exit(USER_ERROR)
