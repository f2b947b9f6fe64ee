"""Every setting of the server; `pgfast serve` has a flag for each that people change."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field

from pgfast.errors import InputError

ORIGIN = re.compile(r"https?://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Limits and doors of a server.

    Raises:
        InputError: A value is out of range; the message names it.
    """

    max_queue: int = 256
    """Requests that may be in the house beyond those that the decoder has slots for; others get 429 at once."""
    timeout: float = 60.0
    """Seconds for a request, from its headers to the last byte of its response."""
    max_body: int = 20 * 2**20
    """Bytes of a request's body."""
    max_bodies: int = 512 * 2**20
    """Bytes of all bodies that are in memory at a time; more are refused as if the queue were full."""
    max_pixels: int = 50_000_000
    """Width times height of a picture, looked at before it is decoded."""
    decoders: int = min(4, os.cpu_count() or 1)
    """Pictures that are decoded at a time: each may need 12 bytes per pixel for a moment."""
    cache_pictures: int = 256 * 2**20
    """Bytes of encoded pictures that are kept in case they come again; 0: none."""
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """One of them must be sent to use the API; empty: everybody may."""
    cors_origins: tuple[str, ...] = ()
    """Other sites whose pages may use the API from a browser."""
    allow_url_hosts: tuple[str, ...] = ()
    """Hosts from which pictures may be fetched by URL."""
    drain_timeout: float = 30.0
    """Seconds that requests in flight have to finish when the server is asked to stop."""
    max_connections: int = 900
    """Open connections; further ones are told 503. Below the usual limit of 1024 open files."""
    max_head: int = 32 * 2**10
    """Bytes of a request's head (and, in chunked bodies, of what is not content)."""
    head_timeout: float = 10.0
    """Seconds for a request's head to arrive."""
    keep_alive: float = 15.0
    """Seconds that a connection may be idle between two requests."""

    def __post_init__(self) -> None:
        for name, low in (
            ("max_queue", 0),
            ("max_body", 1024),
            ("max_bodies", self.max_body),
            ("max_pixels", 1),
            ("decoders", 1),
            ("cache_pictures", 0),
            ("max_connections", 1),
            ("max_head", 1024),
        ):
            if not getattr(self, name) >= low:
                raise InputError(f"{name} is {getattr(self, name)}: at least {low} is needed")
        for name in ("timeout", "drain_timeout", "head_timeout", "keep_alive"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0 and (value or name == "drain_timeout")):
                raise InputError(f"{name} is {value}: seconds are needed")
        for origin in self.cors_origins:
            if not ORIGIN.fullmatch(origin):
                raise InputError(f"{origin!r} is not an origin: scheme://host or scheme://host:port, in small letters")
