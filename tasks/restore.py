"""The way back on the host: record why, and bring the previous container back."""

from __future__ import annotations

from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from docker.errors import APIError
from prefect import Task
from prefect.logging import get_run_logger

from receiver.contract import DeploymentStatus, DeployRequest, ErrorCode, Stage
from receiver.health import ContainerUnwell
from receiver.locks import Hold
from receiver.proxy import ProxyFailed
from tasks.errors import GantryError, RetryPolicy
from tasks.hosting import this_host
from tasks.logs import correlated
from tasks.policies import operation
from tasks.wording import UNDO

_RESTORE_SECONDS = 120.0
_RESTORE = RetryPolicy(max_attempts=1, timeout_ms=int(_RESTORE_SECONDS * 1000))


@dataclass(frozen=True)
class HeldContainer:
    """A container that this process alone works on, by the request that the host verified."""

    request: DeployRequest
    hold: Hold

    async def take(
        self, step: Task[[str], Coroutine[Any, Any, None]], deployment_id: str, seconds: float | None = None
    ) -> None:
        """Take a step within `seconds` (default: its policy's); one that hangs is ended by the guardian."""
        limit = seconds or float(step.timeout_seconds or _RESTORE_SECONDS)
        self.hold.within(limit)
        await step.with_options(timeout_seconds=limit)(deployment_id)


@contextmanager
def hold_container(deployment_id: str) -> Iterator[HeldContainer]:
    """Hold the lock of the deployment's container; raises `LockHeld`."""
    host = this_host()
    with host.hold(deployment_id) as hold:
        request = host.ledger.get(deployment_id).request
        with correlated(request.workflow_id):
            yield HeldContainer(request, hold)


def record_failure(deployment_id: str, error: Exception) -> tuple[ErrorCode, str]:
    """Write code and cause to the host's ledger; returns both."""
    host = this_host()
    done = host.ledger.operations(deployment_id)
    code, cause = _code_of(error, done[-1].stage if done else None), _cause_of(error)
    host.operations(deployment_id).fail(code, cause)
    return code, cause


def _code_of(error: Exception, stage: str | None) -> ErrorCode:
    if isinstance(error, TimeoutError):
        return ErrorCode.TIMEOUT
    if isinstance(error, GantryError) and error.error_code:
        return error.error_code
    if isinstance(error, ProxyFailed):
        return ErrorCode.DEPLOYMENT_FAILED
    unwell = isinstance(error, ContainerUnwell) or stage == Stage.VALIDATE
    return ErrorCode.HEALTH_CHECK_FAILED if unwell else ErrorCode.DEPLOYMENT_FAILED


def _cause_of(error: Exception) -> str:
    said = error.explanation if isinstance(error, APIError) and error.explanation else error
    return " ".join(str(said).split()) or type(error).__name__


async def restore_at_once(held: HeldContainer, deployment_id: str) -> None:
    """Restore without a word to Prefect: while nothing serves, its server is not waited for."""
    held.hold.within(_RESTORE_SECONDS)
    await this_host().restore(deployment_id)


@operation("restore_previous_container", UNDO, policy=_RESTORE)
async def restore_previous_container(deployment_id: str) -> DeploymentStatus:
    """Take the failed container away and bring the previous one back; idempotent."""
    with correlated(this_host().ledger.get(deployment_id).request.workflow_id):
        status = await this_host().restore(deployment_id)
        get_run_logger().info("the deployment is %s on this host", status.state)
        return status
