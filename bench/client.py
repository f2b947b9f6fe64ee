"""The runner's end of a worker process."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from typing import Any

from .contenders import Spec


class WorkerError(Exception):
    """A worker that crashed, hung or refused; the message is one line for the report."""


class Worker:
    """A started contender; use it as a context manager.

    Args:
        spec: What to run.
        timeout: Seconds after which a missing reply counts as hung.

    Raises:
        WorkerError: It did not load.
    """

    def __init__(self, spec: Spec, timeout: float = 900.0) -> None:
        self.spec, self._timeout = spec, timeout
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed by close()
        self.started = time.perf_counter()
        # thread counts of libraries that read them before any code of ours runs
        threads = {name: str(spec.threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pgfast.bench.worker", json.dumps(asdict(spec))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | threads | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        self._rest = b""
        try:
            self.load_seconds = float(self._receive()["load"])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Id of the process."""
        return self._process.pid

    def ask(self, **message: Any) -> dict[str, Any]:
        """Send a message and wait for the reply.

        Raises:
            WorkerError: The process ended or did not reply in time.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:  # it is gone: what it said last tells why
            raise self._ended() from None
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + self._timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self._process.kill()
                    raise WorkerError(f"no reply within {self._timeout:.0f} s: stopped")
                piece = os.read(self._process.stdout.fileno(), 1 << 20)
                if not piece:
                    raise self._ended()
                self._rest += piece
        line, self._rest = self._rest.split(b"\n", 1)
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _ended(self) -> WorkerError:
        code = self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        killed = "killed (most likely out of memory)" if code == -9 else f"ended with code {code}"
        return WorkerError(f"{killed}: {lines[-1][:300]}" if lines else killed)

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # a broken pipe of a process that is gone
                    pipe.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()
