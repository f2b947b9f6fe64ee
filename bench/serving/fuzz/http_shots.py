"""Damage below the body: bytes, lengths, chunks, headers, methods, paths."""

from __future__ import annotations

from random import Random

from ..questions import PATH, json_body, picture, question
from .shot import CHAT, PATHS, Kind, Shot, post

MANY_HEADERS = tuple(b"".join(b"X-%d: %d\r\n" % (i, i) for i in range(number)) for number in (100, 200, 2000, 20_000))


def good(rng: Random) -> bytes:
    """Return a request that is right."""
    number = rng.randrange(1000)
    return post(json_body(picture(7, number), question(number)))


def random_bytes(rng: Random) -> Shot:
    """Noise, sometimes behind a request line."""
    start = rng.choice((b"", b"GET / HTTP/1.1\r\n", b"POST /v1/answer HTTP/1.1\r\nContent-Length: 5\r\n\r\n", b"\x16\x03\x01"))
    return Shot(start + rng.randbytes(rng.randrange(1, 4096)), whole=False, end=rng.choice(("read", "half", "close")))


def truncated(rng: Random) -> Shot:
    """An upload that ends anywhere."""
    request = good(rng)
    return Shot(request[: rng.randrange(1, len(request))], whole=False, end=rng.choice(("read", "half", "close", "close")))


def flipped(rng: Random) -> Shot:
    """A right request with a few other bytes."""
    request = bytearray(good(rng))
    for _ in range(rng.randrange(1, 8)):
        request[rng.randrange(len(request))] = rng.randrange(256)
    return Shot(bytes(request), whole=False, end=rng.choice(("read", "half")))


def wrong_length(rng: Random) -> Shot:
    """A Content-Length that is not the body's."""
    body = json_body(picture(7, 1), "what color is the shape?")
    if rng.random() < 0.5:
        said = rng.randrange(len(body))
        return Shot(post(body, length=said))
    return Shot(post(body, length=len(body) + rng.randrange(1, 10**6)), whole=False, end=rng.choice(("half", "close", "read")))


def bad_length(rng: Random) -> Shot:
    """A Content-Length that is no number, too much, or said twice."""
    values = (
        b"-1",
        b"abc",
        b"1e3",
        b"0x10",
        b"9" * 30,
        b"5, 6",
        b"5\r\nContent-Length: 7",
        b"",
        b"+5",
        b"99999999999",
        b"\xb2",
    )
    head = b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %s\r\n\r\n{}   "
    return Shot(head % (PATH.encode(), rng.choice(values)), whole=False, end=rng.choice(("read", "half")))


def chunked(rng: Random) -> Shot:
    """Chunks that are damaged, endless or beside a Content-Length."""
    chunks = (
        b"zz\r\n{}\r\n0\r\n\r\n",
        b"-5\r\n{}\r\n0\r\n\r\n",
        b"ffffffffffffffff\r\n{}",
        b"fffffffffffffffffffff\r\n{}",
        b"2\r\n{}XX\r\n0\r\n\r\n",
        b"2;" + b"x" * 70_000 + b"\r\n{}\r\n0\r\n\r\n",
        b"1\r\n{\r\n" * 2000,
        b"2\r\n{}\r\n0\r\nTrailer: a\r\n\r\n",
        b"2\n{}\n0\n\n",
        b"",
    )
    extra = rng.choice((b"", b"Content-Length: 2\r\n"))
    coding = rng.choice(
        (b"chunked", b"chunked, chunked", b"identity", b"gzip, chunked", b"xchunked", b"chunked\r\nTransfer-Encoding: x")
    )
    head = b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n%sTransfer-Encoding: %s\r\n\r\n"
    return Shot(head % (PATH.encode(), extra, coding) + rng.choice(chunks), whole=False, end=rng.choice(("read", "half")))


def header_flood(rng: Random) -> Shot:
    """More, longer or stranger headers than anyone needs."""
    flood = rng.choice(
        (
            *MANY_HEADERS,
            b"X: " + b"a" * rng.randrange(10_000, 2_000_000) + b"\r\n",
            b"a" * rng.randrange(10_000, 500_000) + b": x\r\n",
            b"no colon here\r\n",
            b": empty name\r\n",
            b"X\x00Y: nul\r\n",
            b"X: a\r\n folded\r\n",
            b"X: \xff\xfe\x80\r\n",
            b"Cookie: " + b"a=b; " * 20_000 + b"\r\n",
            b"Host: b\r\nHost: c\r\n",
            b"Authorization: Bearer \xff\xff\r\n",
            b"Accept-Encoding: " + b"gzip;q=1, " * 500 + b"\r\n",
            b"Content-Encoding: gzip\r\n",
            b"Origin: https://evil.example\r\n",
            b"Expect: 100-continue\r\n",
            b"Expect: 200-ok\r\n",
            b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13\r\n",
            b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n",
            b"Range: bytes=0-18446744073709551615\r\n",
            b"X-Forwarded-For: 127.0.0.1\r\nX-Forwarded-Proto: \x01\r\n",
        )
    )
    body = json_body(picture(7, 2), "what color is the shape?")
    return Shot(post(body, headers=flood), whole=False, end=rng.choice(("read", "half")))


def request_line(rng: Random) -> Shot:
    """A first line that is none."""
    lines = (
        b"POST /v1/answer",
        b"POST /v1/answer HTTP/9.9",
        b"POST /v1/answer HTTP/1.0",
        b"POST /v1/answer http/1.1",
        b"POST  /v1/answer  HTTP/1.1",
        b"post /v1/answer HTTP/1.1",
        b"POST * HTTP/1.1",
        b"OPTIONS * HTTP/1.1",
        b"CONNECT 127.0.0.1:22 HTTP/1.1",
        b"POST http://127.0.0.1/v1/answer HTTP/1.1",
        b"GET //evil.example/%2f.. HTTP/1.1",
        b"GET /" + b"a" * rng.randrange(1000, 300_000) + b" HTTP/1.1",
        b"PRI * HTTP/2.0\r\n\r\nSM",
        b"GET /\xff\xfe HTTP/1.1",
        b"GET / HTTP/1.1 extra",
        b"\r\n\r\n\r\nGET / HTTP/1.1",
        b"\x00\x00",
        b"A" * rng.randrange(1, 100_000),
        b"GET /?%s HTTP/1.1" % (b"a=b&" * rng.randrange(1, 15_000)),
    )
    return Shot(rng.choice(lines) + b"\r\nHost: a\r\n\r\n", whole=False, end=rng.choice(("read", "half")))


def method(rng: Random) -> Shot:
    """A method that the path does not have."""
    word = rng.choice(
        (b"GET", b"PUT", b"PATCH", b"DELETE", b"HEAD", b"OPTIONS", b"TRACE", b"PROPFIND", b"MKCOL", b"FOO", b"POST")
    )
    path = rng.choice(PATHS).encode()
    return Shot(b"%s %s HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}" % (word, path), end="half")


def path(rng: Random) -> Shot:
    """Paths that lead out of the house."""
    paths = (
        b"/../../../../etc/passwd",
        b"/%2e%2e/%2e%2e/etc/passwd",
        b"/..%2f..%2fetc/passwd",
        b"/..%5c..%5cetc/passwd",
        b"/page/../../pyproject.toml",
        b"/static/%00",
        b"/%00",
        b"/%ff%fe",
        b"/%",
        b"/%zz",
        b"/%c0%ae%c0%ae/",
        b"/v1/answer/",
        b"/v1//answer",
        b"/v1/answer;x=1",
        b"/v1/answer?stream=%ff",
        b"/v1/answer?stream=1&stream=0&stream=maybe",
        b"/v1/answer?stream=" + b"1" * 5000,
        b"/v1/models/" + b"%2f" * 200,
        b"/V1/ANSWER",
        b"/.git/config",
        b"/openapi.json?" + b"&" * 3000,
        b"/metrics?name[]=" + b"x" * 2000,
        b"/#fragment",
        b"/\xe2\x80\xae",
    )
    line = b"%s %s HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    return Shot(line % (rng.choice((b"GET", b"POST")), rng.choice(paths)), whole=False, end="half")


def pipelined(rng: Random) -> Shot:
    """Many requests in one breath; the client reads only the first answer, or none."""
    many = rng.randrange(2, 40)
    return Shot(good(rng) * many + rng.choice((b"", b"\x00garbage")), end=rng.choice(("read", "close")))


def content_type(rng: Random) -> Shot:
    """A body of one kind under the name of another."""
    names = (
        None,
        "",
        "text/plain",
        "application/json; charset=utf-7",
        "application/json; charset=\x01",
        "application/json;" + ";" * 1000,
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=" + "x" * 5000,
        'multipart/form-data; boundary="',
        "multipart/mixed; boundary=a",
        "image/png",
        "/",
        "application/json, text/html",
        "APPLICATION/JSON",
        "application/*",
    )
    bodies = (
        json_body(picture(7, 3), "what shape is present?"),
        b"image=x&question=y&" * 100,
        b"--a\r\n\r\n--a--",
        picture(7, 3),
        b"",
    )
    return Shot(post(rng.choice(bodies), rng.choice(names), rng.choice((PATH, CHAT))))


KINDS: dict[str, Kind] = {
    "random bytes": random_bytes,
    "truncated upload": truncated,
    "flipped bytes": flipped,
    "wrong Content-Length": wrong_length,
    "bad Content-Length": bad_length,
    "chunked garbage": chunked,
    "header flood": header_flood,
    "request line": request_line,
    "wrong method": method,
    "path tricks": path,
    "pipelined": pipelined,
    "content type": content_type,
}
