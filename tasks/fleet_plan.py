"""What a fleet deployment is asked for, and the order in which hosts get it. Pure: imports no Prefect."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from receiver.contract import ContainerName, ImageTag, WireModel
from tasks.errors import ParametersRefused
from tasks.parameters import DeploymentParameters, RemoteHostName

_NAME: TypeAdapter[str] = TypeAdapter(ContainerName)
_TAG: TypeAdapter[str] = TypeAdapter(ImageTag)
_PERCENT = re.compile(r"(100|[1-9][0-9]?)%")


class OnUnreachable(StrEnum):
    """What a host that does not answer means for the fleet."""

    FAIL = "fail"
    SKIP = "skip"


class OnStop(StrEnum):
    """What becomes of the hosts that were updated before the fleet stopped."""

    KEEP = "keep"
    ROLL_BACK_ALL = "roll_back_all"


def _check_service(text: str) -> str:
    name, colon, tag = text.partition(":")
    try:
        _NAME.validate_python(name)
        if colon:
            _TAG.validate_python(tag)
    except ValidationError as exc:
        raise ValueError(f"{text!r}: {exc.errors()[0]['msg'].removeprefix('Value error, ')}") from exc
    return text


def _check_batch_size(given: int | str) -> int | str:
    if isinstance(given, bool) or (isinstance(given, int) and given < 1):
        raise ValueError(f"batch_size {given!r}: give a number of hosts from 1, or a share such as '25%'")
    if isinstance(given, str) and given.isdecimal() and int(given) > 0:
        return int(given)
    if isinstance(given, str) and not _PERCENT.fullmatch(given):
        raise ValueError(f"batch_size {given!r}: give a number of hosts, or a share from '1%' to '100%'")
    return given


def _each_once(given: list[str]) -> list[str]:
    names = [text.partition(":")[0] if text.count(":") == 1 else text for text in given]  # IPv6 has more
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name!r} is named twice; take one away")
    return given


ServiceName = Annotated[str, AfterValidator(_check_service)]
Services = Annotated[list[ServiceName], AfterValidator(_each_once)]
Hosts = Annotated[list[RemoteHostName], AfterValidator(_each_once)]
Canary = bool | RemoteHostName
BatchSize = Annotated[int | str, AfterValidator(_check_batch_size)]
PauseSeconds = Annotated[int, Field(ge=0, le=86_400)]
MaxFailures = Annotated[int, Field(ge=0, le=10_000)]


class FleetParameters(WireModel):
    """Every parameter of `deploy-fleet` but `resume`, with the defaults."""

    services: Services = []
    hosts: Hosts = []
    image_tag: ImageTag | None = None
    canary: Canary = True
    batch_size: BatchSize = "25%"
    pause_seconds: PauseSeconds = 0
    max_failures: MaxFailures = 0
    on_unreachable: OnUnreachable = OnUnreachable.FAIL
    on_stop: OnStop = OnStop.KEEP


@dataclass(frozen=True)
class Unit:
    """One service on one host: what a single deployment does."""

    service: str
    host: str
    parameters: DeploymentParameters

    @property
    def key(self) -> tuple[str, str]:
        """Container and host: what the records know it by."""
        return self.parameters.container_name, self.host

    @property
    def image(self) -> str:
        """`web:v2`."""
        return f"{self.parameters.container_name}:{self.parameters.image_tag}"


def hosts_of(units: Sequence[Unit]) -> list[str]:
    """Each host once, in the order in which they are named."""
    return list(dict.fromkeys(unit.host for unit in units))


def hosts_at_once(batch_size: int | str, hosts: int) -> int:
    """How many hosts a batch has; of a share, rounded up."""
    if isinstance(batch_size, int):
        return batch_size
    return max(1, math.ceil(hosts * int(batch_size.removesuffix("%")) / 100))


def choose_canary(canary: bool | str, hosts: Sequence[str], missing: Collection[str] = ()) -> str | None:
    """The host that goes first, none where only one is left; raises `ParametersRefused`.

    `missing` do not answer: the first host that does is taken, unless one was named.
    """
    left = [host for host in hosts if host not in missing]
    if isinstance(canary, str):
        if canary not in hosts:
            raise ParametersRefused(
                "canary", f"{canary!r} is none of the hosts {', '.join(hosts)}", "name one of them, or add it"
            )
        if canary in missing:
            raise ParametersRefused(
                "canary", f"{canary!r} does not answer", "mend it, or name another host (or true)"
            )
        return canary
    return left[0] if canary and len(left) > 1 else None


def batches(hosts: Sequence[str], canary: str | None, batch_size: int | str) -> list[list[str]]:
    """The canary alone, then all others in their order."""
    others = [host for host in hosts if host != canary]
    size = hosts_at_once(batch_size, len(hosts))
    first = [[canary]] if canary is not None else []
    return first + [others[at : at + size] for at in range(0, len(others), size)]


def check_one_container_each(units: Sequence[Unit]) -> None:
    """Raise `ParametersRefused` when two services would be the same container on a host."""
    owners: dict[tuple[str, str], str] = {}
    for unit in units:
        other = owners.setdefault(unit.key, unit.service)
        if other != unit.service:
            raise ParametersRefused(
                "services",
                f"{other!r} and {unit.service!r} are both container {unit.key[0]!r} on {unit.host}",
                "take one of them away",
            )
