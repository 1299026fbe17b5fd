"""Which image store an engine has: they know an image, and what they have of it, in different ways. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def has_containerd_store(told: Mapping[str, Any]) -> bool:
    """What the engine's `info` says: True for containerd's image store, False for the classic one."""
    status = dict(pair for pair in told.get("DriverStatus") or () if len(pair) == 2)
    return str(status.get("driver-type", "")).startswith("io.containerd.snapshotter")
