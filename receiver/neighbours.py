"""How often the kernel looks for a container on its bridge.

Docker forwards a port some milliseconds before the container's network is up. Whoever connects then waits for
the kernel's next ARP request, a second later by default: longer than all of a `recreate` takes otherwise.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

LOOK_MS = 100
_SETTINGS = Path("/proc/sys/net")


def look_often(interface: str | None, settings: Path = _SETTINGS) -> None:
    """Have the kernel look ten times a second on this bridge; nothing where this process may not set that."""
    if interface is None:
        return
    for family in ("ipv4", "ipv6"):
        setting = settings / family / "neigh" / interface / "retrans_time_ms"
        with suppress(OSError):
            if int(setting.read_text()) > LOOK_MS:
                setting.write_text(f"{LOOK_MS}\n")
