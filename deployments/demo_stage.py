"""What the demo runs on: a second host from the lab, or this machine's engine playing both parts.

Written down in `.demo/stage.json` (mode 600: it holds the demo's key), so that any later command finds it.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from deployments import lab_prefect
from deployments.lab import Lab, missing_requirement
from deployments.lab_teardown import end_process, start_time, tear_down

HOST = "host-b"
SERVICE_PORT = 8080
PROJECT = Path(__file__).resolve().parents[1]
STATE = PROJECT / ".demo" / "stage.json"
REGISTERED = STATE.with_name("registered")
_READY_SECONDS = 90
Say = Callable[[str], None]


@dataclass(frozen=True)
class Stage:
    """A running demo; `processes` are (pid, start time) of what runs without a lab."""

    folder: str
    is_lab: bool
    environment: dict[str, str]
    host_address: str
    receiver_port: int
    service_port: int
    processes: list[tuple[int, str]] = field(default_factory=list)

    @property
    def api_url(self) -> str:
        """The Prefect API."""
        return self.environment.get("PREFECT_API_URL", "")

    @property
    def ui_url(self) -> str:
        """The Prefect UI."""
        return self.api_url.removesuffix("/api")

    @property
    def service_url(self) -> str:
        """Where the sample answers."""
        return f"http://{self.host_address}:{self.service_port}/"

    @property
    def receiver_metrics(self) -> str:
        """Where Prometheus scrapes the host's receiver."""
        return f"http://{self.host_address}:{self.receiver_port}/metrics"

    @property
    def records_url(self) -> str:
        """The control side's records."""
        return f"sqlite:///{self.environment['GANTRY_HOME']}/records.db"

    def full_environment(self, project: Path) -> dict[str, str]:
        """Environment of a command of the control side."""
        return {**os.environ, **self.environment, "PWD": str(project)}

    def parameters(self) -> list[str]:
        """What differs from the service files here: only a port that is taken on this machine."""
        if self.service_port == SERVICE_PORT and self.receiver_port == 8001:
            return []
        ports = {"port_mappings": [{"host_port": self.service_port, "container_port": SERVICE_PORT}]}
        return ["--param", f"deployment_config={json.dumps(ports)}"]

    def is_up(self) -> bool:
        """True when server and receiver answer."""
        receiver = f"http://{self.host_address}:{self.receiver_port}/health"
        return bool(self.api_url) and _answers(f"{self.api_url}/health") and _answers(receiver)


def load() -> Stage | None:
    """The demo that was started last, up or not."""
    if not STATE.exists():
        return None
    found = json.loads(STATE.read_text())
    found["processes"] = [(pid, began) for pid, began in found["processes"]]
    return Stage(**found)


def start(say: Say) -> Stage:
    """Start the services and write down where they are."""
    problem = missing_requirement()
    STATE.parent.mkdir(mode=0o700, exist_ok=True)
    if problem is None:
        say("starting a Prefect server, a worker, and a second host with an engine of its own")
        return _save(_start_lab())
    say(f"no second host here ({problem}): this machine's engine plays both parts")
    return _start_here()


def end(stage: Stage) -> None:
    """Stop what runs and remove what was made; harmless when it is gone."""
    if stage.is_lab:
        tear_down(Path(stage.folder))
    else:
        _end_here(stage)
    shutil.rmtree(STATE.parent, ignore_errors=True)


def _save(stage: Stage) -> Stage:
    STATE.touch(mode=0o600)
    STATE.write_text(json.dumps(asdict(stage)))
    return stage


def _start_lab() -> Stage:
    folder = Path(tempfile.gettempdir()) / f"gantry-demo-{secrets.token_hex(2)}"
    lab = Lab((HOST,), control_namespace=False, state_dir=folder, reaped=False)
    _save(
        Stage(str(folder), is_lab=True, environment={}, host_address="", receiver_port=8001, service_port=0)
    )
    lab.up()
    return Stage(
        folder=str(lab.state_dir),
        is_lab=True,
        environment=dict(lab.environment),
        host_address=lab.hosts[HOST].address,
        receiver_port=8001,
        service_port=SERVICE_PORT,
    )


def _start_here() -> Stage:
    folder = Path(tempfile.mkdtemp(prefix="gantry-demo-"))
    server_port = _free_port(4200)
    environment = lab_prefect.settings(f"http://127.0.0.1:{server_port}/api", folder / "prefect")
    environment |= {"GANTRY_HOME": str(folder / "control"), "HMAC_SECRET_KEY": secrets.token_hex(32)}
    (folder / "control").mkdir()
    stage = Stage(
        folder=str(folder),
        is_lab=False,
        environment=environment,
        host_address="127.0.0.1",
        receiver_port=_free_port(8001),
        service_port=_free_port(SERVICE_PORT),
    )
    lab_prefect.place_database(sys.executable, folder / "prefect", {**os.environ, **environment})
    _save(stage)
    server = lab_prefect.server_command(sys.executable, "127.0.0.1", server_port)
    _spawn(stage, "server", server, lab_prefect.server_settings())
    _wait(f"{stage.api_url}/health", "the Prefect server", folder)
    receiver = {
        "HOOK_RECEIVER_HOST": "127.0.0.1",
        "HOOK_RECEIVER_PORT": str(stage.receiver_port),
        "HOOK_RECEIVER_STATE_DIR": str(folder / "receiver"),
    }
    _spawn(stage, "receiver", [sys.executable, "-m", "receiver"], receiver)
    for pool in ("control", HOST):
        _spawn(stage, pool, lab_prefect.worker_command(sys.executable, pool, pool), receiver)
    _wait(f"http://127.0.0.1:{stage.receiver_port}/health", "the receiver", folder)
    return stage


def _spawn(stage: Stage, name: str, command: list[str], extra: Mapping[str, str]) -> None:
    with (Path(stage.folder) / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # Prefect's workers share /tmp/runner_storage, which may be another user's.
            env={**stage.full_environment(PROJECT), "TMPDIR": stage.folder, **extra},
            cwd=PROJECT,
            start_new_session=True,
        )
    stage.processes.append((process.pid, start_time(process.pid) or ""))
    _save(stage)


def _end_here(stage: Stage) -> None:
    import docker

    from receiver.contract import LABEL_CONTAINER

    for pid, began in reversed(stage.processes):
        end_process(pid, began, deadline_seconds=15)
    client = docker.from_env(timeout=60)
    for container in client.containers.list(all=True, filters={"label": f"{LABEL_CONTAINER}=hello"}):
        container.remove(force=True)
    shutil.rmtree(stage.folder, ignore_errors=True)


def _wait(url: str, what: str, folder: Path) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while not _answers(url):
        if time.monotonic() > deadline:
            raise SystemExit(f"{what} did not answer in {_READY_SECONDS} s; see the logs in {folder}")
        time.sleep(0.2)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=3) as response:  # noqa: S310 - our own http URL
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _free_port(wanted: int) -> int:
    """`wanted`, or another port when it is taken."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
