"""What is done about a dead letter: people are told, and it is deployed again when somebody asks.

Reading the queue stands in `tasks.dead_letter_queue`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any
from uuid import UUID

from prefect import task
from prefect.blocks.abstract import NotificationBlock
from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.deployments import arun_deployment
from prefect.exceptions import ObjectNotFound
from prefect.plugins import load_prefect_collections
from pydantic import ValidationError

from blocks import load_if_saved
from receiver.contract import ErrorCode
from tasks.dead_letter_queue import DeadLetter, Malformed
from tasks.errors import ERROR_RULES, GantryError
from tasks.events import MASK
from tasks.parameters import DeploymentParameters

DEPLOYMENT = "deploy-container/default"
_IDEMPOTENCY = "redeploy-"
_RUN_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")  # a workflow's id begins with its run's


class RedeployRefused(GantryError):
    """A dead letter cannot be deployed again by itself"""

    next_step = "Start deploy-container/default with the parameters given anew."


class NotificationBlockRefused(GantryError):
    """The parameter notification_block names no notification block"""

    next_step = "Give it as type-slug/name, such as 'slack-webhook/ops'; 'prefect block ls' lists the blocks."


def message_of(content: DeadLetter | Malformed, outcome: str = "") -> tuple[str, str]:
    """Subject and body of the notification; `outcome` says what was decided on deploying it again."""
    if isinstance(content, Malformed):
        subject = "ERROR: a dead letter cannot be read"
        return subject, f"{content.place}\n{content.problem}\nIt is skipped. It begins: {content.shown}"
    failed = content.payload
    rule = ERROR_RULES[ErrorCode(failed.error_code)] if failed.error_code in list(ErrorCode) else None
    level = "CRITICAL" if content.critical else "ERROR"
    what = f"{failed.container_name}:{failed.image_tag} to {failed.remote_host}"
    lines = [
        f"Workflow: {content.workflow_id}",
        f"Error: {failed.error_code} - {failed.error_message}",
        f"Retry count: {failed.retry_count}",
        *([f"Action: {rule.action}"] if rule else []),
        *([f"Deploy again: {outcome}"] if outcome else []),
    ]
    return f"{level}: deployment of {what} failed: {failed.error_code}", "\n".join(lines)


def redeploy_parameters(letter: DeadLetter) -> dict[str, Any]:
    """Parameters for `deploy-container`; raises `RedeployRefused` when some were redacted or do not fit."""
    request = letter.payload.request
    if masked := sorted(_masked(request)):
        raise RedeployRefused(
            f"{', '.join(masked)}: the value is redacted in the dead letter",
            next_step="Start deploy-container/default and give the value anew, best by secret:// reference.",
        )
    try:
        return DeploymentParameters.model_validate(request).model_dump(mode="json")
    except ValidationError as exc:
        fields = ", ".join(sorted({".".join(map(str, error["loc"])) for error in exc.errors()}))
        raise RedeployRefused(f"{fields}: the dead letter's request does not fit any more") from exc


async def automatic_refusal(letter: DeadLetter) -> RedeployRefused | None:
    """Why the letter may not be deployed again without anybody having looked at it, or None."""
    code = letter.payload.error_code
    if code in list(ErrorCode) and not ERROR_RULES[ErrorCode(code)].retry_allowed:
        return RedeployRefused(f"{code} wants a person first")
    if await _was_redeployed(letter.workflow_id):
        return RedeployRefused("it was deployed again already, and failed again")
    try:
        redeploy_parameters(letter)
    except RedeployRefused as refused:
        return refused
    return None


async def start_redeployment(letter: DeadLetter) -> UUID:
    """Start `deploy-container/default` with the letter's parameters; the same letter gives the same run."""
    try:
        run = await arun_deployment(
            DEPLOYMENT,
            parameters=redeploy_parameters(letter),
            timeout=0,
            as_subflow=False,
            tags=[f"redeploys:{letter.workflow_id}"],
            idempotency_key=f"{_IDEMPOTENCY}{letter.envelope.event_id}",
        )
    except ObjectNotFound as exc:
        raise RedeployRefused(
            f"Prefect knows no deployment {DEPLOYMENT!r}", next_step="Register it: prefect deploy --all"
        ) from exc
    return run.id


async def check_notification_block(name: str) -> None:
    """Raise `NotificationBlockRefused` unless `name` (`type-slug/name`) is a saved notification block."""
    await _load(name)


@task(name="notify", retries=2, retry_delay_seconds=[1, 3])
async def notify(block_name: str, subject: str, body: str) -> None:
    """Tell people through a Prefect notification block; any failure rises after three tries."""
    block = await _load(block_name)
    with block.raise_on_failure():
        sending: object = block.notify(body, subject)
        if inspect.isawaitable(sending):  # a block of somebody else's may be synchronous
            await sending


async def _load(name: str) -> NotificationBlock:
    load_prefect_collections()  # so that blocks of installed integrations are known
    block = await load_if_saved(Block, name) if "/" in name else None
    if not isinstance(block, NotificationBlock):
        raise NotificationBlockRefused(f"notification_block: {name!r} is no saved notification block")
    return block


async def _was_redeployed(workflow_id: str) -> bool:
    """True when the workflow's flow run was started for a dead letter itself: else it would never end."""
    run_id = _RUN_ID.match(workflow_id)
    if run_id is None:
        return False
    async with get_client() as client:
        try:
            run = await client.read_flow_run(UUID(run_id[0]))
        except ObjectNotFound:
            return False
    return (run.idempotency_key or "").startswith(_IDEMPOTENCY)


def _masked(value: Any, path: str = "") -> Iterator[str]:
    """Paths of the values that hold the mask, or a part of them does."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _masked(inner, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _masked(inner, f"{path}.{number}")
    elif isinstance(value, str) and MASK in value:
        yield path
