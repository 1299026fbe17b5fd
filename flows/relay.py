"""`relay-events`: publish the outbox to Kafka from time to time, where no relay runs all the time."""

from __future__ import annotations

from typing import Annotated

from prefect import flow
from prefect.logging import get_run_logger
from pydantic import Field

from blocks.records_database import find_records_url
from tasks.outbox import EventsWaiting, run_relay
from tasks.outbox_producer import require_broker


@flow(name="relay-events", flow_run_name="publish waiting events for {seconds} s")
async def relay_events(
    seconds: Annotated[float, Field(gt=0)] = 50, until_empty: bool = True
) -> dict[str, int]:
    """Publish for `seconds`, or with `until_empty` only until nothing is left; then events left are an error.

    Returns how many events were `sent`, and how many are `waiting`. Beside a relay that runs already it
    only looks on.
    """
    broker, records_url = await require_broker(), await find_records_url()
    report = await run_relay(
        records_url, broker, seconds=seconds, until_empty=until_empty, log=get_run_logger()
    )
    get_run_logger().info("%d events sent, %d wait", report.sent, report.waiting)
    if until_empty and report.waiting:
        raise EventsWaiting(f"{report.waiting} events wait in the outbox after {seconds:g} s")
    return {"sent": report.sent, "waiting": report.waiting}
