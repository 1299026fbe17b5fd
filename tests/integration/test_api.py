"""`python -m deployments.api` as a process, beside a real Prefect server; its queries on both databases."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from deployments import lab_prefect
from deployments.api_queries import Cursor, WorkflowFilter, ping, read_page
from flows.deploy import deploy_container
from tasks.records import NewWorkflow, Records, WorkflowState
from tests.services import free_port

START_SECONDS = 60
STOP_SECONDS = 30
API = ("-m", "deployments.api")
NOW = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)
BODY = {"container_name": "web", "remote_host": "host-b"}


@contextmanager
def process(command: list[str], variables: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process of this test, ended by SIGTERM at the latest when the test ends."""
    with log.open("wb") as stream:
        started = subprocess.Popen(command, env=dict(variables), stdout=stream, stderr=stream)
        try:
            yield started
        finally:
            started.send_signal(signal.SIGTERM)  # nothing happens to one that has ended
            started.wait(STOP_SECONDS)


def answers(url: str) -> bool:
    """True when the address answers at all."""
    try:
        httpx.get(url, timeout=5)
    except httpx.TransportError:
        return False
    return True


def wait_for(reached: Callable[[], bool], running: subprocess.Popen[bytes], log: Path) -> None:
    """Return when `reached` is true; fail with the log when the process ends or is late."""
    deadline = time.monotonic() + START_SECONDS
    while not reached():
        if running.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"the process did not start: {log.read_text()}")
        time.sleep(0.05)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """What a control host sets, with everything in this test's folder."""
    url = f"http://127.0.0.1:{free_port()}/api"
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "GANTRY_HOME": str(tmp_path / "gantry"),
        "DOCKER_HOST": f"unix://{tmp_path}/no-engine.sock",
        "LOG_FORMAT": "json",
        **lab_prefect.settings(url, tmp_path / "prefect"),
    }


@pytest.fixture
async def prefect_server(environment: dict[str, str], tmp_path: Path) -> AsyncIterator[None]:
    """A Prefect server that knows `deploy-container/default`."""
    url, home, log = environment["PREFECT_API_URL"], tmp_path / "prefect", tmp_path / "prefect.log"
    lab_prefect.place_database(sys.executable, home, os.environ)
    port = int(httpx.URL(url).port or 0)
    command = lab_prefect.server_command(sys.executable, "127.0.0.1", port)
    with process(command, environment | lab_prefect.server_settings(), log) as server:
        await asyncio.to_thread(wait_for, lambda: answers(f"{url}/health"), server, log)
        with temporary_settings({PREFECT_API_URL: url, PREFECT_HOME: home}):
            await (await deploy_container.ato_deployment(name="default")).aapply()
            yield


def run(environment: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command to its end."""
    return subprocess.run(
        [sys.executable, *API, *arguments],
        env=dict(environment),
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )


def serve(port: int) -> list[str]:
    """The command that serves."""
    return [sys.executable, *API, "serve", "--port", str(port)]


@pytest.mark.usefixtures("prefect_server")
async def test_the_api_lives_as_a_process(environment: dict[str, str], tmp_path: Path) -> None:
    """Token, start, health, 401, trigger, status; SIGTERM answers who waits, and ends it in time."""
    made = run(environment, "token", "create", "ci")
    assert made.returncode == 0, made.stderr
    token, port, log = made.stdout.strip(), free_port(), tmp_path / "api.log"
    base = f"http://127.0.0.1:{port}"
    with process(serve(port), environment, log) as served:
        await asyncio.to_thread(wait_for, lambda: answers(f"{base}/docs"), served, log)
        async with httpx.AsyncClient(base_url=base, timeout=30) as http:
            health = await http.get("/health")
            assert (health.status_code, health.json()["status"]) == (200, "degraded"), health.text
            assert (await http.get("/api/v1/deployments")).status_code == 401
            http.headers["Authorization"] = f"Bearer {token}"
            answer = await http.post("/api/v1/deployments/trigger", json=BODY)
            assert answer.status_code == 202, answer.text
            status = (await http.get(answer.json()["status_url"])).json()["workflow_state"]
            assert (status["current_state"], status["prefect_state"]) == ("PENDING", "Scheduled")
            await stop_while_waiting(http, served)
        assert served.wait(STOP_SECONDS) in {0, -signal.SIGTERM}
    text = log.read_text()
    assert f"workflow {status['workflow_id']} triggered by token ci" in text
    assert token not in text
    assert "Traceback" not in text


async def stop_while_waiting(http: httpx.AsyncClient, served: subprocess.Popen[bytes]) -> None:
    """A request that waits when SIGTERM comes is told where its deployment stands."""
    key = {"Idempotency-Key": "waited-for"}
    waiting = asyncio.create_task(http.post("/api/v1/deployments/trigger?wait=true", json=BODY, headers=key))
    async with get_client() as client:
        deadline = time.monotonic() + START_SECONDS
        while len(await client.read_flow_runs()) < 2:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
    served.send_signal(signal.SIGTERM)
    answer = await waiting
    assert (answer.status_code, answer.json()["status"]) == (202, "running")


async def test_pages_and_filters_are_the_same_on_every_database(records_url: str) -> None:
    """Newest first, ties in a fixed order, each row once; every filter."""
    async with await Records.open(records_url) as records:
        for number in range(7):
            moment = NOW + timedelta(seconds=number // 3)
            new = NewWorkflow(
                workflow_id=f"w-{number}", container_name=f"c-{number % 2}", remote_host="host-b"
            )
            await records.create(new, at=moment)
        await records.advance("w-5", WorkflowState.PENDING, WorkflowState.FAILED)
        seen: list[str] = []
        after: Cursor | None = None
        while page := await read_page(records, WorkflowFilter(), after, 2):
            seen += [row.workflow_id for row in page]
            after = Cursor.parse(Cursor(page[-1].created_at, page[-1].workflow_id).text())
        assert seen == [f"w-{number}" for number in reversed(range(7))]
        for wanted, ids in FILTERS:
            assert [row.workflow_id for row in await read_page(records, wanted, None, 9)] == ids, wanted
        assert await ping(records) in records_url


FILTERS = [
    (WorkflowFilter(container_name="c-1"), ["w-5", "w-3", "w-1"]),
    (WorkflowFilter(remote_host="host-c"), []),
    (WorkflowFilter(states=(WorkflowState.FAILED, WorkflowState.COMPLETED)), ["w-5"]),
    (WorkflowFilter(success=False), ["w-5"]),
    (WorkflowFilter(success=True), []),
    (WorkflowFilter(since=NOW + timedelta(seconds=2)), ["w-6"]),
    (WorkflowFilter(until=NOW + timedelta(seconds=1), container_name="c-0"), ["w-2", "w-0"]),
]
