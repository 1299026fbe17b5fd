"""Make a host, or the control side, known to a Prefect server: block, work pool, Prefect deployments.

    python -m deployments.register --host host-b --address 10.0.0.7
    python -m deployments.register --control

Idempotent; run again it updates. Service definitions are in `prefect.yaml`: `prefect deploy --all`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy, WorkPool
from prefect.events.schemas.deployment_triggers import DeploymentEventTrigger
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound
from prefect.flows import Flow
from prefect.types.entrypoint import EntrypointType
from prefect.utilities.processutils import command_to_string
from pydantic import ValidationError

from blocks.event_broker import EventBroker
from blocks.hmac_secret import HmacKeyMissing, HmacSecret
from blocks.remote_host import RemoteHost
from receiver.contract import DEFAULT_PORT
from tasks.active import SLOTS

CONTROL_POOL = "control"
# As prefect.yaml has it: a run that died is looked after at once, and everything within a minute.
_RECONCILE_WHEN = {
    "interval": 45,
    "concurrency_limit": ConcurrencyLimitConfig(
        limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW
    ),
    "triggers": [
        DeploymentEventTrigger(
            name="gantry-reconcile-after-a-run-died",
            expect={"prefect.flow-run.Crashed", "prefect.flow-run.Cancelled"},
            match_related=ResourceSpecification(
                {
                    "prefect.resource.name": ["deploy-container", "rollback-container"],
                    "prefect.resource.role": "flow",
                }
            ),
        )
    ],
}


class SettingRefused(Exception):
    """A setting of the control host is wrong"""


async def ensure_work_pool(name: str) -> WorkPool:
    """The work pool of type process, made when it is not there."""
    async with get_client() as client:
        try:
            return await client.read_work_pool(name)
        except ObjectNotFound:
            return await client.create_work_pool(WorkPoolCreate(name=name, type="process"))


def this_python() -> dict[str, str]:
    """A build step of `prefect.yaml`: the command that starts a run with the interpreter that deploys."""
    return {"command": run_command(sys.executable)}


def run_command(python: str) -> str:
    """What a worker starts a flow run with; a worker that is not told starts another process first."""
    return command_to_string([python, "-m", "prefect.engine"])


async def register_flow(
    flow: Flow[Any, Any],
    name: str,
    pool: str,
    *,
    working_dir: Path | None = None,
    python: str | None = None,
    **when: Any,
) -> None:
    """Make or update the Prefect deployment `<flow>/<name>`, by module path; `when` says what starts it.

    `python` is the interpreter of the worker's environment on the worker's machine, where it is known.
    """
    variables = {"working_dir": str(working_dir)} if working_dir else {}
    if python:
        variables["command"] = run_command(python)
    deployment = await flow.ato_deployment(
        name=name, entrypoint_type=EntrypointType.MODULE_PATH, job_variables=variables, **when
    )
    await deployment.aapply(work_pool_name=pool)
    print(f"deployment {flow.name}/{name} in pool {pool}")


async def register_control(working_dir: Path | None = None) -> None:
    """The control side's work pool and its general Prefect deployments."""
    from flows.deploy import deploy_container
    from flows.doctor import doctor
    from flows.reconcile import reconcile
    from flows.rollback import rollback_container
    from flows.versions import list_versions

    await ensure_work_pool(CONTROL_POOL)
    await limit_deployments(max_concurrent_deployments())
    where: dict[str, Any] = {"working_dir": working_dir, "python": sys.executable}
    await register_flow(reconcile, "default", CONTROL_POOL, **where, **_RECONCILE_WHEN)
    for flow in (deploy_container, rollback_container, list_versions, doctor):
        await register_flow(flow, "default", CONTROL_POOL, **where)


def max_concurrent_deployments(environ: Mapping[str, str] = os.environ) -> int:
    """`MAX_CONCURRENT_DEPLOYMENTS`, by default 5; raises `SettingRefused`."""
    told = environ.get("MAX_CONCURRENT_DEPLOYMENTS", "").strip() or "5"
    if not re.fullmatch(r"[1-9][0-9]{0,3}", told):
        raise SettingRefused(f"MAX_CONCURRENT_DEPLOYMENTS={told!r}: give a whole number from 1 to 9999")
    return int(told)


async def limit_deployments(limit: int) -> None:
    """The concurrency limit that every deployment takes a slot of."""
    async with get_client() as client:
        await client.upsert_global_concurrency_limit_by_name(SLOTS, limit)
    print(f"concurrency limit {SLOTS}: {limit}")


async def register_broker(servers: str) -> None:
    """Block `event-broker/default`: from now on every deployment publishes its events there."""
    await EventBroker(bootstrap_servers=servers).save("default", overwrite=True)
    print(f"block event-broker/default: {servers}")


async def register_host(name: str, address: str, port: int, *, tls: bool, python: str | None = None) -> None:
    """Block `remote-host/<name>`, the host's work pool, and its two Prefect deployments."""
    from flows.receive import receive_container
    from flows.restore import restore_container

    secret = HmacSecret.from_environment()
    await secret.save(name, overwrite=True)
    saved = await HmacSecret.load(name)
    host = RemoteHost(address=address, port=port, hmac_secret=saved, tls=tls)
    await host.save(name, overwrite=True)
    print(f"block remote-host/{name}: {host.base_url}")
    await ensure_work_pool(host.work_pool_name)
    for flow in (receive_container, restore_container):
        await register_flow(flow, host.deployment_name, host.work_pool_name, python=python)


def host_name(text: str) -> str:
    """A name that Prefect takes for a block, a work pool and a Prefect deployment."""
    if not re.fullmatch(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", text):
        raise argparse.ArgumentTypeError(
            f"{text!r}: use lower-case letters, digits and '-', such as 'host-b'; "
            "the host's real name or address goes into --address"
        )
    return text


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
        "--python", metavar="PATH", help="the host's worker runs with it: its runs start a second earlier"
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
        if options.control:
            await register_control(options.working_dir)
        if options.broker:
            await register_broker(options.broker)
        if options.host:
            await register_host(
                options.host, options.address, options.port, tls=options.tls, python=options.python
            )
    except (HmacKeyMissing, SettingRefused) as exc:
        parser().error(str(exc))
    except ValidationError as exc:
        parser().error("; ".join(str(error["msg"]) for error in exc.errors(include_input=False)))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    sys.exit(asyncio.run(main(sys.argv[1:])))
