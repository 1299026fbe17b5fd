"""What each metric of the control host says, by its labels: the records' groups, added up. Pure.

Owns which label values there may be. Knows nothing of SQL or of Prometheus' text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from receiver.contract import Stage
from tasks.states import WorkflowState
from tasks.statistics import Group, Histogram

MAX_PAIRS = 500
OTHER = "other"
UNKNOWN = "unknown"
LabelsT = TypeVar("LabelsT", bound=tuple[str, ...])
Pair = tuple[str, str]
_S = WorkflowState


@dataclass(frozen=True)
class Names:
    """The label values in use: the first 500 pairs of container and host, and `other` for those after.

    Which pairs these are never changes, so that no count moves from one series to another.
    """

    pairs: frozenset[Pair]
    containers: frozenset[str]

    @classmethod
    def of(cls, groups: Iterable[Group]) -> Names:
        """By the time of each pair's first workflow, pruned ones included."""
        first: dict[Pair, datetime] = {}
        for group in groups:
            pair = (group.container_name, group.remote_host)
            first[pair] = min(first.get(pair, group.first_created_at), group.first_created_at)
        kept = sorted(first, key=lambda pair: (first[pair], pair))[:MAX_PAIRS]
        return cls(frozenset(kept), frozenset(container for container, _ in kept))

    def pair(self, container_name: str, remote_host: str) -> Pair:
        """Values of the labels `container_name` and `remote_host`."""
        pair = (container_name, remote_host)
        return pair if pair in self.pairs else (OTHER, OTHER)

    def container(self, container_name: str) -> str:
        """Value of the label `container_name` where it stands without a host."""
        return container_name if container_name in self.containers else OTHER


def is_completed(group: Group) -> bool:
    """The new version serves."""
    return group.state is _S.COMPLETED


def is_failed(group: Group) -> bool:
    """It does not, whatever became of the old one."""
    return group.state in {_S.FAILED, _S.ROLLBACK_COMPLETED}


def is_rolled_back(group: Group) -> bool:
    """The old version serves again."""
    return group.state is _S.ROLLBACK_COMPLETED


def is_rollback_failed(group: Group) -> bool:
    """Nobody knows what serves."""
    return group.state is _S.FAILED and group.rollback_performed


def count(groups: Iterable[Group], names: Names, belongs: Callable[[Group], bool]) -> dict[Pair, int]:
    """Workflows that belong, per pair; 0 where none does, once a deployment of the pair has ended.

    So all outcomes of a pair appear at the same moment, and the rate of one by another is fair.
    """
    found: dict[Pair, int] = {}
    for group in groups:
        pair = names.pair(group.container_name, group.remote_host)
        if belongs(group):
            found[pair] = found.get(pair, 0) + group.workflows
        elif group.state.terminal:
            found.setdefault(pair, 0)
    return found


def count_failures(groups: Sequence[Group], names: Names) -> dict[tuple[str, str, str], int]:
    """Failed workflows per pair and stage; 0 for the other stages."""
    found = {(*pair, stage.value): 0 for pair in count(groups, names, is_failed) for stage in Stage}
    for group in filter(is_failed, groups):
        key = (*names.pair(group.container_name, group.remote_host), group.failure_stage or UNKNOWN)
        found[key] = found.get(key, 0) + group.workflows
    return found


def count_validations(groups: Sequence[Group], names: Names) -> dict[Pair, tuple[int, int]]:
    """Passed and failed health validations per pair; what failed before stage 4 was not validated."""
    passed = count(groups, names, is_completed)
    failed = count(groups, names, lambda group: is_failed(group) and group.failure_stage == Stage.VALIDATE)
    # Both have the same pairs: those of which a deployment has ended.
    return {pair: (passed[pair], failed[pair]) for pair in passed if passed[pair] + failed[pair]}


def add_up(measured: Iterable[tuple[LabelsT, Histogram]]) -> dict[LabelsT, Histogram]:
    """Histograms of the same labels as one; empty ones are left out."""
    found: dict[LabelsT, Histogram] = {}
    for labels, histogram in measured:
        if histogram.count:
            found[labels] = found[labels] + histogram if labels in found else histogram
    return found
