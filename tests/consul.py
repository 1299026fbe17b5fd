"""Consul for tests: a real agent where there is one, and what its documentation says it answers."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

from tests.services import free_port


@dataclass
class DocumentedConsul:
    """Answers `/v1/health/service/<name>` as documented: `answers` in turn, the last one for ever."""

    url: str
    answers: list[tuple[str, str]] = field(default_factory=list)
    headers: tuple[str, ...] = ()
    asked: list[str] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request of one connection."""
        try:
            self.asked.append((await reader.readuntil(b"\r\n\r\n")).decode())
            status, body = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            head = [f"HTTP/1.1 {status}", "Content-Type: application/json", "X-Consul-Index: 42"]
            head += [*self.headers, f"Content-Length: {len(body)}", "Connection: close", "", body]
            writer.write("\r\n".join(head).encode())
            await writer.drain()
            writer.close()
        except (ConnectionError, asyncio.IncompleteReadError):
            writer.close()


@asynccontextmanager
async def documented_consul(
    *answers: tuple[str, str], headers: tuple[str, ...] = ()
) -> AsyncIterator[DocumentedConsul]:
    """A server on loopback that gives these answers (status line, body)."""
    consul = DocumentedConsul("", list(answers), headers)
    listening = await asyncio.start_server(consul.serve, "127.0.0.1", 0)
    consul.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    try:
        yield consul
    finally:
        listening.close()


def instances(*statuses: str, output: str = "") -> tuple[str, str]:
    """An answer that lists an instance for each status of its service check; its node is always well."""
    listed = [
        {
            "Node": {"ID": "40e4a748-2192-161a-0510-9bf59fe950b5", "Node": "foobar", "Address": "10.1.10.12"},
            "Service": {"ID": f"web-{number}", "Service": "web", "Tags": ["v1"], "Address": "", "Port": 8000},
            "Checks": [_check("serfHealth", "passing", ""), _check("Service 'web' check", status, output)],
        }
        for number, status in enumerate(statuses)
    ]
    return "200 OK", json.dumps(listed)


def _check(name: str, status: str, output: str) -> dict[str, Any]:
    return {
        "Node": "foobar",
        "CheckID": name,
        "Name": name,
        "Status": status,
        "Notes": "",
        "Output": output,
        "ServiceID": "",
        "ServiceName": "",
        "ServiceTags": [],
    }


@contextmanager
def real_consul() -> Iterator[str | None]:
    """The URL of an agent in development mode; None where no `consul` is on PATH."""
    program = shutil.which("consul")
    if program is None:
        yield None
        return
    ports = {name: free_port() for name in ("http", "dns", "server", "serf-lan", "serf-wan")}
    flags = [f"-{name}-port={port}" for name, port in ports.items()]
    url = f"http://127.0.0.1:{ports['http']}"
    agent = subprocess.Popen(
        [
            *(program, "agent", "-dev", "-bind=127.0.0.1", "-client=127.0.0.1", "-node=test", *flags),
            *("-grpc-port=-1", "-disable-host-node-id", "-log-level=warn"),
            *("-hcl=disable_update_check=true", '-hcl=check_update_interval="0s"'),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for_leader(url, agent)
        yield url
    finally:
        agent.terminate()
        agent.wait(10)


def _wait_for_leader(url: str, agent: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 20
    while not _has_leader(url):
        assert agent.poll() is None, "the Consul agent ended"
        assert time.monotonic() < deadline, "the Consul agent has no leader"
        time.sleep(0.05)


def _has_leader(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v1/status/leader", trust_env=False).text.strip('"\n') != ""
    except httpx.HTTPError:
        return False


def put(url: str, path: str, body: object) -> None:
    """One call of the agent's API."""
    assert urlsplit(url).hostname == "127.0.0.1"
    httpx.put(f"{url}{path}", json=body, trust_env=False).raise_for_status()
