"""Opens bundles whose folders come on stdin, asks each a question, and says on stdout what came of it; run as a program."""

from __future__ import annotations

import faulthandler
import json
import resource
import sys
from pathlib import Path

import numpy as np

import pgfast

MEMORY = 6 * 2**30
"""Address space; a bundle that makes the runtime ask for more gets an error instead of the machine's memory."""


def outcome(folder: Path) -> dict[str, str]:
    picture = np.full((48, 48, 3), 255, np.uint8)
    picture[10:30, 10:30] = (0, 0, 255)
    try:
        with pgfast.load(folder, provider="cpu", threads=1) as engine:
            answer = engine.answer(picture, "what color is the shape?", options=pgfast.GenerateOptions(max_new_tokens=3))
    except Exception as error:  # noqa: BLE001 - which one it is, is the result
        return {"kind": type(error).__name__, "message": str(error), "pgfast": str(isinstance(error, pgfast.PgfastError))}
    return {"kind": "answer", "message": answer.text, "pgfast": "True"}


if __name__ == "__main__":
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        print(json.dumps(outcome(Path(json.loads(line)))), flush=True)
