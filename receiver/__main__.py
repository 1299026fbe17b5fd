"""`python -m receiver`: read the settings, take the port, serve until told to stop."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import socket
import ssl
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import uvicorn

from receiver import logs, settings
from receiver.app import create_app
from receiver.binding import listening
from receiver.settings import ReceiverSettings, SettingsRefused

EXIT_SETTINGS = 2
EXIT_BUSY = 3
KEEP_ALIVE_SECONDS = 30
SHUTDOWN_SECONDS = 30


class StartRefused(Exception):
    """The receiver cannot start here now"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the receiver; returns the exit code (2: a setting, 3: port or state folder in use)."""
    options = _parser().parse_args(arguments)
    try:
        found = settings.from_environment()
        if options.check:
            sys.stderr.write("receiver: the settings are valid\n")
            return 0
        _run(found)
    except SettingsRefused as exc:
        return _refuse(exc, EXIT_SETTINGS)
    except StartRefused as exc:
        return _refuse(exc, EXIT_BUSY)
    return 0


def _run(found: ReceiverSettings) -> None:
    logs.configure(found.log_format, found.log_level)
    found.make_folders()
    with _only_daemon(found), contextlib.closing(_listen(found)) as listening:
        server = uvicorn.Server(_server_config(found))
        _load(server.config)
        logs.log.info("receiver listens on %s port %s", found.host, found.port)
        server.run(sockets=[listening])


def _server_config(found: ReceiverSettings) -> uvicorn.Config:
    return uvicorn.Config(
        create_app(found),
        # The same whatever else is installed: a control host has uvloop and httptools, most hosts have not.
        loop="asyncio",
        http="h11",
        access_log=False,
        log_config=None,
        # A forwarded address is the caller's word; the allow-list goes by the connection itself.
        proxy_headers=False,
        server_header=False,
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        ssl_certfile=found.tls_cert_file,
        ssl_keyfile=found.tls_key_file,
    )


def _load(config: uvicorn.Config) -> None:
    try:
        config.load()
    except (ssl.SSLError, OSError) as exc:
        raise SettingsRefused(
            f"HOOK_RECEIVER_TLS_CERT_FILE and HOOK_RECEIVER_TLS_KEY_FILE cannot be used ({exc}); "
            "give a PEM certificate and its unencrypted PEM key"
        ) from exc


def _listen(found: ReceiverSettings) -> socket.socket:
    try:
        return listening(found.host, found.port)
    except OSError as exc:
        raise StartRefused(
            f"cannot listen on {found.host} port {found.port}: {exc.strerror or exc}; stop what holds it "
            "(ss -lntp) or change HOOK_RECEIVER_PORT or HOOK_RECEIVER_HOST"
        ) from exc


@contextmanager
def _only_daemon(found: ReceiverSettings) -> Iterator[None]:
    """One daemon per state folder: two would write the same package."""
    path = found.state_dir / "receiver.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _lock_now(descriptor, found)
        yield
    finally:
        os.close(descriptor)


def _lock_now(descriptor: int, found: ReceiverSettings) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        raise StartRefused(
            f"another receiver uses {found.state_dir}; stop it or change HOOK_RECEIVER_STATE_DIR"
        ) from exc


def _parser() -> argparse.ArgumentParser:
    lines = [
        f"  {name}\n      {meaning}" + (f" (default: {default})" if default else "")
        for name, (default, meaning) in settings.VARIABLES.items()
    ]
    parser = argparse.ArgumentParser(
        prog="python -m receiver",
        description="The hook receiver: takes signed deployments for this host.",
        epilog="environment variables:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="check the settings and exit")
    return parser


def _refuse(exc: Exception, code: int) -> int:
    sys.stderr.write(" ".join(f"receiver: {exc}".split()) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
