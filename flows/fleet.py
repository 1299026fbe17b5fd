"""`deploy-fleet`: services on many hosts, a canary first, then in batches; `rollback-fleet`, the way back.

Each service on each host is a flow run of its own, `deploy-container` or `rollback-container`, and a subflow
of this one: cancelled, Prefect cancels those under way too, and their hosts take back what is not proven.
"""

from __future__ import annotations

import asyncio
from typing import Any

from prefect import State, flow
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Failed

from receiver.contract import ImageTag
from tasks import dispatch, fleet_back, fleet_report, interrupted
from tasks.fleet_board import Board, Cell, deployed_cell, rolled_back_cell, why_stop
from tasks.fleet_plan import (
    BatchSize,
    Canary,
    FleetParameters,
    Hosts,
    MaxFailures,
    OnStop,
    OnUnreachable,
    PauseSeconds,
    Services,
)
from tasks.fleet_runs import Runs
from tasks.fleet_show import Summary
from tasks.fleet_start import Fleet, prepared, slots
from tasks.records import Records

Ended = dict[str, Any] | State[Any]


def _run_name() -> str:
    asked = flow_run.parameters
    if asked.get("resume"):
        return f"resume fleet {asked['resume'][:8]}"
    return f"fleet: {', '.join(asked.get('services') or ['nothing'])}"


@flow(name="deploy-fleet", flow_run_name=_run_name, persist_result=True)
async def deploy_fleet(
    services: Services = [],  # noqa: B006 - not changed
    hosts: Hosts = [],  # noqa: B006 - not changed
    image_tag: ImageTag | None = None,
    canary: Canary = True,
    batch_size: BatchSize = "25%",
    pause_seconds: PauseSeconds = 0,
    max_failures: MaxFailures = 0,
    on_unreachable: OnUnreachable = OnUnreachable.FAIL,
    on_stop: OnStop = OnStop.KEEP,
    resume: str | None = None,
) -> Ended:
    """Deploy services to hosts: the canary alone, then batch after batch, until too many hosts have failed.

    `services` are names of service files, as `web` or `web:v2`; `hosts` are by default those of the files.
    `resume` is the id of an earlier run: what it was asked for is taken up again, and only what is not
    done yet is done. Wrong parameters are refused before anything begins. Ends Completed when all is
    deployed, else Failed; both with a summary.
    """
    asked = FleetParameters(
        services=services,
        hosts=hosts,
        image_tag=image_tag,
        canary=canary,
        batch_size=batch_size,
        pause_seconds=pause_seconds,
        max_failures=max_failures,
        on_unreachable=on_unreachable,
        on_stop=on_stop,
    )
    with dispatch.untagged():
        async with prepared(asked, resume) as fleet:
            summary = Summary(fleet.board)
            await _deploy_in_batches(fleet, summary)
            if fleet.board.stopped and fleet.asked.on_stop is OnStop.ROLL_BACK_ALL:
                await _take_back(fleet.board, fleet.records, fleet.parallel, summary)
            return await _end(fleet.board, summary, is_well=fleet.is_done())


@flow(name="rollback-fleet", flow_run_name="roll back fleet {fleet_id}", persist_result=True)
async def rollback_fleet(fleet_id: str) -> Ended:
    """Bring each container that a fleet deployed back to the version that ran before the fleet.

    What was deployed by somebody else since is left alone, and told; so is a container that nothing ran
    before. Run again, it does what is left.
    """
    with dispatch.untagged():
        async with interrupted.open_records() as records:
            board = await fleet_back.board_of(fleet_id, records)
            summary = Summary(board)
            await _take_back(board, records, await slots(), summary)
        return await _end(board, summary, is_well=not board.of(Cell.NOT_ROLLED_BACK))


async def _deploy_in_batches(fleet: Fleet, summary: Summary) -> None:
    runs = Runs(fleet.board, fleet.records, "deploy-container", fleet.parallel, deployed_cell, summary.update)
    is_first = True
    for batch in fleet.batches:
        wanted = [place for place in fleet.board.on(batch) if place.cell is Cell.WAITING]
        if not wanted:
            continue
        if not is_first:
            await asyncio.sleep(fleet.asked.pause_seconds)
        is_first = False
        get_run_logger().info("batch: %s", ", ".join(batch))
        await runs.work(
            [(place, place.unit.parameters.model_dump(mode="json", exclude_unset=True)) for place in wanted],
            lambda: not _stop(fleet),
        )
        if _stop(fleet):
            return


def _stop(fleet: Fleet) -> bool:
    """Whether enough has failed; says so once."""
    board = fleet.board
    if not board.stopped:
        board.stopped = why_stop(board, fleet.asked.max_failures, count_unreachable=fleet.counts_unreachable)
        if board.stopped:
            get_run_logger().error("the fleet stops: %s", board.stopped)
    return bool(board.stopped)


async def _take_back(board: Board, records: Records, parallel: int, summary: Summary) -> None:
    wanted = await fleet_back.plan(board, records)
    runs = Runs(board, records, "rollback-container", parallel, rolled_back_cell, summary.update)
    await runs.work(wanted)


async def _end(board: Board, summary: Summary, *, is_well: bool) -> Ended:
    await summary.finish()
    told, result = fleet_report.summary(board), fleet_report.result(board)
    if is_well:
        get_run_logger().info("%s", told)
        return result
    return Failed(message=f"fleet {board.fleet_id}: {told}", data=result)
