"""Judges a side's place in Prefect: its work pool, its workers, its Prefect deployments. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from tasks.findings import PlaceInPrefect, Pool
from tasks.verdicts import Check, failed, passed


def judge_place(place: PlaceInPrefect, register: str) -> Iterator[Check]:
    """Pool, workers and Prefect deployments; `register` is the command that makes what is missing."""
    yield from judge_pool(place.pool_name, place.pool, register)
    if place.missing:
        yield failed("Prefect deployments", f"not registered: {', '.join(place.missing)}", register)
    else:
        yield passed("Prefect deployments", "registered")


def judge_pool(name: str, pool: Pool | None, register: str) -> Iterator[Check]:
    """The work pool (None: there is none) and its workers."""
    if pool is None:
        yield failed("work pool", f"there is no work pool {name}", register)
        return
    quoted = shlex.quote(name)
    if pool.is_paused:
        yield failed("work pool", f"{name} is paused", f"prefect work-pool resume {quoted}")
    else:
        yield passed("work pool", f"{name} takes runs")
    if pool.workers_online:
        yield passed("worker", f"{pool.workers_online} online in {name}")
    else:
        start = f"prefect worker start --pool {quoted} --type process"
        yield failed("worker", f"none online in {name}", start)
