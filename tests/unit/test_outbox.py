"""The relay's parts that need no broker: back-off, whose fault an error is, and who relays."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from aiokafka import errors  # type: ignore[import-untyped]  # it ships no types

from blocks.event_broker import EventBroker
from tasks.outbox_producer import BrokerFailed, _is_refusal, connect
from tasks.outbox_relay import FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS, Backoff
from tasks.outbox_seat import PostgresSeat, SqliteSeat, seat_at
from tasks.schema import parse_url

HOLD_THE_PLACE = """
import asyncio, sys, time
from pathlib import Path
from tasks.outbox_seat import SqliteSeat

print(asyncio.run(SqliteSeat(Path(sys.argv[1])).take()), flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A SQLite database in WAL mode with one table."""
    path = tmp_path / "records.db"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE t (n INTEGER)")
    return path


def write(database: Path) -> None:
    with sqlite3.connect(database) as connection:
        connection.execute("INSERT INTO t VALUES (1)")


def test_the_back_off_doubles_within_its_bounds() -> None:
    """Never under 0.2 s, never over 10 s, however long it lasts; and short again after a success."""
    for _ in range(50):
        backoff = Backoff()
        waits = [backoff.next_seconds() for _ in range(12)]
        assert all(FIRST_RETRY_SECONDS <= wait <= LAST_RETRY_SECONDS for wait in waits)
        assert waits[0] <= 0.4 <= waits[1] <= 0.8 <= waits[2]
        assert min(waits[-3:]) >= LAST_RETRY_SECONDS / 2
        backoff.reset()
        assert backoff.next_seconds() <= 0.4


def test_the_back_off_parts_those_that_began_together() -> None:
    """Events that were refused in one batch are not tried in one batch for ever."""
    assert len({Backoff().next_seconds() for _ in range(10)}) > 1


@pytest.mark.parametrize(
    "error",
    [
        errors.MessageSizeTooLargeError(),
        errors.RecordListTooLargeError(),
        errors.InvalidTopicError(),
        errors.TopicAuthorizationFailedError("t"),
        errors.UnknownTopicOrPartitionError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_the_event_or_its_topic_is_a_refusal(error: Exception) -> None:
    """It holds back one workflow; others may pass."""
    assert _is_refusal(error)


@pytest.mark.parametrize(
    "error",
    [
        errors.KafkaConnectionError(),
        errors.KafkaTimeoutError(),
        errors.NodeNotReadyError(),
        errors.NotLeaderForPartitionError(),
        errors.NotEnoughReplicasError(),
        errors.OutOfOrderSequenceNumber(),
        errors.ProducerFenced(),
        errors.ProducerClosed(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_the_connection_is_none(error: Exception) -> None:
    """It holds back everything, for a new connection."""
    assert not _is_refusal(error)


async def test_a_connection_that_fails_says_why(capfd: pytest.CaptureFixture[str]) -> None:
    """The brokers and the system's own words, in the error alone."""
    with pytest.raises(BrokerFailed, match=r"127\.0\.0\.1:1: .*Connect call failed"):
        async with connect(EventBroker(bootstrap_servers="127.0.0.1:1")):
            pass
    assert capfd.readouterr().err == ""


async def test_certificates_that_cannot_be_read_are_the_brokers_failure(tmp_path: Path) -> None:
    """Named, so that nobody looks for a fault in the records."""
    broker = EventBroker(
        bootstrap_servers="127.0.0.1:1", security_protocol="SSL", tls_ca_file=tmp_path / "ca.pem"
    )
    with pytest.raises(BrokerFailed, match=r"ca\.pem"):
        async with connect(broker):
            pass


async def test_one_relay_at_a_time_has_the_place(database: Path) -> None:
    """Another one gets it as soon as the first has left; taking it twice is taking it."""
    first, second = SqliteSeat(database), SqliteSeat(database)
    assert await first.take()
    assert await first.take()
    assert not await second.take()
    await first.leave()
    assert await second.take()
    await second.leave()


async def test_the_place_is_free_when_its_process_was_killed(database: Path) -> None:
    """kill -9 leaves nothing to be cleared away."""
    pipe = asyncio.subprocess.PIPE
    command = (sys.executable, "-c", HOLD_THE_PLACE, str(database))
    holder = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    assert holder.stdout is not None
    assert await holder.stdout.readline() == b"True\n"
    seat = SqliteSeat(database)
    assert not await seat.take()
    holder.kill()
    await holder.wait()
    assert await seat.take()
    await seat.leave()


async def test_the_watch_sees_what_others_commit_and_nothing_else(database: Path) -> None:
    """The first look counts as a change; after that each commit does, once."""
    seat = SqliteSeat(database)
    assert await seat.changed()
    assert not await seat.changed()
    write(database)
    assert await seat.changed()
    assert not await seat.changed()
    with sqlite3.connect(database) as connection:
        connection.execute("INSERT INTO t VALUES (2)")
        assert not await seat.changed()
    assert await seat.changed()
    await seat.leave()


async def test_a_database_that_cannot_be_watched_counts_as_changed(tmp_path: Path) -> None:
    """Who reads the rows next finds out what is wrong with it."""
    seat = SqliteSeat(tmp_path / "missing" / "records.db")
    assert await seat.changed()
    assert await seat.changed()


def test_each_kind_of_database_has_its_place(tmp_path: Path) -> None:
    """A lock file beside SQLite, a session's lock in PostgreSQL."""
    assert isinstance(seat_at(parse_url(f"sqlite:///{tmp_path}/r.db")), SqliteSeat)
    assert isinstance(seat_at(parse_url("postgresql://user@host/name")), PostgresSeat)


def test_a_flow_without_a_broker_loads_no_kafka() -> None:
    """The import costs a tenth of a second, which every flow run would pay."""
    code = "import tasks.outbox, sys; sys.exit('aiokafka' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
