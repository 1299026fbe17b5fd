"""Alembic's entry: runs the scripts on the connection that `tasks.migrations` opened and locked."""

from alembic import context

from tasks.schema import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA)
with context.begin_transaction():
    context.run_migrations()
