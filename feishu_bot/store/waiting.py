"""Parts that wait for another attempt, and are let go when there is a way to their platform."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sqlalchemy import bindparam, literal_column, select, update

from feishu_bot.store.schema import PENDING, lanes, outbox

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import BindParameter

    from feishu_bot.store.work import Transaction

NOT_CONNECTED: Final = "no client of the platform is connected to the process that tried"  # outbox.last_error

# Written out, not bound, so that the index on unsent rows serves.
_WAITS = (outbox.c.lane_key == lanes.c.key) & (outbox.c.state == literal_column(f"'{PENDING}'"))
_WAITING = (
    select(lanes.c.key)
    .where(
        lanes.c.send_ready_at > bindparam("now"),
        lanes.c.send_token.is_(None),
        select(outbox.c.id)
        .where(_WAITS, outbox.c.account == bindparam("account"), outbox.c.not_before > bindparam("now"))
        .correlate(lanes)
        .exists(),
    )
    .limit(bindparam("most"))
)
_LEFT_BY_OTHERS = (
    select(lanes.c.key, outbox.c.payload)
    .select_from(lanes.join(outbox, _WAITS))
    .where(
        lanes.c.send_ready_at > bindparam("now"),
        lanes.c.send_token.is_(None),
        outbox.c.account == bindparam("account"),
        outbox.c.not_before > bindparam("now"),
        outbox.c.last_error == NOT_CONNECTED,
    )
    .order_by(outbox.c.id)
    .limit(bindparam("most"))
)
_KEYS: BindParameter[list[str]] = bindparam("keys", expanding=True)
_LOCK = select(lanes.c.key).where(lanes.c.key.in_(_KEYS)).order_by(lanes.c.key).with_for_update()
_LET_GO = (
    update(outbox)
    .where(
        outbox.c.lane_key.in_(_KEYS),
        outbox.c.state == literal_column(f"'{PENDING}'"),
        outbox.c.account == bindparam("of_account"),
    )
    .values(not_before=0)
)
_READY = (
    update(lanes)
    .where(lanes.c.key.in_(_KEYS), lanes.c.send_ready_at > bindparam("now"))
    .values(send_ready_at=bindparam("now"))
)


def waiting_parts(tx: Transaction, account: str, most: int = 20_000) -> list[str]:
    """Return lanes that wait for the next attempt to send to this account."""
    found = tx.connection.execute(_WAITING, {"now": tx.now_ms, "account": account, "most": most})
    return list(found.scalars())


def left_by_others(tx: Transaction, account: str, most: int = 500) -> list[tuple[str, str]]:
    """Return lane and payload of parts that wait because whoever tried them had no way to the platform."""
    found = tx.connection.execute(_LEFT_BY_OTHERS, {"now": tx.now_ms, "account": account, "most": most})
    return [(row.key, row.payload) for row in found]


def hasten(tx: Transaction, account: str, lane_keys: Sequence[str]) -> None:
    """Let the parts of these lanes to this account go now. Safe to run twice."""
    keys = sorted(lane_keys)
    tx.connection.execute(_LOCK, {"keys": keys}).all()
    tx.connection.execute(_LET_GO, {"keys": keys, "of_account": account})
    tx.connection.execute(_READY, {"keys": keys, "now": tx.now_ms})
