"""Stage 2 on the control host: reach the receiver, announce the image, export and upload, verify.

`send_deployment_request` and `upload_package` are safe to repeat: the idempotency key gives the same
deployment, and the upload goes on from what the host holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from prefect.logging import get_run_logger
from prefect.utilities.slugify import slugify

from blocks import package_stream
from blocks.receiver_client import Progress, ReceiverClient, ReceiverRefused
from blocks.remote_host import RemoteHost
from receiver.contract import (
    DeployAccepted,
    DeploymentStatus,
    DeployRequest,
    HostHealth,
    HostState,
    PackageFormat,
    QualityGate,
    Stage,
)
from tasks import exports, progress, rsync, shared_package
from tasks.delivery import Delivery, delivered
from tasks.errors import RetryPolicy, TransferFailed
from tasks.exports import Export, ExportFailed
from tasks.logs import RunLogger
from tasks.package import ImageMetadata
from tasks.policies import operation
from tasks.shared_package import PackageKey, SharedPackage
from tasks.stage import StageRun
from tasks.store import package_in_use
from tasks.wording import size

UPLOAD_POLICY = RetryPolicy(max_attempts=3)
_LOGGED_PERCENT = 10
_BEFORE_THE_SIGNATURE = frozenset({401, 403, 413, 429})  # answers that prove nothing of the key


@operation("establish_connection", Stage.TRANSFER)
async def establish_connection(host: RemoteHost, correlation_id: str) -> HostHealth:
    """Ask the receiver's health; raises `ReceiverUnreachable`, or `TransferFailed` without an engine."""
    return await ask_health(host, correlation_id)


async def ask_health(host: RemoteHost, correlation_id: str) -> HostHealth:
    """The health of a host whose engine answers; warns of its clock. Raises as `establish_connection`."""
    async with host.receiver(correlation_id=correlation_id) as receiver:
        health = await receiver.health()
    if not health.docker_connected:
        raise TransferFailed(
            f"the receiver at {host.base_url} answers, but its Docker Engine does not",
            next_step="On the host: systemctl status docker; then deploy again.",
        )
    _warn_of_skew(health)
    return health


def _warn_of_skew(health: HostHealth) -> None:
    skew_seconds = abs((datetime.now(UTC) - health.time).total_seconds())
    if skew_seconds > 30:
        get_run_logger().warning(
            "the host's clock is off by %.0f s; set both clocks by NTP (requests are refused past 300 s)",
            skew_seconds,
        )


@operation("send_deployment_request", Stage.TRANSFER)
async def send_deployment_request(
    host: RemoteHost, request: DeployRequest, idempotency_key: str
) -> DeployAccepted:
    """Announce image and configuration; returns the host's deployment id, and which layers it has."""
    async with host.receiver(correlation_id=request.workflow_id) as receiver:
        return await receiver.announce(request, idempotency_key)


@operation("upload_package", Stage.TRANSFER, policy=UPLOAD_POLICY, timeout=False)
async def upload_package(
    host: RemoteHost,
    accepted: DeployAccepted,
    metadata: ImageMetadata,
    package_format: PackageFormat,
    correlation_id: str,
) -> Delivery:
    """Send the layers that the host does not have, and of them what it does not hold yet.

    Exported, compressed and sent at the same time, unless the package is here already; by rsync, where the
    host named a path for that, once it is whole. Tells each tenth of the way.
    """
    omitted = frozenset(accepted.known_layers)
    key = PackageKey(metadata.image_id, metadata.reference, tuple(sorted(omitted)), package_format)

    def export() -> Export:
        return exports.open_export(metadata.image_id, metadata.reference, omitted)

    async with (
        progress.shown(
            f"upload-to-{slugify(host.name)}", f"Uploading {metadata.reference} to {host.name}"
        ) as tell,
        host.receiver(correlation_id=correlation_id) as receiver,
    ):
        told = _log_and_tell(get_run_logger(), tell, metadata.image_size_bytes)
        with shared_package.opened(key, export) as shared:
            if accepted.incoming_path is None:
                sent_bytes = await package_stream.send(
                    receiver, accepted.deployment_id, shared, progress=told
                )
            else:
                sent_bytes = await _send_by_rsync(receiver, host, accepted.deployment_id, shared, told)
            return delivered(await shared.finished(), metadata.layers, sent_bytes)


async def _send_by_rsync(
    receiver: ReceiverClient, host: RemoteHost, deployment_id: str, shared: SharedPackage, told: Progress
) -> int:
    package = await shared.finished()
    try:
        with package_in_use(package.path):
            accepted = await receiver.announce_package(deployment_id, package.announcement())
            if accepted.incoming_path is None:
                return 0
            goal = rsync.Goal(host, deployment_id, accepted.incoming_path)
            return await rsync.upload(receiver, goal, package.path, told)
    except FileNotFoundError as exc:
        raise TransferFailed(
            f"the package {package.path} is gone", next_step="Deploy again: it is exported anew."
        ) from exc


def _log_and_tell(logger: RunLogger, tell: progress.Tell, image_bytes: int) -> Progress:
    """What to do with each chunk that has arrived; before the package is whole, the image is its measure."""
    logged = 0

    def told(held_bytes: int, package_bytes: int) -> None:
        nonlocal logged
        percent = min(100 * held_bytes / max(package_bytes or image_bytes, 1), 100)
        held = (
            f"{size(held_bytes)} of {size(package_bytes)}" if package_bytes else f"{size(held_bytes)} so far"
        )
        tell(percent, held)
        if percent // _LOGGED_PERCENT > logged:
            logged = int(percent // _LOGGED_PERCENT)
            logger.info("uploaded %.0f %% (%s)", percent, held)

    return told


@operation("verify_transfer", Stage.TRANSFER)
async def verify_transfer(host: RemoteHost, deployment_id: str, correlation_id: str) -> DeploymentStatus:
    """The host has verified the whole package; raises `TransferFailed` otherwise."""
    async with host.receiver(correlation_id=correlation_id) as receiver:
        status = await receiver.status(deployment_id)
    if status.state is not HostState.READY:
        raise TransferFailed(
            f"after the upload the host says {status.state}: {status.error_message or 'no cause given'}",
            retryable=False,
        )
    return status


@contextmanager
def gated(stage: StageRun) -> Iterator[None]:
    """Add the gates of stage 2 to `stage`, passed or not, by what its operations have proven."""
    try:
        yield
    except BaseException as exc:
        stage.gates += transfer_gates(_proven(stage), exc)
        if isinstance(exc, ExportFailed):
            stage.gates.append(package_gate(exc))
        raise
    stage.gates += transfer_gates(_proven(stage))


def package_gate(made: Delivery | ExportFailed) -> QualityGate:
    """Whether the package was complete but for the layers that the host has."""
    passed = isinstance(made, Delivery)
    return QualityGate(name="package_complete", stage=Stage.TRANSFER, passed=passed, message=str(made))


def _proven(stage: StageRun) -> set[str]:
    return {done.name for done in stage.operations if done.success}


def transfer_gates(done: set[str], error: BaseException | None = None) -> list[QualityGate]:
    """The gates of stage 2 after the operations in `done`; a gate that nothing proved is not passed."""
    knows_the_key = isinstance(error, ReceiverRefused) and error.status not in _BEFORE_THE_SIGNATURE
    gates = {
        "remote_endpoint_reachable": "establish_connection" in done,
        "transfer_acknowledged": "verify_transfer" in done,
        "hmac_authentication_successful": "send_deployment_request" in done
        or ("establish_connection" in done and knows_the_key),
    }
    message = (str(error) or type(error).__name__) if error else ""
    return [
        QualityGate(name=name, stage=Stage.TRANSFER, passed=passed, message="" if passed else message)
        for name, passed in gates.items()
    ]
