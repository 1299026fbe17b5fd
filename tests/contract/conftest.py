"""Fixtures of the receiver's contract tests: settings in a fresh folder, a fake engine, a caller."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI

from receiver.app import create_app
from receiver.ledger import Ledger
from receiver.settings import ReceiverSettings, from_environment
from tests.contract.caller import KEY, Caller, FakeEngine

MakeApp = Callable[[], FastAPI]


@pytest.fixture
def settings(tmp_path: Path) -> ReceiverSettings:
    """Loopback only, one key, state in a folder of the test."""
    return from_environment(
        {
            "HMAC_SECRET_KEY": KEY.decode(),
            "IP_WHITELIST": "127.0.0.0/8",
            "HOOK_RECEIVER_STATE_DIR": str(tmp_path / "state"),
            "HOOK_RECEIVER_MAX_PACKAGE_BYTES": str(64 * 1024 * 1024),
        }
    )


@pytest.fixture
def engine() -> FakeEngine:
    """An engine without images."""
    return FakeEngine()


@pytest.fixture
def make_app(settings: ReceiverSettings, engine: FakeEngine) -> Iterator[MakeApp]:
    """Makes applications over the same state folder, as a restart of the daemon does."""
    ledgers: list[Ledger] = []

    def make() -> FastAPI:
        settings.make_folders()
        ledgers.append(Ledger(settings.ledger_path))
        return create_app(settings, ledger=ledgers[-1], engine=engine.as_engine())

    yield make
    for ledger in ledgers:
        ledger.close()


@pytest.fixture
def app(make_app: MakeApp) -> FastAPI:
    """One application."""
    return make_app()


@pytest.fixture
def caller(app: FastAPI) -> Caller:
    """A caller with the right key, from loopback."""
    return Caller(app)
