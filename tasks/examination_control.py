"""Finds out how the control side is: server, engine that builds, disk, records, broker. Changes nothing."""

from __future__ import annotations

import asyncio
import os
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError
from sqlalchemy import URL
from sqlalchemy.exc import SQLAlchemyError

from blocks.build_engine import find_build_engine
from blocks.event_broker import EventBroker, find_event_broker
from blocks.records_database import RecordsDatabase, find_records_url
from receiver.contract import HostDisk
from tasks import migrations, store
from tasks.engine_address import engine_address
from tasks.examination_prefect import ask_prefect, place_of
from tasks.findings import BrokerFound, BuildEngine, ControlFindings, OpenWorkflow, Prefect, RecordsFound
from tasks.records import Records
from tasks.schema import HEAD_REVISION, make_engine, parse_url

POOL = "control"
DEPLOYMENTS = ("deploy-container/default", "rollback-container/default", "reconcile/default")
ENGINE_SECONDS, RECORDS_SECONDS, BROKER_SECONDS = 5.0, 8.0, 5.0
MOST_WORKFLOWS = 500
_PRODUCER_ONLY = frozenset({"acks", "enable_idempotence"})


async def examine_control() -> ControlFindings:
    """All parts at once; without a server, what blocks name is looked for in the environment."""
    prefect = await ask_prefect()
    place, engine, records, broker = await asyncio.gather(
        place_of(POOL, DEPLOYMENTS, prefect), _engine(prefect), _records(prefect), _broker(prefect)
    )
    return ControlFindings(datetime.now(UTC), prefect, engine, home_disk(), records, broker, place)


# -- the engine that builds ----------------------------------------------------------------------


async def _engine(prefect: Prefect) -> BuildEngine:
    saved = None if prefect.problem else await find_build_engine()
    address = saved or engine_address()
    try:
        async with asyncio.timeout(ENGINE_SECONDS + 1):
            return await asyncio.to_thread(_ask_engine, address)
    except TimeoutError:
        return BuildEngine(address, problem=f"no answer in {ENGINE_SECONDS:.0f} s")


def _ask_engine(address: str) -> BuildEngine:
    import docker
    from docker.errors import DockerException

    try:
        client = docker.APIClient(base_url=address, timeout=int(ENGINE_SECONDS))
        try:
            told = client.version()
        finally:
            client.close()
    except (DockerException, OSError) as exc:
        return BuildEngine(address, problem=" ".join(str(exc).split()))
    return BuildEngine(address, told["Version"], told["Arch"])


# -- the disk ------------------------------------------------------------------------------------


def home_disk() -> HostDisk:
    """The disk of GANTRY_HOME, where packages wait."""
    folder = store.home()
    disk = os.statvfs(folder)
    return HostDisk(
        path=str(folder),
        device=_mount_of(folder),
        free_bytes=disk.f_bavail * disk.f_frsize,
        total_bytes=disk.f_blocks * disk.f_frsize,
    )


def _mount_of(folder: Path) -> str:
    """Where the disk is mounted."""
    found = folder.resolve()
    return str(next(path for path in (found, *found.parents) if path.is_mount()))


# -- the records ---------------------------------------------------------------------------------


async def _records(prefect: Prefect) -> RecordsFound:
    try:
        if prefect.problem:
            url = RecordsDatabase.from_environment().sqlalchemy_url()
        else:
            url = await find_records_url()
    except ValidationError as exc:
        return RecordsFound("the records", problem=_first_line(exc))
    return await look_into_records(url)


async def look_into_records(url: str) -> RecordsFound:
    """The records at `url`; neither makes nor migrates them."""
    parsed = parse_url(url)
    shown = parsed.render_as_string(hide_password=True)
    try:
        async with asyncio.timeout(RECORDS_SECONDS):
            return await _look_into(parsed, shown)
    except TimeoutError:
        return RecordsFound(shown, problem=f"no answer in {RECORDS_SECONDS:.0f} s")
    except (OSError, SQLAlchemyError) as exc:
        return RecordsFound(shown, problem=_first_line(exc))


async def _look_into(url: URL, shown: str) -> RecordsFound:
    if not await asyncio.to_thread(_is_there, url):
        return RecordsFound(shown, None, HEAD_REVISION)
    revision = await migrations.revision(url)
    workflows = await _open_workflows(url) if revision == HEAD_REVISION else ()
    return RecordsFound(shown, revision, HEAD_REVISION, open_workflows=workflows)


def _is_there(url: URL) -> bool:
    """False for a SQLite file that connecting would make."""
    return url.get_backend_name() != "sqlite" or Path(str(url.database)).exists()


async def _open_workflows(url: URL) -> tuple[OpenWorkflow, ...]:
    async with Records(make_engine(url)) as records:
        found = await records.recent(limit=MOST_WORKFLOWS, unfinished=True)
    return tuple(
        OpenWorkflow(
            workflow_id=record.workflow_id,
            container_name=record.container_name,
            image_tag=record.image_tag,
            remote_host=record.remote_host,
            state=record.current_state,
            updated_at=record.updated_at,
        )
        for record in found
    )


# -- the broker ----------------------------------------------------------------------------------


async def _broker(prefect: Prefect) -> BrokerFound | None:
    try:
        broker = EventBroker.from_environment() if prefect.problem else await find_event_broker()
    except ValidationError as exc:
        return BrokerFound("KAFKA_BOOTSTRAP_SERVERS", problem=_first_line(exc))
    return await _ask_broker(broker) if broker else None


async def _ask_broker(broker: EventBroker) -> BrokerFound:
    from aiokafka.client import AIOKafkaClient  # type: ignore[import-untyped]  # it ships no types
    from aiokafka.errors import KafkaError  # type: ignore[import-untyped]  # it ships no types

    servers = broker.bootstrap_servers
    asked = {name: value for name, value in broker.producer_settings().items() if name not in _PRODUCER_ONLY}
    client = AIOKafkaClient(**asked, request_timeout_ms=int(BROKER_SECONDS * 1000))
    try:
        async with asyncio.timeout(BROKER_SECONDS):
            await client.bootstrap()
        return BrokerFound(servers, len(client.cluster.brokers()))
    except TimeoutError:
        return BrokerFound(servers, problem=f"no answer in {BROKER_SECONDS:.0f} s")
    except (KafkaError, OSError) as exc:
        return BrokerFound(servers, problem=_first_line(exc))
    finally:
        await client.close()


def _first_line(exc: Exception) -> str:
    if isinstance(exc, ValidationError):
        return str(exc.errors(include_input=False)[0]["msg"])
    return (str(exc).strip() or type(exc).__name__).splitlines()[0]
