"""Numbers about what is stored. They come from the conversations' counters, never from messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import func, select

from feishu_bot.store.schema import conversations

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from sqlalchemy import ColumnElement, Select

    from feishu_bot.store.work import Transaction

_c = conversations.c

STATISTICS_BY: Final = ("day", "platform", "user")


def _within(
    statement: Select[Any],
    instant: ColumnElement[datetime],
    tenant: ColumnElement[str],
    *,
    since: datetime | None,
    until: datetime | None,
    tenant_id: str | None,
) -> Select[Any]:
    if since is not None:
        statement = statement.where(instant >= since)
    if until is not None:
        statement = statement.where(instant < until)
    if tenant_id is not None:
        statement = statement.where(tenant == tenant_id)
    return statement


def totals(
    tx: Transaction,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    by: str | None = None,
    tenant_id: str | None = None,
    limit: int = 1000,
) -> dict[str, Any]:
    """Return how many conversations, messages and tokens there are, averages and the longest conversation.

    ``since`` and ``until`` choose the conversations that were last active from one instant to before the other.
    With ``by`` (day of the last activity in UTC, platform, user) the same sums stand under ``by``, for at most
    ``limit`` groups: days newest first, others by their messages.
    """

    def chosen(*columns: Any) -> Select[Any]:
        statement = select(*columns).where(_c.hidden_at.is_(None))
        return _within(
            statement, _c.last_activity, _c.tenant_id, since=since, until=until, tenant_id=tenant_id
        )

    sums = (func.count(), func.sum(_c.message_count), func.sum(_c.total_tokens))
    top = (_c.message_count, _c.user_key)
    longest: Sequence[Any] | None
    if tx.kind == "sqlite":
        # Reads all once: a column beside max() is that of the row with the maximum, as SQLite promises.
        row = tx.connection.execute(chosen(*sums, func.max(top[0]), top[1])).one()
        longest = row[3:] if row[0] else None
    else:
        row = tx.connection.execute(chosen(*sums)).one()
        longest = tx.connection.execute(chosen(*top).order_by(top[0].desc()).limit(1)).one_or_none()
    count, message_count, tokens = [int(n or 0) for n in row[:3]]
    found: dict[str, Any] = {
        "total_conversations": count,
        "total_messages": message_count,
        "total_tokens": tokens,
        "average_messages_per_conversation": round(message_count / count, 2) if count else 0.0,
        "average_tokens_per_conversation": round(tokens / count, 2) if count else 0.0,
        "longest_conversation_messages": int(longest[0]) if longest is not None else 0,
        "longest_conversation_user": longest[1] if longest is not None else None,
    }
    if by is not None:
        group = {"day": func.date(_c.last_activity), "platform": _c.platform, "user": _c.user_key}[by]
        order = group.desc() if by == "day" else sums[1].desc()
        rows = tx.connection.execute(chosen(group, *sums).group_by(group).order_by(order, group).limit(limit))
        found["by"] = {
            str(row[0]): {
                "total_conversations": int(row[1]),
                "total_messages": int(row[2]),
                "total_tokens": int(row[3]),
            }
            for row in rows
        }
    return found
