"""What an examination finds on real sockets, by TLS and in real databases; it changes none of them."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pydantic import SecretStr

from blocks.hmac_secret import HmacSecret
from blocks.remote_host import RemoteHost
from tasks.examination_control import look_into_records
from tasks.examination_link import look_at_certificate, reach
from tasks.findings import Reach
from tasks.records import NewWorkflow, Records
from tasks.schema import HEAD_REVISION
from tests.services import free_port


def host(port: int, ca_file: Path | None = None, **fields: bool) -> RemoteHost:
    """A host on loopback that is reached by TLS."""
    secret = HmacSecret(current=SecretStr("k" * 40))
    return RemoteHost(
        address="localhost", port=port, hmac_secret=secret, tls=True, tls_ca_file=ca_file, **fields
    )


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate of 40 days for localhost, signed by itself, and its key."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    arguments = ["-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(certificate)]
    arguments += ["-days", "40", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(["openssl", "req", "-x509", *arguments], check=True, capture_output=True)
    return certificate, key


async def test_the_ways_in_which_a_connection_fails_are_told_apart() -> None:
    """Refused and name unknown by the kind of error; reached with this side's own address."""
    assert (await reach("127.0.0.1", free_port())).reach is Reach.REFUSED
    assert (await reach("no-such-host.invalid", 8001)).reach is Reach.NAME_UNKNOWN
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    async with server:
        link = await reach("127.0.0.1", server.sockets[0].getsockname()[1])
    assert (link.reach, link.own_address) == (Reach.REACHED, "127.0.0.1")


async def test_a_certificate_is_read_as_the_sender_checks_it(certificate: tuple[Path, Path]) -> None:
    """Accepted by the block's file with its last day; refused by the public ones; not asked for; not TLS."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    server = await asyncio.start_server(lambda _, writer: writer.close(), "localhost", 0, ssl=context)
    async with server:
        port = server.sockets[0].getsockname()[1]
        accepted = await look_at_certificate(host(port, certificate[0]))
        foreign = await look_at_certificate(host(port))
        unchecked = await look_at_certificate(host(port, tls_verify=False))
    assert accepted.problem is None
    assert accepted.expires_at is not None
    assert timedelta(days=39) < accepted.expires_at - datetime.now(UTC) <= timedelta(days=40)
    assert foreign.problem is not None
    assert "self-signed" in foreign.problem
    assert (unchecked.is_checked, unchecked.problem) == (False, None)
    plain = await asyncio.start_server(lambda _, writer: writer.close(), "localhost", 0)
    async with plain:
        answer = await look_at_certificate(host(plain.sockets[0].getsockname()[1]))
    assert "not TLS" in (answer.problem or "")


async def test_records_that_are_not_there_are_not_made(sqlite_url: str, tmp_path: Path) -> None:
    """The first deployment makes them."""
    found = await look_into_records(sqlite_url)
    assert (found.revision, found.problem) == (None, None)
    assert await asyncio.to_thread(lambda: list(tmp_path.iterdir())) == []


async def test_records_tell_their_revision_and_what_is_open(records_url: str) -> None:
    """On both kinds of database, with the password hidden."""
    async with await Records.open(records_url) as records:
        new = NewWorkflow(workflow_id="w1", container_name="web", remote_host="host-b", image_tag="v2")
        await records.create(new)
    found = await look_into_records(records_url)
    assert (found.revision, found.expected_revision) == (HEAD_REVISION, HEAD_REVISION)
    assert [(left.workflow_id, left.remote_host, left.state) for left in found.open_workflows] == [
        ("w1", "host-b", "PENDING")
    ]


async def test_records_that_do_not_answer_are_told_without_their_password() -> None:
    """As a finding, not as an error."""
    found = await look_into_records(f"postgresql://user:hunter2@127.0.0.1:{free_port()}/x")
    assert found.problem
    assert "hunter2" not in repr(found)
