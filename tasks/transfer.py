"""Stage 2 on the control host: reach the receiver, announce, upload, verify. One signed call each.

`send_deployment_request` and `upload_package` are safe to repeat: the idempotency key gives the same
deployment, and the upload goes on from the host's offset.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from prefect.logging import get_run_logger
from prefect.utilities.slugify import slugify

from blocks.receiver_client import Progress, ReceiverRefused
from blocks.remote_host import RemoteHost
from receiver.contract import (
    DeployAccepted,
    DeploymentStatus,
    DeployRequest,
    HostHealth,
    HostState,
    QualityGate,
    Stage,
)
from tasks import progress, rsync
from tasks.errors import RetryPolicy, TransferFailed
from tasks.logs import RunLogger
from tasks.package import ImagePackage
from tasks.policies import operation
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
    """Announce image, package and configuration; returns the host's deployment id."""
    async with host.receiver(correlation_id=request.workflow_id) as receiver:
        return await receiver.announce(request, idempotency_key)


@operation("upload_package", Stage.TRANSFER, policy=UPLOAD_POLICY, timeout=False)
async def upload_package(
    host: RemoteHost,
    deployment_id: str,
    package: ImagePackage,
    correlation_id: str,
    incoming_path: str | None = None,
) -> int:
    """Send what the host does not hold yet; returns the bytes it took. Tells each tenth of the way.

    By rsync where the host named a path for that.
    """
    what = f"Uploading {size(package.size_bytes)} to {host.name}"
    try:
        with package_in_use(package.path):
            async with (
                progress.shown(f"upload-to-{slugify(host.name)}", what) as tell,
                host.receiver(correlation_id=correlation_id) as receiver,
            ):
                told = _log_and_tell(get_run_logger(), tell)
                if incoming_path is not None:
                    goal = rsync.Goal(host, deployment_id, incoming_path)
                    return await rsync.upload(receiver, goal, package.path, told)
                return await receiver.upload(deployment_id, package.path, progress=told)
    except FileNotFoundError as exc:
        raise TransferFailed(
            f"the package {package.path} is gone",
            next_step="Deploy again: it is exported anew.",
            retryable=False,
        ) from exc


def _log_and_tell(logger: RunLogger, tell: progress.Tell) -> Progress:
    """What to do with each chunk that has arrived."""
    logged = 0

    def told(held_bytes: int, package_bytes: int) -> None:
        nonlocal logged
        percent = 100 * held_bytes / max(package_bytes, 1)
        held = f"{size(held_bytes)} of {size(package_bytes)}"
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
        raise
    stage.gates += transfer_gates(_proven(stage))


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
