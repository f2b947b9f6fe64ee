"""`pgfast serve` as a process: its start, its end, what it cannot do."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from server_tools import ASK, PICTURE, WAIT

from pgfast.cli import main

COMMAND = [sys.executable, "-m", "pgfast", "serve"]


@contextlib.contextmanager
def started(*options: str) -> Iterator[tuple[subprocess.Popen[str], http.client.HTTPConnection]]:
    process = subprocess.Popen([*COMMAND, "--port", "0", *options], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        lines = []
        while not (lines and "serving on" in lines[-1]):
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        match = re.fullmatch(r"pgfast: serving on http://127\.0\.0\.1:(\d+)\n", lines[-1])
        assert match is not None
        assert len(lines) == 2  # which model, which address
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", int(match[1]), timeout=WAIT)) as connection:
            yield process, connection
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_and_ends_with_0(number: int) -> None:
    with started() as (process, connection):
        for _ in range(2):
            connection.request("POST", "/v1/answer", json.dumps(ASK), {"Content-Type": "application/json"})
            response = connection.getresponse()
            assert response.status == 200
            assert json.loads(response.read())["text"] == "blue"
        process.send_signal(number)
        out, err = process.communicate(timeout=WAIT)
        assert (process.returncode, out, err) == (0, "", "")


def test_an_upload_in_flight_finishes_after_sigterm() -> None:
    with started("--max-queue", "5", "--max-body-mb", "1", "--cache-pictures", "0", "--decoders", "1") as (process, connection):
        body = json.dumps(ASK).encode()
        connection.putrequest("POST", "/v1/answer")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body[:100])
        other = http.client.HTTPConnection("127.0.0.1", connection.port, timeout=WAIT)
        while True:  # the first one is in
            other.request("GET", "/metrics")
            if b"pgfast_requests_in_house 1.0" in other.getresponse().read():
                break
        process.send_signal(signal.SIGTERM)
        while True:
            other.request("GET", "/readyz")
            response = other.getresponse()
            response.read()
            if response.status == 503:
                break
        other.close()
        connection.send(body[100:])
        response = connection.getresponse()
        assert json.loads(response.read())["text"] == "blue"
        process.communicate(timeout=WAIT)
        assert process.returncode == 0


def fails(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """Run the command in this process; it must end at once with one line."""
    with pytest.raises(SystemExit) as ended:
        main(["serve", *options])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    return err


def test_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in fails(capsys, "--port", str(port))


def test_an_unknown_host(capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot listen on host.invalid, port 8000: " in fails(capsys, "--host", "host.invalid")


def test_key_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.write_text("# nothing\n")
    assert f"the key file {empty} has no keys" in fails(capsys, "--api-key-file", str(empty))
    assert "cannot be read: No such file or directory" in fails(capsys, "--api-key-file", str(tmp_path / "missing"))
    assert "cannot be read: Is a directory" in fails(capsys, "--api-key-file", str(tmp_path))


def test_bad_options_and_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "'*' is not an origin" in fails(capsys, "--cors-origin", "*")
    assert "decoders is 0: at least 1 is needed" in fails(capsys, "--decoders", "0")
    assert "--max-body-mb is nan: a number of MB is needed" in fails(capsys, "--max-body-mb", "nan")
    assert "--cache-pictures is inf: a number of MB is needed" in fails(capsys, "--cache-pictures", "inf")
    assert "timeout is -1.0: seconds are needed" in fails(capsys, "--timeout", "-1")
    assert str(tmp_path) in fails(capsys, "-m", str(tmp_path), "--port", "0")


@pytest.mark.parametrize("module", ["starlette", "python_multipart"])
def test_a_missing_extra(module: str) -> None:
    code = f"import sys\nsys.modules[{module!r}] = None\nfrom pgfast.cli import main\nmain(['serve'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"pgfast: error: {module} is not installed: pip install 'pgfast[serve]'\n"


def test_keys_origins_and_a_log_of_one_line(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sesame\n")
    options = ("--api-key-file", str(keys), "--cors-origin", "https://a.example", "--timeout", "5", "--drain-timeout", "1")
    with started(*options) as (process, connection):
        headers = {"Content-Type": "application/json", "Origin": "https://a.example"}
        connection.request("POST", "/v1/answer", json.dumps(ASK), headers)
        assert connection.getresponse().status == 401
        connection.close()
        connection.request("POST", "/v1/answer", json.dumps(ASK), headers | {"Authorization": "Bearer sesame"})
        response = connection.getresponse()
        assert response.headers["access-control-allow-origin"] == "https://a.example"
        assert json.loads(response.read())["text"] == "blue"
        connection.close()
        with socket.create_connection(("127.0.0.1", connection.port), timeout=WAIT) as sock:
            sock.sendall(b"nonsense \x1b[31m\r\n\r\n")
            assert sock.recv(65536).startswith(b"HTTP/1.1 400")
        process.terminate()
        _, err = process.communicate(timeout=WAIT)
    assert process.returncode == 0
    assert len(err.splitlines()) == 1
    assert err.isascii()
    assert "WARNING: Invalid HTTP request received." in err
    assert "sesame" not in err
    assert PICTURE[:4] not in err.encode()


def test_a_traceback_cannot_pass_for_other_lines_of_the_log() -> None:
    from pgfast.cli.logs import OneLine

    try:
        raise ValueError("x\n2026-01-01 pgfast ERROR: forged \x1b[31m")
    except ValueError:
        record = logging.LogRecord("pgfast", logging.ERROR, "", 0, "a\nbug", None, sys.exc_info())
    first, *others = OneLine("%(asctime)s pgfast %(levelname)s: %(message)s").format(record).splitlines()
    assert first.endswith("pgfast ERROR: a bug")
    assert any("forged" in line for line in others)
    assert all(line.startswith("    ") and "\x1b" not in line for line in others)
