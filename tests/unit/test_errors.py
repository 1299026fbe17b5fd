"""The error codes and retry policies of the specification, and the errors that carry them."""

from __future__ import annotations

import pickle

import pytest

from receiver.contract import ErrorCode
from tasks.errors import (
    DEFAULT_POLICY,
    ERROR_CLASSES,
    ERROR_RULES,
    MAY_FAIL,
    OPERATION_POLICIES,
    BuildFailed,
    GantryError,
    HealthCheckFailed,
    ParametersRefused,
    RetryPolicy,
    RollbackFailed,
)

# Severity, action and "retry allowed" as the specification's table prints them.
SPECIFIED = {
    "BUILD_FAILED": ("error", "retry_build", True),
    "TRANSFER_FAILED": ("error", "retry_transfer", True),
    "DEPLOYMENT_FAILED": ("error", "initiate_rollback", True),
    "HEALTH_CHECK_FAILED": ("error", "initiate_rollback", True),
    "REMOTE_ENDPOINT_UNREACHABLE": ("error", "abort_workflow", False),
    "ROLLBACK_FAILED": ("critical", "manual_intervention_required", False),
    "TIMEOUT": ("error", "retry_stage", True),
}
TIMEOUTS_MS = {
    "build_docker_image": 60_000,
    "gather_metadata": 2_000,
    "validate_image": 3_000,
    "establish_connection": 5_000,
    "send_deployment_request": 15_000,
    "verify_transfer": 5_000,
    "stop_existing_container": 10_000,
    "deploy_container": 30_000,
    "start_container": 15_000,
    "check_container_status": 3_000,
    "validate_health_endpoint": 5_000,
    "verify_service_registration": 3_000,
}


def test_the_error_table_is_the_one_of_the_specification() -> None:
    """Seven codes, each with its severity, action and retry."""
    table = {
        code.value: (rule.severity.value, rule.action.value, rule.retry_allowed)
        for code, rule in ERROR_RULES.items()
    }
    assert table == SPECIFIED
    assert set(ERROR_RULES) == set(ErrorCode)


@pytest.mark.parametrize("code", ErrorCode)
def test_every_code_has_an_error_that_says_what_happened_and_what_to_do(code: ErrorCode) -> None:
    """Raised bare, the error reads as the specification describes it, on one line, with a next step."""
    error = ERROR_CLASSES[code]()
    assert error.error_code is code
    assert str(error) == ERROR_RULES[code].description
    assert error.next_step
    assert error.next_step != GantryError.next_step
    assert error.retryable is ERROR_RULES[code].retry_allowed


def test_the_text_of_an_error_is_its_cause_on_one_line() -> None:
    """A cause of several lines, as builds print them, becomes one."""
    assert str(BuildFailed("step 3\n  failed:\texit 1\n")) == "step 3 failed: exit 1"


def test_the_raiser_may_know_that_a_retry_is_useless() -> None:
    """`retryable=False` ends retries that the table would allow."""
    assert BuildFailed("no such Dockerfile").retryable
    assert not BuildFailed("no such Dockerfile", retryable=False).retryable


def test_refused_parameters_name_the_field_and_the_fix_and_are_not_retried() -> None:
    """No code of the table fits a wrong parameter, so it carries none."""
    error = ParametersRefused("image_tag", "'a/b' is no tag", "give the tag alone")
    assert str(error) == "image_tag: 'a/b' is no tag; give the tag alone"
    assert (error.field, error.next_step) == ("image_tag", "give the tag alone")
    assert error.error_code is None
    assert not error.retryable


@pytest.mark.parametrize(
    "error",
    [
        ParametersRefused("image_tag", "bad", "use another"),
        BuildFailed("exit 1", next_step="Look here.", retryable=False),
        RollbackFailed(),
    ],
)
def test_an_error_survives_being_stored_and_loaded(error: GantryError) -> None:
    """Prefect pickles what a task raised; text, next step and retry come back."""
    loaded = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert type(loaded) is type(error)
    assert (str(loaded), loaded.next_step, loaded.retryable) == (
        str(error),
        error.next_step,
        error.retryable,
    )
    assert vars(loaded) == vars(error)


def test_an_error_keeps_the_exception_that_caused_it() -> None:
    """`raise ... from` shows the first cause."""
    with pytest.raises(HealthCheckFailed) as caught:
        raise HealthCheckFailed("no answer") from ConnectionRefusedError(111, "refused")
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)


def test_operations_have_the_timeouts_of_the_specification() -> None:
    """All twelve operations, each with the limit of one try."""
    assert {name: policy.timeout_ms for name, policy in OPERATION_POLICIES.items()} == TIMEOUTS_MS


def test_operations_are_tried_as_often_as_the_specification_says() -> None:
    """Three attempts, but two builds, and five questions to the host and to the container."""
    attempts = {name: policy.max_attempts for name, policy in OPERATION_POLICIES.items()}
    exceptions = {"build_docker_image": 2, "establish_connection": 5, "validate_health_endpoint": 5}
    assert attempts == dict.fromkeys(TIMEOUTS_MS, 3) | exceptions
    assert RetryPolicy(3, 2.0, 1000, 30_000, 180_000) == DEFAULT_POLICY


def test_two_operations_may_fail_without_failing_their_stage() -> None:
    """Stopping what is not there, and the optional registration."""
    assert sorted(MAY_FAIL) == ["stop_existing_container", "verify_service_registration"]
    assert set(OPERATION_POLICIES) >= MAY_FAIL


@pytest.mark.parametrize(
    ("policy", "delays_seconds"),
    [
        (DEFAULT_POLICY, [1.0, 2.0]),
        (OPERATION_POLICIES["establish_connection"], [1.0, 1.5, 2.25, 3.375]),
        (RetryPolicy(max_attempts=1), []),
        (RetryPolicy(max_attempts=8), [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]),
    ],
)
def test_waits_grow_by_the_multiplier_up_to_the_limit(
    policy: RetryPolicy, delays_seconds: list[float]
) -> None:
    """One wait fewer than attempts, none longer than max_backoff_ms."""
    assert policy.delays_seconds() == pytest.approx(delays_seconds)
