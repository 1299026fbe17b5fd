"""A client that asks a service ten times a second, and knows for how long nobody answered."""

from __future__ import annotations

import http.client
import threading
import time
from dataclasses import dataclass, field

from deployments import lab_http

INTERVAL_SECONDS = 0.1
TIMEOUT_SECONDS = 0.5


@dataclass
class Client:
    """Asks `url` from inside `namespace`, in a thread of its own, from `start` to `stop`."""

    namespace: str | None
    url: str
    last: str | None = None
    asked: int = 0
    _silences: list[tuple[float, float]] = field(default_factory=list)
    _silent_since: float | None = None
    _over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to ask."""
        self._thread = threading.Thread(target=self._ask_on, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ask no more; returns when the last answer is in."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    @property
    def last_tag(self) -> str | None:
        """The version that answered last; None when nothing did."""
        return tag_of(self.last)

    def silent_seconds(self, held_from: float, held_until: float) -> float:
        """Seconds without service: from each request that failed to the next that did not.

        What lies between the two moments is not counted: there the test held the deployment still.
        """
        since = self._silent_since
        silences = [*self._silences, *([(since, time.monotonic())] if since is not None else [])]
        held = (max(0.0, min(end, held_until) - max(begin, held_from)) for begin, end in silences)
        return sum(end - begin for begin, end in silences) - sum(held)

    def _ask_on(self) -> None:
        if self.namespace is not None:
            lab_http.enter(self.namespace)
        due = time.monotonic()
        while not self._over.wait(max(0.0, due - time.monotonic())):
            due = max(due + INTERVAL_SECONDS, time.monotonic())
            self._ask()

    def _ask(self) -> None:
        asked_at = time.monotonic()
        self.last = answer_of(None, self.url)
        self.asked += 1
        if self.last is None and self._silent_since is None:
            self._silent_since = asked_at
        if self.last is not None and self._silent_since is not None:
            self._silences.append((self._silent_since, time.monotonic()))
            self._silent_since = None


def tag_of(answer: str | None) -> str | None:
    """The version that an answer names."""
    return answer.rpartition("version ")[2] if answer else None


def answer_of(namespace: str | None, url: str, timeout_seconds: float = TIMEOUT_SECONDS) -> str | None:
    """What the service says; None when it says nothing, or not well."""
    try:
        answer = lab_http.request(namespace, "GET", url, timeout_seconds=timeout_seconds)
    except (OSError, http.client.HTTPException):
        return None
    return answer.text.strip() if answer.status == 200 else None
