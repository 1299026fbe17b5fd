"""Workflows, their stages, their transitions and the outbox of their events."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

STATES = (
    "current_state IN ('PENDING', 'PACKAGING', 'TRANSFERRING', 'DEPLOYING', 'VALIDATING', 'COMPLETED',"
    " 'ROLLING_BACK', 'ROLLBACK_COMPLETED', 'FAILED')"
)
OUTCOME = (
    "(current_state = 'COMPLETED' AND success IS NOT NULL AND success AND completed_at IS NOT NULL)"
    " OR (current_state IN ('ROLLBACK_COMPLETED', 'FAILED')"
    " AND success IS NOT NULL AND NOT success AND completed_at IS NOT NULL)"
    " OR (current_state NOT IN ('COMPLETED', 'ROLLBACK_COMPLETED', 'FAILED')"
    " AND success IS NULL AND completed_at IS NULL)"
)
PAIRS = (
    "(from_state = 'PENDING' AND to_state IN ('PACKAGING', 'FAILED'))"
    " OR (from_state = 'PACKAGING' AND to_state IN ('TRANSFERRING', 'FAILED'))"
    " OR (from_state = 'TRANSFERRING' AND to_state IN ('DEPLOYING', 'FAILED'))"
    " OR (from_state = 'DEPLOYING' AND to_state IN ('VALIDATING', 'ROLLING_BACK', 'FAILED'))"
    " OR (from_state = 'VALIDATING' AND to_state IN ('COMPLETED', 'ROLLING_BACK', 'FAILED'))"
    " OR (from_state = 'ROLLING_BACK' AND to_state IN ('ROLLBACK_COMPLETED', 'FAILED'))"
)
BIG_KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
JSON = sa.JSON().with_variant(JSONB(), "postgresql")  # type: ignore[no-untyped-call]  # in SQLAlchemy 2.0 only
MOMENT = sa.DateTime(timezone=True)


def _workflow_id() -> sa.Column[str]:
    return sa.Column("workflow_id", sa.Text, sa.ForeignKey("workflow_executions.workflow_id"), nullable=False)


def upgrade() -> None:
    """Create the four tables."""
    _create_executions()
    _create_stage_results()
    _create_transitions()
    _create_outbox()


def _create_executions() -> None:
    op.create_table(
        "workflow_executions",
        sa.Column("workflow_id", sa.Text, primary_key=True),
        sa.Column("correlation_id", sa.Text, nullable=False),
        sa.Column("deployment_id", sa.Text),
        sa.Column("container_name", sa.Text, nullable=False),
        sa.Column("image_tag", sa.Text, nullable=False),
        sa.Column("remote_host", sa.Text, nullable=False),
        sa.Column("remote_port", sa.Integer, nullable=False),
        sa.Column("current_state", sa.Text, nullable=False),
        sa.Column("stages_completed", JSON, nullable=False),
        sa.Column("stages_failed", JSON, nullable=False),
        sa.Column("total_duration_ms", sa.BigInteger),
        sa.Column("success", sa.Boolean),
        sa.Column("error_code", sa.Text),
        sa.Column("error_message", sa.Text),
        sa.Column("failure_stage", sa.Text),
        sa.Column("retry_count", sa.Integer, nullable=False),
        sa.Column("container_id", sa.Text),
        sa.Column("image_id", sa.Text),
        sa.Column("image_size_bytes", sa.BigInteger),
        sa.Column("deployed_url", sa.Text),
        sa.Column("health_status", JSON),
        sa.Column("deployment_metrics", JSON),
        sa.Column("rollback_performed", sa.Boolean, nullable=False),
        sa.Column("rollback_result", JSON),
        sa.Column("request", JSON, nullable=False),
        sa.Column("flow_run_id", sa.Text),
        sa.Column("event_sequence", sa.Integer, nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("updated_at", MOMENT, nullable=False),
        sa.Column("completed_at", MOMENT),
        sa.CheckConstraint(STATES, name="ck_workflow_executions_current_state"),
        sa.CheckConstraint(OUTCOME, name="ck_workflow_executions_outcome"),
    )
    by_container = ["container_name", "remote_host", "created_at"]
    op.create_index("ix_workflow_executions_container", "workflow_executions", by_container)
    op.create_index("ix_workflow_executions_created_at", "workflow_executions", ["created_at"])


def _create_stage_results() -> None:
    op.create_table(
        "workflow_stage_results",
        sa.Column("id", BIG_KEY, primary_key=True, autoincrement=True),
        _workflow_id(),
        sa.Column("stage_number", sa.Integer, nullable=False),
        sa.Column("stage_name", sa.Text, nullable=False),
        sa.Column("success", sa.Boolean, nullable=False),
        sa.Column("duration_ms", sa.BigInteger, nullable=False),
        sa.Column("operations", JSON, nullable=False),
        sa.Column("gates", JSON, nullable=False),
        sa.Column("artifacts", JSON, nullable=False),
        sa.Column("error_code", sa.Text),
        sa.Column("error_message", sa.Text),
        sa.Column("started_at", MOMENT, nullable=False),
        sa.Column("completed_at", MOMENT, nullable=False),
        sa.UniqueConstraint("workflow_id", "stage_number", name="uq_workflow_stage_results_workflow_stage"),
    )


def _create_transitions() -> None:
    op.create_table(
        "workflow_transitions",
        sa.Column("id", BIG_KEY, primary_key=True, autoincrement=True),
        _workflow_id(),
        sa.Column("sequence", sa.Integer, nullable=False),
        sa.Column("from_state", sa.Text, nullable=False),
        sa.Column("to_state", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("at", MOMENT, nullable=False),
        sa.CheckConstraint(PAIRS, name="ck_workflow_transitions_allowed"),
        sa.UniqueConstraint("workflow_id", "sequence", name="uq_workflow_transitions_workflow_sequence"),
    )


def _create_outbox() -> None:
    op.create_table(
        "event_outbox",
        sa.Column("id", BIG_KEY, primary_key=True, autoincrement=True),
        sa.Column("event_id", sa.Text, nullable=False),
        _workflow_id(),
        sa.Column("sequence", sa.Integer, nullable=False),
        sa.Column("topic", sa.Text, nullable=False),
        sa.Column("event_type", sa.Text, nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("sent_at", MOMENT),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("last_error", sa.Text),
        sa.UniqueConstraint("event_id", name="uq_event_outbox_event_id"),
        sa.UniqueConstraint("workflow_id", "sequence", name="uq_event_outbox_workflow_sequence"),
        sqlite_autoincrement=True,
    )
    unsent = sa.text("sent_at IS NULL")
    op.create_index(
        "ix_event_outbox_unsent", "event_outbox", ["id"], postgresql_where=unsent, sqlite_where=unsent
    )
