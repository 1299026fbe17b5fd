"""Deploying in a lab as a user does: Prefect deployments, real images, and what is seen afterwards."""

from __future__ import annotations

import itertools
import json
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from docker.models.containers import Container

from deployments import lab_http
from deployments.demo_image import static_busybox
from deployments.lab import Host, Lab
from receiver.contract import LABEL_CONTAINER
from tests.services import require_service

BASE_IMAGE = "gantry-test-base:latest"
DEADLINE_SECONDS = 150
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
EXAMPLE = Path(__file__).resolve().parents[2] / "deployments" / "examples" / "hello"
Fact = TypeVar("Fact")
_ports = itertools.count(18080)


def wait_for(look: Callable[[], Fact | None], what: str, seconds: float = DEADLINE_SECONDS) -> Fact:
    """The first thing that `look` gives; fails the test at the deadline."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.1)
    raise AssertionError(f"{what}: not within {seconds} s")


@dataclass(frozen=True)
class Outcome:
    """How a flow run ended, and what the records say of its workflow."""

    run_id: str
    state: str
    message: str
    record: Mapping[str, Any]

    @property
    def metrics(self) -> dict[str, Any]:
        """`deployment_metrics` of the workflow."""
        return dict(json.loads(self.record["deployment_metrics"] or "{}"))


@dataclass
class Service:
    """One container name on one host of the lab, with a port of its own."""

    lab: Lab
    host: Host
    name: str
    port: int = field(default_factory=lambda: next(_ports))

    def parameters(self, tag: str, **build_args: str) -> dict[str, Any]:
        """Parameters of `deploy-container` for a version of the sample."""
        return {
            "container_name": self.name,
            "remote_host": self.host.name,
            "image_tag": tag,
            "deployment_config": {
                "port_mappings": [{"host_port": self.port, "container_port": 8080}],
                "stop_timeout_seconds": 2,
            },
            "build_options": {
                "build_context": str(self.lab.state_dir / "hello"),
                "build_args": {"BASE_IMAGE": BASE_IMAGE, "VERSION": tag, **build_args},
            },
            "health_check_config": {"max_retries": 2, "retry_interval_ms": 500},
        }

    def start(self, parameters: Mapping[str, Any]) -> str:
        """Start a deployment; returns the flow run's id."""
        return start_run(self.lab, "deploy-container/default", parameters)

    def deploy(self, tag: str, overrides: Mapping[str, Any] | None = None, **build_args: str) -> Outcome:
        """Deploy a version to its end; `overrides` replace whole parameters."""
        return outcome(self.lab, self.start({**self.parameters(tag, **build_args), **(overrides or {})}))

    def answer(self) -> str | None:
        """What the service says to the control side; None when it does not answer."""
        try:
            response = self.lab.control.get(f"http://{self.host.address}:{self.port}/", timeout=3)
        except OSError:
            return None
        return response.text.strip() if response.status == 200 else None

    def containers(self) -> list[Container]:
        """All containers of this service, running or not."""
        return self.host.docker().containers.list(
            all=True, filters={"label": f"{LABEL_CONTAINER}={self.name}"}
        )

    def running(self) -> list[Container]:
        """Those that run."""
        return [container for container in self.containers() if container.status == "running"]


def prefect_api(lab: Lab, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
    """One call of the Prefect API from the control side.

    503, and no answer for long, mean that its SQLite file was busy: it is asked again. So a body that
    makes something has to have an idempotency key.
    """

    def call() -> lab_http.Response | None:
        try:
            answer = lab_http.request(
                lab.control.namespace,
                method,
                f"{lab.environment['PREFECT_API_URL']}{path}",
                body=json.dumps(body).encode() if body is not None else None,
                headers={"Content-Type": "application/json"},
                timeout_seconds=20,
            )
        except TimeoutError:
            return None
        return None if answer.status == 503 else answer

    answer = wait_for(call, f"{method} {path}", seconds=120)
    assert answer.status < 400, f"{method} {path}: {answer.status} {answer.text}"
    return answer.json()


def task_runs_of(lab: Lab, *run_ids: str) -> list[dict[str, Any]]:
    """The task runs of these flow runs."""
    found = prefect_api(lab, "POST", "/task_runs/filter", {"flow_runs": {"id": {"any_": run_ids}}})
    return list(found)


def start_run(lab: Lab, deployment: str, parameters: Mapping[str, Any]) -> str:
    """Start `<flow>/<name>`; returns the flow run's id."""
    known = prefect_api(lab, "GET", f"/deployments/name/{deployment}")
    body = {
        "parameters": dict(parameters),
        "state": {"type": "SCHEDULED"},
        "idempotency_key": str(uuid4()),
    }
    return str(prefect_api(lab, "POST", f"/deployments/{known['id']}/create_flow_run", body)["id"])


def outcome(lab: Lab, run_id: str) -> Outcome:
    """Wait for the end of a run; its record is empty when no workflow was begun."""

    def ended() -> dict[str, Any] | None:
        run: dict[str, Any] = prefect_api(lab, "GET", f"/flow_runs/{run_id}")
        return run if (run["state"] or {}).get("type") in FINAL else None

    run = wait_for(ended, f"flow run {run_id}")
    rows = query(lab, "SELECT * FROM workflow_executions WHERE workflow_id = ?", run_id)
    return Outcome(run_id, run["state"]["type"], run["state"]["message"] or "", rows[0] if rows else {})


def query(lab: Lab, sql: str, *values: object) -> list[dict[str, Any]]:
    """Rows of the control side's records."""
    database = lab.control.folder / "records.db"
    if not database.exists():
        return []
    connection = sqlite3.connect(database, timeout=20)
    connection.row_factory = sqlite3.Row
    try:
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'event_outbox'").fetchall():
            return []  # a deployment is making its tables this moment
        return [dict(row) for row in connection.execute(sql, values)]
    finally:
        connection.close()


def events_of(lab: Lab, workflow_id: str) -> list[str]:
    """Types of a workflow's events, in order."""
    sql = "SELECT event_type FROM event_outbox WHERE workflow_id = ? ORDER BY sequence"
    return [row["event_type"] for row in query(lab, sql, workflow_id)]


def states_of(lab: Lab, workflow_id: str) -> list[str]:
    """States that a workflow went through, in order."""
    sql = "SELECT from_state, to_state FROM workflow_transitions WHERE workflow_id = ? ORDER BY sequence"
    rows = query(lab, sql, workflow_id)
    return [row["from_state"] for row in rows[:1]] + [row["to_state"] for row in rows]


def furnish(lab: Lab) -> None:
    """Give a lab what deployments need: the sample's context and base image, registered hosts and flows."""
    place_sample(lab)
    hosts = [("--host", f"{host.name}={host.address}") for host in lab.hosts.values()]
    words = [word for host in hosts for word in host]
    in_control(lab, "-m", "deployments.setup", *words, "--worker-python", lab.python)


def large_build(service: Service) -> dict[str, str]:
    """`build_options` of an image of 200 MB that does not compress; it answers with "large"."""
    context = service.lab.state_dir / f"large-{service.name}"
    context.mkdir(exist_ok=True)
    (context / "Dockerfile").write_text(
        f"FROM {BASE_IMAGE}\nCOPY hello /hello\n"
        "RUN dd if=/dev/urandom of=/blob bs=1048576 count=200 && mkdir /www && echo large > /www/index.html"
        ' && echo ok > /www/health\nCMD ["/bin/busybox", "httpd", "-f", "-p", "8080", "-h", "/www"]\n'
    )
    (context / "hello").write_text(service.name)
    return {"build_context": str(context)}


def place_sample(lab: Lab) -> None:
    """Give the control side the sample's build context and the base image that it starts from."""
    shutil.copytree(EXAMPLE, lab.state_dir / "hello")
    busybox = static_busybox()
    require_service(busybox is not None, "no static busybox here", "apt-get install busybox-static")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(busybox or "", Path(folder) / "busybox")
        (Path(folder) / "Dockerfile").write_text(
            'FROM scratch\nCOPY busybox /bin/busybox\nRUN ["/bin/busybox", "--install", "-s", "/bin"]\n'
        )
        lab.control.docker().images.build(path=folder, tag=BASE_IMAGE, rm=True)


def in_control(lab: Lab, *arguments: str, env: Mapping[str, str] | None = None) -> str:
    """Run Python on the control side in the project's folder; its output, which a failure shows."""
    project = EXAMPLE.parents[2]
    environment = {"PWD": str(project), **(env or {})}
    done = lab.control.run(lab.python, *arguments, check=False, cwd=project, env=environment, timeout=180)
    assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
    return done.stdout
