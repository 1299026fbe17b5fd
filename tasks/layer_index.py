"""Which compressed digest a layer has: `$GANTRY_HOME/layers.sqlite3`, learnt from each push of an engine.

A cache: what is lost from it costs time, never a wrong image. Bounded, and safe for several processes.
Imports no Prefect and no Docker.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

KEPT_ROWS = 20_000
_BUSY_SECONDS = 20
_TABLE = """
CREATE TABLE IF NOT EXISTS layers (
    engine TEXT NOT NULL, diff_id TEXT NOT NULL, digest TEXT NOT NULL,
    PRIMARY KEY (engine, diff_id, digest)
)
"""


class LayerIndex:
    """Digests and diff ids, both `sha256:...`; an engine is named by its id."""

    def __init__(self, path: Path, kept_rows: int = KEPT_ROWS) -> None:
        self._path, self._kept_rows = path, kept_rows

    def learn(self, engine: str, pairs: Iterable[tuple[str, str]]) -> None:
        """Take down pairs of digest and diff id that the engine knows; the oldest rows make room."""
        rows = [(engine, diff_id, digest) for digest, diff_id in pairs]
        with self._open() as connection:
            connection.executemany("INSERT OR REPLACE INTO layers VALUES (?, ?, ?)", rows)
            connection.execute(
                "DELETE FROM layers WHERE rowid <= (SELECT max(rowid) FROM layers) - ?", (self._kept_rows,)
            )

    def digests(self, diff_ids: Iterable[str]) -> frozenset[str]:
        """All digests that any engine has had for these layers."""
        return self._select(
            "SELECT digest FROM layers WHERE diff_id IN (SELECT value FROM json_each(?))", diff_ids
        )

    def remembered(self, engine: str, diff_ids: Iterable[str]) -> frozenset[str]:
        """Those of the layers whose digest this engine remembers: it need not compress them to name them."""
        return self._select(
            "SELECT diff_id FROM layers WHERE diff_id IN (SELECT value FROM json_each(?)) AND engine = ?",
            diff_ids,
            engine,
        )

    def forget(self, engine: str, diff_ids: Iterable[str]) -> None:
        """The engine did not remember these after all."""
        with self._open() as connection:
            connection.execute(
                "DELETE FROM layers WHERE diff_id IN (SELECT value FROM json_each(?)) AND engine = ?",
                (json.dumps([*diff_ids]), engine),
            )

    def _select(self, query: str, diff_ids: Iterable[str], *more: str) -> frozenset[str]:
        with self._open() as connection:
            rows = connection.execute(query, (json.dumps([*diff_ids]), *more)).fetchall()
        return frozenset(str(row[0]) for row in rows)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A transaction; a file that is no database, or a torn one, is begun anew."""
        try:
            connection = self._connect()
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError:
            self._path.unlink(missing_ok=True)
            connection = self._connect()
        with closing(connection), connection:
            yield connection

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=_BUSY_SECONDS)
        try:
            connection.execute(_TABLE)
        except sqlite3.DatabaseError:
            connection.close()
            raise
        return connection
