"""How long a person waits: from `prefect deployment run` to COMPLETED, and where the time goes.

A small image that is built already is deployed to a host that lacks it, with the default health check.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from deployments.lab import Lab
from tests.e2e.deploying import Service, furnish, prefect_api, query
from tests.labs import lab_on_postgresql
from tests.readme import PROJECT

HOSTS = ("host-a", "host-b")
POLLING = {"PREFECT_WORKER_QUERY_SECONDS": "0.5"}
PHASES = (
    "the command, until its run is there",
    "worker of `control` and start of the flow",
    "stages 1 and 2: package, transfer",
    "worker of the host and start of its flow",
    "stages 3 and 4: deploy, validate",
    "the report, until the run is COMPLETED",
)


@dataclass(frozen=True)
class Trial:
    """One deployment: seconds of each of `PHASES`, in order."""

    seconds: tuple[float, ...]

    @property
    def total(self) -> float:
        """From the command to COMPLETED."""
        return sum(self.seconds)


def measure(runs: int) -> dict[str, list[Trial]]:
    """Deploy `runs` times in labs of their own, the Prefect server on SQLite and on PostgreSQL."""
    with Lab(HOSTS, environment=POLLING) as lab:
        on_sqlite = _trials(lab, runs)
    with lab_on_postgresql(HOSTS, environment=POLLING) as lab:
        return {"SQLite": on_sqlite, "PostgreSQL": _trials(lab, runs)}


def _trials(lab: Lab, runs: int) -> list[Trial]:
    """Each version goes to the first host before, which builds it."""
    furnish(lab)
    builder, measured = (Service(lab, lab.hosts[name], "bench") for name in HOSTS)
    builder.deploy("v0")
    measured.deploy("v0")
    return [_trial(builder, measured, f"v{number}") for number in range(1, runs + 1)]


def _trial(builder: Service, measured: Service, tag: str) -> Trial:
    built = builder.deploy(tag)
    assert built.state == "COMPLETED", built.message
    began = datetime.now(UTC)
    _command(measured, tag)
    return _seconds(measured.lab, tag, measured, began)


def _command(service: Service, tag: str) -> None:
    parameters = service.parameters(tag)
    given = [f"{name}={json.dumps(value)}" for name, value in parameters.items()]
    command = [
        service.lab.python,
        "-m",
        "prefect",
        "deployment",
        "run",
        "deploy-container/default",
        "--watch",
    ]
    for text in given:
        command += ["--param", text]
    done = service.lab.control.run(*command, check=False, cwd=PROJECT, timeout=120)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)


def _seconds(lab: Lab, tag: str, service: Service, began: datetime) -> Trial:
    sql = "SELECT * FROM workflow_executions WHERE image_tag = ? AND remote_host = ?"
    (workflow,) = query(lab, sql, tag, service.host.name)
    run = prefect_api(lab, "GET", f"/flow_runs/{workflow['workflow_id']}")
    host_run = _run_on_host(lab, str(workflow["workflow_id"]))
    moments = (
        *(began, _moment(run["created"]), _moment(run["start_time"])),
        *(_moment(host_run["created"]), _moment(host_run["start_time"])),
        *(_moment(str(workflow["completed_at"])), _moment(run["end_time"])),
    )
    return Trial(tuple((b - a).total_seconds() for a, b in pairwise(moments)))


def _run_on_host(lab: Lab, workflow_id: str) -> dict[str, Any]:
    wanted = {
        "flows": {"name": {"any_": ["receive-container"]}},
        "flow_runs": {"tags": {"all_": [f"workflow:{workflow_id}"]}},
    }
    found: list[dict[str, Any]] = prefect_api(lab, "POST", "/flow_runs/filter", wanted)
    return found[0]


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def table(trials: Mapping[str, Sequence[Trial]]) -> str:
    """Markdown: median and range of each phase, a column for each database of the Prefect server."""
    runs = len(next(iter(trials.values())))
    lines = [
        f"A small image, built already, to a host that lacks it. Seconds: median of {runs} (range).",
        "",
        f"| from `prefect deployment run` to COMPLETED; server on | {' | '.join(trials)} |",
        f"|---|{'---:|' * len(trials)}",
    ]
    for at, phase in enumerate(PHASES):
        lines.append(_row(phase, [[trial.seconds[at] for trial in found] for found in trials.values()]))
    lines.append(_row("**all of it**", [[trial.total for trial in found] for found in trials.values()]))
    return "\n".join(lines) + "\n"


def _row(name: str, columns: Sequence[Sequence[float]]) -> str:
    cells = [f"{statistics.median(each):.1f} ({min(each):.1f}-{max(each):.1f})" for each in columns]
    return f"| {name} | {' | '.join(cells)} |"
