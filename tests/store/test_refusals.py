"""What chats have said of messages that are no answers, on record."""

from __future__ import annotations

import itertools

import pytest

from feishu_bot.store.refusals import note, refuses


async def said(store, *changes, account="qq", chat="U"):
    for refused, at in changes:
        await store.run(lambda tx, r=refused, t=at: note(tx, account, chat, refused=r, at_ms=t))


@pytest.mark.parametrize("order", list(itertools.permutations([(True, 1000), (False, 2000), (True, 3000)])))
async def test_what_was_said_last_holds_in_whatever_order_it_comes(store, order):
    await said(store, *order, *order)
    assert await store.read(lambda tx: refuses(tx, "qq", "U"))


async def test_a_refusal_is_of_one_chat_of_one_account_to_the_letter(store):
    await said(store, (True, None))
    for account, chat in (("qq", "u"), ("qq", "U "), ("qq2", "U"), ("qq", "")):
        assert not await store.read(lambda tx, a=account, c=chat: refuses(tx, a, c))
    await said(store, (False, None))
    assert not await store.read(lambda tx: refuses(tx, "qq", "U"))
