"""Stop this process at a named point until it is released or killed.

`armed/<container>.<n>` names a point; the first process that comes to it for this container moves the file
to `claimed/`, writes its id to `held/`, and waits for `released/`. Imports nothing of ours.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

FOLDER = os.environ.get("GANTRY_FAULT_DIR", "")
PATIENCE_SECONDS = 120.0
POLL_SECONDS = 0.02


def arrive(point: str, container_of: Callable[[], str | None]) -> None:
    """Wait here when this point is armed for the container; otherwise go on at once."""
    armed = armed_at(point)
    if armed and (container := _quietly(container_of)):
        for name in armed:
            if name.rpartition(".")[0] == container and _claim(name):
                _hold(name)
                return


def armed_at(point: str) -> list[str]:
    """Names of the files that arm this point."""
    found: list[str] = []
    try:
        names = os.listdir(f"{FOLDER}/armed")  # noqa: PTH208 - pathlib costs each process its import
    except FileNotFoundError:
        return found
    for name in names:
        try:
            with open(f"{FOLDER}/armed/{name}") as stream:  # noqa: PTH123 - as above
                if stream.read() == point:
                    found.append(name)
        except FileNotFoundError:
            continue
    return found


def _claim(name: str) -> bool:
    try:
        os.rename(f"{FOLDER}/armed/{name}", f"{FOLDER}/claimed/{name}")  # noqa: PTH104
    except FileNotFoundError:
        return False
    return True


def _hold(name: str) -> None:
    began = time.monotonic()
    _Stopped.begin()
    try:
        with open(f"{FOLDER}/claimed/{name}", "w") as stream:  # noqa: PTH123
            stream.write(str(os.getpid()))
        os.rename(f"{FOLDER}/claimed/{name}", f"{FOLDER}/held/{name}")  # noqa: PTH104
        while time.monotonic() - began < PATIENCE_SECONDS:
            if os.path.exists(f"{FOLDER}/released/{name}"):  # noqa: PTH110
                return
            time.sleep(POLL_SECONDS)
    finally:
        _Stopped.end()


class _Stopped:
    """While a process is held its event loop's clock stands: no timeout strikes because of us."""

    holds = 0
    since = 0.0
    total = 0.0
    is_installed = False

    @classmethod
    def begin(cls) -> None:
        cls._install()
        if cls.holds == 0:
            cls.since = time.monotonic()
        cls.holds += 1

    @classmethod
    def end(cls) -> None:
        cls.holds -= 1
        if cls.holds == 0:
            cls.total += time.monotonic() - cls.since

    @classmethod
    def _install(cls) -> None:
        if cls.is_installed:
            return
        from asyncio.base_events import BaseEventLoop

        def now(_: BaseEventLoop) -> float:
            real = time.monotonic()
            return real - cls.total - (real - cls.since if cls.holds else 0.0)

        setattr(BaseEventLoop, "time", now)  # noqa: B010 - mypy knows no assignment to a method
        cls.is_installed = True


def _quietly(look: Callable[[], str | None]) -> str | None:
    """An engine or a ledger that cannot be asked has no name for us."""
    try:
        return look()
    except Exception:  # noqa: BLE001 - a hook must not change what the product does
        return None
