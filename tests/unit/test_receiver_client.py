"""The signed client against a real HTTP server that checks every signature, and through bad networks."""

from __future__ import annotations

import asyncio
import math
import pickle
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from blake3 import blake3
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from blocks import package_stream
from blocks.receiver_client import (
    MAX_PAUSE_SECONDS,
    MAX_RETRY_AFTER_SECONDS,
    UPLOAD_CHUNK_BYTES,
    AnswerNotUnderstood,
    OffsetRefused,
    ReceiverClient,
    ReceiverConfig,
    ReceiverRefused,
    ReceiverUnreachable,
    Refusal,
    RequestSigner,
    pause_seconds,
)
from receiver import contract, signing

KEY = b"a-key-that-is-long-enough-for-the-rule"
NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
DEPLOYMENT = "dep-1"
PACKAGE_PATH = contract.deploy_path(DEPLOYMENT, "package")
CHUNK_BYTES = 64 * 1024
# Ten and a half chunks, no two alike.
PACKAGE = b"".join(bytes([n]) * (CHUNK_BYTES // 2) for n in range(21))
DEADLINE_SECONDS = 15


def problem(status: int, detail: str = "no", **headers: str) -> Response:
    """An answer in problem details, as the receiver gives it."""
    body = contract.Problem(
        type="urn:gantry:test",
        title="Refused",
        status=status,
        detail=detail,
        error_code=contract.ErrorCode.TRANSFER_FAILED,
        next_step="Do the next thing.",
    )
    return json_answer(body, status, **{"Content-Type": "application/problem+json", **headers})


def json_answer(body: contract.WireModel | contract.Problem, status: int = 200, **headers: str) -> Response:
    """A model as an answer."""
    sent = {"Content-Type": "application/json", **headers}
    return Response(body.model_dump_json(), status_code=status, headers=sent)


def deployment_status(state: contract.HostState) -> contract.DeploymentStatus:
    """The smallest status."""
    return contract.DeploymentStatus(
        deployment_id=DEPLOYMENT,
        workflow_id=None,
        container_name="web",
        image_tag="v1",
        state=state,
        upload_offset=0,
        package_bytes=None,
        facts=contract.HostFacts(),
        operations=[],
        health_attempts=[],
        gates=[],
        created_at=NOW,
        updated_at=NOW,
    )


@dataclass
class Host:
    """A small receiver: it checks each signature, keeps what it was sent, and can be told to refuse."""

    package: bytearray = field(default_factory=bytearray)
    whole: bytes = PACKAGE
    requests: list[tuple[str, str]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    chunk_sizes: list[int] = field(default_factory=list)
    chunk_answer: Response | None = None
    bytes_per_second: float = math.inf
    next_answers: list[Response] = field(default_factory=list)
    always: Response | None = None
    waiting: int = 0
    most_waiting: int = 0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def nonces(self) -> list[str]:
        return [seen[contract.NONCE_HEADER.lower()] for seen in self.headers]

    def app(self) -> Starlette:
        """All paths under /api go through one door, which authenticates first."""
        routes = [
            Route("/health", self.health),
            Route("/api/{rest:path}", self.api, methods=["GET", "HEAD", "POST", "PATCH"]),
        ]
        return Starlette(routes=routes)

    async def health(self, request: Request) -> Response:
        """Open, as at the receiver: the test looks whether it was signed all the same."""
        assert contract.SIGNATURE_HEADER not in request.headers
        if self.always is not None:
            return self.always
        return json_answer(
            contract.HostHealth(status="healthy", docker_connected=True, version="1", time=NOW)
        )

    async def api(self, request: Request) -> Response:
        """Authenticate, note, answer."""
        body = await request.body()
        target = request.scope["raw_path"].decode()
        if query := request.scope["query_string"].decode():
            target += f"?{query}"
        self.requests.append((request.method, target))
        self.headers.append(dict(request.headers))
        self.bodies.append(body)
        if refusal := self.authenticate(request, target, body):
            return refusal
        self.waiting += self.turn.locked()
        self.most_waiting = max(self.waiting, self.most_waiting)
        async with self.turn:
            self.waiting = 0
            await asyncio.sleep(len(body) / self.bytes_per_second)
            if self.next_answers:
                return self.next_answers.pop(0)
            return self.always or self.answer(request, body)

    def authenticate(self, request: Request, target: str, body: bytes) -> Response | None:
        """What the receiver does with a v2 signature, nonces included."""
        told = request.headers
        envelope = signing.Envelope(
            told[contract.TIMESTAMP_HEADER],
            told[contract.NONCE_HEADER],
            request.method,
            target,
            blake3(body).hexdigest(),
        )
        if self.nonces.count(envelope.nonce) > 1:
            return problem(401, "nonce used twice")
        try:
            signing.check_clock(envelope.timestamp, datetime.now(UTC).timestamp())
            signing.verify([KEY], envelope.canonical(), told[contract.SIGNATURE_HEADER])
        except signing.SignatureRefused as exc:
            return problem(401, str(exc))
        return None

    def answer(self, request: Request, body: bytes) -> Response:
        """The receiver's answers, without its work."""
        method, path = request.method, request.url.path
        if method == "HEAD":
            held = {
                contract.UPLOAD_OFFSET_HEADER: str(len(self.package)),
                contract.UPLOAD_DIGEST_HEADER: blake3(self.package).hexdigest(),
            }
            return Response(status_code=200, headers=held)
        if method == "PATCH":
            return self.chunk_answer or self.take_chunk(int(request.headers["upload-offset"]), body)
        if path in {contract.DEPLOY_PATH, PACKAGE_PATH}:
            return json_answer(self.accepted(), 201)
        action = path.rsplit("/", 1)[-1]
        state = {"restore": contract.HostState.RESTORED, "abort": contract.HostState.ABORTED}.get(action)
        return json_answer(deployment_status(state or contract.HostState.KEPT))

    def accepted(self) -> contract.DeployAccepted:
        return contract.DeployAccepted(
            deployment_id=DEPLOYMENT,
            state=contract.HostState.READY if self.package == self.whole else contract.HostState.RECEIVING,
            image_present=False,
            known_layers=[],
            upload_url=PACKAGE_PATH,
            upload_offset=len(self.package),
            chunk_bytes=contract.MAX_CHUNK_BYTES,
        )

    def take_chunk(self, offset: int, body: bytes) -> Response:
        if offset != len(self.package):
            return problem(409, "wrong offset", **{contract.UPLOAD_OFFSET_HEADER: str(len(self.package))})
        self.package += body
        self.chunk_sizes.append(len(body))
        return Response(status_code=204, headers={contract.UPLOAD_OFFSET_HEADER: str(len(self.package))})


class Server(uvicorn.Server):
    """Says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then say so."""
        await super().startup(sockets)
        self.listening.set()


@asynccontextmanager
async def serving(app: Starlette, *, cert: Path | None = None, key: Path | None = None) -> AsyncIterator[int]:
    """Serve `app` on a free port of loopback; gives the port."""
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_level="error", lifespan="off", ssl_certfile=cert, ssl_keyfile=key
    )
    server = Server(config)
    running = asyncio.create_task(server.serve())
    await asyncio.wait_for(server.listening.wait(), DEADLINE_SECONDS)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await running


@dataclass
class BadNetwork:
    """A TCP proxy that resets connections: after so many bytes, or instead of the answer to a PATCH."""

    upstream_port: int
    cut_after_bytes: list[int] = field(default_factory=list)
    answers_to_lose: int = 0
    cuts: int = 0

    @asynccontextmanager
    async def proxy(self) -> AsyncIterator[int]:
        """Listen on a free port of loopback; gives the port."""
        server = await asyncio.start_server(self.connection, "127.0.0.1", 0)
        async with server:
            yield server.sockets[0].getsockname()[1]

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Both directions of one connection, until one side ends it or it is cut."""
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.upstream_port)
        patching = asyncio.Event()
        budget = self.cut_after_bytes.pop(0) if self.cut_after_bytes else None
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.send_up(reader, up_writer, patching, budget))
                group.create_task(self.send_down(up_reader, writer, patching))
        except* ConnectionError:
            self.cuts += 1
        finally:
            writer.transport.abort()
            up_writer.transport.abort()

    async def send_up(
        self,
        reader: asyncio.StreamReader,
        up_writer: asyncio.StreamWriter,
        patching: asyncio.Event,
        budget: int | None,
    ) -> None:
        """Client to host; raises when the budget of bytes is used up."""
        seen = 0
        while data := await reader.read(16 * 1024):
            seen += len(data)
            if data.startswith((b"PATCH ", b"HEAD ")):
                (patching.set if data.startswith(b"PATCH ") else patching.clear)()
            if budget is not None and seen > budget:
                raise ConnectionResetError
            up_writer.write(data)
            await up_writer.drain()
        up_writer.write_eof()

    async def send_down(
        self, up_reader: asyncio.StreamReader, writer: asyncio.StreamWriter, patching: asyncio.Event
    ) -> None:
        """Host to client; raises in place of an answer that is to be lost."""
        while data := await up_reader.read(16 * 1024):
            if patching.is_set() and self.answers_to_lose:
                self.answers_to_lose -= 1
                raise ConnectionResetError
            writer.write(data)
            await writer.drain()
        writer.write_eof()


def config_for(
    port: int, *, key: bytes = KEY, correlation_id: str | None = None, timeout_seconds: float = 10
) -> ReceiverConfig:
    """A config without waiting."""
    return ReceiverConfig(
        base_url=f"http://127.0.0.1:{port}",
        signing_key=key,
        correlation_id=correlation_id,
        timeout_seconds=timeout_seconds,
        first_pause_seconds=0.001,
    )


@pytest.fixture(autouse=True)
def quick_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy this machine is: chunks go one by one, unless a test says otherwise."""
    monkeypatch.setattr(package_stream, "SLOW_BYTES_PER_SECOND", 0)


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
async def port(host: Host) -> AsyncIterator[int]:
    async with serving(host.app()) as number:
        yield number


@pytest.fixture
async def client(port: int) -> AsyncIterator[ReceiverClient]:
    async with ReceiverClient(config_for(port, correlation_id="corr-7")) as opened:
        yield opened


@dataclass(frozen=True)
class Sent:
    """A package that is whole from the beginning."""

    content: bytes = PACKAGE

    async def look(self) -> None:
        """Nothing changes."""

    async def read(self, offset: int, size_bytes: int, /) -> bytes:
        return self.content[offset : offset + size_bytes]

    async def digest(self, size_bytes: int, /) -> str | None:
        return blake3(self.content[:size_bytes]).hexdigest()

    def announcement(self) -> contract.PackageAnnouncement:
        return contract.PackageAnnouncement(
            size_bytes=len(self.content), blake3=blake3(self.content).hexdigest()
        )


async def upload(client: ReceiverClient, **options: Any) -> int:
    """Send `PACKAGE` in small chunks; the bytes that the host took."""
    return await package_stream.send(client, DEPLOYMENT, Sent(), **{"chunk_bytes": CHUNK_BYTES, **options})


def free_port() -> int:
    """A port of loopback on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
        return number


async def test_every_call_but_health_is_signed_and_correlated(client: ReceiverClient, host: Host) -> None:
    """The host, which refuses what is not signed, takes every call and finds the correlation id on it."""
    await client.health()
    await client.announce(contract.DeployRequest(container_name="web"), "key-1")
    await client.announce_package(
        DEPLOYMENT, contract.PackageAnnouncement(size_bytes=9, blake3="ab" * 32, format="tar")
    )
    assert (await client.held(DEPLOYMENT)).offset == 0
    assert await client.send_chunk(DEPLOYMENT, 0, b"some bytes") == 10
    await client.status(DEPLOYMENT)
    assert (await client.restore(DEPLOYMENT)).state is contract.HostState.RESTORED
    assert (await client.abort(DEPLOYMENT)).state is contract.HostState.ABORTED
    assert [method for method, _ in host.requests] == ["POST", "POST", "HEAD", "PATCH", "GET", "POST", "POST"]
    assert {told["x-correlation-id"] for told in host.headers} == {"corr-7"}


async def test_an_announcement_arrives_whole_with_its_idempotency_key(
    client: ReceiverClient, host: Host
) -> None:
    """What the host parses equals what was announced."""
    request = contract.DeployRequest(
        container_name="web",
        image_tag="v1",
        deployment_config=contract.DeploymentConfig(environment_variables={"GREETING": "grüße"}),
    )
    accepted = await client.announce(request, "key-1")
    assert accepted == host.accepted()
    assert contract.DeployRequest.model_validate_json(host.bodies[0]) == request
    assert host.headers[0]["idempotency-key"] == "key-1"


async def test_the_signature_covers_the_query_as_it_travels(port: int, host: Host) -> None:
    """Path and query are signed in their raw form."""
    async with httpx.AsyncClient(auth=RequestSigner(KEY), trust_env=False) as plain:
        url = f"http://127.0.0.1:{port}{contract.deploy_path(DEPLOYMENT, 'status')}?tail=%C3%A9%20x&n=1"
        response = await plain.get(url)
    assert response.status_code == 200
    assert host.requests == [("GET", "/api/deploy/dep-1/status?tail=%C3%A9%20x&n=1")]


async def test_a_degraded_host_is_an_answer(client: ReceiverClient, host: Host) -> None:
    """503 with the receiver's own body is parsed."""
    degraded = contract.HostHealth(status="degraded", docker_connected=False, version="1", time=NOW)
    host.always = json_answer(degraded, 503)
    assert await client.health() == degraded


async def test_a_503_of_something_else_is_no_health(client: ReceiverClient, host: Host) -> None:
    """A proxy's page is a refusal that may pass."""
    host.always = PlainTextResponse("upstream gone", status_code=503)
    with pytest.raises(ReceiverRefused, match="upstream gone") as caught:
        await client.health()
    assert (caught.value.status, caught.value.retryable) == (503, True)


async def test_a_whole_package_arrives_in_chunks(client: ReceiverClient, host: Host) -> None:
    """The host holds the file's bytes, and progress ends at its size."""
    seen: list[tuple[int, int]] = []
    taken_bytes = await upload(client, progress=lambda done, whole: seen.append((done, whole)))
    assert bytes(host.package) == PACKAGE
    assert taken_bytes == len(PACKAGE)
    assert seen[0] == (0, len(PACKAGE))
    assert seen[-1] == (len(PACKAGE), len(PACKAGE))
    assert seen == sorted(seen)


async def test_the_default_chunk_is_eight_mebibytes(client: ReceiverClient, host: Host) -> None:
    """A package of 20 MiB goes in three chunks."""
    whole = Sent(bytes(20 * 1024 * 1024))
    host.whole = whole.content
    await package_stream.send(client, DEPLOYMENT, whole)
    assert host.chunk_sizes == [UPLOAD_CHUNK_BYTES, UPLOAD_CHUNK_BYTES, 4 * 1024 * 1024]


async def test_on_a_slow_way_chunks_are_smaller(
    client: ReceiverClient, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one takes four times as long as it may; those after it fit, and the package is whole."""
    monkeypatch.setattr(package_stream, "MIN_CHUNK_BYTES", 1024)
    monkeypatch.setattr(package_stream, "CHUNK_SECONDS", 0.05)
    host.bytes_per_second = CHUNK_BYTES / 0.2
    await upload(client)
    first, *others = host.chunk_sizes
    assert first == CHUNK_BYTES
    assert max(others) <= CHUNK_BYTES // 4
    assert bytes(host.package) == PACKAGE


async def test_on_a_slow_way_the_next_chunk_leaves_while_the_host_is_busy(
    client: ReceiverClient, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is there when the host is done with the one before; none is refused, none is sent twice."""
    monkeypatch.setattr(package_stream, "SLOW_BYTES_PER_SECOND", 25_000_000)
    host.bytes_per_second = CHUNK_BYTES / 0.05
    taken_bytes = await upload(client)
    assert host.most_waiting == 1
    assert bytes(host.package) == PACKAGE
    assert taken_bytes == sum(host.chunk_sizes) == len(PACKAGE)
    assert [method for method, _ in host.requests].count("PATCH") == len(host.chunk_sizes)
    assert max(host.chunk_sizes[2:]) <= CHUNK_BYTES // 2


async def test_on_a_quick_way_chunks_go_one_by_one(client: ReceiverClient, host: Host) -> None:
    """Each is as large as it may be."""
    await package_stream.send(client, DEPLOYMENT, Sent(), chunk_bytes=len(PACKAGE) // 2)
    assert host.most_waiting == 0


async def test_what_was_sent_ahead_is_dropped_with_the_chunk_before_it(
    client: ReceiverClient, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk that fails while the next one waits: the upload goes on from what the host holds."""
    monkeypatch.setattr(package_stream, "SLOW_BYTES_PER_SECOND", 25_000_000)
    host.bytes_per_second = CHUNK_BYTES / 0.05

    failures = [problem(503)]

    def fail_once(_done: int, _whole: int) -> None:
        if len(host.chunk_sizes) == 4:
            host.next_answers, failures[:] = failures[:], []

    await upload(client, progress=fail_once)
    assert failures == []
    assert bytes(host.package) == PACKAGE


async def test_a_way_that_breaks_in_every_chunk_gets_smaller_ones(
    port: int, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connections that never bring more than one and a half chunks bring a package all the same."""
    monkeypatch.setattr(package_stream, "MIN_CHUNK_BYTES", 1024)
    network = BadNetwork(port, cut_after_bytes=[CHUNK_BYTES * 3 // 2] * 100)
    async with network.proxy() as proxy_port, ReceiverClient(config_for(proxy_port)) as client:
        await upload(client, chunk_bytes=8 * CHUNK_BYTES, max_resumes=4)
    assert network.cuts > 4
    assert bytes(host.package) == PACKAGE


async def test_an_upload_goes_on_from_the_hosts_offset(client: ReceiverClient, host: Host) -> None:
    """Bytes that the host holds do not travel again."""
    host.package += PACKAGE[:100_000]
    taken_bytes = await upload(client)
    assert bytes(host.package) == PACKAGE
    assert taken_bytes == sum(host.chunk_sizes) == len(PACKAGE) - 100_000


async def test_a_whole_package_is_not_sent_again(client: ReceiverClient, host: Host) -> None:
    """One question and one announcement, no chunk."""
    host.package += PACKAGE
    assert await upload(client) == 0
    assert host.requests == [("HEAD", PACKAGE_PATH), ("POST", PACKAGE_PATH)]


async def test_connections_that_break_in_mid_chunk_do_not_end_an_upload(port: int, host: Host) -> None:
    """After each break the client asks for the offset and goes on; each request has a nonce of its own."""
    network = BadNetwork(port, cut_after_bytes=[CHUNK_BYTES * 3 // 2, CHUNK_BYTES // 2, CHUNK_BYTES * 5 // 2])
    async with network.proxy() as proxy_port, ReceiverClient(config_for(proxy_port)) as client:
        taken_bytes = await upload(client, max_resumes=3)
    assert network.cuts == 3
    assert bytes(host.package) == PACKAGE
    assert taken_bytes == len(PACKAGE)
    assert len(set(host.nonces)) == len(host.nonces)


async def test_a_chunk_whose_answer_was_lost_is_not_sent_twice(port: int, host: Host) -> None:
    """The host's offset says that the chunk arrived."""
    network = BadNetwork(port, answers_to_lose=2)
    async with network.proxy() as proxy_port, ReceiverClient(config_for(proxy_port)) as client:
        taken_bytes = await upload(client)
    assert network.answers_to_lose == 0
    assert taken_bytes == sum(host.chunk_sizes) == len(PACKAGE)
    assert [method for method, _ in host.requests].count("PATCH") == len(host.chunk_sizes)


async def test_progress_makes_the_count_of_tries_start_anew(port: int, host: Host) -> None:
    """Many breaks are survived with one try each, as long as each connection brings a chunk."""
    network = BadNetwork(port, cut_after_bytes=[CHUNK_BYTES * 3 // 2] * 9)
    async with network.proxy() as proxy_port, ReceiverClient(config_for(proxy_port)) as client:
        await upload(client, max_resumes=1)
    assert network.cuts == 9
    assert bytes(host.package) == PACKAGE


async def test_a_wrong_offset_names_the_right_one(client: ReceiverClient, host: Host) -> None:
    """`send_chunk` raises with the host's offset."""
    host.package += b"123"
    with pytest.raises(OffsetRefused) as caught:
        await client.send_chunk(DEPLOYMENT, 7, b"x")
    assert caught.value.right_offset == 3
    assert (caught.value.status, caught.value.retryable) == (409, False)


async def test_an_upload_recovers_from_a_wrong_offset(client: ReceiverClient, host: Host) -> None:
    """When the host lost what it had said it holds, the upload starts where the host now is."""

    def lose_once(done: int, _whole: int) -> None:
        if done == 3 * CHUNK_BYTES and len(host.chunk_sizes) == 3:
            del host.package[CHUNK_BYTES:]

    await upload(client, progress=lose_once)
    assert bytes(host.package) == PACKAGE
    assert len(host.chunk_sizes) == 13


async def test_a_busy_host_gets_the_chunk_again_with_a_fresh_nonce(
    client: ReceiverClient, host: Host
) -> None:
    """429 and 503 are tried again, and no nonce goes twice."""
    host.next_answers = [problem(503), problem(429), PlainTextResponse("bad gateway", status_code=502)]
    await upload(client)
    assert bytes(host.package) == PACKAGE
    assert len(set(host.nonces)) == len(host.nonces) > len(host.chunk_sizes) + 4


async def test_an_upload_gives_up_on_a_host_that_makes_no_progress(
    client: ReceiverClient, host: Host
) -> None:
    """The last error rises after the first try and `max_resumes` more."""
    host.chunk_answer = problem(409, "never right", **{contract.UPLOAD_OFFSET_HEADER: "0"})
    with pytest.raises(OffsetRefused, match="never right"):
        await upload(client, max_resumes=2)
    assert [method for method, _ in host.requests].count("PATCH") == 3


async def test_a_host_that_forgets_again_and_again_makes_no_progress(
    client: ReceiverClient, host: Host
) -> None:
    """Taking a chunk and losing it is not progress, so the upload ends."""

    def forget(done: int, _whole: int) -> None:
        if done:
            host.package.clear()

    with pytest.raises(OffsetRefused):
        await upload(client, progress=forget, max_resumes=3)
    assert len(host.chunk_sizes) == 4


async def test_an_upload_to_nobody_gives_up() -> None:
    """The error names the address and the cause."""
    closed_port = free_port()
    async with ReceiverClient(config_for(closed_port)) as client:
        with pytest.raises(ReceiverUnreachable) as caught:
            await upload(client, max_resumes=2)
    assert f"http://127.0.0.1:{closed_port}/api/deploy/dep-1/package" in str(caught.value)
    assert "ConnectError" in str(caught.value)
    assert caught.value.retryable


async def test_a_silent_host_is_unreachable_within_the_timeout() -> None:
    """A host that takes the request and never answers gives the same error."""
    hung = asyncio.Event()

    async def hang(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await hung.wait()
        writer.close()

    server = await asyncio.start_server(hang, "127.0.0.1", 0)
    config = config_for(server.sockets[0].getsockname()[1], timeout_seconds=0.1)
    async with server, ReceiverClient(config) as client:
        with pytest.raises(ReceiverUnreachable, match="ReadTimeout"):
            await client.status(DEPLOYMENT)
        hung.set()


async def test_a_wrong_key_ends_an_upload_at_once(port: int, host: Host) -> None:
    """What cannot succeed later is not tried again."""
    async with ReceiverClient(config_for(port, key=b"x" * 40)) as client:
        with pytest.raises(ReceiverRefused) as caught:
            await upload(client)
    assert caught.value.status == 401
    assert len(host.requests) == 1


Call = Callable[[ReceiverClient], Awaitable[object]]


async def test_a_refusal_carries_the_problem_details(client: ReceiverClient, host: Host) -> None:
    """Each field of the problem can be read, and the message holds the next step."""
    host.always = problem(422, "layers are missing")
    with pytest.raises(ReceiverRefused) as caught:
        await client.announce(contract.DeployRequest(container_name="web"), "key-1")
    told = caught.value
    assert (told.status, told.type, told.title) == (422, "urn:gantry:test", "Refused")
    assert (told.detail, told.error_code) == ("layers are missing", contract.ErrorCode.TRANSFER_FAILED)
    assert told.next_step == "Do the next thing."
    assert "layers are missing" in str(told)
    assert "Do the next thing." in str(told)


@pytest.mark.parametrize("body", ["<html>nope</html>", '{"detail": "Not Found"}', "[]", "", "\udcffx"])
async def test_an_answer_that_is_no_problem_is_still_told(
    client: ReceiverClient, host: Host, body: str
) -> None:
    """A page of a proxy or a framework becomes a refusal with its text and no error code."""
    host.always = Response(body.encode("utf-8", "surrogateescape"), status_code=404)
    with pytest.raises(ReceiverRefused) as caught:
        await client.status(DEPLOYMENT)
    assert (caught.value.status, caught.value.title, caught.value.error_code) == (404, "Not Found", None)
    assert caught.value.detail


@pytest.mark.parametrize(
    ("status", "retryable"),
    [
        (400, False),
        (401, False),
        (404, False),
        (408, True),
        (409, False),
        (422, False),
        (429, True),
        (500, True),
        (503, True),
    ],
)
async def test_only_a_busy_or_broken_host_is_retryable(
    client: ReceiverClient, host: Host, status: int, *, retryable: bool
) -> None:
    """408, 429 and 5xx may pass; the rest needs somebody to act."""
    host.always = problem(status)
    with pytest.raises(ReceiverRefused) as caught:
        await client.status(DEPLOYMENT)
    assert caught.value.retryable is retryable


@pytest.mark.parametrize(
    ("answer", "call"),
    [
        (Response("{}"), lambda client: client.status(DEPLOYMENT)),
        (Response("hello"), lambda client: client.health()),
        (Response(), lambda client: client.held(DEPLOYMENT)),
        (Response(headers={"Upload-Offset": "-1"}), lambda client: client.held(DEPLOYMENT)),
        (Response(headers={"Upload-Offset": "5"}), lambda client: client.send_chunk(DEPLOYMENT, 5, b"abc")),
        (Response(headers={"Upload-Offset": "9"}), lambda client: client.send_chunk(DEPLOYMENT, 5, b"abc")),
    ],
)
async def test_a_success_outside_the_contract_is_an_error(
    client: ReceiverClient, host: Host, answer: Response, call: Call
) -> None:
    """A 200 with the wrong body or offset is not believed, nor tried again."""
    host.always = answer
    with pytest.raises(AnswerNotUnderstood) as caught:
        await call(client)
    assert caught.value.retryable is False


async def test_a_proxy_of_the_environment_is_not_used(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests go to the host itself."""
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    async with ReceiverClient(config_for(port)) as client:
        assert (await client.health()).status == "healthy"


async def test_tls_trusts_the_given_certificate_and_no_other(host: Host, tmp_path: Path) -> None:
    """With the CA file the host answers; without it the connection is refused."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make_certificate(cert, key)
    async with serving(host.app(), cert=cert, key=key) as port:
        url = f"https://127.0.0.1:{port}"
        async with ReceiverClient(ReceiverConfig(url, KEY, tls_ca_file=cert)) as trusting:
            assert (await trusting.status(DEPLOYMENT)).state is contract.HostState.KEPT
        async with ReceiverClient(ReceiverConfig(url, KEY)) as strict:
            with pytest.raises(ReceiverUnreachable, match="CERTIFICATE_VERIFY_FAILED"):
                await strict.status(DEPLOYMENT)


def make_certificate(cert: Path, key: Path) -> None:
    """A self-signed certificate for 127.0.0.1."""
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    arguments = [
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "1",
        *subject,
        "-keyout",
        str(key),
        "-out",
        str(cert),
    ]
    subprocess.run(["openssl", "req", "-x509", *arguments], check=True, capture_output=True)


def test_the_key_is_in_no_repr() -> None:
    """Config, client and signer can be logged."""
    config = config_for(1)
    shown = repr((config, str(config), ReceiverClient(config), RequestSigner(KEY)))
    assert KEY.decode() not in shown
    assert "http://127.0.0.1:1" in shown


def test_errors_survive_pickling() -> None:
    """Prefect keeps the exception of a failed run: it must come back whole."""
    refusal = Refusal("PATCH http://h/x", 409, "about:blank", "Conflict", "wrong offset", "Ask by HEAD.")
    errors = [
        OffsetRefused(refusal, 5),
        ReceiverRefused(refusal),
        ReceiverUnreachable("http://h", "ConnectError"),
    ]
    for error in errors:
        again = pickle.loads(pickle.dumps(error))  # noqa: S301  # our own bytes
        assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_pauses_double_and_are_bounded() -> None:
    """From the first pause to the longest, however many tries there were."""
    gone = ReceiverUnreachable("http://h", "ConnectError")
    assert [pause_seconds(n, 0.5, gone) for n in (1, 2, 3)] == [0.5, 1.0, 2.0]
    assert pause_seconds(10_000, 0.5, gone) == MAX_PAUSE_SECONDS


def test_a_pause_that_the_host_asks_for_is_kept_within_bounds() -> None:
    """Retry-After lengthens a pause, up to a minute."""

    def busy(asked_seconds: float) -> ReceiverRefused:
        return ReceiverRefused(Refusal("r", 429, "t", "t", "d", "n", retry_after_seconds=asked_seconds))

    assert pause_seconds(1, 0.5, busy(7)) == 7
    assert pause_seconds(3, 0.5, busy(1)) == 2
    assert pause_seconds(1, 0.5, busy(86_400)) == MAX_RETRY_AFTER_SECONDS


def test_the_client_imports_without_prefect() -> None:
    """Hosts and tools use it where Prefect is not installed."""
    code = "import sys, blocks.receiver_client; sys.exit('prefect' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
