"""Totals of pruned workflows, and the indexes of metrics, retention, status and lists."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

WORKFLOWS = "workflow_executions"
MOMENT = sa.DateTime(timezone=True)
DURATION_BOUNDS_MS = (15_000, 30_000, 60_000, 120_000, 180_000)
STAGE_BOUNDS_MS = (5_000, 10_000, 15_000, 30_000, 60_000)
IMAGE_BOUNDS_BYTES = (10**7, 10**8, 5 * 10**8, 10**9, 2 * 10**9)
METRICS = (
    *("container_name", "remote_host", "current_state", "failure_stage", "rollback_performed"),
    *("total_duration_ms", "image_size_bytes", "created_at", "workflow_id"),
)


def upgrade() -> None:
    """Add what the new queries need; no row that is there changes."""
    _create_totals()
    _create_indexes()


def _histogram(name: str, unit: str, bounds: tuple[int, ...]) -> list[sa.Column[int]]:
    names = [f"{name}_count", f"{name}_sum_{unit}", *(f"{name}_within_{bound}_{unit}" for bound in bounds)]
    return [sa.Column(each, sa.BigInteger, nullable=False) for each in names]


def _create_totals() -> None:
    op.create_table(
        "pruned_workflow_totals",
        *(sa.Column(name, sa.Text, primary_key=True) for name in METRICS[:4]),
        sa.Column("rollback_performed", sa.Boolean, primary_key=True),
        sa.Column("first_created_at", MOMENT, nullable=False),
        sa.Column("workflows", sa.BigInteger, nullable=False),
        *_histogram("duration", "ms", DURATION_BOUNDS_MS),
        *_histogram("image", "bytes", IMAGE_BOUNDS_BYTES),
    )
    op.create_table(
        "pruned_stage_totals",
        sa.Column("container_name", sa.Text, primary_key=True),
        sa.Column("stage_name", sa.Text, primary_key=True),
        *_histogram("duration", "ms", STAGE_BOUNDS_MS),
    )


def _create_indexes() -> None:
    op.create_index("ix_workflow_executions_container_name", WORKFLOWS, ["container_name", "created_at"])
    op.create_index("ix_workflow_executions_remote_host", WORKFLOWS, ["remote_host", "created_at"])
    op.create_index("ix_workflow_executions_state", WORKFLOWS, ["current_state", "created_at"])
    op.create_index("ix_workflow_executions_completed_at", WORKFLOWS, ["completed_at"])
    op.create_index("ix_workflow_executions_metrics", WORKFLOWS, list(METRICS))
    stage_columns = ["workflow_id", "stage_name", "duration_ms"]
    op.create_index("ix_workflow_stage_results_metrics", "workflow_stage_results", stage_columns)
    sent = sa.text("sent_at IS NOT NULL")
    op.create_index(
        "ix_event_outbox_sent", "event_outbox", ["sent_at"], postgresql_where=sent, sqlite_where=sent
    )
