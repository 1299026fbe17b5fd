"""A target host for tests: a real Docker Engine of its own, a ledger, and images without a registry."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from docker import DockerClient
from docker.models.containers import Container
from docker.models.images import Image

from deployments import lab
from deployments.demo_image import static_busybox
from receiver import settings
from receiver.contract import (
    LABEL_CONTAINER,
    DeploymentConfig,
    DeployRequest,
    HealthCheckConfig,
    HostState,
    ImageAnnouncement,
)
from receiver.engine import Engine
from receiver.ledger import Ledger
from receiver.operations import Host, Operations
from receiver.rolling import RollingOperations
from tests.services import require_service

BASE_IMAGE = "gantry-host-test-base:latest"
SERVE = ["/bin/sh", "-c", "echo serving; exec sleep 1000"]
STEPS = (
    "deploy_container",
    "stop_existing_container",
    "start_container",
    "check_container_status",
    "validate_health_endpoint",
    "verify_service_registration",
    "keep",
    "retire",
)
ROLLING_STEPS = (
    *("deploy_container", "start_container", "check_container_status", "validate_health_endpoint"),
    *("verify_service_registration", "switch_traffic", "drain_existing_container"),
    *("stop_existing_container", "keep", "retire"),
)
# SIGKILL as stop signal: no test waits for a grace that it does not ask for.
_BASE = """FROM scratch
COPY busybox /bin/busybox
RUN ["/bin/busybox", "--install", "-s", "/bin"]
STOPSIGNAL SIGKILL
"""


def announced(image: Image) -> ImageAnnouncement:
    """A local image as a sender announces it."""
    return ImageAnnouncement(
        config_digest=str(image.id),
        layers=image.attrs["RootFS"]["Layers"],
        architecture=image.attrs["Architecture"],
        size_bytes=image.attrs["Size"],
    )


async def take(operations: Operations, step: str) -> None:
    """One step by its name."""
    if step == "deploy_container":
        await operations.deploy_container({"COLOUR": "blue"})
    else:
        await getattr(operations, step)()


async def take_up_to(operations: Operations, last: str) -> None:
    """All steps up to and with `last`, in the order of the deployment's strategy."""
    steps = ROLLING_STEPS if isinstance(operations, RollingOperations) else STEPS
    for step in steps[: steps.index(last) + 1]:
        await take(operations, step)


def open_host(state_dir: Path, docker_socket: Path) -> Host:
    """The host's operations on this engine; a process opens its own."""
    found = settings.from_environment(
        {"HOOK_RECEIVER_STATE_DIR": str(state_dir), "DOCKER_HOST": f"unix://{docker_socket}"},
        require_key=False,
    )
    found.make_folders()
    return Host(found, Ledger(found.ledger_path), Engine(found.docker_host))


@dataclass(frozen=True)
class Rig:
    """One host and what tests do on it."""

    node: lab.Host
    docker: DockerClient
    host: Host
    images: dict[str, ImageAnnouncement] = field(default_factory=dict)

    def image(self, version: str) -> ImageAnnouncement:
        """The image `test:<version>`; built again when a restore took it away as a failed one."""
        if version not in self.images or not self.docker.images.list(f"test:{version}"):
            self.images[version] = self._build(version)
        return self.images[version]

    def _build(self, version: str) -> ImageAnnouncement:
        with tempfile.TemporaryDirectory() as folder:
            text = f"FROM {BASE_IMAGE}\nENV VERSION={version}\nLABEL {LABEL_CONTAINER}=test\n"
            (Path(folder) / "Dockerfile").write_text(text)
            image, _ = self.docker.images.build(path=folder, tag=f"test:{version}", rm=True)
        return announced(image)

    def announce(
        self,
        name: str,
        version: str = "v2",
        *,
        state: HostState = HostState.READY,
        rollback_on_failure: bool = True,
        health: HealthCheckConfig | None = None,
        **config: Any,
    ) -> Operations:
        """A deployment in the ledger, whose image the engine has."""
        request = DeployRequest(
            container_name=name,
            image_tag=version,
            image=self.image(version),
            rollback_on_failure=rollback_on_failure,
            deployment_config=DeploymentConfig(**{"command": SERVE, "stop_timeout_seconds": 1, **config}),
            health_check_config=health or HealthCheckConfig(health_endpoint=None, quiet_period_ms=100),
        )
        entry, _ = self.host.ledger.create(request, state)
        return self.host.operations(entry.deployment_id)

    async def deploy(self, name: str, version: str, **config: Any) -> Operations:
        """A deployment taken to its good end."""
        operations = self.announce(name, version, **config)
        await take_up_to(operations, "retire")
        return operations

    def serve(self, name: str, policy: Any = "unless-stopped", **options: Any) -> Container:
        """A container that somebody else started under this name."""
        made = self.docker.containers.create(
            BASE_IMAGE, options.pop("command", SERVE), name=name, restart_policy={"Name": policy}, **options
        )
        made.start()
        return made

    def fresh(self, container: Container) -> Container:
        """The container as the engine has it now."""
        return self.docker.containers.get(str(container.id))

    def names(self, beginning: str) -> list[str]:
        """Names of all containers that begin so."""
        found = self.docker.containers.list(all=True)
        return sorted(str(each.name) for each in found if str(each.name).startswith(beginning))

    def state(self, operations: Operations) -> HostState:
        """Where a deployment stands."""
        return self.host.ledger.get(operations.deployment_id).state


def assert_serves(rig: Rig, container: Container, name: str, policy: str = "unless-stopped") -> None:
    """The container runs under its name with its policy, and nothing else of that name is there."""
    now = rig.fresh(container)
    assert now.attrs["State"]["Running"], now.attrs["State"]
    assert now.name == name
    assert now.attrs["HostConfig"]["RestartPolicy"]["Name"] == policy
    assert rig.names(name) == [name]


@contextmanager
def host_rig(live_restore: bool = False) -> Iterator[Rig]:
    """A host with an engine; skips where no lab can run."""
    missing, busybox = lab.missing_requirement(), static_busybox()
    require_service(
        missing is None, f"a lab needs root and Docker: {missing}", "deployments/install_services.sh"
    )
    require_service(busybox is not None, "no static busybox here", "apt-get install busybox-static")
    with lab.Lab(prefect=False, receiver=False, control_namespace=True, live_restore=live_restore) as site:
        node = site.hosts["host-a"]
        docker = node.docker()
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(busybox or "", Path(folder) / "busybox")
            (Path(folder) / "Dockerfile").write_text(_BASE)
            docker.images.build(path=folder, tag=BASE_IMAGE, rm=True)
        host = open_host(node.folder / "state", node.docker_socket)
        try:
            yield Rig(node, docker, host)
        finally:
            host.ledger.close()
            host.engine.close()
            docker.close()
