"""A host of pictures that answers as a test wants it to, and `RemotePictures` that may reach it."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Sequence

from conftest import TESTS

from pgfast.server.remote_pictures import RemotePictures

HOST = "pictures.example"
PICTURE = (TESTS.parent / "pgfast" / "demo" / "blue_circle.png").read_bytes()
Reply = Callable[[socket.socket], None]
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def say(*parts: bytes) -> Reply:
    """Send these and close."""

    def reply(sock: socket.socket) -> None:
        for part in parts:
            sock.sendall(part)

    return reply


def status(line: str, *headers: str, body: bytes = b"") -> Reply:
    head = "".join(f"{header}\r\n" for header in (f"HTTP/1.1 {line}", *headers))
    return say(head.encode() + b"\r\n" + body)


def whole(body: bytes, *headers: str) -> Reply:
    return status("200 OK", f"Content-Length: {len(body)}", *headers, body=body)


def moved(target: str, code: str = "302 Found") -> Reply:
    return status(code, f"Location: {target}", "Content-Length: 0")


def endless(head: bytes, part: bytes) -> Reply:
    def reply(sock: socket.socket) -> None:
        sock.sendall(head)
        while True:  # until the client has had enough
            sock.sendall(part)

    return reply


class Server:
    """Answers every path with bytes of our choice, and keeps what it was asked."""

    def __init__(self, address: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> None:
        self.replies: dict[str, Reply] = {"/picture.png": whole(PICTURE)}
        self.asked: list[str] = []
        self._tls = tls
        self._sock = socket.create_server((address, 0))
        self.port = self._sock.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._sock.accept()
                self._threads.append(threading.Thread(target=self._answer, args=(sock,)))
                self._threads[-1].start()

    def _answer(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError), sock:
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_side=True)
            with sock, sock.makefile("rb") as file:
                lines = iter(lambda: file.readline().decode(), "\r\n")
                request = "".join(lines)
                self.asked.append(request)
                self.replies[request.split()[1]](sock)
                sock.shutdown(socket.SHUT_WR)
                file.read()  # until the client closes: closing first could take back what it has not read

    def close(self) -> None:
        self._sock.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._sock.close()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()


def make(
    *hosts: str, addresses: Sequence[str] = ("127.0.0.1",), timeout: float = 5, max_bytes: int = 100_000
) -> RemotePictures:
    """Every name means these addresses, and 127.0.0.1 alone counts as public."""
    return RemotePictures(
        hosts,
        max_bytes=max_bytes,
        timeout=timeout,
        resolve=lambda host: addresses,
        is_allowed=lambda address: address == "127.0.0.1",
    )
