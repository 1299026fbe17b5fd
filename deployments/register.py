"""Make one host, the broker or the control side known to a Prefect server: a part of `deployments.setup`.

    python -m deployments.register --host host-b --address 10.0.0.7
    python -m deployments.register --control

Idempotent; run again it updates. `python -m deployments.setup` does all of it at once.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from blocks.hmac_secret import HmacKeyMissing
from deployments import setup, setup_automations, setup_blocks, setup_pools
from deployments.service_folder import ServicesRefused
from deployments.setup_hosts import HostAddress, host_name
from deployments.setup_items import SetupRefused, settle
from receiver.contract import DEFAULT_PORT


async def register_control(working_dir: Path | None = None) -> None:
    """The control side's work pool, limit, Prefect deployments, and the automations that need no block."""
    items = [*await setup.control_items(working_dir), *await setup_automations.automations(None)]
    await settle(items, print, plan=False)


async def limit_deployments(limit: int) -> None:
    """The concurrency limit that every deployment takes a slot of."""
    await settle([await setup_pools.deployment_limit(limit)], print, plan=False)


async def register_broker(servers: str) -> None:
    """Block `event-broker/default`: from now on every deployment publishes its events there."""
    await settle([await setup_blocks.broker_block(servers)], print, plan=False)


async def register_host(name: str, address: str, port: int, *, tls: bool, python: str | None = None) -> None:
    """Block `remote-host/<name>`, the host's work pool, and its two Prefect deployments."""
    items = await setup.hosts_items([HostAddress(name, address, port, tls, python)])
    await settle(items, print, plan=False)


def parser() -> argparse.ArgumentParser:
    """Arguments of `python -m deployments.register`."""
    parser = argparse.ArgumentParser(
        prog="python -m deployments.register",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Environment: PREFECT_API_URL (the server), HMAC_SECRET_KEY (the key of the host's receiver), "
        "MAX_CONCURRENT_DEPLOYMENTS (for --control).",
    )
    parser.add_argument("--control", action="store_true", help="register the control side")
    parser.add_argument("--host", metavar="NAME", type=host_name, help="register a host under this name")
    parser.add_argument("--address", help="the host's name or address, as the control side reaches it")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="port of the receiver")
    parser.add_argument("--broker", metavar="SERVERS", help="save the block event-broker/default")
    parser.add_argument("--tls", action="store_true", help="the receiver speaks HTTPS")
    parser.add_argument(
        "--worker-python",
        metavar="PATH",
        help="the host's worker runs with it: its runs start a second sooner",
    )
    parser.add_argument(
        "--working-dir", type=Path, default=Path.cwd(), help="folder that relative build contexts start from"
    )
    return parser


async def main(arguments: Sequence[str]) -> int:
    """Register what the arguments name; returns the exit code."""
    options = parser().parse_args(arguments)
    if not options.control and not options.host and not options.broker:
        parser().error("name what to register: --control, --broker SERVERS, or --host NAME --address ADDRESS")
    if options.host and not options.address:
        parser().error("--host needs --address")
    try:
        await setup.check_server()
        if options.control:
            await register_control(options.working_dir)
        if options.broker:
            await register_broker(options.broker)
        if options.host:
            await register_host(
                options.host, options.address, options.port, tls=options.tls, python=options.worker_python
            )
    except (HmacKeyMissing, SetupRefused, ServicesRefused, ValidationError) as exc:
        parser().error(setup.explain(exc))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    sys.exit(asyncio.run(main(sys.argv[1:])))
