"""A check-up from examination to diagnosis, and its table in the UI."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from prefect.artifacts import acreate_table_artifact
from prefect.utilities.slugify import slugify
from pydantic import Field

from receiver.contract import DEFAULT_PORT
from tasks.diagnosis import judge_host
from tasks.diagnosis_control import judge_control
from tasks.examination import examine
from tasks.verdicts import Diagnosis, Verdict, rows_of

WantedPort = Annotated[
    str, Field(pattern=r"^[1-9][0-9]{0,4}(/(tcp|udp))?$", description="A host port, as 8080/tcp or 53/udp.")
]


async def check_up(
    hosts: Sequence[str], ports: Sequence[str] = (), remote_port: int = DEFAULT_PORT
) -> list[Diagnosis]:
    """The control side, then the named hosts, or all that are saved."""
    found = await examine(hosts, ports, remote_port)
    return [judge_control(found.control), *(judge_host(host) for host in found.hosts)]


async def show(diagnosis: Diagnosis) -> None:
    """Write the table artifact `doctor-<subject>`; what is not passed comes first."""
    rows = sorted(rows_of([diagnosis]), key=lambda row: row["verdict"] == Verdict.PASS)
    failed, warned = (len(diagnosis.with_verdict(verdict)) for verdict in (Verdict.FAIL, Verdict.WARN))
    await acreate_table_artifact(
        table=rows,
        key=f"doctor-{slugify(diagnosis.subject)}",
        description=f"{diagnosis.subject}: {failed} failed, {warned} warned, {len(rows)} checks",
    )
