"""`optimum-cli export pgfast`: found by optimum in its registration folder, where this file is installed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

if TYPE_CHECKING:
    from argparse import ArgumentParser

_HELP = "Export a PaliGemma checkpoint to a pgfast bundle."


class PgfastExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    """A thin cover over `pgfast export`, with optimum's words."""

    COMMAND = CommandInfo(name="pgfast", help=_HELP)

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("-m", "--model", required=True, help="Hub id or local folder.")
        parser.add_argument("--precision", default="fp32", help="fp32, fp16, bf16, int8 or int4.")
        parser.add_argument("--target", default="cpu", help="cpu, cuda or tensorrt.")
        parser.add_argument("--verify", action="store_true", help="Compare with transformers.")
        parser.add_argument("output", type=Path, help="Folder to create.")

    def run(self) -> Any:
        """Export; errors of the user's making are one line and exit code 2, as with `pgfast export`."""
        from pgfast.cli import main

        given = self.args
        words = ["export", given.model, str(given.output), "--precision", given.precision, "--target", given.target]
        sys.stdout.flush()
        main([*words, "--verify"] if given.verify else words)


REGISTER_COMMANDS = [(PgfastExportCommand, ExportCommand)]
