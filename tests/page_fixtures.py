"""Fixtures of the page's tests, a plugin of pytest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from page_browser import Page, chromium
from page_server import Fake, serving, serving_real
from page_use import MAX_BODY
from websockets.sync.client import ClientConnection

from pgfast.engine import Engine
from pgfast.server.config import ServerConfig


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClientConnection]:
    with chromium(tmp_path_factory.mktemp("chromium") / "profile") as connection:
        yield connection


@pytest.fixture(scope="module")
def real(demo: Engine) -> Iterator[str]:
    """The server as `pgfast serve` runs it, with the demo model."""
    with serving_real(demo, ServerConfig()) as address:
        yield address


@pytest.fixture(scope="module")
def fake() -> Fake:
    """Answers that the test gives; a test leaves no request behind."""
    return Fake(ServerConfig(max_body=MAX_BODY))


@pytest.fixture(scope="module")
def fake_address(fake: Fake) -> Iterator[str]:
    with serving(fake.app, fake.config) as address:
        yield address


@pytest.fixture
def page(browser: ClientConnection) -> Iterator[Page]:
    """A tab; afterwards nothing may have gone wrong in it, and nothing gone to another host."""
    page = Page(browser)
    page.emulate(width=1280, height=800)
    yield page
    page.close()
    hosts = {"/".join(address.split("/")[:3]) for address in page.requests if not address.startswith(("data:", "blob:"))}
    assert all(host.startswith("http://127.0.0.1:") for host in hosts)
    assert len(hosts) == 1
    assert page.problems == []
