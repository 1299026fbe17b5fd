"""The daemon as a process, with a real Docker Engine of this test in a network namespace of its own.

The engine runs no container here, so it needs neither bridge nor iptables.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import docker
import httpx
import pytest
from blake3 import blake3

from receiver import contract, signing
from receiver.contract import (
    DeployAccepted,
    DeploymentStatus,
    DeployRequest,
    HostHealth,
    HostState,
    ImageAnnouncement,
    PackageAnnouncement,
)
from receiver.ledger import Ledger
from tests.services import free_port, require_service

KEY = b"integration-key-integration-key-00"
DEADLINE_SECONDS = 60


def wait_for(fact: Callable[[], bool], what: str) -> None:
    """Return when the fact holds; fail after the deadline."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not fact():
        if time.monotonic() > deadline:
            pytest.fail(f"not in {DEADLINE_SECONDS} s: {what}")
        time.sleep(0.05)


@dataclass
class EngineProcess:
    """A dockerd below one folder; may be stopped and started again."""

    folder: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """What DOCKER_HOST says."""
        return f"unix://{self.folder}/sock"

    def start(self) -> None:
        """Start and wait for the first answer."""
        command = [
            "unshare", "--net", "dockerd", "--host", self.url, "--bridge=none", "--iptables=false",
            "--data-root", f"{self.folder}/data", "--exec-root", f"{self.folder}/exec",
            "--pidfile", f"{self.folder}/pid", "--log-level", "warn",
        ]  # fmt: skip
        (self.folder / "daemon.json").write_text("{}")
        command += ["--config-file", f"{self.folder}/daemon.json"]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        wait_for(self.answers, f"dockerd answers: {(self.folder / 'log').read_text()[-500:]}")

    def answers(self) -> bool:
        """True when the engine answers a ping."""
        try:
            client = docker.DockerClient(base_url=self.url)
        except docker.errors.DockerException:
            return False
        client.close()
        return True

    def stop(self) -> None:
        """End it in good order, with its containerd."""
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(DEADLINE_SECONDS)
            self.process = None


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineProcess]:
    """A stopped engine with an empty store."""
    require_service(
        os.geteuid() == 0 and shutil.which("dockerd") is not None and shutil.which("unshare") is not None,
        "a Docker Engine of the test needs root and dockerd",
        "apt-get install -y --no-install-recommends docker.io",
    )
    folder = Path(tempfile.mkdtemp(prefix="gr-", dir="/tmp"))  # short: a socket's path is limited
    engine = EngineProcess(folder)
    try:
        yield engine
    finally:
        engine.stop()
        for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            if (point := line.split()[1]).startswith(f"{folder}/"):
                subprocess.run(["umount", point], check=False)
        shutil.rmtree(folder)


@dataclass(frozen=True)
class Daemon:
    """A running receiver."""

    port: int
    state_dir: Path
    log: Path
    http: httpx.Client

    def call(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> httpx.Response:
        """A signed call."""
        signed = {**signing.signed_headers(KEY, method, path, body), **(headers or {})}
        return self.http.request(method, path, content=body, headers=signed)

    def health(self) -> HostHealth | None:
        """What /health says, or None when nothing answers."""
        try:
            return HostHealth.model_validate_json(self.http.get(contract.HEALTH_PATH).content)
        except httpx.TransportError:
            return None

    def announce(self, request: DeployRequest) -> httpx.Response:
        """Announce a deployment."""
        return self.call("POST", contract.DEPLOY_PATH, request.model_dump_json().encode())

    def status(self, deployment_id: str) -> DeploymentStatus:
        """A deployment's status."""
        response = self.call("GET", contract.deploy_path(deployment_id, "status"))
        return DeploymentStatus.model_validate_json(response.content)

    def upload(self, deployment_id: str, package: bytes, chunk_bytes: int) -> None:
        """Send the package in chunks."""
        path = contract.deploy_path(deployment_id, "package")
        for offset in range(0, len(package), chunk_bytes):
            chunk = package[offset : offset + chunk_bytes]
            response = self.call("PATCH", path, chunk, {contract.UPLOAD_OFFSET_HEADER: str(offset)})
            assert response.status_code == 204, response.text


@contextmanager
def serving(engine: EngineProcess, folder: Path) -> Iterator[Daemon]:
    """The receiver as a process."""
    port, log = free_port(), folder / "receiver.log"
    environment = {
        "PATH": os.environ["PATH"],
        "HOOK_RECEIVER_HOST": "127.0.0.1",
        "HOOK_RECEIVER_PORT": str(port),
        "HOOK_RECEIVER_STATE_DIR": str(folder / "state"),
        "HMAC_SECRET_KEY": KEY.decode(),
        "DOCKER_HOST": engine.url,
        "LOG_FORMAT": "json",
    }
    with log.open("ab") as stream, httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
        process = subprocess.Popen([sys.executable, "-m", "receiver"], env=environment, stderr=stream)
        daemon = Daemon(port, folder / "state", log, http)
        try:
            wait_for(lambda: daemon.health() is not None, f"the receiver answers: {log.read_text()}")
            yield daemon
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(DEADLINE_SECONDS)


@pytest.fixture
def daemon(engine: EngineProcess, tmp_path: Path) -> Iterator[Daemon]:
    """A receiver beside a running engine."""
    if engine.process is None:
        engine.start()
    with serving(engine, tmp_path) as daemon:
        yield daemon


@pytest.fixture
async def image(engine: EngineProcess) -> AsyncIterator[tuple[ImageAnnouncement, bytes]]:
    """An image of one file: what is announced of it, and its docker-archive."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as archive:
        member = tarfile.TarInfo("hello")
        member.size = 300_000
        archive.addfile(member, io.BytesIO(os.urandom(300_000)))
    client = docker.DockerClient(base_url=engine.url)
    client.api.import_image_from_data(layer.getvalue(), repository="my-service", tag="v1")
    built = client.images.get("my-service:v1")
    announced = ImageAnnouncement(
        config_digest=str(built.id),
        layers=built.attrs["RootFS"]["Layers"],
        architecture=built.attrs["Architecture"],
        size_bytes=built.attrs["Size"],
    )
    yield announced, b"".join(built.save())
    client.close()


def test_the_receiver_starts_before_its_engine_and_finds_it_again(
    engine: EngineProcess, tmp_path: Path
) -> None:
    """Degraded while the engine is away, healthy once it answers, after a restart of the engine too."""
    with serving(engine, tmp_path) as daemon:

        def health_is(status: str) -> bool:
            health = daemon.health()
            return health is not None and health.status == status

        assert health_is("degraded")
        for _ in range(2):
            engine.start()
            wait_for(lambda: health_is("healthy"), "healthy with the engine")
            found = daemon.health()
            assert found is not None
            assert (found.docker_connected, found.architecture is not None) == (True, True)
            engine.stop()
            wait_for(lambda: health_is("degraded"), "degraded without the engine")


def test_a_saved_image_arrives_whole_and_is_known_from_then_on(
    daemon: Daemon, engine: EngineProcess, image: tuple[ImageAnnouncement, bytes]
) -> None:
    """Absent: upload, `ready_for_deployment`, and the archive loads. Present: nothing to upload."""
    announced, package = image
    client = docker.DockerClient(base_url=engine.url)
    client.images.remove("my-service:v1")
    digest = PackageAnnouncement(size_bytes=len(package), blake3=blake3(package).hexdigest())
    request = DeployRequest(container_name="my-service", image=announced, package=digest)
    accepted = DeployAccepted.model_validate_json(daemon.announce(request).content)
    assert (accepted.state, accepted.image_present) == (HostState.RECEIVING, False)
    assert accepted.known_layers == []
    daemon.upload(accepted.deployment_id, package, chunk_bytes=100_000)
    assert daemon.status(accepted.deployment_id).state is HostState.READY
    whole = daemon.state_dir / "packages" / f"{accepted.deployment_id}.tar"
    with whole.open("rb") as stream:
        client.images.load(stream)
    again = DeployAccepted.model_validate_json(daemon.announce(request).content)
    assert (again.state, again.image_present) == (HostState.READY, True)
    assert again.known_layers == announced.layers
    client.close()


def test_an_image_for_another_architecture_is_refused(
    daemon: Daemon, image: tuple[ImageAnnouncement, bytes]
) -> None:
    """Both architectures are named; the engine says its own."""
    foreign = image[0].model_copy(update={"architecture": "s390x"})
    response = daemon.announce(DeployRequest(container_name="my-service", image=foreign))
    assert response.status_code == 422
    assert "linux/s390x" in response.json()["detail"]
    assert f"linux/{image[0].architecture}" in response.json()["detail"]


def test_what_a_dead_process_left_is_settled_by_the_daemon_alone(
    daemon: Daemon, engine: EngineProcess
) -> None:
    """The guardian runs in the daemon: no flow, no Prefect, no call from outside."""
    left_behind = Ledger(daemon.state_dir / "ledger.sqlite3")
    entry, _ = left_behind.create(DeployRequest(container_name="my-service"), HostState.READY)
    left_behind.move(entry.deployment_id, HostState.PREPARED)
    left_behind.close()
    wait_for(
        lambda: daemon.status(entry.deployment_id).state is HostState.RESTORED,
        f"the guardian restores: {daemon.log.read_text()}",
    )
    lines = [json.loads(line) for line in daemon.log.read_text().splitlines()]
    assert any(line.get("deployment_id") == entry.deployment_id for line in lines)
