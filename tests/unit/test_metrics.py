"""Metric values and their labels; and that dashboard and alert rules ask only for what there is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from deployments import metric_values, metrics
from deployments.metric_values import MAX_PAIRS, OTHER, Names
from receiver import access
from receiver.contract import HostState, Stage
from receiver.metrics import Metrics
from tasks.states import TERMINAL, WorkflowState
from tasks.statistics import Group, Histogram, StageGroup, Standing, Statistics

MONITORING = Path(metrics.__file__).parent / "monitoring"
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
S = WorkflowState
EMPTY = Histogram(0, 0, (0,) * 5)
# The specification's names and labels, and the samples that a histogram has.
SPECIFIED = {
    "deployments_started_total": {"container_name", "remote_host"},
    "deployments_completed_total": {"container_name", "remote_host"},
    "deployments_failed_total": {"container_name", "remote_host", "failure_stage"},
    "deployments_rolled_back_total": {"container_name", "remote_host"},
    "deployment_duration_seconds_bucket": {"container_name", "le"},
    "stage_duration_seconds_bucket": {"stage_name", "container_name", "le"},
    "image_size_bytes_bucket": {"container_name", "le"},
    "health_check_success_rate": {"container_name", "remote_host"},
    "current_deployment_state": {"workflow_id", "container_name", "state"},
    "concurrent_deployments": set(),
}
# Prometheus' own, and what the rules record.
MADE_BY_PROMETHEUS = {"up": {"instance", "job"}}
GIVEN_BY_PROMETHEUS = {"instance", "job"}


def group(state: WorkflowState = S.COMPLETED, **changes: Any) -> Group:
    found = Group(
        container_name="shop",
        remote_host="target",
        state=state,
        failure_stage="",
        rollback_performed=False,
        first_created_at=NOW,
        workflows=1,
        duration_ms=Histogram(1, 20_000, (0, 1, 1, 1, 1)),
        image_bytes=EMPTY,
    )
    return replace(found, **changes)


def expositions() -> dict[str, list[dict[str, str]]]:
    """Every sample's labels by its name, of a control host and of a receiver that have seen everything."""
    groups = [group(state, failure_stage=Stage.VALIDATE) for state in WorkflowState]
    groups = [replace(each, image_bytes=each.duration_ms) for each in groups]
    everything = Statistics(
        groups=tuple(groups),
        stages=(StageGroup(container_name="shop", stage_name="s", duration_ms=groups[0].duration_ms),),
        standing=tuple(_standing(state) for state in WorkflowState),
        unsent_events=1,
        oldest_unsent_at=NOW,
    )
    receiver = Metrics(access.REASONS)
    receiver.count_request(200)
    receiver.count_package("ready")
    texts = [
        metrics._text([metrics._records_up(1), *metrics._families(everything, NOW)]).decode(),
        receiver.render("1", dict.fromkeys(HostState, 1)),
    ]
    found: dict[str, list[dict[str, str]]] = {}
    for family in (each for text in texts for each in text_string_to_metric_families(text)):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


def _standing(state: WorkflowState) -> Standing:
    return Standing(workflow_id=state, container_name="shop", remote_host="target", state=state)


def values(family: Metric) -> dict[tuple[str, ...], float]:
    return {tuple(sample.labels.values()): sample.value for sample in family.samples}


def test_every_metric_of_the_specification_is_there_with_its_labels() -> None:
    """Names and labels, no more and no fewer."""
    found = expositions()
    assert {name: set(found[name][0]) for name in SPECIFIED} == SPECIFIED


def test_a_pair_beyond_the_five_hundredth_is_called_other() -> None:
    """By age, so that a new container never takes the label of an older one."""
    groups = [
        group(container_name=f"c-{n}", remote_host=f"h-{n % 7}", first_created_at=NOW + timedelta(seconds=n))
        for n in reversed(range(MAX_PAIRS + 3))
    ]
    names = Names.of(groups)
    assert len(names.pairs) == MAX_PAIRS
    assert names.pair("c-499", "h-2") == ("c-499", "h-2")
    assert names.pair("c-500", "h-3") == (OTHER, OTHER)
    assert (names.container("c-0"), names.container("c-502")) == ("c-0", OTHER)
    counted = metric_values.count(groups, names, metric_values.is_completed)
    assert counted[OTHER, OTHER] == 3
    assert len(counted) == MAX_PAIRS + 1


def test_a_known_container_on_one_host_too_many_keeps_its_own_name_alone() -> None:
    """The pair is folded, the container is not: its durations stay in one series."""
    groups = [group(remote_host=f"h-{n}") for n in range(MAX_PAIRS + 1)]
    names = Names.of(groups)
    assert names.pair("shop", "h-0") == ("shop", "h-0")
    assert names.pair("shop", "h-nowhere") == (OTHER, OTHER)
    assert names.container("shop") == "shop"


def test_all_outcomes_of_a_pair_appear_together_when_its_first_deployment_ends() -> None:
    """Prometheus sees no first step from nothing to 1, so no outcome may be ahead of the others."""
    running = [group(S.DEPLOYING)]
    names = Names.of(running)
    assert metric_values.count(running, names, lambda _: True) == {("shop", "target"): 1}
    assert metric_values.count(running, names, metric_values.is_completed) == {}
    assert metric_values.count_failures(running, names) == {}
    ended = [*running, group(S.COMPLETED)]
    for outcome in (metric_values.is_rolled_back, metric_values.is_rollback_failed):
        assert metric_values.count(ended, names, outcome) == {("shop", "target"): 0}
    assert metric_values.count_failures(ended, names) == {("shop", "target", stage): 0 for stage in Stage}


def test_a_failure_without_a_stage_is_counted_as_unknown() -> None:
    """It is not lost, and no label is empty."""
    failures = metric_values.count_failures([group(S.FAILED)], Names.of([group()]))
    assert failures["shop", "target", "unknown"] == 1
    assert sum(failures.values()) == 1


def test_health_is_a_matter_of_those_that_were_asked() -> None:
    """A build that failed says nothing of health; without any answer there is no rate."""
    failed = group(S.ROLLBACK_COMPLETED, failure_stage=Stage.VALIDATE, workflows=1)
    not_asked = group(S.FAILED, failure_stage=Stage.PACKAGE, workflows=5)
    passed = group(S.COMPLETED, workflows=3)
    names = Names.of([passed])
    counted = metric_values.count_validations([passed, failed, not_asked], names)
    assert counted == {("shop", "target"): (3, 1)}
    assert metric_values.count_validations([not_asked], names) == {}


def test_histograms_of_the_same_labels_are_one() -> None:
    """However the groups were cut."""
    one, other = Histogram(2, 50, (1, 2)), Histogram(1, 9, (1, 1))
    measured = [(("a",), one), (("b",), other), (("a",), other), (("c",), Histogram(0, 0, (0, 0)))]
    assert metric_values.add_up(measured) == {("a",): Histogram(3, 59, (2, 3)), ("b",): other}


def test_the_age_of_the_oldest_event_is_never_negative() -> None:
    """The clock of the host that wrote it may be ahead."""
    ahead = Statistics(
        groups=(), stages=(), standing=(), unsent_events=1, oldest_unsent_at=NOW + timedelta(seconds=5)
    )
    found = {family.name: values(family) for family in metrics._families(ahead, NOW)}
    assert found["outbox_oldest_unsent_seconds"] == {(): 0}


def rules() -> list[dict[str, Any]]:
    """Every recording and alert rule."""
    document = yaml.safe_load((MONITORING / "gantry.rules.yml").read_text())
    return [rule for group in document["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    """Every panel of the dashboard."""
    return list(json.loads((MONITORING / "dashboard.json").read_text())["panels"])


def queries() -> list[str]:
    """All PromQL of ours."""
    return [
        *(rule["expr"] for rule in rules()),
        *(target["expr"] for panel in panels() for target in panel["targets"]),
    ]


def metric_names(query: str) -> set[str]:
    """Metrics that a query reads: words that are neither functions, nor keywords, nor labels."""
    bare = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]', " ", query)
    bare = re.sub(r"\b(by|on|without|ignoring|group_left|group_right)\s*\([^)]*\)", " ", bare)
    words = re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*(?!\w|:)(?!\s*\()", bare)
    return set(words) - {"and", "or", "unless", "offset", "bool"}


def matchers(query: str) -> Iterable[tuple[str, str, str, str]]:
    """Metric, label, operator and value of each matcher."""
    for metric, inside in re.findall(r"([a-zA-Z_:]\w*)\{([^}]*)\}", query):
        for label, sign, value in re.findall(r'(\w+)(=~|!~|!=|=)"([^"]*)"', inside):
            yield metric, label, sign, value


@pytest.mark.parametrize("query", queries())
def test_a_query_of_ours_asks_only_for_metrics_and_labels_that_there_are(query: str) -> None:
    """Alerts on a misspelt metric never fire, and nobody notices."""
    found = expositions()
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    names = metric_names(query)
    assert names
    assert names <= {*found, *MADE_BY_PROMETHEUS, *recorded}
    for metric, label, sign, value in matchers(query):
        labels = MADE_BY_PROMETHEUS.get(metric) or {*found[metric][0], *GIVEN_BY_PROMETHEUS}
        assert label in labels
        known = {labels[label] for labels in found.get(metric, []) if label in labels}
        if label in {"reason", "state", "outcome"} and sign != "!=":
            assert set(value.split("|")) <= known


def test_every_kind_of_trouble_has_its_alert() -> None:
    """Each with a severity, and with words for whoever is woken by it."""
    alerts = {rule["alert"]: rule for rule in rules() if "alert" in rule}
    assert set(alerts) >= {
        *("DeploymentFailed", "DeploymentRollbackFailed", "HostNotHeardFrom"),
        *("OutboxBacksUp", "DeploymentRunsTooLong"),
    }
    for alert in alerts.values():
        assert alert["labels"]["severity"] in {"warning", "critical"}
        assert alert["annotations"].keys() == {"summary", "description"}
    running = alerts["DeploymentRunsTooLong"]["expr"]
    assert set(re.findall(r'state!~"([^"]*)"', running)[0].split("|")) == TERMINAL


def test_the_dashboard_shows_every_metric_of_the_specification() -> None:
    """Each of them in a panel, and no two panels overlap."""
    shown = {
        name for panel in panels() for target in panel["targets"] for name in metric_names(target["expr"])
    }
    assert set(SPECIFIED) - shown <= {"image_size_bytes_bucket"}
    assert "image_size_bytes_sum" in shown
    taken: set[tuple[int, int]] = set()
    for place in (panel["gridPos"] for panel in panels()):
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in panels()}) == len(panels())
