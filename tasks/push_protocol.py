"""The HTTP side of the gateway: the part of the OCI distribution API that an engine's push speaks."""

from __future__ import annotations

import json
import re
import socket
import threading
import zlib
from collections.abc import Iterator
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedReader
from typing import TYPE_CHECKING, Any, BinaryIO, cast
from urllib.parse import parse_qs, urlsplit

from tasks.push_blobs import PushRefused, UnknownCompression, UnknownUpload, WrongDigest

if TYPE_CHECKING:
    from tasks.push_gateway import Gateway

MAX_MANIFEST_BYTES = 4 * 1024 * 1024
_BLOCK_BYTES = 256 * 1024
_IDLE_SECONDS = 120
_TLS = b"\x16"  # a handshake
_ROUTES = (
    ("HEAD", re.compile(r"blobs/(sha256:[0-9a-f]{64})"), "_look"),
    ("POST", re.compile(r"blobs/uploads/?"), "_begin"),
    ("PATCH", re.compile(r"blobs/uploads/([0-9a-f]{32})"), "_append"),
    ("PUT", re.compile(r"blobs/uploads/([0-9a-f]{32})"), "_finish"),
    ("DELETE", re.compile(r"blobs/uploads/([0-9a-f]{32})"), "_cancel"),
    ("PUT", re.compile(r"manifests/[\w.:-]+"), "_manifest"),
)


class BodyCut(Exception):
    """The connection ended, or the framing broke, before the body did"""


class BodyTooLong(Exception):
    """The body is longer than any manifest"""


class Server(ThreadingHTTPServer):
    """Each connection in a thread; `end_connections` ends them, also in the middle of a request."""

    daemon_threads = False
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], handler: type[Handler], gateway: Gateway) -> None:
        self.gateway = gateway
        self._open, self._lock = set[socket.socket](), threading.Lock()
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """Without a look at the machine's name, which may take seconds."""
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def get_request(self) -> tuple[socket.socket, Any]:
        """As the parent; remembers the connection."""
        connection, address = super().get_request()
        with self._lock:
            self._open.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        """As the parent; forgets the connection."""
        with self._lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def end_connections(self) -> None:
        """Their threads end at once."""
        with self._lock:
            for connection in self._open:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue  # ended already

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, or spoke TLS first as engines do: nobody needs to know."""


class Handler(BaseHTTPRequestHandler):
    """One connection; every answer but those to the push itself is 404."""

    protocol_version = "HTTP/1.1"
    server_version = "gantry"
    sys_version = ""
    timeout = _IDLE_SECONDS
    disable_nagle_algorithm = True
    server: Server

    def handle_one_request(self) -> None:
        """As the parent; an engine that tries TLS first is told in words that it understands."""
        stream = cast("BufferedReader", self.rfile)
        try:
            speaks_tls = stream.peek(1).startswith(_TLS)
        except OSError:
            self.close_connection = True
            return
        if not speaks_tls:
            super().handle_one_request()
            return
        stream.read1(_BLOCK_BYTES)  # what is not read would reset the connection before the answer is
        self.wfile.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Nothing: the path holds the push's secret."""

    def answer(self) -> None:
        """Find what is asked for, do it, and turn what goes wrong into the API's errors."""
        try:
            self._route()
        except UnknownUpload as exc:
            self._error(HTTPStatus.NOT_FOUND, "BLOB_UPLOAD_UNKNOWN", exc)
        except WrongDigest as exc:
            self._error(HTTPStatus.BAD_REQUEST, "DIGEST_INVALID", exc)
        except PushRefused as exc:
            self._error(HTTPStatus.FORBIDDEN, "DENIED", exc)
        except BodyTooLong as exc:
            self._error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "SIZE_INVALID", exc)
        except (zlib.error, UnknownCompression) as exc:
            self._gateway.refuse(f"a layer cannot be read: {exc}")
            self._error(HTTPStatus.FORBIDDEN, "DENIED", exc)
        except (BodyCut, OSError):
            self.close_connection = True  # there is nobody to answer, or nothing to write with

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = answer  # noqa: N815 - http.server's names

    @property
    def _gateway(self) -> Gateway:
        return self.server.gateway

    def _route(self) -> None:
        url = urlsplit(self.path)
        self._query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        if url.path == "/v2/":
            self._send(HTTPStatus.OK, {"Docker-Distribution-Api-Version": "registry/2.0"})
            return
        inside = url.path.removeprefix(f"/v2/{self._gateway.repository}/")
        for method, pattern, name in _ROUTES if inside != url.path else ():
            if method == self.command and (match := pattern.fullmatch(inside)):
                self._gateway.was_reached = True
                getattr(self, name)(*match.groups())
                return
        self._error(HTTPStatus.NOT_FOUND, "NAME_UNKNOWN", "not here")

    def _look(self, digest: str) -> None:
        found = HTTPStatus.OK if self._gateway.has(digest) else HTTPStatus.NOT_FOUND
        self._send(found, {"Docker-Content-Digest": digest} if found is HTTPStatus.OK else {})

    def _begin(self) -> None:
        known = self._query.get("mount")
        if known and self._gateway.has(known):
            self._created(known)
            return
        upload = self._gateway.begin()
        received = self._gateway.receive(upload, body(self.headers, self._stream))
        if digest := self._query.get("digest"):
            self._gateway.finish(upload, digest)
            self._created(digest)
        else:
            self._accepted(upload, received)

    def _append(self, upload: str) -> None:
        self._accepted(upload, self._gateway.receive(upload, body(self.headers, self._stream)))

    def _finish(self, upload: str) -> None:
        self._gateway.receive(upload, body(self.headers, self._stream))
        digest = self._query.get("digest", "")
        self._gateway.finish(upload, digest)
        self._created(digest)

    def _cancel(self, upload: str) -> None:
        self._gateway.cancel(upload)
        self._send(HTTPStatus.NO_CONTENT)

    def _manifest(self) -> None:
        manifest = b""
        for block in body(self.headers, self._stream):
            manifest += block
            if len(manifest) > MAX_MANIFEST_BYTES:
                raise BodyTooLong(BodyTooLong.__doc__)
        digest = self._gateway.keep_manifest(manifest)
        place = f"/v2/{self._gateway.repository}/manifests/{digest}"
        self._send(HTTPStatus.CREATED, {"Docker-Content-Digest": digest, "Location": place})

    def _accepted(self, upload: str, received_bytes: int) -> None:
        place = f"/v2/{self._gateway.repository}/blobs/uploads/{upload}"
        about = {"Docker-Upload-UUID": upload, "Range": f"0-{max(received_bytes - 1, 0)}"}
        self._send(HTTPStatus.ACCEPTED, {"Location": place, **about})

    def _created(self, digest: str) -> None:
        place = f"/v2/{self._gateway.repository}/blobs/{digest}"
        self._send(HTTPStatus.CREATED, {"Docker-Content-Digest": digest, "Location": place})

    def _error(self, status: HTTPStatus, code: str, cause: Exception | str) -> None:
        self.close_connection = True  # the rest of the body, if any, is not read
        content = json.dumps({"errors": [{"code": code, "message": str(cause)}]}).encode()
        self._send(status, {"Content-Type": "application/json", "Connection": "close"}, content)

    def _send(self, status: HTTPStatus, headers: dict[str, str] | None = None, content: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    @property
    def _stream(self) -> BinaryIO:
        return cast("BinaryIO", self.rfile)


def body(headers: Message, stream: BinaryIO) -> Iterator[bytes]:
    """The body in blocks, chunked or not; raises `BodyCut` where it is not whole."""
    if (headers.get("Transfer-Encoding") or "").lower() != "chunked":
        yield from _exactly(stream, _number(headers.get("Content-Length") or "0", 10))
        return
    while size_bytes := _number(stream.readline(1024).decode("latin-1").partition(";")[0], 16):
        yield from _exactly(stream, size_bytes)
        if stream.readline(3) != b"\r\n":
            raise BodyCut(BodyCut.__doc__)
    while stream.readline(8192) not in (b"\r\n", b"\n", b""):
        continue  # trailers


def _exactly(stream: BinaryIO, size_bytes: int) -> Iterator[bytes]:
    while size_bytes:
        block = stream.read(min(size_bytes, _BLOCK_BYTES))
        if not block:
            raise BodyCut(BodyCut.__doc__)
        size_bytes -= len(block)
        yield block


def _number(text: str, base: int) -> int:
    try:
        number = int(text.strip(), base)
    except ValueError as exc:
        raise BodyCut(BodyCut.__doc__) from exc
    if number < 0:
        raise BodyCut(BodyCut.__doc__)
    return number
