"""Messages that others name by the platform's id: replied to, recalled or edited. Never one of another chat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson
from sqlalchemy import Row, bindparam, select

from feishu_bot.model import user_key
from feishu_bot.store.schema import NOT_CLEARED, conversations, messages, outbox

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from feishu_bot.store.work import Quote, Transaction

AnyRow = Row[*tuple[Any, ...]]

CHAT = "chat"  # in a message's metadata: the group it was said in, where its conversation spans several

_m, _c, _o = messages.c, conversations.c, outbox.c

_SAID = (
    select(_m.id, _m.conversation_id, _m.source_id, _m.role, _m.content, _m.metadata_json)
    .add_columns(_c.platform, _c.chat_id, _c.user_key)
    .join_from(messages, conversations, _c.id == _m.conversation_id)
    .where(
        _m.source_id.in_(bindparam("ids", expanding=True)),
        _c.platform.in_(bindparam("accounts", expanding=True)),
        _m.recalled_at.is_(None),
        _c.hidden_at.is_(None),
        NOT_CLEARED,
    )
    .order_by(_m.id)
)
_SENT = (
    select(_o.account, _o.sent_id, _o.source, _o.kind, _o.payload, _o.conversation_id)
    .where(
        _o.sent_id.in_(bindparam("ids", expanding=True)),
        _o.account.in_(bindparam("accounts", expanding=True)),
    )
    .order_by(_o.id)
)


@dataclass(slots=True)
class Quoted:
    """What is known of a message that another one names.

    ``said``: where it is stored, with its copies in forked conversations. ``answer``: conversation and save key of
    the stored answer that it is a part of, where it is known only as something that was sent.
    """

    text: str
    by_bot: bool
    said: list[AnyRow]
    answer: tuple[int, str] | None = None


def find_quotes(tx: Transaction, asked: Iterable[Quote]) -> dict[Quote, Quoted]:
    """Return those of the messages that are known and were said in the same chat as what names them."""
    wanted: dict[tuple[str, str], list[Quote]] = {}
    for quote in asked:
        wanted.setdefault((quote.account, quote.message_id), []).append(quote)
    if not wanted:
        return {}
    parameters = {
        "ids": sorted({message_id for _, message_id in wanted}),
        "accounts": sorted({account for account, _ in wanted}),
    }
    found: dict[Quote, Quoted] = {}
    for row in tx.connection.execute(_SAID, parameters):
        for quote in wanted.get((row.platform, row.source_id), ()):
            if _said_there(row, quote):
                known = found.setdefault(quote, Quoted(row.content, row.role == "assistant", []))
                known.said.append(row)
    for row in tx.connection.execute(_SENT, parameters):
        for quote in wanted.get((row.account, row.sent_id), ()):
            text = _sent_there(row, quote)
            if text is None:
                continue
            known = found.setdefault(quote, Quoted(text, by_bot=True, said=[]))
            known.by_bot = True
            if row.kind == "answer" and row.conversation_id is not None:
                known.answer = (row.conversation_id, f"{row.source}:assistant")
    return found


def _said_there(row: AnyRow, quote: Quote) -> bool:
    if not quote.chat_id:
        return bool(row.user_key == quote.user_key)
    return bool(_chat_of(row) == quote.chat_id)


def _chat_of(row: AnyRow) -> str | None:
    """Return the chat of a stored message: its own note of it, else its conversation's."""
    if row.metadata_json is not None and f'"{CHAT}"' in row.metadata_json:
        chat = _metadata(row.metadata_json).get(CHAT)
        if isinstance(chat, str):
            return chat
    chat_id: str | None = row.chat_id
    return chat_id


def _sent_there(row: AnyRow, quote: Quote) -> str | None:
    """Return the text of a part that was sent to the quote's chat, None if it was another chat."""
    payload = _metadata(row.payload)
    if not payload:
        # Texts are not kept. The platform names what is replied to within one chat alone.
        return ""
    if quote.chat_id:
        there = payload.get("chat_id") == quote.chat_id
    else:
        sender_id, chat_type = payload.get("sender_id", ""), payload.get("chat_type", "private")
        there = user_key(row.account, chat_type, sender_id) == quote.user_key
    return str(payload.get("text", "")) if there else None


def _metadata(value: str) -> Mapping[str, Any]:
    try:
        data = orjson.loads(value)
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}
