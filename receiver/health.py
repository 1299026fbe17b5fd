"""Is this container well: still the same process, and its health endpoint answers. Changes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx

from receiver.contract import HealthAttempt, HealthCheckConfig
from receiver.engine import ContainerState
from receiver.ledger import utc_now
from receiver.settings import ReceiverSettings

BACKOFF_MULTIPLIER = 1.2
MAX_INTERVAL_SECONDS = 30.0
_RECONNECT_SECONDS = 0.1
_LOOKING_SECONDS = 0.05
_NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # for http alone: loading trusted CAs takes 20 ms and more


class ContainerUnwell(Exception):
    """The container is not healthy"""


@dataclass(frozen=True)
class Probe:
    """What to ask, how often and how patiently."""

    url: str
    expected_status_code: int
    max_retries: int
    retry_interval_seconds: float
    timeout_seconds: float

    def intervals_seconds(self) -> list[float]:
        """Waiting time after each attempt, growing by 1.2 up to 30 s, or to what was asked for."""
        longest = max(MAX_INTERVAL_SECONDS, self.retry_interval_seconds)
        return [
            min(self.retry_interval_seconds * BACKOFF_MULTIPLIER**attempt, longest)
            for attempt in range(self.max_retries)
        ]


def make_probe(config: HealthCheckConfig, settings: ReceiverSettings, url: str) -> Probe:
    """The deployment's own figures, else the host's (`HEALTH_CHECK_*`)."""
    interval_ms = config.retry_interval_ms
    if interval_ms is None:
        interval_ms = settings.health_check_retry_interval_ms
    return Probe(
        url=url,
        expected_status_code=config.expected_status_code,
        max_retries=config.max_retries or settings.health_check_max_retries,
        retry_interval_seconds=interval_ms / 1000,
        timeout_seconds=(config.timeout_ms or settings.health_check_timeout_ms) / 1000,
    )


def check_running(state: ContainerState, started_at: str | None) -> None:
    """Raise `ContainerUnwell` unless the process that was started is the one that runs now."""
    if not state.running:
        raise ContainerUnwell(
            f"the container is {state.status} (exit code {state.exit_code}){': ' if state.error else ''}"
            f"{state.error}; see its last log lines in the report"
        )
    if state.restart_count or (started_at and state.started_at != started_at):
        raise ContainerUnwell(
            f"the container restarted {max(state.restart_count, 1)} time(s) since it was started; "
            "see its last log lines in the report"
        )
    if state.health == "unhealthy":
        raise ContainerUnwell("the image's own HEALTHCHECK says unhealthy")


async def ask_until_healthy(probe: Probe, observe: Callable[[HealthAttempt], None]) -> HealthAttempt:
    """Ask until the endpoint answers as expected; tell `observe` of each attempt.

    Raises `ContainerUnwell` after `max_retries` attempts.
    """
    last: HealthAttempt | None = None
    # timeout=None: the probe has its own, and httpx would cut a longer one at 5 s
    async with httpx.AsyncClient(trust_env=False, timeout=None, verify=_NO_TLS) as client:  # noqa: S113
        for number, interval in enumerate(probe.intervals_seconds(), start=1):
            began = time.monotonic()
            last = await _attempt(client, probe, number, interval)
            observe(last)
            if last.status == "passed":
                return last
            if number < probe.max_retries:
                await asyncio.sleep(max(0.0, interval - (time.monotonic() - began)))
    said = last.message if last else "never asked"
    raise ContainerUnwell(
        f"health endpoint {probe.url} failed {probe.max_retries} attempt(s); the last one said: {said}"
    )


async def first_answer(probe: Probe) -> None:
    """Return when the endpoint answers as expected; proves nothing, and is asked until it is cancelled."""
    seconds = probe.timeout_seconds
    async with httpx.AsyncClient(trust_env=False, timeout=seconds, verify=_NO_TLS) as client:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get(probe.url)).status_code == probe.expected_status_code:
                    return
            await asyncio.sleep(_LOOKING_SECONDS)


async def _attempt(client: httpx.AsyncClient, probe: Probe, number: int, interval: float) -> HealthAttempt:
    """One attempt; a refused connection is asked again within it, since the service may be starting."""
    checked_at, began = utc_now(), time.monotonic()
    status_code: int | None = None
    while True:
        try:
            async with asyncio.timeout(probe.timeout_seconds):
                status_code = (await client.get(probe.url)).status_code
            message = f"HTTP {status_code}, expected {probe.expected_status_code}"
            break
        except (httpx.NetworkError, httpx.RemoteProtocolError) as exc:
            message = f"no answer: {type(exc).__name__} {exc}".strip()
            if time.monotonic() - began + _RECONNECT_SECONDS >= interval:
                break
            await asyncio.sleep(_RECONNECT_SECONDS)
        except (httpx.HTTPError, TimeoutError) as exc:
            message = f"no answer within {probe.timeout_seconds:g} s ({type(exc).__name__})"
            break
    return HealthAttempt(
        attempt=number,
        checked_at=checked_at,
        status="passed" if status_code == probe.expected_status_code else "failed",
        status_code=status_code,
        duration_ms=int((time.monotonic() - began) * 1000),
        message=message,
    )
