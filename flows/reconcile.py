"""`reconcile`: workflows whose run died are brought to what their host says, and ended.

Run by an automation when a run crashed or was cancelled, on a schedule, and by each deployment for those
before it of the same container; all three are this code.
"""

from __future__ import annotations

from prefect import State, flow
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from blocks.receiver_client import ReceiverError
from flows import ending
from receiver.contract import ContainerName
from tasks import forgotten, interrupted
from tasks.errors import RemoteEndpointUnreachable
from tasks.parameters import RemoteHostName
from tasks.records import Records, RecordsUnreachable
from tasks.states import WorkflowRecord
from tasks.workflow import Workflow


def _run_name() -> str:
    asked = flow_run.parameters
    if asked.get("workflow_id"):
        return f"reconcile workflow {asked['workflow_id'][:8]}"
    what = asked.get("container_name") or "all"
    return f"reconcile {what} on {asked.get('remote_host') or 'all hosts'}"


@flow(name="reconcile", flow_run_name=_run_name)
async def reconcile(
    workflow_id: str | None = None,
    container_name: ContainerName | None = None,
    remote_host: RemoteHostName | None = None,
) -> dict[str, list[str]]:
    """End workflows whose run died: completed, rolled back or failed, by what the host says.

    All of them, or those named; hosts then drop what they hold for workflows that have failed. Returns
    their ids as `ended`, `waiting` (the host is silent, or not done) and `alive` (their run goes on). Safe
    at any time, and twice at once.
    """
    found: dict[str, list[str]] = {"ended": [], "waiting": [], "alive": []}
    async with interrupted.open_records() as records:
        for record in await interrupted.unfinished(records, workflow_id, container_name, remote_host):
            found[await _take_over(records, record)].append(record.workflow_id)
        await forgotten.give_up_forgotten(records)
    get_run_logger().info("%s", ", ".join(f"{len(ids)} {kind}" for kind, ids in found.items()))
    return found


async def _take_over(records: Records, record: WorkflowRecord) -> str:
    """As `_settle`; what is odd about one workflow keeps no other from being ended."""
    try:
        async with interrupted.taken_over(records, record) as workflow:
            return await _settle(workflow)
    except RecordsUnreachable:
        raise
    except Exception:  # noqa: BLE001 - such as a host whose block and key are gone
        get_run_logger().exception("workflow %s cannot be ended", record.workflow_id)
        return "waiting"


async def finish_earlier(workflow: Workflow) -> None:
    """Before a deployment: end what an earlier one of this container left; its host has to be heard.

    Raises `RemoteEndpointUnreachable` when that cannot be done: nobody knows what runs there.
    """
    records, asked = workflow.records, workflow.parameters
    for record in await interrupted.unfinished(records, None, asked.container_name, asked.remote_host):
        if record.workflow_id == workflow.workflow_id:
            continue
        async with interrupted.continued(records, record.workflow_id) as earlier:
            if await _settle(earlier) == "waiting":
                raise RemoteEndpointUnreachable(
                    f"workflow {record.workflow_id} of the same container is {record.current_state}, and "
                    f"{asked.remote_host} does not say how it ended"
                )


async def _settle(workflow: Workflow | None) -> str:
    """End one workflow; tells under which heading it belongs."""
    if workflow is None:
        return "alive"
    cause, is_cancelled = await interrupted.cause_of(workflow)
    try:
        status = await interrupted.find_on_host(workflow)
    except ReceiverError as exc:
        if workflow.is_with_host:
            get_run_logger().warning("%s: %s", workflow.workflow_id, exc, extra=workflow.identity)
            return "waiting"
        status = None
    await interrupted.find_host_run(workflow)
    if status is not None and workflow.is_with_host and not is_cancelled and status.operations:
        await interrupted.let_host_finish(workflow, status)
    ended = await ending.end(workflow, cause, is_cancelled=is_cancelled)
    if isinstance(ended, State) and not workflow.state.terminal:
        return "waiting"
    return "ended"
