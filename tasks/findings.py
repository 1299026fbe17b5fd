"""What an examination finds, as frozen values: facts without a verdict. Pure; knows only the wire's words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from receiver.contract import HostDisk, HostHealth, HostReport


class Reach(StrEnum):
    """How far a connection to the receiver's port came; the words are told."""

    REACHED = "reached"
    REFUSED = "connection refused"
    TIMEOUT = "no answer in time"
    NAME_UNKNOWN = "name unknown"
    NO_ROUTE = "no way there"


@dataclass(frozen=True)
class Link:
    """The way to a port, and the address that this side has on it."""

    reach: Reach
    detail: str = ""
    own_address: str | None = None


@dataclass(frozen=True)
class Certificate:
    """What the receiver's certificate showed; `problem` when it was not accepted."""

    is_checked: bool
    problem: str | None = None
    expires_at: datetime | None = None


@dataclass(frozen=True)
class Refused:
    """A signed call that was not answered with success."""

    status: int
    kind: str
    title: str
    detail: str
    next_step: str
    extra: Mapping[str, object]


@dataclass(frozen=True)
class Pool:
    """A work pool and those of its workers that are online."""

    name: str
    is_paused: bool
    workers_online: int


@dataclass(frozen=True)
class Prefect:
    """What the Prefect server was asked; `problem` when it does not answer."""

    version: str | None = None
    client_version: str = ""
    problem: str | None = None


@dataclass(frozen=True)
class PlaceInPrefect:
    """A side's work pool (None: there is none) and the Prefect deployments that it misses."""

    pool_name: str
    pool: Pool | None
    missing: tuple[str, ...]


@dataclass(frozen=True)
class BuildEngine:
    """The engine that builds; `problem` when it does not answer."""

    address: str
    version: str | None = None
    architecture: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class OpenWorkflow:
    """A workflow that the records hold in no terminal state."""

    workflow_id: str
    container_name: str
    image_tag: str
    remote_host: str
    state: str
    updated_at: datetime


@dataclass(frozen=True)
class RecordsFound:
    """The records database, its password hidden; `revision` is None where there is no table yet."""

    url: str
    revision: str | None = None
    expected_revision: str = ""
    problem: str | None = None
    open_workflows: tuple[OpenWorkflow, ...] = ()


@dataclass(frozen=True)
class BrokerFound:
    """The event broker that is configured."""

    servers: str
    brokers: int = 0
    problem: str | None = None


@dataclass(frozen=True)
class HostFindings:
    """Everything found out about one host; None for what could not be asked."""

    name: str
    address: str
    port: int
    tls: bool
    link: Link
    looked_at: datetime
    certificate: Certificate | None = None
    health: HostHealth | None = None
    clock_offset_seconds: float | None = None
    report: HostReport | None = None
    refused: Refused | None = None
    problem: str | None = None
    wanted_ports: tuple[str, ...] = ()
    place: PlaceInPrefect | None = None
    open_workflows: tuple[OpenWorkflow, ...] | None = None
    build_engine: BuildEngine | None = None


@dataclass(frozen=True)
class HostLost:
    """A host that was named, or is saved, and cannot be examined at all."""

    name: str
    problem: str
    needs_prefect: bool = False


@dataclass(frozen=True)
class ControlFindings:
    """Everything found out about the control side."""

    looked_at: datetime
    prefect: Prefect
    build_engine: BuildEngine
    home: HostDisk
    records: RecordsFound
    broker: BrokerFound | None
    place: PlaceInPrefect | None


@dataclass(frozen=True)
class Examination:
    """The control side and the hosts, in the order in which they were asked for."""

    control: ControlFindings
    hosts: tuple[HostFindings | HostLost, ...]
