"""Does Consul list a service, and does it call it well? Asks an agent's health endpoint; changes nothing.

`GET /v1/health/service/<name>` (developer.hashicorp.com/consul/api-docs/health): every instance of the
catalog with its checks; an empty list, not 404, for a service that nobody registered. An agent that hides
what the token may not see says so in a header.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import httpx
from pydantic import BaseModel, Field, SecretStr, TypeAdapter, ValidationError

PATIENCE_SECONDS = 2.5
TOKEN_HEADER = "X-Consul-Token"  # noqa: S105 - a name, not a secret
FILTERED_HEADER = "X-Consul-Results-Filtered-By-ACLs"
_AGAIN_SECONDS = 0.2
_QUOTED_CHARACTERS = 200


class RegistrationUnproven(Exception):
    """Consul does not say that the service is registered"""


class NotRegistered(RegistrationUnproven):
    """Consul does not list the service"""


class ConsulUnavailable(RegistrationUnproven):
    """Consul cannot be asked"""


class Check(BaseModel):
    """One check of an instance, its node's checks among them."""

    name: str = Field(alias="Name", default="")
    status: str = Field(alias="Status")
    output: str = Field(alias="Output", default="")


class Instance(BaseModel):
    """One instance of a service."""

    checks: list[Check] = Field(alias="Checks")

    @property
    def failing(self) -> Check | None:
        """A check that keeps Consul from calling the instance passing."""
        return next((check for check in self.checks if check.status != "passing"), None)


_INSTANCES = TypeAdapter(list[Instance])


@dataclass(frozen=True)
class Agent:
    """Where Consul is asked, and as whom."""

    url: str
    token: SecretStr | None = None

    def request(self, service: str) -> dict[str, Any]:
        """Arguments of the HTTP call."""
        headers = {TOKEN_HEADER: self.token.get_secret_value()} if self.token else {}
        return {"url": f"{self.url.rstrip('/')}/v1/health/service/{service}", "headers": headers}


@dataclass(frozen=True)
class Registration:
    """What Consul lists of a service; `is_filtered` when it hides some of it from the token."""

    instances: tuple[Instance, ...] = ()
    is_filtered: bool = False

    @property
    def passing(self) -> int:
        """Instances that Consul hands out."""
        return sum(instance.failing is None for instance in self.instances)

    def __str__(self) -> str:
        count = len(self.instances)
        if self.passing:
            return f"registered; {self.passing} of {count} instance(s) passing"
        failing = next((found for instance in self.instances if (found := instance.failing)), None)
        if failing is None:
            return "not registered"
        said = " ".join(failing.output.split())[:_QUOTED_CHARACTERS]
        return (
            f"registered, but none of {count} instance(s) is passing: check {failing.name!r} is "
            f"{failing.status}{': ' if said else ''}{said}"
        )


async def wait_for_registration(
    agent: Agent, service: str, patience_seconds: float = PATIENCE_SECONDS
) -> Registration:
    """Return once Consul lists the service as passing, or at the deadline when it lists it at all.

    Raises `NotRegistered` when it was not listed in time, and `ConsulUnavailable` when Consul did not
    answer, refused the question, or said something else. Never takes longer than its patience.
    """
    watch = _Watch(agent, service)
    try:
        async with asyncio.timeout(patience_seconds):
            return await watch.until_passing()
    except TimeoutError:
        return watch.verdict(patience_seconds)


@dataclass
class _Watch:
    agent: Agent
    service: str
    found: Registration | None = None
    trouble: str = "it did not answer"

    async def until_passing(self) -> Registration:
        # The caller's deadline is for all of it; httpx's own would be for each step.
        async with httpx.AsyncClient(trust_env=False, timeout=None) as client:  # noqa: S113
            while True:
                found = self._read(await self._ask(client))
                if found is not None and found.passing:
                    return found
                await asyncio.sleep(_AGAIN_SECONDS)

    def verdict(self, patience_seconds: float) -> Registration:
        """What is known at the deadline."""
        if self.found is None:
            raise ConsulUnavailable(f"Consul at {self.agent.url}: {self.trouble} in {patience_seconds:g} s")
        if not self.found.instances:
            hidden = "; it hides results from this token: give CONSUL_HTTP_TOKEN service:read and node:read"
            raise NotRegistered(
                f"Consul at {self.agent.url} does not list {self.service} after {patience_seconds:g} s"
                f"{hidden if self.found.is_filtered else ''}"
            )
        return self.found

    async def _ask(self, client: httpx.AsyncClient) -> httpx.Response:
        try:
            return await client.get(**self.agent.request(self.service))
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            raise ConsulUnavailable(
                f"Consul at {self.agent.url} cannot be asked: {type(exc).__name__} {exc}".strip()
            ) from exc

    def _read(self, answer: httpx.Response) -> Registration | None:
        """What is listed; None, to ask again, while the agent has no leader to ask."""
        said = " ".join(answer.text[:_QUOTED_CHARACTERS].split())
        if answer.is_server_error:
            self.trouble = f"it answered nothing but {answer.status_code} {said}".rstrip()
            return None
        if answer.status_code == httpx.codes.FORBIDDEN:
            raise ConsulUnavailable(
                f"Consul at {self.agent.url} refuses the question (403 {said}): set CONSUL_HTTP_TOKEN on the "
                "host to a token with service:read and node:read"
            )
        try:
            answer.raise_for_status()
            listed = tuple(_INSTANCES.validate_json(answer.content))
        except (httpx.HTTPStatusError, ValidationError) as exc:
            raise ConsulUnavailable(
                f"what answers at {self.agent.url} is no Consul: {answer.status_code} {said}"
            ) from exc
        self.found = Registration(listed, answer.headers.get(FILTERED_HEADER, "").lower() == "true")
        return self.found
