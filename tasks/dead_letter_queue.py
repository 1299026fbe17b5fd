"""The dead letter queue: who reads it, what its records say, and when one counts as read.

Owns the consumer. What is done about a letter stands in `tasks.dead_letters`. Imports no Prefect.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition  # type: ignore[import-untyped]  # it ships no types
from aiokafka.abc import ConsumerRebalanceListener  # type: ignore[import-untyped]  # it ships no types
from aiokafka.errors import KafkaError  # type: ignore[import-untyped]  # it ships no types
from pydantic import BaseModel, ValidationError

from blocks.event_broker import EventBroker
from receiver.contract import ErrorCode
from tasks.errors import GantryError
from tasks.events import EventType, clean_text
from tasks.outbox_producer import CONNECT_SECONDS, BrokerFailed, last_words, quieten_aiokafka

GROUP = "deployment-dlq-monitor"
TOPIC = EventType.DEPLOYMENT_DLQ.topic
CRITICAL = frozenset({ErrorCode.ROLLBACK_FAILED, ErrorCode.REMOTE_ENDPOINT_UNREACHABLE})
_JOIN_SECONDS = 30.0
_SHOWN_BYTES = 500


class DeadLetterUnknown(GantryError):
    """The dead letter queue holds nothing of this workflow"""

    next_step = "Compare the workflow id with the notification; the broker may have dropped old letters."


class Envelope(BaseModel):
    """What is read of an event's envelope."""

    event_id: str
    correlation_id: str


class Failure(BaseModel):
    """What is read of a dead letter's payload; `request` is redacted."""

    container_name: str
    image_tag: str
    remote_host: str
    error_code: str | None
    error_message: str
    retry_count: int
    request: dict[str, Any]


class DeadLetter(BaseModel):
    """A workflow that failed, as the topic tells it."""

    envelope: Envelope
    payload: Failure

    @property
    def workflow_id(self) -> str:
        """The workflow that failed."""
        return self.envelope.correlation_id

    @property
    def critical(self) -> bool:
        """True when a person has to act."""
        return self.payload.error_code in CRITICAL


@dataclass(frozen=True)
class Malformed:
    """A record of the topic that is no dead letter."""

    place: str
    problem: str
    shown: str


@dataclass(frozen=True)
class Received:
    """A record of the topic, and where it lies."""

    content: DeadLetter | Malformed
    partition: TopicPartition
    offset: int


class DeadLetters:
    """The dead letters that the group has not committed yet; made by `dead_letters`."""

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer

    async def next(self, idle_seconds: float) -> Received | None:
        """The next one; None when none came within `idle_seconds`. Raises `BrokerFailed`."""
        try:
            found = await self._consumer.getmany(timeout_ms=int(idle_seconds * 1000), max_records=1)
        except KafkaError as exc:
            raise BrokerFailed(f"{type(exc).__name__}: {exc}") from exc
        for partition, records in found.items():
            return Received(
                parse(records[0].value, partition, records[0].offset), partition, records[0].offset
            )
        return None

    async def commit(self, received: Received) -> None:
        """This one, and those before it in its partition, need not be read again."""
        try:
            await self._consumer.commit({received.partition: received.offset + 1})
        except KafkaError as exc:
            raise BrokerFailed(f"the commit failed: {type(exc).__name__}: {exc}") from exc


@asynccontextmanager
async def dead_letters(broker: EventBroker) -> AsyncIterator[DeadLetters]:
    """Those that the group `deployment-dlq-monitor` has not committed, oldest first in each partition."""
    async with _consumer(broker, GROUP) as consumer:
        joined = _Joined()
        consumer.subscribe([TOPIC], listener=joined)
        try:
            async with asyncio.timeout(_JOIN_SECONDS):
                await joined.event.wait()
        except TimeoutError as exc:
            raise BrokerFailed(f"the group {GROUP} did not form within {_JOIN_SECONDS:g} s") from exc
        yield DeadLetters(consumer)


async def find_dead_letter(broker: EventBroker, workflow_id: str) -> DeadLetter:
    """The newest dead letter of a workflow, committed or not; commits nothing.

    Raises `DeadLetterUnknown` or `BrokerFailed`.
    """
    found: DeadLetter | None = None
    async with _consumer(broker, None, TOPIC) as consumer:
        try:
            for partition, end in (await consumer.end_offsets(consumer.assignment())).items():
                async for record in _records_before(consumer, partition, end):
                    content = parse(record.value, partition, record.offset)
                    if isinstance(content, DeadLetter) and content.workflow_id == workflow_id:
                        found = content
        except KafkaError as exc:
            raise BrokerFailed(f"{type(exc).__name__}: {exc}") from exc
    if found is None:
        raise DeadLetterUnknown(f"The dead letter queue holds nothing of workflow {workflow_id!r}")
    return found


def parse(value: bytes | None, partition: TopicPartition, offset: int) -> DeadLetter | Malformed:
    """What a record says; never an error, since one that cannot be read must not be read for ever."""
    try:
        return DeadLetter.model_validate(json.loads(value or b""))
    except ValidationError as exc:
        problems = (f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in exc.errors())
        problem = "; ".join(problems)
    except (ValueError, RecursionError) as exc:
        problem = f"no JSON: {exc}"
    shown = clean_text((value or b"")[:_SHOWN_BYTES].decode(errors="replace"))
    return Malformed(f"{partition.topic}, partition {partition.partition}, offset {offset}", problem, shown)


async def _records_before(consumer: Any, partition: TopicPartition, end: int) -> AsyncIterator[Any]:
    while await consumer.position(partition) < end:
        for record in (await consumer.getmany(partition, timeout_ms=1000)).get(partition, []):
            yield record


@asynccontextmanager
async def _consumer(broker: EventBroker, group_id: str | None, *topics: str) -> AsyncIterator[Any]:
    """Started; leaves its group at the end, so that the next one need not wait for a dead member."""
    quieten_aiokafka()
    try:
        consumer = AIOKafkaConsumer(*topics, **broker.consumer_settings(group_id))
    except OSError as exc:  # of the certificates
        raise BrokerFailed(f"tls_ca_file {broker.tls_ca_file}: {exc}") from exc
    try:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await consumer.start()
        except (KafkaError, OSError, TimeoutError) as exc:
            cause = last_words() or f"{type(exc).__name__}: {exc}"
            raise BrokerFailed(f"{broker.bootstrap_servers}: {cause}") from exc
        yield consumer
    finally:
        await consumer.stop()


class _Joined(ConsumerRebalanceListener):  # type: ignore[misc]  # it has no types
    """Hears when the group has formed, also when this member got no partition."""

    def __init__(self) -> None:
        self.event = asyncio.Event()

    def on_partitions_revoked(self, revoked: object) -> None:
        """No matter: a letter that was not committed is read by the next member."""

    def on_partitions_assigned(self, assigned: object) -> None:
        """From now on it is a matter of what is in the topic."""
        self.event.set()
