"""The host's ledger: only the table's moves happen, each once, in whichever thread or process."""

from __future__ import annotations

import itertools
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path

import pytest
from pydantic import ValidationError

from receiver.contract import (
    DeployRequest,
    ErrorCode,
    HealthAttempt,
    HostState,
    PackageAnnouncement,
    QualityGate,
    Stage,
)
from receiver.ledger import (
    TRANSITIONS,
    DeploymentUnknown,
    IdempotencyConflict,
    Ledger,
    StateConflict,
    Undo,
)

S = HostState
REQUEST = DeployRequest(container_name="web", image_tag="v1", workflow_id="wf-1")
UNDO = Undo("a" * 64, {"Name": "always", "MaximumRetryCount": 0}, was_running=True)
THREADS = 8

# Written out again by hand: a change of the table has to be meant.
ALLOWED = {
    S.RECEIVING: {S.READY, S.REJECTED, S.ABORTED},
    S.READY: {S.PREPARED, S.ABORTED, S.FAILED, S.RESTORING},
    S.PREPARED: {S.SWITCHING, S.VALIDATING, S.FAILED, S.RESTORING},
    S.SWITCHING: {S.VALIDATING, S.FAILED, S.RESTORING},
    S.VALIDATING: {S.KEPT, S.MOVING, S.FAILED, S.RESTORING},
    S.MOVING: {S.DRAINING, S.FAILED, S.RESTORING},
    S.DRAINING: {S.KEPT, S.FAILED, S.RESTORING},
    S.FAILED: {S.RESTORING},
    S.RESTORING: {S.RESTORED, S.RESTORE_FAILED},
    S.RESTORE_FAILED: {S.RESTORING},
    S.KEPT: set(),
    S.RESTORED: set(),
    S.ABORTED: set(),
    S.REJECTED: set(),
}


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """An empty ledger."""
    with closing(Ledger(tmp_path / "state" / "ledger.sqlite3")) as found:
        yield found


@pytest.fixture
def other(ledger: Ledger, tmp_path: Path) -> Iterator[Ledger]:
    """A second connection to the same ledger, as another process has one."""
    with closing(Ledger(tmp_path / "state" / "ledger.sqlite3")) as found:
        yield found


def new(ledger: Ledger, state: HostState = S.RECEIVING) -> str:
    """A deployment in this state."""
    return ledger.create(REQUEST, state)[0].deployment_id


def at_once(work: Callable[[int], object]) -> list[object]:
    """Results of the same work in several threads that begin together."""
    start = threading.Barrier(THREADS)

    def begin(number: int) -> object:
        start.wait()
        return work(number)

    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(begin, range(THREADS)))


# -- states ----------------------------------------------------------------------------------------


def test_the_table_is_the_one_that_was_meant() -> None:
    """Every pair of states is listed or it is not."""
    assert {(one, two) for one, targets in ALLOWED.items() for two in targets} == TRANSITIONS
    assert set(ALLOWED) == set(S)


@pytest.mark.parametrize(("from_state", "to_state"), list(itertools.product(S, S)))
def test_a_state_changes_exactly_when_the_table_says_so(
    ledger: Ledger, from_state: HostState, to_state: HostState
) -> None:
    """A refused move names both states and changes nothing, neither state nor facts."""
    deployment_id = new(ledger, from_state)
    before = ledger.get(deployment_id)
    if to_state in ALLOWED[from_state]:
        assert ledger.move(deployment_id, to_state, host_port=80).state is to_state
        assert ledger.get(deployment_id).facts.host_port == 80
        return
    with pytest.raises(StateConflict, match=f"is {from_state}; it cannot become {to_state}") as refused:
        ledger.move(deployment_id, to_state, host_port=80)
    assert refused.value.actual is from_state
    assert ledger.get(deployment_id) == before


def test_settled_states_lead_nowhere_but_to_a_repaired_restore() -> None:
    """Nothing that is over begins again by itself."""
    assert {state for state in S if state.settled and ALLOWED[state]} == {S.RESTORE_FAILED}


def test_a_late_move_of_another_connection_is_refused(ledger: Ledger, other: Ledger) -> None:
    """Fencing: who read the state before the guardian settled it cannot move it on."""
    deployment_id = new(ledger, S.SWITCHING)
    assert other.get(deployment_id).state is S.SWITCHING
    ledger.move(deployment_id, S.RESTORING)
    ledger.move(deployment_id, S.RESTORED)
    with pytest.raises(StateConflict):
        other.move(deployment_id, S.VALIDATING, container_id="late")
    assert other.get(deployment_id).facts.container_id is None


def test_of_many_that_move_at_the_same_time_one_does(ledger: Ledger, other: Ledger) -> None:
    """A compare-and-set, not a read and a write."""
    deployment_id = new(ledger, S.VALIDATING)

    def move(number: int) -> bool:
        try:
            (ledger, other)[number % 2].move(deployment_id, S.KEPT if number % 4 < 2 else S.FAILED)
        except StateConflict:
            return False
        return True

    assert sorted(at_once(move), key=bool) == [False] * (THREADS - 1) + [True]


def test_a_move_without_undo_or_error_keeps_those_before(ledger: Ledger) -> None:
    """What brings the old container back survives every later move."""
    deployment_id = new(ledger, S.PREPARED)
    ledger.move(deployment_id, S.SWITCHING, undo=UNDO, previous_container_id="a" * 64)
    ledger.move(deployment_id, S.FAILED, error_code=ErrorCode.DEPLOYMENT_FAILED, error_message="boom")
    entry = ledger.move(deployment_id, S.RESTORING)
    assert entry.undo == UNDO
    assert (entry.error_code, entry.error_message) == (ErrorCode.DEPLOYMENT_FAILED, "boom")
    assert entry.facts.previous_container_id == "a" * 64


def test_facts_add_up_and_the_newest_wins(ledger: Ledger) -> None:
    """A note changes the facts that it names and no others, and not the state."""
    deployment_id = new(ledger, S.VALIDATING)
    ledger.note(deployment_id, container_id="new", container_running=False)
    entry = ledger.note(deployment_id, container_running=True, host_port=8080)
    assert entry.facts.model_dump(exclude_defaults=True) == {
        "container_id": "new",
        "container_running": True,
        "host_port": 8080,
    }
    assert entry.state is S.VALIDATING


@pytest.mark.parametrize("news", [{"contianer_id": "x"}, {"host_port": "no port"}])
def test_a_fact_that_is_misspelt_or_of_the_wrong_kind_is_refused(
    ledger: Ledger, news: dict[str, object]
) -> None:
    """It would be lost in silence, and with it a container that nobody takes away; nothing is moved."""
    deployment_id = new(ledger, S.READY)
    with pytest.raises(ValidationError):
        ledger.move(deployment_id, S.PREPARED, **news)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(ValidationError):
        ledger.note(deployment_id, **news)
    assert ledger.get(deployment_id).state is S.READY


def test_notes_of_two_connections_do_not_overwrite_each_other(ledger: Ledger, other: Ledger) -> None:
    """Reading and writing facts is one transaction."""
    deployment_id = new(ledger, S.VALIDATING)
    names = ["image_id", "container_id", "container_started_at", "previous_container_id", "previous_image_id",
             "log_tail", "host_port", "container_running"]  # fmt: skip

    def note(number: int) -> None:
        value = number if names[number] in {"host_port"} else "x"
        (ledger, other)[number % 2].note(
            deployment_id, **{names[number]: True if names[number] == "container_running" else value}
        )

    at_once(note)
    assert len(ledger.get(deployment_id).facts.model_dump(exclude_defaults=True)) == len(names)


def test_the_ids_of_an_image_are_told_newest_first_and_once(ledger: Ledger) -> None:
    """A containerd image store gives one image another id than its config digest, or several."""
    wanted, other = ("sha256:" + letter * 64 for letter in "ab")
    for image_id, digest in (
        ("old", wanted),
        ("new", wanted),
        ("else", other),
        (None, wanted),
        ("new", wanted),
    ):
        ledger.note(new(ledger, S.PREPARED), image_id=image_id, image_config_digest=digest)
    assert ledger.image_ids(wanted) == ["new", "old"]
    assert ledger.image_ids("sha256:" + "c" * 64) == []


# -- taking requests -------------------------------------------------------------------------------


def test_the_same_key_and_request_give_the_same_deployment(ledger: Ledger, other: Ledger) -> None:
    """Also on another connection, and also after the deployment went on."""
    entry, is_new = ledger.create(REQUEST, idempotency_key="k")
    ledger.move(entry.deployment_id, S.READY)
    again, again_new = other.create(REQUEST, idempotency_key="k")
    assert (is_new, again_new) == (True, False)
    assert (again.deployment_id, again.state) == (entry.deployment_id, S.READY)


def test_the_same_key_for_another_request_is_refused(ledger: Ledger) -> None:
    """And nothing is entered."""
    ledger.create(REQUEST, idempotency_key="k")
    with pytest.raises(IdempotencyConflict, match="'k'"):
        ledger.create(REQUEST.model_copy(update={"image_tag": "v2"}), idempotency_key="k")
    assert len(ledger.in_states(*S)) == 1


def test_requests_without_a_key_are_deployments_of_their_own(ledger: Ledger) -> None:
    """No key means no repetition."""
    assert new(ledger) != new(ledger)


def test_a_key_sent_many_times_at_once_makes_one_deployment(ledger: Ledger, other: Ledger) -> None:
    """Exactly one caller is told that it is new."""
    made = at_once(lambda number: (ledger, other)[number % 2].create(REQUEST, idempotency_key="k"))
    entries = [answer for answer in made if isinstance(answer, tuple)]
    assert len({entry.deployment_id for entry, _ in entries}) == 1
    assert sorted(is_new for _, is_new in entries) == [False] * (THREADS - 1) + [True]


def test_an_unknown_deployment_is_named(ledger: Ledger) -> None:
    """The id is in the message."""
    with pytest.raises(DeploymentUnknown, match="nowhere"):
        ledger.get("nowhere")
    with pytest.raises(DeploymentUnknown):
        ledger.move("nowhere", S.READY)


def test_entries_are_found_by_state_oldest_first(ledger: Ledger) -> None:
    """Several states at a time; none means none."""
    ids = [new(ledger, state) for state in (S.PREPARED, S.KEPT, S.FAILED)]
    assert [entry.deployment_id for entry in ledger.in_states(S.FAILED, S.PREPARED)] == [ids[0], ids[2]]
    assert ledger.in_states() == []


def test_a_late_package_and_its_offset_are_kept(ledger: Ledger, other: Ledger) -> None:
    """Another connection sees both."""
    package = PackageAnnouncement(size_bytes=10, blake3="0" * 64)
    deployment_id = new(ledger)
    ledger.set_package(deployment_id, package)
    ledger.set_upload_offset(deployment_id, 7)
    status = other.status(deployment_id)
    assert (status.package_bytes, status.upload_offset) == (10, 7)
    assert other.get(deployment_id).package == package


# -- journal and observations ----------------------------------------------------------------------


def test_a_step_that_never_ended_is_told_as_failed(ledger: Ledger) -> None:
    """A dead process leaves the intent without the fact, and the status says so."""
    deployment_id = new(ledger)
    done = ledger.begin_step(deployment_id, "deploy_container", Stage.DEPLOY)
    ledger.end_step(done, success=True, duration_ms=12)
    failed = ledger.begin_step(deployment_id, "stop_existing_container", Stage.DEPLOY)
    ledger.end_step(failed, success=False, duration_ms=3, message="no")
    ledger.begin_step(deployment_id, "start_container", Stage.DEPLOY)
    assert [
        (step.name, step.success, step.duration_ms, step.message) for step in ledger.operations(deployment_id)
    ] == [
        ("deploy_container", True, 12, ""),
        ("stop_existing_container", False, 3, "no"),
        ("start_container", False, 0, "begun, not ended"),
    ]


def test_a_step_of_an_unknown_deployment_is_no_step(ledger: Ledger) -> None:
    """The journal refers to deployments; the connection stays usable after the refusal."""
    with pytest.raises(sqlite3.IntegrityError):
        ledger.begin_step("nowhere", "deploy_container", Stage.DEPLOY)
    assert new(ledger)


def test_the_status_tells_attempts_and_gates_in_order(ledger: Ledger) -> None:
    """Nothing of another deployment is mixed in."""
    mine, another = new(ledger), new(ledger)
    now = datetime.now(UTC)
    attempts = [
        HealthAttempt(attempt=number, checked_at=now, status="failed", duration_ms=1) for number in (1, 2)
    ]
    gate = QualityGate(name="container_deployed", stage=Stage.DEPLOY, passed=True)
    for attempt in attempts:
        ledger.observe(mine, attempt)
    ledger.observe(mine, gate)
    ledger.observe(another, gate)
    status = ledger.status(mine)
    assert (status.health_attempts, status.gates) == (attempts, [gate])
    assert (status.state, status.workflow_id, status.container_name) == (S.RECEIVING, "wf-1", "web")


# -- replay store ----------------------------------------------------------------------------------


def test_a_nonce_is_spent_once_across_connections_and_threads(ledger: Ledger, other: Ledger) -> None:
    """Of callers at the same moment exactly one is let in."""
    spent = at_once(lambda number: (ledger, other)[number % 2].spend_nonce("n", 100.0, 400.0))
    assert sorted(spent, key=bool) == [False] * (THREADS - 1) + [True]


def test_a_nonce_is_remembered_until_it_expires_and_over_a_restart(tmp_path: Path) -> None:
    """Within its time it is refused by a new process as well; afterwards it takes no room."""
    path = tmp_path / "ledger.sqlite3"
    with closing(Ledger(path)) as ledger:
        assert ledger.spend_nonce("n", 100.0, 400.0)
    with closing(Ledger(path)) as ledger:
        assert not ledger.spend_nonce("n", 400.0, 700.0)
        assert ledger.spend_nonce("n", 400.1, 700.0)


# -- processes -------------------------------------------------------------------------------------


def _spend_and_move(path: Path, deployment_id: str) -> tuple[bool, bool]:
    with closing(Ledger(path)) as ledger:
        spent = ledger.spend_nonce("n", 0.0, 1.0)
        try:
            ledger.move(deployment_id, S.PREPARED)
        except StateConflict:
            return spent, False
        return spent, True


def test_processes_that_open_a_ledger_at_the_same_time_agree(tmp_path: Path) -> None:
    """Daemon and flow start together after a boot: nobody finds the ledger locked, one of them moves."""
    path = tmp_path / "ledger.sqlite3"
    with closing(Ledger(path)) as ledger:
        deployment_id = new(ledger, S.READY)
    with ProcessPoolExecutor(4, mp_context=get_context("forkserver")) as processes:
        done = [processes.submit(_spend_and_move, path, deployment_id) for _ in range(8)]
        answers = [each.result(30) for each in done]
    assert sorted(spent for spent, _ in answers) == [False] * 7 + [True]
    assert sorted(moved for _, moved in answers) == [False] * 7 + [True]


def test_connections_that_make_a_new_ledger_at_the_same_time_all_open_it(tmp_path: Path) -> None:
    """The first start of daemon and flow on a new host."""
    for attempt in range(5):
        path = tmp_path / str(attempt) / "ledger.sqlite3"

        def open_it(_: int, path: Path = path) -> str:
            with closing(Ledger(path)) as ledger:
                return new(ledger)

        assert len(set(at_once(open_it))) == THREADS
