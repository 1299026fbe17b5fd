"""Block types and blocks as set-up wants them: from the environment and the hosts it was told of.

What a person added to a saved block (an SSH user, a SASL password) stays: only what set-up knows is compared.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound

from blocks import load_if_saved
from blocks.event_broker import EventBroker
from blocks.hmac_secret import KEY_VARIABLE, HmacSecret
from blocks.records_database import RecordsDatabase
from blocks.remote_host import RemoteHost, saved_host_names
from deployments.setup_hosts import HostAddress
from deployments.setup_items import Change, Item, item

OURS = (EventBroker, HmacSecret, RecordsDatabase, RemoteHost)


async def block_types() -> list[Item]:
    """Our block types, and prefect-docker's `DockerHost` for the engine that builds."""
    # Slow to import, and nothing else needs it.
    from prefect_docker.host import DockerHost  # type: ignore[import-untyped]  # it ships no types

    return [await _block_type(kind) for kind in (*OURS, DockerHost)]


async def _block_type(kind: type[Block]) -> Item:
    slug, exists, differs = kind.get_block_type_slug(), True, []
    async with get_client() as client:
        try:
            await client.read_block_type_by_slug(slug)
        except ObjectNotFound:
            exists = False
        try:
            await client.read_block_schema_by_checksum(
                kind._calculate_schema_checksum(), version=kind.get_block_schema_version()
            )
        except ObjectNotFound:
            differs = ["schema"]
    return item("block type", slug, exists=exists, differs=differs, apply=kind.aregister_type_and_schema)


async def environment_blocks() -> list[Item]:
    """`event-broker/default` and `records-database/default`, for the variables that are set."""
    found = []
    if broker := EventBroker.from_environment():
        found.append(await broker_block(broker.bootstrap_servers))
    if os.environ.get("DATABASE_URL", "").strip():
        url = RecordsDatabase.from_environment().url
        found.append(await _block(RecordsDatabase, "default", {"url": url}))
    return found


async def broker_block(servers: str) -> Item:
    """`event-broker/default`: every deployment publishes its events there."""
    wanted = EventBroker(bootstrap_servers=servers)
    return await _block(EventBroker, "default", {"bootstrap_servers": wanted.bootstrap_servers})


async def host_blocks(host: HostAddress) -> list[Item]:
    """`hmac-secret/<host>` and `remote-host/<host>`.

    Raises `HmacKeyMissing` when HMAC_SECRET_KEY is not set and the host has no key yet.
    """
    return [await _key_block(host.name), await _host_block(host)]


async def _key_block(name: str) -> Item:
    if not os.environ.get(KEY_VARIABLE, "").strip() and await load_if_saved(HmacSecret, name):
        detail = f"{KEY_VARIABLE} is not set, the saved key stays"
        return Item("block", f"hmac-secret/{name}", Change.UNCHANGED, detail)
    key = HmacSecret.from_environment(block=f"hmac-secret/{name}")
    return await _block(HmacSecret, name, {"current": key.current, "previous": key.previous})


async def _host_block(host: HostAddress) -> Item:
    wanted = RemoteHost(address=host.address, port=host.port, tls=host.tls)
    values: dict[str, Any] = {"address": wanted.address, "port": wanted.port, "tls": wanted.tls}
    if host.worker_python:
        values["worker_python"] = host.worker_python
    saved = await load_if_saved(RemoteHost, host.name)
    differs = _differences(saved, values)
    if saved is not None and _key_of(saved) != host.name:
        differs.append("hmac_secret")

    async def save() -> None:
        key = await HmacSecret.aload(host.name)
        await _save(RemoteHost, host.name, saved, {**values, "hmac_secret": key})

    name = f"remote-host/{host.name}"
    return item("block", name, exists=saved is not None, differs=differs, apply=save)


def _key_of(host: RemoteHost) -> str | None:
    return host.hmac_secret._block_document_name if host.hmac_secret else None


async def _block(kind: type[Block], name: str, values: Mapping[str, Any]) -> Item:
    saved = await load_if_saved(kind, name)

    async def save() -> None:
        await _save(kind, name, saved, values)

    title = f"{kind.get_block_type_slug()}/{name}"
    differs = _differences(saved, values)
    return item("block", title, exists=saved is not None, differs=differs, apply=save)


def _differences(saved: Block | None, values: Mapping[str, Any]) -> list[str]:
    return [name for name, value in values.items() if saved is not None and getattr(saved, name) != value]


async def _save(kind: type[Block], name: str, saved: Block | None, values: Mapping[str, Any]) -> None:
    kept = {field: getattr(saved, field) for field in kind.model_fields} if saved is not None else {}
    await kind.model_validate({**kept, **values}).asave(name, overwrite=True)


async def known_hosts(told: Sequence[HostAddress]) -> list[RemoteHost]:
    """The hosts that set-up was told of, and those saved before, as blocks with their names."""
    hosts = {name: await RemoteHost.aload(name) for name in await saved_host_names()}
    for each in told:
        saved = hosts.get(each.name)
        block = RemoteHost(address=each.address, port=each.port, tls=each.tls)
        block.work_pool = saved.work_pool if saved else None
        block.worker_python = each.worker_python or (saved.worker_python if saved else None)
        block._block_document_name = each.name
        hosts[each.name] = block
    return list(hosts.values())
