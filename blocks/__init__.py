"""Prefect Blocks: typed configuration and a client; no workflow logic.

Owns the names that `prefect block register -m blocks` finds, and the look-up of a saved block. The
names load on first use, so that `blocks.receiver_client` imports without Prefect.
Must not import flows, tasks, deployments, or anything of the receiver but contract and signing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from prefect.blocks.core import Block

    from blocks.event_broker import EventBroker
    from blocks.hmac_secret import HmacSecret
    from blocks.records_database import RecordsDatabase
    from blocks.remote_host import RemoteHost

__all__ = ["EventBroker", "HmacSecret", "RecordsDatabase", "RemoteHost", "load_if_saved"]

BlockT = TypeVar("BlockT", bound="Block")

_MODULES = {
    "EventBroker": "blocks.event_broker",
    "HmacSecret": "blocks.hmac_secret",
    "RecordsDatabase": "blocks.records_database",
    "RemoteHost": "blocks.remote_host",
}


async def load_if_saved(block_class: type[BlockT], name: str) -> BlockT | None:
    """The saved block of that name, or None when there is none; any other failure rises."""
    from prefect.exceptions import ObjectNotFound

    try:
        return await block_class.aload(name)
    except ValueError as exc:
        # Prefect turns "not found" into a bare ValueError; its cause tells it from all the others.
        if isinstance(exc.__cause__, ObjectNotFound):
            return None
        raise


if not TYPE_CHECKING:

    def __getattr__(name: str) -> type[Block]:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_MODULES[name]), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
