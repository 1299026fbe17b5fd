"""The fleet's summary artifact: made once, and brought up to date while the fleet runs.

Nothing that is only shown may disturb the work: a server that does not take it is a line in the log.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from uuid import UUID

import httpx
from prefect.artifacts import acreate_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger
from prefect.utilities.urls import url_for

from tasks.fleet_board import Board
from tasks.fleet_report import render, summary

INTERVAL_SECONDS = 3.0
_SECONDS_PER_PLACE = 0.03  # of a thousand hosts the artifact is large: every half minute is enough


def key_of(fleet_id: str) -> str:
    """`fleet-<id>`: the artifact's key, the same for a fleet that is resumed."""
    return f"fleet-{fleet_id}"


@dataclass
class Summary:
    """Shows one board."""

    board: Board
    _artifact: UUID | None = None
    _shown: str = ""
    _at: float = field(default=0.0)

    async def update(self) -> None:
        """Show what is new, every few seconds; of a large fleet less often."""
        interval_seconds = INTERVAL_SECONDS + _SECONDS_PER_PLACE * len(self.board.places)
        if time.monotonic() - self._at >= interval_seconds:
            await self.finish()

    async def finish(self) -> None:
        """Show what is new, now."""
        self._at = time.monotonic()
        text = render(self.board, _link_of)
        if text == self._shown:
            return
        try:
            await self._send(text)
        except (httpx.HTTPError, PrefectException, OSError) as exc:
            get_run_logger().warning("the summary is not up to date: %s: %s", type(exc).__name__, exc)
            return
        self._shown = text

    async def _send(self, text: str) -> None:
        told = f"Fleet {self.board.fleet_id}: {summary(self.board)}"
        if self._artifact is None:
            self._artifact = await acreate_markdown_artifact(text, key_of(self.board.fleet_id), told)
            return
        async with get_client() as client:
            await client.update_artifact(self._artifact, ArtifactUpdate(data=text, description=told))


def _link_of(run_id: str) -> str | None:
    return url_for("flow-run", run_id)
