"""This process's view of the host it runs on: settings, ledger and engine, opened once.

Used by the receiver-side tasks alone; never imported on the way of the sender.
"""

from __future__ import annotations

from functools import cache

from receiver.engine import Engine
from receiver.ledger import Ledger
from receiver.operations import Host
from receiver.settings import from_environment


@cache
def this_host() -> Host:
    """The host; raises when its settings are wrong or its engine does not answer."""
    settings = from_environment(require_key=False)
    return Host(
        settings,
        Ledger(settings.ledger_path),
        Engine(settings.docker_host, settings.docker_api_version),
    )
