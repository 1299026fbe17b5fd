"""Operations as Prefect tasks: names, timeouts and retries of the specification's tables."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
from prefect import Task, flow
from prefect._internal.result_records import ResultRecord, ResultRecordMetadata
from prefect.client.schemas.objects import TaskRun
from prefect.serializers import PickleSerializer
from prefect.states import Failed
from prefect.testing.utilities import prefect_test_harness

from blocks.receiver_client import ReceiverRefused, ReceiverUnreachable, Refusal
from receiver.contract import ErrorCode
from tasks import dispatch, execute, package, precheck, recovery, restore, transfer, validate, versions
from tasks.errors import (
    ERROR_CLASSES,
    ERROR_RULES,
    OPERATION_POLICIES,
    BuildFailed,
    GantryError,
    ParametersRefused,
    RetryPolicy,
    TransferFailed,
)
from tasks.policies import operation, retry_only_retryable

MODULES = (dispatch, execute, package, precheck, recovery, restore, transfer, validate, versions)
OPERATIONS: dict[str, Task[..., Any]] = {
    found.name: found for module in MODULES for found in vars(module).values() if isinstance(found, Task)
}
# Their limit grows with what was asked: grace, package, quiet period, attempts. The flow gives it.
LIMITED_BY_THE_REQUEST = {
    *("deploy_container", "stop_existing_container"),
    *("check_container_status", "validate_health_endpoint"),
}
CHANGES_A_CONTAINER = (
    *("deploy_container", "stop_existing_container", "start_container", "restore_previous_container"),
)


@pytest.mark.parametrize("name", OPERATION_POLICIES)
def test_every_operation_of_the_specification_is_a_task_of_its_name(name: str) -> None:
    """Its runs carry the name too, under their stage, so that the UI shows the specification's words."""
    assert OPERATIONS[name].name == name
    assert str(OPERATIONS[name].task_run_name).endswith(f": {name}")


@pytest.mark.parametrize("name", [name for name in OPERATION_POLICIES if name not in LIMITED_BY_THE_REQUEST])
def test_operations_have_the_timeout_of_the_table(name: str) -> None:
    """In seconds, as Prefect counts."""
    assert OPERATIONS[name].timeout_seconds == OPERATION_POLICIES[name].timeout_ms / 1000


@pytest.mark.parametrize("name", sorted(LIMITED_BY_THE_REQUEST))
def test_operations_that_the_request_limits_get_their_time_from_the_flow(name: str) -> None:
    """Prefect's task itself holds none."""
    assert OPERATIONS[name].timeout_seconds is None


@pytest.mark.parametrize(
    "name",
    [
        *("build_docker_image", "gather_metadata", "validate_image"),
        *("establish_connection", "send_deployment_request", "verify_transfer"),
    ],
)
def test_operations_of_the_control_host_are_retried_as_the_table_says(name: str) -> None:
    """One retry fewer than attempts, with the table's waits between."""
    policy = OPERATION_POLICIES[name]
    assert OPERATIONS[name].retries == policy.max_attempts - 1
    assert OPERATIONS[name].retry_delay_seconds == policy.delays_seconds()


def test_the_check_before_a_build_is_as_patient_as_the_connection_after_it() -> None:
    """A cut that a deployment gets over in stage 2 does not fail it in stage 1."""
    check, connection = OPERATIONS["check_host"], OPERATIONS["establish_connection"]
    assert (check.retries, check.retry_delay_seconds) == (connection.retries, connection.retry_delay_seconds)
    assert check.timeout_seconds == connection.timeout_seconds


@pytest.mark.parametrize("name", sorted(CHANGES_A_CONTAINER))
def test_operations_that_change_a_container_are_tried_once(name: str) -> None:
    """What a half-done step left is the journal's business, not a retry's."""
    assert OPERATIONS[name].retries == 0


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_retried_only_for_errors_that_allow_it(name: str) -> None:
    """Also those that are ours, such as the upload."""
    assert OPERATIONS[name].retry_condition_fn is retry_only_retryable


def test_only_what_is_known_of_an_image_is_cached() -> None:
    """Nothing that asks or changes a host may be answered from a cache."""
    cached = {name for name, found in OPERATIONS.items() if found.cache_key_fn is not None}
    assert cached == {"build_docker_image", "read_config_digest"}
    assert {name for name, found in OPERATIONS.items() if found.persist_result} == cached


def test_a_limit_given_later_keeps_the_rest_of_the_policy() -> None:
    """As the flows do for a build with `timeout_ms`."""
    limited = OPERATIONS["build_docker_image"].with_options(timeout_seconds=7)
    given = OPERATIONS["build_docker_image"]
    assert limited.timeout_seconds == 7
    for name in ("name", "task_run_name", "retries", "retry_condition_fn", "cache_key_fn", "persist_result"):
        assert getattr(limited, name) == getattr(given, name), name


# -- which errors are retried ------------------------------------------------------------------------


def refusal(status: int) -> ReceiverRefused:
    """An answer of the receiver that is no success."""
    return ReceiverRefused(Refusal("GET /x", status, "about:blank", "No", "not so", "Do this."))


def is_retried(error: BaseException, *, recorded: bool = False) -> bool:
    """What the condition says, with the error itself in the state or a result record of it."""
    data: Any = error
    if recorded:
        metadata = ResultRecordMetadata(serializer=PickleSerializer(), storage_key="k")
        data = ResultRecord(result=error, metadata=metadata)
    run = TaskRun(task_key="t", dynamic_key="1", flow_run_id=uuid4())
    return retry_only_retryable(OPERATIONS["gather_metadata"], run, Failed(data=data))


@pytest.mark.parametrize("code", ErrorCode)
@pytest.mark.parametrize("recorded", [False, True])
def test_a_named_error_is_retried_when_its_row_of_the_table_allows_it(
    code: ErrorCode, recorded: bool
) -> None:
    """However Prefect hands the error over."""
    assert is_retried(ERROR_CLASSES[code](), recorded=recorded) is ERROR_RULES[code].retry_allowed


@pytest.mark.parametrize(
    ("error", "retried"),
    [
        (BuildFailed("no", retryable=False), False),
        (TransferFailed("no", retryable=False), False),
        (ParametersRefused("a", "b", "c"), False),
        (GantryError("no code"), False),
        (ReceiverUnreachable("http://x", "refused"), True),
        (refusal(429), True),
        (refusal(408), True),
        (refusal(503), True),
        (refusal(401), False),
        (refusal(409), False),
        (refusal(422), False),
        (TimeoutError(), True),
        (ValueError("a fault of ours"), False),
        (KeyError("x"), False),
        (OSError("disk"), False),
        (asyncio.CancelledError(), False),
    ],
    ids=repr,
)
def test_an_error_is_retried_when_another_try_may_help(error: BaseException, retried: bool) -> None:
    """A fault in the program, a refusal and a wrong parameter stay what they are."""
    assert is_retried(error) is retried


# -- one real retry ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prefect_server() -> Iterator[None]:
    """A Prefect server and database of this module's own."""
    with prefect_test_harness():
        yield


QUICK = RetryPolicy(max_attempts=3, initial_backoff_ms=1, timeout_ms=5_000)


async def test_prefect_retries_what_may_be_retried_and_nothing_else(prefect_server: None) -> None:
    """Three attempts for a receiver that is away, one for a refusal, one where attempts are one."""
    tried: list[str] = []

    @operation("away", policy=QUICK)
    async def away() -> int:
        tried.append("away")
        if tried.count("away") < 3:
            raise ReceiverUnreachable("http://x", "refused")
        return 7

    @operation("refused", policy=QUICK)
    async def refused() -> None:
        tried.append("refused")
        raise refusal(409)

    @operation("once", policy=QUICK, attempts=1)
    async def once() -> None:
        tried.append("once")
        raise ReceiverUnreachable("http://x", "refused")

    @operation("slow", policy=RetryPolicy(max_attempts=2, initial_backoff_ms=1, timeout_ms=50))
    async def slow() -> None:
        tried.append("slow")
        await asyncio.sleep(30)

    @flow
    async def all_of_them() -> int:
        for failing, error in ((refused, ReceiverRefused), (once, ReceiverUnreachable), (slow, TimeoutError)):
            with pytest.raises(error):
                await failing()
        return await away()

    assert await all_of_them() == 7
    assert {name: tried.count(name) for name in tried} == {"refused": 1, "once": 1, "slow": 2, "away": 3}
