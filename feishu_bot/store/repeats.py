"""A commit that is asked for again because nobody heard of its end: what it did is read back, nothing is done twice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import Row, bindparam, or_, select

from feishu_bot.model import End
from feishu_bot.store.schema import ATTEMPTING, OPEN, conversations, inbox, messages, outbox
from feishu_bot.store.work import Committed, PartToSend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from feishu_bot.store.work import Outcome, Transaction

AnyRow = Row[*tuple[Any, ...]]

_ENDED = select(inbox.c.id, inbox.c.state, inbox.c.begun_token).where(
    inbox.c.id.in_(bindparam("ids", expanding=True)), inbox.c.state != OPEN
)
_CONVERSATION = select(conversations.c.id, conversations.c.public_id).where(
    or_(
        conversations.c.id == bindparam("cid"),
        conversations.c.public_id == bindparam("named"),
        (conversations.c.scope_key == bindparam("scope"))
        & (conversations.c.tenant_id == bindparam("in_tenant")),
    )
)
_STORED = (
    select(messages.c.id)
    .where(
        messages.c.conversation_id == bindparam("cid"),
        messages.c.save_key.in_(bindparam("keys", expanding=True)),
    )
    .order_by(messages.c.seq)
)
_SENDING = select(outbox).where(
    outbox.c.source.in_(bindparam("sources", expanding=True)),
    outbox.c.state == ATTEMPTING,
    outbox.c.attempt_token == bindparam("token"),
)


def committed_before(tx: Transaction, outcomes: Sequence[Outcome]) -> dict[int, Committed]:
    """Return, by inbox id, what an earlier run of the same commits has done.

    A message ended under this very lease is one that this lease's commit has ended: whoever ends it otherwise
    takes the lease's token out of its row. Asked only where the fence has failed, so one by one.
    """
    rows = tx.connection.execute(_ENDED, {"ids": [o.work.inbox_id for o in outcomes]})
    ended = {r.id: r for r in rows}
    done = {}
    for outcome in outcomes:
        row = ended.get(outcome.work.inbox_id)
        if row is not None and row.begun_token == outcome.work.lease.token:
            done[row.id] = _read_back(tx, outcome, End(row.state))
    return done


def _read_back(tx: Transaction, outcome: Outcome, end: End) -> Committed:
    work, state = outcome.work, outcome.work.conversation
    found = tx.connection.execute(
        _CONVERSATION,
        {
            "cid": state.id if state is not None else None,
            "named": work.message.conversation if state is None else None,
            "scope": work.lease.lane_key if state is None else None,
            "in_tenant": work.tenant_id,
        },
    ).first()
    ids: tuple[int, ...] = ()
    if found is not None and work.message.conversation is not None:
        keys = [m.save_key for m in outcome.messages if m.save_key]
        ids = tuple(tx.connection.execute(_STORED, {"cid": found.id, "keys": keys}).scalars())
    return Committed(
        end=end,
        conversation_id=found.id if found is not None else None,
        conversation_public_id=found.public_id if found is not None else None,
        message_ids=ids,
        sending=_sending(tx, outcome),
    )


def _sending(tx: Transaction, outcome: Outcome) -> PartToSend | None:
    lease = outcome.work.lease
    sources = sorted({part.source or f"in:{outcome.work.inbox_id}" for part in outcome.parts})
    row = tx.connection.execute(_SENDING, {"sources": sources, "token": lease.token}).first()
    if row is None:
        return None
    return PartToSend(
        lease=lease,
        id=row.id,
        source=row.source,
        kind=row.kind,
        part=row.part,
        account=row.account,
        payload=row.payload,
        attempts=row.attempts,
        reply_before=row.reply_before,
        first_attempt_at=row.first_attempt_at,
        unknown_at=row.unknown_at,
    )
