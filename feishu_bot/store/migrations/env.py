"""What Alembic runs: our connection, our tables, no logging set-up of its own."""

from __future__ import annotations

from alembic import context

from feishu_bot.store.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
    transactional_ddl=False,  # the caller holds the transaction
)
context.run_migrations()
