"""One package for all who need it: made once, read while it grows, made anew when its writer dies."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from asyncio.subprocess import PIPE
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from zstandard import ZstdDecompressor

from receiver.contract import PackageFormat
from tasks import shared_package
from tasks.errors import TransferFailed
from tasks.exports import Export, ExportFailed
from tasks.shared_package import PackageKey, PackageReplaced, opened

KEY = PackageKey("sha256:" + "a" * 64, "web:v1", format=PackageFormat.TAR)
BLOCKS = [bytes([number]) * 10_000 for number in range(5)]
WHOLE = b"".join(BLOCKS)
WRITER = """
import asyncio, sys
from tasks.exports import Export
from tasks.shared_package import PackageKey, opened
from receiver.contract import PackageFormat
def blocks():
    yield b"x" * 10_000
    print("half", flush=True)
    sys.stdin.read()
async def main():
    key = PackageKey(sys.argv[1], "web:v1", format=PackageFormat.TAR)
    with opened(key, lambda: Export("archive", blocks())) as shared:
        await shared.finished()
asyncio.run(main())
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A control host of the test's own."""
    monkeypatch.setenv("GANTRY_HOME", str(tmp_path))
    return tmp_path / "packages"


class Exporter:
    """Exports that count, and stop in the middle until they may go on."""

    def __init__(self, error: Exception | None = None) -> None:
        self.count, self.error, self.go_on = 0, error, threading.Event()

    def __call__(self) -> Export:
        self.count += 1
        return Export("archive", self._blocks())

    def _blocks(self) -> Generator[bytes]:
        yield from BLOCKS[:2]
        assert self.go_on.wait(20)
        if self.error:
            raise self.error
        yield from BLOCKS[2:]


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    """One that is let go at the end of the test."""
    made = Exporter()
    yield made
    made.go_on.set()


async def test_two_that_need_a_package_share_one_export(exporter: Exporter) -> None:
    """The second reads what the first has so far, and both have the whole; a third finds it finished."""
    with opened(KEY, exporter) as first, opened(KEY, exporter) as second:
        async with asyncio.timeout(20):
            assert await first.read(0, 15_000) == WHOLE[:15_000]
            assert await second.read(5_000, 15_000) == WHOLE[5_000:20_000]
            assert first.announcement() is second.announcement() is None
            rest = asyncio.gather(*(shared.read(20_000, 99_000) for shared in (first, second)))
            exporter.go_on.set()
            assert [*await rest] == [WHOLE[20_000:]] * 2
            assert await first.finished() == await second.finished()
    assert exporter.count == 1
    with opened(KEY, exporter) as third:
        await third.look()
        announced = third.announcement()
        assert announced is not None
        assert await third.digest(announced.size_bytes) == announced.blake3
    assert (exporter.count, announced.size_bytes, announced.unpacked_bytes) == (1, len(WHOLE), len(WHOLE))


async def test_compression_loses_nothing(exporter: Exporter) -> None:
    """The announcement tells both sizes."""
    exporter.go_on.set()
    with opened(PackageKey(KEY.image_id, "web:v1"), exporter) as shared:
        async with asyncio.timeout(20):
            package = await shared.finished()
        sent = await shared.read(0, package.size_bytes)
    assert ZstdDecompressor().decompressobj().decompress(sent) == WHOLE
    assert package.size_bytes < package.unpacked_bytes == len(WHOLE)


async def test_a_writer_that_is_killed_is_replaced_by_its_reader(exporter: Exporter, home: Path) -> None:
    """The reader is told that the bytes may be others now, and reads the whole of its own export."""
    exporter.go_on.set()
    command = [sys.executable, "-c", WRITER, KEY.image_id]
    writer = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
    try:
        assert writer.stdout is not None
        assert await writer.stdout.readline() == b"half\n"
        with opened(KEY, exporter) as reader:
            assert await reader.read(0, 5_000) == b"x" * 5_000
            assert not reader.was_made_here
            writer.kill()
            await writer.wait()
            async with asyncio.timeout(20):
                with pytest.raises(PackageReplaced):
                    await reader.read(5_000, 99_000)
                assert await reader.read(0, 99_000) == WHOLE
    finally:
        if writer.returncode is None:
            writer.kill()
            await writer.wait()
    assert exporter.count == 1
    assert suffixes(home) == [".package"]


async def test_an_export_that_fails_is_told_and_leaves_nothing(home: Path) -> None:
    """To the one that made it; the next one tries for itself."""
    failing, good = Exporter(ExportFailed("the engine is gone")), Exporter()
    failing.go_on.set()
    good.go_on.set()
    with opened(KEY, failing) as first:
        with pytest.raises(TransferFailed, match="the engine is gone"):
            await first.read(0, 99_000)
        assert suffixes(home) == []
        with opened(KEY, good) as second:
            assert await second.read(0, 99_000) == WHOLE


async def test_an_export_that_nobody_waits_for_ends(exporter: Exporter, home: Path) -> None:
    """Its deployment was cancelled: no package, and no file of it."""
    with opened(KEY, exporter) as shared:
        await shared.read(0, 10)
    exporter.go_on.set()
    await eventually(lambda: suffixes(home) == [])


async def test_a_finished_package_that_changed_is_made_anew(exporter: Exporter) -> None:
    """Torn by a full disk, or by a hand: it is believed with every byte that it had only."""
    exporter.go_on.set()
    with opened(KEY, exporter) as shared:
        package = await shared.finished()
    package.path.write_bytes(bytes(package.size_bytes))
    with opened(KEY, exporter) as shared:
        assert await shared.finished() == package
        assert await shared.read(0, package.size_bytes) == WHOLE
    assert exporter.count == 2


def test_what_makes_a_package_another_one() -> None:
    """Image, name, what is left out, and the format; not the order of the layers."""
    others = [
        KEY,
        PackageKey("sha256:" + "b" * 64, "web:v1", format=PackageFormat.TAR),
        PackageKey(KEY.image_id, "web:v2", format=PackageFormat.TAR),
        PackageKey(KEY.image_id, "web:v1", ("a", "b"), format=PackageFormat.TAR),
        PackageKey(KEY.image_id, "web:v1"),
    ]
    assert len({key.name for key in others}) == len(others)
    assert PackageKey("i", "r", ("a", "b")).name == PackageKey("i", "r", ("b", "a")).name
    assert shared_package.find(KEY) is None


def suffixes(home: Path) -> list[str]:
    """Of the files in the store."""
    return [path.suffix for path in home.iterdir()]


async def eventually(fact: Callable[[], bool]) -> None:
    """Wait for it."""
    deadline = time.monotonic() + 20
    while not fact():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
