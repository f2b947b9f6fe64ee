"""results.json and serving.json: read, with the checks that both need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pgfast.errors import InputError


def read_result_file(path: Path, command: str, version: int | str) -> dict[str, Any]:
    """Read what a benchmark wrote.

    Args:
        path: The file.
        command: What writes it, for example `pgfast bench run`.
        version: Its `format` today.

    Raises:
        InputError: It is not one, or of another version.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a result file of '{command}': {error}") from error
    if not isinstance(data, dict) or data.get("format") != version:
        raise InputError(f"{path} is not a result file of '{command}' of this version (format {version}): run it again")
    return data
