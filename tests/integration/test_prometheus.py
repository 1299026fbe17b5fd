"""A real Prometheus scrapes us: the specification's queries answer sensibly, and the alerts fire."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import httpx
import pytest
import uvicorn
import yaml
from fastapi import FastAPI, Response

from deployments import metrics
from receiver.app import create_app
from receiver.contract import HostState, Stage
from receiver.settings import from_environment
from tasks.records import Records
from tasks.retention import Limits, prune
from tests.contract.caller import KEY, FakeEngine
from tests.recorded import Story, publish, record
from tests.services import free_port, require_service

MONITORING = Path(metrics.__file__).parent / "monitoring"
DEADLINE_SECONDS = 30
# The specification's example queries, word for word.
SUCCESS_RATE = "sum(rate(deployments_completed_total[24h])) /\nsum(rate(deployments_started_total[24h]))"
MEAN_DURATION = 'avg(deployment_duration_seconds{container_name="orchestrator"})'
P95_DURATION = "histogram_quantile(0.95, deployment_duration_seconds_bucket)"
FAILED_BY_STAGE = "sum by (failure_stage) (deployments_failed_total)"
P95_OF_A_DAY = "histogram_quantile(0.95, sum by (le) (rate(deployment_duration_seconds_bucket[24h])))"
Answers = dict[tuple[str, ...], float]


@dataclass(frozen=True)
class Prometheus:
    """A running server; every answer is of now."""

    http: httpx.AsyncClient

    async def query(self, query: str) -> Answers:
        """Values of an instant query, by the values of the labels, names left out."""
        response = await self.http.get("/api/v1/query", params={"query": query})
        assert response.status_code == 200, response.text
        found = response.json()["data"]["result"]
        return {
            tuple(value for name, value in sorted(one["metric"].items()) if name != "__name__"): float(
                one["value"][1]
            )
            for one in found
        }

    async def single(self, query: str) -> float | None:
        """The only value of a query, None without one."""
        found = await self.query(query)
        assert len(found) <= 1, found
        return next(iter(found.values()), None)

    async def awaited(self, query: str) -> float:
        """The only value of a query, once there is one: a scrape that comes late leaves a gap."""
        found: list[float] = []

        async def is_there() -> bool:
            found[:] = [value] if (value := await self.single(query)) is not None else []
            return bool(found)

        await until(is_there, query)
        return found[0]


async def until(fact: Callable[[], Awaitable[bool]], what: str) -> None:
    """Return when the fact holds; fail at the deadline."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not await fact():
        if time.monotonic() > deadline:
            pytest.fail(f"not in {DEADLINE_SECONDS} s: {what}")
        await asyncio.sleep(0.05)


@pytest.fixture
async def records(sqlite_url: str) -> AsyncIterator[Records]:
    """Records in a new database."""
    async with await Records.open(sqlite_url) as opened:
        yield opened


@pytest.fixture
async def prometheus(records: Records, tmp_path: Path) -> AsyncIterator[Prometheus]:
    """Prometheus with our rules, which scrapes these records and a receiver five times a second."""
    _require_prometheus()
    control, receiver, own = free_port(), free_port(), free_port()
    config = tmp_path / "prometheus.yml"
    config.write_text(yaml.safe_dump(_config(control, receiver)))
    async with _serving(_control_host(records), control), _serving(_receiver(tmp_path), receiver):
        with _server(config, own):
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{own}") as http:
                found = Prometheus(http)
                await until(lambda: _is_scraping(found), "both targets are scraped")
                yield found


def _require_prometheus() -> None:
    programs = shutil.which("prometheus") and shutil.which("promtool")
    require_service(bool(programs), "Prometheus is not installed", "apt-get install prometheus")


def _config(control: int, receiver: int) -> dict[str, object]:
    """As in the sample, with targets and times of the test."""
    document: dict[str, object] = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    jobs = {"gantry": control, "gantry-receiver": receiver}
    targets = {name: [{"targets": [f"127.0.0.1:{port}"]}] for name, port in jobs.items()}
    return document | {
        "global": {"scrape_interval": "200ms", "scrape_timeout": "200ms", "evaluation_interval": "200ms"},
        "rule_files": [str(MONITORING / "gantry.rules.yml")],
        "scrape_configs": [{"job_name": name, "static_configs": each} for name, each in targets.items()],
    }


def _control_host(records: Records) -> FastAPI:
    app = FastAPI()

    @app.get("/metrics")
    async def tell_metrics() -> Response:
        return Response(await metrics.render(records), media_type=metrics.CONTENT_TYPE)

    return app


def _receiver(state_dir: Path) -> FastAPI:
    environment = {"HMAC_SECRET_KEY": KEY.decode(), "HOOK_RECEIVER_STATE_DIR": str(state_dir)}
    return create_app(from_environment(environment), engine=FakeEngine().as_engine())


@asynccontextmanager
async def _serving(app: FastAPI, port: int) -> AsyncIterator[None]:
    server = uvicorn.Server(
        uvicorn.Config(app, "127.0.0.1", port, log_level="warning", access_log=False, lifespan="off")
    )
    running = asyncio.create_task(server._serve())  # `serve` would take the signals of the test run
    try:
        await until(lambda: _has_started(server), f"port {port} answers")
        yield
    finally:
        server.should_exit = True
        await running


async def _has_started(server: uvicorn.Server) -> bool:
    return server.started


@contextmanager
def _server(config: Path, port: int) -> Iterator[None]:
    command = [
        *("prometheus", f"--config.file={config}", f"--storage.tsdb.path={config.parent / 'data'}"),
        *(f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"),
    ]
    process = subprocess.Popen(command)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(DEADLINE_SECONDS)


async def _is_scraping(prometheus: Prometheus) -> bool:
    try:
        is_ready = (await prometheus.http.get("/-/ready")).status_code == 200
    except httpx.TransportError:
        return False
    return is_ready and await prometheus.single("count(up == 1)") == 2


async def test_the_queries_of_the_specification_answer_sensibly(
    prometheus: Prometheus, records: Records
) -> None:
    """Word for word, and in the form that is right where theirs is not; a prune changes no answer."""
    now = datetime.now(UTC)
    for host in ("host-a", "host-b"):
        await record(records, _orchestrator(f"{host}-1", host, now))
    await until(partial(_have_ended, prometheus, 2), "the first deployments are counted")
    await record(records, _orchestrator("host-a-2", "host-a", now))
    await record(records, _orchestrator("host-a-3", "host-a", now, fails_in=Stage.VALIDATE))
    await record(records, _orchestrator("host-b-2", "host-b", now))
    await until(partial(_have_ended, prometheus, 5), "the others are counted")
    await _check_queries(prometheus)

    await publish(records, now - timedelta(days=8))
    assert (await prune(records, Limits(now + timedelta(hours=1), now))).workflows == 5
    await record(records, _orchestrator("host-b-3", "host-b", now))
    await until(partial(_have_ended, prometheus, 6), "deployments are counted on after the prune")
    assert await prometheus.single("sum(resets(deployments_started_total[1h]))") == 0
    assert await prometheus.single("sum(resets(deployment_duration_seconds_count[1h]))") == 0


async def _have_ended(prometheus: Prometheus, count: int) -> bool:
    """Counted, and for a few scrapes already: two samples are little to reckon a rate from."""
    ended = "(sum(deployments_completed_total) + sum(deployments_failed_total))"
    return await prometheus.single(f"min_over_time({ended}[2s:200ms])") == count


def _orchestrator(workflow_id: str, host: str, at: datetime, fails_in: Stage | None = None) -> Story:
    return Story(
        workflow_id=workflow_id,
        container_name="orchestrator",
        remote_host=host,
        at=at,
        fails_in=fails_in,
        rollback_works=False,
    )


async def _check_queries(prometheus: Prometheus) -> None:
    assert await prometheus.awaited(SUCCESS_RATE) == pytest.approx(2 / 3, abs=0.05)
    assert await prometheus.awaited(P95_DURATION) == pytest.approx(15 + 0.95 * 15)
    assert await prometheus.awaited(P95_OF_A_DAY) == pytest.approx(15 + 0.95 * 15)

    async def are_counted_by_stage() -> bool:
        stages = {stage: value for (stage,), value in (await prometheus.query(FAILED_BY_STAGE)).items()}
        return stages == {stage.value: 0 for stage in Stage} | {Stage.VALIDATE.value: 1}

    await until(are_counted_by_stage, "failures are told by stage")
    assert await prometheus.awaited(MEAN_DURATION) == pytest.approx(28)
    assert await prometheus.awaited("gantry:deployment_success:ratio_24h") == pytest.approx(2 / 3, abs=0.05)


async def test_the_first_failure_of_a_container_fires_its_alerts(
    prometheus: Prometheus, records: Records
) -> None:
    """Its counter begins at 1, which is no increase to Prometheus; the rules see it all the same."""
    now = datetime.now(UTC)
    await record(records, _orchestrator("w-1", "host-a", now, fails_in=Stage.VALIDATE))

    async def fire(alert: str) -> bool:
        found = await prometheus.query(f'ALERTS{{alertname="{alert}", alertstate="firing"}}')
        return any("host-a" in labels for labels in found)

    for alert in ("DeploymentFailed", "DeploymentRollbackFailed"):
        await until(partial(fire, alert), f"{alert} fires")


async def test_every_query_of_the_dashboard_is_understood(prometheus: Prometheus) -> None:
    """Prometheus answers each with success, if only with nothing yet."""
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            await prometheus.query(target["expr"].replace("$container", ".*"))
    assert await prometheus.single("count(gantry_receiver_info * on (instance) gantry_receiver_up)") == 1
    assert len(await prometheus.query("gantry_receiver_deployments")) == len(HostState)


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "rules", "gantry.rules.yml"),
        ("test", "rules", "gantry.rules.test.yml"),
        ("check", "config", "--syntax-only", "prometheus.yml"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_promtool_finds_nothing_wrong(arguments: tuple[str, ...]) -> None:
    """The rules' own tests say when each alert fires and when it does not."""
    _require_prometheus()
    done = subprocess.run(
        ["promtool", *arguments], cwd=MONITORING, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
