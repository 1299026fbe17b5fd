"""Is a container well: asked of real servers on loopback."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from receiver import settings
from receiver.contract import HealthAttempt, HealthCheckConfig
from receiver.engine import ContainerState
from receiver.health import ContainerUnwell, Probe, ask_until_healthy, check_running, make_probe

Reply = Callable[[asyncio.StreamWriter], Awaitable[None]]
RUNNING = ContainerState(
    status="running",
    running=True,
    restart_count=0,
    exit_code=0,
    started_at="2026-01-01T00:00:00Z",
    image_id="sha256:1",
    health=None,
    error="",
)


def says(status: str, *headers: str) -> Reply:
    """A complete answer."""

    async def reply(writer: asyncio.StreamWriter) -> None:
        lines = [f"HTTP/1.1 {status}", "Content-Length: 2", "Connection: close", *headers]
        writer.write("\r\n".join([*lines, "", "ok"]).encode())
        await writer.drain()

    return reply


async def never(writer: asyncio.StreamWriter) -> None:
    """No byte, until the asker gives up."""
    await writer.wait_closed()


async def first_line_only(writer: asyncio.StreamWriter) -> None:
    """A 200, and then a body that never comes."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    await writer.drain()
    await writer.wait_closed()


async def reset(writer: asyncio.StreamWriter) -> None:
    """TCP RST instead of an answer."""
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


async def garbage(writer: asyncio.StreamWriter) -> None:
    """Something that is no HTTP."""
    writer.write(b"SSH-2.0-OpenSSH_9.2\r\n")
    await writer.drain()


@asynccontextmanager
async def server(*replies: Reply, port: int = 0) -> AsyncIterator[str]:
    """A server that gives these replies in turn, the last one for ever; its URL."""
    left = list(replies)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            reply = left.pop(0) if len(left) > 1 else left[0]
            await reply(writer)
            writer.close()
        except (ConnectionError, asyncio.IncompleteReadError):
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", port)
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/health"
    finally:
        listening.close()


def probe(url: str, **changes: float) -> Probe:
    """Three attempts, 50 ms apart, half a second of patience."""
    return replace(Probe(url, 200, 3, 0.05, 0.5), **changes)  # type: ignore[arg-type]  # figures only


async def ask(url: str, **changes: float) -> tuple[list[HealthAttempt], ContainerUnwell | None]:
    """All attempts, and how it ended."""
    attempts: list[HealthAttempt] = []
    try:
        last = await ask_until_healthy(probe(url, **changes), attempts.append)
    except ContainerUnwell as unwell:
        return attempts, unwell
    assert last == attempts[-1]
    return attempts, None


async def test_an_endpoint_that_answers_is_asked_once() -> None:
    """200 at once: one attempt, passed."""
    async with server(says("200 OK")) as url:
        attempts, unwell = await ask(url)
    assert unwell is None
    assert [(each.attempt, each.status, each.status_code) for each in attempts] == [(1, "passed", 200)]


async def test_an_endpoint_that_recovers_is_well() -> None:
    """500 first, 200 then: two attempts, each with what was answered."""
    async with server(says("500 Oops"), says("200 OK")) as url:
        attempts, unwell = await ask(url)
    assert unwell is None
    assert [(each.attempt, each.status, each.status_code) for each in attempts] == [
        (1, "failed", 500),
        (2, "passed", 200),
    ]
    assert attempts[0].message == "HTTP 500, expected 200"


async def test_an_endpoint_that_stays_broken_is_given_up_after_its_attempts() -> None:
    """Exactly `max_retries` questions; the error names the endpoint and the last answer."""
    async with server(says("503 Busy")) as url:
        attempts, unwell = await ask(url)
    assert [each.attempt for each in attempts] == [1, 2, 3]
    assert str(unwell) == (
        f"health endpoint {url} failed 3 attempt(s); the last one said: HTTP 503, expected 200"
    )


async def test_a_service_that_comes_up_within_an_attempt_passes_it() -> None:
    """A refused connection is asked again soon: a starting service does not cost a whole interval."""
    async with server(says("200 OK")) as url:
        port = int(url.split(":")[2].split("/")[0])
    asking = asyncio.create_task(ask(url, retry_interval_seconds=10, max_retries=1))
    await asyncio.sleep(0.15)  # no fact to wait for: its first tries are refused meanwhile
    async with server(says("200 OK"), port=port):
        attempts, unwell = await asyncio.wait_for(asking, 5)
    assert unwell is None
    assert [each.status for each in attempts] == ["passed"]


@pytest.mark.parametrize("reply", [reset, garbage], ids=["reset", "garbage"])
async def test_a_broken_connection_is_no_answer(reply: Reply) -> None:
    """The attempt fails without a status code, and says what was wrong."""
    async with server(reply) as url:
        attempts, unwell = await ask(url)
    assert unwell is not None
    assert [each.status_code for each in attempts] == [None] * 3
    assert all(each.message.startswith("no answer: ") for each in attempts)


async def test_nobody_listening_is_told_as_such() -> None:
    """Every attempt is made, and each says that the connection failed."""
    async with server(says("200 OK")) as url:
        pass
    attempts, unwell = await ask(url)
    assert len(attempts) == 3
    assert "ConnectError" in str(unwell)


@pytest.mark.parametrize("reply", [never, first_line_only], ids=["no first byte", "no body"])
async def test_an_answer_that_takes_too_long_is_none(reply: Reply) -> None:
    """The timeout covers the whole answer; it ends the attempt at once, without a second try in it."""
    async with server(reply) as url:
        attempts, unwell = await ask(url, timeout_seconds=0.1, max_retries=2)
    assert len(attempts) == 2
    assert "no answer within 0.1 s" in str(unwell)
    assert all(90 <= each.duration_ms < 2000 for each in attempts)


async def test_a_patience_beyond_the_clients_own_is_granted() -> None:
    """`timeout_ms` of 20 s means 20 s; the HTTP client's default of 5 s must not cut it short."""

    async def after_more_than_five_seconds(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(5.2)
        await says("200 OK")(writer)

    async with server(after_more_than_five_seconds) as url:
        attempts, unwell = await ask(url, timeout_seconds=20, max_retries=1)
    assert unwell is None, unwell
    assert attempts[0].duration_ms > 5000


async def test_a_redirect_is_not_the_expected_answer() -> None:
    """It is not followed: a login page behind it would pass for health."""
    async with server(says("302 Found", "Location: /login"), says("200 OK")) as url:
        attempts, unwell = await ask(url, max_retries=1)
    assert unwell is not None
    assert attempts[0].status_code == 302


async def test_another_expected_status_is_the_only_one_that_passes() -> None:
    """204 passes when 204 is expected, 200 does not."""
    async with server(says("200 OK"), says("204 No Content")) as url:
        attempts, unwell = await ask(url, expected_status_code=204)
    assert unwell is None
    assert [each.status_code for each in attempts] == [200, 204]


async def test_a_proxy_of_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a proxy's answer would be taken for the container's."""
    async with server(says("200 OK")) as proxy, server(says("500 Oops")) as url:
        monkeypatch.setenv("HTTP_PROXY", proxy)
        monkeypatch.setenv("http_proxy", proxy)
        _, unwell = await ask(url)
    assert unwell is not None


def test_intervals_grow_and_stay_below_thirty_seconds() -> None:
    """By 1.2 after each attempt."""
    intervals = probe("http://x", retry_interval_seconds=2, max_retries=30).intervals_seconds()
    assert intervals[:3] == pytest.approx([2, 2.4, 2.88])
    assert (len(intervals), max(intervals)) == (30, 30)


def test_figures_of_the_deployment_win_over_those_of_the_host() -> None:
    """Zero is a figure, too; what is left out comes from the host."""
    host = settings.from_environment(
        {
            "HEALTH_CHECK_MAX_RETRIES": "7",
            "HEALTH_CHECK_RETRY_INTERVAL_MS": "900",
            "HEALTH_CHECK_TIMEOUT_MS": "400",
        },
        require_key=False,
    )
    assert make_probe(HealthCheckConfig(), host, "u") == Probe("u", 200, 7, 0.9, 0.4)
    own = HealthCheckConfig(expected_status_code=204, max_retries=1, retry_interval_ms=0, timeout_ms=5)
    assert make_probe(own, host, "u") == Probe("u", 204, 1, 0.0, 0.005)


@pytest.mark.parametrize(
    ("state", "started_at"),
    [(RUNNING, RUNNING.started_at), (RUNNING, None), (replace(RUNNING, health="starting"), None)],
    ids=["the same process", "no start known", "HEALTHCHECK still starting"],
)
def test_a_running_container_passes(state: ContainerState, started_at: str | None) -> None:
    """Nothing is raised."""
    check_running(state, started_at)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (replace(RUNNING, running=False, status="exited", exit_code=3), r"is exited \(exit code 3\)"),
        (replace(RUNNING, running=False, status="restarting"), "is restarting"),
        (replace(RUNNING, running=False, status="created", error="no such file"), ": no such file"),
        (replace(RUNNING, restart_count=4), r"restarted 4 time"),
        (replace(RUNNING, started_at="2026-01-01T00:00:09Z"), r"restarted 1 time"),
        (replace(RUNNING, health="unhealthy"), "unhealthy"),
    ],
    ids=["exited", "restarting", "never started", "counted restarts", "another process", "unhealthy"],
)
def test_a_container_that_is_not_the_one_started_is_unwell(state: ContainerState, said: str) -> None:
    """A restart loop shows between its crashes as running; it is told apart by count and start."""
    with pytest.raises(ContainerUnwell, match=said):
        check_running(state, RUNNING.started_at)
