"""`restore-container`: the previous container serves again; runs on the host."""

from __future__ import annotations

from prefect import flow

from flows.naming import name_as_started
from tasks.restore import restore_previous_container


def _run_name() -> str:
    return name_as_started("undo")


@flow(name="restore-container", flow_run_name=_run_name)
async def restore_container(deployment_id: str) -> str:
    """Undo a deployment on this host; returns the host state it ended in. Idempotent."""
    status = await restore_previous_container(deployment_id)
    return status.state.value
