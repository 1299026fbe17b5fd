"""The wire between control host and target host: paths, headers, models, host states, error codes.

Owns every word that both sides must agree on. Imports nothing of ours but `receiver.references`
and nothing but pydantic, so that blocks and tasks can use it without the daemon.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from receiver import references

DEPLOY_PATH = "/api/deploy"
HEALTH_PATH = "/health"
METRICS_PATH = "/metrics"
WORKFLOW_PATH = "/api/workflows"
CONTAINERS_PATH = "/api/containers"
HOST_PATH = "/api/host"

TIMESTAMP_HEADER = "X-Deployment-Timestamp"
SIGNATURE_HEADER = "X-Deployment-Signature"
NONCE_HEADER = "X-Deployment-Nonce"
VERSION_HEADER = "X-Deployment-Signature-Version"
CONTENT_DIGEST_HEADER = "X-Content-BLAKE3"
IDEMPOTENCY_HEADER = "Idempotency-Key"
CORRELATION_HEADER = "X-Correlation-ID"
UPLOAD_OFFSET_HEADER = "Upload-Offset"
UPLOAD_LENGTH_HEADER = "Upload-Length"
UPLOAD_DIGEST_HEADER = "Upload-BLAKE3"

MAX_CHUNK_BYTES = 8 * 1024 * 1024
MAX_JSON_BYTES = 1024 * 1024
DEFAULT_PORT = 8001

LABEL_CONTAINER = "gantry.container_name"
LABEL_DEPLOYMENT = "gantry.deployment_id"
LABEL_WORKFLOW = "gantry.workflow_id"
LABEL_IMAGE_TAG = "gantry.image_tag"


def deploy_path(deployment_id: str, action: str = "") -> str:
    """Path of one deployment, or of an action: `package`, `collect`, `status`, `restore`, `abort`."""
    return f"{DEPLOY_PATH}/{deployment_id}" + (f"/{action}" if action else "")


def workflow_path(workflow_id: str) -> str:
    """Path of the deployment that a workflow announced."""
    return f"{WORKFLOW_PATH}/{workflow_id}"


def container_path(container_name: str, action: str = "") -> str:
    """Path of what the host keeps of a container, or of an action on it: `rollback`."""
    return f"{CONTAINERS_PATH}/{container_name}" + (f"/{action}" if action else "")


class HostState(StrEnum):
    """Where a deployment stands on its host. `receiver.ledger` holds the transitions."""

    RECEIVING = "receiving"
    READY = "ready_for_deployment"
    PREPARED = "prepared"
    SWITCHING = "switching"
    VALIDATING = "validating"
    MOVING = "moving"
    DRAINING = "draining"
    KEPT = "kept"
    FAILED = "failed"
    RESTORING = "restoring"
    RESTORED = "restored"
    RESTORE_FAILED = "restore_failed"
    ABORTED = "aborted"
    REJECTED = "rejected"

    @property
    def settled(self) -> bool:
        """True when nothing more will happen by itself; `restore_failed` waits for a person."""
        return self in SETTLED


SETTLED = frozenset(
    {
        HostState.KEPT,
        HostState.RESTORED,
        HostState.RESTORE_FAILED,
        HostState.ABORTED,
        HostState.REJECTED,
    }
)


class ErrorCode(StrEnum):
    """The specification's error codes; `tasks.errors` holds severity, action and retry."""

    BUILD_FAILED = "BUILD_FAILED"
    TRANSFER_FAILED = "TRANSFER_FAILED"
    DEPLOYMENT_FAILED = "DEPLOYMENT_FAILED"
    HEALTH_CHECK_FAILED = "HEALTH_CHECK_FAILED"
    REMOTE_ENDPOINT_UNREACHABLE = "REMOTE_ENDPOINT_UNREACHABLE"
    ROLLBACK_FAILED = "ROLLBACK_FAILED"
    TIMEOUT = "TIMEOUT"


class Stage(StrEnum):
    """The four stages, in order, under the specification's names."""

    PACKAGE = "package_preparation"
    TRANSFER = "transfer_initiation"
    DEPLOY = "deployment_execution"
    VALIDATE = "health_validation"

    @property
    def number(self) -> int:
        """Position of the stage, from 1."""
        return list(Stage).index(self) + 1


class Strategy(StrEnum):
    """How the new version takes the old one's place."""

    RECREATE = "recreate"
    ROLLING = "rolling"


class Transport(StrEnum):
    """How a package travels; who may have it deployed is always told by signed HTTP."""

    HTTP = "http"
    RSYNC = "rsync"


class PackageFormat(StrEnum):
    """How the docker-archive of a package is compressed."""

    ZSTD = "tar.zst"
    GZIP = "tar.gz"
    TAR = "tar"


class WireModel(BaseModel):
    """Frozen, and refuses keys that it does not know: a misspelt key must not be ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid")


ContainerName = Annotated[str, AfterValidator(references.check_container_name)]
ImageTag = Annotated[str, AfterValidator(references.check_image_tag)]
ImageDigest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$", description="sha256:<64 hex digits>")]
Blake3Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="BLAKE3, 64 hex digits")]
Port = Annotated[int, Field(ge=1, le=65535)]
WorkflowId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class PortMapping(WireModel):
    """One published port."""

    host_port: Port
    container_port: Port
    protocol: Literal["tcp", "udp"] = "tcp"
    host_ip: Annotated[str, AfterValidator(references.check_ip_address)] | None = None


class VolumeMount(WireModel):
    """A bind mount (absolute `host_path`) or a named volume (`host_path` is its name)."""

    host_path: Annotated[str, AfterValidator(references.check_mount_source)]
    container_path: Annotated[str, AfterValidator(references.check_absolute_path)]
    read_only: bool = False
    shared: bool = Field(default=False, description="Two versions may write to it at the same time.")


class DeploymentConfig(WireModel):
    """How the container runs; the specification's `deployment_config` with its defaults."""

    environment_variables: dict[Annotated[str, AfterValidator(references.check_env_name)], str] = {}
    port_mappings: list[PortMapping] = []
    volumes: list[VolumeMount] = []
    restart_policy: Annotated[str, AfterValidator(references.check_restart_policy)] = "unless-stopped"
    network_mode: Annotated[str, AfterValidator(references.check_network_mode)] = "bridge"
    command: list[str] | None = None
    labels: dict[str, str] = {}
    stop_timeout_seconds: Annotated[int, Field(ge=0, le=600)] = 10
    keep_versions: Annotated[int, Field(ge=0, le=100)] = Field(
        default=2, description="Stopped versions kept for rollback; the newest of them is never removed."
    )
    strategy: Strategy = Strategy.RECREATE
    strategy_fallback: Literal[Strategy.RECREATE] | None = Field(
        default=None, description="What to do where `rolling` cannot be done; null: refuse."
    )
    drain_timeout_seconds: Annotated[int, Field(ge=0, le=3600)] = Field(
        default=30, description="Time for requests in flight on the old version; then they are closed."
    )
    hostname: Annotated[str, AfterValidator(references.check_hostname)] | None = Field(
        default=None, description="Rolling: share the host ports with other services by this host name."
    )
    https_certificate_file: Annotated[str, AfterValidator(references.check_certificate_file)] | None = Field(
        default=None, description="Rolling: PEM file on the host, chain and key; the host ports speak HTTPS."
    )

    @property
    def cannot_roll(self) -> str | None:
        """Why two versions cannot run side by side, with the fix; None when they can."""
        return _obstacle(self)

    @property
    def way(self) -> Strategy:
        """The strategy that is taken: the one asked for, or the fallback where that cannot be done."""
        return Strategy.RECREATE if self.cannot_roll else self.strategy

    @model_validator(mode="after")
    def _rolling_can_roll(self) -> Self:
        problem = self.cannot_roll if self.strategy is Strategy.ROLLING else None
        if problem and self.strategy_fallback is None:
            raise ValueError(
                f"strategy: rolling is not possible: {problem}; or set strategy_fallback: recreate"
            )
        return self

    @model_validator(mode="after")
    def _proxy_settings_need_the_proxy(self) -> Self:
        for name in ("hostname", "https_certificate_file"):
            if getattr(self, name) is not None and self.strategy is not Strategy.ROLLING:
                raise ValueError(
                    f"{name}: only the proxy of strategy 'rolling' uses it; set strategy: rolling"
                )
        return self

    @model_validator(mode="after")
    def _ports_are_published_once(self) -> Self:
        seen: set[tuple[str | None, int, str]] = set()
        for mapping in self.port_mappings:
            key = (mapping.host_ip, mapping.host_port, mapping.protocol)
            if key in seen:
                raise ValueError(
                    f"port_mappings: host_port {mapping.host_port}/{mapping.protocol} is named twice; "
                    "give each container port a host port of its own"
                )
            seen.add(key)
        return self

    @model_validator(mode="after")
    def _host_network_publishes_nothing(self) -> Self:
        if self.network_mode in {"host", "none"} and self.port_mappings:
            raise ValueError(
                f"port_mappings: network_mode {self.network_mode!r} publishes no ports; "
                "leave port_mappings empty or use network_mode 'bridge'"
            )
        return self

    @model_validator(mode="after")
    def _our_labels_are_ours(self) -> Self:
        ours = [name for name in self.labels if name.startswith("gantry.")]
        if ours:
            raise ValueError(f"labels: {ours[0]!r} is reserved; choose a name without the prefix 'gantry.'")
        return self


def _obstacle(config: DeploymentConfig) -> str | None:
    if config.network_mode == "host" or config.network_mode.startswith("container:"):
        return f"network_mode {config.network_mode!r} leaves no port to the proxy; use a bridge network"
    if not config.port_mappings:
        return "port_mappings is empty, so there is no port to move; publish one"
    for mapping in config.port_mappings:
        if mapping.protocol != "tcp":
            port = f"{mapping.host_port}/{mapping.protocol}"
            return f"port_mappings: {port} is no port that the proxy can move; leave it out"
    for volume in config.volumes:
        if not (volume.read_only or volume.shared):
            return (
                f"volumes: both versions would write to {volume.host_path!r}; "
                "set read_only, or shared if they may"
            )
    return None


class HealthCheckConfig(WireModel):
    """What proves the container well; the specification's `health_check_config`.

    `None` for the three `HEALTH_CHECK_*` settings means the host's own default (its environment).
    """

    health_endpoint: Annotated[str, AfterValidator(references.check_url_path)] | None = "/health"
    port: Port | None = Field(default=None, description="Container port to ask; default: the first mapping.")
    expected_status_code: Annotated[int, Field(ge=100, le=599)] = 200
    max_retries: Annotated[int, Field(ge=1, le=1000)] | None = None
    retry_interval_ms: Annotated[int, Field(ge=0, le=300_000)] | None = None
    timeout_ms: Annotated[int, Field(ge=1, le=300_000)] | None = None
    quiet_period_ms: Annotated[int, Field(ge=0, le=600_000)] = 1000
    consul_enabled: bool = False
    consul_url: Annotated[str, AfterValidator(references.check_consul_url)] = "http://127.0.0.1:8500"


class ImageAnnouncement(WireModel):
    """The image that was built: identity that holds on every engine, and its platform."""

    config_digest: ImageDigest
    layers: list[ImageDigest] = Field(description="RootFS.Layers, base first (diff ids).")
    architecture: str
    os: str = "linux"
    size_bytes: Annotated[int, Field(ge=0)]


class PackageAnnouncement(WireModel):
    """The package: its size and the BLAKE3 of all its bytes, and what its archive does not hold."""

    size_bytes: Annotated[int, Field(ge=1)]
    blake3: Blake3Digest
    format: PackageFormat = PackageFormat.ZSTD
    omitted_layers: list[ImageDigest] = Field(
        default=[], description="Diff ids of the image's layers that are not sent: of the known_layers only."
    )
    unpacked_bytes: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="Size of the archive before it was compressed."
    )


class DeployRequest(WireModel):
    """Body of `POST /api/deploy`. The specification's own client sends only the first three fields."""

    container_name: ContainerName
    image_tag: ImageTag = "latest"
    deployment_config: DeploymentConfig = DeploymentConfig()
    health_check_config: HealthCheckConfig = HealthCheckConfig()
    rollback_on_failure: bool = True
    workflow_id: WorkflowId | None = None
    image: ImageAnnouncement | None = None
    package: PackageAnnouncement | None = None
    transport: Transport = Transport.HTTP


class DeployAccepted(WireModel):
    """Answer to `POST /api/deploy` (201, or 200 when the same request had been taken before)."""

    deployment_id: str
    state: HostState
    image_present: bool = Field(description="The engine has the announced image: nothing to upload.")
    known_layers: list[str] = Field(
        description="Announced diff ids that the engine has and loads without: they need not be sent."
    )
    upload_url: str
    upload_offset: int = Field(description="Bytes of the package that the host holds, all as they were sent.")
    chunk_bytes: int = Field(description="Largest chunk that one PATCH may carry.")
    incoming_path: str | None = Field(
        default=None, description="Where rsync may put the package, for `collect`; null for transport http."
    )


class RollbackRequest(WireModel):
    """Body of `POST /api/containers/{name}/rollback`: go back to a version that the host keeps."""

    to: Annotated[str, Field(min_length=1, max_length=128)] | None = Field(
        default=None, description="Deployment id or image tag of a kept version; null: the previous one."
    )
    workflow_id: WorkflowId | None = None


class ContainerVersion(WireModel):
    """One version of a container that the host has."""

    deployment_id: str
    image_tag: str
    image_id: str
    created_at: datetime
    running: bool
    role: Literal["running", "kept"] = Field(description="`running` has the container's name.")
    can_be_restored: bool = Field(description="The host knows how it was started.")


class ContainerVersions(WireModel):
    """Answer to `GET /api/containers/{name}`: its versions, newest first."""

    container_name: str
    versions: list[ContainerVersion]
    previous: str | None = Field(description="Deployment id that a rollback goes back to when it names none.")


class HostContainers(WireModel):
    """Answer to `GET /api/containers`."""

    containers: list[ContainerVersions]


class RollbackTarget(WireModel):
    """Answer to `GET /api/containers/{name}/rollback`: where the same POST would go back to."""

    version: ContainerVersion
    image: ImageAnnouncement
    health_check_config: HealthCheckConfig


class OperationResult(WireModel):
    """One operation of stage 3, stage 4 or the restore, as the host journalled it."""

    name: str
    stage: str
    success: bool
    started_at: datetime
    duration_ms: int
    message: str = ""


class HealthAttempt(WireModel):
    """One question put to the container."""

    attempt: int
    checked_at: datetime
    status: Literal["passed", "failed"]
    status_code: int | None = None
    duration_ms: int
    message: str = ""


class QualityGate(WireModel):
    """One named check of a stage."""

    name: str
    stage: str
    passed: bool
    message: str = ""


class HostFacts(WireModel):
    """What the host found out and did; fields fill up as the deployment goes on."""

    image_id: str | None = None
    image_config_digest: str | None = None
    container_id: str | None = None
    container_started_at: str | None = None
    previous_container_id: str | None = None
    previous_image_id: str | None = None
    host_port: int | None = None
    service_interruption_ms: int | None = None
    container_running: bool | None = None
    health_endpoint_accessible: bool | None = None
    service_registered: bool | None = None
    previous_container_restored: bool | None = None
    rollback_duration_ms: int | None = None
    restored_from: str | None = Field(
        default=None, description="Deployment id of the kept version that a rollback by hand went back to."
    )
    log_tail: str = ""


class DeploymentStatus(WireModel):
    """Answer to `GET /api/deploy/{id}/status`; `is_held` while a process on the host works on it."""

    deployment_id: str
    workflow_id: str | None
    container_name: str
    image_tag: str
    state: HostState
    upload_offset: int
    package_bytes: int | None
    facts: HostFacts
    operations: list[OperationResult]
    health_attempts: list[HealthAttempt]
    gates: list[QualityGate]
    error_code: ErrorCode | None = None
    error_message: str | None = None
    is_held: bool = False
    created_at: datetime
    updated_at: datetime


class HostHealth(WireModel):
    """Answer to `GET /health`: 200 when the engine answers, else 503."""

    status: Literal["healthy", "degraded"]
    docker_connected: bool
    version: str
    architecture: str | None = None
    engine_version: str | None = None
    time: datetime


class HostEngine(WireModel):
    """The host's Docker Engine."""

    version: str
    architecture: str
    os: str
    storage_driver: str


class HostDisk(WireModel):
    """Room below a folder that deployments write to; folders of one `device` share it."""

    path: str
    device: str
    free_bytes: Annotated[int, Field(ge=0)]
    total_bytes: Annotated[int, Field(ge=0)]


class HostPort(WireModel):
    """One host port that was asked for; `container_name` is set when a container of ours holds it."""

    port: Port
    protocol: Literal["tcp", "udp"]
    free: bool
    holder: str | None = Field(default=None, description="Who holds it, as far as the receiver can see.")
    container_name: str | None = None


class OpenDeployment(WireModel):
    """A deployment that is not at rest, or whose restore failed and that nothing has settled since."""

    deployment_id: str
    workflow_id: str | None
    container_name: str
    image_tag: str
    state: HostState
    is_held: bool
    updated_at: datetime


class HostProxy(WireModel):
    """The host's HAProxy, which strategy `rolling` needs, and the services whose ports it holds."""

    version: str | None = Field(description="None where it is not installed.")
    runs: bool = Field(description="It runs, and answers.")
    services: list[str]
    left_out: list[str] = Field(description="Services without which it was started: it refuses their routes.")


class HostReport(WireModel):
    """Answer to `GET /api/host?port=8080/tcp&proxy=true`; `settings` holds no secret."""

    version: str
    time: datetime
    engine: HostEngine | None = Field(description="None while the engine does not answer.")
    disks: list[HostDisk]
    ports: list[HostPort]
    open_deployments: list[OpenDeployment]
    settings: dict[str, str]
    proxy: HostProxy | None = Field(default=None, description="Told to those who ask: it is newer.")


class Problem(BaseModel):
    """RFC 9457 problem details, with the specification's code and the operator's next step."""

    type: str
    title: str
    status: int
    detail: str
    error_code: ErrorCode
    next_step: str
    extra: dict[str, Any] = {}
