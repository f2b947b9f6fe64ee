"""A manifest: a `BundleError`, or one that survives being written and read again.

Bytes that begin with a brace are the file itself; others are decisions about what to change in a good one.
"""

from __future__ import annotations

import copy
import json
from typing import Any

if __name__ == "__main__":
    import atheris  # noqa: F401 - `instrumented` looks for it

from fuzz.target import Choices, fuzz, instrumented, one_line

with instrumented():
    from pgfast.errors import BundleError
    from pgfast.loading import demo_bundle
    from pgfast.manifest import Manifest

GOOD = (demo_bundle() / "pgfast.json").read_text()
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 64, 255, 2**23, 2**24, 2**63, 10**400, 0.5, -0.5, 1e-300, 1e300, float("nan"),
    "", "..", "../x", "decoder.onnx", "en", "{text}", "{language}", "float32[B]", "cuda", "int8", "standard", "\ud800",
    [], [0], ["en"], [[[]]], {}, {"x": 1},
)  # fmt: skip


def changed(choices: Choices) -> str:
    """Return the good manifest with a few values replaced, removed, moved or added."""
    raw = json.loads(GOOD)
    for _ in range(8):
        if not choices.left:
            break
        parent: Any = raw
        key: Any = choices.one(list(raw) or [""])
        while isinstance(child := parent.get(key) if isinstance(parent, dict) else parent[key], dict | list) and child:
            if choices.number(4) == 0:
                break
            parent, key = child, choices.one(list(child) if isinstance(child, dict) else range(len(child)))
        action = choices.number(5)
        if action == 0:
            parent[key] = copy.deepcopy(choices.one(VALUES))
        elif action == 1:
            parent[key] = choices.text()
        elif action == 2:
            parent[key] = choices.number(2**32) / choices.one((1, 2**16)) - choices.one((0, 2**31))
        elif action == 3 and (isinstance(parent, list) or key in parent):
            del parent[key]
        elif isinstance(parent, dict):
            parent[choices.text()] = copy.deepcopy(choices.one(VALUES))
    return json.dumps(raw)


def check(data: bytes) -> None:
    """Read a manifest."""
    text = data.decode("utf-8", "surrogateescape") if data.startswith(b"{") else changed(Choices(data))
    try:
        manifest = Manifest.from_json(text)
    except BundleError as error:
        one_line(error)
        return
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert 0 < manifest.cache_length <= manifest.dimensions.max_position_embeddings
    assert all("/" not in name and name not in (".", "..") for name in manifest.files)


if __name__ == "__main__":
    fuzz(check)
