"""Publish the events of deployments to Kafka, for as long as this process runs.

    python -m deployments.relay             until SIGTERM or SIGINT
    python -m deployments.relay --once      until nothing is left to send

Several may run for one database, on several control hosts: one publishes, the others stand by.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence

from prefect.settings import PREFECT_API_URL

from blocks.event_broker import EventBroker
from blocks.records_database import RecordsDatabase, find_records_url
from receiver.logs import configure
from tasks.errors import GantryError
from tasks.outbox import RelayReport, run_relay
from tasks.outbox_producer import BrokerNotConfigured, require_broker

log = logging.getLogger(__name__)
_END_SECONDS = 2.0


def parser() -> argparse.ArgumentParser:
    """Arguments of `python -m deployments.relay`."""
    parser = argparse.ArgumentParser(
        prog="python -m deployments.relay",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Environment: KAFKA_BOOTSTRAP_SERVERS, DATABASE_URL or GANTRY_HOME, LOG_LEVEL, LOG_FORMAT "
        "(text or json). With PREFECT_API_URL set, the blocks event-broker/default and "
        "records-database/default come first.",
    )
    parser.add_argument(
        "--once", action="store_true", help="end when nothing is left to send; exit code 1 if events remain"
    )
    parser.add_argument(
        "--seconds", type=float, metavar="N", help="end after N seconds (default with --once: 60)"
    )
    return parser


async def main(arguments: Sequence[str]) -> int:
    """Relay as the arguments say; returns the exit code."""
    options = parser().parse_args(arguments)
    seconds = options.seconds or (60.0 if options.once else None)
    relaying = asyncio.current_task()
    assert relaying is not None  # noqa: S101 - for the type checker: a coroutine runs in a task
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, relaying.cancel)
    try:
        report = await _relay(seconds, once=options.once)
    except asyncio.CancelledError:
        await _let_end()
        log.info("relay: ended as asked; what is unsent waits for the next one")
        return 0
    except GantryError as exc:
        log.error("relay: %s. %s", exc, exc.next_step)
        return 1
    log.info("relay: %d events sent, %d wait", report.sent, report.waiting)
    return 1 if options.once and report.waiting else 0


async def _relay(seconds: float | None, *, once: bool) -> RelayReport:
    broker, records_url = await _configuration()
    return await run_relay(records_url, broker, seconds=seconds, until_empty=once)


async def _let_end() -> None:
    """SQLAlchemy gives a connection back in a task of its own, which the end of the loop would cut off."""
    if others := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(others, timeout=_END_SECONDS)


async def _configuration() -> tuple[EventBroker, str]:
    """From the environment alone where no Prefect server is named: none is started just to be asked."""
    if PREFECT_API_URL.value():
        return await require_broker(), await find_records_url()
    broker = EventBroker.from_environment()
    if broker is None:
        raise BrokerNotConfigured
    return broker, RecordsDatabase.from_environment().sqlalchemy_url()


if __name__ == "__main__":
    configure(os.environ.get("LOG_FORMAT", "text"), os.environ.get("LOG_LEVEL", "INFO"))
    sys.exit(asyncio.run(main(sys.argv[1:])))
