"""The relay against a real Kafka, on SQLite and PostgreSQL: whatever dies, every event arrives in order."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from blocks.event_broker import EventBroker
from deployments.lab_kafka import KafkaBroker
from receiver.contract import Stage
from tasks.events import TOPICS, EventType
from tasks.outbox import run_relay, step_relay
from tasks.records import Facts, Records
from tests.integration.kafka import (
    FAILURE,
    ROLLBACK,
    SUCCESS,
    S,
    addressed,
    all_sent,
    attempts,
    begin,
    check_complete,
    stage,
    stand_at_the_end,
    tell,
    until,
)
from tests.unit import test_asyncapi

# The specification's Pattern 2, as it stands there.
PATTERN_2 = '''
from aiokafka import AIOKafkaConsumer
import asyncio

async def monitor_deployment(workflow_id: str):
    """Monitor deployment workflow via Kafka events."""

    consumer = AIOKafkaConsumer(
        "dev.omninode-bridge.deployment.started.v1",
        "dev.omninode-bridge.deployment.stage-completed.v1",
        "dev.omninode-bridge.deployment.health-check.v1",
        "dev.omninode-bridge.deployment.completed.v1",
        "dev.omninode-bridge.deployment.failed.v1",
        bootstrap_servers="localhost:29092",
        group_id=f"deployment-monitor-{workflow_id}",
    )

    await consumer.start()

    try:
        async for message in consumer:
            event = json.loads(message.value)

            # Filter by workflow ID
            if event["envelope"]["correlation_id"] != workflow_id:
                continue

            event_type = event["envelope"]["event_type"]
            payload = event["payload"]

            if event_type == "DEPLOYMENT_STARTED":
                print(f"🚀 Deployment started: {payload['container_name']}")

            elif event_type == "DEPLOYMENT_STAGE_COMPLETED":
                print(f"✅ Stage completed: {payload['stage_name']}")
                print(f"   Duration: {payload['duration_ms']}ms")

            elif event_type == "DEPLOYMENT_HEALTH_CHECK":
                print(f"❤️  Health check: {payload['status']}")

            elif event_type == "DEPLOYMENT_COMPLETED":
                print(f"🎉 Deployment completed successfully!")
                print(f"   Total duration: {payload['total_duration_ms']}ms")
                break

            elif event_type == "DEPLOYMENT_FAILED":
                print(f"❌ Deployment failed: {payload['error_message']}")
                break

    finally:
        await consumer.stop()
'''
pytest_plugins = ("tests.integration.kafka_fixtures",)
PROJECT = Path(__file__).resolve().parents[2]
STORIES = (SUCCESS, ROLLBACK, FAILURE)


@pytest.fixture
async def records(records_url: str) -> AsyncIterator[Records]:
    """Records in a new database."""
    async with await Records.open(records_url) as opened:
        yield opened


@pytest.fixture
def black_hole() -> Iterator[EventBroker]:
    """A broker whose connections are taken and never answered."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield EventBroker(bootstrap_servers=f"127.0.0.1:{listener.getsockname()[1]}")


def new_ids(count: int) -> list[str]:
    return [f"w-{number:02}-{uuid4().hex[:8]}" for number in range(count)]


async def write(records: Records, ids: list[str], in_the_middle: Callable[[], object] = lambda: None) -> None:
    """20 deployments' events, interleaved, in two halves; `in_the_middle` runs between and beside them."""
    stories = {workflow_id: STORIES[number % 3] for number, workflow_id in enumerate(ids)}
    for workflow_id in ids:
        await begin(records, workflow_id)
    half = {workflow_id: len(story) // 2 for workflow_id, story in stories.items()}
    for workflow_id, story in stories.items():
        await tell(records, workflow_id, story[: half[workflow_id]])
    happening = asyncio.create_task(asyncio.to_thread(in_the_middle))
    for workflow_id, story in stories.items():
        at = story[half[workflow_id] - 1][0] if half[workflow_id] else S.PENDING
        for to_state, facts in story[half[workflow_id] :]:
            await records.advance(workflow_id, at, to_state, facts)
            at = to_state
    await happening


@contextmanager
def paused(kafka: KafkaBroker) -> Iterator[None]:
    """Within the block connections stay open and nothing is answered."""
    kafka.pause()
    try:
        yield
    finally:
        kafka.resume()


@asynccontextmanager
async def relaying(records_url: str, broker: EventBroker) -> AsyncIterator[asyncio.Task[object]]:
    """The long-running relay, in this process."""
    task: asyncio.Task[object] = asyncio.create_task(run_relay(records_url, broker))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task}, timeout=5)
        assert task.cancelled(), task


@asynccontextmanager
async def relay_process(
    records_url: str, broker: EventBroker, *arguments: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """`python -m deployments.relay`, as an operator starts it; killed at the end if it still runs."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment |= {"DATABASE_URL": records_url, "KAFKA_BOOTSTRAP_SERVERS": broker.bootstrap_servers}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "deployments.relay", *arguments),
        env=environment,
        cwd=PROJECT,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize("end", [KafkaBroker.stop, KafkaBroker.kill], ids=["stopped", "killed"])
async def test_no_event_is_lost_when_the_broker_goes_in_the_middle(
    records: Records,
    records_url: str,
    broker: EventBroker,
    kafka: KafkaBroker,
    end: Callable[[KafkaBroker], None],
) -> None:
    """20 deployments go on while the broker is away; when it is back, all of it arrives in order."""
    ids = new_ids(20)
    async with relaying(records_url, broker):
        await write(records, ids, lambda: end(kafka))
        assert not await all_sent(records)
        kafka.start()  # not in a thread of the loop's: it dies with the thread that started it
        await until(lambda: all_sent(records), "everything is sent")
    await check_complete(records, broker, ids)


async def test_no_event_is_lost_when_the_relay_is_killed(
    records: Records, records_url: str, broker: EventBroker, kafka: KafkaBroker
) -> None:
    """kill -9 with events on their way; the next relay takes the place at once and sends them again."""
    (first,), ids = new_ids(1), new_ids(20)
    async with relay_process(records_url, broker) as process:
        await begin(records, first)
        await tell(records, first, FAILURE)
        await until(lambda: all_sent(records), "the relay is at work")
        with paused(kafka):
            await write(records, ids)
            process.kill()
            await process.wait()
            assert {row.workflow_id for row in await records.unsent(1000)} == set(ids)
    async with relaying(records_url, broker):
        await until(lambda: all_sent(records), "everything is sent")
    await check_complete(records, broker, ids)


async def test_of_two_relays_one_publishes_and_the_other_takes_over(
    records: Records, records_url: str, broker: EventBroker, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is doubled while both run; when the one that publishes is killed, the other goes on."""
    caplog.set_level(logging.INFO)
    (first,), ids, later = new_ids(1), new_ids(20), new_ids(3)
    async with relay_process(records_url, broker) as process:
        await begin(records, first)
        await tell(records, first, FAILURE)
        await until(lambda: all_sent(records), "the first one is at work")
        async with relaying(records_url, broker):
            await until(lambda: "standing by" in caplog.text, "the second one stands by")
            await write(records, ids)
            await until(lambda: all_sent(records), "everything is sent")
            found = await check_complete(records, broker, ids)
            assert [len(found[w]) for w in ids] == [len(await records.outbox(w)) for w in ids]
            process.kill()
            await write(records, later)
            await until(lambda: all_sent(records), "the one that is left publishes")
    await check_complete(records, broker, later)


async def test_relays_and_steps_at_once_lose_and_disorder_nothing(
    records: Records, broker: EventBroker
) -> None:
    """As on a busy control host: each of six flows has a relay of its own, and writes its own events."""
    ids = new_ids(6)

    async def flow(number: int) -> None:
        await begin(records, ids[number])
        async with step_relay(records, broker, grace_seconds=20) as relay:
            await tell(records, ids[number], STORIES[number % 3], relay.wake)

    await asyncio.gather(*(flow(number) for number in range(6)))
    await until(lambda: all_sent(records), "everything is sent", deadline_seconds=1)
    await check_complete(records, broker, ids)


async def test_a_step_publishes_its_events_before_it_ends(records: Records, broker: EventBroker) -> None:
    """With a broker that is up nothing waits, and nobody waits for the whole grace."""
    (workflow_id,) = new_ids(1)
    await begin(records, workflow_id)
    async with step_relay(records, broker, grace_seconds=10) as relay:
        await tell(records, workflow_id, ROLLBACK, relay.wake)
        left_at = time.monotonic()
    assert time.monotonic() - left_at < 5
    assert await all_sent(records)
    await check_complete(records, broker, [workflow_id])


async def test_what_is_published_is_what_the_document_says(sqlite_url: str, broker: EventBroker) -> None:
    """Each message of a success, a rollback and a failure, as a consumer reads it, against AsyncAPI."""
    ids = new_ids(3)
    async with await Records.open(sqlite_url) as records:
        async with step_relay(records, broker, grace_seconds=10):
            await write(records, ids)
        found = await check_complete(records, broker, ids)
    messages = [message for told in found.values() for message in told]
    for message in messages:
        test_asyncapi.check(message.event)
        assert message.topic == EventType(message.event["envelope"]["event_type"]).topic
        assert message.key == message.event["envelope"]["correlation_id"]
    assert {message.topic for message in messages} == set(TOPICS)


async def test_the_specifications_monitor_follows_a_deployment(
    sqlite_url: str, broker: EventBroker, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its Pattern 2, word for word, prints what happens and ends with the deployment."""
    (workflow_id,) = new_ids(1)
    names: dict[str, Any] = {"json": json}  # the specification's code imports it elsewhere
    exec(addressed(broker, PATTERN_2), names)  # noqa: S102 - our own copy
    printed: list[str] = []

    def has_printed(text: str) -> bool:
        printed.append(capsys.readouterr().out)
        return text in "".join(printed)

    steps = [
        ("🚀 Deployment started: shop", S.PENDING, S.PACKAGING, Facts()),
        ("✅ Stage completed: package_preparation\n   Duration: 70ms", S.PACKAGING, *SUCCESS[1]),
        ("✅ Stage completed: transfer_initiation", S.TRANSFERRING, *SUCCESS[2]),
        ("✅ Stage completed: deployment_execution", S.DEPLOYING, *SUCCESS[3]),
        ("❤️  Health check: passed", S.VALIDATING, None, Facts(health_attempts=attempts("passed"))),
        ("✅ Stage completed: health_validation", S.VALIDATING, None, Facts(stage=stage(Stage.VALIDATE))),
        ("🎉 Deployment completed successfully!\n   Total duration: ", S.VALIDATING, S.COMPLETED, Facts()),
    ]
    async with await Records.open(sqlite_url) as records, step_relay(records, broker) as relay:
        await begin(records, workflow_id)
        await stand_at_the_end(broker, f"deployment-monitor-{workflow_id}")
        monitor = asyncio.create_task(names["monitor_deployment"](workflow_id))
        for expected, from_state, to_state, facts in steps:
            if to_state is None:
                await records.note(workflow_id, facts)
            else:
                await records.advance(workflow_id, from_state, to_state, facts)
            relay.wake()
            await until(partial(has_printed, expected), expected)
        await asyncio.wait_for(monitor, 20)


async def test_the_specifications_monitor_sees_a_failure(
    sqlite_url: str, broker: EventBroker, capsys: pytest.CaptureFixture[str]
) -> None:
    """A deployment that was rolled back ends its monitor too."""
    (workflow_id,) = new_ids(1)
    names: dict[str, Any] = {"json": json}
    exec(addressed(broker, PATTERN_2), names)  # noqa: S102 - our own copy
    async with await Records.open(sqlite_url) as records, step_relay(records, broker):
        await stand_at_the_end(broker, f"deployment-monitor-{workflow_id}")
        await begin(records, workflow_id)
        await tell(records, workflow_id, ROLLBACK)
        await asyncio.wait_for(names["monitor_deployment"](workflow_id), 20)
    assert "❌ Deployment failed: no answer on port 8080" in capsys.readouterr().out


async def test_a_new_event_is_on_its_way_at_once(
    records: Records, records_url: str, broker: EventBroker
) -> None:
    """A relay that nobody wakes hears of it by its watch on the database."""
    first, second = new_ids(2)
    async with relaying(records_url, broker):
        for workflow_id in (first, second):
            await begin(records, workflow_id)
            await tell(records, workflow_id, FAILURE)
            await until(lambda: all_sent(records), "sent")
    row = (await records.outbox(second))[0]
    assert row.sent_at is not None
    assert (row.sent_at - row.created_at).total_seconds() < 2


async def test_a_step_of_a_broker_that_never_answers_costs_a_second(
    sqlite_url: str, black_hole: EventBroker
) -> None:
    """Connection attempts are given up; the events wait."""
    async with await Records.open(sqlite_url) as records:
        await begin(records, "w-1")
        async with step_relay(records, black_hole) as relay:
            began = time.monotonic()
            await tell(records, "w-1", SUCCESS, relay.wake)
            told = time.monotonic()
        ended = time.monotonic()
        assert ended - told < 1.2
        assert told - began < 1
        assert len(await records.unsent(100)) == len(await records.outbox("w-1")) > 0
        assert len(asyncio.all_tasks()) == 1


async def test_a_step_of_a_broker_that_freezes_costs_a_second(
    sqlite_url: str, broker: EventBroker, kafka: KafkaBroker
) -> None:
    """Connected, and with events on their way; what was not acknowledged counts as unsent."""
    (workflow_id,) = new_ids(1)
    async with await Records.open(sqlite_url) as records:
        await begin(records, workflow_id)
        with ExitStack() as stack:
            async with step_relay(records, broker) as relay:
                await tell(records, workflow_id, SUCCESS[:2], relay.wake)
                await until(lambda: all_sent(records), "it is connected, and knows the topic of stages")
                stack.enter_context(paused(kafka))
                await records.advance(workflow_id, S.TRANSFERRING, *SUCCESS[2])
                relay.wake()
                left_at = time.monotonic()
            assert time.monotonic() - left_at < 1.2
            assert [row.sequence for row in await records.unsent(10)] == [3]
            assert len(asyncio.all_tasks()) == 1
        report = await run_relay(sqlite_url, broker, until_empty=True)
        assert (report.sent, report.waiting) == (1, 0)
        await check_complete(records, broker, [workflow_id])


async def test_a_step_of_a_broker_that_is_down_costs_a_second_and_keeps_its_error(sqlite_url: str) -> None:
    """The block's own error is the one that rises; the rows say why they wait."""
    down = EventBroker(bootstrap_servers="127.0.0.1:1")
    async with await Records.open(sqlite_url) as records:
        await begin(records, "w-1")
        with pytest.raises(ZeroDivisionError):  # noqa: PT012 - leaving the block is what is tested
            async with step_relay(records, down) as relay:
                await tell(records, "w-1", FAILURE, relay.wake)
                left_at = time.monotonic()
                raise ZeroDivisionError
        assert time.monotonic() - left_at < 1.2
        first, *others = await records.outbox("w-1")
        assert first.attempts > 0
        assert "127.0.0.1:1" in (first.last_error or "")
        assert [row.attempts for row in others] == [0] * len(others)


async def test_a_step_without_a_broker_does_nothing(sqlite_url: str) -> None:
    """No task, no wait."""
    async with await Records.open(sqlite_url) as records, step_relay(records, None) as relay:
        relay.wake()
        assert len(asyncio.all_tasks()) == 1


@pytest.mark.parametrize("size_bytes", [400_000, 2_000_000], ids=["broker", "client"])
async def test_an_event_that_is_refused_holds_back_its_own_workflow_alone(
    records: Records,
    records_url: str,
    broker: EventBroker,
    size_bytes: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Too large for the broker or for the client: told once and loudly, kept, and passed by the others."""
    caplog.set_level(logging.INFO)
    poisoned, *others = new_ids(6)
    await begin(records, poisoned, request={"note": "x" * size_bytes})
    await tell(records, poisoned, FAILURE)
    async with relaying(records_url, broker):
        for workflow_id in others:
            await begin(records, workflow_id)
            await tell(records, workflow_id, ROLLBACK)
        await until(lambda: _only_unsent(records, {poisoned}), "all the others are sent")
        await until(lambda: _tried(records, poisoned, 3), "the large one is tried again")
    report = await run_relay(records_url, broker, seconds=10, until_empty=True)
    assert (report.sent, report.waiting) == (0, 1)
    await check_complete(records, broker, others)
    failed, dead_letter = await records.outbox(poisoned)
    assert failed.sent_at is not None
    assert "MessageSizeTooLarge" in (dead_letter.last_error or "")
    refusals = [line for line in caplog.messages if "event refused" in line and poisoned in line]
    assert len(refusals) == 2, "one line by each of the two relays"
    assert all("message.max.bytes" in line for line in refusals)


async def _only_unsent(records: Records, ids: set[str]) -> bool:
    return {row.workflow_id for row in await records.unsent(1000)} == ids


async def _tried(records: Records, workflow_id: str, times: int) -> bool:
    return any(row.attempts >= times for row in await records.outbox(workflow_id))


async def test_the_relay_as_a_process_ends_cleanly(
    sqlite_url: str, broker: EventBroker, black_hole: EventBroker
) -> None:
    """SIGTERM is a good end; --once ends by itself, and with an error when events remain."""
    async with await Records.open(sqlite_url) as records:
        (workflow_id,) = new_ids(1)
        await begin(records, workflow_id)
        await tell(records, workflow_id, FAILURE)
        async with relay_process(sqlite_url, black_hole, "--once", "--seconds", "0.2") as process:
            _, errors = await process.communicate()
            assert (process.returncode, b"0 events sent, 2 wait" in errors) == (1, True)
        async with relay_process(sqlite_url, broker, "--once") as process:
            _, errors = await process.communicate()
            assert (process.returncode, b"2 events sent, 0 wait" in errors) == (0, True)
        await begin(records, workflow_id + "-b")
        await tell(records, workflow_id + "-b", FAILURE)
        async with relay_process(sqlite_url, broker) as process:
            await until(lambda: all_sent(records), "it runs")
            process.send_signal(signal.SIGTERM)
            _, errors = await process.communicate()
            assert process.returncode == 0
            assert b"Traceback" not in errors
