"""How the services behind the API are: all asked at once, each for two seconds at most.

Anybody may ask, so an answer counts for a second, however many ask, and details name no host and no user:
those are logged, when they change.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Literal, TypeVar

import docker
from aiokafka.client import AIOKafkaClient  # type: ignore[import-untyped]  # it ships no types

from blocks.build_engine import find_build_engine
from blocks.event_broker import EventBroker, find_event_broker
from deployments.api_models import HealthAnswer, ServiceHealth
from deployments.api_problems import Refusal
from deployments.api_queries import ping
from deployments.api_services import Services
from tasks.engine_address import engine_address
from tasks.events import clean_text

log = logging.getLogger(__name__)
PATIENCE_SECONDS = 2.0
CACHE_SECONDS = 1.0
NEEDED = ("records", "prefect")
Check = Callable[[], Awaitable[str]]
T = TypeVar("T")
_PRODUCER_ONLY = frozenset({"acks", "enable_idempotence"})


class NotConfigured(Exception):
    """The service is not used here"""


class Health:
    """Asks the services, and remembers the answer for a second."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="docker-health")
        self._asked: asyncio.Task[HealthAnswer] | None = None
        self._asked_at = 0.0
        self._told: dict[str, str] = {}

    async def ask(self) -> HealthAnswer:
        """How all of them are, at most a second ago."""
        now = time.monotonic()
        if self._asked is None or (self._asked.done() and now - self._asked_at > CACHE_SECONDS):
            self._asked, self._asked_at = asyncio.create_task(self._ask_all()), now
        return await asyncio.shield(self._asked)

    async def _ask_all(self) -> HealthAnswer:
        checks: Mapping[str, Check] = {
            "records": self._ask_records,
            "prefect": self._ask_prefect,
            "docker": self._ask_docker,
            "kafka": self._ask_kafka,
        }
        answers = await asyncio.gather(*(self._ask(name, check) for name, check in checks.items()))
        found = dict(zip(checks, answers, strict=True))
        return HealthAnswer(status=_verdict(found), version=version(), services=found)

    async def _ask(self, name: str, check: Check) -> ServiceHealth:
        began, cause = time.monotonic(), ""
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                answer = ServiceHealth(status="healthy", detail=await check())
        except NotConfigured as exc:
            return ServiceHealth(status="not_configured", detail=str(exc))
        except TimeoutError:
            answer = ServiceHealth(status="unhealthy", detail=f"no answer within {PATIENCE_SECONDS:.0f} s")
        except Exception as exc:  # noqa: BLE001 - whatever a service's client raises, the service is not well
            answer = ServiceHealth(status="unhealthy", detail=f"does not answer ({type(exc).__name__})")
            cause = clean_text(str(exc))
        self._log(name, answer, cause)
        return answer.model_copy(update={"latency_ms": round((time.monotonic() - began) * 1000)})

    def _log(self, name: str, answer: ServiceHealth, cause: str) -> None:
        """One line when a service's health has changed."""
        if answer.detail != self._told.get(name) and (name in self._told or answer.status != "healthy"):
            level = logging.INFO if answer.status == "healthy" else logging.WARNING
            log.log(level, "%s: %s", name, f"{answer.detail}: {cause}" if cause else answer.detail)
        self._told[name] = answer.detail

    async def _ask_records(self) -> str:
        async with self._services.records() as records:
            return await ping(records)

    async def _ask_prefect(self) -> str:
        async with self._services.prefect() as client:
            await client.hello()
            return "answers"

    async def _ask_docker(self) -> str:
        address = await self._saved(find_build_engine, None) or engine_address()
        await asyncio.get_running_loop().run_in_executor(self._threads, _ping_engine, address)
        return "answers"

    async def _ask_kafka(self) -> str:
        broker = await self._saved(find_event_broker, EventBroker.from_environment())
        if broker is None:
            raise NotConfigured("no broker is named (KAFKA_BOOTSTRAP_SERVERS, or block event-broker/default)")
        settings = {
            name: value for name, value in broker.producer_settings().items() if name not in _PRODUCER_ONLY
        }
        client = AIOKafkaClient(**settings, request_timeout_ms=int(PATIENCE_SECONDS * 1000))
        try:
            await client.bootstrap()
            return f"{len(client.cluster.brokers())} broker(s)"
        finally:
            await client.close()

    async def _saved(self, find: Callable[[], Awaitable[T]], otherwise: T) -> T:
        """What a block says; without Prefect what the environment says, since that may be well."""
        try:
            async with asyncio.timeout(PATIENCE_SECONDS / 2), self._services.prefect():
                return await find()
        except (Refusal, TimeoutError):
            return otherwise


def version() -> str:
    """Of the installed package."""
    try:
        return metadata.version("gantry-deploy")
    except metadata.PackageNotFoundError:
        return "unknown"


def _verdict(found: Mapping[str, ServiceHealth]) -> Literal["healthy", "degraded", "unhealthy"]:
    if any(found[name].status != "healthy" for name in NEEDED):
        return "unhealthy"
    return "degraded" if any(answer.status == "unhealthy" for answer in found.values()) else "healthy"


def _ping_engine(address: str) -> None:
    """Blocking; raises what docker raises."""
    client = docker.APIClient(base_url=address, timeout=int(PATIENCE_SECONDS))
    try:
        client.ping()
    finally:
        client.close()
