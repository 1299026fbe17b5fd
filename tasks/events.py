"""What the world hears of a workflow: topics, envelopes and payloads, and what must never be in them.

Pure: ids and time are parameters. Imports no SQL, no Kafka and no Prefect.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel

from receiver.contract import HealthAttempt
from tasks.errors import ERROR_RULES
from tasks.states import Facts, StageResult, WorkflowRecord, WorkflowState, fold

TOPIC_PREFIX = "dev.omninode-bridge.deployment"
EVENT_VERSION = "1.0.0"
SOURCE = "gantry"
MASK = "***"


class EventType(StrEnum):
    """The specification's seven event types, and the dead letter."""

    DEPLOYMENT_STARTED = "DEPLOYMENT_STARTED"
    DEPLOYMENT_STAGE_COMPLETED = "DEPLOYMENT_STAGE_COMPLETED"
    DEPLOYMENT_HEALTH_CHECK = "DEPLOYMENT_HEALTH_CHECK"
    DEPLOYMENT_COMPLETED = "DEPLOYMENT_COMPLETED"
    DEPLOYMENT_FAILED = "DEPLOYMENT_FAILED"
    DEPLOYMENT_ROLLBACK_INITIATED = "DEPLOYMENT_ROLLBACK_INITIATED"
    DEPLOYMENT_ROLLBACK_COMPLETED = "DEPLOYMENT_ROLLBACK_COMPLETED"
    DEPLOYMENT_DLQ = "DEPLOYMENT_DLQ"

    @property
    def topic(self) -> str:
        """The Kafka topic of this type, one each."""
        name = self.value.removeprefix("DEPLOYMENT_").replace("_", "-").lower()
        return f"{TOPIC_PREFIX}.{name}.v1"


TOPICS: tuple[str, ...] = tuple(kind.topic for kind in EventType)
_T, _S = EventType, WorkflowState
_CLOSING: Mapping[WorkflowState, tuple[EventType, ...]] = MappingProxyType(
    {
        _S.COMPLETED: (_T.DEPLOYMENT_COMPLETED,),
        _S.ROLLING_BACK: (_T.DEPLOYMENT_ROLLBACK_INITIATED,),
        # A deployment that was rolled back did fail, and who watches for its end waits for that event.
        _S.ROLLBACK_COMPLETED: (_T.DEPLOYMENT_ROLLBACK_COMPLETED, _T.DEPLOYMENT_FAILED, _T.DEPLOYMENT_DLQ),
        _S.FAILED: (_T.DEPLOYMENT_FAILED, _T.DEPLOYMENT_DLQ),
    }
)


@dataclass(frozen=True)
class Event:
    """One message; `sequence` rises by one per workflow and starts at 1."""

    event_id: str
    event_type: EventType
    workflow_id: str
    deployment_id: str | None
    sequence: int
    at: datetime
    payload: Mapping[str, Any]

    @property
    def topic(self) -> str:
        """Where it is sent."""
        return self.event_type.topic

    def message(self) -> str:
        """The JSON text that is stored and sent; `correlation_id` is the workflow's id."""
        envelope = {
            "event_id": self.event_id,
            "event_type": self.event_type,
            "event_version": EVENT_VERSION,
            "correlation_id": self.workflow_id,
            "deployment_id": self.deployment_id,
            "sequence": self.sequence,
            "timestamp": self.at.isoformat(),
            "source": SOURCE,
        }
        body = jsonable({"envelope": envelope, "payload": self.payload})
        return json.dumps(body, ensure_ascii=False, allow_nan=False)


def events_for(
    workflow: WorkflowRecord,
    from_state: WorkflowState,
    to_state: WorkflowState,
    facts: Facts,
    *,
    at: datetime,
    new_id: Callable[[], str],
) -> list[Event]:
    """The events of a change, in order: start, health attempts, stage, end.

    `workflow` is the record before the change. With `from_state` equal to `to_state` (a note) only
    what the facts tell. A stage that was recorded as completed before is not announced again.
    """
    after = fold(workflow, to_state, facts, at)
    told: list[tuple[EventType, dict[str, Any]]] = []
    if from_state is _S.PENDING and to_state is _S.PACKAGING:
        told.append((_T.DEPLOYMENT_STARTED, {"remote_port": after.remote_port}))
    told += [(_T.DEPLOYMENT_HEALTH_CHECK, _attempt(attempt)) for attempt in facts.health_attempts]
    stage = facts.stage
    if stage is not None and stage.success and stage.stage not in workflow.stages_completed:
        told.append((_T.DEPLOYMENT_STAGE_COMPLETED, _stage(stage)))
    if from_state is not to_state:
        told += [(kind, _ENDINGS[kind](after)) for kind in _CLOSING.get(to_state, ())]
    common = {name: getattr(after, name) for name in ("container_name", "image_tag", "remote_host")}
    return [
        Event(new_id(), kind, after.workflow_id, after.deployment_id, number, at, common | payload)
        for number, (kind, payload) in enumerate(told, start=workflow.event_sequence + 1)
    ]


def _attempt(attempt: HealthAttempt) -> dict[str, Any]:
    return attempt.model_dump(mode="json")


def _stage(result: StageResult) -> dict[str, Any]:
    return {
        "stage_name": result.stage,
        "stage_number": result.stage.number,
        "status": "passed",
        "duration_ms": result.duration_ms,
    }


def _completed(after: WorkflowRecord) -> dict[str, Any]:
    names = ("total_duration_ms", "container_id", "image_id", "image_size_bytes", "deployed_url")
    lists = ("stages_completed", "health_status", "deployment_metrics", "retry_count")
    return {name: getattr(after, name) for name in names + lists}


def _cause(after: WorkflowRecord) -> dict[str, Any]:
    rule = ERROR_RULES[after.error_code] if after.error_code else None
    return {
        "error_code": after.error_code,
        "error_message": after.error_message or (rule.description if rule else "no cause was recorded"),
        "failure_stage": after.failure_stage,
        "severity": rule.severity if rule else None,
        "action": rule.action if rule else None,
        "retry_count": after.retry_count,
    }


def _failed(after: WorkflowRecord) -> dict[str, Any]:
    names = ("total_duration_ms", "stages_completed", "stages_failed", "rollback_performed")
    return _cause(after) | {name: getattr(after, name) for name in names}


def _rolled_back(after: WorkflowRecord) -> dict[str, Any]:
    restored = {"success": True, "previous_container_restored": None, "rollback_duration_ms": None}
    told = {name: value for name, value in (after.rollback_result or {}).items() if value is not None}
    return _cause(after) | restored | told  # a rollback that went well has no error to hide the cause with


def _dead_letter(after: WorkflowRecord) -> dict[str, Any]:
    return _failed(after) | {"rollback_result": after.rollback_result, "request": redact(after.request)}


_ENDINGS: Mapping[EventType, Callable[[WorkflowRecord], dict[str, Any]]] = MappingProxyType(
    {
        _T.DEPLOYMENT_COMPLETED: _completed,
        _T.DEPLOYMENT_FAILED: _failed,
        _T.DEPLOYMENT_ROLLBACK_INITIATED: _cause,
        _T.DEPLOYMENT_ROLLBACK_COMPLETED: _rolled_back,
        _T.DEPLOYMENT_DLQ: _dead_letter,
    }
)

# Names are matched anywhere inside: hiding MONKEY costs nothing, showing DBPASSWORD does.
_SECRET_WORD = r"password|passwd|pwd|passphrase|secret|token|key|credential|dsn"  # noqa: S105 - a pattern
_SECRET_NAME = re.compile(_SECRET_WORD, re.IGNORECASE)
# Look-behinds, look-aheads and bounds keep the search linear: a log tail may be one long word.
_SECRET_PAIR = re.compile(
    rf"(?i)(?<![\w.-])([\w.-]{{0,80}}?(?:{_SECRET_WORD})[\w.-]{{0,80}}"
    r"(?:\s{0,3}=\s{0,3}[\"']?|[\"']\s{0,3}:\s{0,3}[\"']))(?!secret://)[^\s;&,'\"]+"
)
_URL_PASSWORD = re.compile(
    r"(?i)(?<![a-z0-9+.-])([a-z][a-z0-9+.-]{0,20}://)(?:[^\s/@:]*:(?:(?!://)[^\s@])+|(?<=https://)[^\s/@]+)@"
)
_NAMED_VALUES = frozenset({"environment_variables", "build_args", "labels"})
_REFERENCE = "secret://"


def redact(request: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON copy of a request without its secrets; `secret://` references stay, they hide nothing."""
    return {
        str(name): _redact_named(value) if name in _NAMED_VALUES else _redact_value(value)
        for name, value in request.items()
    }


def _redact_value(value: Any) -> Any:
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return redact(value)
    if isinstance(value, list | tuple):
        return _redact_arguments(value)
    return jsonable(value)


def _redact_named(values: Any) -> Any:
    if not isinstance(values, Mapping):
        return _redact_value(values)
    return {str(name): _redact_variable(str(name), value) for name, value in values.items()}


def _redact_variable(name: str, value: Any) -> Any:
    if isinstance(value, str) and value.startswith(_REFERENCE):
        return value
    if _SECRET_NAME.search(name) or (isinstance(value, str) and _URL_PASSWORD.search(value)):
        return MASK
    return jsonable(value)


def _redact_arguments(values: list[Any] | tuple[Any, ...]) -> list[Any]:
    """A list of values; after a bare flag such as `--password` the next one is its secret."""
    flags = [None, *values[:-1]] if values else []
    return [
        MASK
        if isinstance(flag, str) and flag.startswith("-") and "=" not in flag and _SECRET_NAME.search(flag)
        else _redact_value(value)
        for flag, value in zip(flags, values, strict=True)
    ]


def jsonable(value: Any) -> Any:
    """`value` as JSON that both databases and every consumer can hold, passwords in texts masked."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, BaseModel):
        return jsonable(value.model_dump(mode="json"))
    if isinstance(value, Mapping):
        return {clean_text(str(name)): jsonable(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(inner) for inner in value]
    if isinstance(value, float) and value - value == 0:  # neither infinite nor NaN
        return value
    return clean_text(value.isoformat() if isinstance(value, datetime) else str(value))


def clean_text(text: str) -> str:
    """`text` without NUL and lone surrogates (PostgreSQL refuses both) and without passwords."""
    text = text.encode("utf-8", "replace").decode().replace("\0", "\ufffd")
    return _SECRET_PAIR.sub(rf"\1{MASK}", _URL_PASSWORD.sub(rf"\1{MASK}@", text))
