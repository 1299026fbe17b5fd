"""A host's ledger and the processes that die at work on it: each change is whole or not there.

All 144 pairs of states, one writer at a time, are in `tests/unit/test_ledger.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from itertools import count, cycle
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from receiver.contract import (
    DeployRequest,
    ErrorCode,
    HealthAttempt,
    HostFacts,
    HostState,
    OperationResult,
    QualityGate,
    Stage,
)
from receiver.ledger import TRANSITIONS, Ledger, Undo
from receiver.operations import left_unfinished
from tests.integration.rivals import (
    DONE,
    Action,
    Begin,
    Death,
    End,
    Heard,
    LedgerProcess,
    Move,
    Note,
    Observe,
    Script,
    explained,
    ledger_process,
    take,
    told_as_first_seen,
)

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
S = HostState
REQUEST = DeployRequest(container_name="web", image_tag="v1", workflow_id="wf-1")
# Onward first, as the order of the states has it.
NEXT = {state: [target for target in S if (state, target) in TRANSITIONS] for state in S}
_BEGUN = [S.READY, S.PREPARED, S.SWITCHING, S.VALIDATING]
WAYS = [
    [S.RECEIVING],
    *(_BEGUN[:steps] for steps in range(1, 5)),
    [*_BEGUN, S.FAILED],
    [*_BEGUN, S.FAILED, S.RESTORING],
]
ROUNDS_SETTLED = 2
STEPS = ("step", "move", "note", "attempt", "gate")
RESTORES = (S.RESTORED, S.RESTORE_FAILED)
# A death that is run again may come a write later, so there is nothing to shrink by.
SETTINGS = settings(
    derandomize=True,
    deadline=None,
    max_examples=20,
    phases=[Phase.generate],
    stateful_step_count=10,
    suppress_health_check=list(HealthCheck),
)


@dataclass(frozen=True)
class Known:
    """All that the ledger says of one deployment; as a model, what a single writer would have made of it."""

    state: HostState
    facts: HostFacts = field(default_factory=HostFacts)
    undo: Undo = field(default_factory=Undo)
    error: tuple[ErrorCode | None, str | None] = (None, None)
    steps: tuple[tuple[str, bool, int, str], ...] = ()
    attempts: tuple[HealthAttempt, ...] = ()
    gates: tuple[QualityGate, ...] = ()

    def after(self, action: Action) -> tuple[str, Known]:
        """What the table and the docstrings of the ledger make of it."""
        match action:
            case Move():
                return self._moved(action)
            case Note(facts):
                return DONE, replace(self, facts=self.facts.model_copy(update=facts))
            case Begin(name):
                return DONE, replace(self, steps=(*self.steps, (name, False, 0, "begun, not ended")))
            case End():
                return DONE, replace(self, steps=tuple(_ended(step, action) for step in self.steps))
            case Observe(observation):
                return DONE, self._observed(observation)

    def _moved(self, move: Move) -> tuple[str, Known]:
        if (self.state, move.to_state) not in TRANSITIONS:
            return f"StateConflict {self.state}", self
        return DONE, replace(
            self,
            state=move.to_state,
            facts=self.facts.model_copy(update=move.facts),
            undo=move.undo or self.undo,
            error=(move.error_code or self.error[0], move.error_message or self.error[1]),
        )

    def _observed(self, observation: HealthAttempt | QualityGate) -> Known:
        if isinstance(observation, HealthAttempt):
            return replace(self, attempts=(*self.attempts, observation))
        return replace(self, gates=(*self.gates, observation))

    def leads_to(self, found: Known) -> bool:
        """Journal and observations only grow."""
        names, names_found = [step[0] for step in self.steps], [step[0] for step in found.steps]
        return (
            names_found[: len(names)] == names
            and found.attempts[: len(self.attempts)] == self.attempts
            and found.gates[: len(self.gates)] == self.gates
        )


def _ended(step: tuple[str, bool, int, str], end: End) -> tuple[str, bool, int, str]:
    if step[0] != end.name:
        return step
    return (end.name, end.success, end.duration_ms, f"end of {end.name}")


def _told(step: OperationResult) -> tuple[str, bool, int, str]:
    return (step.name, step.success, step.duration_ms, step.message)


def known(ledger: Ledger, deployment_id: str) -> Known:
    """What a ledger says."""
    entry, status = ledger.get(deployment_id), ledger.status(deployment_id)
    assert (entry.state, entry.facts) == (status.state, status.facts)
    return Known(
        entry.state,
        entry.facts,
        entry.undo or Undo(),
        (entry.error_code, entry.error_message),
        tuple(_told(step) for step in status.operations),
        tuple(status.health_attempts),
        tuple(status.gates),
    )


def move_to(state: HostState, mark: int) -> Move:
    """The move with the news that `receiver.operations` has by then, told apart by `mark`."""
    container, previous = f"container-{mark}", f"previous-{mark}"
    restart_policy = {"Name": "always", "MaximumRetryCount": 0}
    undo = Undo(previous, restart_policy, was_running=True, stop_began_at=str(NOW))
    moves = {
        S.PREPARED: Move(S.PREPARED, {"image_id": f"image-{mark}", "container_id": container}),
        S.SWITCHING: Move(S.SWITCHING, {"previous_container_id": previous}, undo),
        S.VALIDATING: Move(S.VALIDATING, {"container_started_at": container, "host_port": mark}),
        S.MOVING: Move(S.MOVING, {"previous_container_id": previous}, undo),
        S.KEPT: Move(S.KEPT, {"log_tail": f"tail {mark}"}),
        S.FAILED: Move(S.FAILED, {"log_tail": f"tail {mark}"}, None, ErrorCode.TIMEOUT, f"error {mark}"),
        S.RESTORED: Move(S.RESTORED, {"previous_container_restored": True, "rollback_duration_ms": mark}),
        S.RESTORE_FAILED: Move(
            S.RESTORE_FAILED, {"rollback_duration_ms": mark}, None, ErrorCode.ROLLBACK_FAILED, f"error {mark}"
        ),
    }
    return moves.get(state, Move(state))


@dataclass(frozen=True)
class Wish:
    """One thing that a process wants to do; which state it moves to depends on where it believes to be."""

    kind: str
    way: int

    def target(self, state: HostState) -> HostState:
        """A transition of the table; from a state that nothing leads out of, any."""
        targets = NEXT[state] or list(S)
        return targets[self.way % len(targets)]


# Mostly onward, or few deployments would come far.
WISHES = st.builds(Wish, st.sampled_from(STEPS), st.sampled_from([0, 0, 0, 0, 1, 2]))
PLANS = st.lists(WISHES, min_size=1, max_size=3)
# A move is five statements, a whole step fourteen.
DEATHS = st.builds(Death, st.integers(0, 20), st.just(0) | st.integers(1, 2_000))
RIVALS = 2


@dataclass(frozen=True)
class Arena:
    """Processes that outlive the single run of the machine, and folders for its ledgers."""

    folder: Path
    processes: Sequence[LedgerProcess]
    numbers: Iterator[int] = field(default_factory=count)
    failures: list[Exception] = field(default_factory=list)

    def new_path(self) -> Path:
        """Where no ledger is yet."""
        return self.folder / str(next(self.numbers)) / "ledger.sqlite3"


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    """Two processes."""
    with ExitStack() as started:
        processes = [started.enter_context(ledger_process()) for _ in range(RIVALS)]
        yield Arena(tmp_path, processes)


class DyingProcesses(RuleBasedStateMachine):
    """A deployment, the daemon with its ledger, and processes with theirs that die now and then.

    When it is settled there is another one, in the same ledger. What is drawn never depends on who won or
    what a death left: Hypothesis has to see the same choices in every run.
    """

    def __init__(self, arena: Arena) -> None:
        """A ledger of its own for every run."""
        super().__init__()
        self.arena = arena
        self.path = arena.new_path()
        self.marks = count(1)
        self.daemon: Ledger | None = None

    @initialize(ways=st.permutations(WAYS), death=DEATHS)
    def one_dies_while_it_makes_the_ledger(self, ways: list[list[HostState]], death: Death) -> None:
        self.path.parent.mkdir()
        self.arena.processes[0].start(Script(self.path, "", (), replace(death, statement=0)))
        assert self.arena.processes[0].finish() == []
        self.daemon, self.ways = Ledger(self.path), cycle(ways)
        self.settled: dict[str, Known] = {}
        self.begin()

    def begin(self) -> None:
        """A new deployment, which has come some way."""
        way, self.rounds_settled = next(self.ways), 0
        with closing(Ledger(self.path)) as ledger:
            self.deployment_id = ledger.create(REQUEST, way[0])[0].deployment_id
            for state in way[1:]:
                move_to(state, next(self.marks)).take(ledger, self.deployment_id, {})
            self.found = known(ledger, self.deployment_id)

    def teardown(self) -> None:
        """Keep the failure, if it is one that ends this run; the processes let go with their next script."""
        if isinstance(failure := sys.exception(), Exception):
            self.arena.failures.append(failure)
        if self.daemon is not None:
            self.daemon.close()

    # -- what is done ------------------------------------------------------------------------------

    def actions(self, plan: list[Wish]) -> tuple[Action, ...]:
        """The plan of a process that believes that it is alone."""
        state, actions = self.found.state, list[Action]()
        for wish in plan:
            target = wish.target(state)
            actions += self._actions(wish.kind, target, next(self.marks))
            state = target if wish.kind in {"step", "move"} else state
        return tuple(actions)

    def _actions(self, kind: str, target: HostState, mark: int) -> list[Action]:
        gate = Observe(QualityGate(name=f"gate {mark}", stage=Stage.DEPLOY, passed=True))
        attempt = HealthAttempt(attempt=mark, checked_at=NOW, status="failed", duration_ms=1)
        name = f"step {mark}"
        actions: dict[str, list[Action]] = {
            "step": [Begin(name), move_to(target, mark), gate, End(name, mark % 2 == 0, mark)],
            "move": [move_to(target, mark)],
            "note": [Note({"service_interruption_ms": mark})],
            "attempt": [Observe(attempt), Note({"health_endpoint_accessible": mark % 2 == 0})],
            "gate": [gate],
        }
        return actions[kind]

    def meet(self, plans: Sequence[list[Wish]], deaths: Sequence[Death | None]) -> list[list[Heard]]:
        """Each process takes its plan at the same time; the last plan is the daemon's, if it is there."""
        scripts = [
            Script(self.path, self.deployment_id, self.actions(plan), death)
            for plan, death in zip(plans, deaths, strict=True)
        ]
        working = list(zip(self.arena.processes, scripts, strict=False))
        for process, script in working:
            process.start(script)
        heard = []
        if len(scripts) > RIVALS:
            assert self.daemon is not None
            answers = list(take(self.daemon, scripts[-1]))
            heard.append([Heard(*pair) for pair in zip(scripts[-1].actions, answers, strict=True)])
        heard += [process.finish() for process, _ in working]
        self.look(heard)
        return heard

    def look(self, heard: list[list[Heard]]) -> None:
        """Open the ledger anew; some order of the actions has to explain every answer and every row."""
        before = self.found
        with closing(Ledger(self.path)) as fresh:
            self.found = known(fresh, self.deployment_id)
            assert [row[0] for row in fresh._db.execute("PRAGMA integrity_check")] == ["ok"]
            assert len(fresh.in_states(*S)) == len(self.settled) + 1
            assert {each: known(fresh, each) for each in self.settled} == self.settled
        told = "\n".join("; ".join(f"{one.answer}: {one.call}" for one in calls) for calls in heard)
        assert explained(before, heard, self.found), f"{before}\n{told}\n{self.found}"
        if not NEXT[before.state]:
            assert (self.found.state, self.found.undo) == (before.state, before.undo)
        self.rounds_settled += before.state.settled
        if self.rounds_settled >= ROUNDS_SETTLED and self.found.state.settled:  # a restore may be tried again
            self.settled[self.deployment_id] = self.found
            self.begin()

    @rule(number=st.integers(0, RIVALS - 1), plan=PLANS, death=DEATHS)
    def one_dies_at_work(self, number: int, plan: list[Wish], death: Death) -> None:
        process = self.arena.processes[number]
        process.start(Script(self.path, self.deployment_id, self.actions(plan), death))
        self.look([process.finish()])

    @rule(plans=st.tuples(PLANS, PLANS, PLANS), death=st.none() | DEATHS)
    def all_work_at_the_same_time_and_one_may_die(
        self, plans: tuple[list[Wish], ...], death: Death | None
    ) -> None:
        self.meet(plans, (None, death, None))

    @rule(way=st.sampled_from([0, 0, 1, 2]))
    def all_move_it_from_one_state(self, way: int) -> None:
        """Exactly one wins: nothing leads from a state to itself, nor back."""
        before = self.found.state
        heard = self.meet([[Wish("move", way)]] * 3, [None] * 3)
        answers = [str(calls[0].answer) for calls in heard]
        after = heard[0][0].call.to_state if NEXT[before] else before
        assert sorted(set(answers)) == [f"StateConflict {after}", *([DONE] if NEXT[before] else [])]
        assert answers.count(DONE) == bool(NEXT[before])

    @rule(plans=st.tuples(PLANS, PLANS), deaths=st.tuples(DEATHS, DEATHS))
    def the_host_reboots(self, plans: tuple[list[Wish], ...], deaths: tuple[Death, ...]) -> None:
        """Nobody has the ledger open when it is opened next, and nobody has closed it properly."""
        assert self.daemon is not None
        self.daemon.close()
        self.meet(plans, deaths)
        self.daemon = Ledger(self.path)

    @rule(end=st.sampled_from(RESTORES), late=st.permutations(list(S)))
    def the_guardian_settles_it_and_the_dead_come_late(self, end: HostState, late: list[HostState]) -> None:
        """What was left unfinished is found, and once it is settled no late move is taken."""
        assert self.daemon is not None
        for entry in left_unfinished(self.daemon):
            is_new = entry.state is not S.RESTORING
            for target in (*([S.RESTORING] if is_new else []), end):
                self.daemon.move(entry.deployment_id, target)
        self.found = known(self.daemon, self.deployment_id)
        state = self.found.state
        if not state.settled:
            assert (state, self.found.steps) in {(S.RECEIVING, ()), (S.READY, ())}
            return
        moves = tuple(move_to(state, next(self.marks)) for state in late if state is not S.RESTORING)
        for process in self.arena.processes:
            process.start(Script(self.path, self.deployment_id, moves))
        heard = [process.finish() for process in self.arena.processes]
        self.look(heard)
        assert {one.answer for calls in heard for one in calls} == {f"StateConflict {state}"}

    # -- what always holds -------------------------------------------------------------------------

    @invariant()
    def what_undoes_it_is_there_before_it_is_needed(self) -> None:
        facts, undo = self.found.facts, self.found.undo
        if self.found.state in {*_BEGUN, S.MOVING, S.DRAINING, S.KEPT} - {S.READY}:
            assert facts.container_id is not None
        if self.found.state in {S.SWITCHING, S.MOVING, S.DRAINING}:
            assert undo.previous_container_id is not None
        assert facts.previous_container_id == undo.previous_container_id
        assert (undo.restart_policy is None) == (undo.previous_container_id is None)

    @invariant()
    def what_came_together_stays_together(self) -> None:
        facts, (code, message) = self.found.facts, self.found.error
        assert (facts.image_id or "").removeprefix("image-") == (facts.container_id or "").removeprefix(
            "container-"
        )
        assert (code is None) == (message is None)
        assert (facts.host_port is None) == (facts.container_started_at is None)


def test_dying_processes_leave_whole_changes_only(arena: Arena) -> None:
    """State, facts and undo change together or not at all; answers hold; the dead are fenced off."""
    machine = partial(DyingProcesses, arena)
    with told_as_first_seen(arena.failures):
        run_state_machine_as_test(machine, settings=SETTINGS)  # type: ignore[arg-type]  # a function will do
