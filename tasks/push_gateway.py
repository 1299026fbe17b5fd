"""A registry for one push: enough of the OCI distribution API for an engine to send one image.

On loopback, on a port and under a name that nobody can guess. Keeps the blobs of that push, and gives
nothing back to anyone. Knows nothing of Docker's client or Prefect.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Self

from tasks.push_blobs import Blob, Intake, PushRefused, UnknownUpload
from tasks.push_protocol import Handler, Server

_POLL_SECONDS = 0.005


class Gateway:
    """Listens between `with` and its end. `exists(digest)` says which blobs need not be sent.

    With no `folder`, blobs are thrown away. No more than `limit_bytes` are taken, decompressed.
    `one_at_a_time` lets the engine compress one layer after the other, beside its other work.
    """

    def __init__(
        self,
        exists: Callable[[str], bool],
        *,
        folder: Path | None,
        limit_bytes: int,
        one_at_a_time: bool = False,
    ) -> None:
        self._exists, self._folder, self._left_bytes = exists, folder, limit_bytes
        self._lock, self._uploads = threading.Lock(), dict[str, Intake]()
        self._turn = threading.Lock() if one_at_a_time else nullcontext()
        self.repository = f"{secrets.token_hex(16)}/image"
        self.blobs: dict[str, Blob] = {}
        self.manifests: dict[str, bytes] = {}
        self.was_reached = False
        self.refusal: str | None = None
        self.is_overspent = False

    def __enter__(self) -> Self:
        self._server = Server(("127.0.0.1", 0), Handler, self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_POLL_SECONDS,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.refuse("the push is over")
        self._server.shutdown()
        self._thread.join()
        self._server.end_connections()
        self._server.server_close()
        for upload in [*self._uploads]:
            self.cancel(upload)

    @property
    def name(self) -> str:
        """What the image is called while it is pushed, without a tag."""
        return f"127.0.0.1:{self._server.server_port}/{self.repository}"

    def refuse(self, why: str) -> None:
        """Take nothing any more; the first reason counts."""
        self.refusal = self.refusal or why

    # -- what the protocol asks for, in threads of its own -------------------------------------------

    def has(self, digest: str) -> bool:
        """True when the blob need not be sent."""
        return digest in self.blobs or self._exists(digest)

    def begin(self) -> str:
        """The id of a new upload; raises `PushRefused`."""
        self._check()
        upload = secrets.token_hex(16)
        path = self._folder / upload if self._folder else None
        with self._writing():
            self._uploads[upload] = Intake(path, self._spend)
        return upload

    def receive(self, upload: str, body: Iterator[bytes]) -> int:
        """Add to an upload, and return how many bytes it has; one that breaks off is dropped.

        Raises `UnknownUpload` for one that is being written, `PushRefused`, and what the body raises.
        """
        with self._taken(upload) as intake, self._turn:
            for block in body:
                self._check()
                with self._writing():
                    intake.write(block)
        return intake.received_bytes

    def finish(self, upload: str, digest: str) -> None:
        """Close an upload; raises `WrongDigest` or `UnknownUpload`, and neither keeps anything."""
        with self._writing():
            blob = self._take(upload).finish(digest)
        if blob is not None:
            self.blobs[digest] = blob

    def cancel(self, upload: str) -> None:
        """Drop an upload; raises `UnknownUpload`."""
        self._take(upload).drop()

    def keep_manifest(self, manifest: bytes) -> str:
        """Returns the manifest's digest; raises `PushRefused`."""
        self._check()
        digest = f"sha256:{hashlib.sha256(manifest).hexdigest()}"
        self.manifests[digest] = manifest
        return digest

    @contextmanager
    def _taken(self, upload: str) -> Iterator[Intake]:
        intake = self._take(upload)
        try:
            yield intake
        except BaseException:
            intake.drop()
            raise
        self._uploads[upload] = intake

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A disk that takes no more ends the push."""
        try:
            yield
        except OSError as exc:
            self.refuse(f"what the engine sends cannot be written: {exc}")
            raise PushRefused(self.refusal) from exc

    def _take(self, upload: str) -> Intake:
        try:
            return self._uploads.pop(upload)  # atomic: whoever has it is alone with it
        except KeyError:
            raise UnknownUpload(UnknownUpload.__doc__) from None

    def _check(self) -> None:
        if self.refusal is not None:
            raise PushRefused(self.refusal)

    def _spend(self, size_bytes: int) -> None:
        with self._lock:
            self._left_bytes -= size_bytes
            if self._left_bytes < 0:
                self.is_overspent = True
                self.refuse("the engine sends layers that it was thought to know")
        self._check()
