"""A fleet: eight and twenty hosts against one, whether the limit holds, what a deployment costs the servers.

All hosts are real (engine, receiver and worker each), on this machine's two cores.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from deployments.lab import Lab
from tests.bench.load import Load, measure_load
from tests.bench.load import table as load_table
from tests.e2e.deploying import BASE_IMAGE, FINAL, furnish, in_control, prefect_api, query, start_run
from tests.labs import lab_on_postgresql

HOSTS = tuple(f"host-{number}" for number in range(1, 9))
MANY = tuple(f"host-{number}" for number in range(1, 21))
LIMITS = (8, 3)
NAME = "fleet"
PORT = 18900
_POLLS_PER_SECOND = 5  # of all hosts together, as SCALING.md advises
_DEADLINE_SECONDS = 900
_LOOK_SECONDS = 3.0  # the run's own times are what counts; looking often would count among the requests


@dataclass(frozen=True)
class Trial:
    """One fleet: how many hosts under which limit, its seconds, and how many deployments overlapped."""

    hosts: int
    limit: int
    seconds: float
    overlapping: int


def measure(runs: int) -> tuple[list[Trial], Load]:
    """One host and eight in turn, `runs` times, once under a lower limit; then the load, and twenty hosts."""
    with lab_on_postgresql(HOSTS, environment={}, of_hosts=_polling(HOSTS)) as lab:
        furnish(lab)
        _register(lab, HOSTS)
        _limit(lab, LIMITS[0])
        _fleet(lab, HOSTS, "v0", LIMITS[0])
        trials = [
            _fleet(lab, hosts, f"v{run}-{len(hosts)}", LIMITS[0])
            for run in range(1, runs + 1)
            for hosts in (HOSTS[:1], HOSTS)
        ]
        _limit(lab, LIMITS[1])
        trials.append(_fleet(lab, HOSTS, "limited", LIMITS[1]))
        _limit(lab, LIMITS[0])
        load = measure_load(lab, lambda: _fleet(lab, HOSTS[:1], "counted", LIMITS[0]))
    return [*trials, *_many()], load


def _many() -> list[Trial]:
    """Twenty hosts: once for their first runs, and once more."""
    with lab_on_postgresql(MANY, environment={}, of_hosts=_polling(MANY)) as lab:
        furnish(lab)
        _register(lab, MANY)
        _limit(lab, LIMITS[0])
        _fleet(lab, MANY, "v0", LIMITS[0])
        return [_fleet(lab, MANY, "v1", LIMITS[0])]


def _polling(hosts: Sequence[str]) -> dict[str, str]:
    return {"PREFECT_WORKER_QUERY_SECONDS": str(math.ceil(len(hosts) / _POLLS_PER_SECOND))}


def _register(lab: Lab, hosts: Sequence[str]) -> None:
    file = {
        "hosts": list(hosts),
        "image": {
            "build_context": str(lab.state_dir / "hello"),
            "build_args": {"BASE_IMAGE": BASE_IMAGE},
        },
        "configuration": {"port_mappings": [{"host_port": PORT, "container_port": 8080}]},
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / f"{NAME}.yaml").write_text(yaml.safe_dump(file))
        in_control(lab, "-m", "deployments.service_files", "register", "--folder", folder)


def _limit(lab: Lab, limit: int) -> None:
    in_control(lab, "-m", "deployments.register", "--control", env={"MAX_CONCURRENT_DEPLOYMENTS": str(limit)})


def _fleet(lab: Lab, hosts: Sequence[str], tag: str, limit: int) -> Trial:
    """All hosts at once, no canary: the first of them builds, the others take what it built."""
    asked = {"services": [f"{NAME}:{tag}"], "hosts": list(hosts), "canary": False, "batch_size": "100%"}
    run = _ended(lab, start_run(lab, "deploy-fleet/default", asked))
    assert run["state"]["type"] == "COMPLETED", run["state"]["message"]
    seconds = (_moment(run["end_time"]) - _moment(run["created"])).total_seconds()
    return Trial(len(hosts), limit, seconds, _overlapping(lab, run["id"]))


def _ended(lab: Lab, run_id: str) -> dict[str, Any]:
    deadline = time.monotonic() + _DEADLINE_SECONDS
    while time.monotonic() < deadline:
        run: dict[str, Any] = prefect_api(lab, "GET", f"/flow_runs/{run_id}")
        if (run["state"] or {}).get("type") in FINAL:
            return run
        time.sleep(_LOOK_SECONDS)
    raise AssertionError(f"flow run {run_id} took longer than {_DEADLINE_SECONDS} s")


def _overlapping(lab: Lab, fleet_id: str) -> int:
    """How many of a fleet's workflows were past PENDING at the same time, at most: those that had a slot."""
    sql = (
        "SELECT MIN(t.at) AS began, w.completed_at AS ended FROM workflow_executions w"
        " JOIN workflow_transitions t ON t.workflow_id = w.workflow_id"
        " WHERE w.correlation_id = ? GROUP BY w.workflow_id"
    )
    changes: list[tuple[str, int]] = []
    for row in query(lab, sql, fleet_id):
        changes += [(str(row["began"]), 1), (str(row["ended"]), -1)]
    level, most = 0, 0
    for _, change in sorted(changes):
        level += change
        most = max(most, level)
    return most


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def table(found: tuple[Sequence[Trial], Load]) -> str:
    """Markdown: the fleets, then the load."""
    trials, load = found
    lines = [
        "Small image, built by the first host's deployment; Prefect server on PostgreSQL, all on two cores.",
        "",
        "| fleet | `MAX_CONCURRENT_DEPLOYMENTS` | seconds, median (range) | at work at a time, at most |",
        "|---|---:|---:|---:|",
    ]
    kinds = sorted({(trial.hosts, -trial.limit) for trial in trials})
    for hosts, limit in kinds:
        lines.append(_row([one for one in trials if (one.hosts, -one.limit) == (hosts, limit)]))
    one, many = (_median([trial for trial in trials if trial.hosts == n]) for n in (1, len(HOSTS)))
    lines += ["", f"{len(HOSTS)} hosts take {many / one:.1f} times as long as one.", ""]
    return "\n".join(lines) + "\n" + load_table(load)


def _row(trials: Sequence[Trial]) -> str:
    seconds = [trial.seconds for trial in trials]
    told = f"{_median(trials):.1f} ({min(seconds):.1f}-{max(seconds):.1f})"
    hosts = trials[0].hosts
    at_once = max(trial.overlapping for trial in trials)
    return f"| {hosts} host{'s' if hosts > 1 else ''} | {trials[0].limit} | {told} | {at_once} |"


def _median(trials: Sequence[Trial]) -> float:
    limit = max(trial.limit for trial in trials)
    return statistics.median(trial.seconds for trial in trials if trial.limit == limit)
