"""Workflows that tell events, and what a real Kafka holds of them."""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition  # type: ignore[import-untyped]  # it ships no types

from blocks.event_broker import EventBroker
from receiver.contract import ErrorCode, HealthAttempt, Stage
from tasks.events import TOPICS
from tasks.records import Facts, NewWorkflow, Records, StageResult, WorkflowState

S = WorkflowState
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def stage(name: Stage, *, success: bool = True) -> StageResult:
    return StageResult(stage=name, success=success, duration_ms=70, started_at=NOW, completed_at=NOW)


def attempts(*outcomes: str) -> tuple[HealthAttempt, ...]:
    return tuple(
        HealthAttempt.model_validate(
            {"attempt": number, "checked_at": NOW, "status": status, "duration_ms": 5, "message": "told"}
        )
        for number, status in enumerate(outcomes, start=1)
    )


_FAILED = Facts(
    health_attempts=attempts("failed", "failed"),
    error_code=ErrorCode.HEALTH_CHECK_FAILED,
    error_message="no answer on port 8080",
)
_BEGINNING = (
    (S.PACKAGING, Facts()),
    (S.TRANSFERRING, Facts(stage=stage(Stage.PACKAGE))),
    (S.DEPLOYING, Facts(stage=stage(Stage.TRANSFER), deployment_id="d-1")),
    (S.VALIDATING, Facts(stage=stage(Stage.DEPLOY))),
)
SUCCESS = (
    *_BEGINNING,
    (S.COMPLETED, Facts(stage=stage(Stage.VALIDATE), health_attempts=attempts("failed", "passed"))),
)
ROLLBACK = (
    *_BEGINNING,
    (S.ROLLING_BACK, _FAILED),
    (S.ROLLBACK_COMPLETED, Facts(rollback_result={"success": True, "switched": True})),
)
FAILURE = ((S.FAILED, Facts(error_code=ErrorCode.BUILD_FAILED, error_message="no such base image")),)


async def begin(records: Records, workflow_id: str, **changes: Any) -> None:
    """A recorded workflow, in PENDING."""
    new = {"container_name": "shop", "remote_host": "target", "image_tag": "v2", **changes}
    await records.create(NewWorkflow(workflow_id=workflow_id, **new))


async def tell(
    records: Records,
    workflow_id: str,
    story: Iterable[tuple[WorkflowState, Facts]],
    after_step: Callable[[], object] = lambda: None,
) -> None:
    """Move a workflow through its story."""
    at = S.PENDING
    for to_state, facts in story:
        await records.advance(workflow_id, at, to_state, facts)
        at = to_state
        after_step()


async def until(
    fact: Callable[[], Any] | Callable[[], bool], what: str, deadline_seconds: float = 30
) -> None:
    """Return when `fact()`, awaited if need be, is true; fail at the deadline."""
    deadline = time.monotonic() + deadline_seconds
    while True:
        holds = fact()
        if asyncio.iscoroutine(holds):
            holds = await holds
        if holds:
            return
        assert time.monotonic() < deadline, f"not within {deadline_seconds:g} s: {what}"
        await asyncio.sleep(0.02)


@dataclass(frozen=True)
class Arrived:
    """A message as a consumer sees it."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: str
    headers: dict[str, str]
    value: bytes

    @property
    def event(self) -> dict[str, Any]:
        parsed: dict[str, Any] = json.loads(self.value)
        return parsed

    @property
    def sequence(self) -> int:
        return int(self.event["envelope"]["sequence"])


@asynccontextmanager
async def consuming(broker: EventBroker, group_id: str | None = None) -> AsyncIterator[Any]:
    """A consumer of our settings that is started."""
    consumer = AIOKafkaConsumer(**broker.consumer_settings(group_id))
    await consumer.start()
    try:
        yield consumer
    finally:
        await consumer.stop()


async def partitions_of(consumer: Any, topics: Iterable[str] = TOPICS) -> list[TopicPartition]:
    """All partitions of the topics; asking makes them, as the broker allows it."""
    wait = consumer._client._wait_on_metadata
    return [TopicPartition(topic, number) for topic in topics for number in sorted(await wait(topic))]


async def arrived(broker: EventBroker, workflow_ids: Iterable[str]) -> dict[str, list[Arrived]]:
    """Everything that the topics hold of the workflows now, each workflow's in the order of arrival."""
    wanted, found = set(workflow_ids), defaultdict(list)
    async with consuming(broker) as consumer:
        partitions = await partitions_of(consumer)
        consumer.assign(partitions)
        ends = await consumer.end_offsets(partitions)
        for partition in partitions:
            while await consumer.position(partition) < ends[partition]:
                for record in (await consumer.getmany(partition, timeout_ms=2000)).get(partition, []):
                    if (key := (record.key or b"").decode(errors="replace")) in wanted:
                        found[key].append(_arrived(record, key))
    order = lambda message: (message.timestamp_ms, message.sequence)  # noqa: E731
    return {key: sorted(messages, key=order) for key, messages in found.items()}


def _arrived(record: Any, key: str) -> Arrived:
    headers = {name: value.decode() for name, value in record.headers}
    return Arrived(
        record.topic, record.partition, record.offset, record.timestamp, key, headers, record.value
    )


async def check_complete(
    records: Records, broker: EventBroker, workflow_ids: Iterable[str]
) -> dict[str, list[Arrived]]:
    """Assert: each event of the records arrived as written, in order, doubled only under its own id."""
    found = await arrived(broker, workflow_ids)
    for workflow_id in workflow_ids:
        rows = await records.outbox(workflow_id)
        first: dict[str, Arrived] = {}
        for message in found.get(workflow_id, []):
            first.setdefault(message.event["envelope"]["event_id"], message)
        assert [row.event_id for row in rows] == list(first), workflow_id
        for row in rows:
            message = first[row.event_id]
            assert (message.topic, message.value.decode()) == (row.topic, row.message)
            assert message.headers == {"event_id": row.event_id, "event_type": row.event_type}
        _check_partitions(list(first.values()))
    return found


def _check_partitions(messages: list[Arrived]) -> None:
    """Within a topic a workflow stays in one partition, and there offsets rise with the sequence."""
    by_topic: dict[str, list[Arrived]] = defaultdict(list)
    for message in messages:
        by_topic[message.topic].append(message)
    for told in by_topic.values():
        assert len({message.partition for message in told}) == 1
        assert [m.sequence for m in sorted(told, key=lambda m: m.offset)] == sorted(m.sequence for m in told)


async def all_sent(records: Records) -> bool:
    """True when nothing is unsent."""
    return not await records.unsent(1)


def addressed(broker: EventBroker, snippet: str) -> str:
    """A snippet of the specification with the broker's real address."""
    assert snippet.count('"localhost:29092"') == 1
    return snippet.replace("localhost:29092", broker.bootstrap_servers)


async def stand_at_the_end(broker: EventBroker, group_id: str) -> None:
    """Commit the topics' ends for a group, so that a consumer which starts later misses nothing.

    The specification's consumers begin with what comes after they joined, which a test cannot see.
    """
    async with consuming(broker, group_id) as consumer:
        partitions = await partitions_of(consumer)
        consumer.assign(partitions)
        await consumer.commit(await consumer.end_offsets(partitions))
