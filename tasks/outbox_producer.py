"""One connection to the brokers: an event that is published was acknowledged by all replicas.

The only place that knows aiokafka's producer. Reads no records and keeps nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from blocks.event_broker import EventBroker, find_event_broker
from tasks.errors import GantryError
from tasks.records import OutboxRow

CONNECT_SECONDS = 10.0
ACK_SECONDS = 30.0
_REQUEST_TIMEOUT_MS = 15_000
_CLOSE_SECONDS = 0.1


class BrokerNotConfigured(GantryError):
    """No Kafka broker is configured"""

    next_step = "Set KAFKA_BOOTSTRAP_SERVERS=host:port, or save the block event-broker/default."


class BrokerFailed(GantryError):
    """The Kafka brokers cannot be reached, or do not acknowledge"""

    next_step = (
        "Check KAFKA_BOOTSTRAP_SERVERS (or the block event-broker/default) and that the brokers run. "
        "Nothing is lost: events wait in the outbox."
    )


class EventRefused(GantryError):
    """The Kafka brokers refuse an event"""

    next_step = (
        "Compare its size with message.max.bytes and max.message.bytes of the topic; check that the topic "
        "exists or may be made, and that this client may write to it. The event is tried again by itself."
    )


class Producer:
    """Publishes events over one connection; made by `connect`."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def publish(self, row: OutboxRow) -> None:
        """Send one event and wait until it is acknowledged.

        Raises `EventRefused` when another event might pass, else `BrokerFailed`. After either, events
        that follow may fail for want of a sequence number: go on with a new connection.
        """
        from aiokafka.errors import KafkaError  # type: ignore[import-untyped]  # it ships no types

        headers = [("event_id", row.event_id.encode()), ("event_type", row.event_type.encode())]
        key, value = row.workflow_id.encode(), row.message.encode()
        try:
            async with asyncio.timeout(ACK_SECONDS):
                await self._client.send_and_wait(row.topic, value, key=key, headers=headers)
        except TimeoutError as exc:
            raise BrokerFailed(f"no acknowledgement within {ACK_SECONDS:g} s") from exc
        except KafkaError as exc:
            if _is_refusal(exc):
                raise EventRefused(
                    f"{row.event_type} {row.event_id} of workflow {row.workflow_id} ({len(value)} bytes) "
                    f"to {row.topic}: {_describe(exc)}"
                ) from exc
            raise BrokerFailed(_describe(exc)) from exc


async def require_broker() -> EventBroker:
    """The block event-broker/default, else KAFKA_BOOTSTRAP_SERVERS; raises `BrokerNotConfigured`."""
    broker = await find_event_broker()
    if broker is None:
        raise BrokerNotConfigured
    return broker


@asynccontextmanager
async def connect(broker: EventBroker) -> AsyncIterator[Producer]:
    """A producer that is connected; raises `BrokerFailed`. Leaving drops what is not acknowledged yet."""
    # Most flows run without a broker: they need not wait for the import.
    from aiokafka import AIOKafkaProducer  # type: ignore[import-untyped]  # it ships no types
    from aiokafka.errors import KafkaError

    quieten_aiokafka()
    try:
        client = AIOKafkaProducer(**broker.producer_settings(), request_timeout_ms=_REQUEST_TIMEOUT_MS)
    except OSError as exc:  # of the certificates
        raise BrokerFailed(f"tls_ca_file {broker.tls_ca_file}: {_describe(exc)}") from exc
    try:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await client.start()
        except TimeoutError as exc:
            raise BrokerFailed(f"{broker.bootstrap_servers}: no answer within {CONNECT_SECONDS:g} s") from exc
        except (KafkaError, OSError) as exc:
            raise BrokerFailed(f"{broker.bootstrap_servers}: {last_words() or _describe(exc)}") from exc
        yield Producer(client)
    finally:
        await _close(client)


async def _close(client: Any) -> None:
    """At once. aiokafka's own `stop` waits for acknowledgements, for ever when the brokers are gone.

    Its sender waits for its requests when it is cancelled; cancelled again it gives them up. A producer
    without a sender only closes its connections.
    """
    sender, client._sender = client._sender.sender_task, None
    for _ in range(2):
        if sender is not None and not sender.done():
            sender.cancel()
            await asyncio.wait({sender}, timeout=_CLOSE_SECONDS)
    with suppress(TimeoutError):  # a connection that does not even close ends with the process
        async with asyncio.timeout(_CLOSE_SECONDS):
            await client.stop()


def _is_refusal(exc: Exception) -> bool:
    """True when it is about this event or its topic, not about the connection or the producer."""
    from aiokafka import errors

    producer_is_done = (
        errors.OutOfOrderSequenceNumber,
        errors.ProducerFenced,
        errors.InvalidProducerEpoch,
        errors.InvalidProducerIdMapping,
    )
    lasting = isinstance(exc, errors.UnknownTopicOrPartitionError) or not getattr(exc, "retriable", False)
    return isinstance(exc, errors.BrokerResponseError) and lasting and not isinstance(exc, producer_is_done)


def _describe(exc: Exception) -> str:
    return f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__


class _LastWords(logging.Handler):
    """Keeps what was logged last: aiokafka logs why a connection failed and raises only that it did."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage()


_LAST_WORDS = _LastWords(logging.WARNING)


def quieten_aiokafka() -> None:
    """It writes ten lines a second while a broker is away; we write one when it goes.

    Unless somebody gave its logger a level: then it is wanted.
    """
    logger = logging.getLogger("aiokafka")
    _LAST_WORDS.text = ""
    logger.addHandler(_LAST_WORDS)
    logger.propagate = logger.level != logging.NOTSET


def last_words() -> str:
    """What aiokafka complained of last, since `quieten_aiokafka`."""
    return _LAST_WORDS.text
