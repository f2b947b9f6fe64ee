"""A server as a child process, and what Linux tells about it."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pgfast.errors import PgfastError

from .client import Address

TICKS = os.sysconf("SC_CLK_TCK")
TROUBLE = re.compile(
    r"traceback|exception|unhandled|never retrieved|never awaited|\berror\b|\bcritical\b|\bfatal\b|segmentation|core dumped",
    re.IGNORECASE,
)
"""What must not be in a server's log while it is sent rubbish."""

QUIET = 1.0
"""Seconds without a change after which nothing more is expected to be closed."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process and its children hold."""

    memory: int
    """Bytes resident."""
    files: int
    """Open file descriptors."""
    threads: int
    cpu: float
    """Seconds of processor time so far."""


class Server:
    """A started server; use it as a context manager.

    Args:
        command: What starts it; `--port N` is put behind it.
        log: File for what it prints.
        patience: Seconds until it must be ready.

    Raises:
        PgfastError: It did not become ready.
    """

    def __init__(self, command: Sequence[str], log: Path, patience: float = 120.0) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address: Address = free.getsockname()
        self.log = log
        with log.open("wb") as out:
            # a group of its own: Ctrl-C ends the measurement, which then ends the server
            words = [*command, "--port", str(self.address[1])]
            self._process = subprocess.Popen(words, stdout=out, stderr=out, process_group=0)
        start = time.perf_counter()
        try:
            while self.status("/readyz") != 200:
                if not self.alive:
                    raise PgfastError(f"the server ended with code {self._process.returncode}: {self.last_words()}")
                if time.perf_counter() - start > patience:
                    raise PgfastError(f"the server was not ready within {patience:.0f} s: {self.last_words()}")
                time.sleep(0.05)
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.perf_counter() - start

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return self._process.poll() is None

    def ended(self, seconds: float) -> int | None:
        """What it ended with; None if it is still there after so many seconds."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def close(self) -> float:
        """Ask it to end, kill it if it does not within 30 s; returns the seconds it took."""
        start = time.perf_counter()
        if self.alive:
            self._process.terminate()
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        return time.perf_counter() - start

    def call(self, method: str, path: str, body: bytes | None = None, timeout: float = 30.0) -> tuple[int, bytes]:
        """Send one request on a new connection; status 0: no answer."""
        connection = http.client.HTTPConnection(*self.address, timeout=timeout)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"} if body is not None else {})
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException):
            return 0, b""
        finally:
            connection.close()

    def status(self, path: str) -> int:
        """Status of a GET."""
        return self.call("GET", path, timeout=5.0)[0]

    def usage(self) -> Usage:
        """What it holds now; all 0 once it has ended."""
        parts = [_usage(pid) for pid in _family(self._process.pid)]
        return Usage(*(sum(numbers) for numbers in zip(*parts, strict=True))) if parts else Usage(0, 0, 0, 0.0)

    def settled(self, seconds: float = 10.0) -> Usage:
        """What it holds when its connections are closed: waits until files and threads stay as they are for `QUIET` seconds."""
        end, now = time.perf_counter() + seconds, self.usage()
        quiet = time.perf_counter()
        while time.perf_counter() < min(end, quiet + QUIET):
            time.sleep(QUIET / 10)
            before, now = now, self.usage()
            if (before.files, before.threads) != (now.files, now.threads):
                quiet = time.perf_counter()
        return now

    def trouble(self) -> list[str]:
        """Lines of its log that should not be there."""
        return [line for line in self.log.read_text(errors="replace").splitlines() if TROUBLE.search(line)]

    def last_words(self) -> str:
        """The last line of its log."""
        lines = self.log.read_text(errors="replace").split("\n")
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "it printed nothing")


@contextlib.contextmanager
def watching(look: Callable[[], int], every: float = 1.0) -> Iterator[list[tuple[float, int]]]:
    """Collect (`time.perf_counter`, `look()`) from another thread, at once and then every so many seconds."""
    samples: list[tuple[float, int]] = []
    stop = threading.Event()

    def run() -> None:
        number, start = 0, time.perf_counter()
        while True:
            samples.append((time.perf_counter(), look()))
            number += 1
            if stop.wait(max(0.0, start + number * every - time.perf_counter())):
                return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def _family(pid: int) -> list[int]:
    """The process, its children and theirs."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for path in Path(f"/proc/{parent}/task").glob("*/children"):
                found += [int(word) for word in path.read_text().split()]
    return found


def _usage(pid: int) -> tuple[int, int, int, float]:
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        # the name, in brackets, may hold spaces
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        files = len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0, 0, 0, 0.0
    cpu = (int(fields[11]) + int(fields[12])) / TICKS
    return int(status.get("VmRSS", "0").split()[0]) * 1024, files, int(status.get("Threads", "0")), cpu
