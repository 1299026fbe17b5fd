"""One line of JSON for each cell that was run; the table and the README's summary are made from them."""

from __future__ import annotations

import json
import os
import statistics
import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

_lock = threading.Lock()


@dataclass(frozen=True)
class Result:
    """How a cell ended; `violations` is empty when the invariant held."""

    fault: str
    point: str
    serving: str
    state: str
    events: str
    left_bytes: int
    silent_seconds: float
    agreed_seconds: float
    took_seconds: float
    violations: list[str] = field(default_factory=list)
    host: str = ""
    workflow_id: str = ""

    @property
    def cell(self) -> str:
        """The cell's name."""
        return f"{self.fault}-{self.point}"

    @property
    def verdict(self) -> str:
        """`held`, or what was violated."""
        return "; ".join(self.violations) or "held"


def append(path: Path, result: Result) -> None:
    """Add a result; on disk when this returns, so that a run that is killed goes on from there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock, path.open("a") as stream:
        stream.write(json.dumps(asdict(result)) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def load(path: Path) -> dict[str, Result]:
    """The last result of each cell; a line that was cut off counts as none."""
    found: dict[str, Result] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            result = Result(**json.loads(line))
        except json.JSONDecodeError:
            continue
        found[result.cell] = result
    return found


def tidy(path: Path) -> None:
    """Keep the last result of each cell alone, by name."""
    found = load(path)
    lines = [json.dumps(asdict(found[name])) + "\n" for name in sorted(found)]
    new = path.with_suffix(".new")
    new.write_text("".join(lines))
    new.replace(path)


_HEADINGS = ("fault", "point", "serving", "workflow", "events", "disk", "silent s", "agreed s", "verdict")


def table(results: Iterable[Result]) -> str:
    """All results in columns, a line each."""
    rows: list[Sequence[str]] = [_HEADINGS, *map(_columns, results)]
    widths = [max(len(row[at]) for row in rows) for at in range(len(_HEADINGS) - 1)]
    return "\n".join(
        "  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    )


def _columns(result: Result) -> Sequence[str]:
    disk = "baseline" if result.left_bytes == 0 else f"+{result.left_bytes} bytes"
    figures = (f"{result.silent_seconds:.1f}", f"{result.agreed_seconds:.0f}")
    return (
        *(result.fault, result.point, result.serving, result.state, result.events, disk),
        *(*figures, result.verdict),
    )


def summary(results: Iterable[Result], cells: int) -> str:
    """Markdown: how many of all `cells` were run; each fault with its cells and the time without service."""
    by_fault: dict[str, list[Result]] = {}
    for result in results:
        by_fault.setdefault(result.fault, []).append(result)
    run = sum(map(len, by_fault.values()))
    lines = [
        f"{run} of {cells} cells were run. Seconds in which the test itself held the deployment",
        "still are not counted.",
        "",
        "| fault | cells | invariant held | seconds without service, median | most |",
        "|---|---:|---:|---:|---:|",
    ]
    return "\n".join([*lines, *(_summary_row(fault, found) for fault, found in sorted(by_fault.items()))])


def _summary_row(fault: str, found: list[Result]) -> str:
    silent = [result.silent_seconds for result in found]
    held = sum(not result.violations for result in found)
    return f"| `{fault}` | {len(found)} | {held} | {statistics.median(silent):.1f} | {max(silent):.1f} |"
