"""A real Consul agent is asked, where a `consul` is on PATH; the documented answers are in `tests/unit`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from receiver.consul import Agent, NotRegistered, wait_for_registration
from tests.consul import put, real_consul


@pytest.fixture(scope="module")
def agent() -> Iterator[Agent]:
    """An agent of its own. Debian 12 has no package: its absence fails nothing, REQUIRE_SERVICES or not."""
    with real_consul() as url:
        if url is None:
            pytest.skip("no consul on PATH; the documented answers are tried in tests/unit/test_consul.py")
        yield Agent(url)


def register(agent: Agent, name: str, status: str) -> None:
    """A service with a check of the kind that its owner reports."""
    check = {"TTL": "60s", "Status": status}
    put(agent.url, "/v1/agent/service/register", {"ID": f"{name}-1", "Name": name, "Check": check})


async def test_what_a_real_agent_says_is_understood(agent: Agent) -> None:
    """Passing, then critical, then in maintenance, then gone."""
    register(agent, "web", "passing")
    assert str(await wait_for_registration(agent, "web")) == "registered; 1 of 1 instance(s) passing"
    put(agent.url, "/v1/agent/check/fail/service:web-1?note=out+of+order", None)
    critical = str(await wait_for_registration(agent, "web", 0.5))
    assert critical.startswith("registered, but none of 1 instance(s) is passing: check ")
    assert critical.endswith("is critical: out of order")
    put(agent.url, "/v1/agent/service/deregister/web-1", None)
    with pytest.raises(NotRegistered, match="does not list web"):
        await wait_for_registration(agent, "web", 0.5)


async def test_a_real_agent_s_late_registration_is_waited_for(agent: Agent) -> None:
    """Registered while it is being asked for."""
    waiting = asyncio.create_task(wait_for_registration(agent, "late"))
    await asyncio.to_thread(register, agent, "late", "passing")
    assert (await waiting).passing == 1
