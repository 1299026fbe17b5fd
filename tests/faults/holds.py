"""Stopping the processes of a lab at named points: the side that arms, waits and releases."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path

INJECTED = Path(__file__).with_name("inject")
_PROJECT = INJECTED.parents[2]


def environment(folder: Path) -> dict[str, str]:
    """What makes the programs of a lab stop where `folder` says."""
    return {"GANTRY_FAULT_DIR": str(folder), "PYTHONPATH": f"{INJECTED}:{_PROJECT}"}


@dataclass(frozen=True)
class Hold:
    """One process that is to be stopped at one point."""

    folder: Path
    name: str

    @property
    def pid(self) -> int | None:
        """Who is held; None while nobody came to the point."""
        try:
            return int((self.folder / "held" / self.name).read_text())
        except FileNotFoundError:
            return None

    def release(self) -> None:
        """Let it go on; one that comes later is not stopped."""
        (self.folder / "released" / self.name).touch()
        (self.folder / "armed" / self.name).unlink(missing_ok=True)


@dataclass
class Holds:
    """All holds of a lab."""

    folder: Path
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        for name in ("armed", "claimed", "held", "released"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    def arm(self, container: str, point: str) -> Hold:
        """Stop the next process that comes to `point` for this container."""
        hold = Hold(self.folder, f"{container}.{next(self._numbers)}")
        new = self.folder / hold.name
        new.write_text(point)
        new.rename(self.folder / "armed" / hold.name)
        return hold
