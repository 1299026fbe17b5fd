"""Clocks of a lab's hosts that are off, by libfaketime: set before a program starts, stepped while it runs.

Only the time of day is off, as on a real host. Python's `time.sleep` is refused then (EINVAL): a program
that needs it has to put another sleep in its place. Imports nothing of ours but the lab's errors.
"""

from __future__ import annotations

from pathlib import Path

from deployments.lab_processes import LabNotReady

LIBRARY = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
_VARIABLES = ("LD_PRELOAD", "FAKETIME_TIMESTAMP_FILE", "FAKETIME_NO_CACHE", "FAKETIME_DONT_FAKE_MONOTONIC")


def set_clock(environment: dict[str, str], file: Path, offset_seconds: float | None) -> None:
    """Let programs that start with `environment` be off by `offset_seconds`; None takes it back."""
    for name in _VARIABLES:
        environment.pop(name, None)
    if offset_seconds is None:
        return
    if LIBRARY is None:
        raise LabNotReady("libfaketime is not installed: apt-get install libfaketime")
    write_offset(file, offset_seconds)
    environment |= {
        "LD_PRELOAD": str(LIBRARY),
        "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


def write_offset(file: Path, offset_seconds: float) -> None:
    """What the file says from now on; replaced at once, since it is read all the time."""
    news = file.with_name(f"{file.name}.new")
    news.write_text(f"{offset_seconds:+f}s\n")
    news.replace(file)
