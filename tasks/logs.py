"""The correlation id on every log line of a flow run, whoever writes it.

Prefect's own settings choose the form: `PREFECT_LOGGING_HANDLERS_CONSOLE_FORMATTER=json` writes JSON.
Imports nothing of ours.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

RunLogger = logging.Logger | logging.LoggerAdapter[logging.Logger]
RUN_LOGGERS = ("prefect.flow_runs", "prefect.task_runs")
_correlation_id: ContextVar[str | None] = ContextVar("correlation_id", default=None)


class _Correlated(logging.Filter):
    """Adds `correlation_id` to a record that has none; keeps every record."""

    def filter(self, record: logging.LogRecord) -> bool:
        if getattr(record, "correlation_id", None) is None:
            record.correlation_id = _correlation_id.get()
        return True


_FILTER = _Correlated()


@contextmanager
def correlated(correlation_id: str | None) -> Iterator[None]:
    """Within the block, each line of the run's loggers carries this id."""
    for name in RUN_LOGGERS:
        logging.getLogger(name).addFilter(_FILTER)  # adding it twice keeps one
    token = _correlation_id.set(correlation_id)
    try:
        yield
    finally:
        _correlation_id.reset(token)
