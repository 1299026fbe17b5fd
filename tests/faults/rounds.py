"""One round: deployments in several lanes are stopped at their points, a fault strikes, all comes back."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from uuid import uuid4

from deployments import lab_http
from deployments.lab import Host
from tests.e2e.deploying import prefect_api, wait_for
from tests.faults import facts
from tests.faults.cells import Cell
from tests.faults.client import Client
from tests.faults.faults import Scene
from tests.faults.invariant import Attempt, Sight, look
from tests.faults.points import THROUGHOUT
from tests.faults.results import Result
from tests.faults.site import Lane, Site

ARRIVAL_SECONDS = 150.0
AGREEMENT_SECONDS = 60.0
DEPLOYMENT_SECONDS = 150.0
_TERMINAL = {"COMPLETED", "ROLLBACK_COMPLETED", "FAILED"}


def run_round(
    site: Site, lanes: Sequence[Lane], cells: Sequence[Cell], *, follow_up: bool = True
) -> list[Result]:
    """Run cells that can be run together, each in a lane of its own; their results.

    Without `follow_up` the next cell of the lane is the deployment that has to be possible afterwards.
    """
    began = time.monotonic()
    _choose_strategies(lanes, cells)
    _serve_old_versions(lanes)
    attempts = [_begin(cell, lane) for cell, lane in zip(cells, lanes, strict=False)]
    try:
        back_at = _strike(site, attempts)
        seen = _await_agreement(site, attempts, back_at)
    finally:
        for attempt in attempts:
            attempt.client.stop()
    sane = [attempt for attempt, (sight, _) in zip(attempts, seen, strict=True) if not sight.violations]
    for attempt in sane:
        attempt.lane.serving = attempt.client.last_tag
    if follow_up:
        _follow_up(sane)
    took_seconds = time.monotonic() - began
    results = []
    for attempt, (sight, agreed_seconds) in zip(attempts, seen, strict=True):
        results.append(_result(attempt, sight, agreed_seconds, took_seconds))
        if results[-1].violations:
            site.replace(attempt.lane)
    return results


# -- before ----------------------------------------------------------------------------------------


def _choose_strategies(lanes: Sequence[Lane], cells: Sequence[Cell]) -> None:
    """A lane whose old version was deployed by another strategy than the cell's is served anew."""
    for cell, lane in zip(cells, lanes, strict=False):
        if cell.point.is_rolling is not lane.is_rolling:
            lane.is_rolling, lane.serving = cell.point.is_rolling, None


def _serve_old_versions(lanes: Sequence[Lane]) -> None:
    empty = [lane for lane in lanes if lane.serving is None]
    runs = [(lane, lane.next_version()) for lane in empty]
    started = [(lane, tag, start(lane, lane.parameters(tag, is_patient=True))) for lane, tag in runs]
    for lane, tag, run_id in started:
        row = _end_of(lane, run_id)
        assert row["current_state"] == "COMPLETED", row["error_message"]
        lane.serving = tag


def start(lane: Lane, parameters: dict[str, object], environment: dict[str, str] | None = None) -> str:
    """Start a deployment; returns the flow run's id, which is the workflow's."""
    lab = lane.service.lab
    known = prefect_api(lab, "GET", "/deployments/name/deploy-container/default")
    body = {
        "parameters": parameters,
        "state": {"type": "SCHEDULED"},
        "job_variables": {"env": environment or {}},
        "idempotency_key": str(uuid4()),
    }
    return str(prefect_api(lab, "POST", f"/deployments/{known['id']}/create_flow_run", body)["id"])


def _end_of(lane: Lane, run_id: str) -> dict[str, object]:
    def ended() -> dict[str, object] | None:
        row = facts.workflow(lane.service.lab, run_id)
        return row if row and row["current_state"] in _TERMINAL else None

    return wait_for(ended, f"the end of workflow {run_id}", seconds=DEPLOYMENT_SECONDS)


def _begin(cell: Cell, lane: Lane) -> Attempt:
    """A client that asks; on the host itself where the network to it is to be cut."""
    service = lane.service
    assert lane.serving is not None
    namespace = service.host.namespace if cell.fault.asks_from_host else service.lab.control.namespace
    attempt = Attempt(
        cell=cell,
        lane=lane,
        old=lane.serving,
        new=lane.next_version(),
        client=Client(namespace, lane.url),
        before=facts.on_host(service.host, service.name),
    )
    attempt.client.start()
    return attempt


# -- the fault -------------------------------------------------------------------------------------


def _strike(site: Site, attempts: Sequence[Attempt]) -> float:
    """Let the fault strike while every run is at its point; the moment when everything is back."""
    with _prepared(site, attempts) as scenes:
        for attempt in attempts:
            _start(site, attempt)
        _await_arrival(attempts)
        for attempt in attempts:
            scenes[attempt.cell.fault.name].run_ids += attempt.run_ids
        for attempt, scene in _one_of_each(attempts, scenes):
            attempt.cell.fault.strike(scene)
        for attempt in attempts:
            attempt.held_until = time.monotonic()
            for hold in attempt.holds:
                hold.release()
        for attempt, scene in _one_of_each(attempts, scenes):
            attempt.cell.fault.meanwhile(scene)
        _await_ends([attempt for attempt in attempts if attempt.cell.point.name == THROUGHOUT])
        _ask_on_the_host(attempts)
    return time.monotonic()


@contextmanager
def _prepared(site: Site, attempts: Sequence[Attempt]) -> Iterator[dict[str, Scene]]:
    """A scene for each fault; whatever happens, the fault is healed."""
    scenes: dict[str, Scene] = {}
    for attempt in attempts:
        host = attempt.lane.service.host
        scene = scenes.setdefault(attempt.cell.fault.name, Scene(site, host))
        scene.containers.append(attempt.lane.service.name)
    try:
        for attempt, scene in _one_of_each(attempts, scenes):
            attempt.cell.fault.prepare(scene)
        yield scenes
    finally:
        for attempt, scene in _one_of_each(attempts, scenes):
            attempt.cell.fault.heal(scene)
            scene.undo.close()


def _one_of_each(attempts: Sequence[Attempt], scenes: dict[str, Scene]) -> Iterator[tuple[Attempt, Scene]]:
    first = {attempt.cell.fault.name: attempt for attempt in reversed(attempts)}
    return ((attempt, scenes[name]) for name, attempt in first.items())


def _start(site: Site, attempt: Attempt) -> None:
    fault, point, lane = attempt.cell.fault, attempt.cell.point, attempt.lane
    parameters = lane.parameters(attempt.new, is_broken=point.is_rollback)
    for _ in range(fault.runs):
        if point.name != THROUGHOUT:
            attempt.holds.append(site.holds.arm(lane.service.name, point.name))
        attempt.run_ids.append(start(lane, parameters, dict(fault.environment)))


def _await_arrival(attempts: Sequence[Attempt]) -> None:
    """Until every process is at its point; one that never comes there is noted."""
    deadline = time.monotonic() + ARRIVAL_SECONDS
    under_way = list(attempts)
    while under_way:
        for attempt in under_way.copy():
            row = facts.workflow(attempt.lane.service.lab, attempt.run_ids[0])
            if all(hold.pid for hold in attempt.holds):
                attempt.held_from = time.monotonic()
            elif (row and row["current_state"] in _TERMINAL) or time.monotonic() > deadline:
                attempt.trouble.append("the point was not reached")
            else:
                continue
            under_way.remove(attempt)
        time.sleep(0.05)


def _await_ends(attempts: Sequence[Attempt]) -> None:
    """A fault without a moment of its own lasts as long as the deployment."""
    for attempt in attempts:
        with suppress(AssertionError):  # what has not ended by then is found by the invariant
            _end_of(attempt.lane, attempt.run_ids[0])


def _ask_on_the_host(attempts: Sequence[Attempt]) -> None:
    """A host that is cut off until it is at rest has to serve by then."""
    for attempt in attempts:
        if attempt.cell.fault.name == "cut_until_at_rest" and not _answers_itself(attempt.lane):
            attempt.trouble.append("nothing served on the host while it was cut off")


def _answers_itself(lane: Lane) -> bool:
    host: Host = lane.service.host
    try:
        return lab_http.request(host.namespace, "GET", lane.url).status == 200
    except OSError:
        return False


# -- after -----------------------------------------------------------------------------------------


def _await_agreement(site: Site, attempts: Sequence[Attempt], back_at: float) -> list[tuple[Sight, float]]:
    """What is seen of each attempt once nothing is violated, or when its time is up; and after how long."""
    settled: dict[int, tuple[Sight, float]] = {}
    while len(settled) < len(attempts):
        for number, attempt in enumerate(attempts):
            if number in settled:
                continue
            sight, seconds = look(site, attempt), time.monotonic() - back_at
            if not sight.violations or seconds > AGREEMENT_SECONDS:
                settled[number] = sight, seconds
        time.sleep(1)
    return [settled[number] for number in range(len(attempts))]


def _follow_up(attempts: Sequence[Attempt]) -> None:
    """One more deployment in each lane succeeds; its version is the old one of the next cell."""
    started = []
    for attempt in attempts:
        tag = attempt.lane.next_version()
        started.append((attempt, tag, start(attempt.lane, attempt.lane.parameters(tag, is_patient=True))))
    for attempt, tag, run_id in started:
        try:
            row = _end_of(attempt.lane, run_id)
        except AssertionError as exc:
            attempt.trouble.append(f"the next deployment does not end: {exc}")
            continue
        attempt.lane.serving = tag
        if row["current_state"] != "COMPLETED":
            attempt.trouble.append(f"the next deployment is {row['current_state']}: {row['error_message']}")


def _result(attempt: Attempt, sight: Sight, agreed_seconds: float, took_seconds: float) -> Result:
    return Result(
        fault=attempt.cell.fault.name,
        point=attempt.cell.point.name,
        serving=sight.serving,
        state=sight.state,
        events=sight.events,
        left_bytes=sight.left_bytes,
        silent_seconds=round(attempt.client.silent_seconds(attempt.held_from, attempt.held_until), 2),
        agreed_seconds=round(agreed_seconds, 1),
        took_seconds=round(took_seconds, 1),
        violations=[*attempt.trouble, *sight.violations],
        host=attempt.lane.service.host.name,
        workflow_id=attempt.run_ids[0] if attempt.run_ids else "",
    )
