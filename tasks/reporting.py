"""What a person and the next program are shown: the specification's output artifacts.

Each is a file under `$GANTRY_HOME/artifacts/<workflow_id>/` and a Prefect artifact of the run.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Coroutine, Sequence
from dataclasses import asdict
from typing import Any

import httpx
from prefect.artifacts import acreate_link_artifact, acreate_markdown_artifact
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger

from receiver.contract import DeploymentStatus
from tasks.events import clean_text, jsonable
from tasks.outcome import health_status as outcome_of
from tasks.package import ImageMetadata, ImagePackage
from tasks.results import DeploymentResult, outcome
from tasks.states import StageResult
from tasks.store import artifacts_dir

_SHOWN_CHARACTERS = 20_000
_CELL_CHARACTERS = 300


async def write_artifact(workflow_id: str, name: str, content: Any) -> str:
    """Write `name` (`.json` or `.txt`) and show it in the run; returns the file's path."""
    is_text = isinstance(content, str)
    text = clean_text(content) if is_text else json.dumps(jsonable(content), indent=2, sort_keys=True)
    path = artifacts_dir(workflow_id) / name
    await asyncio.to_thread(path.write_text, text, encoding="utf-8")
    kind = "json" if name.endswith(".json") else "text"
    await acreate_markdown_artifact(
        markdown=_fenced(kind, text[:_SHOWN_CHARACTERS]),
        key=name.rpartition(".")[0].replace("_", "-"),
        description=f"{name} (also at {path})",
    )
    return str(path)


async def write_package_artifacts(
    workflow_id: str, metadata: ImageMetadata, image: ImagePackage
) -> dict[str, str]:
    """Stage 1: `deployment_metadata.json` and `image_manifest.json`; returns their paths by name."""
    manifest = {
        "reference": metadata.reference,
        "config_digest": image.config_digest,
        "layers": metadata.layers,
        "config": metadata.config,
        "package": image.model_dump(mode="json"),
    }
    return {
        "docker_image": metadata.reference,
        "deployment_metadata.json": await write_artifact(
            workflow_id, "deployment_metadata.json", metadata.model_dump(mode="json")
        ),
        "image_manifest.json": await write_artifact(workflow_id, "image_manifest.json", manifest),
    }


async def write_receipt(
    workflow_id: str, image: ImagePackage, status: DeploymentStatus, *, sent_bytes: int
) -> dict[str, str]:
    """Stage 2: `transfer_receipt.json`."""
    receipt = {
        "remote_deployment_id": status.deployment_id,
        "state": status.state,
        "package_bytes": image.size_bytes,
        "package_blake3": image.blake3,
        "sent_bytes": sent_bytes,
    }
    path = await write_artifact(workflow_id, "transfer_receipt.json", receipt)
    return {"transfer_receipt.json": path, "remote_deployment_id": status.deployment_id}


async def write_host_artifacts(workflow_id: str, status: DeploymentStatus | None) -> None:
    """Stages 3 and 4: `deployment_logs.txt` and `health_check_results.json`; none without a host's word."""
    if status is None or not status.facts.container_id:
        return
    await write_artifact(workflow_id, "deployment_logs.txt", status.facts.log_tail)
    results = {
        "health_status": outcome_of(status),
        "attempts": [attempt.model_dump(mode="json") for attempt in status.health_attempts],
        "gates": [gate.model_dump(mode="json") for gate in status.gates],
    }
    await write_artifact(workflow_id, "health_check_results.json", results)


async def shown(writing: Coroutine[Any, Any, dict[str, str]]) -> dict[str, str]:
    """What was written, by name; nothing, with a warning, when it cannot be: no deployment fails by it."""
    try:
        return await writing
    except (OSError, httpx.HTTPError, PrefectException) as exc:
        get_run_logger().warning("an artifact could not be shown: %s: %s", type(exc).__name__, exc)
        return {}


async def publish(
    result: DeploymentResult,
    stages: Sequence[StageResult],
    status: DeploymentStatus | None,
    *,
    next_step: str = "",
) -> None:
    """Everything that is shown at the end of a workflow.

    What cannot be shown is told as a warning: the end itself is in the records, and it stands.
    """
    log_tail = status.facts.log_tail if status else ""
    try:
        await write_host_artifacts(result.workflow_id, status)
        await write_report(result, stages, log_tail=log_tail, next_step=next_step)
    except (OSError, httpx.HTTPError, PrefectException) as exc:
        get_run_logger().warning("the report could not be shown in full: %s: %s", type(exc).__name__, exc)


async def write_report(
    result: DeploymentResult, stages: Sequence[StageResult], *, log_tail: str = "", next_step: str = ""
) -> None:
    """Write `deployment_report.json`, show the report, and link the deployed URL."""
    document = jsonable(
        {"result": result.model_dump(mode="json"), "stages": [asdict(stage) for stage in stages]}
    )
    path = artifacts_dir(result.workflow_id) / "deployment_report.json"
    await asyncio.to_thread(path.write_text, json.dumps(document, indent=2, sort_keys=True), encoding="utf-8")
    await acreate_markdown_artifact(
        markdown=render_report(result, stages, log_tail=log_tail, next_step=next_step),
        key="deployment-report",
        description=f"{result.container_name}:{result.image_tag} on {result.remote_host}",
    )
    if result.success and result.deployed_url:
        await acreate_link_artifact(
            link=result.deployed_url, key="deployed-url", description=f"{result.container_name} answers here"
        )


def render_report(
    result: DeploymentResult, stages: Sequence[StageResult], *, log_tail: str = "", next_step: str = ""
) -> str:
    """The report in Markdown: the outcome first, then stages, operations and gates."""
    lines = [
        f"# {result.container_name}:{result.image_tag} on {result.remote_host}: {result.state}",
        "",
        f"**{outcome(result)}** after {result.total_duration_ms / 1000:.1f} s"
        + (f", at {result.deployed_url}" if result.deployed_url else ""),
    ]
    if result.error_message:
        lines += ["", f"`{result.error_code}`: {_line(result.error_message)}"]
    if next_step:
        lines += ["", f"Next: {_line(next_step)}"]
    lines += ["", "| stage | operation | took | |", "|---|---|---:|---|", *_operation_rows(stages)]
    lines += ["", "| quality gate | | |", "|---|---|---|", *_gate_rows(stages)]
    if log_tail and not result.success:
        lines += ["", "Last lines of the failed container:", "", _fenced("text", clean_text(log_tail))]
    return "\n".join([*lines, "", f"Workflow `{result.workflow_id}`", ""])


def _operation_rows(stages: Sequence[StageResult]) -> list[str]:
    rows = []
    for stage in stages:
        rows.append(f"| **{stage.stage}** | | {stage.duration_ms} ms | {_verdict(passed=stage.success)} |")
        for done in stage.operations:
            verdict = f"{_verdict(passed=done.success)} {_cell(done.message)}"
            rows.append(f"| | {done.name} | {done.duration_ms} ms | {verdict} |")
    return rows


def _gate_rows(stages: Sequence[StageResult]) -> list[str]:
    return [
        f"| {gate.name} | {_verdict(passed=gate.passed)} | {_cell(gate.message)} |"
        for stage in stages
        for gate in stage.gates
    ]


def _verdict(*, passed: bool) -> str:
    return "passed" if passed else "**failed**"


def _line(text: str) -> str:
    """One line without secrets, in which no HTML begins."""
    return " ".join(clean_text(text).split()).replace("<", "&lt;")


def _cell(text: str) -> str:
    """A line that stays in its cell of a table."""
    return _line(text)[:_CELL_CHARACTERS].replace("\\", "\\\\").replace("|", "\\|")


def _fenced(kind: str, text: str) -> str:
    """A code block that no line of the text can end."""
    longest = max((len(run) for run in re.findall("`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{kind}\n{text.rstrip()}\n{fence}"
