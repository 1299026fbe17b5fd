"""`receive-container`: stages 3 and 4, on the host, by the host's own worker.

Takes only a deployment id: what to run comes from the signed request in the host's ledger.
"""

from __future__ import annotations

from typing import Any

from prefect import State, flow
from prefect.states import Failed

from flows.naming import name_as_started
from flows.restore import restore_container
from receiver.contract import Strategy
from tasks import execute, restore, rolling, validate


def _run_name() -> str:
    return name_as_started("receive")


@flow(name="receive-container", flow_run_name=_run_name)
async def receive_container(deployment_id: str) -> State[Any] | None:
    """Prepare, switch, validate, keep; on failure restore at once, with the lock still held.

    The outcome for the control host is in the ledger; Prefect's state repeats it in one line.
    """
    with restore.hold_container(deployment_id) as held:
        request, take = held.request, held.take
        is_rolling = request.deployment_config.way is Strategy.ROLLING
        try:
            await take(execute.deploy_container, deployment_id, execute.deploy_seconds(request))
            if not is_rolling:
                await take(execute.stop_existing_container, deployment_id, execute.stop_seconds(request))
            await take(execute.start_container, deployment_id)
            await take(validate.check_container_status, deployment_id, validate.status_seconds(request))
            await take(validate.validate_health_endpoint, deployment_id, validate.health_seconds(request))
            await take(validate.verify_service_registration, deployment_id)
            if is_rolling:
                await _take_over(held, deployment_id)
            await take(validate.keep_container, deployment_id)
        except Exception as exc:  # noqa: BLE001 - whatever failed, the previous container serves again
            code, cause = restore.record_failure(deployment_id, exc)
            if request.rollback_on_failure:
                await restore.restore_at_once(held, deployment_id)
                shown = restore_container.with_options(
                    flow_run_name=f"undo {request.container_name}:{request.image_tag}"
                )
                await shown(deployment_id)  # finds it done: shows the restore in the UI
            return Failed(message=f"{code}: {cause}")
        await take(validate.retire_old_versions, deployment_id)
    return None


async def _take_over(held: restore.HeldContainer, deployment_id: str) -> None:
    """The proven container, beside the old one until now, gets the traffic; the old one ends its work."""
    request, take = held.request, held.take
    await take(rolling.switch_traffic, deployment_id, rolling.switch_seconds(request))
    await take(rolling.drain_existing_container, deployment_id, rolling.drain_seconds(request))
    await take(rolling.stop_idle_container, deployment_id, rolling.stop_seconds(request))
