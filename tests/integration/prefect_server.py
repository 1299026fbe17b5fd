"""A whole Prefect server as people run one, with the services that watch events, workers and automations."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefect.events.worker import EventsWorker
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_HOME,
    PREFECT_SERVER_ANALYTICS_ENABLED,
    temporary_settings,
)

from deployments import lab_prefect
from tests.services import free_port

READY_SECONDS = 60
# A worker is missed after one heartbeat of a second, not after three of half a minute.
QUICK = {
    "PREFECT_SERVER_SERVICES_FOREMAN_LOOP_SECONDS": "1",
    "PREFECT_SERVER_SERVICES_FOREMAN_INACTIVITY_HEARTBEAT_MULTIPLE": "1",
}


@contextmanager
def running_server(folder: Path) -> Iterator[str]:
    """The API's URL; within the block it is that of this process too."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    environment = {
        **os.environ,
        **lab_prefect.settings(url, folder),
        **lab_prefect.server_settings(),
        **QUICK,
    }
    lab_prefect.place_database(sys.executable, folder, environment)
    command = lab_prefect.server_command(sys.executable, "127.0.0.1", port)
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
    try:
        _wait(url, server, folder / "server.log")
        with _as_ours(url, folder):
            yield url
    finally:
        server.terminate()
        server.wait(30)


@contextmanager
def _as_ours(url: str, folder: Path) -> Iterator[None]:
    """Prefect's queue of events would go on to send to the server before this one."""
    settings = {PREFECT_API_URL: url, PREFECT_HOME: folder, PREFECT_SERVER_ANALYTICS_ENABLED: False}
    EventsWorker.drain_all(timeout=10)
    with temporary_settings(settings):
        yield
        EventsWorker.drain_all(timeout=10)


def _wait(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=3):  # noqa: S310 - our own http URL
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise AssertionError(f"no Prefect server: {log.read_text()[-2000:]}")
