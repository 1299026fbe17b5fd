"""A deployment told to a real Kafka while it happens, and a broker that is away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from deployments import lab_kafka
from deployments.lab import Lab
from tests.e2e.deploying import Service, events_of, in_control, prefect_api, query, wait_for
from tests.services import require_service

BROKER = """
import pathlib, signal, sys
from deployments.lab_kafka import KafkaBroker
with KafkaBroker(pathlib.Path(sys.argv[1])) as broker:
    pathlib.Path(sys.argv[2]).write_text(broker.bootstrap_servers)
    signal.pause()
"""
SAVE_BLOCK = """
import sys
from blocks.event_broker import EventBroker
EventBroker(bootstrap_servers=sys.argv[1]).save("default", overwrite=True)
"""
DELETE_BLOCK = "from blocks.event_broker import EventBroker; EventBroker.delete('default')"
CONSUME = """
import asyncio, json, sys
from aiokafka import AIOKafkaConsumer
from tasks.events import TOPICS

async def main(servers, workflow_id, count):
    consumer = AIOKafkaConsumer(*TOPICS, bootstrap_servers=servers, auto_offset_reset="earliest")
    await consumer.start()
    found = []
    try:
        async with asyncio.timeout(30):
            async for message in consumer:
                envelope = json.loads(message.value)["envelope"]
                if envelope["correlation_id"] == workflow_id:
                    found.append((envelope["sequence"], envelope["event_type"]))
                if len(found) == count:
                    break
    finally:
        await consumer.stop()
    print(" ".join(kind for _, kind in sorted(found)))

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""


@contextmanager
def configured(lab: Lab, servers: str) -> Iterator[None]:
    """Within the block, deployments publish to these brokers."""
    in_control(lab, "-c", SAVE_BLOCK, servers)
    try:
        yield
    finally:
        in_control(lab, "-c", DELETE_BLOCK)


@pytest.fixture
def servers(furnished: Lab) -> Iterator[str]:
    """A real broker on the control side."""
    missing = lab_kafka.missing_requirement()
    require_service(missing is None, f"no Kafka here: {missing}", lab_kafka.INSTALL_HINT)
    lab_kafka.fetch_jars()  # here: the control side's namespace reaches no one outside
    told = furnished.state_dir / "kafka-address"
    folder = str(furnished.state_dir / "kafka")
    broker = furnished.control.spawn("kafka", furnished.python, "-c", BROKER, folder, str(told))
    wait_for(lambda: told.exists() and told.read_text(), "Kafka", seconds=90)
    yield told.read_text()
    broker.stop()
    del furnished.control.services["kafka"]  # it was this test's own, not the lab's


def test_a_deployment_is_told_to_kafka_while_it_happens(service: Service, servers: str) -> None:
    """Every event of the workflow arrives by the run's own relay, in the order of the records."""
    with configured(service.lab, servers):
        done = service.deploy("v1")
    assert done.state == "COMPLETED", done.message
    expected = events_of(service.lab, done.run_id)
    unsent = "SELECT id FROM event_outbox WHERE workflow_id = ? AND sent_at IS NULL"
    assert query(service.lab, unsent, done.run_id) == []
    said = in_control(service.lab, "-c", CONSUME, servers, done.run_id, str(len(expected)))
    assert said.split() == expected


def test_a_broker_that_is_away_costs_a_deployment_nothing_but_its_events_wait(service: Service) -> None:
    """The deployment completes; its events wait in the outbox for the next relay."""
    with configured(service.lab, "127.0.0.1:9"):
        done = service.deploy("v1")
    assert done.state == "COMPLETED", done.message
    waiting = query(
        service.lab,
        "SELECT event_type FROM event_outbox WHERE workflow_id = ? AND sent_at IS NULL",
        done.run_id,
    )
    assert len(waiting) == len(events_of(service.lab, done.run_id)) > 0


def test_a_deployment_is_told_to_prefect_with_the_pool_of_its_host(service: Service) -> None:
    """Each change of state, in order; the host's pool stands before the run's own."""
    done = service.deploy("v1")
    assert done.state == "COMPLETED", done.message
    names = ["started", *["stage-completed"] * 4, "completed"]
    wanted = {"event": {"prefix": ["gantry."]}, "related": {"id": [f"gantry.workflow.{done.run_id}"]}}
    body = {"filter": {**wanted, "order": "ASC"}, "limit": 50}

    def heard() -> list[dict[str, Any]] | None:
        events: list[dict[str, Any]] = prefect_api(service.lab, "POST", "/events/filter", body)["events"]
        return events if len(events) == len(names) else None

    events = wait_for(heard, "all events", seconds=20)
    assert [event["event"].removeprefix("gantry.deployment.") for event in events] == names
    related = events[-1]["related"]
    pools = [one["prefect.resource.name"] for one in related if one["prefect.resource.role"] == "work-pool"]
    assert pools == [service.host.pool, "control"]
    assert f"prefect.flow-run.{done.run_id}" in [one["prefect.resource.id"] for one in related]
