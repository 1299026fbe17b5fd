"""`doctor`: how the control side and hosts are, each check with the command that mends it."""

from __future__ import annotations

from typing import Any

from prefect import State, flow
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Failed

from receiver.contract import DEFAULT_PORT, Port
from tasks import checkup, verdicts
from tasks.parameters import RemoteHostName


def _run_name() -> str:
    return f"doctor of {flow_run.parameters.get('remote_host') or 'all hosts'}"


@flow(name="doctor", flow_run_name=_run_name)
async def doctor(
    remote_host: RemoteHostName | None = None,
    ports: list[checkup.WantedPort] = [],  # noqa: B006 - not changed
    remote_port: Port = DEFAULT_PORT,
) -> list[dict[str, str]] | State[Any]:
    """Examine a host, or every saved one, and the control side; returns the checks as rows.

    `ports` are host ports that a deployment wants, as `8080/tcp`. Failed when a check fails: its message
    says which, and what mends it.
    """
    diagnoses = await checkup.check_up([remote_host] if remote_host else [], ports, remote_port)
    for diagnosis in diagnoses:
        get_run_logger().info(verdicts.render(diagnosis))
        await checkup.show(diagnosis)
    rows, told = verdicts.rows_of(diagnoses), verdicts.summary(diagnoses)
    if verdicts.has_failed(diagnoses):
        return Failed(message=told, data=rows)
    get_run_logger().info(told)
    return rows
