"""Whether anybody notices an update: a service under constant load, updated by either strategy.

The client is `tests.load` (kept connections, new ones, requests of two seconds) with `wrk` beside it; the
updates are the host's own steps, one after the other, a fifth of them rolled back after the traffic moved.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from tests.integration.host_rig import host_rig
from tests.readme import PROJECT

UPDATES_PER_RUN = 10
_SECONDS_PER_UPDATE = 60


@dataclass(frozen=True)
class Series:
    """Updates of one strategy: what the clients saw, and what the host says."""

    strategy: str
    updates: int
    rollbacks: int
    requests: int
    failures: int
    wrk_requests: int
    wrk_failures: int
    silent_seconds: float
    update_seconds: float


def measure(runs: int) -> list[Series]:
    """Ten updates for each run, by `rolling` and by `recreate`, on a host of a lab's own."""
    updates = runs * UPDATES_PER_RUN
    with host_rig() as rig:
        words = (str(rig.host.settings.state_dir), str(rig.node.docker_socket), str(updates))
        done = rig.node.run(
            *(rig.node.site.python, "-m", "tests.integration.rolling_host", "measured", *words),
            cwd=PROJECT,
            timeout=2 * updates * _SECONDS_PER_UPDATE,
        )
    return [Series(**found) for found in json.loads(done.stdout.splitlines()[-1])]


def table(found: list[Series]) -> str:
    """Markdown: a row for each strategy."""
    head = (
        *("strategy", "updates", "of them rolled back after the move", "requests", "failed"),
        *("requests of wrk", "failed", "seconds without an answer, median", "seconds for an update, median"),
    )
    lines = [
        "A service on one host under load: kept and new connections, requests of 2 s, and wrk beside.",
        "",
        f"| {' | '.join(head)} |",
        f"|---|{'---:|' * (len(head) - 1)}",
    ]
    return "\n".join([*lines, *map(_row, found)]) + "\n"


def _row(one: Series) -> str:
    cells = (
        *(f"`{one.strategy}`", one.updates, one.rollbacks, f"{one.requests:,}", one.failures),
        *(
            f"{one.wrk_requests:,}",
            one.wrk_failures,
            f"{one.silent_seconds:.2f}",
            f"{one.update_seconds:.1f}",
        ),
    )
    return f"| {' | '.join(map(str, cells))} |"
