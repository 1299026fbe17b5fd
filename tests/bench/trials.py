"""What was measured, one line of JSON each, so that a run goes on where it was ended."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Trial:
    """One transfer; `number` is its round, from 1."""

    image_bytes: int
    link: str
    way: str
    case: str
    number: int
    seconds: float
    wire_bytes: int
    parts: Mapping[str, float] = field(default_factory=dict)
    sender_peak_bytes: int | None = None
    receiver_peak_bytes: int | None = None
    package_bytes: int | None = None

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What is measured once."""
        return self.link, self.way, self.case, self.number


class Trials:
    """Those of one size of image, kept in a file; those of another size are dropped."""

    def __init__(self, path: Path, image_bytes: int, *, afresh: bool = False) -> None:
        self._path = path
        kept = [] if afresh else [each for each in read(path) if each.image_bytes == image_bytes]
        self._found = {each.key: each for each in kept}
        self._write()

    def has(self, link: str, way: str, cases: Iterable[str], number: int) -> bool:
        """Whether all these cases were measured in this round."""
        return all((link, way, case, number) in self._found for case in cases)

    def add(self, trial: Trial) -> None:
        """Keep one; a newer one takes the place of an older one."""
        self._found[trial.key] = trial
        self._write()

    def _write(self) -> None:
        lines = [json.dumps(asdict(each)) for _, each in sorted(self._found.items())]
        self._path.write_text("".join(f"{line}\n" for line in lines))


def read(path: Path) -> list[Trial]:
    """All in a file; none when it is not there."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [Trial(**json.loads(line)) for line in lines]


def median(
    trials: Iterable[Trial], link: str, way: str, case: str, of: Callable[[Trial], float | None]
) -> float | None:
    """Of all rounds; None when it was not measured."""
    chosen = [each for each in trials if (each.link, each.way, each.case) == (link, way, case)]
    values = [value for each in chosen if (value := of(each)) is not None]
    return statistics.median(values) if values else None
