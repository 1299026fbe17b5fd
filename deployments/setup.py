"""Bring the Prefect server at PREFECT_API_URL to what Gantry needs; run it again whenever something changed.

    python -m deployments.setup --plan
    python -m deployments.setup --host host-b=10.0.0.7 --notify slack-webhook/ops

Block types, blocks from the environment, work pools, the concurrency limit, all Prefect deployments, and
automations. --plan says what would change. What is as it should be is left alone.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL
from pydantic import ValidationError

from blocks.hmac_secret import HmacKeyMissing
from deployments import setup_automations, setup_blocks, setup_flows, setup_pools
from deployments.service_folder import FOLDER, ServicesRefused
from deployments.service_registry import service_items
from deployments.setup_hosts import HOSTS_VARIABLE, HostAddress, host_address, host_name, told_hosts
from deployments.setup_items import Item, SetupRefused, settle

_ENVIRONMENT = f"""environment:
  PREFECT_API_URL             the server
  HMAC_SECRET_KEY             key of the hosts that are named: blocks hmac-secret/<host>
  {HOSTS_VARIABLE}                hosts as --host takes them, divided by commas
  KAFKA_BOOTSTRAP_SERVERS     block event-broker/default
  DATABASE_URL                block records-database/default
  MAX_CONCURRENT_DEPLOYMENTS  the concurrency limit (5)
  {setup_automations.BLOCK_VARIABLE}   as --notify
"""


def parser() -> argparse.ArgumentParser:
    """Arguments of `python -m deployments.setup`."""
    parser = argparse.ArgumentParser(
        prog="python -m deployments.setup",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_ENVIRONMENT,
    )
    parser.add_argument("--plan", action="store_true", help="say what would change, and change nothing")
    parser.add_argument(
        "--host",
        action="append",
        default=[],
        type=host_address,
        metavar="NAME=ADDRESS[:PORT]",
        help="a host to deploy to; https:// before the address when its receiver speaks TLS",
    )
    parser.add_argument(
        "--worker-python",
        metavar="PATH",
        help="what the workers of the named hosts run with: their runs start a second sooner",
    )
    parser.add_argument(
        "--notify",
        metavar="TYPE/NAME",
        default=os.environ.get(setup_automations.BLOCK_VARIABLE, "").strip() or None,
        help="saved notification block that the automations use, such as slack-webhook/ops",
    )
    parser.add_argument(
        "--docker-pool", metavar="NAME", type=host_name, help="also a work pool of type docker"
    )
    parser.add_argument(
        "--working-dir", type=Path, default=Path.cwd(), help="folder that relative build contexts start from"
    )
    return parser


async def wanted_items(options: argparse.Namespace) -> list[Item]:
    """Everything that set-up sees to, in the order in which it is made; changes nothing."""
    told = [
        replace(host, worker_python=options.worker_python) for host in told_hosts(options.host, os.environ)
    ]
    return [
        *await setup_blocks.block_types(),
        *await setup_blocks.environment_blocks(),
        *await control_items(options.working_dir, options.docker_pool),
        *await hosts_items(told),
        *await setup_automations.automations(options.notify),
    ]


async def control_items(working_dir: Path | None, docker_pool: str | None = None) -> list[Item]:
    """The control side: work pools, limit, the Prefect deployments of `prefect.yaml` and of the services."""
    file = setup_flows.project_file()
    return [
        await setup_pools.process_pool(setup_pools.CONTROL_POOL),
        *([await setup_pools.docker_pool(docker_pool)] if docker_pool else []),
        await setup_pools.deployment_limit(setup_pools.max_concurrent_deployments()),
        *await _flow_items(setup_flows.control_deployments(file, working_dir)),
        *(await service_items(FOLDER, working_dir or Path.cwd()) if FOLDER.is_dir() else []),
    ]


async def hosts_items(told: Sequence[HostAddress]) -> list[Item]:
    """Blocks of the hosts that are told of; work pool and Prefect deployments of these and of saved ones."""
    blocks = [item for host in told for item in await setup_blocks.host_blocks(host)]
    hosts = await setup_blocks.known_hosts(told)
    pools = [await setup_pools.process_pool(host.work_pool_name) for host in hosts]
    wanted = [each for host in hosts for each in setup_flows.host_deployments(host)]
    return [*blocks, *pools, *await _flow_items(wanted)]


async def _flow_items(wanted: Iterable[setup_flows.FlowDeployment]) -> list[Item]:
    return [await setup_flows.flow_deployment(each) for each in wanted]


async def check_server() -> None:
    """Raise `SetupRefused` unless the Prefect server answers."""
    url = PREFECT_API_URL.value()
    start = "start one with 'prefect server start', which then answers at http://127.0.0.1:4200/api"
    if not url:
        raise SetupRefused(f"PREFECT_API_URL is not set: name the Prefect server, or {start}")
    async with get_client() as client:
        problem = await client.api_healthcheck()
    if problem is not None:
        raise SetupRefused(
            f"no Prefect server answers at {url} ({problem}): correct PREFECT_API_URL, or {start}"
        )


def explain(exc: Exception) -> str:
    """One line for the terminal; pydantic's errors without their input, which may be secret."""
    if isinstance(exc, ValidationError):
        return "; ".join(str(error["msg"]) for error in exc.errors(include_input=False))
    return str(exc)


async def main(arguments: Sequence[str]) -> int:
    """Set up, or plan; returns the exit code. Nothing is changed before everything was looked at."""
    options = parser().parse_args(arguments)
    try:
        await check_server()
        await settle(await wanted_items(options), print, plan=options.plan)
    except (
        SetupRefused,
        ServicesRefused,
        HmacKeyMissing,
        ValidationError,
        argparse.ArgumentTypeError,
    ) as exc:
        print(f"error: {explain(exc)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    sys.exit(asyncio.run(main(sys.argv[1:])))
