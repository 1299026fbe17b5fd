"""What people's notification service would be sent: a listener on loopback and the block that leads to it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prefect.blocks.notifications import CustomWebhookNotificationBlock

HOOK = "custom-webhook/ops"


@dataclass
class Webhook:
    """The messages that came in; `answers` are the listener's next status codes."""

    port: int
    received: list[dict[str, Any]] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)

    def subjects(self) -> list[str]:
        """Their subjects, in order."""
        return [message["subject"] for message in self.received]


@contextmanager
def listening() -> Iterator[Webhook]:
    """A listening service, and the saved block `custom-webhook/ops`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            hook.received.append(json.loads(body))
            self.send_response(hook.answers.pop(0) if hook.answers else 200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Not to the terminal."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hook = Webhook(server.server_port)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        block = CustomWebhookNotificationBlock(
            name="ops",
            url=f"http://127.0.0.1:{hook.port}/",
            json_data={"subject": "{{subject}}", "body": "{{body}}"},
        )
        block.save("ops", overwrite=True, _sync=True)  # type: ignore[call-arg]  # of Prefect's dispatch
        yield hook
        server.shutdown()
