"""What stands behind the HTTP API: the records and the Prefect server, opened when first needed.

Owns the connections, and how their failures are named. Knows no HTTP of ours.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import httpx
from prefect.client.orchestration import PrefectClient, get_client
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from blocks.records_database import find_records_url
from deployments.api_problems import Refusal, Unavailable
from tasks.events import clean_text
from tasks.records import Records, RecordsUnreachable

PREFECT_PATIENCE_SECONDS = 20.0


class PrefectUnreachable(Unavailable):
    """The Prefect server does not answer"""

    slug = "prefect-unreachable"
    next_step = "Check that the Prefect server runs and that PREFECT_API_URL is its address; then try again."


class PrefectRefused(Refusal):
    """The Prefect server refused the request"""

    slug, status = "prefect-refused", 502
    next_step = "Register the control side anew (python -m deployments.register --control); compare versions."


class Services:
    """The services of one application; close them at the end."""

    def __init__(self, find_url: Callable[[], Awaitable[str]] = find_records_url) -> None:
        """`find_url` is asked for the records' database once, when it is first needed."""
        self.stopping = threading.Event()
        self._find_url = find_url
        self._opening = asyncio.Lock()
        self._records: Records | None = None
        self._client: PrefectClient | None = None

    @asynccontextmanager
    async def records(self) -> AsyncIterator[Records]:
        """The records; raises `RecordsUnreachable` for whatever goes wrong with their database."""
        with _records_errors():
            yield await self._open()

    @asynccontextmanager
    async def prefect(self) -> AsyncIterator[PrefectClient]:
        """The Prefect server; raises `PrefectUnreachable` or `PrefectRefused`, and its ObjectNotFound."""
        with _prefect_errors():
            async with asyncio.timeout(PREFECT_PATIENCE_SECONDS):
                yield await self._connect()

    async def close(self) -> None:
        """Give all connections back."""
        if self._client is not None:
            await self._client.__aexit__(None, None, None)
        if self._records is not None:
            await self._records.close()

    async def _open(self) -> Records:
        async with self._opening:
            if self._records is None:
                with _prefect_errors():  # the URL may be in a block
                    url = await self._find_url()
                self._records = await Records.open(url)
            return self._records

    async def _connect(self) -> PrefectClient:
        """One client for all: making one costs as much as several calls."""
        if self._client is None:
            # Entering makes no call, so nothing else can come between.
            self._client = await get_client().__aenter__()
        return self._client


@contextmanager
def _records_errors() -> Iterator[None]:
    try:
        yield
    except (OSError, DBAPIError, PoolTimeout) as exc:
        raise RecordsUnreachable(f"The records do not answer: {exc}") from exc


@contextmanager
def _prefect_errors() -> Iterator[None]:
    try:
        yield
    except httpx.HTTPStatusError as exc:
        if exc.response.status_code >= httpx.codes.INTERNAL_SERVER_ERROR:
            raise PrefectUnreachable(f"Prefect answers {exc.response.status_code}") from exc
        raise PrefectRefused(_told(exc.response)) from exc
    except (httpx.TransportError, TimeoutError) as exc:
        raise PrefectUnreachable(f"Prefect gave no answer: {type(exc).__name__}") from exc
    except RuntimeError as exc:
        # Prefect's own "Failed to reach API" has no type; its cause tells it from all the others.
        if isinstance(exc.__cause__, httpx.HTTPError):
            raise PrefectUnreachable(f"Prefect gave no answer: {type(exc.__cause__).__name__}") from exc
        raise


def _told(response: httpx.Response) -> str:
    return clean_text(f"Prefect answers {response.status_code}: {response.text[:500]}")
