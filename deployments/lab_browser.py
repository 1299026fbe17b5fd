"""A headless Chromium that looks at the Prefect UI, driven over WebDriver (W3C) without a client library.

chromedriver may run in a network namespace: requests to it go in there by `lab_http`.
"""

from __future__ import annotations

import base64
import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from deployments import lab_http

PORT = 9515
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
)
_READ = """
const drawn = [...document.querySelectorAll("svg text")].map(found => found.textContent)
return [document.body.innerText, ...drawn].join("\\n")
"""
# What WebGL has drawn can be read only before the frame in which it was drawn ends.
_COUNT_COLOURS = """
const [selector, done] = arguments
const canvas = document.querySelector(selector)
if (!canvas) { done(0) } else requestAnimationFrame(() => {
    const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d")
    copy.drawImage(canvas, 0, 0)
    const pixels = new Uint32Array(copy.getImageData(0, 0, canvas.width, canvas.height).data.buffer)
    done(new Set(pixels).size)
})
"""
_POLL_SECONDS = 0.2
_DRAWN_COLOURS = 10


class BrowserFailed(Exception):
    """The browser did not do what it was asked for; read the log of chromedriver"""

    def __init__(self, problem: str) -> None:
        super().__init__(f"{self.__doc__}: {problem}")


class NotShown(Exception):
    """The page does not show what it has to"""

    def __init__(self, missing: Iterable[str], text: str) -> None:
        super().__init__(f"{self.__doc__}: {sorted(missing)}\n--- it shows:\n{text}")


def missing_program() -> str | None:
    """The Debian package to install before a browser can run here, or None."""
    return None if shutil.which("chromedriver") and shutil.which("chromium") else "chromium chromium-driver"


def driver_command() -> list[str]:
    """chromedriver in the foreground; it starts the browser itself."""
    return ["chromedriver", f"--port={PORT}"]


@dataclass
class Browser:
    """One window of a new browser; a context manager. `profile` is a folder that does not exist yet."""

    namespace: str | None
    profile: Path
    width: int = 1400
    height: int = 1000
    _session: str = field(default="", init=False)

    def __enter__(self) -> Self:
        """Open the window; waits for chromedriver."""
        self._wait_for_driver()
        window = (f"--user-data-dir={self.profile}", f"--window-size={self.width},{self.height}")
        wanted = {"browserName": "chrome", "goog:chromeOptions": {"args": [*_FLAGS, *window]}}
        self._session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the browser."""
        self._call("DELETE", f"/session/{self._session}")

    def open(self, url: str) -> None:
        """Go to a page; it may go on loading by scripts."""
        self._here("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """The result of a script in the page."""
        return self._here("POST", "/execute/sync", {"script": script, "args": arguments})

    def text(self) -> str:
        """What a person can read on the page, drawings (SVG) too."""
        return str(self.run(_READ))

    def wait_for(self, *texts: str, seconds: float = 20) -> str:
        """The page's text once it shows all `texts`; raises `NotShown` with those that are missing."""
        deadline = time.monotonic() + seconds
        while missing := {text for text in texts if text not in (shown := self.text())}:
            if time.monotonic() > deadline:
                raise NotShown(missing, shown)
            time.sleep(_POLL_SECONDS)
        return self.text()

    def colours(self, selector: str) -> int:
        """How many colours a canvas has in its next frame: 1 while nothing is drawn on it, 0 without one."""
        return int(self._here("POST", "/execute/async", {"script": _COUNT_COLOURS, "args": [selector]}))

    def wait_for_drawing(self, selector: str, seconds: float = 20) -> None:
        """Return when a canvas shows more than its background, in two looks the same; raises `NotShown`."""
        deadline, before = time.monotonic() + seconds, 0
        while (now := self.colours(selector)) < _DRAWN_COLOURS or now != before:
            if time.monotonic() > deadline:
                raise NotShown([f"a drawing on {selector}"], f"{now} colours")
            before = now
            time.sleep(_POLL_SECONDS)

    def screenshot(self) -> bytes:
        """What the window shows, as PNG."""
        return base64.b64decode(self._here("GET", "/screenshot"))

    def _here(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        return self._call(method, f"/session/{self._session}{path}", body)

    def _wait_for_driver(self) -> None:
        deadline = time.monotonic() + 20
        while not self._is_ready():
            if time.monotonic() > deadline:
                raise BrowserFailed("chromedriver is not ready")
            time.sleep(_POLL_SECONDS)

    def _is_ready(self) -> bool:
        try:
            return bool(self._call("GET", "/status")["ready"])
        except OSError:
            return False

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        answer = lab_http.request(
            self.namespace,
            method,
            f"http://127.0.0.1:{PORT}{path}",
            body=json.dumps(body).encode() if body is not None else None,
            timeout_seconds=60,
        )
        value = answer.json()["value"]
        if answer.status != 200:
            raise BrowserFailed(f"{method} {path}: {value.get('error')}: {value.get('message')}")
        return value
