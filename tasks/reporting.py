"""What a person and the next program are shown: the specification's output artifacts.

Each is a file under `$GANTRY_HOME/artifacts/<workflow_id>/` and a Prefect artifact of the run.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Sequence
from dataclasses import asdict
from typing import Any

import httpx
from prefect.artifacts import acreate_link_artifact, acreate_markdown_artifact
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger
from prefect.utilities.slugify import slugify

from receiver.contract import DeploymentStatus
from tasks.delivery import Delivery
from tasks.events import clean_text, jsonable
from tasks.outcome import health_status as outcome_of
from tasks.package import ImageMetadata
from tasks.report import fenced, render_report
from tasks.results import DeploymentResult
from tasks.states import StageResult
from tasks.store import artifacts_dir

_SHOWN_CHARACTERS = 20_000


async def write_artifact(workflow_id: str, name: str, content: Any) -> str:
    """Write `name` (`.json` or `.txt`) and show it in the run; returns the file's path."""
    is_text = isinstance(content, str)
    text = clean_text(content) if is_text else json.dumps(jsonable(content), indent=2, sort_keys=True)
    path = artifacts_dir(workflow_id) / name
    await asyncio.to_thread(path.write_text, text, encoding="utf-8")
    kind = "json" if name.endswith(".json") else "text"
    await acreate_markdown_artifact(
        markdown=fenced(kind, text[:_SHOWN_CHARACTERS]),
        key=name.rpartition(".")[0].replace("_", "-"),
        description=f"{name} (also at {path})",
    )
    return str(path)


async def write_package_artifacts(workflow_id: str, metadata: ImageMetadata) -> dict[str, str]:
    """Stage 1: `deployment_metadata.json` and `image_manifest.json`; returns their paths by name."""
    manifest = {
        "reference": metadata.reference,
        "config_digest": metadata.config_digest,
        "layers": metadata.layers,
        "config": metadata.config,
    }
    return {
        "docker_image": metadata.reference,
        "deployment_metadata.json": await write_artifact(
            workflow_id, "deployment_metadata.json", metadata.model_dump(mode="json")
        ),
        "image_manifest.json": await write_artifact(workflow_id, "image_manifest.json", manifest),
    }


async def write_receipt(workflow_id: str, status: DeploymentStatus, delivery: Delivery) -> dict[str, str]:
    """Stage 2: `transfer_receipt.json`."""
    receipt = {
        "remote_deployment_id": status.deployment_id,
        "state": status.state,
        **delivery.model_dump(mode="json"),
    }
    path = await write_artifact(workflow_id, "transfer_receipt.json", receipt)
    return {"transfer_receipt.json": path, "remote_deployment_id": status.deployment_id}


async def write_host_artifacts(workflow_id: str, status: DeploymentStatus | None) -> None:
    """Stages 3 and 4: `deployment_logs.txt` and `health_check_results.json`; none without a host's word."""
    if status is None or not status.facts.container_id:
        return
    log_tail = status.facts.log_tail or "(the container wrote nothing)"
    await write_artifact(workflow_id, "deployment_logs.txt", log_tail)
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
    try:
        await write_host_artifacts(result.workflow_id, status)
        await write_report(result, stages, status, next_step=next_step)
    except (OSError, httpx.HTTPError, PrefectException) as exc:
        get_run_logger().warning("the report could not be shown in full: %s: %s", type(exc).__name__, exc)


async def write_report(
    result: DeploymentResult,
    stages: Sequence[StageResult],
    status: DeploymentStatus | None,
    *,
    next_step: str = "",
) -> None:
    """Write `deployment_report.json`, show the report, and link the deployed URL."""
    document = jsonable(
        {"result": result.model_dump(mode="json"), "stages": [asdict(stage) for stage in stages]}
    )
    path = artifacts_dir(result.workflow_id) / "deployment_report.json"
    await asyncio.to_thread(path.write_text, json.dumps(document, indent=2, sort_keys=True), encoding="utf-8")
    await acreate_markdown_artifact(
        markdown=render_report(result, stages, status, next_step=next_step),
        key="deployment-report",
        description=f"{result.container_name}:{result.image_tag} on {result.remote_host}",
    )
    if result.success and result.deployed_url:
        await acreate_link_artifact(
            link=result.deployed_url,
            key=slugify(f"url-{result.container_name}-on-{result.remote_host}"),
            description=f"{result.container_name}:{result.image_tag} on {result.remote_host} answers here",
        )
