"""What has to be true after a fault: one version serves, everybody agrees, nothing is left over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3
from docker.errors import DockerException
from requests.exceptions import RequestException

from tests.faults import facts
from tests.faults.cells import Cell
from tests.faults.client import Client, answer_of, tag_of
from tests.faults.facts import OnHost, Running
from tests.faults.holds import Hold
from tests.faults.site import Lane, Site

_TERMINAL = {"COMPLETED", "ROLLBACK_COMPLETED", "FAILED"}
_LAST_EVENTS = {
    "COMPLETED": ["DEPLOYMENT_COMPLETED"],
    "ROLLBACK_COMPLETED": ["DEPLOYMENT_FAILED", "DEPLOYMENT_DLQ"],
    "FAILED": ["DEPLOYMENT_FAILED", "DEPLOYMENT_DLQ"],
}
_UNFINISHED = {
    "ready_for_deployment",
    "prepared",
    "switching",
    "validating",
    "failed",
    "restoring",
    "restore_failed",
}
_ANSWER_SECONDS = 5.0
_STATE_DIR = "HOOK_RECEIVER_STATE_DIR"


@dataclass
class Attempt:
    """A cell under way: the deployment of a new version over the old one that serves in a lane."""

    cell: Cell
    lane: Lane
    old: str
    new: str
    client: Client
    before: OnHost
    run_ids: list[str] = field(default_factory=list)
    holds: list[Hold] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)
    held_from: float = 0
    held_until: float = 0


@dataclass(frozen=True)
class Sight:
    """What is seen of an attempt at one moment."""

    serving: str = "nothing"
    state: str = "-"
    events: str = "-"
    left_bytes: int = 0
    violations: tuple[str, ...] = ()


def look(site: Site, attempt: Attempt) -> Sight:
    """Everything that can be said of an attempt now."""
    try:
        now = facts.on_host(attempt.lane.service.host, attempt.lane.service.name)
    except (DockerException, RequestException) as exc:
        return Sight(violations=(f"the engine does not answer: {exc}",))
    rows = [facts.workflow(site.lab, run_id) for run_id in attempt.run_ids]
    if None in rows:
        return Sight(violations=("the records cannot be read",))
    begun = [row for row in rows if row]
    tag = _serving_tag(attempt)
    left = dict(_left_over(attempt, now))
    told = [problem for row in begun for problem in _events_problems(site, row)]
    violations = [*_serving_problems(attempt, tag, now), *_record_problems(begun, tag, attempt, now)]
    violations += [*told, *_ledger_problems(attempt), *_held_locks(site, attempt), *left]
    return Sight(
        serving={attempt.old: "old", attempt.new: "broken" if attempt.cell.point.is_rollback else "new"}.get(
            tag or "", tag or "nothing"
        ),
        state="/".join(row["current_state"] for row in begun) or "-",
        events="wrong" if told else "complete",
        left_bytes=sum(left.values()),
        violations=tuple(violations),
    )


def _serving_tag(attempt: Attempt) -> str | None:
    service = attempt.lane.service
    return tag_of(answer_of(service.lab.control.namespace, attempt.lane.url, _ANSWER_SECONDS))


def _serving_problems(attempt: Attempt, tag: str | None, now: OnHost) -> Iterator[str]:
    if tag is None:
        yield "nothing serves"
    elif tag == attempt.new and attempt.cell.point.is_rollback:
        yield "the broken version serves"
    elif tag not in {attempt.old, attempt.new}:
        yield f"{tag} serves, which is neither the old nor the new version"
    running = [each for each in now.containers if each.is_running]
    if [each.name for each in running] != [attempt.lane.service.name]:
        yield f"running containers: {[each.name for each in running]}"


def _record_problems(
    rows: list[dict[str, Any]], tag: str | None, attempt: Attempt, now: OnHost
) -> Iterator[str]:
    if not rows:
        yield "the records know no such workflow"
    running = next((each for each in now.containers if each.is_running), None)
    for row in rows:
        yield from _disagreement(row, running)
    completed = [row for row in rows if row["current_state"] == "COMPLETED"]
    if tag == attempt.new and not completed and all(row["current_state"] in _TERMINAL for row in rows):
        kept = any('"host_state": "kept"' in (row["rollback_result"] or "") for row in rows)
        if not kept:
            yield f"the new version serves, but no workflow is COMPLETED: {rows[0]['error_message']}"


def _disagreement(row: dict[str, Any], running: Running | None) -> Iterator[str]:
    state = row["current_state"]
    if state not in _TERMINAL:
        yield f"workflow {row['workflow_id'][:8]} is {state}"
    if state != "COMPLETED":
        return
    if running is None or running.workflow_id != row["workflow_id"]:
        yield "the workflow is COMPLETED, but the container that runs is not its own"
    elif running.image_id != row["image_id"]:
        yield f"the workflow is COMPLETED with {row['image_id']}, but {running.image_id} runs"


def _events_problems(site: Site, row: dict[str, Any]) -> Iterator[str]:
    workflow_id, state = row["workflow_id"], row["current_state"]
    sql = "SELECT sequence, event_type, sent_at FROM event_outbox WHERE workflow_id = ? ORDER BY sequence"
    events = facts.records(site.lab, sql, workflow_id) or []
    if [each["sequence"] for each in events] != list(range(1, row["event_sequence"] + 1)):
        yield f"the events have gaps: {[each['sequence'] for each in events]} of {row['event_sequence']}"
    last = _LAST_EVENTS.get(state)
    types = [each["event_type"] for each in events]
    if last and types[-len(last) :] != last:
        yield f"the events of a workflow that is {state} end with {types[-2:]}"
    sql = "SELECT from_state, to_state FROM workflow_transitions WHERE workflow_id = ? ORDER BY sequence"
    steps = facts.records(site.lab, sql, workflow_id) or []
    way = ["PENDING", *(step["to_state"] for step in steps)]
    if [step["from_state"] for step in steps] != way[:-1] or way[-1] != state:
        yield f"the history of a workflow that is {state} is {way}"


def _ledger_problems(attempt: Attempt) -> Iterator[str]:
    service = attempt.lane.service
    for entry in facts.ledger(service.host, service.name):
        if entry["state"] in _UNFINISHED:
            yield f"the host's deployment {entry['deployment_id'][:8]} is {entry['state']}"


def _held_locks(site: Site, attempt: Attempt) -> Iterator[str]:
    """The locks of the container, on its host and beside the records."""
    service = attempt.lane.service
    if f"{service.name}.lock" in facts.held_locks(Path(service.host.environment[_STATE_DIR]) / "locks"):
        yield "the container's lock is held on the host"
    name = blake3(f"{service.name}@{service.host.name}".encode()).hexdigest()[:32]
    if name in facts.held_locks(Path(f"{facts.home(site.lab) / 'records.db'}.locks")):
        yield "the container is locked beside the records"


def _left_over(attempt: Attempt, now: OnHost) -> Iterator[tuple[str, int]]:
    """Each thing of ours that nothing needs any more, with its bytes."""
    service = attempt.lane.service
    for each in now.containers:
        if not each.is_running and not each.name.startswith(f"{service.name}-previous-"):
            yield f"container {each.name} is left", 0
    needed = {each.image_id for each in now.containers}
    for image, size_bytes in now.images.items():
        if image not in needed:
            yield f"image {image[:19]} is left", size_bytes
    entries = facts.ledger(service.host, service.name)
    mine = {entry["deployment_id"] for entry in entries} - _resumable(attempt, entries)
    for path in Path(service.host.environment[_STATE_DIR]).glob("packages/*"):
        if path.name.partition(".")[0] in mine:
            yield f"package {path.name} is left", path.stat().st_size


def _resumable(attempt: Attempt, entries: Sequence[dict[str, Any]]) -> set[str]:
    """What the last deployment sent in part is kept for the next one, unless a person cancelled it."""
    last = entries[-1:] if attempt.cell.fault.name != "cancel" else []
    return {entry["deployment_id"] for entry in last if entry["state"] == "receiving"}
