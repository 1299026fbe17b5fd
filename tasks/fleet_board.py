"""How far a fleet is: one cell for each service on each host, and when enough has failed. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from receiver.contract import ErrorCode
from tasks.fleet_plan import Unit
from tasks.states import WorkflowRecord, WorkflowState

ROLLBACK_MARK = "kept_deployment_id"  # a workflow that went back to a kept version was asked for by it


class Cell(StrEnum):
    """Where a service on a host stands in the fleet's run."""

    WAITING = "waiting"
    UNDER_WAY = "under way"
    DEPLOYED = "deployed"
    DONE_BEFORE = "deployed before"
    FAILED = "failed"
    UNREACHABLE = "unreachable"
    ROLLED_BACK = "rolled back"
    NOT_ROLLED_BACK = "not rolled back"
    LEFT = "left as it is"


SERVING = frozenset({Cell.DEPLOYED, Cell.DONE_BEFORE})


@dataclass
class Place:
    """One cell of the board; `detail` says why, or how far a deployment that is under way has come."""

    unit: Unit
    cell: Cell = Cell.WAITING
    detail: str = ""
    run_id: str = ""
    seconds: float | None = None
    began: datetime | None = None

    def end(self, cell: Cell, detail: str = "") -> None:
        """Nothing more happens here in this run, unless it is rolled back."""
        self.cell, self.detail = cell, detail


@dataclass
class Board:
    """All cells, in the order of services and hosts; `stopped` says why no more is begun."""

    fleet_id: str
    places: list[Place]
    canary: str | None = None
    stopped: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def hosts(self) -> list[str]:
        """Rows."""
        return list(dict.fromkeys(place.unit.host for place in self.places))

    @property
    def services(self) -> list[str]:
        """Columns."""
        return list(dict.fromkeys(place.unit.service for place in self.places))

    def of(self, *cells: Cell) -> list[Place]:
        """Those that stand so."""
        return [place for place in self.places if place.cell in cells]

    def on(self, hosts: Iterable[str]) -> list[Place]:
        """Those of some hosts."""
        wanted = set(hosts)
        return [place for place in self.places if place.unit.host in wanted]

    def counts(self) -> dict[str, int]:
        """How many stand how; nothing of what there is none of."""
        return {cell.value: found for cell in Cell if (found := len(self.of(cell)))}


def failed_hosts(places: Iterable[Place], *, count_unreachable: bool) -> list[str]:
    """Hosts with a failure, each once; whether one that does not answer is a failure, the caller chose."""
    bad = {Cell.FAILED} | ({Cell.UNREACHABLE} if count_unreachable else set())
    return list(dict.fromkeys(place.unit.host for place in places if place.cell in bad))


def why_stop(board: Board, max_failures: int, *, count_unreachable: bool) -> str:
    """Why nothing more may be begun; empty while it may. A failed canary is always enough."""
    failed = failed_hosts(board.places, count_unreachable=count_unreachable)
    canary_lost = bool(board.canary) and any(
        place.cell in {Cell.FAILED, Cell.UNREACHABLE} for place in board.on([board.canary or ""])
    )
    if canary_lost:
        return f"the canary {board.canary} failed"
    if len(failed) > max_failures:
        return f"{_hosts(len(failed))} failed ({', '.join(failed)}), allowed are {max_failures}"
    return ""


def _hosts(number: int) -> str:
    return "1 host" if number == 1 else f"{number} hosts"


def is_rollback(record: WorkflowRecord) -> bool:
    """True for a workflow that went back to a version that the host kept."""
    return ROLLBACK_MARK in record.request


def newest(records: Sequence[WorkflowRecord]) -> dict[tuple[str, str], WorkflowRecord]:
    """The last workflow of each container and host that counts.

    A rollback that did not succeed changed nothing: what ran before it runs.
    """
    found: dict[tuple[str, str], WorkflowRecord] = {}
    for record in sorted(records, key=lambda record: record.created_at):
        if not is_rollback(record) or record.success:
            found[record.container_name, record.remote_host] = record
    return found


def is_deployed(unit: Unit, newest_of: Mapping[tuple[str, str], WorkflowRecord]) -> bool:
    """True when the fleet has brought just this version there, and has not taken it back."""
    record = newest_of.get(unit.key)
    return (
        record is not None
        and bool(record.success)
        and not is_rollback(record)
        and record.image_tag == unit.parameters.image_tag
    )


def deployed_cell(record: WorkflowRecord | None, run_message: str) -> tuple[Cell, str]:
    """What a deployment that ended came to: by the records, else by the run's message."""
    if record is None or not record.current_state.terminal:
        return Cell.FAILED, run_message or "its run ended without a word"
    if record.current_state is WorkflowState.COMPLETED:
        return Cell.DEPLOYED, record.deployed_url or ""
    told = f"{record.error_code}: {record.error_message}" if record.error_code else run_message
    nothing_touched = record.current_state is WorkflowState.FAILED and not record.deployment_id
    if record.error_code is ErrorCode.REMOTE_ENDPOINT_UNREACHABLE and nothing_touched:
        return Cell.UNREACHABLE, told
    return Cell.FAILED, f"{told} ({record.current_state})"


def rolled_back_cell(record: WorkflowRecord | None, run_message: str) -> tuple[Cell, str]:
    """The same of a rollback."""
    cell, told = deployed_cell(record, run_message)
    if cell is Cell.DEPLOYED and record is not None:
        return Cell.ROLLED_BACK, f"to {record.image_tag}"
    return Cell.NOT_ROLLED_BACK, told
