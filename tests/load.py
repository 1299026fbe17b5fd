"""Constant load on a service: kept connections, new ones, and slow requests; what each was answered.

python -m tests.load ADDRESS PORT SLOW_PATH    until a line or the end comes on stdin; prints what came of it
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPConnection, HTTPException
from itertools import pairwise

_PATIENCE_SECONDS = 10
_PAUSE_SECONDS = 0.005  # or the clients would take the machine from what they ask


@dataclass
class Outcome:
    """Answers by their text, their moments, and failures with the seconds since the beginning."""

    began: float = field(default_factory=time.monotonic)
    answers: Counter[str] = field(default_factory=Counter)
    answered_at: list[float] = field(default_factory=list)
    failures: list[tuple[float, str]] = field(default_factory=list)

    @property
    def requests(self) -> int:
        """All of them."""
        return self.answers.total() + len(self.failures)

    def silence(self, since: float, until: float) -> float:
        """The longest time without any answer that began between these moments of the monotonic clock."""
        moments = sorted(self.answered_at)
        return max((two - one for one, two in pairwise(moments) if since <= one <= until), default=0.0)

    def count(self, call: Callable[[], str]) -> None:
        """Make a request."""
        try:
            self.answers[call()] += 1
            self.answered_at.append(time.monotonic())
        except (OSError, HTTPException) as exc:
            self.failures.append((round(time.monotonic() - self.began, 3), repr(exc)))


def ask(address: str, port: int, path: str = "/", headers: dict[str, str] | None = None) -> str:
    """The answer to a request on a connection of its own."""
    connection = HTTPConnection(address, port, timeout=_PATIENCE_SECONDS)
    try:
        return _on(connection, path, headers or {})
    finally:
        connection.close()


def _on(connection: HTTPConnection, path: str, headers: dict[str, str]) -> str:
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        text = answer.read().decode().strip()
    except (OSError, HTTPException):
        connection.close()
        raise
    return text if answer.status == 200 else f"HTTP {answer.status}"


@contextmanager
def load(
    address: str, port: int, slow: str = "/slow", enter: Callable[[], None] = lambda: None
) -> Iterator[Outcome]:
    """Two kept connections, one client with new ones, and two that ask `slow`, until the block ends.

    Each is a thread, which calls `enter` first: to be in another network.
    """
    outcome, is_over = Outcome(), threading.Event()
    kept = [HTTPConnection(address, port, timeout=_PATIENCE_SECONDS) for _ in range(2)]
    calls = [
        *(partial(_on, connection, "/", {}) for connection in kept),
        *(partial(ask, address, port, path) for path in ("/", slow, slow)),
    ]

    def repeat(call: Callable[[], str]) -> None:
        enter()
        while not is_over.is_set():
            outcome.count(call)
            time.sleep(_PAUSE_SECONDS)

    threads = [threading.Thread(target=repeat, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    try:
        yield outcome
    finally:
        is_over.set()
        for thread in threads:
            thread.join(_PATIENCE_SECONDS)
        for connection in kept:
            connection.close()


def main() -> None:
    """Load until stdin says so."""
    with load(sys.argv[1], int(sys.argv[2]), sys.argv[3]) as outcome:
        sys.stdin.readline()
    sys.stdout.write(json.dumps({"answers": outcome.answers, "failures": outcome.failures}) + "\n")


if __name__ == "__main__":
    main()
