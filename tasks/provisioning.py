"""Setting a host up, asked for: the parameters of `provision-host`, and where everything lies on the host."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from blocks.remote_host import RemoteHost
from receiver.contract import DEFAULT_PORT, Port, WireModel
from tasks.errors import ParametersRefused
from tasks.ssh import SshTarget

SERVICES = ("receiver", "worker")
DEFAULT_PREFIX = "/opt/gantry"
DEFAULT_USER = "gantry"
DEFAULT_ENGINE = "unix:///var/run/docker.sock"
_SHARED_FOLDERS = frozenset(
    {"/", "/bin", "/boot", "/dev", "/etc", "/home", "/lib", "/media", "/mnt", "/opt", "/proc", "/root"}
    | {"/run", "/sbin", "/srv", "/sys", "/tmp", "/usr", "/usr/local", "/var", "/var/lib", "/var/tmp"}  # noqa: S108
)


def _check_prefix(prefix: str) -> str:
    plain = str(PurePosixPath(prefix))
    if not re.fullmatch(r"(/[A-Za-z0-9._-]+)+", plain) or ".." in plain or plain in _SHARED_FOLDERS:
        raise ValueError(
            f"prefix {prefix!r}: give the absolute path of a folder for this alone, such as /opt/gantry"
        )
    return plain


def _check_network(text: str) -> str:
    try:
        return str(ipaddress.ip_network(text))
    except ValueError as exc:
        raise ValueError(f"allow: {exc}; write networks such as 10.0.0.9/32") from exc


def _check_api_url(url: str) -> str:
    if not re.fullmatch(r"https?://[^\s/'\"]+(/[^\s'\"]*)?", url):
        raise ValueError(f"prefect_api_url {url!r}: give a URL such as http://10.0.0.5:4200/api")
    return url.rstrip("/")


_UNIX_NAME = r"^[a-z_][a-z0-9_-]{0,30}$"
HostName = Annotated[
    str,
    Field(
        pattern=r"^[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?$",
        description="Name of the host in Prefect: lower-case letters, digits and '-', such as host-b.",
    ),
]
Address = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._:-]{0,251}[A-Za-z0-9])?$")]
LoginName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]{0,63}$")]
ServiceUser = Annotated[str, Field(pattern=_UNIX_NAME)]
Fingerprint = Annotated[str, Field(pattern=r"^SHA256:[A-Za-z0-9+/]{43}$")]
Prefix = Annotated[str, AfterValidator(_check_prefix)]
Network = Annotated[str, AfterValidator(_check_network)]
ApiUrl = Annotated[str, AfterValidator(_check_api_url)]
EngineAddress = Annotated[str, Field(pattern=r"^(unix:///[A-Za-z0-9._/-]+|tcp://[A-Za-z0-9._:\[\]-]+)$")]
HostPath = Annotated[str, Field(pattern=r"^(/[A-Za-z0-9._+-]+)+$")]


class ProvisionParameters(WireModel):
    """Every parameter of `provision-host`."""

    name: HostName
    address: Address
    user: LoginName
    ssh_port: Port = 22
    key_file: Path | None = None
    host_key: Fingerprint | None = None
    known_hosts_file: Path | None = None
    port: Port = DEFAULT_PORT
    allow: list[Network] = []
    prefix: Prefix = DEFAULT_PREFIX
    service_user: ServiceUser = DEFAULT_USER
    docker_host: EngineAddress = DEFAULT_ENGINE
    python: HostPath | None = None
    prefect_api_url: ApiUrl | None = None
    wheelhouse: Path | None = None
    package_index: bool = False
    remove: bool = False
    remove_containers: bool = False
    host_is_gone: bool = False

    @model_validator(mode="after")
    def _choices_fit(self) -> Self:
        if self.wheelhouse and self.package_index:
            raise ValueError("wheelhouse and package_index are both set; keep one")
        for name in ("remove_containers", "host_is_gone"):
            if getattr(self, name) and not self.remove:
                raise ValueError(f"{name} goes with remove=true alone")
        if self.remove_containers and self.host_is_gone:
            raise ValueError("remove_containers needs the host, and host_is_gone says that there is none")
        return self

    @property
    def target(self) -> SshTarget:
        """Where and how to log in."""
        return SshTarget(
            self.address, self.user, self.ssh_port, self.key_file, self.host_key, self.known_hosts_file
        )

    @property
    def layout(self) -> Layout:
        """Where everything lies on the host."""
        return Layout(prefix=self.prefix, service_user=self.service_user)


def known_of(saved: RemoteHost | None) -> dict[str, Any]:
    """What a host was registered with, as parameters; nothing of one that is new."""
    if saved is None:
        return {}
    known = {
        "address": saved.address,
        "port": saved.port,
        "user": saved.ssh_user,
        "ssh_port": saved.ssh_port,
        "key_file": saved.ssh_key_file,
        "host_key": saved.ssh_host_key,
    }
    return {name: value for name, value in known.items() if value is not None}


def parameters(known: Mapping[str, Any], **given: Any) -> ProvisionParameters:
    """What was given, and what is known for the rest; raises `ParametersRefused`."""
    merged = {**known, **{name: value for name, value in given.items() if value is not None}}
    for name in ("address", "user"):
        if name not in merged:
            raise ParametersRefused(
                name, f"{given['name']!r} is not registered yet", f"give {name} for the SSH login on the host"
            )
    try:
        return ProvisionParameters.model_validate(merged)
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "parameters"
        raise ParametersRefused(where, first["msg"], "correct it and start again") from exc


def host_block(asked: ProvisionParameters, saved: RemoteHost | None) -> RemoteHost:
    """The host as it is to be registered; what else its block says stays."""
    told = {
        "address": asked.address,
        "port": asked.port,
        "ssh_user": asked.user,
        "ssh_port": asked.ssh_port,
        "ssh_key_file": asked.key_file,
        "ssh_host_key": asked.host_key,
        "worker_python": asked.layout.python,
    }
    return saved.model_copy(update=told) if saved else RemoteHost.model_validate(told)


def check_paths(asked: ProvisionParameters) -> None:
    """Raise `ParametersRefused` for a file that is not on the control host."""
    for name, path in (("key_file", asked.key_file), ("known_hosts_file", asked.known_hosts_file)):
        if path is not None and not path.expanduser().is_file():
            raise ParametersRefused(
                name, f"{path} is no file on the control host", "give the path as the worker sees it"
            )
    for pattern in ("gantry_deploy-*.whl", "pip-*.whl", "constraints.txt"):
        if asked.wheelhouse is not None and not list(asked.wheelhouse.glob(pattern)):
            raise ParametersRefused(
                "wheelhouse",
                f"{asked.wheelhouse} holds no {pattern}",
                "make it by 'python -m deployments.wheelhouse', or leave it out",
            )


class Layout(BaseModel):
    """Where everything lies on the host."""

    model_config = ConfigDict(frozen=True)

    prefix: str
    service_user: str

    def at(self, *parts: str) -> str:
        """A path below the prefix."""
        return str(PurePosixPath(self.prefix, *parts))

    @property
    def python(self) -> str:
        """The Python of the release that serves."""
        return self.at("current", "bin", "python")

    @property
    def environment_file(self) -> str:
        """What the services are told; holds the key."""
        return self.at("gantry.env")

    @property
    def local_file(self) -> str:
        """A person's own settings, which win and are never written."""
        return self.at("local.env")

    def unit(self, service: str) -> str:
        """Name of a systemd unit."""
        return f"{self.service_user}-{service}.service"

    def unit_file(self, service: str) -> str:
        """Path of a systemd unit."""
        return f"/etc/systemd/system/{self.unit(service)}"
