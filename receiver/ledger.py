"""The host's own record of its deployments: SQLite in WAL mode, shared by the daemon and the host's flows.

Owns state, facts, journal, health attempts and spent nonces. A state changes only by compare-and-set
along `TRANSITIONS`, so that a late step of a dead process is refused (fencing). Imports no Docker, no HTTP.
"""

from __future__ import annotations

import fcntl
import json
import sqlite3
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from receiver.contract import (
    SETTLED,
    DeploymentStatus,
    DeployRequest,
    ErrorCode,
    HealthAttempt,
    HostFacts,
    HostState,
    OperationResult,
    PackageAnnouncement,
    QualityGate,
)
from receiver.disk import Ballast

S = HostState
_AT_WORK = (S.READY, S.PREPARED, S.SWITCHING, S.VALIDATING, S.MOVING, S.DRAINING)
TRANSITIONS: frozenset[tuple[HostState, HostState]] = frozenset(
    {
        (S.RECEIVING, S.READY),
        (S.RECEIVING, S.REJECTED),
        (S.RECEIVING, S.ABORTED),
        (S.READY, S.PREPARED),
        (S.READY, S.ABORTED),
        (S.PREPARED, S.SWITCHING),
        (S.SWITCHING, S.VALIDATING),
        (S.VALIDATING, S.KEPT),
        # rolling: beside the old one, then the route
        (S.PREPARED, S.VALIDATING),
        (S.VALIDATING, S.MOVING),
        (S.MOVING, S.DRAINING),
        (S.DRAINING, S.KEPT),
        *((state, S.FAILED) for state in _AT_WORK),
        *((state, S.RESTORING) for state in (*_AT_WORK, S.FAILED)),
        (S.RESTORE_FAILED, S.RESTORING),
        (S.RESTORING, S.RESTORED),
        (S.RESTORING, S.RESTORE_FAILED),
    }
)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS deployments (
    deployment_id TEXT PRIMARY KEY,
    idempotency_key TEXT UNIQUE,
    workflow_id TEXT,
    container_name TEXT NOT NULL,
    state TEXT NOT NULL,
    request TEXT NOT NULL,
    package TEXT,
    upload_offset INTEGER NOT NULL DEFAULT 0,
    facts TEXT NOT NULL DEFAULT '{}',
    undo TEXT,
    error_code TEXT,
    error_message TEXT,
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS deployments_by_state ON deployments (state);
CREATE INDEX IF NOT EXISTS deployments_by_workflow ON deployments (workflow_id);
CREATE INDEX IF NOT EXISTS deployments_by_image ON deployments (json_extract(facts, '$.image_config_digest'));
CREATE TABLE IF NOT EXISTS journal (
    id INTEGER PRIMARY KEY,
    deployment_id TEXT NOT NULL REFERENCES deployments,
    name TEXT NOT NULL,
    stage TEXT NOT NULL,
    started_at TEXT NOT NULL,
    duration_ms INTEGER,
    success INTEGER,
    message TEXT NOT NULL DEFAULT ''
);
CREATE TABLE IF NOT EXISTS observations (
    id INTEGER PRIMARY KEY,
    deployment_id TEXT NOT NULL REFERENCES deployments,
    kind TEXT NOT NULL CHECK (kind IN ('health', 'gate')),
    document TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS nonces (nonce TEXT PRIMARY KEY, expires_at REAL NOT NULL);
CREATE INDEX IF NOT EXISTS nonces_by_expiry ON nonces (expires_at);
CREATE INDEX IF NOT EXISTS journal_by_deployment ON journal (deployment_id);
CREATE INDEX IF NOT EXISTS observations_by_deployment ON observations (deployment_id, kind);
"""


class DeploymentUnknown(Exception):
    """This host knows no such deployment"""


class IdempotencyConflict(Exception):
    """The idempotency key was used for a different request"""


class StateConflict(Exception):
    """The deployment is in another state than the step expects"""

    def __init__(self, deployment_id: str, actual: HostState, wanted: HostState) -> None:
        super().__init__(f"deployment {deployment_id} is {actual}; it cannot become {wanted}")
        self.actual = actual


@dataclass(frozen=True)
class Undo:
    """What brings the previous container back; written before it is touched."""

    previous_container_id: str | None = None
    restart_policy: dict[str, Any] | None = None
    was_running: bool = False
    stop_began_at: str | None = None
    route: dict[str, Any] | None = None


@dataclass(frozen=True)
class Entry:
    """One deployment as the ledger holds it."""

    deployment_id: str
    idempotency_key: str | None
    request: DeployRequest
    state: HostState
    package: PackageAnnouncement | None
    upload_offset: int
    facts: HostFacts
    undo: Undo | None
    error_code: ErrorCode | None
    error_message: str | None
    created_at: datetime
    updated_at: datetime


def utc_now() -> datetime:
    """Now, aware, in UTC."""
    return datetime.now(UTC)


def _merged(facts: HostFacts, news: dict[str, Any]) -> HostFacts:
    """Checked, so that a misspelt fact is refused and not lost."""
    return HostFacts.model_validate({**facts.model_dump(), **news})


def _entry(row: sqlite3.Row) -> Entry:
    return Entry(
        deployment_id=row["deployment_id"],
        idempotency_key=row["idempotency_key"],
        request=DeployRequest.model_validate_json(row["request"]),
        state=HostState(row["state"]),
        package=PackageAnnouncement.model_validate_json(row["package"]) if row["package"] else None,
        upload_offset=row["upload_offset"],
        facts=HostFacts.model_validate_json(row["facts"]),
        undo=Undo(**json.loads(row["undo"])) if row["undo"] else None,
        error_code=ErrorCode(row["error_code"]) if row["error_code"] else None,
        error_message=row["error_message"],
        created_at=datetime.fromisoformat(row["created_at"]),
        updated_at=datetime.fromisoformat(row["updated_at"]),
    )


@contextmanager
def _alone_at(path: Path) -> Iterator[None]:
    """One opener at a time: SQLite answers "locked" at once, whatever its timeout, when two turn WAL on."""
    with path.with_name(f"{path.name}.opening").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        yield


class Ledger:
    """All SQL of the host. Safe to share between threads and between processes."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self._db = sqlite3.connect(path, check_same_thread=False, timeout=30, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        self._ballast = Ballast(path.with_name("ballast"))
        self._ballast.lay()
        with _alone_at(path):
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA foreign_keys=ON")
            self._db.executescript(_SCHEMA)

    def close(self) -> None:
        """Close the database; the ledger is not used afterwards."""
        with self._lock:
            self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException as exc:
                if self._db.in_transaction:  # a full disk has rolled it back already
                    self._db.execute("ROLLBACK")
                if isinstance(exc, sqlite3.Error) and exc.sqlite_errorcode == sqlite3.SQLITE_FULL:
                    self._ballast.drop()  # what comes next is the way back, and it finds room
                raise

    def keep_reserve(self) -> None:
        """Lay the reserve down again that a full disk took, once there is room."""
        self._ballast.lay()

    def _row(self, column: str, value: str) -> sqlite3.Row | None:
        with self._lock:
            row: sqlite3.Row | None = self._db.execute(
                f"SELECT * FROM deployments WHERE {column} = ?",  # noqa: S608 - column is a literal of ours
                (value,),
            ).fetchone()
            return row

    # -- deployments -----------------------------------------------------------------------------

    def create(
        self,
        request: DeployRequest,
        state: HostState = S.RECEIVING,
        idempotency_key: str | None = None,
        **facts: Any,
    ) -> tuple[Entry, bool]:
        """Take a request, with what is known of it already; return its entry and whether it is new.

        The same idempotency key with the same request gives the entry made before.
        Raises `IdempotencyConflict` when the key was used for another request.
        """
        now, deployment_id = utc_now().isoformat(), str(uuid.uuid4())
        package = request.package.model_dump_json() if request.package else None
        with self._transaction() as db:
            known = self._row("idempotency_key", idempotency_key) if idempotency_key else None
            if known is not None:
                entry = _entry(known)
                if entry.request != request:
                    raise IdempotencyConflict(f"idempotency key {idempotency_key!r} names another request")
                return entry, False
            db.execute(
                "INSERT INTO deployments (deployment_id, idempotency_key, workflow_id, container_name, state,"
                " request, package, facts, created_at, updated_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (deployment_id, idempotency_key, request.workflow_id, request.container_name, state,
                 request.model_dump_json(), package, _merged(HostFacts(), facts).model_dump_json(), now, now),
            )  # fmt: skip
        return self.get(deployment_id), True

    def of_key(self, idempotency_key: str) -> Entry | None:
        """The entry that was made with this key, or None."""
        row = self._row("idempotency_key", idempotency_key)
        return _entry(row) if row is not None else None

    def get(self, deployment_id: str) -> Entry:
        """The entry; raises `DeploymentUnknown`."""
        row = self._row("deployment_id", deployment_id)
        if row is None:
            raise DeploymentUnknown(f"no deployment {deployment_id} on this host")
        return _entry(row)

    def of_workflow(self, workflow_id: str) -> Entry:
        """The newest deployment of a workflow; raises `DeploymentUnknown`."""
        with self._lock:
            row = self._db.execute(
                "SELECT * FROM deployments WHERE workflow_id = ? ORDER BY created_at DESC LIMIT 1",
                (workflow_id,),
            ).fetchone()
        if row is None:
            raise DeploymentUnknown(f"no deployment of workflow {workflow_id} on this host")
        return _entry(row)

    def image_ids(self, config_digest: str) -> list[str]:
        """Ids by which this host's engine has had an image, the newest first."""
        with self._lock:
            rows = self._db.execute(
                "SELECT json_extract(facts, '$.image_id') AS image_id FROM deployments"
                " WHERE json_extract(facts, '$.image_config_digest') = ? ORDER BY created_at DESC",
                (config_digest,),
            ).fetchall()
        return list(dict.fromkeys(str(row["image_id"]) for row in rows if row["image_id"]))

    def in_states(self, *states: HostState) -> list[Entry]:
        """Entries in any of `states`, oldest first."""
        marks = ",".join("?" * len(states))
        with self._lock:
            rows = self._db.execute(
                f"SELECT * FROM deployments WHERE state IN ({marks}) ORDER BY created_at",  # noqa: S608 - marks are '?'
                states,
            ).fetchall()
        return [_entry(row) for row in rows]

    def open_entries(self) -> list[Entry]:
        """Entries not at rest, and failed restores that no later deployment has settled, oldest first."""
        settled = sorted(SETTLED)
        marks = ",".join("?" * len(settled))
        with self._lock:
            rows = self._db.execute(
                f"SELECT * FROM deployments AS mine WHERE state NOT IN ({marks})"  # noqa: S608 - marks are '?'
                " OR (state = ? AND NOT EXISTS (SELECT 1 FROM deployments AS later WHERE"
                " later.container_name = mine.container_name AND later.created_at > mine.created_at"
                " AND later.state IN (?, ?))) ORDER BY created_at",
                (*settled, S.RESTORE_FAILED, S.KEPT, S.RESTORED),
            ).fetchall()
        return [_entry(row) for row in rows]

    def move(
        self,
        deployment_id: str,
        to_state: HostState,
        *,
        error_code: ErrorCode | None = None,
        error_message: str | None = None,
        undo: Undo | None = None,
        **facts: Any,
    ) -> Entry:
        """Change the state along `TRANSITIONS` and add facts, in one transaction.

        Raises `StateConflict` when the table holds no such change from the state that is there now.
        """
        with self._transaction() as db:
            entry = self.get(deployment_id)
            if (entry.state, to_state) not in TRANSITIONS:
                raise StateConflict(deployment_id, entry.state, to_state)
            merged = _merged(entry.facts, facts)
            db.execute(
                "UPDATE deployments SET state = ?, facts = ?, undo = ?, error_code = COALESCE(?, error_code),"
                " error_message = COALESCE(?, error_message), updated_at = ? WHERE deployment_id = ?",
                (to_state, merged.model_dump_json(), json.dumps(asdict(undo or entry.undo or Undo())),
                 error_code, error_message, utc_now().isoformat(), deployment_id),
            )  # fmt: skip
        return self.get(deployment_id)

    def note(self, deployment_id: str, **facts: Any) -> Entry:
        """Add facts without changing the state."""
        with self._transaction() as db:
            merged = _merged(self.get(deployment_id).facts, facts)
            db.execute(
                "UPDATE deployments SET facts = ?, updated_at = ? WHERE deployment_id = ?",
                (merged.model_dump_json(), utc_now().isoformat(), deployment_id),
            )
        return self.get(deployment_id)

    def set_package(self, deployment_id: str, package: PackageAnnouncement) -> Entry:
        """Record the package of a deployment announced without one."""
        with self._transaction() as db:
            db.execute(
                "UPDATE deployments SET package = ? WHERE deployment_id = ?",
                (package.model_dump_json(), deployment_id),
            )
        return self.get(deployment_id)

    def set_upload_offset(self, deployment_id: str, offset: int) -> None:
        """Record how many bytes of the package are on disk and verified."""
        with self._transaction() as db:
            db.execute(
                "UPDATE deployments SET upload_offset = ?, updated_at = ? WHERE deployment_id = ?",
                (offset, utc_now().isoformat(), deployment_id),
            )

    # -- journal and observations ----------------------------------------------------------------

    def begin_step(self, deployment_id: str, name: str, stage: str) -> int:
        """Write the intent of a step; returns its journal id."""
        with self._transaction() as db:
            cursor = db.execute(
                "INSERT INTO journal (deployment_id, name, stage, started_at) VALUES (?, ?, ?, ?)",
                (deployment_id, name, stage, utc_now().isoformat()),
            )
            return int(cursor.lastrowid or 0)

    def end_step(self, journal_id: int, *, success: bool, duration_ms: int, message: str = "") -> None:
        """Write the fact of a step."""
        with self._transaction() as db:
            db.execute(
                "UPDATE journal SET success = ?, duration_ms = ?, message = ? WHERE id = ?",
                (success, duration_ms, message, journal_id),
            )

    def observe(self, deployment_id: str, observation: HealthAttempt | QualityGate) -> None:
        """Keep a health attempt or the outcome of a quality gate."""
        kind = "health" if isinstance(observation, HealthAttempt) else "gate"
        with self._transaction() as db:
            db.execute(
                "INSERT INTO observations (deployment_id, kind, document) VALUES (?, ?, ?)",
                (deployment_id, kind, observation.model_dump_json()),
            )

    def _documents(self, deployment_id: str, kind: str) -> list[str]:
        with self._lock:
            rows = self._db.execute(
                "SELECT document FROM observations WHERE deployment_id = ? AND kind = ? ORDER BY id",
                (deployment_id, kind),
            ).fetchall()
        return [row["document"] for row in rows]

    def operations(self, deployment_id: str) -> list[OperationResult]:
        """Steps that ended, in order; a step that never ended is told as failed with 0 ms."""
        with self._lock:
            rows = self._db.execute(
                "SELECT * FROM journal WHERE deployment_id = ? ORDER BY id", (deployment_id,)
            ).fetchall()
        return [
            OperationResult(
                name=row["name"],
                stage=row["stage"],
                success=bool(row["success"]),
                started_at=datetime.fromisoformat(row["started_at"]),
                duration_ms=row["duration_ms"] or 0,
                message=row["message"] if row["success"] is not None else "begun, not ended",
            )
            for row in rows
        ]

    def status(self, deployment_id: str) -> DeploymentStatus:
        """Everything the control host may know of a deployment."""
        entry = self.get(deployment_id)
        return DeploymentStatus(
            deployment_id=deployment_id,
            workflow_id=entry.request.workflow_id,
            container_name=entry.request.container_name,
            image_tag=entry.request.image_tag,
            state=entry.state,
            upload_offset=entry.upload_offset,
            package_bytes=entry.package.size_bytes if entry.package else None,
            facts=entry.facts,
            operations=self.operations(deployment_id),
            health_attempts=[
                HealthAttempt.model_validate_json(text) for text in self._documents(deployment_id, "health")
            ],
            gates=[QualityGate.model_validate_json(text) for text in self._documents(deployment_id, "gate")],
            error_code=entry.error_code,
            error_message=entry.error_message,
            created_at=entry.created_at,
            updated_at=entry.updated_at,
        )

    # -- replay store ----------------------------------------------------------------------------

    def spend_nonce(self, nonce: str, now: float, expires_at: float) -> bool:
        """True the first time a nonce is seen, in any thread or process; seconds since 1970."""
        with self._transaction() as db:
            db.execute("DELETE FROM nonces WHERE expires_at < ?", (now,))
            cursor = db.execute("INSERT OR IGNORE INTO nonces VALUES (?, ?)", (nonce, expires_at))
            return cursor.rowcount == 1
