"""A headless Chromium driven over the DevTools protocol: real clicks, keys, drops and clipboard, no page function called."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)
PATIENCE = 20.0
"""Seconds after which something that has not happened never will."""

KEYS = {"Tab": ("Tab", 9, ""), "Enter": ("Enter", 13, "\r"), "Escape": ("Escape", 27, ""), "Space": ("Space", 32, " ")}


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[ClientConnection]:
    """Start a browser with a new profile; gives a connection to its DevTools."""
    assert CHROMIUM is not None
    log = profile.with_suffix(".log")
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"], stderr=errors, start_new_session=True
        )
    try:
        port_file = profile / "DevToolsActivePort"
        end = time.monotonic() + PATIENCE
        while not (port_file.exists() and port_file.read_text().count("\n") == 1):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.02)  # the file is the only sign that Chromium gives
        port, path = port_file.read_text().split("\n")
        with connect(f"ws://127.0.0.1:{port}{path}", max_size=None, proxy=None) as connection:
            yield connection
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Page:
    """A tab of its own browser context: no cookies, storage or history of others.

    Attributes:
        requests: Addresses that the page asked for.
        problems: Console errors, exceptions, violations of the content security policy.
    """

    _ids = itertools.count(1)  # all tabs share one connection, one after the other

    def __init__(self, browser: ClientConnection) -> None:
        self._socket = browser
        self._session: str | None = None
        self._handlers: dict[str, Callable[[dict[str, Any]], None]] = {}
        self._chosen: list[dict[str, Any]] = []
        self.requests: list[str] = []
        self.problems: list[str] = []
        self._context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=self._context)["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            self.call(f"{domain}.enable")
        self._handlers = {
            "Network.requestWillBeSent": lambda event: self.requests.append(event["request"]["url"]),
            "Log.entryAdded": lambda event: self._log(event["entry"]["level"], event["entry"]["text"]),
            "Runtime.exceptionThrown": lambda event: self.problems.append(json.dumps(event["exceptionDetails"])),
            "Runtime.consoleAPICalled": lambda event: self._log(event["type"], json.dumps(event["args"])),
            "Page.fileChooserOpened": self._chosen.append,
        }
        self.call("Page.setInterceptFileChooserDialog", enabled=True)

    def _log(self, level: str, text: str) -> None:
        if level in ("error", "warning", "assert"):
            self.problems.append(text)

    def close(self) -> None:
        self._session = None
        self.call("Target.disposeBrowserContext", browserContextId=self._context)

    # ---- the protocol

    def send(self, method: str, **params: Any) -> int:
        """Send a command without waiting for its result."""
        id = next(self._ids)
        message = {"id": id, "method": method, "params": params}
        self._socket.send(json.dumps(message | ({"sessionId": self._session} if self._session else {})))
        return id

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its result; events on the way are handled."""
        id = self.send(method, **params)
        while True:
            message = json.loads(self._socket.recv(timeout=PATIENCE + 5))
            if message.get("id") == id:
                assert "error" not in message, f"{method}: {message['error']}"
                result: dict[str, Any] = message["result"]
                return result
            handler = self._handlers.get(message.get("method", ""))
            if handler and message.get("sessionId") == self._session:
                handler(message["params"])

    def run(self, script: str) -> Any:
        """Evaluate an expression in the page; a promise is waited for."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in result, f"{script}: {result['exceptionDetails']}"
        return result["result"].get("value")

    def until(self, condition: str) -> Any:
        """Wait until an expression is truthy; returns its value."""
        limit = int(PATIENCE * 1000)
        script = f"""new Promise((resolve, reject) => {{
            const end = performance.now() + {limit};
            const look = () => {{
                const value = ({condition});
                if (value) resolve(value);
                else if (performance.now() > end) reject(new Error("never true; " + document.querySelector("main").innerText));
                else setTimeout(look, 10);
            }};
            look();
        }})"""
        return self.run(script)

    # ---- what a user does

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        self.until("document.readyState === 'complete' && document.querySelector('#ask')")

    def click(self, selector: str) -> None:
        """Click into the middle of an element that can be seen, and that nothing covers."""
        found = self.run(f"""(() => {{
            const node = document.querySelector({selector!r});
            node.scrollIntoView({{block: "center"}});
            const {{left, top, width, height}} = node.getBoundingClientRect();
            const [x, y] = [left + width / 2, top + height / 2];
            const hit = document.elementFromPoint(x, y);
            return {{x, y, hit: node.contains(hit) || (hit?.contains(node) ?? false), what: hit?.outerHTML.slice(0, 200)}};
        }})()""")
        assert found["hit"], f"{selector} is covered by {found['what']}"
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=found["x"], y=found["y"], button="left", clickCount=1)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, commands: tuple[str, ...] = (), modifiers: int = 0) -> None:
        """Press a key; `commands` are the editing commands that it stands for, for example `paste`."""
        code, number, text = KEYS.get(key, (f"Key{key.upper()}", ord(key.upper()[0]), ""))
        same = {"key": " " if key == "Space" else key, "code": code, "windowsVirtualKeyCode": number, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, commands=list(commands), **same)
        self.call("Input.dispatchKeyEvent", type="keyUp", **same)

    def choose_file(self, path: Path, opener: Callable[[], None]) -> None:
        """Do what opens the file dialog, and choose a file in it."""
        self._chosen.clear()
        opener()
        end = time.monotonic() + PATIENCE
        while not self._chosen:
            assert time.monotonic() < end, "no file dialog"
            self.run("0")  # events come along with any answer
        self.call("DOM.setFileInputFiles", files=[str(path)], backendNodeId=self._chosen[0]["backendNodeId"])

    def drop_file(self, path: Path) -> None:
        for kind in ("dragEnter", "dragOver", "drop"):
            data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
            self.call("Input.dispatchDragEvent", type=kind, x=100, y=200, data=data)

    # ---- what a user has

    def emulate(self, *, width: int, height: int, phone: bool = False, dark: bool = False, still: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2 if phone else 1, mobile=phone
        )
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone, maxTouchPoints=1)
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"},
        ]
        self.call("Emulation.setEmulatedMedia", features=features)

    def screenshot(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
