"""How far a build has come, from the lines that the builder says. Pure.

The engine's own builder says `Step 2/5 : RUN make`, BuildKit `#7 [builder 2/5] RUN make`: the step has begun.
"""

from __future__ import annotations

import re

_ENGINE = re.compile(r"Step (?P<step>\d+)/(?P<steps>\d+) : (?P<told>.*)")
_BUILDKIT = re.compile(r"#\d+ \[(?P<stage>[^\]]*?) ?(?P<step>\d+)/(?P<steps>\d+)\] (?P<told>.*)")


class BuildSteps:
    """What was heard of one build; each build stage of a Dockerfile counts its own steps."""

    def __init__(self) -> None:
        self._stages: dict[str, tuple[int, int]] = {}
        self.percent = 0.0
        self.told = ""

    def hear(self, line: str) -> bool:
        """True when the line begins a step; then `percent` (never less than before) and `told` are new."""
        found = _ENGINE.match(line) or _BUILDKIT.match(line)
        if found is None:
            return False
        stage = found.groupdict().get("stage") or ""
        done, steps = int(found["step"]) - 1, max(int(found["steps"]), 1)
        self._stages[stage] = max((done, steps), self._stages.get(stage, (0, steps)))
        all_done, all_steps = (sum(numbers) for numbers in zip(*self._stages.values(), strict=True))
        self.percent = max(self.percent, 100 * all_done / all_steps)
        self.told = found["told"]
        return True


def is_bookkeeping(line: str) -> bool:
    """True for a line that tells only ids and containers of the builder's own."""
    return line.startswith((" ---> ", "Removing intermediate container "))
