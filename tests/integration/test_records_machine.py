"""Rival writers of one workflow: whatever they believe, the records tell the story of one writer.

All 81 pairs of states, one writer at a time, are in `test_records.py`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import count, cycle, pairwise
from typing import Any, Literal

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

from receiver.contract import ErrorCode, HealthAttempt, Stage
from tasks.events import events_for
from tasks.records import Facts, NewWorkflow, Records, StageResult, TransitionRow, WorkflowRecord
from tasks.states import TRANSITIONS, TRIGGERS, WorkflowState, fold
from tests.integration.rivals import (
    DONE,
    Change,
    Heard,
    change,
    explained,
    records_process,
    told_as_first_seen,
)

Where = Literal["one process", "processes"]
RIVALS = 3
NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
S = WorkflowState
# Onward first, as the order of the states has it.
NEXT = {state: [target for target in S if (state, target) in TRANSITIONS] for state in S}
_ONWARD = [S.PENDING, S.PACKAGING, S.TRANSFERRING, S.DEPLOYING, S.VALIDATING]
WAYS = [*(_ONWARD[:steps] for steps in range(1, 6)), [*_ONWARD[:4], S.ROLLING_BACK]]
ROUNDS_AFTER_THE_END = 2
# A race that is run again may end otherwise, so there is nothing to shrink by.
SETTINGS = settings(
    derandomize=True,
    deadline=None,
    phases=[Phase.generate],
    stateful_step_count=10,
    suppress_health_check=list(HealthCheck),
)

ATTEMPTS = st.builds(
    HealthAttempt,
    attempt=st.integers(1, 9),
    checked_at=st.just(NOW),
    status=st.sampled_from(["passed", "failed"]),
    duration_ms=st.just(1),
)
STAGES = st.builds(
    StageResult,
    stage=st.sampled_from(Stage),
    success=st.booleans(),
    duration_ms=st.integers(1, 9),
    error_code=st.none() | st.sampled_from(ErrorCode),
    error_message=st.none() | st.just("no space"),
    started_at=st.just(NOW),
    completed_at=st.just(NOW),
)
FACTS = st.builds(
    Facts,
    container_id=st.none() | st.sampled_from(["c-1", "c-2"]),
    error_code=st.none() | st.sampled_from(ErrorCode),
    reason=st.none() | st.just("as told"),
    retry_count=st.none() | st.integers(0, 3),
    rollback_result=st.none() | st.just({"success": True, "rollback_duration_ms": 90}),
    deployment_metrics=st.none() | st.dictionaries(st.sampled_from("ab"), st.integers(0, 9)),
    stage=st.none() | STAGES,
    health_attempts=st.lists(ATTEMPTS, max_size=2).map(tuple),
)


@dataclass(frozen=True)
class Wish:
    """What one rival wants; which state that is depends on where it believes the workflow to be."""

    rival: int
    way: int
    facts: Facts

    def from_state(self, state: WorkflowState) -> tuple[WorkflowState, WorkflowState]:
        """A transition of the table, or any pair from a state that nothing leads out of."""
        targets = NEXT[state] or list(S)
        return state, targets[self.way % len(targets)]


# Mostly onward, or few workflows would come far.
WISHES = st.builds(Wish, st.integers(0, RIVALS - 1), st.sampled_from([0, 0, 0, 1, 2]), FACTS)
SEVERAL_WISHES = st.lists(WISHES, min_size=2, max_size=RIVALS)


@dataclass(frozen=True)
class Story:
    """All that the records hold of one workflow; as a model, what a single writer would have made of it."""

    record: WorkflowRecord
    stages: Mapping[Stage, StageResult] = field(default_factory=dict)
    transitions: tuple[TransitionRow, ...] = ()
    events: tuple[Mapping[str, Any], ...] = ()

    def after(self, call: Change) -> tuple[str, Story]:
        """What the pure table, `fold` and `events_for` make of the call."""
        state = self.record.current_state
        pair = (call.from_state or state, call.to_state or state)
        refusal = self._refusal(call)
        if refusal:
            return refusal, self
        new_events = events_for(self.record, *pair, call.facts, at=call.at, new_id=lambda: "")
        told = tuple(_without_id(event.message()) for event in new_events)
        record = fold(self.record, pair[1], call.facts, call.at)
        stage = {call.facts.stage.stage: call.facts.stage} if call.facts.stage else {}
        return DONE, Story(
            replace(record, event_sequence=len(self.events) + len(told)),
            {**self.stages, **stage},
            self.transitions + self._history(call),
            self.events + told,
        )

    def _refusal(self, call: Change) -> str | None:
        state = self.record.current_state
        if call.from_state is None:
            return f"WorkflowEnded {state}" if state.terminal else None
        if (call.from_state, call.to_state) not in TRANSITIONS:
            return "TransitionRefused"
        return f"StateConflict {state}" if call.from_state is not state else None

    def _history(self, call: Change) -> tuple[TransitionRow, ...]:
        if call.from_state is None or call.to_state is None:
            return ()
        reason = call.facts.reason or TRIGGERS[call.from_state, call.to_state]
        number = len(self.transitions) + 1
        return (
            TransitionRow(
                workflow_id=call.workflow_id,
                sequence=number,
                from_state=call.from_state,
                to_state=call.to_state,
                reason=reason,
                at=call.at,
            ),
        )

    def leads_to(self, found: Story) -> bool:
        """History only grows."""
        return (
            found.transitions[: len(self.transitions)] == self.transitions
            and found.events[: len(self.events)] == self.events
        )


def _without_id(message: str) -> Mapping[str, Any]:
    told: dict[str, Any] = json.loads(message)
    del told["envelope"]["event_id"]
    return told


@dataclass(frozen=True)
class Arena:
    """A database, one who reads, and rivals who write; all of it outlives the single run of the machine."""

    loop: asyncio.Runner
    reader: Records
    rivals: Sequence[Callable[[Change], Awaitable[str]]]
    numbers: Iterator[int] = field(default_factory=count)
    failures: list[Exception] = field(default_factory=list)

    def create(self) -> WorkflowRecord:
        """A new workflow in PENDING."""
        workflow_id = f"w-{next(self.numbers)}"
        new = NewWorkflow(workflow_id=workflow_id, container_name="shop", remote_host="target")
        return self.loop.run(self.reader.create(new, at=NOW))

    def story(self, workflow_id: str) -> Story:
        """What the records hold now; the outbox in the order in which the relay sends it."""
        return self.loop.run(self._story(workflow_id))

    async def _story(self, workflow_id: str) -> Story:
        rows = sorted(await self.reader.outbox(workflow_id), key=lambda row: row.id)
        return Story(
            await self.reader.get(workflow_id),
            {result.stage: result for result in await self.reader.stages(workflow_id)},
            tuple(await self.reader.transitions(workflow_id)),
            tuple(_without_id(row.message) for row in rows),
        )

    def all_at_once(self, calls: Sequence[tuple[int, Change]]) -> list[Heard]:
        """What each rival hears that makes its call while the others make theirs."""

        async def meet() -> list[str]:
            return list(await asyncio.gather(*(self.rivals[rival](call) for rival, call in calls)))

        answers = self.loop.run(meet())
        return [Heard(call, answer) for (_, call), answer in zip(calls, answers, strict=True)]


@contextmanager
def arena(url: str, where: Where) -> Iterator[Arena]:
    """Rivals with an engine each in this process, or in a process each."""
    with asyncio.Runner() as loop, ExitStack() as opened:

        def open_records() -> Records:
            records = loop.run(Records.open(url))
            opened.callback(lambda: loop.run(records.close()))
            return records

        reader = open_records()
        rivals: list[Callable[[Change], Awaitable[str]]]
        if where == "processes":
            rivals = [opened.enter_context(records_process(url)).change for _ in range(RIVALS)]
        else:
            rivals = [partial(change, open_records()) for _ in range(RIVALS)]
        yield Arena(loop, reader, rivals)


class RivalWriters(RuleBasedStateMachine):
    """A workflow, and rivals who move and note it at the same time; when it has ended, another one.

    What is drawn never depends on who won: Hypothesis has to see the same choices in every run.
    """

    def __init__(self, arena: Arena) -> None:
        """The first workflow begins once Hypothesis has drawn how far it has come."""
        super().__init__()
        self.arena = arena
        self.seconds = count(1)
        self.found: Story
        self.rounds_after_the_end: int

    @property
    def state(self) -> WorkflowState:
        """Where the workflow was found last."""
        return self.found.record.current_state

    def call(self, pair: tuple[WorkflowState, WorkflowState] | None, facts: Facts = Facts()) -> Change:  # noqa: B008 - frozen
        at = NOW + timedelta(seconds=next(self.seconds))
        from_state, to_state = pair or (None, None)
        return Change(self.found.record.workflow_id, from_state, to_state, facts, at)

    def teardown(self) -> None:
        """Keep the failure, if it is one that ends this run."""
        if isinstance(failure := sys.exception(), Exception):
            self.arena.failures.append(failure)

    def meet(self, *calls: tuple[int, Change]) -> list[Heard]:
        """Make the calls at once."""
        before, heard = self.found, self.arena.all_at_once(calls)
        self.look([[one] for one in heard])
        for (rival, _), one in zip(calls, heard, strict=True):
            self._learn(rival, one)
        if before.record.current_state.terminal:
            assert self.found == before
            self.rounds_after_the_end += 1
            if self.rounds_after_the_end == ROUNDS_AFTER_THE_END:
                self.begin()
        return heard

    def look(self, heard: list[list[Heard]]) -> None:
        """Read the records; some order of the calls has to explain every answer and every row."""
        before, self.found = self.found, self.arena.story(self.found.record.workflow_id)
        told = "\n".join(f"{one.answer}: {one.call}" for calls in heard for one in calls)
        assert explained(before, heard, self.found), f"{before}\n{told}\n{self.found}"

    def _learn(self, rival: int, heard: Heard) -> None:
        if heard.answer == DONE and heard.call.to_state:
            self.believed[rival] = heard.call.to_state
        elif heard.answer is not None and " " in heard.answer:
            self.believed[rival] = S(heard.answer.split()[1])

    @initialize(ways=st.permutations(WAYS))
    def it_has_come_some_way(self, ways: list[list[WorkflowState]]) -> None:
        self.ways = cycle(ways)
        self.begin()

    def begin(self) -> None:
        """A new workflow that one rival brings some way; the others believe it to be in PENDING."""
        self.found = Story(self.arena.create())
        self.rounds_after_the_end = 0
        way = next(self.ways)
        calls = [self.call(pair) for pair in pairwise(way)]
        self.look([[heard for call in calls for heard in self.arena.all_at_once([(0, call)])]])
        assert self.state is way[-1]
        self.believed = [way[-1], *[S.PENDING] * (RIVALS - 1)]

    @rule(wishes=SEVERAL_WISHES)
    def rivals_move_it_from_one_state(self, wishes: list[Wish]) -> None:
        """Exactly one wins, and the others hear what it made of the workflow."""
        from_state = self.state
        heard = self.meet(*((w.rival, self.call(w.from_state(from_state), w.facts)) for w in wishes))
        if from_state.terminal:
            assert {one.answer for one in heard} == {"TransitionRefused"}
            return
        (winner,) = [one for one in heard if one.answer == DONE]
        assert [one.answer for one in heard if one is not winner] == [
            f"StateConflict {winner.call.to_state}" for _ in wishes[1:]
        ]

    @rule(wishes=SEVERAL_WISHES)
    def each_goes_on_from_where_it_believes_it_to_be(self, wishes: list[Wish]) -> None:
        self.meet(*((w.rival, self.call(w.from_state(self.believed[w.rival]), w.facts)) for w in wishes))

    @rule(wishes=SEVERAL_WISHES)
    def each_runs_a_step_ahead_of_the_one_before(self, wishes: list[Wish]) -> None:
        calls, state = [], self.state
        for wish in wishes:
            calls.append((wish.rival, self.call(wish.from_state(state), wish.facts)))
            state = wish.from_state(state)[1]
        self.meet(*calls)

    @rule(notes=SEVERAL_WISHES, wish=WISHES)
    def notes_meet_a_move(self, notes: list[Wish], wish: Wish) -> None:
        move = (wish.rival, self.call(wish.from_state(self.state), wish.facts))
        self.meet(*((note.rival, self.call(None, note.facts)) for note in notes), move)

    @rule(pair=st.tuples(st.sampled_from(S), st.sampled_from(S)), wish=WISHES)
    def one_tries_any_pair_of_states(self, pair: tuple[WorkflowState, WorkflowState], wish: Wish) -> None:
        self.meet((wish.rival, self.call(pair, wish.facts)))

    @invariant()
    def the_history_is_a_walk_along_the_table(self) -> None:
        rows = self.found.transitions
        assert [row.sequence for row in rows] == list(range(1, len(rows) + 1))
        walk = [S.PENDING, *(row.to_state for row in rows)]
        assert [(row.from_state, row.to_state) for row in rows] == list(pairwise(walk))
        assert set(pairwise(walk)) <= TRANSITIONS
        assert walk[-1] is self.state

    @invariant()
    def the_events_are_numbered_without_gaps_in_the_order_of_sending(self) -> None:
        numbers = [event["envelope"]["sequence"] for event in self.found.events]
        assert numbers == list(range(1, self.found.record.event_sequence + 1))


@pytest.mark.parametrize(("where", "runs"), [("one process", 12), ("processes", 6)])
def test_rival_writers_leave_the_story_of_one(records_url: str, where: Where, runs: int) -> None:
    """Each change is whole or not there, one of several from the same state wins, and no event is lost."""
    with arena(records_url, where) as opened, told_as_first_seen(opened.failures):
        machine = partial(RivalWriters, opened)
        run_state_machine_as_test(machine, settings=settings(SETTINGS, max_examples=runs))  # type: ignore[arg-type]  # a function will do
