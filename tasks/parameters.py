"""What a deployment is asked for: the parameters of `deploy-container`, checked before anything is done."""

from __future__ import annotations

import ipaddress
import os
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from receiver.contract import (
    DEFAULT_PORT,
    ContainerName,
    DeploymentConfig,
    HealthCheckConfig,
    ImageTag,
    PackageFormat,
    Port,
    Strategy,
    Transport,
    WireModel,
)
from tasks.errors import ParametersRefused

_SLOWEST_LOAD_BYTES_PER_SECOND = 20_000_000
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,252}[A-Za-z0-9])?")
_PLATFORM = re.compile(r"[a-z0-9]+/[a-z0-9_]+(/v[0-9]+)?")


def check_remote_host(name: str) -> str:
    """The name of a RemoteHost block, a host name, or an address; no URL, no port, no CIDR."""
    if not (_is_ip_address(name) if ":" in name else _HOST.fullmatch(name)):
        raise ValueError(
            f"remote_host {name!r}: give the name of a RemoteHost block, a host name or an address, "
            "without 'http://', port or '/24'; the port goes into remote_port"
        )
    return name


def _is_ip_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _check_platform(platform: str) -> str:
    if not _PLATFORM.fullmatch(platform):
        raise ValueError(f"platform {platform!r}: use os/architecture, such as 'linux/amd64'")
    return platform


RemoteHostName = Annotated[str, AfterValidator(check_remote_host)]


def default_timeout_ms() -> int:
    """`DEPLOYMENT_TIMEOUT_MS` of the control host's environment, else three minutes."""
    told = os.environ.get("DEPLOYMENT_TIMEOUT_MS") or "180000"
    if not re.fullmatch(r"[0-9]{4,8}", told):
        raise ParametersRefused(
            "DEPLOYMENT_TIMEOUT_MS", f"{told!r} is no time", "set it in milliseconds, such as 180000"
        )
    return int(told)


StageTimeoutMs = Annotated[int, Field(ge=1000, le=86_400_000)]


WaitSeconds = Annotated[
    int,
    Field(
        ge=0,
        le=86_400,
        description="How long to wait for another deployment of this container to this host to end.",
    ),
]


class Compression(StrEnum):
    """How a package is compressed on its way."""

    ZSTD = "zstd"
    GZIP = "gzip"
    NONE = "none"

    @property
    def package_format(self) -> PackageFormat:
        """What the wire calls it."""
        return _FORMATS[self]


_FORMATS = {
    Compression.ZSTD: PackageFormat.ZSTD,
    Compression.GZIP: PackageFormat.GZIP,
    Compression.NONE: PackageFormat.TAR,
}


class BuildOptions(WireModel):
    """How the image is built; the specification's `build_options` with its defaults.

    `build_context` is a folder on the control host, relative to the worker's working directory;
    `dockerfile_path` is relative to the context.
    """

    dockerfile_path: str = "Dockerfile"
    build_context: str = "."
    build_args: dict[str, str] = {}
    cache_from: list[str] = []
    no_cache: bool = False
    pull: bool = False
    labels: dict[str, str] = {}
    required_labels: list[str] = []
    platform: Annotated[str, AfterValidator(_check_platform)] | None = None
    max_image_size_bytes: Annotated[int, Field(ge=1)] = 2 * 1024**3
    compression: Compression = Field(
        default=Compression.ZSTD, description="How the package is compressed: zstd, gzip or none."
    )
    timeout_ms: Annotated[int, Field(ge=1000)] | None = Field(
        default=None, description="Time for one build attempt; default: the operation's own, 60 s."
    )

    @property
    def context(self) -> Path:
        """The build context as an absolute path."""
        return Path(self.build_context).expanduser().resolve()

    @property
    def dockerfile(self) -> Path:
        """The Dockerfile as an absolute path."""
        return (self.context / self.dockerfile_path).resolve()


class DeploymentParameters(WireModel):
    """Every parameter of `deploy-container`, with the specification's defaults."""

    container_name: ContainerName
    remote_host: RemoteHostName
    image_tag: ImageTag = "latest"
    remote_port: Port = DEFAULT_PORT
    deployment_config: DeploymentConfig = DeploymentConfig()
    build_options: BuildOptions = BuildOptions()
    health_check_config: HealthCheckConfig = HealthCheckConfig()
    rollback_on_failure: bool = True
    deployment_timeout_ms: StageTimeoutMs = Field(default_factory=default_timeout_ms)
    wait_seconds: WaitSeconds = 0
    transport: Transport = Transport.HTTP


def load_seconds(size_bytes: int) -> float:
    """Time that loading a package may take, on top of the operation's own; both sides allow the same."""
    return size_bytes / _SLOWEST_LOAD_BYTES_PER_SECOND


def health_check_seconds(check: HealthCheckConfig) -> float:
    """Time that the health check may take by what it asks for itself, on top of the stage's own."""
    attempts, interval_ms = check.max_retries or 5, check.retry_interval_ms or 2_000
    per_attempt_ms = (check.timeout_ms or 5_000) + min(interval_ms * 1.2**attempts, 30_000)
    return (attempts * per_attempt_ms + check.quiet_period_ms) / 1000


def rolling(config: DeploymentConfig) -> DeploymentConfig:
    """The configuration with strategy `rolling`; raises `ParametersRefused` where that cannot be done."""
    if config.cannot_roll and config.strategy_fallback is None:
        raise ParametersRefused(
            "deployment_config",
            f"a rolling update cannot be: {config.cannot_roll}",
            "correct it, set strategy_fallback: recreate, or use deploy-container",
        )
    return config.model_copy(update={"strategy": Strategy.ROLLING})


def drain_seconds(config: DeploymentConfig) -> float:
    """Time that a rolling update may take, after the health check, for requests in flight on the old one."""
    if config.way is not Strategy.ROLLING:
        return 0.0
    return float(config.drain_timeout_seconds + config.stop_timeout_seconds)


def check_paths(build: BuildOptions) -> None:
    """Raise `ParametersRefused` unless build context and Dockerfile are there and belong together."""
    if not build.context.is_dir():
        raise ParametersRefused(
            "build_options.build_context",
            f"{build.build_context!r} is no folder on the control host (looked in {Path.cwd()})",
            "give the folder that holds the Dockerfile, best as an absolute path",
        )
    if not build.dockerfile.is_relative_to(build.context):
        raise ParametersRefused(
            "build_options.dockerfile_path",
            f"{build.dockerfile_path!r} lies outside the build context",
            "move the Dockerfile into the context",
        )
    if not build.dockerfile.is_file():
        raise ParametersRefused(
            "build_options.dockerfile_path",
            f"there is no {build.dockerfile_path!r} in {build.context}",
            "name the Dockerfile relative to build_context",
        )
