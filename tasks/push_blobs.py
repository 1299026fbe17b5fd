"""The blobs of a push: hashed as they come, decompressed, hashed again, and kept in files.

Knows nothing of HTTP, Docker or Prefect.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_BLOCK_BYTES = 1024 * 1024
_NOT_SPENT: Callable[[int], None] = lambda _: None  # noqa: E731 - a default


class PushRefused(Exception):
    """The gateway takes no more of this push"""


class UnknownUpload(Exception):
    """There is no such upload: it ended, was cut, or never began"""


class WrongDigest(Exception):
    """The blob is not what its sender calls it"""


class UnknownCompression(Exception):
    """The layer is compressed by zstd, which this way of sending does not read"""


@dataclass(frozen=True)
class Blob:
    """A whole blob: `diff_id` and `size_bytes` are of its decompressed content, which `path` holds."""

    digest: str
    diff_id: str
    size_bytes: int
    path: Path


class Intake:
    """One blob while it comes; with no `path` it is hashed as sent, and thrown away.

    `spend` is told of each decompressed piece before it is written, and may raise.
    """

    def __init__(self, path: Path | None, spend: Callable[[int], None] = _NOT_SPENT) -> None:
        self._path, self._spend = path, spend
        self._digest, self._diff = hashlib.sha256(), hashlib.sha256()
        self._head: bytes | None = b""
        self._gzip: Gunzip | None = None
        self._file = path.open("wb") if path is not None else None
        self.received_bytes = self.size_bytes = 0

    def write(self, block: bytes) -> None:
        """The next piece as it was sent; raises zlib.error, `UnknownCompression` or OSError."""
        self._digest.update(block)
        self.received_bytes += len(block)
        if self._file is None:
            return
        if self._head is not None:
            block = self._head = self._head + block
            if len(block) < len(_ZSTD):
                return
            self._begin(block)
        self._decode(block)

    def finish(self, digest: str) -> Blob | None:
        """The blob, or None when it was thrown away; raises `WrongDigest` with nothing kept."""
        found = f"sha256:{self._digest.hexdigest()}"
        if head := self._head:  # shorter than what tells a compression
            self._begin(head)
            self._decode(head)
        whole = self._gzip is None or self._gzip.is_whole
        if found != digest or not whole:
            self.drop()
            raise WrongDigest(f"the blob is {found}, not {digest}" if whole else f"{digest} breaks off")
        if self._file is None or self._path is None:
            return None
        self._file.close()
        return Blob(digest, f"sha256:{self._diff.hexdigest()}", self.size_bytes, self._path)

    def drop(self) -> None:
        """Throw away what came so far."""
        if self._file is not None and self._path is not None:
            self._file.close()
            self._path.unlink(missing_ok=True)

    def _begin(self, head: bytes) -> None:
        if head.startswith(_ZSTD):
            raise UnknownCompression(UnknownCompression.__doc__)
        self._gzip = Gunzip() if head.startswith(_GZIP) else None
        self._head = None

    def _decode(self, block: bytes) -> None:
        for piece in self._gzip.pieces(block) if self._gzip else (block,):
            self._spend(len(piece))
            self._diff.update(piece)
            self.size_bytes += len(piece)
            if self._file is not None:
                self._file.write(piece)


class Gunzip:
    """A gzip stream of one or several members; no piece is larger than a megabyte."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(wbits=31)

    @property
    def is_whole(self) -> bool:
        """True at the end of a member."""
        return self._member.eof

    def pieces(self, block: bytes) -> Iterator[bytes]:
        """What the next block decompresses to; raises zlib.error."""
        while block:
            if self._member.eof:
                self._member = zlib.decompressobj(wbits=31)
            yield self._member.decompress(block, _BLOCK_BYTES)
            block = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
