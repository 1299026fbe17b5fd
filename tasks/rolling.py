"""What a rolling update does on the host after stage 3: move the traffic, let the old one finish, stop it."""

from __future__ import annotations

from receiver.contract import DeployRequest, Stage
from receiver.proxy import CLOSING_SECONDS, PATIENCE_SECONDS
from tasks.errors import OPERATION_POLICIES, RetryPolicy
from tasks.hosting import this_host
from tasks.policies import operation

_OWN_SECONDS = 10.0
_NO_LIMIT = RetryPolicy(max_attempts=1)


def switch_seconds(request: DeployRequest) -> float:
    """Time to move the traffic; an old container that holds the ports itself is stopped before."""
    return request.deployment_config.stop_timeout_seconds + PATIENCE_SECONDS + _OWN_SECONDS


def drain_seconds(request: DeployRequest) -> float:
    """Time for the requests in flight: what was asked for, and that to close the rest."""
    return request.deployment_config.drain_timeout_seconds + CLOSING_SECONDS + _OWN_SECONDS


def stop_seconds(request: DeployRequest) -> float:
    """Time to stop the old container: its grace, and the policy's on top."""
    policy = OPERATION_POLICIES["stop_existing_container"]
    return request.deployment_config.stop_timeout_seconds + policy.timeout_ms / 1000


@operation("switch_traffic", Stage.VALIDATE, policy=_NO_LIMIT, attempts=1, timeout=False)
async def switch_traffic(deployment_id: str) -> None:
    """Let the public ports lead to the new container."""
    await this_host().rolling(deployment_id).switch_traffic()


@operation("drain_existing_container", Stage.VALIDATE, policy=_NO_LIMIT, attempts=1, timeout=False)
async def drain_existing_container(deployment_id: str) -> None:
    """Wait until no request is in flight on the old container."""
    await this_host().rolling(deployment_id).drain_existing_container()


@operation("stop_existing_container", Stage.VALIDATE, attempts=1, timeout=False)
async def stop_idle_container(deployment_id: str) -> None:
    """Stop the old container, which is idle, and keep it for the way back."""
    await this_host().operations(deployment_id).stop_existing_container()
