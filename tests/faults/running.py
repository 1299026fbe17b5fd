"""Running many cells: rounds on both hosts at the same time, one result line for each cell."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, SimpleQueue

from deployments.lab import Host, LabNotReady
from tests.faults import cells as matrix
from tests.faults.cells import Cell
from tests.faults.faults import Scope
from tests.faults.results import Result
from tests.faults.rounds import run_round
from tests.faults.site import Lane, Site

Tell = Callable[[Result], None]
Run = Callable[[Sequence[Lane], Sequence[Cell]], None]


def run_cells(site: Site, cells: Iterable[Cell], tell: Tell, *, follow_up: bool = True) -> None:
    """Run all cells, those that disturb each other one after the other; `tell` hears each result."""

    def run(lanes: Sequence[Lane], together: Sequence[Cell]) -> None:
        for result in _run(site, lanes, together, follow_up=follow_up):
            tell(result)

    width = min(len(lanes) for lanes in site.lanes.values())
    rounds = matrix.rounds(cells, width, len(site.lanes))
    _on_each_host(site, [*rounds[Scope.RUN], *rounds[Scope.HOST]], run)
    for together in rounds[Scope.LAB]:
        lanes = [lane for group in zip(*site.lanes.values(), strict=True) for lane in group]
        run(lanes, together)


def _on_each_host(site: Site, rounds: Sequence[Sequence[Cell]], run: Run) -> None:
    waiting: SimpleQueue[Sequence[Cell]] = SimpleQueue()
    for together in rounds:
        waiting.put(together)

    def work(host: str) -> None:
        while True:
            try:
                together = waiting.get_nowait()
            except Empty:
                return
            run(list(site.lanes[host]), together)

    with ThreadPoolExecutor(len(site.lanes)) as threads:
        try:
            for done in [threads.submit(work, host) for host in site.lanes]:
                done.result()
        finally:  # whoever ends the run waits for the rounds under way, not for all
            _empty(waiting)


def _empty(waiting: SimpleQueue[Sequence[Cell]]) -> None:
    with suppress(Empty):
        while True:
            waiting.get_nowait()


def _run(site: Site, lanes: Sequence[Lane], together: Sequence[Cell], *, follow_up: bool) -> list[Result]:
    began = time.monotonic()
    try:
        return run_round(site, lanes, together, follow_up=follow_up)
    except Exception as exc:  # noqa: BLE001 - one broken round must not end a run of hours
        cause = "".join(traceback.format_exception(exc)[-3:])
        broken = [_broken(cell, cause, time.monotonic() - began) for cell in together]
        for lane in lanes[: len(together)]:
            site.replace(lane)
        for host in {lane.service.host.name: lane.service.host for lane in lanes}.values():
            _mend(host)
        return broken


def _broken(cell: Cell, cause: str, took_seconds: float) -> Result:
    return Result(
        fault=cell.fault.name,
        point=cell.point.name,
        serving="unknown",
        state="unknown",
        events="unknown",
        left_bytes=0,
        silent_seconds=0,
        agreed_seconds=0,
        took_seconds=round(took_seconds, 1),
        violations=[f"the round broke off: {' '.join(cause.split())}"],
    )


def _mend(host: Host) -> None:
    """Whatever a broken round left undone: the next one needs a whole host."""
    host.heal_network()
    host.free_disk()
    with suppress(LabNotReady):
        host.start_engine()
        for name, start in (("receiver", host.start_receiver), ("worker", host.start_worker)):
            if not host.services[name].alive:
                start()
