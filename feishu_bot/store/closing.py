"""Messages that are still unanswered shortly before their platform takes no reply any more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import bindparam, select

from feishu_bot.model import InboundMessage
from feishu_bot.store.inbox import IS_OPEN
from feishu_bot.store.outbox import push
from feishu_bot.store.schema import inbox, lanes, outbox

if TYPE_CHECKING:
    from collections.abc import Callable

    from feishu_bot.store.work import Transaction

KIND: Final = "wait"  # outbox.kind of the note: not that of a note that ends the message
LEAD_MS: Final = 30_000  # how long before the end of a window the note goes out
PATIENCE_MS: Final = 10_000  # what came late, with its window nearly over, has this time to be answered first
_AT_LEAST_MS: Final = 1000  # a note needs some time to get there
_MOST: Final = 500  # notes of one transaction

_DUE = (
    select(inbox.c.id, inbox.c.lane_key)
    .where(
        IS_OPEN,
        inbox.c.received_at <= bindparam("came_before"),
        inbox.c.reply_before > bindparam("not_before"),
        inbox.c.reply_before <= bindparam("soon"),
        ~select(outbox.c.id).where(outbox.c.source == "in:" + inbox.c.id.cast(outbox.c.source.type), outbox.c.kind == KIND).exists(),
    )
    .order_by(inbox.c.id)
    .limit(_MOST)
)  # fmt: skip
_LOCK = (
    select(lanes.c.key)
    .where(lanes.c.key.in_(bindparam("keys", expanding=True)))
    .order_by(lanes.c.key)
    .with_for_update()
)
_STILL_OPEN = select(
    inbox.c.id, inbox.c.account, inbox.c.lane_key, inbox.c.payload, inbox.c.reply_before
).where(inbox.c.id.in_(bindparam("ids", expanding=True)), IS_OPEN)


def warn(tx: Transaction, note: Callable[[InboundMessage], str | None]) -> list[str]:
    """Put a note into the outbox for each open message whose reply window ends soon; return their lanes.

    ``note`` makes the part's payload, or None where nothing is to be said. Each message has one such note,
    whatever process looks, and none once it has ended.
    """
    due = tx.connection.execute(
        _DUE,
        {
            "came_before": tx.now_ms - PATIENCE_MS,
            "not_before": tx.now_ms + _AT_LEAST_MS,
            "soon": tx.now_ms + LEAD_MS,
        },
    ).all()
    if not due:
        return []
    tx.connection.execute(_LOCK, {"keys": sorted({row.lane_key for row in due})}).all()
    rows: list[dict[str, Any]] = []
    for row in tx.connection.execute(_STILL_OPEN, {"ids": [row.id for row in due]}):
        payload = note(InboundMessage.from_json(row.payload))
        if payload is not None:
            rows.append(
                {
                    "source": f"in:{row.id}",
                    "kind": KIND,
                    "part": 0,
                    "lane_key": row.lane_key,
                    "account": row.account,
                    "payload": payload,
                    "reply_before": row.reply_before,
                }
            )
    push(tx, rows)
    return sorted({row["lane_key"] for row in rows})
