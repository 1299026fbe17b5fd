"""The relay in its two forms: beside a flow's steps, and for as long as a process runs.

    async with step_relay(records, broker) as relay:
        await records.advance(...)
        relay.wake()

What it publishes, and in what order, stands in `tasks.outbox_relay`. Imports no Prefect.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from blocks.event_broker import EventBroker
from tasks.errors import GantryError
from tasks.outbox_relay import Log, Relay
from tasks.records import Records

__all__ = ["EventsWaiting", "RelayReport", "StepRelay", "run_relay", "step_relay"]

_STOP_SECONDS = 0.2
_COUNTED_ROWS = 10_000
_log = logging.getLogger(__name__)


class EventsWaiting(GantryError):
    """Events wait in the outbox"""

    next_step = (
        "Look at last_error of the unsent rows of event_outbox, and at the relay's log. "
        "Nothing is lost: the next relay goes on with them."
    )


@dataclass(frozen=True)
class RelayReport:
    """What a relay did: events acknowledged to it, and those still unsent (10 000 stands for more)."""

    sent: int
    waiting: int


class StepRelay(Protocol):
    """What a flow sees of its relay."""

    def wake(self) -> object:
        """Tell that there is a new event, so that it is sent at once."""


class _NoRelay:
    """Where no broker is configured: events wait in the outbox."""

    def wake(self) -> None:
        """Nothing to wake."""


@asynccontextmanager
async def step_relay(
    records: Records, broker: EventBroker | None, *, grace_seconds: float = 1.0, log: Log = _log
) -> AsyncIterator[StepRelay]:
    """Publish in the background while the block runs; best effort, never an error of the block's.

    Leaving waits for unsent events until `grace_seconds` are over, everything included; what is unsent
    then is left to the next relay. Without a broker nothing is done.
    """
    if broker is None:
        yield _NoRelay()
        return
    relay = Relay(records, broker, log=log)
    task = asyncio.create_task(relay.run())
    try:
        yield relay
    finally:
        drained = asyncio.create_task(relay.drained())
        await _first_of(task, drained, seconds=max(grace_seconds - _STOP_SECONDS, 0))
        if not drained.done():
            log.info("relay: events wait in the outbox for the next relay")
        await _stop(drained)
        _tell_of_a_bug(await _stop(task), log)


async def run_relay(
    records_url: str,
    broker: EventBroker,
    *,
    seconds: float | None = None,
    until_empty: bool = False,
    log: Log = _log,
) -> RelayReport:
    """Publish until cancelled, until `seconds` are over, or until nothing is left to send.

    Events that the brokers refuse do not keep it: they are in the report's `waiting`. Raises what
    `Records.open` raises; later failures of the database or the brokers are waited out.
    """
    async with await Records.open(records_url) as records:
        relay = Relay(records, broker, log=log)
        task = asyncio.create_task(relay.run())
        drained = asyncio.create_task(relay.drained()) if until_empty else None
        try:
            await _first_of(*filter(None, (task, drained)), seconds=seconds)
        finally:
            if drained:
                await _stop(drained)
            failure = await _stop(task)
        if failure is not None:
            raise failure
        return RelayReport(sent=relay.sent, waiting=len(await records.unsent(_COUNTED_ROWS)))


async def _first_of(*tasks: asyncio.Task[None], seconds: float | None) -> None:
    await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)


async def _stop(task: asyncio.Task[None]) -> BaseException | None:
    """Cancel a task and give it a moment; returns what it had failed with before, if it had."""
    task.cancel()
    await asyncio.wait({task}, timeout=_STOP_SECONDS)
    return task.exception() if task.done() and not task.cancelled() else None


def _tell_of_a_bug(failure: BaseException | None, log: Log) -> None:
    """The relay waits out whatever may fail; anything else is ours, and must not fail a deployment."""
    if failure is not None:
        log.error("relay: ended by an unexpected error", exc_info=failure)
