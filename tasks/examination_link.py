"""How far a connection to a receiver comes, told by kinds of error; and the certificate that it shows."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from datetime import UTC, datetime

from blocks.remote_host import RemoteHost
from tasks.findings import Certificate, Link, Reach

CONNECT_SECONDS = 5.0
_NO_CERTIFICATE = "the connection is not TLS, or ends before a certificate is shown"


async def reach(address: str, port: int) -> Link:
    """Connect and close; the cause when that fails, this side's address when it does not."""
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(address, port)
    except TimeoutError:
        return Link(Reach.TIMEOUT, f"{CONNECT_SECONDS:.0f} s")
    except ConnectionRefusedError:
        return Link(Reach.REFUSED)
    except socket.gaierror as exc:
        return Link(Reach.NAME_UNKNOWN, exc.strerror or "")
    except OSError as exc:
        return Link(Reach.NO_ROUTE, exc.strerror or str(exc))
    own = writer.get_extra_info("sockname")
    await _close(writer)
    return Link(Reach.REACHED, own_address=str(own[0]) if own else None)


async def look_at_certificate(host: RemoteHost) -> Certificate:
    """The certificate as the sender of deployments checks it."""
    if not host.tls_verify:
        return Certificate(is_checked=False)
    try:
        context = ssl.create_default_context(cafile=host.tls_ca_file)
        async with asyncio.timeout(CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(host.address, host.port, ssl=context)
    except ssl.SSLCertVerificationError as exc:
        return Certificate(is_checked=True, problem=f"not accepted: {exc.verify_message}")
    except (ssl.SSLError, TimeoutError, ConnectionError):
        return Certificate(is_checked=True, problem=_NO_CERTIFICATE)
    except OSError as exc:
        return Certificate(is_checked=True, problem=f"{host.tls_ca_file}: {exc.strerror}")
    shown = writer.get_extra_info("peercert") or {}
    await _close(writer)
    return Certificate(is_checked=True, expires_at=_expiry(shown.get("notAfter")))


def _expiry(told: str | None) -> datetime | None:
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(told), UTC) if told else None


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(1):
            await writer.wait_closed()
