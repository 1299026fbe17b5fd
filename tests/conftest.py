"""Which tests share a process when `make test` runs them in two: those that share what is slow to start."""

from __future__ import annotations

from pathlib import Path

import pytest

# In the order in which they are begun: the longest first, so that both processes end at about the same time.
_GROUPS = {
    "lab": (
        "e2e/test_deploy",
        "e2e/test_events",
        "e2e/test_reconcile",
        "e2e/test_rollback",
        "e2e/test_secrets",
    ),
    "faults": ("e2e/test_faults",),
    "broker": ("integration/test_monitor_dlq", "integration/test_relay"),
}
_TESTS = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test its group: one of the above, else its module."""
    order = list(_GROUPS)
    groups = {item: _group_of(item) for item in items}
    items.sort(key=lambda item: order.index(groups[item]) if groups[item] in order else len(order))
    for item in items:
        item.add_marker(pytest.mark.xdist_group(groups[item]))


def _group_of(item: pytest.Item) -> str:
    module = item.path.relative_to(_TESTS).with_suffix("").as_posix()
    return next((name for name, modules in _GROUPS.items() if module in modules), module)
