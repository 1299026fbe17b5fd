"""Names, sizes and times as a person reads them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from receiver.contract import Stage
from tasks.wording import UNDO, duration, moment, run_name_of, size, stage_title


def test_stages_are_numbered_in_their_order() -> None:
    """So that a graph sorts and reads as the work goes."""
    assert [stage_title(stage) for stage in Stage] == ["1 package", "2 transfer", "3 deploy", "4 validate"]


def test_an_operation_is_named_under_its_part_of_the_work() -> None:
    """A stage, the undoing, or nothing."""
    assert run_name_of("build_docker_image", Stage.PACKAGE) == "1 package: build_docker_image"
    assert run_name_of("restore_by_receiver", UNDO) == "undo: restore_by_receiver"
    assert run_name_of("read_versions", None) == "read_versions"


@pytest.mark.parametrize(
    ("size_bytes", "told"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (4_210_000, "4.2 MB"), (1_540_000_000, "1.54 GB")],
)
def test_sizes_have_the_unit_that_suits_them(size_bytes: int, told: str) -> None:
    """In thousands."""
    assert size(size_bytes) == told


@pytest.mark.parametrize(
    ("duration_ms", "told"),
    [(0, "0 ms"), (650, "650 ms"), (3240, "3.2 s"), (119_900, "119.9 s"), (125_400, "2 min 5 s")],
)
def test_durations_have_the_unit_that_suits_them(duration_ms: int, told: str) -> None:
    """Milliseconds, seconds, then minutes."""
    assert duration(duration_ms) == told


def test_moments_are_told_in_utc() -> None:
    """Whatever the zone of the host that wrote them."""
    at = datetime(2026, 11, 23, 14, 0, 5, tzinfo=timezone(timedelta(hours=2)))
    assert moment(at) == moment(at.astimezone(UTC)) == "2026-11-23 12:00 UTC"
