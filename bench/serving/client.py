"""The cheapest client that measures honestly: one thread, raw sockets, requests made beforehand, answers parsed afterwards."""

from __future__ import annotations

import gc
import selectors
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from pgfast.errors import PgfastError

BROKEN = 0
"""Status of a request whose connection ended before the whole response was there."""
IDLE_SECONDS = 2.0
"""A connection that nobody used for longer is not used again."""
Address = tuple[str, int]


@dataclass(slots=True)
class Exchange:
    """A request and what came back; times are `time.perf_counter`."""

    number: int
    """Which of the requests."""
    due: float
    """When it should have been sent; latency counts from here, so that a client that is late does not hide it."""
    sent: float = 0.0
    ended: float = 0.0
    status: int = BROKEN
    head: bytes = b""
    body: bytes = b""

    @property
    def latency(self) -> float:
        """Seconds."""
        return self.ended - self.due


@dataclass(slots=True)
class Load:
    """What a loop saw."""

    start: float
    seconds: float
    """For which requests were sent; what was under way then was waited for."""
    exchanges: list[Exchange] = field(default_factory=list)
    dropped: int = 0
    """Requests that were due when every connection was taken."""
    cpu: float = 0.0
    """Seconds of processor time of the client."""

    def rate(self, status: int = 200) -> float:
        """Responses of this status per second, up to the end of sending."""
        return sum(e.status == status and e.ended <= self.start + self.seconds for e in self.exchanges) / self.seconds


class _Connection:
    """A keep-alive connection with one request at a time."""

    __slots__ = ("exchange", "idle_since", "received", "sock", "unsent", "wanted")

    def __init__(self, address: Address) -> None:
        self.sock = socket.create_connection(address, timeout=10)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setblocking(False)
        self.exchange: Exchange | None = None
        self.idle_since = time.perf_counter()
        self.received = bytearray()
        self.wanted = 0
        self.unsent = memoryview(b"")

    def send(self, data: bytes, exchange: Exchange) -> None:
        exchange.sent = time.perf_counter()
        self.exchange, self.wanted, self.unsent = exchange, 0, memoryview(data)
        self.received.clear()
        self.flush()

    def flush(self) -> None:
        """Send what the socket takes now; an error shows when reading."""
        try:
            self.unsent = self.unsent[self.sock.send(self.unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self.unsent = memoryview(b"")

    def receive(self) -> tuple[bool, bool]:
        """Take in what has come; returns (the exchange is over, the connection can be used again)."""
        try:
            data = self.sock.recv(65536)
        except BlockingIOError:
            return False, True
        except OSError:
            data = b""
        if not data:
            return True, False
        self.received += data
        if not self.wanted:
            end = self.received.find(b"\r\n\r\n")
            if end < 0:
                return False, True
            self.wanted = end + 4 + _content_length(self.received[:end])
        if len(self.received) < self.wanted:
            return False, True
        exchange, received = self.exchange, self.received
        assert exchange is not None
        end = received.find(b"\r\n\r\n")
        exchange.status = int(received[9:12])
        exchange.head, exchange.body = bytes(received[:end]), bytes(received[end + 4 : self.wanted])
        return True, b"connection: close" not in exchange.head.lower()


def _content_length(head: bytearray) -> int:
    at = head.lower().find(b"\r\ncontent-length:")
    if at < 0:  # ours always has one; this shows as a broken answer, not as a crash of the client
        return 0
    return int(bytes(head[at + 17 :]).split(b"\r\n", 1)[0])


class _Pool:
    """Connections, those that wait and those that are free."""

    def __init__(self, address: Address, load: Load) -> None:
        self.address, self.load = address, load
        self.selector = selectors.DefaultSelector()
        self.free: list[_Connection] = []
        self.busy = 0

    def open(self) -> _Connection:
        try:
            connection = _Connection(self.address)
        except OSError as error:
            raise PgfastError(f"the server at {self.address[0]}:{self.address[1]} takes no connection: {error}") from error
        self.selector.register(connection.sock, selectors.EVENT_READ, connection)
        return connection

    def send(self, data: bytes, exchange: Exchange) -> None:
        """On a free connection, or a new one."""
        self.busy += 1
        self.load.exchanges.append(exchange)
        connection = self.free.pop() if self.free else self.open()
        if time.perf_counter() - connection.idle_since > IDLE_SECONDS:  # the server may be about to close it
            self.drop(connection)
            connection = self.open()
        connection.send(data, exchange)
        if connection.unsent:
            self.selector.modify(connection.sock, selectors.EVENT_READ | selectors.EVENT_WRITE, connection)

    def wait(self, seconds: float) -> None:
        """Take in what comes within so many seconds."""
        for key, events in self.selector.select(max(0.0, seconds)):
            connection: _Connection = key.data
            if events & selectors.EVENT_WRITE:
                connection.flush()
                if not connection.unsent:
                    self.selector.modify(connection.sock, selectors.EVENT_READ, connection)
            if not events & selectors.EVENT_READ:
                continue
            over, usable = connection.receive()
            if over and connection.exchange is not None:
                connection.exchange.ended = time.perf_counter()
                connection.idle_since, connection.exchange = connection.exchange.ended, None
                self.busy -= 1
                if usable:
                    self.free.append(connection)
            if not usable:
                if connection in self.free:  # the server closed it while nobody used it
                    self.free.remove(connection)
                self.drop(connection)

    def drop(self, connection: _Connection) -> None:
        """Close one."""
        self.selector.unregister(connection.sock)
        connection.sock.close()

    def close(self) -> None:
        """Close all; what is under way counts as broken."""
        now = time.perf_counter()
        for key in list(self.selector.get_map().values()):
            if key.data.exchange is not None:
                key.data.exchange.ended = now
            key.data.sock.close()
        self.selector.close()


@contextmanager
def _measured(load: Load) -> Iterator[None]:
    """No collector between two requests, and the client's own processor time."""
    collecting = gc.isenabled()
    gc.disable()
    before = time.thread_time()
    try:
        yield
    finally:
        load.cpu = time.thread_time() - before
        if collecting:
            gc.enable()


def closed_loop(address: Address, requests: Sequence[bytes], clients: int, seconds: float, patience: float = 30.0) -> Load:
    """Let so many clients ask one question after another, from the first request on, around and around.

    Args:
        address: Of the server.
        requests: Whole HTTP requests.
        clients: Connections.
        seconds: For which they ask.
        patience: Seconds to wait for what is under way then; what is missing after it counts as broken.

    Raises:
        PgfastError: A connection was refused.
    """
    start = time.perf_counter()
    load = Load(start, seconds)
    pool = _Pool(address, load)
    number = 0
    try:
        pool.free = [pool.open() for _ in range(clients)]
        load.start = start = time.perf_counter()
        with _measured(load):
            while (now := time.perf_counter()) < start + seconds:
                while pool.busy < clients:
                    pool.send(requests[number % len(requests)], Exchange(number, now))
                    number += 1
                pool.wait(start + seconds - now)
            _finish(pool, patience)
    finally:
        pool.close()
    return load


def open_loop(
    address: Address,
    requests: Sequence[bytes],
    rate: float,
    seconds: float,
    *,
    seed: int = 0,
    most: int = 2000,
    patience: float = 30.0,
) -> Load:
    """Send requests at random moments (Poisson), however long the answers take.

    Args:
        address: Of the server.
        requests: Whole HTTP requests, taken around and around.
        rate: Mean requests per second.
        seconds: For which they are sent.
        seed: Of the moments.
        most: Connections; a request that finds none is dropped and counted.
        patience: As in `closed_loop`.

    Raises:
        PgfastError: A connection was refused.
    """
    gaps = np.random.default_rng([seed, 1]).exponential(1 / rate, int(rate * seconds * 1.2) + 100)
    start = time.perf_counter()
    load = Load(start, seconds)
    dues: list[float] = (start + np.cumsum(gaps)).tolist()
    dues = dues[: int(np.searchsorted(dues, start + seconds))]
    pool = _Pool(address, load)
    try:
        with _measured(load):
            number = 0
            while number < len(dues):
                now = time.perf_counter()
                while number < len(dues) and dues[number] <= now:
                    if pool.busy < most:
                        pool.send(requests[number % len(requests)], Exchange(number, dues[number]))
                    else:
                        load.dropped += 1
                    number += 1
                if number < len(dues):
                    pool.wait(dues[number] - time.perf_counter())
            _finish(pool, patience)
    finally:
        pool.close()
    return load


def _finish(pool: _Pool, patience: float) -> None:
    end = time.perf_counter() + patience
    while pool.busy and (now := time.perf_counter()) < end:
        pool.wait(end - now)
