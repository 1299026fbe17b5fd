"""A package sent while it is still made: chunks as they come, its announcement at the end.

Bytes that the host holds are gone on with only when their BLAKE3 is that of our own first bytes; else they
are dropped there. Must not import Prefect, nor know how a package is made.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Protocol

from blocks.receiver_client import (
    UPLOAD_CHUNK_BYTES,
    OffsetRefused,
    Progress,
    ReceiverClient,
    ReceiverError,
    pause_seconds,
)
from receiver.contract import HostState, PackageAnnouncement

# A chunk counts when it is there as a whole. So on a slow link they are smaller: people see how far it is, a
# cut loses little, and the receiver hears of the upload before it takes its sender for dead.
CHUNK_SECONDS = 2.0
MIN_CHUNK_BYTES = 512 * 1024
# Below this a link is worth being kept busy: while the host writes one chunk the next is on its way, and each
# is half as large. The host lets it wait for its turn; one that it refuses is sent again.
SLOW_BYTES_PER_SECOND = 25_000_000


class Replaced(Exception):
    """The package is made anew: what was sent may be of another one"""


class PackageSource(Protocol):
    """A package that may still grow. Each call waits for what it needs, and may raise `Replaced`."""

    async def look(self) -> None:
        """See whether it is whole by now."""

    async def read(self, offset: int, size_bytes: int, /) -> bytes:
        """That many bytes, fewer at the end only."""

    async def digest(self, size_bytes: int, /) -> str | None:
        """BLAKE3 of its first bytes; None when it has fewer."""

    def announcement(self) -> PackageAnnouncement | None:
        """The package once it is whole."""


@dataclass
class _Chunk:
    """One chunk on its way, from when the one before has left this host."""

    offset: int
    size_bytes: int
    has_left: asyncio.Event
    answer: asyncio.Task[_Answer | None]


@dataclass(frozen=True)
class _Answer:
    """The host's new offset after a chunk of that many bytes, and how long it took."""

    offset: int
    size_bytes: int
    seconds: float


@dataclass
class _Stream:
    """One package on its way: how far it is, and how many tries in a row brought nothing."""

    receiver: ReceiverClient
    deployment_id: str
    source: PackageSource
    progress: Progress | None
    max_chunk_bytes: int
    chunk_bytes: int
    offset: int = 0
    proven: int = 0
    farthest: int = 0
    taken_bytes: int = 0
    fruitless: int = 0
    is_slow: bool = False
    next_chunk: _Chunk | None = None
    must_ask: bool = True
    has_begun: bool = False
    is_announced: bool = False
    is_taken: bool = False

    async def advance(self) -> None:
        """The next call to the host."""
        if self.must_ask:
            await self._take_bearings()
            return
        chunk, self.next_chunk = self.next_chunk or self._send(self.offset), None
        if self.is_slow:
            self.next_chunk = self._send(chunk.offset + chunk.size_bytes, after=chunk.has_left)
        answer = await chunk.answer
        if answer is None:
            await self.drop_next()
            self.is_taken = await self._announce()
            self.must_ask = not self.is_taken
            return
        if answer.offset != chunk.offset + chunk.size_bytes:
            await self.drop_next()
        self._measure(answer)
        self._learn(answer.offset)

    def _send(self, offset: int, after: asyncio.Event | None = None) -> _Chunk:
        has_left, size_bytes = asyncio.Event(), self.chunk_bytes
        return _Chunk(
            offset, size_bytes, has_left, asyncio.create_task(self._sent(offset, size_bytes, has_left, after))
        )

    async def _sent(
        self, offset: int, size_bytes: int, has_left: asyncio.Event, after: asyncio.Event | None
    ) -> _Answer | None:
        """The host's answer; None where the package has no bytes there."""
        if after is not None:
            await after.wait()
        bytes_there = await self.source.read(offset, size_bytes)
        if not bytes_there:
            return None
        began = time.monotonic()
        new_offset = await self.receiver.send_chunk(self.deployment_id, offset, bytes_there, has_left.set)
        has_left.set()  # not every transport tells it; of a chunk that failed the next one is dropped
        return _Answer(new_offset, len(bytes_there), time.monotonic() - began)

    async def drop_next(self) -> None:
        """The chunk that is sent ahead is not wanted any more."""
        chunk, self.next_chunk = self.next_chunk, None
        if chunk is not None:
            chunk.answer.cancel()
            await asyncio.gather(chunk.answer, return_exceptions=True)

    def _measure(self, answer: _Answer) -> None:
        seconds = max(answer.seconds, 0.001)
        self.is_slow = answer.size_bytes / seconds < SLOW_BYTES_PER_SECOND
        self._fit_chunks(answer.size_bytes * min(CHUNK_SECONDS / seconds, 2))

    def _fit_chunks(self, size_bytes: float) -> None:
        max_bytes = self.max_chunk_bytes // 2 if self.is_slow else self.max_chunk_bytes
        self.chunk_bytes = min(max(int(size_bytes), MIN_CHUNK_BYTES), max_bytes)

    async def _announce(self) -> bool:
        """True when the host has verified the whole; raises what it refuses."""
        announcement = self.source.announcement()
        if announcement is None:
            return False
        answer = await self.receiver.announce_package(self.deployment_id, announcement)
        self.is_announced = True
        return answer.state is not HostState.RECEIVING

    async def _take_bearings(self) -> None:
        """Announce what is whole already, and go on from what the host holds, if it is ours."""
        await self.source.look()
        if not self.is_announced and self.source.announcement() is not None:
            # What the host holds is proven before: bytes of another package must not be taken for this one.
            await self._prove()
            if self.must_ask:
                return
            self.is_taken = await self._announce()
            self.has_begun = False  # what the host takes up now was not sent here
        if not self.is_taken:
            await self._prove()

    async def _prove(self) -> None:
        """Go on from what the host holds, if it is ours; it is dropped if it is not."""
        self.must_ask = True
        held = await self.receiver.held(self.deployment_id)
        if held.offset > self.proven and held.blake3 is None:
            await asyncio.sleep(self.receiver.config.first_pause_seconds)  # a chunk is being written there
            return
        if held.offset > self.proven and held.blake3 != await self.source.digest(held.offset):
            await self.receiver.drop_package(self.deployment_id)
            self._learn(0)
            return
        self._learn(held.offset)

    def _learn(self, offset: int) -> None:
        if self.has_begun:  # what was there before is not ours; what is more than we know of, we sent
            self.taken_bytes += max(0, offset - self.offset)
        self.offset = self.proven = offset
        self.has_begun, self.must_ask = True, False
        # Measured against the farthest point: a host that loses bytes again and again makes no progress.
        if offset > self.farthest:
            self.farthest, self.fruitless = offset, 0
        announcement = self.source.announcement()
        if self.progress:
            self.progress(offset, announcement.size_bytes if announcement else 0)

    def stumble(self) -> None:
        self.fruitless += 1
        self.must_ask = True
        self._fit_chunks(self.chunk_bytes / 2)

    def begin_anew(self) -> None:
        self.proven, self.must_ask = 0, True


async def send(
    receiver: ReceiverClient,
    deployment_id: str,
    source: PackageSource,
    *,
    progress: Progress | None = None,
    chunk_bytes: int = UPLOAD_CHUNK_BYTES,
    max_resumes: int = 8,
) -> int:
    """Send the package until the host has verified it, at most `chunk_bytes` of it in memory.

    After a broken connection, a wrong offset or a busy host it asks what is held and goes on; it raises the
    last error after `max_resumes` tries in a row that brought nothing. `progress` gets (bytes that the host
    holds, bytes of the package or 0 while nobody knows). Gives the bytes that the host took in this call.
    """
    stream = _Stream(receiver, deployment_id, source, progress, chunk_bytes, chunk_bytes)
    try:
        while not stream.is_taken:
            try:
                await stream.advance()
            except Replaced:
                await stream.drop_next()
                stream.begin_anew()
            except ReceiverError as exc:
                if not (exc.retryable or isinstance(exc, OffsetRefused)) or stream.fruitless >= max_resumes:
                    raise
                await stream.drop_next()
                stream.stumble()
                await asyncio.sleep(pause_seconds(stream.fruitless, receiver.config.first_pause_seconds, exc))
    finally:
        await stream.drop_next()
    return stream.taken_bytes
