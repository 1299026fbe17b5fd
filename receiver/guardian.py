"""Finishes what a dead process left: an unfinished entry whose lock is free is restored at once.

A process that hangs is ended first, at the deadline that it noted itself.

Needs neither the control host nor the network nor Prefect. Runs in the daemon.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

import requests.exceptions

from receiver.contract import HostState
from receiver.engine import EngineUnreachable
from receiver.ledger import Entry, StateConflict
from receiver.locks import LockHeld, end_overdue
from receiver.operations import Host, RestoreFailed, left_unfinished

log = logging.getLogger(__name__)
INTERVAL_SECONDS = 2.0


@dataclass
class Guardian:
    """Watches the ledger; `actions` counts the deployments it restored, `tell` hears how each ended."""

    host: Host
    interval_seconds: float = INTERVAL_SECONDS
    actions: int = 0
    tell: Callable[[HostState], None] = lambda _: None

    async def run(self) -> None:
        """Look every two seconds, for ever."""
        while True:
            await self.look()
            await asyncio.to_thread(self.host.ledger.keep_reserve)
            await asyncio.sleep(self.interval_seconds)

    async def look(self) -> None:
        """Restore every entry that a dead process left unfinished."""
        for entry in await asyncio.to_thread(left_unfinished, self.host.ledger):
            try:
                await self._settle(entry)
            except Exception:  # one odd entry must not keep the others from being restored
                log.exception("guardian: cannot settle %s; trying again", entry.deployment_id)

    def _end_if_overdue(self, entry: Entry, identity: dict[str, str | None]) -> None:
        """Its process lives; one that hangs is ended, and what it left is restored on the next look."""
        try:
            ended = end_overdue(self.host.settings.locks_dir, entry.request.container_name)
        except PermissionError as exc:
            log.critical("guardian: a process that hangs cannot be ended: %s", exc, extra=identity)
            return
        if ended is not None:
            log.critical("guardian: ended %s, which hung", ended, extra=identity)

    async def _settle(self, entry: Entry) -> None:
        identity = {
            "deployment_id": entry.deployment_id,
            "container_name": entry.request.container_name,
            "correlation_id": entry.request.workflow_id,
        }
        try:
            status = await self.host.restore(entry.deployment_id)
        except LockHeld:
            self._end_if_overdue(entry, identity)
            return
        except (EngineUnreachable, requests.exceptions.RequestException, StateConflict) as exc:
            log.warning("guardian: cannot settle yet: %s", exc, extra=identity)
            return
        except RestoreFailed as exc:
            log.critical("guardian: restore failed: %s", exc, extra=identity)
            self.tell(HostState.RESTORE_FAILED)
            return
        self.actions += 1
        self.tell(status.state)
        log.warning("guardian: found %s, ended %s", entry.state, status.state, extra=identity)
