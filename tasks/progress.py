"""Work that takes a while, shown in the Prefect UI as it goes on: a progress artifact of the run.

Sent beside the work, at most once a second, as well as it goes: it neither delays nor fails the work.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from uuid import UUID

from prefect.artifacts import acreate_progress_artifact, aupdate_progress_artifact
from prefect.logging import get_run_logger

INTERVAL_SECONDS = 1.0
Tell = Callable[[float, str], None]
_sending: set[asyncio.Task[None]] = set()  # the event loop itself keeps no task alive


@asynccontextmanager
async def shown(key: str, what: str) -> AsyncIterator[Tell]:
    """Show `what` as the artifact `key` while the block works; it gets `tell(percent, words)`.

    `tell` may be called from any thread and as often as one likes. The block's end is not kept waiting for
    the last update; that one says 100 %, or where the work broke off.
    """
    bar = _Bar(key, what)
    sending = asyncio.create_task(bar.send_until_ended())
    _sending.add(sending)
    sending.add_done_callback(_sending.discard)
    try:
        yield bar.tell
    except BaseException:
        bar.end("broke off")
        raise
    bar.tell(100, "")
    bar.end("done")


class _Bar:
    """The newest that was told, and what the server knows of it."""

    def __init__(self, key: str, what: str) -> None:
        self._key, self._what = key, what
        self._newest: tuple[float, str] = (0.0, "")
        self._sent: tuple[float, str] | None = None
        self._artifact: UUID | None = None
        self._ended = asyncio.Event()

    def tell(self, percent: float, words: str) -> None:
        """One assignment, so that any thread may do it."""
        self._newest = (percent if math.isfinite(percent) else 0.0, words)

    def end(self, words: str) -> None:
        """Nothing more will be told."""
        self._newest = (self._newest[0], words)
        self._ended.set()

    async def send_until_ended(self) -> None:
        """Send what is new, at once and then each second; a server that does not take it is left alone."""
        try:
            while not self._ended.is_set():
                await self._send()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._ended.wait(), INTERVAL_SECONDS)
            await self._send()
        except Exception as exc:  # noqa: BLE001 - nothing that is only shown may disturb the work
            get_run_logger().debug("progress of %s is not shown: %s: %s", self._key, type(exc).__name__, exc)

    async def _send(self) -> None:
        newest = self._newest
        if newest == self._sent:
            return
        percent, words = newest
        description = f"{self._what}: {words}" if words else self._what
        if self._artifact is None:
            self._artifact = await acreate_progress_artifact(percent, self._key, description)
        else:
            await aupdate_progress_artifact(self._artifact, percent, description)
        self._sent = newest
