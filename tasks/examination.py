"""Finds out how hosts and the control side are: everything at once, each part in bounded time.

Changes nothing and judges nothing. A part that does not answer is told as such; the rest is told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime

import httpx
from pydantic import ValidationError

from blocks.hmac_secret import HmacKeyMissing
from blocks.receiver_client import ReceiverClient, ReceiverError, ReceiverRefused
from blocks.remote_host import RemoteHost, find_remote_host, saved_host_names
from receiver.contract import DEFAULT_PORT, HostHealth, HostReport
from tasks.examination_control import examine_control
from tasks.examination_link import look_at_certificate, reach
from tasks.examination_prefect import place_of
from tasks.findings import (
    ControlFindings,
    Examination,
    HostFindings,
    HostLost,
    OpenWorkflow,
    Reach,
    Refused,
)

HOST_SECONDS = 15.0
FINDING_SECONDS = 10.0
HOST_FLOWS = ("receive-container", "restore-container")


async def examine(
    hosts: Sequence[str], ports: Sequence[str] = (), remote_port: int = DEFAULT_PORT
) -> Examination:
    """The control side and the named hosts, or all that are saved; `ports` as `8080/tcp`."""
    control = await examine_control()
    names, problem = await _names(hosts, control)
    found = await asyncio.gather(*(_examine(name, remote_port, ports, control) for name in names))
    lost = (HostLost("all saved hosts", problem, needs_prefect=True),) if problem else ()
    return Examination(control, (*lost, *found))


async def _names(hosts: Sequence[str], control: ControlFindings) -> tuple[list[str], str | None]:
    if hosts:
        return list(dict.fromkeys(hosts)), None
    if control.prefect.problem:
        return [], "which hosts are saved cannot be told without the Prefect server"
    async with asyncio.timeout(FINDING_SECONDS):
        return await saved_host_names(), None


async def _examine(
    name: str, remote_port: int, ports: Sequence[str], control: ControlFindings
) -> HostFindings | HostLost:
    if control.prefect.problem:
        return HostLost(name, "its block cannot be read without the Prefect server", needs_prefect=True)
    try:
        async with asyncio.timeout(FINDING_SECONDS):
            host = await find_remote_host(name, remote_port)
        async with asyncio.timeout(HOST_SECONDS):
            return await examine_host(host, ports, control)
    except (HmacKeyMissing, ValidationError, httpx.HTTPError) as exc:
        return HostLost(name, _one_line(exc))
    except TimeoutError:
        return HostLost(name, f"not examined within {FINDING_SECONDS + HOST_SECONDS:.0f} s")


async def examine_host(host: RemoteHost, ports: Sequence[str], control: ControlFindings) -> HostFindings:
    """One host, from the connection to its place in Prefect."""
    flows = tuple(f"{flow}/{host.deployment_name}" for flow in HOST_FLOWS)
    link, place = await asyncio.gather(
        reach(host.address, host.port), place_of(host.work_pool_name, flows, control.prefect)
    )
    reached = link.reach is Reach.REACHED
    heard = await _ask(host, ports) if reached else _Heard()
    return HostFindings(
        name=host.name,
        address=host.address,
        port=host.port,
        tls=host.tls,
        link=link,
        looked_at=datetime.now(UTC),
        certificate=await look_at_certificate(host) if reached and host.tls else None,
        health=heard.health,
        clock_offset_seconds=heard.clock_offset_seconds,
        report=heard.report,
        refused=heard.refused,
        problem=heard.problem,
        wanted_ports=tuple(ports),
        place=place,
        open_workflows=_of_host(host, control),
        build_engine=control.build_engine,
    )


class _Heard:
    """What the receiver answered: an open call, then a signed one."""

    def __init__(self) -> None:
        self.health: HostHealth | None = None
        self.clock_offset_seconds: float | None = None
        self.report: HostReport | None = None
        self.refused: Refused | None = None
        self.problem: str | None = None

    async def ask(self, receiver: ReceiverClient, ports: Sequence[str]) -> None:
        """Both calls."""
        try:
            before = datetime.now(UTC)
            self.health = await receiver.health()
            self.clock_offset_seconds = _offset(self.health.time, before, datetime.now(UTC))
            self.report = await receiver.report(ports, proxy=True)
        except ReceiverRefused as exc:
            self.refused = _refused(exc)
        except ReceiverError as exc:
            self.problem = _one_line(exc)


async def _ask(host: RemoteHost, ports: Sequence[str]) -> _Heard:
    heard = _Heard()
    async with host.receiver() as receiver:
        await heard.ask(receiver, ports)
    return heard


def _offset(told: datetime, before: datetime, after: datetime) -> float:
    """Seconds that the host's clock is ahead; it told the time somewhere between before and after."""
    return (told - (before + (after - before) / 2)).total_seconds()


def _refused(exc: ReceiverRefused) -> Refused:
    kind = exc.type.rpartition(":")[2]
    return Refused(exc.status, kind, exc.title, exc.detail, exc.next_step, exc.refusal.extra)


def _of_host(host: RemoteHost, control: ControlFindings) -> tuple[OpenWorkflow, ...] | None:
    if control.records.problem:
        return None
    mine = {host.name, host.address}
    return tuple(found for found in control.records.open_workflows if found.remote_host in mine)


def _one_line(exc: Exception) -> str:
    if isinstance(exc, ValidationError):
        return "; ".join(str(error["msg"]) for error in exc.errors(include_input=False))
    return " ".join(str(exc).split())
