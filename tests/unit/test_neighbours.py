"""The kernel's settings of a bridge, in a folder that stands for /proc/sys/net."""

from __future__ import annotations

from pathlib import Path

import pytest

from receiver.neighbours import look_often


@pytest.fixture
def setting(tmp_path: Path) -> Path:
    """That of one bridge, for IPv4."""
    path = tmp_path / "ipv4" / "neigh" / "br0" / "retrans_time_ms"
    path.parent.mkdir(parents=True)
    path.write_text("1000\n")
    return path


def test_the_kernel_looks_ten_times_a_second(setting: Path, tmp_path: Path) -> None:
    """Where IPv6 is off there is nothing to set for it."""
    look_often("br0", tmp_path)
    assert setting.read_text() == "100\n"


def test_what_is_quicker_already_stays(setting: Path, tmp_path: Path) -> None:
    """An operator's own choice."""
    setting.write_text("20\n")
    look_often("br0", tmp_path)
    assert setting.read_text() == "20\n"


@pytest.mark.parametrize("interface", [None, "gone"])
def test_a_container_without_a_bridge_changes_nothing(
    setting: Path, tmp_path: Path, interface: str | None
) -> None:
    """On the host's network, or on another engine's."""
    look_often(interface, tmp_path)
    assert setting.read_text() == "1000\n"
