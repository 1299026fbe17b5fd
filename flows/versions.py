"""`list-versions`: what hosts keep of each container, and where a rollback would go."""

from __future__ import annotations

from typing import Any

from prefect import State, flow
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Failed

from blocks.receiver_client import ReceiverError
from receiver.contract import DEFAULT_PORT, ContainerName, Port
from tasks import versions
from tasks.parameters import RemoteHostName


def _run_name() -> str:
    asked = flow_run.parameters
    return f"versions of {asked.get('container_name') or 'all'} on {asked.get('remote_host') or 'all hosts'}"


@flow(name="list-versions", flow_run_name=_run_name)
async def list_versions(
    remote_host: RemoteHostName | None = None,
    container_name: ContainerName | None = None,
    remote_port: Port = DEFAULT_PORT,
) -> list[dict[str, Any]] | State[Any]:
    """Show the versions that a host, or every saved host, keeps; returns them as rows.

    Hosts that cannot be asked are named at the end, and the run is Failed: its list is not whole.
    """
    rows: list[dict[str, Any]] = []
    silent: list[str] = []
    for host in await versions.hosts_to_ask(remote_host, remote_port):
        try:
            found = versions.rows_of(host, await versions.read_versions(host, container_name))
        except ReceiverError as exc:
            silent.append(f"{host.name}: {exc}")
            continue
        get_run_logger().info("%s keeps\n%s", host.name, versions.render(found) if found else "nothing")
        await versions.show(host, found)
        rows += found
    return Failed(message="; ".join(silent), data=rows) if silent else rows
