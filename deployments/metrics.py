"""`GET /metrics` of the control host: the specification's metrics, computed from the records at each scrape.

Nothing is counted in memory, so no process that ends takes a count with it. Owns names and texts; the sums
are made in `tasks.statistics`, the labels in `deployments.metric_values`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

from deployments import metric_values as values
from deployments.metric_values import LabelsT, Names
from tasks.records import Records, RecordsUnreachable
from tasks.schema import DURATION_BOUNDS_MS, IMAGE_BOUNDS_BYTES, STAGE_BOUNDS_MS
from tasks.statistics import Group, Histogram, Statistics, read_statistics

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
PATIENCE_SECONDS = 8.0  # Prometheus itself waits 10 s
_PAIR = ("container_name", "remote_host")


async def render(records: Records, *, at: datetime | None = None) -> bytes:
    """All metrics as Prometheus' text, to be sent with `CONTENT_TYPE`.

    Never fails for a database that does not answer: then there is `records_up 0` and nothing else.
    """
    now = at or datetime.now(UTC)
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            statistics = await read_statistics(records, now)
    except (RecordsUnreachable, TimeoutError):
        return _text([_records_up(0)])
    return _text([_records_up(1), *_families(statistics, now)])


def _families(statistics: Statistics, now: datetime) -> Iterator[Metric]:
    names = Names.of(statistics.groups)
    yield from _counters(statistics.groups, names)
    yield from _histograms(statistics, names)
    yield from _validations(statistics.groups, names)
    yield from _standing(statistics, names)
    yield from _outbox(statistics, now)


def _counters(groups: Sequence[Group], names: Names) -> Iterator[Metric]:
    started = values.count(groups, names, lambda _: True)
    yield _counter("deployments_started", "Deployments recorded.", _PAIR, started)
    completed = values.count(groups, names, values.is_completed)
    yield _counter("deployments_completed", "Deployments whose new version serves.", _PAIR, completed)
    failed = values.count_failures(groups, names)
    text = "Deployments that failed, rolled back or not, by the stage that failed."
    yield _counter("deployments_failed", text, (*_PAIR, "failure_stage"), failed)
    rolled_back = values.count(groups, names, values.is_rolled_back)
    text = "Failed deployments after which the previous version serves again."
    yield _counter("deployments_rolled_back", text, _PAIR, rolled_back)
    stranded = values.count(groups, names, values.is_rollback_failed)
    text = "Failed deployments whose rollback failed too: a person has to look."
    yield _counter("deployments_rollback_failed", text, _PAIR, stranded)


def _histograms(statistics: Statistics, names: Names) -> Iterator[Metric]:
    groups = [group for group in statistics.groups if group.state.terminal]
    container = [(names.container(group.container_name),) for group in groups]
    stage = [(group.stage_name, names.container(group.container_name)) for group in statistics.stages]
    yield _histogram(
        ("deployment_duration_seconds", "Time from record to end, of deployments that ended."),
        ("container_name",),
        zip(container, (group.duration_ms for group in groups), strict=True),
        (DURATION_BOUNDS_MS, 1000),
    )
    yield _histogram(
        ("stage_duration_seconds", "Time of one stage, of deployments that ended."),
        ("stage_name", "container_name"),
        zip(stage, (group.duration_ms for group in statistics.stages), strict=True),
        (STAGE_BOUNDS_MS, 1000),
    )
    yield _histogram(
        ("image_size_bytes", "Size of the image, of deployments that ended."),
        ("container_name",),
        zip(container, (group.image_bytes for group in groups), strict=True),
        (IMAGE_BOUNDS_BYTES, 1),
    )


def _validations(groups: Sequence[Group], names: Names) -> Iterator[Metric]:
    found = values.count_validations(groups, names)
    outcomes: dict[tuple[str, ...], int] = {}
    for pair, (passed, failed) in found.items():
        outcomes |= {(*pair, "passed"): passed, (*pair, "failed"): failed}
    yield _counter("health_validations", "Health validations by outcome.", (*_PAIR, "outcome"), outcomes)
    shares = {pair: passed / (passed + failed) for pair, (passed, failed) in found.items()}
    text = "Share of all health validations that passed, 0 to 1; for a window, see health_validations_total."
    yield _gauge("health_check_success_rate", text, _PAIR, shares)


def _standing(statistics: Statistics, names: Names) -> Iterator[Metric]:
    states = {
        (one.workflow_id, names.pair(one.container_name, one.remote_host)[0], one.state.value): 1
        for one in statistics.standing
    }
    text = "1 for where a deployment stands: those under way, and the last to end within an hour."
    yield _gauge("current_deployment_state", text, ("workflow_id", "container_name", "state"), states)
    under_way = sum(group.workflows for group in statistics.groups if not group.state.terminal)
    yield _single("concurrent_deployments", "Deployments that have not ended.", under_way)


def _outbox(statistics: Statistics, now: datetime) -> Iterator[Metric]:
    yield _single(
        "outbox_unsent_events", "Events that the broker does not have yet.", statistics.unsent_events
    )
    oldest = statistics.oldest_unsent_at
    age_seconds = max(0.0, (now - oldest).total_seconds()) if oldest else 0.0
    yield _single(
        "outbox_oldest_unsent_seconds", "Age of the oldest unsent event, 0 without one.", age_seconds
    )


def _records_up(up: int) -> Metric:
    return _single("records_up", "1 when the records answered, else 0 and no other metric.", up)


def _single(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _gauge(name: str, text: str, labels: Sequence[str], found: Mapping[LabelsT, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for key, value in sorted(found.items()):
        family.add_metric(key, value)
    return family


def _counter(name: str, text: str, labels: Sequence[str], found: Mapping[LabelsT, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for key, value in sorted(found.items()):
        family.add_metric(key, value)
    return family


def _histogram(
    named: tuple[str, str],
    labels: Sequence[str],
    measured: Iterable[tuple[tuple[str, ...], Histogram]],
    scale: tuple[Sequence[int], int],
) -> Metric:
    """`scale`: the records' bounds, and how many of the records' units make one of the metric's."""
    (name, text), (bounds, unit) = named, scale
    family = HistogramMetricFamily(name, text, labels=labels)
    for key, found in sorted(values.add_up(measured).items()):
        limits = [str(bound / unit) for bound in bounds]
        buckets = [*zip(limits, found.within, strict=True), ("+Inf", found.count)]
        family.add_metric(key, buckets, sum_value=found.total / unit)
    return family


class _Collected(Collector):
    """What was computed for one scrape, in the shape that the client's writer reads."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> list[Metric]:
        return self._families


def _text(families: Iterable[Metric]) -> bytes:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(families))
    return generate_latest(registry)
