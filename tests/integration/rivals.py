"""Who writes at the same time in the state machine tests, and whether some order of the calls explains it.

Writers of the records in processes of their own; writers of a ledger in processes that die as they are told.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock
from typing import Any, Protocol, Self, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from receiver.contract import ErrorCode, HealthAttempt, HostState, QualityGate, Stage
from receiver.ledger import Ledger, Undo
from receiver.ledger import StateConflict as LedgerConflict
from tasks.records import Facts, Records, StateConflict, TransitionRefused, WorkflowState

DONE = "done"
ANSWER_SECONDS = 120
_processes = get_context("forkserver")


# -- one order -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heard:
    """A call and what its caller heard; None when the caller died before the answer."""

    call: Any
    answer: str | None


class Model(Protocol):
    """What one writer alone would have."""

    def after(self, call: Any) -> tuple[str, Self]:
        """The answer to this call, and what is there then."""

    def leads_to(self, found: Self) -> bool:
        """False when no further call makes this what was found."""


M = TypeVar("M", bound=Model)


def explained(before: M, rivals: Sequence[Sequence[Heard]], found: M) -> bool:
    """True when the calls, one after the other and each whole, give these answers and what was found.

    Each rival's own calls stay in their order. A call without an answer happened, or did not.
    """
    waiting = [(before, tuple(tuple(calls) for calls in rivals))]
    seen: list[tuple[M, tuple[tuple[Heard, ...], ...]]] = []
    while waiting:
        branch = waiting.pop()
        if branch in seen:
            continue
        seen.append(branch)
        if branch[0] == found and not any(branch[1]):
            return True
        waiting += [(model, rest) for model, rest in _continuations(*branch) if model.leads_to(found)]
    return False


def _continuations(
    before: M, rivals: tuple[tuple[Heard, ...], ...]
) -> Iterator[tuple[M, tuple[tuple[Heard, ...], ...]]]:
    for number, calls in enumerate(rivals):
        if calls:
            first, rest = calls[0], (*rivals[:number], calls[1:], *rivals[number + 1 :])
            answer, after = before.after(first.call)
            if first.answer is None:
                yield before, rest
            if first.answer in {None, answer}:
                yield after, rest


@contextmanager
def told_as_first_seen(failures: Sequence[Exception]) -> Iterator[None]:
    """Raise the first of `failures` when the block fails: run again, a race may end well.

    Hypothesis would only say that the test is flaky.
    """
    try:
        yield
    except Exception as exc:
        raise (failures[0] if failures else exc) from exc


# -- writers of the records ------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """One call of `Records.advance`, or of `Records.note` where no state is named."""

    workflow_id: str
    from_state: WorkflowState | None
    to_state: WorkflowState | None
    facts: Facts
    at: datetime


async def change(records: Records, call: Change) -> str:
    """`DONE`, or the refusal's name and the state that it tells."""
    try:
        if call.from_state is None or call.to_state is None:
            await records.note(call.workflow_id, call.facts, at=call.at)
        else:
            await records.advance(call.workflow_id, call.from_state, call.to_state, call.facts, at=call.at)
    except StateConflict as refusal:
        return f"{type(refusal).__name__} {refusal.actual}"
    except TransitionRefused:
        return TransitionRefused.__name__
    except SQLAlchemyError as failure:  # which no model expects
        return repr(failure)
    return DONE


class RecordsProcess:
    """Records in a process of their own, as another flow run has them."""

    def __init__(self, connection: Connection) -> None:
        """For `records_process`."""
        self._connection, self._turn = connection, Lock()

    async def change(self, call: Change) -> str:
        """`change`, over there."""
        return await asyncio.to_thread(self._ask, call)

    def _ask(self, call: Change) -> str:
        with self._turn:
            self._connection.send(call)
            return str(_receive(self._connection))


@contextmanager
def records_process(url: str) -> Iterator[RecordsProcess]:
    """A process that has the records open; it ends with the block."""
    with _process(_serve_records, url) as connection:
        assert _receive(connection) == DONE
        yield RecordsProcess(connection)


def _serve_records(url: str, connection: Connection) -> None:
    asyncio.run(_change_on_request(url, connection))


async def _change_on_request(url: str, connection: Connection) -> None:
    async with await Records.open(url) as records:
        connection.send(DONE)
        for call in _requests(connection):
            connection.send(await change(records, call))


# -- writers of a ledger ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Move:
    """`Ledger.move`, with what an operation knows by then."""

    to_state: HostState
    facts: dict[str, Any] = field(default_factory=dict)
    undo: Undo | None = None
    error_code: ErrorCode | None = None
    error_message: str | None = None

    def take(self, ledger: Ledger, deployment_id: str, _: dict[str, int]) -> None:
        """Raises `StateConflict`."""
        ledger.move(
            deployment_id,
            self.to_state,
            error_code=self.error_code,
            error_message=self.error_message,
            undo=self.undo,
            **self.facts,
        )


@dataclass(frozen=True)
class Note:
    """`Ledger.note`."""

    facts: dict[str, Any]

    def take(self, ledger: Ledger, deployment_id: str, _: dict[str, int]) -> None:
        """Never refused."""
        ledger.note(deployment_id, **self.facts)


@dataclass(frozen=True)
class Begin:
    """`Ledger.begin_step`; the name is used once."""

    name: str

    def take(self, ledger: Ledger, deployment_id: str, journal: dict[str, int]) -> None:
        """Remember the step's number, as an operation does."""
        journal[self.name] = ledger.begin_step(deployment_id, self.name, Stage.DEPLOY)


@dataclass(frozen=True)
class End:
    """`Ledger.end_step` of a step that the same script began."""

    name: str
    success: bool
    duration_ms: int

    def take(self, ledger: Ledger, _: str, journal: dict[str, int]) -> None:
        """Never refused."""
        message = f"end of {self.name}"
        ledger.end_step(
            journal[self.name], success=self.success, duration_ms=self.duration_ms, message=message
        )


@dataclass(frozen=True)
class Observe:
    """`Ledger.observe`."""

    observation: HealthAttempt | QualityGate

    def take(self, ledger: Ledger, deployment_id: str, _: dict[str, int]) -> None:
        """Never refused."""
        ledger.observe(deployment_id, self.observation)


Action = Move | Note | Begin | End | Observe


@dataclass(frozen=True)
class Death:
    """Where a process ends: `delay_us` after it comes to this SQL statement of its script.

    Statement 0 is the opening of the ledger. Without a delay the statement is not begun. A process that
    comes to the end of its script first dies there.
    """

    statement: int
    delay_us: int = 0


@dataclass(frozen=True)
class Script:
    """What a process does to one deployment, and whether it dies of it."""

    path: Path
    deployment_id: str
    actions: tuple[Action, ...]
    death: Death | None = None


def take(ledger: Ledger, script: Script) -> Iterator[str]:
    """Do what the script says; after each action `DONE`, or the refusal's name and the state it tells."""
    journal: dict[str, int] = {}
    for action in script.actions:
        try:
            action.take(ledger, script.deployment_id, journal)
        except LedgerConflict as refusal:
            yield f"{type(refusal).__name__} {refusal.actual}"
        except sqlite3.Error as failure:  # which no model expects
            yield repr(failure)
        else:
            yield DONE


class LedgerProcess:
    """A process with a ledger of its own; when it dies another takes its place."""

    def __init__(self, connection: Connection) -> None:
        """For `ledger_process`."""
        self._connection = connection
        self._script: Script | None = None

    def start(self, script: Script) -> None:
        """Begin the script, and do not wait for it."""
        self._script = script
        self._connection.send(script)

    def finish(self) -> list[Heard]:
        """What was heard of the script, whose process may be dead by now."""
        assert self._script is not None
        answers: list[str | None] = []
        while isinstance(answer := _receive(self._connection), str):
            answers.append(answer)
        is_dead = answer in {signal.SIGKILL, signal.SIGALRM}
        assert is_dead == (self._script.death is not None), answer
        actions = self._script.actions
        if len(answers) < len(actions):
            answers.append(None)
        return [Heard(action, told) for action, told in zip(actions, answers, strict=False)]


@contextmanager
def ledger_process() -> Iterator[LedgerProcess]:
    """A process that takes scripts; it ends with the block."""
    with _process(_replace_the_dead, None) as connection:
        yield LedgerProcess(connection)


def _replace_the_dead(_unused: None, connection: Connection) -> None:
    """Fork the process that takes scripts, and tell of what signal it died: a fork costs milliseconds.

    Nothing of SQLite is open here, so nothing of it is inherited.
    """
    while True:
        child = os.fork()
        if child == 0:
            _take_on_request(connection)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            return
        connection.send(os.WTERMSIG(status))


def _take_on_request(connection: Connection) -> None:
    ledgers: dict[Path, Ledger] = {}
    for script in _requests(connection):
        come_to = _dying(script.death)
        come_to("the opening")
        if script.path not in ledgers:
            ledgers = {script.path: Ledger(script.path)}
        ledger = ledgers[script.path]
        ledger._db.set_trace_callback(come_to)
        for answer in take(ledger, script):
            connection.send(answer)
        if script.death is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        connection.send(None)


def _dying(death: Death | None) -> Callable[[str], None]:
    """To be called before each statement."""
    numbers = iter(range(10**6))

    def come_to(_: str) -> None:
        if death is None or next(numbers) != death.statement:
            return
        if death.delay_us == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        # Nobody handles it, so the kernel ends the process at once, be it inside a write.
        signal.setitimer(signal.ITIMER_REAL, death.delay_us / 1e6)

    return come_to


# -- processes -------------------------------------------------------------------------------------


@contextmanager
def _process(serve: Callable[[Any, Connection], None], argument: object) -> Iterator[Connection]:
    ours, theirs = _processes.Pipe()
    process = _processes.Process(target=serve, args=(argument, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()  # which ends it
        process.join(ANSWER_SECONDS)
    assert process.exitcode == 0


def _receive(connection: Connection) -> object:
    assert connection.poll(ANSWER_SECONDS), "the other process does not answer"
    return connection.recv()


def _requests(connection: Connection) -> Iterator[Any]:
    """Until the other side closes."""
    while True:
        try:
            yield connection.recv()
        except EOFError:
            return
