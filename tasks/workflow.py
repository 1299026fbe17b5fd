"""One workflow under way: runs operations, collects what a stage did, and moves the state with it.

Every change of state goes through `records.advance`, with the stage's result in the same transaction.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

from prefect.context import FlowRunContext
from prefect.logging import get_run_logger
from sqlalchemy.exc import DBAPIError

from blocks.build_engine import find_build_engine
from blocks.event_broker import find_event_broker
from blocks.receiver_client import ReceiverRefused, ReceiverUnreachable
from blocks.records_database import find_records_url
from blocks.remote_host import RemoteHost, find_remote_host
from receiver.contract import DeploymentStatus, ErrorCode, HealthAttempt, Stage, Transport
from tasks import active, dispatch, narration, outcome, rsync
from tasks.errors import (
    ERROR_CLASSES,
    DeploymentFailed,
    GantryError,
    RemoteEndpointUnreachable,
    StageTimeout,
)
from tasks.events import Event
from tasks.logs import correlated
from tasks.parameters import DeploymentParameters
from tasks.policies import count_retries, retries_made
from tasks.prefect_events import Change, PrefectEvents, telling
from tasks.records import NewWorkflow, Records, RecordsUnreachable, StateConflict, is_away
from tasks.results import DeploymentResult
from tasks.stage import StageRun
from tasks.states import STAGE_OF, Facts, StageResult, WorkflowRecord, WorkflowState

if TYPE_CHECKING:
    from tasks.outbox import StepRelay

T = TypeVar("T")

HOST_PATIENCE_SECONDS = 20.0
RECORDS_PATIENCE_SECONDS = 60.0
CONFIG_DIGEST = "config_digest"
WITH_HOST = frozenset({WorkflowState.DEPLOYING, WorkflowState.VALIDATING, WorkflowState.ROLLING_BACK})
_CODE_OF_STAGE = {
    Stage.PACKAGE: ErrorCode.BUILD_FAILED,
    Stage.TRANSFER: ErrorCode.TRANSFER_FAILED,
    Stage.DEPLOY: ErrorCode.DEPLOYMENT_FAILED,
    Stage.VALIDATE: ErrorCode.HEALTH_CHECK_FAILED,
}
_PARAMETERS = frozenset(DeploymentParameters.model_fields)
_METRIC_OF_STAGE = {
    Stage.PACKAGE: "build_duration_ms",
    Stage.TRANSFER: "transfer_duration_ms",
    Stage.DEPLOY: "deployment_duration_ms",
    Stage.VALIDATE: "health_validation_duration_ms",
}


@dataclass
class Workflow:
    """A deployment's workflow; `state` is what `records.advance` wrote last."""

    records: Records
    parameters: DeploymentParameters
    host: RemoteHost
    workflow_id: str
    state: WorkflowState = WorkflowState.PENDING
    deployment_id: str | None = None
    failed_stage: StageResult | None = None
    host_run: UUID | None = None
    host_status: DeploymentStatus | None = None
    told_attempts: int = 0
    load_seconds: float = 0
    config_digest: str | None = None
    relay: StepRelay | None = None
    flow_run_id: str | None = None
    prefect_events: PrefectEvents | None = None
    next_step: str = ""

    async def advance(self, to_state: WorkflowState, **facts: Any) -> None:
        """Move on, with facts, history and events, in one transaction; the log and Prefect are told.

        A database that is away is waited for; raises `RecordsUnreachable` when it stays away.
        """
        news = Facts(**facts)
        events = await self._advance_patiently(to_state, news)
        for line in narration.lines_of(self.state, to_state, news):
            get_run_logger().info("%s", line, extra={**self.identity, "state": to_state.value})
        self.state = to_state
        self._wake_relay()
        if self.prefect_events is not None:
            self.prefect_events.tell(Change(to_state, events, self.next_step))

    async def _advance_patiently(self, to_state: WorkflowState, facts: Facts) -> list[Event]:
        was_away = False

        async def advance() -> list[Event]:
            nonlocal was_away
            try:
                return await self.records.advance(self.workflow_id, self.state, to_state, facts)
            except StateConflict as exc:
                if was_away and exc.actual is to_state:
                    return []  # it was written, only the answer was lost
                raise
            except (OSError, DBAPIError):
                was_away = True
                raise

        return await self._patiently(advance, f"{self.state} -> {to_state} cannot be recorded")

    async def _patiently(self, ask: Callable[[], Awaitable[T]], problem: str) -> T:
        """What the records answer; a database that is away is asked again for a while."""
        deadline = time.monotonic() + RECORDS_PATIENCE_SECONDS
        while True:
            try:
                return await ask()
            except (OSError, DBAPIError) as exc:
                if not is_away(exc):
                    raise
                if time.monotonic() > deadline:
                    raise RecordsUnreachable(f"{problem}: {exc}") from exc
                get_run_logger().warning("the records are away, trying again: %s", exc, extra=self.identity)
            await asyncio.sleep(1)

    def _wake_relay(self) -> None:
        if self.relay is not None:
            self.relay.wake()

    async def tell_attempts(self, status: DeploymentStatus) -> None:
        """Record the health attempts that are new, one event each, while the host still asks."""
        news = self.new_attempts(status)
        if not news:
            return
        try:
            await self.records.note(self.workflow_id, Facts(health_attempts=news))
        except (DBAPIError, OSError) as exc:
            get_run_logger().warning("health attempts are recorded later: %s", exc, extra=self.identity)
            return
        for attempt in news:
            get_run_logger().info("%s", narration.attempt_line(attempt), extra=self.identity)
        self.told_attempts += len(news)
        self._wake_relay()

    def new_attempts(self, status: DeploymentStatus) -> tuple[HealthAttempt, ...]:
        """Health attempts of the host that were not recorded yet."""
        return tuple(status.health_attempts[self.told_attempts :])

    @property
    def image(self) -> str:
        """`hello:v2`: what is deployed."""
        return f"{self.parameters.container_name}:{self.parameters.image_tag}"

    @property
    def identity(self) -> dict[str, str | None]:
        """What every log line of this workflow carries."""
        return {
            "correlation_id": self.workflow_id,
            "deployment_id": self.deployment_id,
            "container_name": self.parameters.container_name,
            "remote_host": self.parameters.remote_host,
        }

    @property
    def is_with_host(self) -> bool:
        """True from stage 3 on: what became of the deployment, only the host can say."""
        return self.state in WITH_HOST

    @property
    def must_roll_back(self) -> bool:
        """True when something on the host may have been touched and is to be undone."""
        return self.parameters.rollback_on_failure and self.is_with_host

    @asynccontextmanager
    async def stage(self, stage: Stage, timeout_seconds: float) -> AsyncIterator[StageRun]:
        """A stage on the control host, within its time; an error leaves it as a named one.

        The failed stage's result is kept for the change of state that the failure causes.
        """
        run = StageRun(stage, datetime.now(UTC))
        try:
            async with asyncio.timeout(timeout_seconds):
                yield run
        except Exception as exc:
            failure = as_failure(exc, stage, timeout_seconds)
            self.failed_stage = run.result(failure)
            raise failure from exc

    def metrics(self, result: StageResult) -> dict[str, int]:
        """The stage's duration under the specification's name."""
        return {_METRIC_OF_STAGE[result.stage]: result.duration_ms}

    async def ask_host(self) -> DeploymentStatus | None:
        """What the host says, asked for a while: its word decides how the workflow ends."""
        return await dispatch.last_status(
            self.host,
            self.deployment_id,
            correlation_id=self.workflow_id,
            patience_seconds=HOST_PATIENCE_SECONDS,
        )

    def check_image(self, status: DeploymentStatus) -> None:
        """Raise `DeploymentFailed` when the host runs another image than the one that was built."""
        runs = status.facts.image_config_digest
        if self.config_digest is not None and runs != self.config_digest:
            raise DeploymentFailed(f"the host runs image {runs}, built was {self.config_digest}")

    def require_deployment(self) -> str:
        """The host's deployment id; there is one from stage 2 on."""
        if self.deployment_id is None:
            raise RuntimeError("the host has not taken the deployment yet")
        return self.deployment_id

    def require_run(self) -> UUID:
        """The run on the host; there is one from stage 3 on."""
        if self.host_run is None:
            raise RuntimeError("no run was started on the host yet")
        return self.host_run

    def require_status(self) -> DeploymentStatus:
        """What the host said at the end of stage 4."""
        if self.host_status is None:
            raise RuntimeError("the host has not been heard at the end of stage 4")
        return self.host_status

    async def begin_validation(self, status: DeploymentStatus) -> None:
        """The host has started the new container: stage 3 is done."""
        result = outcome.stage_result(status, Stage.DEPLOY)
        await self.advance(
            WorkflowState.VALIDATING,
            stage=result,
            container_id=status.facts.container_id,
            deployment_metrics=self.metrics(result),
        )

    async def complete(self, status: DeploymentStatus) -> None:
        """The host keeps the new container: stage 4 is done."""
        result = outcome.stage_result(status, Stage.VALIDATE)
        await self.advance(
            WorkflowState.COMPLETED,
            stage=result,
            deployed_url=self.deployed_url(status),
            health_status=outcome.health_status(status),
            health_attempts=self.new_attempts(status),
            deployment_metrics={**self.metrics(result), **outcome.host_metrics(status)},
        )

    def deployed_url(self, status: DeploymentStatus) -> str | None:
        """Where the service answers, when it publishes a port."""
        port = status.facts.host_port
        return f"http://{self.host.url_host}:{port}" if port else None

    def failure_facts(self, failure: GantryError, status: DeploymentStatus | None) -> dict[str, Any]:
        """What the records are told of a failure; `status` is what the host said last."""
        self.next_step = failure.next_step
        facts: dict[str, Any] = {
            "error_code": failure.error_code,
            "error_message": str(failure),
            "failure_stage": stage_of(self.state),
            "stage": self.failed_stage,
            "deployment_id": self.deployment_id,
            "retry_count": retries_made(),
        }
        if status is not None:
            facts |= {
                "stage": self._failed_stage_with(status, failure),
                "container_id": status.facts.container_id,
                "health_status": outcome.health_status(status),
                "health_attempts": self.new_attempts(status),
            }
        return facts

    def _failed_stage_with(self, status: DeploymentStatus, failure: GantryError) -> StageResult | None:
        """The failed stage; one that ran on the host with what the host journalled of it."""
        failed = self.failed_stage
        if failed is None or failed.operations or failed.stage not in {Stage.DEPLOY, Stage.VALIDATE}:
            return failed
        told = outcome.stage_result(status, failed.stage, failure)
        return replace(failed, operations=told.operations, gates=told.gates)

    async def record(self) -> WorkflowRecord:
        """The workflow as the records have it; raises `RecordsUnreachable` when they stay away."""
        return await self._patiently(
            partial(self.records.get, self.workflow_id), "the workflow cannot be read"
        )

    async def result(self) -> DeploymentResult:
        """The specification's result."""
        return DeploymentResult.of(await self.record())


def as_failure(exc: BaseException, stage: Stage, timeout_seconds: float = 0) -> GantryError:
    """Any error of a stage as a named one with the specification's code."""
    if isinstance(exc, GantryError) and exc.error_code:
        return exc
    if isinstance(exc, TimeoutError):
        return StageTimeout(
            f"stage {stage} took longer than {timeout_seconds:.0f} s" if not str(exc) else str(exc)
        )
    if isinstance(exc, ReceiverUnreachable):
        return RemoteEndpointUnreachable(
            f"Cannot connect to remote hook receiver at {exc.url}: {exc.cause}", next_step=exc.next_step
        )
    if isinstance(exc, ReceiverRefused):
        refused = ERROR_CLASSES[exc.error_code or _CODE_OF_STAGE[stage]]
        return refused(f"{exc.title}: {exc.detail}", next_step=exc.next_step, retryable=exc.retryable)
    next_step = exc.next_step if isinstance(exc, GantryError) else ""
    return ERROR_CLASSES[_CODE_OF_STAGE[stage]](f"{type(exc).__name__}: {exc}", next_step=next_step)


def failure_in(stage: Stage, cause: str, next_step: str = "") -> GantryError:
    """A failure of a stage that has no error of its own to name it."""
    return ERROR_CLASSES[_CODE_OF_STAGE[stage]](cause, next_step=next_step)


def stage_of(state: WorkflowState) -> Stage:
    """The stage that a state belongs to; before the first one: the first one."""
    return STAGE_OF.get(state, Stage.PACKAGE)


@asynccontextmanager
async def open_workflow(parameters: DeploymentParameters) -> AsyncIterator[Workflow]:
    """Find the host, open the records, be alone with the container, and record the workflow as PENDING.

    The workflow's id is the flow run's, so that whoever starts a run knows the id; a run that Prefect
    repeats gets a new one, since a workflow that ended never changes.
    """
    host = await find_remote_host(parameters.remote_host, parameters.remote_port)
    if parameters.transport is Transport.RSYNC:
        rsync.check(host)
    if engine := await find_build_engine():
        os.environ["DOCKER_HOST"] = engine  # for the SDK and for buildx; a flow run is a process of its own
    workflow_id, flow_run_id, fleet_id = _identity()
    async with (
        await Records.open(await find_records_url()) as records,
        active.alone(
            records,
            parameters.container_name,
            parameters.remote_host,
            parameters.wait_seconds,
            get_run_logger().info,
        ),
    ):
        await records.create(
            NewWorkflow(
                workflow_id=workflow_id,
                correlation_id=fleet_id,
                flow_run_id=flow_run_id,
                container_name=parameters.container_name,
                image_tag=parameters.image_tag,
                remote_host=parameters.remote_host,
                remote_port=host.port,
                request=parameters.model_dump(mode="json"),
            )
        )
        workflow = Workflow(records, parameters, host, workflow_id, flow_run_id=flow_run_id)
        async with active.slot(), _under_way(workflow):
            yield workflow


@asynccontextmanager
async def reopen_workflow(records: Records, record: WorkflowRecord) -> AsyncIterator[Workflow]:
    """A workflow whose run died, as the records have it; the caller holds the lock of its container."""
    known = {name: value for name, value in record.request.items() if name in _PARAMETERS}
    parameters = DeploymentParameters.model_validate(known)
    host = await find_remote_host(record.remote_host, record.remote_port)
    workflow = Workflow(records, parameters, host, record.workflow_id, record.current_state)
    workflow.flow_run_id = record.flow_run_id
    workflow.deployment_id = record.deployment_id
    workflow.told_attempts = await records.told_attempts(record.workflow_id)
    workflow.config_digest = await _built_image(records, record.workflow_id)
    async with _under_way(workflow):
        yield workflow


async def _built_image(records: Records, workflow_id: str) -> str | None:
    """The config digest that stage 1 wrote down."""
    stages = await records.stages(workflow_id)
    digests = (stage.artifacts.get(CONFIG_DIGEST) for stage in stages if stage.stage is Stage.PACKAGE)
    return next((str(digest) for digest in digests if digest), None)


@asynccontextmanager
async def _under_way(workflow: Workflow) -> AsyncIterator[Workflow]:
    workflow_id = workflow.workflow_id
    with correlated(workflow_id), count_retries():
        async with (
            telling(workflow.flow_run_id, workflow.host.work_pool_name) as workflow.prefect_events,
            _relaying(workflow.records) as workflow.relay,
        ):
            yield workflow


@asynccontextmanager
async def _relaying(records: Records) -> AsyncIterator[StepRelay | None]:
    """Events go out while the flow works, where a broker is configured; at most a second at its end."""
    broker = await find_event_broker()
    if broker is None:
        yield None
        return
    from tasks.outbox import step_relay  # aiokafka's import is paid for by those who use it

    async with step_relay(records, broker, log=get_run_logger()) as relay:
        yield relay


def _identity() -> tuple[str, str, str | None]:
    """Ids of the workflow, of its flow run, and of the fleet that it belongs to."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        raise RuntimeError("open_workflow works inside a flow run only")
    run = context.flow_run
    workflow_id = str(run.id) if run.run_count <= 1 else f"{run.id}-{run.run_count}"
    return workflow_id, str(run.id), dispatch.fleet_of(run.tags)
