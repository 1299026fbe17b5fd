"""One control-side stage under way: runs its operations as Prefect tasks and keeps what they did."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, ParamSpec, TypeVar

from prefect import State, Task

from receiver.contract import OperationResult, QualityGate, Stage
from tasks.errors import GantryError, StageTimeout
from tasks.states import StageResult

P = ParamSpec("P")
R = TypeVar("R")


@dataclass
class StageRun:
    """A control-side stage under way: its operations, gates and artifacts so far."""

    stage: Stage
    started_at: datetime
    operations: list[OperationResult] = field(default_factory=list)
    gates: list[QualityGate] = field(default_factory=list)
    artifacts: dict[str, Any] = field(default_factory=dict)

    async def run(self, operation: Task[P, Coroutine[Any, Any, R]], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run an operation as a Prefect task and note how it went; its error rises as it was raised."""
        started_at, began = datetime.now(UTC), time.monotonic()
        call: Callable[..., Coroutine[Any, Any, State[R]]] = operation  # type: ignore[assignment]
        success, message = False, "ended with its stage"
        try:
            state = await call(*args, **kwargs, return_state=True)
            success = state.is_completed()
            message = "cached" if state.name == "Cached" else ("" if success else state.message or "")
        finally:  # also when the stage's time is up: the operation that was slow is to be seen
            self.operations.append(
                OperationResult(
                    name=operation.name,
                    stage=self.stage,
                    success=success,
                    started_at=started_at,
                    duration_ms=int((time.monotonic() - began) * 1000),
                    message=message,
                )
            )
        return await _result_of(state, operation)

    def result(self, failure: GantryError | None = None) -> StageResult:
        """The stage as it ended now."""
        now = datetime.now(UTC)
        return StageResult(
            stage=self.stage,
            success=failure is None,
            duration_ms=int((now - self.started_at).total_seconds() * 1000),
            operations=tuple(self.operations),
            gates=tuple(self.gates),
            artifacts=self.artifacts,
            error_code=failure.error_code if failure else None,
            error_message=str(failure) if failure else None,
            started_at=self.started_at,
            completed_at=now,
        )


async def _result_of(state: State[R], operation: Task[P, Coroutine[Any, Any, R]]) -> R:
    try:
        result: R = await state.aresult()
    except TimeoutError as exc:
        raise StageTimeout(f"{operation.name}: {state.message or 'its time is up'}") from exc
    return result
