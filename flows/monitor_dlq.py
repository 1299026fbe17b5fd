"""`monitor-dlq`: tell people of failed deployments, and deploy one again when they ask for it."""

from __future__ import annotations

from typing import Annotated

from prefect import flow
from prefect.logging import get_run_logger
from pydantic import Field

from blocks.event_broker import EventBroker
from tasks import dead_letter_queue, dead_letters
from tasks.dead_letter_queue import DeadLetter, Malformed, Received
from tasks.outbox_producer import require_broker


@flow(name="monitor-dlq", flow_run_name="dead letters → {notification_block}")
async def monitor_dlq(
    notification_block: str,
    idle_seconds: Annotated[float, Field(gt=0)] = 10,
    max_messages: Annotated[int, Field(ge=1)] | None = None,
    redeploy: bool | str = False,
) -> dict[str, int]:
    """Notify of each dead letter through the block `type-slug/name`; commit it only after that.

    Ends after `idle_seconds` without a letter, or after `max_messages`. With `redeploy` true each letter
    that may be retried is deployed again, once; with a workflow's id only this one is, and none is read.
    """
    await dead_letters.check_notification_block(notification_block)
    broker = await require_broker()
    if isinstance(redeploy, str):
        await _deploy_again(await dead_letter_queue.find_dead_letter(broker, redeploy))
        return {"notified": 0, "redeployed": 1}
    return await _monitor(broker, notification_block, idle_seconds, max_messages, redeploy=redeploy)


async def _monitor(
    broker: EventBroker, block: str, idle_seconds: float, max_messages: int | None, *, redeploy: bool
) -> dict[str, int]:
    told = {"notified": 0, "redeployed": 0}
    async with dead_letter_queue.dead_letters(broker) as letters:
        while told["notified"] != max_messages and (received := await letters.next(idle_seconds)):
            told["redeployed"] += await _handle(received, block, redeploy=redeploy)
            await letters.commit(received)
            told["notified"] += 1
    get_run_logger().info("%d dead letters notified, %d deployed again", *told.values())
    return told


async def _handle(received: Received, block: str, *, redeploy: bool) -> bool:
    """Notify first: an alert must not wait for what else may fail. True when it is deployed again."""
    letter = received.content
    if not redeploy or isinstance(letter, Malformed):
        await dead_letters.notify(block, *dead_letters.message_of(letter))
        return False
    refusal = await dead_letters.automatic_refusal(letter)
    outcome = f"no: {refusal}" if refusal else "yes"
    await dead_letters.notify(block, *dead_letters.message_of(letter, outcome))
    if refusal is None:
        await _deploy_again(letter)
    return refusal is None


async def _deploy_again(letter: DeadLetter) -> None:
    run_id = await dead_letters.start_redeployment(letter)
    get_run_logger().info(
        "deploying again as flow run %s", run_id, extra={"correlation_id": letter.workflow_id}
    )
