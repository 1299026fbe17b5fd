"""The specification's error codes and retry policies as data, and the named errors that carry them.

Pure: imports only the wire's words, so that every other module here can raise these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Self

from receiver.contract import ErrorCode


class Severity(StrEnum):
    """How loud the alert is."""

    ERROR = "error"
    CRITICAL = "critical"


class Action(StrEnum):
    """What follows an error."""

    RETRY_BUILD = "retry_build"
    RETRY_TRANSFER = "retry_transfer"
    INITIATE_ROLLBACK = "initiate_rollback"
    ABORT_WORKFLOW = "abort_workflow"
    MANUAL_INTERVENTION_REQUIRED = "manual_intervention_required"
    RETRY_STAGE = "retry_stage"


@dataclass(frozen=True)
class ErrorRule:
    """One row of the specification's table."""

    description: str
    action: Action
    severity: Severity = Severity.ERROR
    retry_allowed: bool = True


_C, _A = ErrorCode, Action
ERROR_RULES: Mapping[ErrorCode, ErrorRule] = MappingProxyType(
    {
        _C.BUILD_FAILED: ErrorRule("Docker image build failed", _A.RETRY_BUILD),
        _C.TRANSFER_FAILED: ErrorRule("Container transfer to remote failed", _A.RETRY_TRANSFER),
        _C.DEPLOYMENT_FAILED: ErrorRule("Container deployment failed", _A.INITIATE_ROLLBACK),
        _C.HEALTH_CHECK_FAILED: ErrorRule("Health check validation failed", _A.INITIATE_ROLLBACK),
        _C.REMOTE_ENDPOINT_UNREACHABLE: ErrorRule(
            "Cannot connect to remote hook receiver", _A.ABORT_WORKFLOW, retry_allowed=False
        ),
        _C.ROLLBACK_FAILED: ErrorRule(
            "Rollback operation failed",
            _A.MANUAL_INTERVENTION_REQUIRED,
            severity=Severity.CRITICAL,
            retry_allowed=False,
        ),
        _C.TIMEOUT: ErrorRule("Stage execution timeout", _A.RETRY_STAGE),
    }
)


class GantryError(Exception):
    """The operation failed"""

    error_code: ErrorCode | None = None
    next_step: str = "Read the workflow's log for the cause."

    def __init__(self, cause: str = "", *, next_step: str = "", retryable: bool | None = None) -> None:
        """`cause` becomes one line (default: the class's own); `retryable=False` ends retries early."""
        super().__init__(" ".join(cause.split()) or (type(self).__doc__ or "").splitlines()[0])
        self.next_step = next_step or self.next_step
        self._retryable = retryable

    @property
    def retryable(self) -> bool:
        """What the table says of the code, unless the raiser knew better; never without a code."""
        if self._retryable is not None:
            return self._retryable
        return self.error_code is not None and ERROR_RULES[self.error_code].retry_allowed

    @classmethod
    def _rebuild(cls, args: tuple[Any, ...], attributes: dict[str, Any]) -> Self:
        error = cls.__new__(cls, *args)
        error.__dict__.update(attributes)
        return error

    def __reduce__(self) -> tuple[Any, ...]:
        # Prefect pickles errors; a subclass whose __init__ takes more than the message must survive it.
        return type(self)._rebuild, (self.args, self.__dict__)


class BuildFailed(GantryError):
    """Docker image build failed"""

    error_code = ErrorCode.BUILD_FAILED
    next_step = "Read the build's last lines, check the disk with 'df -h', then deploy again."


class TransferFailed(GantryError):
    """Container transfer to remote failed"""

    error_code = ErrorCode.TRANSFER_FAILED
    next_step = "Check the link to the host and its free disk, then deploy again: the upload resumes."


class DeploymentFailed(GantryError):
    """Container deployment failed"""

    error_code = ErrorCode.DEPLOYMENT_FAILED
    next_step = "Read the failed container's log tail in the deployment's status; correct and deploy again."


class DeploymentLost(DeploymentFailed):
    """The host knows nothing of the deployment"""

    next_step = "The host's ledger is gone: look there with 'docker ps -a', then deploy again."


class HealthCheckFailed(GantryError):
    """Health check validation failed"""

    error_code = ErrorCode.HEALTH_CHECK_FAILED
    next_step = "Read the health attempts and the log tail; check health_endpoint, port and max_retries."


class RemoteEndpointUnreachable(GantryError):
    """Cannot connect to remote hook receiver"""

    error_code = ErrorCode.REMOTE_ENDPOINT_UNREACHABLE
    next_step = "Check that the receiver runs on the host and that remote_host, remote_port and firewall fit."


class RollbackFailed(GantryError):
    """Rollback operation failed"""

    error_code = ErrorCode.ROLLBACK_FAILED
    next_step = (
        "Log in to the host: start the kept '-previous' container by hand, as the README's runbook says."
    )


class StageTimeout(GantryError):
    """Stage execution timeout"""

    error_code = ErrorCode.TIMEOUT
    next_step = "Find what was slow in the stage's operations; raise its timeout if the work is that large."


class ParametersRefused(GantryError):
    """A parameter of the deployment cannot be used"""

    next_step = "Correct the parameter and start the deployment again; nothing was touched."

    def __init__(self, field: str, problem: str, fix: str) -> None:
        """`field` is the parameter's path, as in `deployment_config.port_mappings`."""
        super().__init__(f"{field}: {problem}; {fix}", next_step=fix)
        self.field = field
        self.fix = fix


_NAMED: tuple[type[GantryError], ...] = (
    *(BuildFailed, TransferFailed, DeploymentFailed, HealthCheckFailed),
    *(RemoteEndpointUnreachable, RollbackFailed, StageTimeout),
)
ERROR_CLASSES: Mapping[ErrorCode, type[GantryError]] = MappingProxyType(
    {named.error_code: named for named in _NAMED if named.error_code is not None}
)


@dataclass(frozen=True)
class RetryPolicy:
    """How often an operation is tried, and how long one try (for the default: the whole) may take."""

    max_attempts: int = 3
    backoff_multiplier: float = 2.0
    initial_backoff_ms: int = 1000
    max_backoff_ms: int = 30_000
    timeout_ms: int = 180_000

    def delays_seconds(self) -> list[float]:
        """The waits between the attempts, one fewer than there are attempts."""
        return [
            min(self.initial_backoff_ms * self.backoff_multiplier**n, self.max_backoff_ms) / 1000
            for n in range(self.max_attempts - 1)
        ]


DEFAULT_POLICY = RetryPolicy()
OPERATION_POLICIES: Mapping[str, RetryPolicy] = MappingProxyType(
    {
        # The stage table gives the build 45 s, its own retry override 60 s; the override wins.
        "build_docker_image": RetryPolicy(max_attempts=2, timeout_ms=60_000),
        "gather_metadata": RetryPolicy(timeout_ms=2_000),
        "validate_image": RetryPolicy(timeout_ms=3_000),
        "establish_connection": RetryPolicy(max_attempts=5, backoff_multiplier=1.5, timeout_ms=5_000),
        "send_deployment_request": RetryPolicy(timeout_ms=15_000),
        "verify_transfer": RetryPolicy(timeout_ms=5_000),
        "stop_existing_container": RetryPolicy(timeout_ms=10_000),
        "deploy_container": RetryPolicy(timeout_ms=30_000),
        "start_container": RetryPolicy(timeout_ms=15_000),
        "check_container_status": RetryPolicy(timeout_ms=3_000),
        "validate_health_endpoint": RetryPolicy(max_attempts=5, backoff_multiplier=1.2, timeout_ms=5_000),
        "verify_service_registration": RetryPolicy(timeout_ms=3_000),
    }
)
MAY_FAIL = frozenset({"stop_existing_container", "verify_service_registration"})
