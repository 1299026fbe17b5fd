"""What Consul says of a service, by its documented answers; `tests/integration` asks a real agent."""

from __future__ import annotations

import asyncio
import time

import pytest
from pydantic import SecretStr, ValidationError

from receiver import consul
from receiver.consul import Agent, ConsulUnavailable, NotRegistered, wait_for_registration
from receiver.contract import HealthCheckConfig
from tasks.errors import OPERATION_POLICIES
from tests.consul import documented_consul, instances
from tests.services import free_port

NOBODY = ("200 OK", "[]")
PATIENCE_SECONDS = 0.5


async def test_a_service_that_is_registered_and_passing_is_found_at_once() -> None:
    """The health endpoint is asked once, by the service's name, without a token that nobody gave."""
    async with documented_consul(instances("passing", "critical")) as agent:
        found = await wait_for_registration(Agent(agent.url), "web")
    assert str(found) == "registered; 1 of 2 instance(s) passing"
    assert [asked.splitlines()[0] for asked in agent.asked] == ["GET /v1/health/service/web HTTP/1.1"]
    assert "x-consul-token" not in agent.asked[0].lower()


async def test_a_service_that_registers_and_passes_a_moment_later_is_waited_for() -> None:
    """A new check is critical until it ran: that is no verdict yet."""
    answers = (NOBODY, instances("critical"), instances("passing"))
    async with documented_consul(*answers) as agent:
        assert (await wait_for_registration(Agent(agent.url), "web")).passing == 1
    assert len(agent.asked) == 3


@pytest.mark.parametrize("status", ["critical", "warning"])
async def test_a_service_whose_check_does_not_pass_is_registered_and_told_so(status: str) -> None:
    """The specification counts the catalog; a person reads which check keeps the traffic away."""
    refused = 'Get "http://127.0.0.1:8000/health":\n dial tcp: connection refused'
    async with documented_consul(instances(status, output=refused)) as agent:
        found = await wait_for_registration(Agent(agent.url), "web", PATIENCE_SECONDS)
    assert str(found) == (
        f"registered, but none of 1 instance(s) is passing: check \"Service 'web' check\" is {status}: "
        'Get "http://127.0.0.1:8000/health": dial tcp: connection refused'
    )


async def test_a_service_that_is_not_registered_in_time_is_told_as_such() -> None:
    """Consul answers an unknown service with an empty list; it is asked again until the time is up."""
    began = time.monotonic()
    async with documented_consul(NOBODY) as agent:
        with pytest.raises(NotRegistered, match=r"does not list web after 0.5 s$"):
            await wait_for_registration(Agent(agent.url), "web", PATIENCE_SECONDS)
    assert PATIENCE_SECONDS <= time.monotonic() - began < 2
    assert len(agent.asked) > 1


async def test_results_that_are_hidden_from_the_token_are_no_absence() -> None:
    """Consul leaves out what a token may not read, and says so in a header."""
    async with documented_consul(NOBODY, headers=("X-Consul-Results-Filtered-By-ACLs: true",)) as agent:
        with pytest.raises(NotRegistered, match="hides results from this token: give CONSUL_HTTP_TOKEN"):
            await wait_for_registration(Agent(agent.url), "web", PATIENCE_SECONDS)


async def test_a_token_that_is_refused_is_told_at_once_and_not_quoted() -> None:
    """403 with Consul's own words; the token stays secret."""
    async with documented_consul(("403 Forbidden", "ACL not found")) as agent:
        with pytest.raises(ConsulUnavailable, match=r"403 ACL not found.*CONSUL_HTTP_TOKEN") as refused:
            await wait_for_registration(Agent(agent.url, SecretStr("s3cret-token")), "web")
    assert "x-consul-token: s3cret-token" in agent.asked[0].lower()
    assert "s3cret-token" not in str(refused.value)
    assert "s3cret-token" not in repr(Agent(agent.url, SecretStr("s3cret-token")))


async def test_a_consul_that_nobody_reaches_is_told_with_the_cause() -> None:
    """Where it was looked for, and what the connection said."""
    with pytest.raises(ConsulUnavailable, match="cannot be asked: ConnectError"):
        await wait_for_registration(Agent(f"http://127.0.0.1:{free_port()}"), "web")


async def test_a_consul_without_a_leader_is_asked_again() -> None:
    """500 passes when a leader is found, and is told when none is."""
    leaderless = ("500 Internal Server Error", "No cluster leader")
    async with documented_consul(leaderless, instances("passing")) as agent:
        assert (await wait_for_registration(Agent(agent.url), "web")).passing == 1
    async with documented_consul(leaderless) as agent:
        with pytest.raises(ConsulUnavailable, match="nothing but 500 No cluster leader"):
            await wait_for_registration(Agent(agent.url), "web", PATIENCE_SECONDS)


async def test_a_consul_that_hangs_costs_no_more_than_the_patience() -> None:
    """The operation's own time-out of 3 s would fail the deployment, and must not speak first."""

    async def never(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await writer.wait_closed()

    assert OPERATION_POLICIES["verify_service_registration"].timeout_ms / 1000 > consul.PATIENCE_SECONDS
    async with await asyncio.start_server(never, "127.0.0.1", port := free_port()):
        began = time.monotonic()
        with pytest.raises(ConsulUnavailable, match=r"it did not answer in 0\.5 s"):
            await wait_for_registration(Agent(f"http://127.0.0.1:{port}"), "web", PATIENCE_SECONDS)
        assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "answer",
    [
        ("200 OK", "<html>a login page</html>"),
        ("200 OK", '{"Node": "x"}'),
        ("200 OK", '[{"ServiceName": "web"}]'),
        ("302 Found", ""),
        ("404 Not Found", "nothing here"),
    ],
)
async def test_something_else_that_answers_is_no_consul(answer: tuple[str, str]) -> None:
    """A proxy's page neither proves a registration nor breaks the deployment."""
    async with documented_consul(answer) as agent:
        with pytest.raises(ConsulUnavailable, match="is no Consul: "):
            await wait_for_registration(Agent(agent.url), "web")


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8500", "https://consul.example/", "http://[::1]:8500/consul"]
)
def test_a_consul_url_is_an_http_url(url: str) -> None:
    """As people write it."""
    assert HealthCheckConfig(consul_url=url).consul_url == url


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8500", "ftp://consul", "http://", "http://a b", "http://c/?token=x"]
)
def test_another_consul_url_is_refused_with_the_form(url: str) -> None:
    """Before anything is built, and by the field's name."""
    with pytest.raises(ValidationError, match=r"consul_url .*http://127.0.0.1:8500"):
        HealthCheckConfig(consul_url=url)
