"""Counters of the daemon in Prometheus' text format. Bounded labels: words of ours, never a caller's."""

from __future__ import annotations

import os
import resource
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path

from receiver.contract import HostState

_PREFIX = "gantry_receiver"


class Metrics:
    """Counts since the daemon started; used from the event loop only."""

    def __init__(self, refusal_reasons: Iterable[str] = ()) -> None:
        """The reasons are told from the start, so that the first refusal is an increase from 0."""
        self._started_at = time.time()
        self._requests: Counter[str] = Counter()
        self._packages: Counter[str] = Counter()
        self._refusals: Counter[str] = Counter(dict.fromkeys(refusal_reasons, 0))
        self._guardian: Counter[str] = Counter({HostState.RESTORED: 0, HostState.RESTORE_FAILED: 0})
        self._uploads = 0
        self._upload_bytes = 0

    def count_request(self, status: int | None) -> None:
        """One request answered with `status`, or None when its client had gone."""
        self._requests[f"{status // 100}xx" if status else "gone"] += 1

    def count_upload(self, offset: int, size_bytes: int) -> None:
        """Bytes of a package taken; the ones at offset 0 begin an upload."""
        self._uploads += offset == 0
        self._upload_bytes += size_bytes

    def count_package(self, outcome: str) -> None:
        """One package whole: `ready` or `rejected`."""
        self._packages[outcome] += 1

    def count_refusal(self, reason: str) -> None:
        """One request refused before the application saw it; `reason` is the problem's slug."""
        self._refusals[reason] += 1

    def count_guardian_action(self, outcome: HostState) -> None:
        """One deployment that the guardian brought to `outcome`."""
        self._guardian[outcome] += 1

    def render(self, version: str, deployments: Mapping[str, int] | None) -> str:
        """All metrics, one exposition; `deployments` by state, None when the ledger did not answer."""
        up = 0 if deployments is None else 1
        lines = [
            *_single(f"{_PREFIX}_up", "gauge", "1 when the ledger answers.", up),
            *_family(f"{_PREFIX}_info", "gauge", "Always 1.", "version", {version: 1}),
            *self._counters(),
            *_family(f"{_PREFIX}_deployments", "gauge", "In the ledger.", "state", deployments or {}),
            *_single("process_start_time_seconds", "gauge", "Start, since 1970.", self._started_at),
            *_single("process_cpu_seconds_total", "counter", "CPU time.", time.process_time()),
            *_single("process_resident_memory_bytes", "gauge", "Resident memory.", _resident_bytes()),
        ]
        return "\n".join(lines) + "\n"

    def _counters(self) -> Iterable[str]:
        for name, text, label, values in (
            ("requests", "Requests answered.", "status", self._requests),
            ("refused_requests", "Requests refused at the door.", "reason", self._refusals),
            ("packages", "Whole packages.", "outcome", self._packages),
            ("guardian_actions", "Deployments the guardian settled.", "outcome", self._guardian),
        ):
            yield from _family(f"{_PREFIX}_{name}_total", "counter", text, label, values)
        yield from _single(f"{_PREFIX}_uploads_total", "counter", "Uploads begun.", self._uploads)
        yield from _single(f"{_PREFIX}_upload_bytes_total", "counter", "Bytes taken.", self._upload_bytes)


def count_deployments(ledger_path: Path) -> dict[str, int] | None:
    """Deployments of the ledger by state, None when it cannot be read. Blocking.

    Reads on a connection of its own: a scrape never waits for who writes.
    """
    try:
        with closing(sqlite3.connect(f"{ledger_path.absolute().as_uri()}?mode=ro", uri=True)) as ledger:
            found = dict(ledger.execute("SELECT state, count(*) FROM deployments GROUP BY state"))
    except sqlite3.Error:
        return None
    return {state.value: found.get(state.value, 0) for state in HostState}


def _family(name: str, kind: str, text: str, label: str, values: Mapping[str, int]) -> list[str]:
    samples = [f'{name}{{{label}="{key}"}} {count}' for key, count in sorted(values.items())]
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}", *samples]


def _single(name: str, kind: str, text: str, value: float) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}", f"{name} {value}"]


def _resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
