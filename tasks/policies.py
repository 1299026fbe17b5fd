"""How an operation becomes a Prefect task: its name, timeout, retries and back-off from the table."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

from prefect import Task, task
from prefect.client.schemas.objects import State, TaskRun

from blocks.receiver_client import ReceiverRefused, ReceiverUnreachable
from receiver.contract import Stage
from tasks.errors import OPERATION_POLICIES, GantryError, RetryPolicy
from tasks.wording import run_name_of

P = ParamSpec("P")
R = TypeVar("R")
CacheKey = Callable[[Any, dict[str, Any]], str | None]


_retries: ContextVar[list[str] | None] = ContextVar("operations_tried_again", default=None)


@contextmanager
def count_retries() -> Iterator[None]:
    """Within the block, count the attempts that operations were given again."""
    token = _retries.set([])
    try:
        yield
    finally:
        _retries.reset(token)


def retries_made() -> int:
    """Further attempts since `count_retries`, over all operations of this flow run."""
    return len(_retries.get() or ())


def retry_only_retryable(task: Task[Any, Any], run: TaskRun, state: State[Any]) -> bool:
    """True, and counted, when the error table or the receiver's answer allows another attempt.

    Prefect asks only while attempts are left.
    """
    again, counted = _allows_another(state), _retries.get()
    if again and counted is not None:
        counted.append(task.name)
    return again


def _allows_another(state: State[Any]) -> bool:
    cause = getattr(state.data, "result", state.data)
    if isinstance(cause, ReceiverUnreachable | TimeoutError):
        return True
    return isinstance(cause, GantryError | ReceiverRefused) and cause.retryable


def operation(
    name: str,
    part: Stage | str | None = None,
    *,
    policy: RetryPolicy | None = None,
    attempts: int | None = None,
    timeout: bool = True,
    cache_key: CacheKey | None = None,
) -> Callable[[Callable[P, Coroutine[Any, Any, R]]], Task[P, Coroutine[Any, Any, R]]]:
    """A decorator: the operation as a task under the specification's name and policy.

    Its runs are shown under the `part` of the work that they belong to, a stage mostly. `attempts=1` is
    for operations that change a container: they are repeated by nobody but the journal. `timeout=False`
    is for those whose limit depends on the request: the flow gives it.
    """
    chosen = policy or OPERATION_POLICIES[name]
    delays_seconds = chosen.delays_seconds()[: attempts - 1 if attempts else None]

    def decorate(function: Callable[P, Coroutine[Any, Any, R]]) -> Task[P, Coroutine[Any, Any, R]]:
        return task(
            name=name,
            task_run_name=run_name_of(name, part),
            retries=len(delays_seconds),
            retry_delay_seconds=delays_seconds or 0,
            retry_condition_fn=retry_only_retryable,
            timeout_seconds=chosen.timeout_ms / 1000 if timeout else None,
            cache_key_fn=cache_key,
            persist_result=cache_key is not None,
        )(function)

    return decorate
