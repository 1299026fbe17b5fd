"""The signed HTTP client of a host's receiver.

Owns the sending side of the wire: signing, reading answers, resuming an upload, and the errors that
come of it. Must not import Prefect: hosts, tests and tools use it without.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from receiver import contract, signing

UPLOAD_CHUNK_BYTES = 8 * 1024 * 1024
_PIECE_BYTES = 512 * 1024
MAX_PAUSE_SECONDS = 10.0
MAX_RETRY_AFTER_SECONDS = 60.0
_QUOTED_CHARACTERS = 500
_UNREACHABLE = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError)

AnswerT = TypeVar("AnswerT", bound=BaseModel)
Progress = Callable[[int, int], None]


class ReceiverError(Exception):
    """The receiver did not do what it was asked"""

    @property
    def retryable(self) -> bool:
        """True when the same request may succeed later."""
        return False


class ReceiverUnreachable(ReceiverError):
    """The receiver cannot be reached; see that the host is up, the port is open and /health answers"""

    def __init__(self, url: str, cause: str) -> None:
        super().__init__(url, cause)
        self.url = url
        self.cause = cause
        self.next_step = "See that the host is up, that its port is open, and that GET /health answers."

    @property
    def retryable(self) -> bool:
        """True: the host may be back later."""
        return True

    def __str__(self) -> str:
        return f"The receiver at {self.url} cannot be reached: {self.cause}. {self.next_step}"


@dataclass(frozen=True)
class Refusal:
    """What an answer that is no success says; `error_code` is None when it is not the receiver's own."""

    request: str
    status: int
    type: str
    title: str
    detail: str
    next_step: str
    error_code: contract.ErrorCode | None = None
    retry_after_seconds: float = 0.0
    extra: Mapping[str, Any] = field(default_factory=dict)


class ReceiverRefused(ReceiverError):
    """The receiver refused the request; the refusal names the next step"""

    def __init__(self, refusal: Refusal, *rest: int) -> None:
        super().__init__(refusal, *rest)
        self.refusal = refusal
        self.status = refusal.status
        self.type = refusal.type
        self.title = refusal.title
        self.detail = refusal.detail
        self.error_code = refusal.error_code
        self.next_step = refusal.next_step

    @property
    def retryable(self) -> bool:
        """True when the same request may succeed later: 408, 429 and 5xx."""
        return self.status in {408, 429} or self.status >= 500

    def __str__(self) -> str:
        told = self.refusal
        return f"{told.request}: {told.status} {told.title}: {told.detail} Next: {told.next_step}"


class OffsetRefused(ReceiverRefused):
    """The receiver wants the package from another offset; go on from `right_offset` (bytes)"""

    def __init__(self, refusal: Refusal, right_offset: int) -> None:
        super().__init__(refusal, right_offset)
        self.right_offset = right_offset


class AnswerNotUnderstood(ReceiverRefused):
    """The answer is not what the contract says; see that both sides run the same version"""

    @property
    def retryable(self) -> bool:
        """Never: the same versions give the same answer."""
        return False


@dataclass(frozen=True)
class Held:
    """What the host holds of a package; `blake3` is None while more of it is being written."""

    offset: int
    blake3: str | None


@dataclass(frozen=True)
class ReceiverConfig:
    """Where the receiver is and how to speak to it."""

    base_url: str
    signing_key: bytes = field(repr=False)
    correlation_id: str | None = None
    tls_ca_file: Path | None = None
    tls_verify: bool = True
    connect_timeout_seconds: float = 5.0
    timeout_seconds: float = 60.0
    operation_timeout_seconds: float = 300.0
    first_pause_seconds: float = 0.5

    def trust(self) -> ssl.SSLContext | bool:
        """What httpx takes as `verify`: without TLS nothing that takes time to load."""
        if self.base_url.startswith("http://"):
            return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts nobody
        if self.tls_verify and self.tls_ca_file:
            return ssl.create_default_context(cafile=self.tls_ca_file)
        return self.tls_verify


class RequestSigner(httpx.Auth):
    """Signs each request as it leaves, so that a repeated one has a nonce and a time of its own."""

    requires_request_body = True

    def __init__(self, key: bytes) -> None:
        self._key = key

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Set the v2 headers over method, raw path with query, and body."""
        target = request.url.raw_path.decode("ascii")
        request.headers.update(signing.signed_headers(self._key, request.method, target, request.content))
        yield request


class _Pieces(httpx.AsyncByteStream):
    """A body that is written piece by piece: asyncio copies what a connection does not take at once."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for begin in range(0, len(self._body), _PIECE_BYTES):
            yield self._body[begin : begin + _PIECE_BYTES]


class ReceiverClient:
    """The receiver's calls as methods, inside `async with`; every call but `health` is signed.

    Every method raises `ReceiverUnreachable` when there is no answer and `ReceiverRefused` when the
    answer is no success. None repeats a call.
    """

    def __init__(self, config: ReceiverConfig, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.config = config
        self._signer = RequestSigner(config.signing_key)
        correlation = {contract.CORRELATION_HEADER: config.correlation_id} if config.correlation_id else {}
        self._http = httpx.AsyncClient(
            base_url=config.base_url,
            headers=correlation,
            timeout=httpx.Timeout(config.timeout_seconds, connect=config.connect_timeout_seconds),
            verify=config.trust(),
            # A proxy from the environment would stand between key and host, and spoil the allow-list.
            trust_env=False,
            transport=transport,
        )

    def __repr__(self) -> str:
        return f"ReceiverClient({self.config.base_url!r})"

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        await self._http.__aexit__(kind, error, traceback)

    async def health(self) -> contract.HostHealth:
        """How the host is; a degraded host (503) is an answer, not an error."""
        response = await self._answer(self._http.build_request("GET", contract.HEALTH_PATH), signed=False)
        try:
            return _read(contract.HostHealth, response)
        except AnswerNotUnderstood:
            _expect_success(response)  # a refusal says more than that it is no health report
            raise

    async def announce(
        self, request: contract.DeployRequest, idempotency_key: str
    ) -> contract.DeployAccepted:
        """Announce a deployment; the same key again gives the same deployment."""
        headers = {contract.IDEMPOTENCY_HEADER: idempotency_key}
        sent = self._json_request(contract.DEPLOY_PATH, request, headers)
        return _read(contract.DeployAccepted, await self._succeed(sent))

    async def announce_package(
        self, deployment_id: str, package: contract.PackageAnnouncement
    ) -> contract.DeployAccepted:
        """Announce the package once it is known which layers the host lacks."""
        sent = self._json_request(contract.deploy_path(deployment_id, "package"), package)
        return _read(contract.DeployAccepted, await self._succeed(sent))

    async def held(self, deployment_id: str) -> Held:
        """Bytes of the package that the host holds, and their BLAKE3."""
        path = contract.deploy_path(deployment_id, "package")
        response = await self._succeed(self._http.build_request("HEAD", path))
        return Held(_read_offset(response), response.headers.get(contract.UPLOAD_DIGEST_HEADER))

    async def drop_package(self, deployment_id: str) -> None:
        """Have the host forget the bytes that it holds, so that the upload begins anew."""
        path = contract.deploy_path(deployment_id, "package")
        await self._succeed(self._http.build_request("DELETE", path))

    async def send_chunk(
        self, deployment_id: str, offset: int, chunk: bytes, has_left: Callable[[], None] = lambda: None
    ) -> int:
        """Send the bytes at `offset`; give the host's new offset. Raises `OffsetRefused` for a wrong one.

        `has_left` is called when all of them are written to the connection.
        """

        async def follow(event: str, _told: Mapping[str, Any]) -> None:
            if event.endswith(".send_request_body.complete"):
                has_left()

        path = contract.deploy_path(deployment_id, "package")
        headers = {
            contract.UPLOAD_OFFSET_HEADER: str(offset),
            "Content-Type": "application/offset+octet-stream",
        }
        sent = self._http.build_request(
            "PATCH", path, content=chunk, headers=headers, extensions={"trace": follow}
        )
        sent.stream = _Pieces(chunk)
        response = await self._succeed(sent)
        new_offset = _read_offset(response)
        if not offset < new_offset <= offset + len(chunk):
            raise _not_understood(response, f"after {len(chunk)} bytes at {offset} it is at {new_offset}")
        return new_offset

    async def status(self, deployment_id: str) -> contract.DeploymentStatus:
        """Where the deployment stands on its host."""
        sent = self._http.build_request("GET", contract.deploy_path(deployment_id, "status"))
        return _read(contract.DeploymentStatus, await self._succeed(sent))

    async def status_of_workflow(self, workflow_id: str) -> contract.DeploymentStatus:
        """Where the deployment that a workflow announced stands on its host."""
        sent = self._http.build_request("GET", contract.workflow_path(workflow_id))
        return _read(contract.DeploymentStatus, await self._succeed(sent))

    async def versions(self, container_name: str | None = None) -> list[contract.ContainerVersions]:
        """What the host keeps, of one container or of all; refused (404) for a name it has nothing of."""
        if container_name is None:
            sent = self._http.build_request("GET", contract.CONTAINERS_PATH)
            return _read(contract.HostContainers, await self._succeed(sent)).containers
        sent = self._http.build_request("GET", contract.container_path(container_name))
        return [_read(contract.ContainerVersions, await self._succeed(sent))]

    async def rollback_target(self, container_name: str, to: str | None = None) -> contract.RollbackTarget:
        """Where `rollback_to` would go back to, refused as that would be; touches nothing."""
        path = contract.container_path(container_name, "rollback")
        sent = self._http.build_request("GET", path, params={"to": to} if to else None)
        return _read(contract.RollbackTarget, await self._succeed(sent))

    async def rollback_to(
        self, container_name: str, request: contract.RollbackRequest, idempotency_key: str
    ) -> contract.DeployAccepted:
        """Announce a deployment of a version that the host keeps; the same key again gives the same one."""
        path = contract.container_path(container_name, "rollback")
        sent = self._json_request(path, request, {contract.IDEMPOTENCY_HEADER: idempotency_key})
        return _read(contract.DeployAccepted, await self._succeed(sent))

    async def report(self, ports: Sequence[str] = (), *, proxy: bool = False) -> contract.HostReport:
        """What the host says of itself, of the ports that are wanted (as `8080/tcp`), and of its proxy."""
        wanted = {**({"port": list(ports)} if ports else {}), **({"proxy": "true"} if proxy else {})}
        # An empty query would be signed with its question mark, and arrive without it.
        sent = self._http.build_request("GET", contract.HOST_PATH, params=wanted or None)
        return _read(contract.HostReport, await self._succeed(sent))

    async def restore(self, deployment_id: str) -> contract.DeploymentStatus:
        """Bring the previous container back, and give the status after it."""
        return await self._operate(deployment_id, "restore")

    async def abort(self, deployment_id: str) -> contract.DeploymentStatus:
        """Give the deployment up before it touched anything, and give the status after it."""
        return await self._operate(deployment_id, "abort")

    async def collect(self, deployment_id: str) -> contract.DeploymentStatus:
        """Have the host take over and verify what rsync brought; the same call again changes nothing."""
        return await self._operate(deployment_id, "collect")

    async def _operate(self, deployment_id: str, action: str) -> contract.DeploymentStatus:
        timeout = httpx.Timeout(
            self.config.operation_timeout_seconds, connect=self.config.connect_timeout_seconds
        )
        path = contract.deploy_path(deployment_id, action)
        sent = self._http.build_request("POST", path, timeout=timeout)
        return _read(contract.DeploymentStatus, await self._succeed(sent))

    def _json_request(
        self, path: str, body: BaseModel, headers: dict[str, str] | None = None
    ) -> httpx.Request:
        sent = {"Content-Type": "application/json"} | (headers or {})
        return self._http.build_request("POST", path, content=body.model_dump_json().encode(), headers=sent)

    async def _succeed(self, request: httpx.Request) -> httpx.Response:
        response = await self._answer(request)
        _expect_success(response)
        return response

    async def _answer(self, request: httpx.Request, *, signed: bool = True) -> httpx.Response:
        try:
            response = await self._http.send(request, auth=self._signer if signed else None)
        except _UNREACHABLE as exc:
            cause = f"{type(exc).__name__}: {exc}".removesuffix(": ")
            raise ReceiverUnreachable(str(request.url), cause) from exc
        # It is read. httpx's own stream leads back to the response, which would keep each chunk in memory.
        response.stream = httpx.ByteStream(b"")
        return response


def pause_seconds(fruitless: int, first_seconds: float, error: ReceiverError) -> float:
    """How long to wait before try number `fruitless`: doubled each time, bounded, or what the host asked."""
    asked = error.refusal.retry_after_seconds if isinstance(error, ReceiverRefused) else 0.0
    doubled = first_seconds * 2.0 ** min(fruitless - 1, 30)
    return max(min(doubled, MAX_PAUSE_SECONDS), min(asked, MAX_RETRY_AFTER_SECONDS))


def _expect_success(response: httpx.Response) -> None:
    if response.is_success:
        return
    right_offset = _whole_number(response, contract.UPLOAD_OFFSET_HEADER)
    if response.status_code == 409 and right_offset is not None:
        raise OffsetRefused(_refusal(response), right_offset)
    raise ReceiverRefused(_refusal(response))


def _refusal(response: httpx.Response) -> Refusal:
    plain = Refusal(
        request=f"{response.request.method} {response.request.url}",
        status=response.status_code,
        type="about:blank",
        title=response.reason_phrase or "Refused",
        detail=response.text[:_QUOTED_CHARACTERS] or "(no text)",
        next_step="See that the receiver, and not something else, answers there; then read its log.",
        retry_after_seconds=float(_whole_number(response, "Retry-After") or 0),
    )
    try:
        told = contract.Problem.model_validate_json(response.content)
    except ValidationError:
        return plain
    return replace(
        plain,
        type=told.type,
        title=told.title,
        detail=told.detail,
        next_step=told.next_step,
        error_code=told.error_code,
        extra=told.extra,
    )


def _not_understood(response: httpx.Response, detail: str) -> AnswerNotUnderstood:
    refusal = replace(
        _refusal(response),
        title="Answer not understood",
        detail=detail,
        next_step="See that both sides run the same version, and that no proxy stands between.",
    )
    return AnswerNotUnderstood(refusal)


def _read(model: type[AnswerT], response: httpx.Response) -> AnswerT:
    try:
        return model.model_validate_json(response.content)
    except ValidationError as exc:
        first = exc.errors(include_input=False)[0]
        field_name = ".".join(str(part) for part in first["loc"])
        raise _not_understood(response, f"{model.__name__} {field_name}: {first['msg']}") from exc


def _whole_number(response: httpx.Response, header: str) -> int | None:
    told = response.headers.get(header, "")
    return int(told) if told.isascii() and told.isdigit() else None


def _read_offset(response: httpx.Response) -> int:
    offset = _whole_number(response, contract.UPLOAD_OFFSET_HEADER)
    if offset is None:
        raise _not_understood(response, f"it has no header {contract.UPLOAD_OFFSET_HEADER}")
    return offset
