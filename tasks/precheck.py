"""The cheap part of `doctor`, before anything is built: two calls to the host and one to Prefect.

The host is reached, its engine answers, its clock fits and it takes our key: else the deployment ends here,
with nothing touched. A worker that is away is a warning alone: it may be back when it is needed.
"""

from __future__ import annotations

import asyncio

import httpx
from prefect.client.orchestration import get_client
from prefect.logging import get_run_logger

from blocks.receiver_client import ReceiverRefused, ReceiverUnreachable
from blocks.remote_host import RemoteHost
from receiver.contract import HostHealth, Stage
from tasks.diagnosis_prefect import judge_pool
from tasks.errors import OPERATION_POLICIES
from tasks.examination_prefect import find_pool
from tasks.policies import operation
from tasks.transfer import ask_health
from tasks.verdicts import Verdict

# As patient as the connection of stage 2; a try ends before its time is up, so that it is told as what it is.
_POLICY = OPERATION_POLICIES["establish_connection"]
_TRY_SECONDS = _POLICY.timeout_ms / 1000 - 0.5
_POOL_SECONDS = 2.0
_NOT_FOUND = 404


@operation("check_host", Stage.PACKAGE, policy=_POLICY)
async def check_host(host: RemoteHost, correlation_id: str) -> HostHealth:
    """The host's health, once it has taken a signed call; raises as `establish_connection`, and refusals."""
    return await look(host, correlation_id)


async def look(host: RemoteHost, correlation_id: str) -> HostHealth:
    """The same, tried once."""
    try:
        async with asyncio.timeout(_TRY_SECONDS):
            health = await ask_health(host, correlation_id)
            await _ask_signed(host, correlation_id)
    except TimeoutError as exc:
        raise ReceiverUnreachable(host.base_url, f"no answer in {_TRY_SECONDS} s") from exc
    return health


async def _ask_signed(host: RemoteHost, correlation_id: str) -> None:
    async with host.receiver(correlation_id=correlation_id) as receiver:
        try:
            await receiver.report()
        except ReceiverRefused as exc:
            if exc.status != _NOT_FOUND:  # an older receiver knows the key, and not the call
                raise


async def warn_of_pool(host: RemoteHost) -> None:
    """Log what keeps the host's worker from taking the run of stage 3."""
    try:
        async with asyncio.timeout(_POOL_SECONDS), get_client() as client:
            pool = await find_pool(client, host.work_pool_name)
    except (httpx.HTTPError, TimeoutError):
        return  # a busy server: stage 3 asks it again, and tells
    for check in judge_pool(host.work_pool_name, pool, "register the host: python -m deployments.register"):
        if check.verdict is not Verdict.PASS:
            get_run_logger().warning("%s: %s; mend: %s", check.name, check.found, check.mend)
