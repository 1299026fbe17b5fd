"""The Prefect deployments: those of `prefect.yaml`, which is their one home, and those of each host.

`prefect deploy --all` registers the first ones too; both make the same of the file.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.objects import ConcurrencyLimitConfig
from prefect.client.schemas.responses import DeploymentResponse
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import ObjectNotFound
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.types.entrypoint import EntrypointType
from prefect.utilities.callables import parameter_schema
from pydantic import ValidationError
from pydantic_core import to_jsonable_python

from blocks.remote_host import RemoteHost
from deployments.setup_items import Item, SetupRefused, item
from tasks.registration import host_variables, run_command

HOST_ENTRYPOINTS = ("flows.receive.receive_container", "flows.restore.restore_container")
_HERE = Path(__file__).resolve()
_KNOWN = {
    *("name", "entrypoint", "description", "tags", "parameters", "work_pool"),
    *("schedules", "concurrency_limit", "build"),
}


@dataclass(frozen=True)
class FlowDeployment:
    """A Prefect deployment as it should be; `settings` are arguments of Prefect's `ato_deployment`."""

    entrypoint: str
    name: str
    pool: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def this_python() -> dict[str, str]:
    """A build step of `prefect.yaml`: the command that starts a run with the interpreter that deploys."""
    return {"command": run_command(sys.executable, "flows.deploy")}


def project_file() -> Path:
    """`prefect.yaml`: of the checkout, or as it was installed."""
    places = (_HERE.parents[1] / "prefect.yaml", _HERE.with_name("prefect.yaml"))
    for place in places:
        if place.exists():
            return place
    raise SetupRefused(f"{places[0]} is missing: run set-up in a checkout of Gantry, or install it anew")


def control_deployments(file: Path, working_dir: Path | None) -> list[FlowDeployment]:
    """What `prefect.yaml` lists, with `working_dir` for `{{ $PWD }}`; raises `SetupRefused`."""
    entries = yaml.safe_load(file.read_text()).get("deployments") or []
    return [
        _control_deployment(entry, f"{file.name}: deployment {n}", working_dir)
        for n, entry in enumerate(entries, 1)
    ]


def host_deployments(host: RemoteHost) -> list[FlowDeployment]:
    """What the host's own worker runs."""
    settings = {"job_variables": host_variables(host)}
    return [
        FlowDeployment(each, host.deployment_name, host.work_pool_name, settings) for each in HOST_ENTRYPOINTS
    ]


async def flow_deployment(wanted: FlowDeployment) -> Item:
    """The Prefect deployment `<flow>/<name>`, by module path."""
    flow: Flow[..., Any] = load_flow_from_entrypoint(wanted.entrypoint, use_placeholder_flow=False)
    runner = await flow.ato_deployment(
        name=wanted.name, entrypoint_type=EntrypointType.MODULE_PATH, **wanted.settings
    )
    name = f"{flow.name}/{wanted.name}"
    async with get_client() as client:
        try:
            found = await client.read_deployment_by_name(name)
        except ObjectNotFound:
            found = None
    differs = _differences(flow, runner, wanted.pool, found) if found is not None else []

    async def apply() -> None:
        await runner.aapply(work_pool_name=wanted.pool)

    return item("Prefect deployment", name, exists=found is not None, differs=differs, apply=apply)


def _control_deployment(entry: Mapping[str, Any], where: str, working_dir: Path | None) -> FlowDeployment:
    if unknown := sorted(set(entry) - _KNOWN):
        raise SetupRefused(f"{where}: set-up does not know {', '.join(unknown)}")
    told = _filled_in(entry, str(working_dir or Path.cwd()))
    pool = told["work_pool"]
    settings = {
        "description": told.get("description"),
        "tags": told.get("tags"),
        "parameters": told.get("parameters"),
        "job_variables": pool.get("job_variables") if working_dir else None,
    }
    try:
        settings["schedules"] = [_schedule(each) for each in told.get("schedules") or []]
        settings["concurrency_limit"] = _limit(told.get("concurrency_limit"))
    except ValidationError as exc:
        raise SetupRefused(f"{where}: {exc}") from exc
    return FlowDeployment(told["entrypoint"], told["name"], pool["name"], settings)


def _schedule(told: Mapping[str, Any]) -> DeploymentScheduleCreate:
    about = {"active", "parameters", "slug", "max_scheduled_runs"} & set(told)
    when = {name: value for name, value in told.items() if name not in about}
    return DeploymentScheduleCreate.model_validate({"schedule": when, **{name: told[name] for name in about}})


def _limit(told: int | Mapping[str, Any] | None) -> int | ConcurrencyLimitConfig | None:
    return ConcurrencyLimitConfig.model_validate(told) if isinstance(told, Mapping) else told


def _filled_in(value: Any, working_dir: str) -> Any:
    """`value` as `prefect deploy` fills it in: the folder, and what the build step `this_python` gives."""
    if isinstance(value, str):
        value = re.sub(r"\{\{\s*\$PWD\s*\}\}", lambda _: working_dir, value)
        return re.sub(r"\{\{\s*this\.command\s*\}\}", lambda _: this_python()["command"], value)
    if isinstance(value, Mapping):
        return {name: _filled_in(inner, working_dir) for name, inner in value.items()}
    if isinstance(value, list):
        return [_filled_in(inner, working_dir) for inner in value]
    return value


def _differences(
    flow: Flow[..., Any], wanted: RunnerDeployment, pool: str, found: DeploymentResponse
) -> list[str]:
    """What a run of the found deployment would notice; not its version, which each commit changes."""
    limit = found.global_concurrency_limit
    strategy = found.concurrency_options.collision_strategy if found.concurrency_options else None
    wanted_strategy = wanted.concurrency_options.collision_strategy if wanted.concurrency_options else None
    schema = parameter_schema(flow).model_dump(exclude_unset=True)
    pairs: dict[str, tuple[Any, Any]] = {
        "entrypoint": (wanted.entrypoint, found.entrypoint),
        "description": (wanted.description, found.description),
        "tags": (sorted(wanted.tags), sorted(found.tags)),
        "parameters": (to_jsonable_python(wanted.parameters), found.parameters),
        "parameter schema": (to_jsonable_python(schema), found.parameter_openapi_schema),
        "work pool": (pool, found.work_pool_name),
        "job variables": (wanted.job_variables, found.job_variables),
        "concurrency limit": (wanted.concurrency_limit, limit.limit if limit else None),
        "collision strategy": (wanted_strategy, strategy),
        "schedules": (_times(wanted.schedules or []), _times(found.schedules)),
    }
    return [name for name, (one, other) in pairs.items() if one != other]


def _times(schedules: list[Any]) -> list[dict[str, Any]]:
    """When schedules start runs; not from when on, nor whether a person has paused one."""
    return [
        each.schedule.model_dump(mode="json", exclude={"anchor_date"}) | {"parameters": each.parameters}
        for each in schedules
    ]
