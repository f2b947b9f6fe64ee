"""pgfast: ask a PaliGemma model questions about pictures, fast and exactly.

    import pgfast

    engine = pgfast.load("bundle")
    print(engine.answer("picture.jpg", "what is this?").text)

Importing this module loads nothing heavy: the engine comes with the first `load`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pgfast.errors import PgfastError
from pgfast.types import Answer, Detection, EncodedImage, GenerateOptions, Segment, Timings

if TYPE_CHECKING:
    from pgfast.engine import Engine
    from pgfast.loading import load

__version__ = "0.1.0"
__all__ = ["Answer", "Detection", "EncodedImage", "Engine", "GenerateOptions", "PgfastError", "Segment", "Timings", "load"]


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from pgfast.engine import Engine

        return Engine
    if name == "load":
        from pgfast.loading import load

        return load
    raise AttributeError(f"module 'pgfast' has no attribute {name!r}")
