"""The block `RecordsDatabase`: where the records of workflows live.

Owns the URL and its normal form; `tasks.records` owns all SQL. Must not import SQLAlchemy.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Self

from prefect.blocks.core import Block
from pydantic import ConfigDict, Field, HttpUrl, SecretStr, field_validator

from blocks import load_if_saved

_SQLITE = "sqlite+aiosqlite"
_POSTGRESQL = "postgresql+asyncpg"
_DRIVERS = {
    "sqlite": _SQLITE,
    _SQLITE: _SQLITE,
    "postgres": _POSTGRESQL,
    "postgresql": _POSTGRESQL,
    _POSTGRESQL: _POSTGRESQL,
}


class RecordsDatabase(Block):
    """
    The database of the records: a SQLite file, or PostgreSQL.

    Example:
        Load the stored database:
        ```python
        from blocks.records_database import RecordsDatabase

        records_database = RecordsDatabase.load("BLOCK_NAME")
        ```
    """

    _block_type_name = "Records Database"
    _logo_url = HttpUrl(
        "https://raw.githubusercontent.com/PrefectHQ/prefect/420d0d6a78bb6df1fc18bcf188fdad43c1d22ea9/assets/block-logos/filesystem.png"
    )
    _documentation_url = HttpUrl("https://docs.prefect.io/v3/concepts/blocks")

    # A refused URL must not be quoted by pydantic's message: it may hold a password.
    model_config = ConfigDict(hide_input_in_errors=True)

    url: SecretStr = Field(description="URL such as sqlite:////path/records.db or postgresql://user@host/db.")

    @field_validator("url")
    @classmethod
    def _url_is_normal(cls, url: SecretStr) -> SecretStr:
        return SecretStr(_normalise(url.get_secret_value().strip()))

    @classmethod
    def from_environment(cls) -> Self:
        """DATABASE_URL, else the SQLite file `records.db` in GANTRY_HOME (default `~/.gantry`).

        Creates that folder, readable by its owner only. Raises pydantic's `ValidationError` for a URL
        that is neither SQLite nor PostgreSQL.
        """
        url = os.environ.get("DATABASE_URL", "").strip()
        return cls(url=SecretStr(url or f"{_SQLITE}:///{_home() / 'records.db'}"))

    def sqlalchemy_url(self) -> str:
        """The URL for `create_async_engine`, password included: pass it on, never log it."""
        return self.url.get_secret_value()


async def find_records_url() -> str:
    """URL of the records: the block `records-database/default` when it is saved, else the environment.

    Holds the password in the clear. Whatever loading the block raises rises, except that it does not exist.
    """
    database = await load_if_saved(RecordsDatabase, "default") or RecordsDatabase.from_environment()
    return database.sqlalchemy_url()


def _home() -> Path:
    home = Path(os.environ.get("GANTRY_HOME") or "~/.gantry").expanduser().absolute()
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    return home


def _normalise(url: str) -> str:
    scheme, _, rest = url.partition("://")
    driver = _DRIVERS.get(scheme)
    if driver is None or (driver == _SQLITE and not re.match(r"/[^?]", rest)):
        raise ValueError(
            "the URL of the records starts with 'sqlite:///' and a path, or with 'postgresql://'; "
            "set DATABASE_URL or the block records-database so (other databases and drivers are not used)"
        )
    if driver == _POSTGRESQL:
        # libpq says sslmode, asyncpg says ssl and refuses a word that it does not know.
        rest = re.sub(r"([?&])sslmode=", r"\1ssl=", rest)
    return f"{driver}://{rest}"
