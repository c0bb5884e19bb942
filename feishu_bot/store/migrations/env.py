"""What Alembic runs: our connection, our tables, no logging set-up of its own."""

from __future__ import annotations

from typing import Any

from alembic import context

from feishu_bot.store.schema import metadata


def _tell(ctx: Any, step: Any, heads: Any, run_args: Any) -> None:  # noqa: ARG001  # called by these names
    told = context.config.attributes.get("step")
    if told is not None:
        told(step.up_revision_id)


context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
    transactional_ddl=False,  # the caller holds the transaction
    on_version_apply=_tell,
)
context.run_migrations()
