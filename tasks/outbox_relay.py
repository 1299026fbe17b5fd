"""The relay's work: unsent rows of the outbox to Kafka, in order within a workflow, each at least once.

A row is sent only after the row before it in its workflow was acknowledged, and marked after its own
acknowledgement; so whoever dies, stands in or sends twice changes no order. SQL lives in
`tasks.records`, Kafka in `tasks.outbox_producer`. Imports no Prefect.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from sqlalchemy.exc import SQLAlchemyError

from blocks.event_broker import EventBroker
from tasks.outbox_producer import BrokerFailed, EventRefused, Producer, connect
from tasks.outbox_seat import Seat, SeatLost, seat_at
from tasks.records import OutboxRow, Records

FIRST_RETRY_SECONDS = 0.2
LAST_RETRY_SECONDS = 10.0
_FETCH_ROWS = 500
_WORKFLOWS_AT_ONCE = 100
_SILENCE_SECONDS = 5.0
_log = logging.getLogger(__name__)
Log = logging.Logger | logging.LoggerAdapter[logging.Logger]


@dataclass
class Backoff:
    """Time to wait before the next try: from 0.2 s up to 10 s, doubled each time, with jitter."""

    _longest_seconds: float = 2 * FIRST_RETRY_SECONDS

    def next_seconds(self) -> float:
        """The jitter parts events that were refused together: one of them may be the cause."""
        longest = self._longest_seconds
        self._longest_seconds = min(longest * 2, LAST_RETRY_SECONDS)
        return random.uniform(longest / 2, longest)  # noqa: S311 - no secret

    def reset(self) -> None:
        """It went well."""
        self._longest_seconds = 2 * FIRST_RETRY_SECONDS


@dataclass
class _Hold:
    """A workflow whose next event was refused: nothing of it is sent before `until`."""

    event_id: str = ""
    backoff: Backoff = field(default_factory=Backoff)
    until: float = 0.0


class Relay:
    """Publishes the outbox of one database, as long as no other relay does; one instance, one `run`."""

    def __init__(self, records: Records, broker: EventBroker, *, log: Log = _log) -> None:
        self._records = records
        self._broker = broker
        self._log = log
        self._seat: Seat = seat_at(records.url)
        self._backoff = Backoff()
        self._sending: dict[str, asyncio.Task[None]] = {}
        self._acked: set[int] = set()
        self._held: dict[str, _Hold] = {}
        self._stirred = asyncio.Event()
        self._look = True  # there may be rows that were not seen yet
        self._asked = 0
        self._drained_at = 0
        self._drained = asyncio.Condition()
        self._failing_since: float | None = None
        self._heard_at = 0.0
        self.sent = 0
        """Events that the brokers acknowledged to this relay."""

    def wake(self) -> int:
        """Look for new rows now, not at the next poll. Call it from the relay's event loop."""
        self._asked += 1
        self._stir()
        return self._asked

    async def drained(self) -> None:
        """Return when everything committed before this call is sent, refused, or another relay's."""
        asked = self.wake()
        async with self._drained:
            await self._drained.wait_for(lambda: self._drained_at >= asked)

    async def run(self) -> None:
        """Relay until cancelled; whatever is down is tried again."""
        backoff = Backoff()
        try:
            while True:
                try:
                    await self._stand_by()
                    backoff.reset()
                    await self._relay()
                except (SeatLost, SQLAlchemyError, OSError) as exc:
                    self._log.warning("relay: the records fail, trying again: %s", exc)
                    await asyncio.sleep(backoff.next_seconds())
        finally:
            await self._seat.leave()

    async def _stand_by(self) -> None:
        """Return when no other relay holds the place."""
        standing_by = False
        while not await self._seat.take():
            if not standing_by:
                self._log.info("relay: another one publishes, standing by")
            standing_by = True
            asked, rows = self._asked, await self._records.unsent(_FETCH_ROWS)
            if all(row.attempts for row in rows):  # the other one has seen them all
                await self._tell_drained(asked)
            await self._wait(self._seat.poll_seconds)
        if standing_by:
            self._log.info("relay: the other one is gone, publishing")

    async def _relay(self) -> None:
        while True:
            while not (ready := await self._next_rows()):
                await self._poll()
            try:
                async with connect(self._broker) as producer:
                    await self._publish(producer, ready)
            except BrokerFailed as exc:
                await self._note_failure(exc)
                await asyncio.sleep(self._backoff.next_seconds())

    async def _publish(self, producer: Producer, ready: Mapping[str, list[OutboxRow]]) -> None:
        """Publish until the connection fails or is used up: after a refusal it lacks a sequence number."""
        used_up = False
        try:
            while True:
                for workflow_id, rows in ready.items():
                    self._sending[workflow_id] = asyncio.create_task(self._send(producer, rows))
                await self._poll()
                used_up = self._collect(used_up=used_up)
                if used_up and not self._sending:
                    return
                await self._mark_acked()
                ready = {} if used_up else await self._next_rows()
        finally:
            for task in self._sending.values():
                task.cancel()
            await asyncio.gather(*self._sending.values(), return_exceptions=True)
            self._sending.clear()

    async def _send(self, producer: Producer, rows: list[OutboxRow]) -> None:
        """The rows of one workflow, each after the acknowledgement of the one before."""
        try:
            for row in rows:
                await producer.publish(row)
                self._acked.add(row.id)
                self.sent += 1
                self._hear()
            self._held.pop(rows[0].workflow_id, None)
        except EventRefused as exc:
            await self._hold(row, exc)
            raise
        finally:
            self._look = True
            self._stirred.set()

    def _collect(self, *, used_up: bool) -> bool:
        """Forget the senders that ended; True when the connection is used up, raises what broke it."""
        ended = {workflow_id: task for workflow_id, task in self._sending.items() if task.done()}
        for workflow_id in ended:
            del self._sending[workflow_id]
        failures = [failure for task in ended.values() if (failure := task.exception()) is not None]
        used_up = used_up or any(isinstance(failure, EventRefused) for failure in failures)
        for failure in failures:
            if not isinstance(failure, EventRefused) and not (used_up and isinstance(failure, BrokerFailed)):
                raise failure
        return used_up

    async def _next_rows(self) -> dict[str, list[OutboxRow]]:
        """Unsent rows of workflows that are neither under way nor held, by workflow, in order."""
        await self._mark_acked()
        if not self._look or len(self._sending) >= _WORKFLOWS_AT_ONCE:
            return {}
        self._look, asked, limit = False, self._asked, _FETCH_ROWS
        while True:
            rows = await self._records.unsent(limit)
            ready = self._ready(rows)
            if ready or len(rows) < limit:
                break
            limit *= 2  # held workflows fill the whole page, others wait behind them
        if not ready and not self._sending:
            await self._tell_drained(asked)
        return ready

    def _ready(self, rows: list[OutboxRow]) -> dict[str, list[OutboxRow]]:
        now = time.monotonic()
        busy = {workflow_id for workflow_id, hold in self._held.items() if hold.until > now}
        busy |= self._sending.keys()
        ready: dict[str, list[OutboxRow]] = {}
        for row in rows:
            if row.workflow_id not in busy and row.id not in self._acked:
                ready.setdefault(row.workflow_id, []).append(row)
        return ready

    async def _mark_acked(self) -> None:
        if acked := frozenset(self._acked):
            await self._records.mark_sent(acked, datetime.now(UTC))
            self._acked -= acked

    async def _hold(self, row: OutboxRow, exc: EventRefused) -> None:
        """Keep this one workflow back; told once for each event, kept with its row."""
        hold = self._held.setdefault(row.workflow_id, _Hold())
        if hold.event_id != row.event_id:
            hold.event_id, hold.backoff = row.event_id, Backoff()
            identity = {"correlation_id": row.workflow_id}
            self._log.error("relay: event refused: %s. %s", exc, exc.next_step, extra=identity)
        hold.until = time.monotonic() + hold.backoff.next_seconds()
        await self._records.mark_unsent([row.id], str(exc))

    async def _note_failure(self, exc: BrokerFailed) -> None:
        """One line when the brokers go, not one for each try; the error stands with the rows in wait."""
        if self._failing_since is None:
            self._failing_since = time.monotonic()
            self._log.warning("relay: the brokers fail, trying again: %s. %s", exc, exc.next_step)
        self._look = True
        await self._mark_acked()
        heads = {row.workflow_id: row.id for row in reversed(await self._records.unsent(_FETCH_ROWS))}
        await self._records.mark_unsent(heads.values(), str(exc))

    def _hear(self) -> None:
        self._backoff.reset()
        self._heard_at = time.monotonic()
        if self._failing_since is not None:
            gone_seconds, self._failing_since = time.monotonic() - self._failing_since, None
            self._log.info("relay: the brokers acknowledge again after %.1f s", gone_seconds)

    def _listen(self) -> None:
        """Tell of brokers that neither acknowledge nor fail."""
        if not self._sending:
            self._heard_at = time.monotonic()
        elif self._failing_since is None and time.monotonic() - self._heard_at > _SILENCE_SECONDS:
            self._failing_since = self._heard_at
            waiting = len(self._sending)
            self._log.warning(
                "relay: no acknowledgement for %g s, events of %d workflows wait", _SILENCE_SECONDS, waiting
            )

    async def _poll(self) -> None:
        """Return when something stirs, or at the next poll; then the database is asked for changes."""
        if not await self._wait(self._seat.poll_seconds):
            due = any(hold.until <= time.monotonic() for hold in self._held.values())
            self._look = await self._seat.changed() or self._look or due
        self._listen()

    async def _wait(self, seconds: float) -> bool:
        """True when stirred before the time was over."""
        try:
            async with asyncio.timeout(seconds):
                await self._stirred.wait()
        except TimeoutError:
            return False
        self._stirred.clear()
        return True

    def _stir(self) -> None:
        self._look = True
        self._stirred.set()

    async def _tell_drained(self, asked: int) -> None:
        async with self._drained:
            self._drained_at = max(self._drained_at, asked)
            self._drained.notify_all()
