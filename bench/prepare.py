"""Everything that a run at full size needs, made once: checkpoint, bundles, and the stock ONNX export of the peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pgfast.errors import MissingDependencyError

from .synth import synthesize


def prepare(model: str, work: Path, precisions: Sequence[str], say: Callable[[str], None]) -> tuple[Path, list[Path], Path]:
    """Make what is missing in a folder.

    Args:
        model: A name of `synth.MODELS`; its weights are random, which speed does not mind.
        work: Folder to fill; what is there already is kept.
        precisions: Of the bundles.
        say: Called with a line of progress.

    Returns:
        Checkpoint, bundles, stock export.

    Raises:
        InputError: The model is unknown.
        ExportError: Something cannot be written.
        MissingDependencyError: The export extra is not installed.
    """
    try:
        from pgfast.export.build import export
        from pgfast.export.plan import ExportOptions
        from pgfast.export.transformersjs import export_transformersjs
    except ImportError as error:
        raise MissingDependencyError(error.name or "onnxscript", "export") from error
    folder = work / model
    checkpoint, stock = folder / "checkpoint", folder / "stock"
    bundles = {precision: folder / precision for precision in precisions}
    if not (checkpoint / "tokenizer.json").is_file():  # the last file that is written
        say(f"making {checkpoint}")
        synthesize(model, checkpoint)
    for precision, out in bundles.items():
        if not out.is_dir():
            say(f"exporting {out}")
            export(str(checkpoint), out, ExportOptions(precision))
    if not stock.is_dir():
        say(f"exporting {stock}")
        export_transformersjs(str(checkpoint), stock, ExportOptions("fp32"))
    return checkpoint, list(bundles.values()), stock
