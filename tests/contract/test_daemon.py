"""`python -m receiver` as a process: refusals, help, its port, its log."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from receiver import contract, settings, signing
from tests.contract.caller import KEY
from tests.services import free_port

START_SECONDS = 20


def environment(folder: Path, **changes: str) -> dict[str, str]:
    """A daemon of this test: loopback, no engine, JSON lines."""
    return {
        "PATH": os.environ["PATH"],
        "HOOK_RECEIVER_HOST": "127.0.0.1",
        "HOOK_RECEIVER_PORT": str(free_port()),
        "HOOK_RECEIVER_STATE_DIR": str(folder / "state"),
        "HMAC_SECRET_KEY": KEY.decode(),
        "DOCKER_HOST": f"unix://{folder}/no-engine.sock",
        "LOG_FORMAT": "json",
        **changes,
    }


def run(variables: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """The daemon's command, to its end."""
    command = [sys.executable, "-m", "receiver", *arguments]
    return subprocess.run(
        command, env=variables, capture_output=True, text=True, timeout=START_SECONDS, check=False
    )


@contextmanager
def serving(variables: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The daemon while it serves; ended by SIGTERM."""
    with log.open("wb") as stream:
        process = subprocess.Popen([sys.executable, "-m", "receiver"], env=variables, stderr=stream)
        try:
            wait_until_open(process, int(variables["HOOK_RECEIVER_PORT"]), log)
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(START_SECONDS)


def wait_until_open(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Return once the port takes connections; fail with the log when the process ends or is late."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    pytest.fail(f"the receiver did not start: {log.read_text()}")


def ask(port: str, method: str, path: str, headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
    """One request over a real socket."""
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=10)
    try:
        connection.request(method, path, headers=dict(headers or {}))
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_without_a_key_it_refuses_to_start(tmp_path: Path) -> None:
    """Exit code 2 and one line that says what to do."""
    ended = run(environment(tmp_path, HMAC_SECRET_KEY=""))
    assert ended.returncode == 2
    assert ended.stderr.startswith("receiver: HMAC_SECRET_KEY is not set; make a key with")
    assert ended.stderr.count("\n") == 1


def test_check_validates_and_changes_nothing(tmp_path: Path) -> None:
    """Good settings are 0, bad ones 2; no folder is made."""
    assert run(environment(tmp_path), "--check").returncode == 0
    assert run(environment(tmp_path, LOG_LEVEL="loud"), "--check").returncode == 2
    assert not (tmp_path / "state").exists()


def test_help_lists_every_variable(tmp_path: Path) -> None:
    """The documentation of the settings is the program's own."""
    text = run(environment(tmp_path), "--help").stdout
    assert [name for name in settings.VARIABLES if name not in text] == []


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    """Before anything else is touched by the second daemon."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = str(holder.getsockname()[1])
        ended = run(environment(tmp_path, HOOK_RECEIVER_PORT=port))
    assert ended.returncode == 3
    assert f"receiver: cannot listen on 127.0.0.1 port {port}: Address already in use" in ended.stderr


def test_a_certificate_that_is_none_is_named(tmp_path: Path) -> None:
    """A wrong TLS file is a setting, not a traceback."""
    files = {"HOOK_RECEIVER_TLS_CERT_FILE": __file__, "HOOK_RECEIVER_TLS_KEY_FILE": __file__}
    ended = run(environment(tmp_path, **files))
    assert ended.returncode == 2
    assert (
        "receiver: HOOK_RECEIVER_TLS_CERT_FILE and HOOK_RECEIVER_TLS_KEY_FILE cannot be used" in ended.stderr
    )


def test_it_serves_without_an_engine_and_ends_on_sigterm(tmp_path: Path) -> None:
    """A host that boots has the receiver before its engine; the log is one JSON object per line."""
    variables, log = environment(tmp_path), tmp_path / "log"
    port = variables["HOOK_RECEIVER_PORT"]
    with serving(variables, log) as process:
        status, body = ask(port, "GET", contract.HEALTH_PATH)
        assert (status, json.loads(body)["status"]) == (503, "degraded")
        path = contract.deploy_path("nobody", "status")
        assert ask(port, "GET", path)[0] == 401
        assert ask(port, "GET", path, signing.signed_headers(KEY, "GET", path))[0] == 404
        spoofed = {"X-Forwarded-For": "192.0.2.7"}
        assert ask(port, "GET", contract.METRICS_PATH, spoofed)[0] == 200  # the header is not believed
        second = run({**variables, "HOOK_RECEIVER_PORT": str(free_port())})
        assert second.returncode == 3
        assert "another receiver uses" in second.stderr
    assert process.returncode in {0, -signal.SIGTERM}
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["status"] for line in lines if line["message"] == "request"] == [503, 401, 404]
    assert any(line["message"].startswith("guardian waits") for line in lines)
    assert KEY.decode() not in log.read_text()


def test_no_prefect_comes_with_it() -> None:
    """A host without Prefect has a working daemon."""
    code = "import receiver.app, receiver.__main__, sys; sys.exit('prefect' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
