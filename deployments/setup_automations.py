"""The automations of `deployments/automations/`, one file each, as set-up installs them.

A file is what Prefect's API takes, with two things left to set-up: `deployment: <flow>/<name>` for the id of
a Prefect deployment to run, and the block of each `send-notification`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import yaml
from prefect.client.orchestration import get_client
from prefect.events.schemas.automations import Automation, AutomationCore
from prefect.exceptions import ObjectNotFound
from pydantic import ValidationError

from deployments.setup_items import Change, Item, SetupRefused, item

FOLDER = Path(__file__).with_name("automations")
BLOCK_VARIABLE = "GANTRY_NOTIFICATION_BLOCK"
_COMPARED = ("description", "tags", "trigger", "actions")
_NO_BLOCK = f"no notification block was named: give --notify TYPE/NAME or {BLOCK_VARIABLE}"


@dataclass(frozen=True)
class Definition:
    """One file: an automation whose actions still lack their ids."""

    file: str
    content: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name of the automation, by which an installed one is found again."""
        return str(self.content["name"])

    @property
    def notifies(self) -> bool:
        """True when it needs a notification block."""
        return any(action["type"] == "send-notification" for action in self.content["actions"])

    @property
    def deployments(self) -> list[str]:
        """The Prefect deployments that it runs."""
        return [action["deployment"] for action in self.content["actions"] if "deployment" in action]

    def automation(self, block: UUID | None, ids: Mapping[str, UUID]) -> AutomationCore:
        """As Prefect takes it; raises `SetupRefused` for a file that says what Prefect does not know."""
        actions = [_action(action, block, ids) for action in self.content["actions"]]
        try:
            return AutomationCore.model_validate({**self.content, "actions": actions})
        except ValidationError as exc:
            raise SetupRefused(f"{self.file}: {exc}") from exc


def definitions(folder: Path = FOLDER) -> list[Definition]:
    """The automations of a folder, by file name."""
    return [Definition(file.name, yaml.safe_load(file.read_text())) for file in sorted(folder.glob("*.yaml"))]


async def automations(notify: str | None, folder: Path = FOLDER) -> list[Item]:
    """Each automation; those that notify are left out where there is no block for them.

    Raises `SetupRefused` when `notify` (`type-slug/name`) is no saved notification block.
    """
    block = await _notification_block(notify) if notify else None
    return [await _automation(each, block) for each in definitions(folder)]


async def _automation(definition: Definition, block: UUID | None) -> Item:
    installed = await _installed(definition.name)
    block = block or _block_of(installed)
    if definition.notifies and block is None:
        return Item("automation", definition.name, Change.LEFT_OUT, _NO_BLOCK)

    async def apply() -> None:
        ids = await _ids(definition.deployments)
        if missing := sorted(set(definition.deployments) - set(ids)):
            raise SetupRefused(f"{definition.file}: there is no Prefect deployment {', '.join(missing)}")
        await _install(definition.automation(block, ids), installed)

    ids = await _ids(definition.deployments)
    differs = _differences(definition, block, ids, installed)
    return item("automation", definition.name, exists=installed is not None, differs=differs, apply=apply)


def _differences(
    definition: Definition, block: UUID | None, ids: Mapping[str, UUID], installed: Automation | None
) -> list[str]:
    if set(definition.deployments) - set(ids):
        return ["actions"]
    wanted = definition.automation(block, ids).model_dump()
    found = installed.model_dump() if installed else wanted
    return [name for name in _COMPARED if wanted[name] != found[name]]


async def _install(wanted: AutomationCore, installed: Automation | None) -> None:
    async with get_client() as client:
        if installed is None:
            await client.create_automation(wanted)
            return
        wanted.enabled = installed.enabled  # who has switched one off wants it off
        await client.update_automation(installed.id, wanted)


async def _installed(name: str) -> Automation | None:
    async with get_client() as client:
        found = await client.read_automations_by_name(name)
    return found[0] if found else None


async def _ids(names: list[str]) -> dict[str, UUID]:
    """Ids of those Prefect deployments that exist."""
    found = {}
    async with get_client() as client:
        for name in names:
            try:
                found[name] = (await client.read_deployment_by_name(name)).id
            except ObjectNotFound:
                continue
    return found


async def _notification_block(name: str) -> UUID:
    slug, _, block = name.partition("/")
    async with get_client() as client:
        try:
            document = await client.read_block_document_by_name(block, slug, include_secrets=False)
        except ObjectNotFound as exc:
            raise SetupRefused(
                f"there is no block {name!r}: give it as TYPE/NAME, such as slack-webhook/ops; "
                "'prefect block ls' lists those that there are"
            ) from exc
    if document.block_schema is None or "notify" not in document.block_schema.capabilities:
        raise SetupRefused(f"the block {name!r} cannot notify: name one such as slack-webhook/ops")
    return document.id


def _block_of(installed: Automation | None) -> UUID | None:
    """The block that an installed automation notifies through."""
    actions = installed.actions if installed else []
    return next((action.block_document_id for action in actions if action.type == "send-notification"), None)


def _action(told: Mapping[str, Any], block: UUID | None, ids: Mapping[str, UUID]) -> dict[str, Any]:
    action = dict(told)
    if deployment := action.pop("deployment", None):
        action["deployment_id"] = ids[deployment]
    if action["type"] == "send-notification":
        action["block_document_id"] = block
    return action
