"""What a service file says: `deployments/services/<name>.yaml`, one for each service that is deployed.

    python -m deployments.service_files check       name file, line and field of every mistake
    python -m deployments.service_files schema      write the JSON schema that editors complete by
    python -m deployments.service_files register    what `prefect deploy --all` does with the folder

The words are those of `deploy-container`'s parameters. Imports Prefect only where a schedule is built.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, ValidationError, model_validator

from receiver.contract import (
    DEFAULT_PORT,
    ContainerName,
    DeploymentConfig,
    HealthCheckConfig,
    ImageTag,
    Port,
    WireModel,
)
from tasks.parameters import BuildOptions, RemoteHostName, StageTimeoutMs, WaitSeconds

if TYPE_CHECKING:
    from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule

# Keys of a service file and the parameters of `deploy-container` that they give.
PARAMETERS: Mapping[str, str] = {
    "container": "container_name",
    "host": "remote_host",
    "remote_port": "remote_port",
    "configuration": "deployment_config",
    "image": "build_options",
    "health_check": "health_check_config",
    "rollback_on_failure": "rollback_on_failure",
    "timeout_ms": "deployment_timeout_ms",
    "wait_seconds": "wait_seconds",
}
_EXAMPLES: dict[str | int, str] = {"cron": "0 4 * * 1-5", "timezone": "Europe/Berlin"}
# Intervals count from here and not from the registration, which would put off the next run each time.
_INTERVALS_FROM = datetime(2020, 1, 1, tzinfo=UTC)


def _each_once(names: list[str]) -> list[str]:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name!r} is named twice; take one away")
    return names


class ServiceImage(BuildOptions):
    """How the image is built, and its tag; relative contexts start where `prefect deploy` runs."""

    tag: ImageTag = Field(default="latest", description="Default of the parameter image_tag.")


class ServiceSchedule(WireModel):
    """When the service is deployed by itself; give `cron` or `interval_seconds`."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": ["cron"]}, {"required": ["interval_seconds"]}]}
    )

    cron: str | None = Field(default=None, description="Five fields, such as '0 4 * * 1-5'.")
    interval_seconds: Annotated[int, Field(ge=60)] | None = None
    timezone: str = Field(default="UTC", description="An IANA name, such as 'Europe/Berlin'.")
    active: bool = True

    @model_validator(mode="after")
    def _says_when(self) -> Self:
        if (self.cron is None) == (self.interval_seconds is None):
            raise ValueError("give cron or interval_seconds, one of the two")
        try:
            self.for_prefect()
        except ValidationError as exc:
            field = exc.errors()[0]["loc"][0]
            raise ValueError(f"{field}: Prefect cannot read it; write it as in {_EXAMPLES[field]!r}") from exc
        return self

    def for_prefect(self) -> CronSchedule | IntervalSchedule:
        """The schedule as Prefect takes it."""
        from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule

        if self.cron is not None:
            return CronSchedule(cron=self.cron, timezone=self.timezone)
        interval = timedelta(seconds=self.interval_seconds or 0)
        return IntervalSchedule(interval=interval, anchor_date=_INTERVALS_FROM, timezone=self.timezone)


class ServiceConcurrency(WireModel):
    """How many runs of the service's Prefect deployment are at work at the same time."""

    limit: Annotated[int, Field(ge=1)] = 1
    collision_strategy: Literal["ENQUEUE", "CANCEL_NEW"] = "ENQUEUE"


class ServiceFile(WireModel):
    """A service of Gantry: what is deployed where, and when."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": ["host"]}, {"required": ["hosts"]}]},
    )

    description: str | None = Field(default=None, description="Shown in the Prefect UI.")
    container: ContainerName | None = Field(
        default=None, description="Name of the container and of its image; default: the file's name."
    )
    image: ServiceImage = ServiceImage()
    host: RemoteHostName | None = Field(
        default=None, description="A saved RemoteHost block, a host name or an address."
    )
    hosts: Annotated[list[RemoteHostName], Field(min_length=1), AfterValidator(_each_once)] | None = Field(
        default=None, description="Several hosts: a Prefect deployment '<service>-<host>' for each."
    )
    remote_port: Port = Field(
        default=DEFAULT_PORT, description="Port of the receiver on a host without a RemoteHost block."
    )
    configuration: DeploymentConfig = DeploymentConfig()
    health_check: HealthCheckConfig = HealthCheckConfig()
    rollback_on_failure: bool = Field(default=True, description="false leaves the failed container as it is.")
    timeout_ms: StageTimeoutMs | None = Field(
        default=None, description="Time for each stage; default: DEPLOYMENT_TIMEOUT_MS of the control host."
    )
    wait_seconds: WaitSeconds = 0
    schedule: ServiceSchedule | None = None
    concurrency: ServiceConcurrency | None = None
    tags: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[], description="Tags of the Prefect deployment and its runs."
    )

    @model_validator(mode="after")
    def _has_one_kind_of_host(self) -> Self:
        if self.host is not None and self.hosts is not None:
            raise ValueError("hosts: host is given too; keep one of the two")
        if self.host is None and self.hosts is None:
            raise ValueError("host: nothing says where to deploy; add host, such as 'host: host-b', or hosts")
        return self

    def targets(self, service: str) -> dict[str, str]:
        """Name of each Prefect deployment of this service, and its host."""
        hosts = self.hosts or [self.host or ""]
        return {service if len(hosts) == 1 else f"{service}-{host}": host for host in hosts}

    def parameters(self, service: str, host: str) -> dict[str, Any]:
        """Parameters of `deploy-container` for one host: those alone that the file gives."""
        said = self.model_dump(mode="json", exclude_unset=True) | {"host": host}
        said["container"] = self.container or service
        tag = said.get("image", {}).pop("tag", None)
        given = {parameter: said[key] for key, parameter in PARAMETERS.items() if key in said}
        return given | ({} if tag is None else {"image_tag": tag})


if __name__ == "__main__":
    from deployments.service_command import main

    sys.exit(main(sys.argv[1:]))
