"""`python -m deployments.api`: serve the HTTP API of the control host, and keep its tokens.

    python -m deployments.api token create ci
    python -m deployments.api serve --host 127.0.0.1 --port 8060

Owns the command line, the port and the process; `deployments.api_app` owns the application.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from types import FrameType

import uvicorn
from prefect.settings import get_current_settings

from deployments.api_app import create_app
from deployments.api_services import Services
from deployments.api_tokens import TokenStore
from receiver import logs
from receiver.binding import listening
from tasks.errors import GantryError

log = logging.getLogger(__name__)
DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8060
EXIT_SETTINGS = 2
EXIT_BUSY = 3
SHUTDOWN_SECONDS = 10
VARIABLES = {
    "PREFECT_API_URL": "the Prefect server; required",
    "DATABASE_URL": "the records, unless the block records-database/default is saved",
    "GANTRY_HOME": "folder of records and tokens (default: ~/.gantry)",
    "GANTRY_API_TOKENS_FILE": "the tokens (default: api_tokens.json in GANTRY_HOME)",
    "GANTRY_METRICS_OPEN": "1 serves /metrics without a token",
    "DOCKER_HOST": "the engine that builds, as far as /health is concerned",
    "KAFKA_BOOTSTRAP_SERVERS": "the brokers, as far as /health is concerned",
    "LOG_FORMAT": "text or json (default: text)",
    "LOG_LEVEL": "DEBUG, INFO, WARNING or ERROR (default: INFO)",
}


class StartRefused(GantryError):
    """The API cannot start so"""


class PortBusy(StartRefused):
    """The API cannot listen there"""

    next_step = "Stop what holds the port (ss -lntp), or choose another: --port."


class _Server(uvicorn.Server):
    """Tells the services at once that it stops: who waits for a deployment is answered then."""

    def __init__(self, config: uvicorn.Config, services: Services) -> None:
        super().__init__(config)
        self._services = services

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On SIGTERM and SIGINT."""
        self._services.stopping.set()
        super().handle_exit(sig, frame)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (2: a setting, 3: the port is in use)."""
    options = parser().parse_args(arguments)
    try:
        if options.command == "serve":
            _serve(options)
        else:
            _keep_tokens(options)
    except GantryError as exc:
        sys.stderr.write(f"gantry api: {exc}; {exc.next_step}\n")
        return EXIT_BUSY if isinstance(exc, PortBusy) else EXIT_SETTINGS
    return 0


def _serve(options: argparse.Namespace) -> None:
    level, tokens = _log_level(), _tokens(options)
    if not get_current_settings().api.url:
        # Prefect would start a server of its own for each client, and deploy nothing.
        raise StartRefused("PREFECT_API_URL is not set", next_step="Set it to the Prefect server's /api.")
    services = Services()
    app = create_app(services, tokens, metrics_are_open=os.environ.get("GANTRY_METRICS_OPEN") == "1")
    config = uvicorn.Config(
        app,
        access_log=False,
        log_config=None,
        proxy_headers=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        ssl_certfile=options.tls_cert_file,
        ssl_keyfile=options.tls_key_file,
    )
    with closing(_listen(options.host, options.port)) as listening:
        _load(config)
        logs.configure(os.environ.get("LOG_FORMAT", "text"), level)
        if tokens and not _is_loopback(options.host) and not options.tls_cert_file:
            log.warning("tokens travel in the clear: give --tls-cert-file, or put a proxy with TLS before it")
        log.info("the API listens on %s port %s", options.host, listening.getsockname()[1])
        _Server(config, services).run(sockets=[listening])


def _tokens(options: argparse.Namespace) -> TokenStore | None:
    """The tokens to ask for; None only where nobody else can call. Raises `StartRefused`."""
    if options.insecure_no_token:
        if not _is_loopback(options.host):
            raise StartRefused(
                f"--insecure-no-token would let everybody who reaches {options.host} deploy",
                next_step="Make a token, or listen on 127.0.0.1.",
            )
        return None
    tokens = TokenStore.from_environment()
    if not tokens.list():
        raise StartRefused(
            f"There is no token in {tokens.path}",
            next_step="Make one: python -m deployments.api token create NAME.",
        )
    if not _is_loopback(options.host) and not options.tls_cert_file:
        log.warning(
            "tokens travel in the clear: give --tls-cert-file, or put a proxy with TLS before the API"
        )
    return tokens


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _load(config: uvicorn.Config) -> None:
    try:
        config.load()
    except OSError as exc:  # ssl.SSLError is one
        raise StartRefused(
            f"The TLS files cannot be used: {exc}",
            next_step="Give a PEM certificate and its unencrypted PEM key.",
        ) from exc


def _listen(host: str, port: int) -> socket.socket:
    try:
        return listening(host, port)
    except (OSError, OverflowError) as exc:
        cause = getattr(exc, "strerror", None) or exc
        raise PortBusy(f"The API cannot listen on {host} port {port}: {cause}") from exc


def _log_level() -> str:
    level = os.environ.get("LOG_LEVEL", "INFO").upper()
    if level not in {"DEBUG", "INFO", "WARNING", "ERROR"}:
        raise StartRefused(f"LOG_LEVEL {level!r} is none", next_step="Use DEBUG, INFO, WARNING or ERROR.")
    return level


def _keep_tokens(options: argparse.Namespace) -> None:
    tokens = TokenStore.from_environment()
    if options.action == "create":
        token = tokens.create(options.name, datetime.now(UTC))
        sys.stderr.write(f"token {options.name} is in {tokens.path} as a hash; its text is told this once:\n")
        sys.stdout.write(f"{token}\n")
    elif options.action == "revoke":
        tokens.revoke(options.name)
        sys.stderr.write(f"token {options.name} is revoked\n")
    else:
        for found in tokens.list():
            sys.stdout.write(f"{found.name}\t{found.created_at.isoformat(timespec='seconds')}\n")


def parser() -> argparse.ArgumentParser:
    """Arguments of `python -m deployments.api`."""
    told = "\n".join(f"  {name}\n      {meaning}" for name, meaning in VARIABLES.items())
    parser = argparse.ArgumentParser(
        prog="python -m deployments.api",
        description=__doc__,
        epilog=f"environment variables:\n{told}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="serve the API")
    serve.add_argument("--host", default=DEFAULT_HOST, help=f"address to listen on ({DEFAULT_HOST})")
    serve.add_argument("--port", type=int, default=DEFAULT_PORT, help=f"port to listen on ({DEFAULT_PORT})")
    serve.add_argument("--tls-cert-file", type=Path, help="certificate chain (PEM)")
    serve.add_argument("--tls-key-file", type=Path, help="private key (PEM) of the certificate")
    serve.add_argument(
        "--insecure-no-token", action="store_true", help="let every caller in; on a loopback address only"
    )
    token = commands.add_parser("token", help="make, list and revoke tokens")
    actions = token.add_subparsers(dest="action", required=True)
    for action, meaning in (("create", "make a token and tell it once"), ("revoke", "end a token")):
        actions.add_parser(action, help=meaning).add_argument("name", metavar="NAME")
    actions.add_parser("list", help="names and when they were made")
    return parser


if __name__ == "__main__":
    sys.exit(main())
