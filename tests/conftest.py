"""Which tests share a process when `make test` runs them in two: those that share what is slow to start."""

from __future__ import annotations

import pytest
from xdist.remote import Producer  # type: ignore[import-untyped]  # it ships no types
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

# In the order in which they are begun: the longest first, so that both processes end at about the same time.
_GROUPS = {
    "deployments": (
        *("tests/e2e/test_deploy.py", "tests/e2e/test_events.py", "tests/e2e/test_reconcile.py"),
        *("tests/e2e/test_rollback.py", "tests/e2e/test_rsync.py", "tests/e2e/test_secrets.py"),
        "tests/e2e/test_push.py",
        "tests/e2e/test_fleet.py",
        "tests/e2e/test_rolling.py",
    ),
    "faults": ("tests/e2e/test_faults.py",),
    "set-up": (
        *("tests/e2e/test_services.py", "tests/e2e/test_ui.py", "tests/e2e/test_doctor.py"),
        "tests/e2e/test_provision.py",
    ),
    "broker": ("tests/integration/test_monitor_dlq.py", "tests/integration/test_relay.py"),
}


class _Groups(LoadScopeScheduling):  # type: ignore[misc]  # it ships no types
    """Each group, and each module without one, in one process."""

    def _split_scope(self, nodeid: str) -> str:
        return _group_of(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """How xdist shares out the tests."""
    return _Groups(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the groups, in their order."""
    order = list(_GROUPS)
    items.sort(key=lambda item: order.index(group) if (group := _group_of(item.nodeid)) in order else 99)


def _group_of(nodeid: str) -> str:
    module = nodeid.partition("::")[0]
    return next((name for name, modules in _GROUPS.items() if module in modules), module)
