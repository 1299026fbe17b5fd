"""How long a person waits: from `prefect deployment run` to COMPLETED, and where the time goes.

A small image that is built already is deployed to a host that lacks it, with the default health check.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from deployments.lab import Lab
from tests.e2e.deploying import Service, furnish, prefect_api, query
from tests.readme import PROJECT

HOSTS = ("host-a", "host-b")
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


def measure(runs: int) -> list[Trial]:
    """Deploy `runs` times in a lab of its own; each version goes to the other host first, which builds it."""
    with Lab(HOSTS) as lab:
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


def table(trials: Sequence[Trial]) -> str:
    """Markdown: median and range of each phase."""
    columns = [*zip(*(trial.seconds for trial in trials), strict=True), [trial.total for trial in trials]]
    lines = [
        f"A small image, built already, to a host that lacks it; workers up; medians of {len(trials)}.",
        "",
        "| from `prefect deployment run` to COMPLETED | seconds, median | least | most |",
        "|---|---:|---:|---:|",
    ]
    for name, values in zip((*PHASES, "**all of it**"), columns, strict=True):
        lines.append(f"| {name} | {statistics.median(values):.1f} | {min(values):.1f} | {max(values):.1f} |")
    return "\n".join(lines) + "\n"
