"""Names, sizes and times as a person reads them: in run names, log lines and reports. Pure."""

from __future__ import annotations

from datetime import UTC, datetime

from receiver.contract import Stage

UNDO = "undo"


def stage_title(stage: Stage) -> str:
    """`1 package`: the stages of a run in their order."""
    return f"{stage.number} {stage.name.lower()}"


def run_name_of(operation: str, part: Stage | str | None) -> str:
    """`1 package: build_docker_image`: the operation under its stage, or another part of the work.

    Plain letters alone: the font of Prefect's flow graph has no others.
    """
    title = stage_title(part) if isinstance(part, Stage) else part
    return f"{title}: {operation}" if title else operation


def on_host(image: str, host: str) -> str:
    """`hello:v2 → host-b`: what goes where."""
    return f"{image} → {host}"


def size(size_bytes: int) -> str:
    """`4.2 MB`; in thousands, as Docker counts."""
    amount = float(size_bytes)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.2f} GB"


def duration(duration_ms: float) -> str:
    """`650 ms`, `3.2 s` or `2 min 5 s`."""
    if duration_ms < 1000:
        return f"{duration_ms:.0f} ms"
    seconds = duration_ms / 1000
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def moment(at: datetime) -> str:
    """`2026-11-23 12:00 UTC`."""
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
