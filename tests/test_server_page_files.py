"""The page's files: how they are served, and what needs no browser."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from page_browser import Page
from page_use import needs_chromium

from pgfast.server.page import FILES

pytest_plugins = ("page_fixtures",)


@needs_chromium
def test_the_policy_stops_what_the_page_did_not_bring(page: Page, real: str) -> None:
    page.open(real)
    page.run("""(() => {
        const script = document.createElement("script");
        try { script.textContent = "window.ran = true"; } catch { window.refused = true; }
        document.body.append(script);
        const image = new Image();
        image.src = "https://example.com/pixel.png";
        document.body.append(image);
    })()""")
    page.until("window.refused")
    assert page.run("window.ran") is None
    page.run("0")
    assert any("img-src" in problem for problem in page.problems)
    assert any("TrustedScript" in problem or "trusted" in problem.lower() for problem in page.problems)
    page.problems.clear()
    page.requests = [address for address in page.requests if "example.com" not in address]


def get(address: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(address, headers={name.replace("_", "-"): value for name, value in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, {k.lower(): v for k, v in response.headers.items()}, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()


def test_every_file_is_served_once_and_safely(real: str) -> None:
    addresses = ["", "page/example.png", *(f"page/{path.name}" for path in FILES.iterdir() if path.suffix != ".html")]
    assert len(addresses) >= 8
    for name in addresses:
        status, headers, content = get(real + name)
        assert status == 200, name
        assert headers["x-content-type-options"] == "nosniff"
        policy = headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "unsafe" not in policy
        assert headers["cache-control"] == "no-cache"
        for known in (headers["etag"], f'"other", W/{headers["etag"]}', "*"):
            status, again, nothing = get(real + name, If_None_Match=known)
            assert (status, nothing, again["etag"]) == (304, b"", headers["etag"])
        status, _, same = get(real + name, If_None_Match='"other"')
        assert (status, same) == (200, content)
    assert get(real + "page/index.html")[0] == 404
    assert get(real + "page/%2e%2e/page.py")[0] == 404


@pytest.mark.parametrize("path", sorted(FILES.glob("*.js")), ids=lambda path: path.name)
def test_modules_parse(path: Path) -> None:
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    source = path.read_bytes()
    done = subprocess.run(["node", "--check", "--input-type=module"], input=source, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert all(len(line) <= 128 for line in source.decode().splitlines())


def test_events_in_pieces_of_any_size() -> None:
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    stream = 'event: piece\r\ndata: {"text":\ndata:  "ä → 🐈"}\n\n: comment\n\nevent: answer\ndata: {"n": 1}\n\n'
    stream += "event: cut\ndata: {}\n"
    script = f"""
        import {{ serverSentEvents }} from {json.dumps((FILES / "client.js").as_uri())};
        const bytes = new TextEncoder().encode({json.dumps(stream)});
        for (const size of [1, 2, 3, 7, 1000]) {{
            const parts = [];
            for (let at = 0; at < bytes.length; at += size) parts.push(bytes.slice(at, at + size));
            const found = [];
            for await (const event of serverSentEvents(ReadableStream.from(parts))) found.push(event);
            console.log(JSON.stringify(found));
        }}"""
    done = subprocess.run(["node", "--input-type=module", "-e", script], capture_output=True, text=True, check=True)
    expected = [{"event": "piece", "data": {"text": "ä → 🐈"}}, {"event": "answer", "data": {"n": 1}}]
    assert [json.loads(line) for line in done.stdout.splitlines()] == [expected] * 5
