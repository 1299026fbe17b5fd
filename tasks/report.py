"""The report of a deployment in Markdown: the outcome first, what to do next, then how it went. Pure.

What a builder, a container or a host said is shown as text: no secret, no HTML, no broken table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from receiver.contract import DeploymentStatus, HealthAttempt, HostFacts
from tasks.events import clean_text
from tasks.results import DeploymentResult, outcome
from tasks.states import StageResult
from tasks.wording import duration, moment, size, stage_title

_CELL_CHARACTERS = 300
_PASSED, _FAILED = "✓", "✗"  # in any font, unlike emoji
_NO_BREAK = "\u00a0"


def render_report(
    result: DeploymentResult,
    stages: Sequence[StageResult],
    status: DeploymentStatus | None = None,
    *,
    next_step: str = "",
) -> str:
    """The report; `status` is what the host said last, None when it was not heard."""
    attempts = status.health_attempts if status else []
    facts = status.facts if status else HostFacts()
    blocks = [
        *_outcome(result, next_step),
        _table("| Summary | |", "|---|---|", _summary_rows(result, status)),
        _table("| Stage | Operation | Took | |", "|---|---|---:|---|", _operation_rows(stages)),
        _table(
            "| Health attempt | | Answer | Took | At |", "|---:|---|---|---:|---|", _attempt_rows(attempts)
        ),
        _table("| Quality gate | | |", "|---|---|---|", _gate_rows(stages)),
    ]
    if facts.log_tail and not result.success:
        blocks.append(f"Last lines of the failed container:\n\n{fenced('text', clean_text(facts.log_tail))}")
    return "\n\n".join([*filter(None, blocks), f"Workflow `{result.workflow_id}`\n"])


def _outcome(result: DeploymentResult, next_step: str) -> Iterator[str]:
    mark = _PASSED if result.success else _FAILED
    yield f"# {mark} {result.container_name}:{result.image_tag} on {result.remote_host}: {result.state}"
    where = f", at [{result.deployed_url}]({result.deployed_url})" if result.deployed_url else ""
    yield f"**{outcome(result)}** after {duration(result.total_duration_ms)}{where}"
    if result.error_message:
        yield f"**Cause**: `{result.error_code}`: {line(result.error_message)}"
    if next_step:
        yield f"**Next**: {line(next_step)}"


def _summary_rows(result: DeploymentResult, status: DeploymentStatus | None) -> Iterator[str]:
    if result.image_size_bytes is not None:
        short_id = f", `{result.image_id[:19]}`" if result.image_id else ""
        yield f"| Image | {size(result.image_size_bytes)}{short_id} |"
    sent_bytes = result.deployment_metrics.get("transferred_bytes")
    if sent_bytes is not None:
        yield f"| Transferred | {_transferred(int(sent_bytes), status)} |"
    if packed := _packed(result.deployment_metrics):
        yield f"| Package | {packed} |"
    silent_ms = result.deployment_metrics.get("service_interruption_ms")
    if silent_ms is None and status is not None:
        silent_ms = status.facts.service_interruption_ms
    if silent_ms is not None:
        yield f"| Without service | {duration(silent_ms)} |"
    if undone := result.rollback_result:
        took = duration(undone.get("rollback_duration_ms") or 0)
        yield f"| Rollback | {_verdict(passed=bool(undone.get('success')))} in {took} |"


def _transferred(sent_bytes: int, status: DeploymentStatus | None) -> str:
    """Bytes that travelled, and those of the package that the host had already."""
    reused_bytes = max(((status.package_bytes if status else None) or 0) - sent_bytes, 0)
    if reused_bytes:
        return f"{size(sent_bytes)} sent, {size(reused_bytes)} reused: the host had them"
    return f"{size(sent_bytes)} sent" if sent_bytes else "nothing had to be sent"


def _packed(metrics: Mapping[str, Any]) -> str:
    """Which way was taken, what of the image was left out, and what compression saved."""
    if metrics.get("transfer_way") not in {"archive", "layers"}:
        return ""
    known, sent = int(metrics["layers_known"]), int(metrics["layers_sent"])
    before, after = size(int(metrics["unpacked_bytes"])), size(int(metrics["package_bytes"]))
    return f"by {metrics['transfer_way']}: {sent} of {known + sent} layers, {before} in {after}"


def _operation_rows(stages: Sequence[StageResult]) -> Iterator[str]:
    for stage in stages:
        verdict = _verdict(passed=stage.success)
        title = _unbroken(stage_title(stage.stage))
        yield f"| **{title}** | | **{_unbroken(duration(stage.duration_ms))}** | {verdict} |"
        for done in stage.operations:
            told = f"{_verdict(passed=done.success)} {cell(done.message)}".rstrip()
            yield f"| | {done.name} | {_unbroken(duration(done.duration_ms))} | {told} |"


def _attempt_rows(attempts: Sequence[HealthAttempt]) -> Iterator[str]:
    for asked in attempts:
        answer = f"HTTP {asked.status_code}" if asked.status_code else ""
        told = " ".join(filter(None, (answer, cell(asked.message))))
        verdict = _verdict(passed=asked.status == "passed")
        took, at = _unbroken(duration(asked.duration_ms)), moment(asked.checked_at)
        yield f"| {asked.attempt} | {verdict} | {told} | {took} | {at} |"


def _gate_rows(stages: Sequence[StageResult]) -> Iterator[str]:
    for stage in stages:
        for gate in stage.gates:
            yield f"| {gate.name} | {_verdict(passed=gate.passed)} | {cell(gate.message)} |"


def _table(head: str, rule: str, rows: Iterator[str]) -> str:
    """A table, or nothing where it would be empty."""
    body = list(rows)
    return "\n".join([head, rule, *body]) if body else ""


def _unbroken(words: str) -> str:
    """On one line in its cell, however narrow."""
    return words.replace(" ", _NO_BREAK)


def _verdict(*, passed: bool) -> str:
    return _PASSED if passed else f"{_FAILED} **failed**"


def line(text: str) -> str:
    """One line without secrets, in which no HTML begins."""
    return " ".join(clean_text(text).split()).replace("<", "&lt;")


def cell(text: str) -> str:
    """A line that stays in its cell of a table."""
    return line(text)[:_CELL_CHARACTERS].replace("\\", "\\\\").replace("|", "\\|")


def fenced(kind: str, text: str) -> str:
    """A code block that no line of the text can end."""
    longest = max((len(run) for run in re.findall("`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{kind}\n{text.rstrip()}\n{fence}"
