"""Pictures by URL, from hosts that the operator named and from nowhere else.

A server that fetches what strangers name is a way into its own network. So: exactly the named hosts, resolved once, every
address public, and the connection goes to the very address that was checked; redirects pass the same checks. A client is not
told a closed port from a private address; the log says.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import logging
import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin

import pgfast
from pgfast.errors import ImageError, InputError

logger = logging.getLogger(__name__)

MAX_REDIRECTS = 3
MAX_URL = 8192
"""Characters; signed URLs of object stores have two or three thousand."""
RESOLVING = 8
"""Look-ups at a time: the system's resolver cannot be interrupted, and its threads must not pile up."""
PORTS = {"http": 80, "https": 443}
_NAME = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST = re.compile(rf"{_NAME}(?:\.{_NAME})*", re.ASCII)
_URL = re.compile(
    r"(https?)://([a-z0-9._-]+)(?::([0-9]{1,5}))?(?=[/?#]|\Z)(/[^?#]*)?(\?[^#]*)?(?:#.*)?", re.ASCII | re.IGNORECASE
)
_UNREACHABLE = "the picture's URL cannot be fetched: its host does not answer as it should"
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_TUNNELS = [ipaddress.IPv6Network(net) for net in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")]
"""Teredo, other protocols' own addresses, 6to4, documentation: an IPv4 address may hide in them, no server lives there."""
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet.

    Private, loopback, link-local (so also the metadata services of clouds), multicast, reserved and tunnelled addresses do
    not. Behind NAT64's well-known prefix the IPv4 address inside decides.
    """
    ip = ipaddress.ip_address(address)
    if ip.version == 6:
        if ip not in _NAT64:
            # ipaddress knows what is private, and knows more in newer Pythons: the rest is said here
            return ip in _GLOBAL_UNICAST and ip.is_global and not any(ip in net for net in _TUNNELS)
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


def look_up(host: str) -> list[str]:
    """All addresses of a host, in the system's order."""
    return list(dict.fromkeys(str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)))


@dataclass(frozen=True, slots=True)
class _Location:
    """A checked URL."""

    scheme: str
    host: str
    port: int
    target: str
    """Path and query."""

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.authority}{self.target}"

    @property
    def authority(self) -> str:
        """As in the Host header: without the scheme's own port."""
        return self.host if self.port == PORTS[self.scheme] else f"{self.host}:{self.port}"


class RemotePictures:
    """Fetches pictures by URL.

    Args:
        hosts: What may be fetched from: `HOST`, on the usual ports, or `HOST:PORT`. Names with other letters than ASCII are
            written as in the DNS (`xn--...`). None: nothing may be fetched.
        max_bytes: Largest picture file.
        timeout: Seconds for everything: looking up, connecting, redirects, reading.
        resolve: Host name to IP addresses.
        is_allowed: Whether an IP address may be connected to.
        tls: How certificates are verified; None: by the system's authorities.

    Raises:
        InputError: A host is not written in one of those ways.
    """

    def __init__(
        self,
        hosts: Iterable[str],
        *,
        max_bytes: int,
        timeout: float,
        resolve: Callable[[str], Sequence[str]] = look_up,
        is_allowed: Callable[[str], bool] = is_public,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._hosts = {pair for host in hosts for pair in host_and_ports(host)}
        self._max_bytes, self._timeout = max_bytes, timeout
        self._resolve, self._is_allowed = resolve, is_allowed
        self._tls = tls or (ssl.create_default_context() if self._hosts else None)
        self._resolving = threading.Semaphore(RESOLVING)

    def fetch(self, url: str) -> bytes:
        """Return the file behind a URL; blocks for at most `timeout` seconds, so call it in a thread.

        Raises:
            ImageError: The URL is not allowed, or the file is too large, too slow or not there; the message is for the client.
        """
        ends = time.monotonic() + self._timeout
        location = self._check(url)
        try:
            for _ in range(MAX_REDIRECTS + 1):
                found = self._get(location, ends)
                if isinstance(found, bytes):
                    return found
                if location.scheme == "https" and found.scheme != "https":
                    raise ImageError("the picture's URL is redirected from https to http")
                location = found
        except TimeoutError as error:
            logger.info("picture of %s: no answer in %g s", location.authority, self._timeout)
            raise ImageError(f"the picture's URL was not fetched within {self._timeout:g} seconds") from error
        except ImageError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: http.client, of nonsense in its way
            logger.info("picture of %s: %.200r", location.authority, str(error))  # it may quote what the host sent
            raise ImageError(_UNREACHABLE) from error
        raise ImageError(f"the picture's URL is redirected more than {MAX_REDIRECTS} times")

    def _check(self, url: str) -> _Location:
        """Take a URL apart by a grammar without room for tricks: ASCII, no user, no escapes in the host."""
        if not self._hosts:
            raise ImageError("pictures are not fetched from URLs here: send the picture itself, as base64")
        match = _URL.fullmatch(url) if len(url) <= MAX_URL and _is_visible(url) else None
        if match is None:
            raise ImageError("the picture's URL is not one that is fetched here: http(s)://host/path, escaped to ASCII")
        scheme, host, port = match[1].lower(), match[2].lower().removesuffix("."), match[3]
        number = int(port) if port else PORTS[scheme]
        # a host on the scheme's other usual port is nothing that anybody asked for
        if (host, number) not in self._hosts or (number in PORTS.values() and number != PORTS[scheme]):
            raise ImageError("pictures are not fetched from that host: send the picture itself, as base64")
        return _Location(scheme, host, number, (match[4] or "/") + (match[5] or ""))

    def _get(self, location: _Location, ends: float) -> bytes | _Location:
        """One request: the file, or where it is instead."""
        plain = self._connect(location, ends)
        try:
            if location.scheme == "https":
                assert self._tls is not None
                plain.settimeout(_left(ends))
                plain = self._tls.wrap_socket(plain, server_hostname=location.host)
            connection = http.client.HTTPConnection(location.host, location.port)
            connection.sock = _Wire(plain, ends, 2 * self._max_bytes + 2**20)
            headers = {"Host": location.authority, "User-Agent": f"pgfast/{pgfast.__version__}", "Accept": "image/*"}
            connection.request("GET", location.target, headers=headers | {"Connection": "close"})
            with connection.getresponse() as response:
                if response.status in (301, 302, 303, 307, 308):
                    return self._redirected(location, response.headers.get("Location", ""))
                return self._read(response)
        finally:
            plain.close()

    def _connect(self, location: _Location, ends: float) -> socket.socket:
        """Connect to an address that was checked: never to a name, which could mean another address by now."""
        addresses = self._addresses(location.host, ends)
        refused = [address for address in addresses if not self._is_allowed(address)]
        if refused or not addresses:
            raise OSError(f"its address {refused[0]} is not public" if refused else "it has no address")
        for place, address in enumerate(addresses):
            sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
            try:
                sock.settimeout(_left(ends) / (len(addresses) - place))
                sock.connect((address, location.port))
                return sock
            except OSError as error:
                sock.close()
                failure = error
        raise failure

    def _addresses(self, host: str, ends: float) -> Sequence[str]:
        if not self._resolving.acquire(timeout=_left(ends)):
            raise TimeoutError
        found: queue.SimpleQueue[Sequence[str] | OSError] = queue.SimpleQueue()

        def resolve() -> None:
            try:
                found.put(self._resolve(host))
            except OSError as error:
                found.put(error)
            finally:
                self._resolving.release()

        # not in a pool: its threads would keep the process from ending
        threading.Thread(target=resolve, daemon=True, name="pgfast-look-up").start()
        try:
            result = found.get(timeout=_left(ends))
        except queue.Empty as error:
            raise TimeoutError from error
        if isinstance(result, OSError):
            raise result
        return result

    def _redirected(self, location: _Location, target: str) -> _Location:
        # before they are joined: urllib drops some of what it does not like
        if not target or not _is_visible(target):
            raise ImageError("the picture's URL is redirected to something that is no URL")
        return self._check(urljoin(location.url, target))

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        if response.status != 200:
            raise ImageError(f"the picture's URL was answered with status {response.status}")
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise ImageError("the picture's URL was answered with a compressed file")
        announced, content = response.length, bytearray()
        while len(content) <= self._max_bytes and (announced is None or announced <= self._max_bytes):
            piece = response.read(min(2**16, self._max_bytes + 1 - len(content)))
            if not piece:
                if announced is not None and len(content) < announced:
                    raise http.client.IncompleteRead(b"", announced - len(content))
                return bytes(content)
            content += piece
        raise ImageError(f"the picture behind the URL is larger than {self._max_bytes:,} bytes")


class _Wire(io.RawIOBase):
    """What http.client needs of a socket, with one deadline and one limit over all reads.

    Each read alone could be put off for ever, and not everything that comes is content: headers, the borders of chunks.
    """

    def __init__(self, sock: socket.socket, ends: float, most: int) -> None:
        self._sock, self._ends, self._room = sock, ends, most

    def sendall(self, data: Any) -> None:
        self._sock.settimeout(_left(self._ends))
        self._sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self, 2**16)

    def close(self) -> None:
        """The socket is closed by who opened it; http.client closes its own while the answer is still being read."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(_left(self._ends))
        count = self._sock.recv_into(buffer)
        self._room -= count
        if self._room < 0:
            raise OSError("it sends too much")
        return count


def _left(ends: float) -> float:
    left = ends - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _is_visible(text: str) -> bool:
    """ASCII without blanks, control characters, and the backslash, which some take for a slash."""
    return all("!" <= char <= "~" and char != "\\" for char in text)


def host_and_ports(word: str) -> list[tuple[str, int]]:
    """Read `HOST` or `HOST:PORT` into the pairs it allows.

    Raises:
        InputError: It is something else.
    """
    host, colon, port = word.lower().partition(":")
    host = host.removesuffix(".")
    good = bool(_HOST.fullmatch(host)) and len(host) <= 253
    if good and re.fullmatch(r"[0-9]+|0x[0-9a-f]*", host.rpartition(".")[2]):  # an address, perhaps in an odd notation
        try:
            ipaddress.IPv4Address(host)
        except ValueError:
            good = False
    if not good or (colon and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536)):
        raise InputError(f"{word!r} is not a host to fetch pictures from: HOST or HOST:PORT, without https:// and path")
    return [(host, int(port))] if colon else [(host, number) for number in PORTS.values()]
