"""Which deployments a fleet consists of: service files, as they are registered with Prefect, times hosts.

Everything is checked here, before the first deployment begins. Hosts have to be saved as blocks.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.client.schemas.sorting import DeploymentSort
from prefect.utilities.slugify import slugify
from pydantic import ValidationError

from tasks.errors import ParametersRefused
from tasks.fleet_plan import FleetParameters, Unit, check_one_container_each
from tasks.parameters import DeploymentParameters, check_paths

_PAGE = 200


@dataclass(frozen=True)
class Registered:
    """A Prefect deployment of `deploy-container` that knows its container and host: a service's."""

    name: str
    parameters: Mapping[str, Any]
    working_dir: str = "."

    @property
    def host(self) -> str:
        """Where the service file says."""
        return str(self.parameters["remote_host"])


async def registered_services() -> list[Registered]:
    """All that Prefect knows, by name."""
    found: list[Registered] = []
    wanted = FlowFilter(name=FlowFilterName(any_=["deploy-container"]))
    async with get_client() as client:
        while page := await client.read_deployments(
            flow_filter=wanted, sort=DeploymentSort.NAME_ASC, limit=_PAGE, offset=len(found)
        ):
            found += [
                Registered(
                    each.name, each.parameters, str((each.job_variables or {}).get("working_dir", "."))
                )
                for each in page
            ]
            if len(page) < _PAGE:
                break
    known = {"container_name", "remote_host"}
    return sorted((each for each in found if known <= set(each.parameters)), key=lambda each: each.name)


def units_of(asked: FleetParameters, known: Sequence[Registered], saved: Collection[str]) -> list[Unit]:
    """Every service on every host; raises `ParametersRefused` for the first thing that does not fit."""
    if not asked.services:
        raise ParametersRefused("services", "none was given", "name one or more, or give resume")
    _check_hosts("hosts", asked.hosts, saved)
    units = [unit for text in asked.services for unit in _units(text, asked, known)]
    for unit in units:
        _check_hosts(f"services: {unit.service}", [unit.host], saved)
    check_one_container_each(units)
    return units


def _units(text: str, asked: FleetParameters, known: Sequence[Registered]) -> list[Unit]:
    name, _, tag = text.partition(":")
    own = _own(name, known)
    by_host = {each.host: each for each in own}
    hosts = asked.hosts or list(by_host)
    tags = {"image_tag": tag or asked.image_tag} if tag or asked.image_tag else {}
    return [_unit(name, host, by_host.get(host, own[0]), tags) for host in hosts]


def _own(name: str, known: Sequence[Registered]) -> list[Registered]:
    """The Prefect deployments of a service: `<service>`, or `<service>-<host>` for each host of its file."""
    exact = [each for each in known if each.name == name]
    own = exact or [each for each in known if each.name == f"{name}-{each.host}"]
    if own:
        return own
    names = {each.name.removesuffix(f"-{each.host}") for each in known}
    alike = difflib.get_close_matches(name, sorted(names), n=3) or sorted(names)
    raise ParametersRefused(
        "services",
        f"Prefect knows no service {name!r}",
        f"use one of {', '.join(alike) or '(none is registered)'}, or write deployments/services/{name}.yaml "
        "and register it: prefect deploy --all",
    )


def _unit(name: str, host: str, service: Registered, tags: Mapping[str, str | None]) -> Unit:
    told = {**service.parameters, **tags, "remote_host": host}
    try:
        parameters = DeploymentParameters.model_validate(told)
        build = parameters.build_options
        context = Path(service.working_dir) / Path(build.build_context).expanduser()
        build = build.model_copy(update={"build_context": str(context)})
        check_paths(build)
    except ValidationError as exc:
        error = exc.errors(include_url=False)[0]
        place = ".".join(str(part) for part in error["loc"])
        fix = "correct its service file and register it again"
        raise ParametersRefused(f"services: {name}: {place}", error["msg"], fix) from exc
    except ParametersRefused as exc:
        problem = str(exc).removeprefix(f"{exc.field}: ").removesuffix(f"; {exc.fix}")
        raise ParametersRefused(f"services: {name}: {exc.field}", problem, exc.fix) from exc
    return Unit(name, host, parameters.model_copy(update={"build_options": build}))


def _check_hosts(field: str, hosts: Sequence[str], saved: Collection[str]) -> None:
    known = {slugify(name) for name in saved}
    for host in hosts:
        if slugify(host) not in known:
            raise ParametersRefused(
                field,
                f"no block remote-host/{host} is saved",
                f"use one of {', '.join(sorted(saved)) or '(none is saved)'}, or register it: "
                f"python -m deployments.register --host {host} --address ADDRESS",
            )
