"""A contender in a process of its own: `python -m pgfast.bench.worker SPEC`, JSON lines in and out.

Its start, its memory and its end are its own. Whatever libraries print goes to stderr; the answers alone go to stdout.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, TextIO

PR_SET_PDEATHSIG = 1


def memory() -> dict[str, int]:
    """Bytes of this process: peak resident, and now, split into anonymous and file-backed pages (Linux; else empty)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {}
    names = {"VmHWM": "peak", "RssAnon": "anonymous", "RssFile": "file_backed"}
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[key].split()[0]) * 1024 for key, name in names.items() if key in fields}


def serve(spec_text: str, requests: TextIO, replies: TextIO) -> None:
    """Load the contender, then answer requests until stdin ends."""

    def reply(**content: Any) -> None:
        replies.write(json.dumps(content) + "\n")
        replies.flush()

    start = time.perf_counter()
    from .contenders import Spec
    from .contenders.registry import make

    contender = make(Spec(**json.loads(spec_text)))
    reply(load=time.perf_counter() - start)
    from .workloads import read_message

    for line in requests:
        asked = json.loads(line)
        request = read_message(asked["request"])
        if asked["do"] == "probe":
            probe = contender.probe(request.pictures[0], request.prompts[0], request.new_tokens)
            reply(**dataclasses.asdict(probe))
        else:
            outcome = contender.answer(request)
            reply(**dataclasses.asdict(outcome), memory=memory() | {"device": contender.device_bytes()})


def be_expendable() -> None:
    """End with the parent, and be the first to go when memory runs out (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        Path("/proc/self/oom_score_adj").write_text("1000")


def main() -> None:
    """Keep stdout for the protocol and end with the parent."""
    be_expendable()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.argv[1], sys.stdin, replies)


if __name__ == "__main__":
    main()
