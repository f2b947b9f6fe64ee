"""pgfast: ask a PaliGemma model questions about pictures, fast and exactly.

    import pgfast

    engine = pgfast.load("bundle")
    print(engine.answer("picture.jpg", "what is this?").text)

Importing this module loads nothing heavy: the engine comes with the first `load`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pgfast.errors import PgfastError
from pgfast.types import Answer, EncodedImage, GenerateOptions, Timings

if TYPE_CHECKING:
    from pgfast.engine import Engine, load

__version__ = "0.1.0"
__all__ = ["Answer", "EncodedImage", "Engine", "GenerateOptions", "PgfastError", "Timings", "load"]


def __getattr__(name: str) -> Any:
    if name in ("Engine", "load"):
        from pgfast import engine

        return getattr(engine, name)
    raise AttributeError(f"module 'pgfast' has no attribute {name!r}")
