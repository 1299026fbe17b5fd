"""Judges a side's place in Prefect: its work pool, its workers, its Prefect deployments. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from tasks.findings import PlaceInPrefect
from tasks.verdicts import Check, failed, passed


def judge_place(place: PlaceInPrefect, register: str) -> Iterator[Check]:
    """Pool, workers and Prefect deployments; `register` is the command that makes what is missing."""
    pool, name = place.pool, shlex.quote(place.pool_name)
    if pool is None:
        yield failed("work pool", f"there is no work pool {place.pool_name}", register)
    else:
        yield _paused(pool.name) if pool.is_paused else passed("work pool", f"{pool.name} takes runs")
        yield (
            passed("worker", f"{pool.workers_online} online in {pool.name}")
            if pool.workers_online
            else failed(
                "worker", f"none online in {pool.name}", f"prefect worker start --pool {name} --type process"
            )
        )
    if place.missing:
        yield failed("Prefect deployments", f"not registered: {', '.join(place.missing)}", register)
    else:
        yield passed("Prefect deployments", "registered")


def _paused(pool: str) -> Check:
    return failed("work pool", f"{pool} is paused", f"prefect work-pool resume {shlex.quote(pool)}")
