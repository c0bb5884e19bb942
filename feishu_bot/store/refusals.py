"""Chats that take no messages of ours but answers: people who refuse them, groups that the bot was removed from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import bindparam, select

from feishu_bot.store.engine import insert_set
from feishu_bot.store.schema import refusals

if TYPE_CHECKING:
    from feishu_bot.store.work import Transaction

_r = refusals.c
_OF_CHAT = (_r.account == bindparam("in_account")) & (_r.chat == bindparam("in_chat"))
_SINCE = select(_r.at).where(_OF_CHAT)
_REFUSES = select(_r.at).where(_OF_CHAT, _r.refused == 1)


def note(tx: Transaction, account: str, chat: str, *, refused: bool, at_ms: int | None) -> None:
    """Keep what a chat has said last, whatever the order in which it is told. ``at_ms``: the platform's time."""
    at = tx.now_ms if at_ms is None else at_ms
    last = tx.connection.execute(_SINCE, {"in_account": account, "in_chat": chat}).scalar()
    if last is not None and last > at:
        return
    row = {"account": account, "chat": chat, "refused": int(refused), "at": at}
    tx.connection.execute(insert_set(tx.kind, refusals, ("account", "chat"), ("refused", "at")), row)


def refuses(tx: Transaction, account: str, chat: str) -> bool:
    """Say whether a chat takes nothing but answers."""
    return tx.connection.execute(_REFUSES, {"in_account": account, "in_chat": chat}).first() is not None
