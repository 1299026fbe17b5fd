"""`prune-records`: let go of old workflows and published events; the metrics stay as they are."""

from __future__ import annotations

from typing import Annotated, Any

from prefect import flow
from prefect.logging import get_run_logger
from pydantic import Field

from tasks.retention import prune_stored_records

Days = Annotated[int, Field(ge=1, le=36_500)]


@flow(name="prune-records", flow_run_name="prune what ended more than {keep_days} days ago")
async def prune_records(
    keep_days: Days = 90, keep_events_days: Days = 7, dry_run: bool = False
) -> dict[str, Any]:
    """Delete workflows that ended before `keep_days`, and events that were sent before `keep_events_days`.

    Never a workflow that has not ended, never an event that was not sent. Returns how many went, and how
    many old workflows are held back by an unsent event; with `dry_run` nothing goes.
    """
    pruned = await prune_stored_records(keep_days, keep_events_days, dry_run)
    get_run_logger().info(
        "%s %d workflows and %d events; %d old workflows wait for their events to be sent",
        "would prune" if dry_run else "pruned",
        pruned.workflows,
        pruned.events,
        pruned.held_back,
    )
    return {
        "workflows": pruned.workflows,
        "events": pruned.events,
        "held_back": pruned.held_back,
        "dry_run": pruned.dry_run,
    }
