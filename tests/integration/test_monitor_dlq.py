"""`monitor-dlq` and `relay-events` with a real Kafka, a real Prefect server and a real webhook."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any
from uuid import uuid4

import pytest
from aiokafka import AIOKafkaProducer  # type: ignore[import-untyped]  # it ships no types
from prefect.blocks.notifications import MattermostWebhook
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_HOME, PREFECT_SERVER_ANALYTICS_ENABLED, temporary_settings
from prefect.testing.utilities import prefect_test_harness

from blocks.event_broker import EventBroker
from deployments.register import register_control
from flows.monitor_dlq import monitor_dlq
from flows.relay import relay_events
from receiver.contract import ErrorCode
from tasks.dead_letter_queue import GROUP, TOPIC, DeadLetterUnknown
from tasks.dead_letters import NotificationBlockRefused, RedeployRefused
from tasks.outbox import EventsWaiting, step_relay
from tasks.outbox_producer import BrokerNotConfigured
from tasks.parameters import DeploymentParameters
from tasks.records import Facts, Records
from tests.integration.kafka import (
    S,
    addressed,
    begin,
    check_complete,
    consuming,
    partitions_of,
    stand_at_the_end,
    tell,
    until,
)
from tests.webhook import HOOK, Webhook, listening

# The specification's DLQ monitor, as it stands there.
DLQ_MONITOR = '''
from aiokafka import AIOKafkaConsumer

async def monitor_deployment_dlq():
    """Monitor deployment failures in DLQ."""

    consumer = AIOKafkaConsumer(
        "dev.omninode-bridge.deployment.dlq.v1",
        bootstrap_servers="localhost:29092",
        group_id="deployment-dlq-monitor",
    )

    await consumer.start()

    try:
        async for message in consumer:
            event = json.loads(message.value)

            deployment_id = event["envelope"]["correlation_id"]
            error_code = event["payload"]["error_code"]
            error_message = event["payload"]["error_message"]
            retry_count = event["payload"]["retry_count"]

            print(f"🚨 DLQ Event: Deployment {deployment_id}")
            print(f"   Error: {error_code} - {error_message}")
            print(f"   Retry count: {retry_count}")

            # Alert on critical failures
            if error_code in ["ROLLBACK_FAILED", "REMOTE_ENDPOINT_UNREACHABLE"]:
                await send_alert(
                    severity="critical",
                    message=f"Deployment {deployment_id} requires manual intervention",
                    details=event,
                )

    finally:
        await consumer.stop()
'''
pytest_plugins = ("tests.integration.kafka_fixtures",)
IDLE_SECONDS = 0.6


@pytest.fixture(scope="module")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Prefect server of its own, with the Prefect deployments of the control side."""
    updates = {PREFECT_HOME: tmp_path_factory.mktemp("prefect"), PREFECT_SERVER_ANALYTICS_ENABLED: False}
    with temporary_settings(updates), prefect_test_harness(server_startup_timeout=60):
        asyncio.run(register_control())
        yield


@pytest.fixture
def webhook(prefect_server: None) -> Iterator[Webhook]:
    """A listening service, and the block `custom-webhook/ops` that leads to it."""
    with listening() as hook:
        yield hook


@pytest.fixture
async def records(
    sqlite_url: str, broker: EventBroker, prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Records]:
    """Records and broker as a control host has them, and a group that has read everything before."""
    monkeypatch.setenv("DATABASE_URL", sqlite_url)
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", broker.bootstrap_servers)
    await stand_at_the_end(broker, GROUP)
    async with await Records.open(sqlite_url) as opened:
        yield opened


def request(**changes: Any) -> dict[str, Any]:
    asked = {"container_name": "shop", "remote_host": "target", "image_tag": "v2", **changes}
    return DeploymentParameters.model_validate(asked).model_dump(mode="json")


async def fail(
    records: Records,
    broker: EventBroker,
    code: ErrorCode = ErrorCode.BUILD_FAILED,
    workflow_id: str = "",
    **asked: Any,
) -> str:
    """A deployment that failed, with its dead letter in the topic; returns the workflow's id."""
    workflow_id = workflow_id or f"w-{uuid4().hex[:8]}"
    await begin(records, workflow_id, request=request(**asked))
    async with step_relay(records, broker, grace_seconds=20):
        failure = Facts(error_code=code, error_message="what went wrong", retry_count=2)
        await tell(records, workflow_id, [(S.FAILED, failure)])
    assert not await records.unsent(1)
    return workflow_id


async def put(broker: EventBroker, value: bytes | None) -> None:
    """A record that is not ours in the dead letter topic."""
    producer = AIOKafkaProducer(**broker.producer_settings())
    await producer.start()
    try:
        await producer.send_and_wait(TOPIC, value, key=b"other")
    finally:
        await producer.stop()


async def monitor(**parameters: Any) -> dict[str, int]:
    asked = {"notification_block": HOOK, "idle_seconds": IDLE_SECONDS, **parameters}
    told: dict[str, int] = await monitor_dlq(**asked)
    return told


async def runs_of(workflow_id: str) -> list[FlowRun]:
    """Flow runs that were started for a workflow's dead letter."""
    async with get_client() as client:
        runs = await client.read_flow_runs()
    return [run for run in runs if f"redeploys:{workflow_id}" in run.tags]


async def test_each_dead_letter_is_told_once(records: Records, broker: EventBroker, webhook: Webhook) -> None:
    """Critical where a person has to act, an error else; told letters are committed."""
    codes = (ErrorCode.BUILD_FAILED, ErrorCode.ROLLBACK_FAILED, ErrorCode.REMOTE_ENDPOINT_UNREACHABLE)
    ids = [await fail(records, broker, code) for code in codes]
    assert await monitor() == {"notified": 3, "redeployed": 0}
    assert sorted(webhook.subjects()) == [
        "CRITICAL: deployment of shop:v2 to target failed: REMOTE_ENDPOINT_UNREACHABLE",
        "CRITICAL: deployment of shop:v2 to target failed: ROLLBACK_FAILED",
        "ERROR: deployment of shop:v2 to target failed: BUILD_FAILED",
    ]
    (body,) = [message["body"] for message in webhook.received if ids[1] in message["body"]]
    assert body.splitlines() == [
        f"Workflow: {ids[1]}",
        "Error: ROLLBACK_FAILED - what went wrong",
        "Retry count: 2",
        "Action: manual_intervention_required",
    ]
    assert await monitor() == {"notified": 0, "redeployed": 0}


async def test_a_letter_that_could_not_be_told_is_read_again(
    records: Records, broker: EventBroker, webhook: Webhook
) -> None:
    """After three tries the flow fails, with the letter uncommitted; the next run tells and commits it."""
    workflow_id = await fail(records, broker)
    assert await lag(broker) == 1
    webhook.answers = [503, 503, 503]
    with pytest.raises(Exception, match="503"):
        await monitor()
    assert (len(webhook.received), await lag(broker)) == (3, 1)
    assert await monitor() == {"notified": 1, "redeployed": 0}
    assert workflow_id in webhook.received[-1]["body"]
    assert await lag(broker) == 0


async def test_what_is_no_dead_letter_is_told_and_skipped(
    records: Records, broker: EventBroker, webhook: Webhook
) -> None:
    """It neither stops the monitor nor comes again, and shows no secret."""
    for value in (b"\xff{", b"[" * 100_000, b'{"envelope": {}, "password": "hunter2"}', b"", None):
        await put(broker, value)
    await fail(records, broker)
    assert await monitor() == {"notified": 6, "redeployed": 0}
    assert webhook.subjects().count("ERROR: a dead letter cannot be read") == 5
    bodies = "\n".join(message["body"] for message in webhook.received)
    assert f"{TOPIC}, partition " in bodies
    assert "envelope.event_id: Field required" in bodies
    assert "hunter2" not in bodies
    assert await monitor() == {"notified": 0, "redeployed": 0}


async def test_the_monitor_ends_after_the_number_that_was_asked_for(
    records: Records, broker: EventBroker, webhook: Webhook
) -> None:
    """What is over stays for the next run."""
    for _ in range(3):
        await fail(records, broker)
    assert (await monitor(max_messages=2))["notified"] == 2
    assert (await monitor(max_messages=2))["notified"] == 1


async def test_any_notification_block_will_do(
    records: Records, broker: EventBroker, webhook: Webhook
) -> None:
    """One of Apprise's too, whose failures are silent unless they are asked for."""
    block = MattermostWebhook(hostname="127.0.0.1", port=webhook.port, token="token", secure=False)
    await block.asave("team", overwrite=True)
    await fail(records, broker)
    webhook.answers = [500]
    assert (await monitor(notification_block="mattermost-webhook/team"))["notified"] == 1
    assert len(webhook.received) == 2
    assert "BUILD_FAILED" in json.dumps(webhook.received[-1])


@pytest.mark.parametrize("name", ["ops", "custom-webhook/nobody", "event-broker/lab", "no-such-type/ops"])
async def test_a_block_that_cannot_notify_is_refused_before_anything_is_read(
    records: Records, broker: EventBroker, webhook: Webhook, name: str
) -> None:
    """The message says how a block is named."""
    await broker.save("lab", overwrite=True)
    await fail(records, broker)
    with pytest.raises(NotificationBlockRefused, match=name) as refused:
        await monitor(notification_block=name)
    assert "slack-webhook/ops" in refused.value.next_step
    assert (await lag(broker), webhook.received) == (1, [])


async def test_a_monitor_without_a_broker_says_so(webhook: Webhook, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is configured: neither block nor variable."""
    monkeypatch.delenv("KAFKA_BOOTSTRAP_SERVERS", raising=False)
    with pytest.raises(BrokerNotConfigured):
        await monitor()


async def test_letters_are_deployed_again_once_where_that_may_help(
    records: Records, broker: EventBroker, webhook: Webhook
) -> None:
    """With the parameters of the request; not those that want a person, nor those with masked values."""
    build = {"build_context": "/srv/shop"}
    again = await fail(records, broker, build_options=build, image_tag="v2")
    person = await fail(records, broker, ErrorCode.ROLLBACK_FAILED)
    masked = await fail(
        records, broker, deployment_config={"environment_variables": {"DB_PASSWORD": "hunter2"}}
    )
    assert await monitor(redeploy=True) == {"notified": 3, "redeployed": 1}
    (run,) = await runs_of(again)
    assert run.parameters == request(build_options=build)
    assert not await runs_of(person)
    assert not await runs_of(masked)
    outcomes = {m["body"].splitlines()[0][10:]: m["body"].splitlines()[-1] for m in webhook.received}
    assert outcomes[again] == "Deploy again: yes"
    assert outcomes[person] == "Deploy again: no: ROLLBACK_FAILED wants a person first"
    assert "deployment_config.environment_variables.DB_PASSWORD: the value is redacted" in outcomes[masked]
    assert await monitor(redeploy=again) == {"notified": 0, "redeployed": 1}
    assert [found.id for found in await runs_of(again)] == [run.id], "at most once for each letter"


async def test_a_deployment_that_failed_again_is_not_deployed_for_ever(
    records: Records, broker: EventBroker, webhook: Webhook
) -> None:
    """The run that a letter started tells a letter of its own: that one waits for a person."""
    first = await fail(records, broker)
    await monitor(redeploy=True)
    (run,) = await runs_of(first)
    second = await fail(records, broker, workflow_id=f"{run.id}-2")
    assert await monitor(redeploy=True) == {"notified": 1, "redeployed": 0}
    assert "failed again" in webhook.received[-1]["body"]
    assert await monitor(redeploy=second) == {"notified": 0, "redeployed": 1}
    assert len(await runs_of(second)) == 1


async def test_a_letter_that_was_told_long_ago_can_be_deployed_again(
    records: Records, broker: EventBroker, webhook: Webhook
) -> None:
    """By the workflow's id, committed or not, also where a person had to look first; others stay unread."""
    told = await fail(records, broker, ErrorCode.ROLLBACK_FAILED)
    await monitor()
    await fail(records, broker)
    assert await monitor(redeploy=told) == {"notified": 0, "redeployed": 1}
    assert len(await runs_of(told)) == 1
    assert (await monitor())["notified"] == 1


async def test_a_letter_that_cannot_be_deployed_again_says_why(
    records: Records, broker: EventBroker, webhook: Webhook
) -> None:
    """The field by name, without its value; and a workflow that the queue does not hold."""
    asked = {"environment_variables": {"API_TOKEN": "hunter2", "MODE": "fast"}, "command": ["-p", "x"]}
    masked = await fail(records, broker, deployment_config=asked)
    with pytest.raises(RedeployRefused, match=r"environment_variables\.API_TOKEN: the value is redacted"):
        await monitor(redeploy=masked)
    with pytest.raises(DeadLetterUnknown, match="w-nobody"):
        await monitor(redeploy="w-nobody")


async def test_the_specifications_dlq_monitor_alerts(
    records: Records, broker: EventBroker, capsys: pytest.CaptureFixture[str]
) -> None:
    """Word for word: it prints code, message and retry count, and alerts on what is critical."""
    alerts: list[dict[str, Any]] = []

    async def send_alert(**alert: Any) -> None:
        alerts.append(alert)

    names: dict[str, Any] = {"json": json, "send_alert": send_alert}
    exec(addressed(broker, DLQ_MONITOR), names)  # noqa: S102 - our own copy
    workflow_id = await fail(records, broker, ErrorCode.ROLLBACK_FAILED)
    monitoring = asyncio.create_task(names["monitor_deployment_dlq"]())
    await until(lambda: alerts, "the alert")
    monitoring.cancel()
    await asyncio.wait({monitoring})
    assert capsys.readouterr().out.splitlines() == [
        f"🚨 DLQ Event: Deployment {workflow_id}",
        "   Error: ROLLBACK_FAILED - what went wrong",
        "   Retry count: 2",
    ]
    assert alerts[0]["message"] == f"Deployment {workflow_id} requires manual intervention"
    assert alerts[0]["details"]["payload"]["request"]["container_name"] == "shop"


async def test_the_flow_relays_what_waits(
    records: Records, broker: EventBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a schedule: it ends when all is sent, and fails when events remain."""
    await begin(records, "w-" + uuid4().hex)
    (workflow,) = await records.recent()
    await tell(records, workflow.workflow_id, [(S.FAILED, Facts())])
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:1")
    with pytest.raises(EventsWaiting, match="2 events wait"):
        await relay_events(seconds=0.5)
    assert await relay_events(seconds=0.5, until_empty=False) == {"sent": 0, "waiting": 2}
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", broker.bootstrap_servers)
    assert await relay_events(seconds=20) == {"sent": 2, "waiting": 0}
    await check_complete(records, broker, [workflow.workflow_id])


async def lag(broker: EventBroker) -> int:
    """Letters that the group has not committed."""
    async with consuming(broker, GROUP) as consumer:
        partitions = await partitions_of(consumer, [TOPIC])
        consumer.assign(partitions)
        ends = await consumer.end_offsets(partitions)
        return sum([ends[p] - (await consumer.committed(p) or 0) for p in partitions])
