"""The matrix: every fault at every point, and the part of it that every test run takes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tests.faults import faults, points
from tests.faults.faults import Fault, Scope
from tests.faults.points import THROUGHOUT, Point


@dataclass(frozen=True)
class Cell:
    """One fault at one point."""

    fault: Fault
    point: Point

    def __str__(self) -> str:
        return f"{self.fault.name}-{self.point.name}"


def cell(fault: str, point: str) -> Cell:
    """The cell of these names."""
    return Cell(faults.BY_NAME[fault], points.BY_NAME[point])


# Faults without a moment of their own, and those whose moment is fixed.
_FIXED = {
    "broker_gone": (THROUGHOUT,),
    "same_millisecond": (points.BEFORE_LOCK,),
    "clock_10_s": (THROUGHOUT,),
    "clock_61_s": (THROUGHOUT,),
    "clock_16_min": (THROUGHOUT,),
    "clock_steps_back": ("mid upload_package",),
}


# Faults at the points of rolling deployments: those that end a process, or all of a host.
_OF_ROLLING = ("kill_flow", "cancel", "kill_host_worker", "kill_receiver", "kill_engine", "reboot")


def full() -> list[Cell]:
    """All cells."""
    found = []
    for fault in faults.BY_NAME.values():
        names = _FIXED.get(fault.name) or tuple(point.name for point in points.ALL)
        found += [cell(fault.name, name) for name in names]
    return [*found, *(cell(fault, point.name) for fault in _OF_ROLLING for point in points.ROLLING)]


_REPRESENTATIVE = {
    "kill_flow": (
        *("after record PACKAGING", "before start_container"),
        *("before record COMPLETED", "after record ROLLING_BACK"),
    ),
    "cancel": ("mid upload_package", "after engine start"),
    "broker_gone": (THROUGHOUT,),
    "same_millisecond": (points.BEFORE_LOCK,),
    "kill_host_worker": (
        *("after engine stop", "before engine start"),
        *("before journal kept", "after proxy set_route"),
    ),
    "kill_receiver": ("before stop_existing_container", "before proxy set_route"),
    "kill_engine": ("before engine create_container", "after engine stop"),
    "reboot": (
        *("before journal prepared", "after engine stop", "after journal validating"),
        "after journal draining",
    ),
    "cut_to_host": ("before send_deployment_request",),
    "cut_from_host": ("mid upload_package",),
    "cut_both_ways": ("before stop_existing_container",),
    "cut_until_at_rest": ("after engine stop",),
    "disk_full_host": ("mid upload_package", "before engine create_container"),
    "disk_full_control": ("before build_docker_image",),
    "clock_61_s": (THROUGHOUT,),
    "clock_steps_back": ("mid upload_package",),
    "server_gone": ("before record DEPLOYING", "before start_container"),
    "records_locked": ("before record DEPLOYING",),
    "records_gone": ("before record DEPLOYING", "before record COMPLETED"),
}


def representative() -> list[Cell]:
    """At least thirty, every fault that a machine can suffer among them."""
    return [cell(fault, point) for fault, names in _REPRESENTATIVE.items() for point in names]


def rounds(cells: Iterable[Cell], lanes: int, hosts: int) -> dict[Scope, list[Sequence[Cell]]]:
    """Cells that one round takes together: of one fault, unless the faults are felt by one run alone.

    A round is of one host, or of all where all feel the fault. Rounds of different faults take turns, so that
    a run that is ended early has seen something of each.
    """
    found: dict[Scope, list[list[Sequence[Cell]]]] = {scope: [] for scope in Scope}
    for (scope, _), group in itertools.groupby(sorted(cells, key=_company), key=_company):
        together, width = list(group), lanes * (hosts if scope is Scope.LAB else 1)
        found[scope].append([together[at : at + width] for at in range(0, len(together), width)])
    return {scope: _in_turn(groups) for scope, groups in found.items()}


def _in_turn(groups: Iterable[Sequence[Sequence[Cell]]]) -> list[Sequence[Cell]]:
    turns = itertools.zip_longest(*groups)
    return [each for turn in turns for each in turn if each is not None]


def _company(each: Cell) -> tuple[Scope, str]:
    return each.fault.scope, "" if each.fault.scope is Scope.RUN else each.fault.name
