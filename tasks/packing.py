"""A package being written: compressed and hashed while its archive is exported. Blocking; no Prefect."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from threading import Event
from typing import Protocol, cast

from blake3 import blake3
from zstandard import ZstdCompressor

from receiver.contract import PackageFormat

_LEVEL = 1  # the fastest that pays: zstd -1 keeps up with any engine's export
_GZIP = 31  # zlib's number for gzip's header


class PackingStopped(Exception):
    """Nobody waits for the package any more"""


class _Compressor(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...

    def flush(self) -> bytes: ...


@dataclass(frozen=True)
class Packed:
    """What was written."""

    size_bytes: int
    blake3: str
    unpacked_bytes: int


class _Plain:
    def compress(self, data: bytes, /) -> bytes:
        return data

    def flush(self) -> bytes:
        return b""


def _compressor(package_format: PackageFormat) -> _Compressor:
    if package_format is PackageFormat.GZIP:
        return cast("_Compressor", zlib.compressobj(_LEVEL, zlib.DEFLATED, _GZIP))
    if package_format is PackageFormat.ZSTD:
        # One thread beside this one: the engine is not kept waiting while a block is compressed.
        made = ZstdCompressor(level=_LEVEL, threads=1, write_checksum=True)
        return cast("_Compressor", made.compressobj())
    return _Plain()


def pack(blocks: Iterable[bytes], package_format: PackageFormat, descriptor: int, stopped: Event) -> Packed:
    """Write the package to an empty file; raises `PackingStopped`, `OSError`, and what the blocks raise."""
    compressor, digest, unpacked_bytes, size_bytes = _compressor(package_format), blake3(), 0, 0

    def keep(data: bytes) -> None:
        nonlocal size_bytes
        digest.update(data)
        rest = memoryview(data)
        while rest:
            written = os.write(descriptor, rest)
            rest, size_bytes = rest[written:], size_bytes + written

    for block in blocks:
        if stopped.is_set():
            raise PackingStopped
        unpacked_bytes += len(block)
        keep(compressor.compress(block))
    keep(compressor.flush())
    return Packed(size_bytes, digest.hexdigest(), unpacked_bytes)
