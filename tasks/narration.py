"""A workflow as its log tells it: one line for each stage that begins or ends. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from receiver.contract import HealthAttempt
from tasks.results import DeploymentResult, outcome
from tasks.states import STAGE_OF, Facts, StageResult, WorkflowState
from tasks.wording import duration, size, stage_title


def lines_of(from_state: WorkflowState, to_state: WorkflowState, facts: Facts) -> Iterator[str]:
    """What a change of state says: the stage that ended, then where the workflow stands now."""
    yield from map(attempt_line, facts.health_attempts)
    if facts.stage is not None:
        yield _ended(facts.stage, facts)
    if stage := STAGE_OF.get(to_state):
        yield f"{stage_title(stage)}: begun ({from_state} -> {to_state})"
    elif facts.error_code and (facts.stage is None or to_state is WorkflowState.ROLLING_BACK):
        yield f"{from_state} -> {to_state}: {facts.error_code}"
    else:
        yield f"{from_state} -> {to_state}"


def _ended(result: StageResult, facts: Facts) -> str:
    took = duration(result.duration_ms)
    if not result.success:
        return f"{stage_title(result.stage)}: failed after {took}: {result.error_message}"
    return f"{stage_title(result.stage)}: done in {took}{_made(facts)}"


def _made(facts: Facts) -> str:
    metrics = facts.deployment_metrics or {}
    if facts.image_size_bytes is not None:
        return f", the image has {size(facts.image_size_bytes)}"
    if (sent_bytes := metrics.get("transferred_bytes")) is not None:
        return f", {size(sent_bytes)} sent" if sent_bytes else ", nothing had to be sent"
    return ""


def attempt_line(attempt: HealthAttempt) -> str:
    """One question put to the container, and its answer."""
    code = f"HTTP {attempt.status_code}" if attempt.status_code else attempt.message or "no answer"
    return f"health attempt {attempt.attempt} {attempt.status}: {code} in {duration(attempt.duration_ms)}"


def end_line(result: DeploymentResult) -> str:
    """How it ended and what serves now, after how long."""
    told = f"{outcome(result)} on {result.remote_host}"
    if result.success and result.deployed_url:
        told += f" at {result.deployed_url}"
    told += f", after {duration(result.total_duration_ms)}"
    silent_ms = result.deployment_metrics.get("service_interruption_ms")
    return told if silent_ms is None else f"{told}; {duration(silent_ms)} without service"
