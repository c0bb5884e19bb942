"""What one person sees of his own conversations, on each database."""

from __future__ import annotations

import pytest

from feishu_bot.errors import ConversationNotFound
from feishu_bot.model import InboundMessage
from feishu_bot.store import conversations, own, threads
from feishu_bot.store.answers import event_key_of
from feishu_bot.store.inbox import receive
from feishu_bot.store.work import Arrival, NewMessage


async def talk(store, clock, name, *texts):
    """Make a conversation of somebody's and return its id."""
    clock.now_ms += 1000

    def make(tx):
        row = threads.create(tx, f"web:private:{name}", None, user_id=f"web:{name}")
        said = [NewMessage(("user", "assistant")[n % 2], text, 1) for n, text in enumerate(texts)]
        conversations.append(tx, row["id"], said)
        return row["id"]

    return await store.run(make)


async def walk(store, person, limit):
    """Return the pages of a person's list."""
    pages, before = [], None
    while True:
        rows = await store.read(lambda tx, b=before: own.list_own(tx, person, before=b, limit=limit))
        if not rows:
            return pages
        pages.append([row["id"] for row in rows])
        before = pages[-1][-1]


async def test_the_list_is_paged_by_last_use_and_holds_nobody_elses(store, clock):
    made = [await talk(store, clock, "ann", f"text {n}") for n in range(5)]
    await talk(store, clock, "bob", "secret")
    clock.now_ms += 1000
    await store.run(lambda tx: conversations.append(tx, made[1], [NewMessage("user", "again", 1)]))
    order = [made[1], made[4], made[3], made[2], made[0]]
    assert await walk(store, "web:ann", 2) == [order[:2], order[2:4], order[4:]]
    assert await walk(store, "web:ann", 50) == [order]


async def test_conversations_used_in_one_instant_are_not_lost_between_pages(store, clock):
    made = []
    for n in range(5):
        made.append(await talk(store, clock, "ann", f"text {n}"))
        clock.now_ms -= 1000
    assert [i for page in await walk(store, "web:ann", 2) for i in page] == made[::-1]


async def test_a_page_after_a_removed_conversation_goes_on(store, clock):
    made = [await talk(store, clock, "ann", f"text {n}") for n in range(3)]
    await store.run(lambda tx: conversations.hide(tx, made[1]))
    rows = await store.read(lambda tx: own.list_own(tx, "web:ann", before=made[1], limit=10))
    assert [row["id"] for row in rows] == [made[0]]
    while await store.run(lambda tx: conversations.remove_piece(tx, made[1])):
        pass
    rows = await store.read(lambda tx: own.list_own(tx, "web:ann", before=made[1], limit=10))
    assert [row["id"] for row in rows] == [made[0]]


async def test_messages_are_paged_both_ways_also_around_one_that_is_gone(store, clock):
    cid = await talk(store, clock, "ann", *[f"m{n}" for n in range(10)])

    async def texts(**where):
        rows = await store.read(lambda tx: own.list_messages(tx, cid, **where))
        return [row["content"] for row in rows], {row["content"]: row["id"] for row in rows}

    newest, ids = await texts(limit=4)
    assert newest == ["m9", "m8", "m7", "m6"]
    older, more = await texts(before=ids["m6"], limit=4)
    assert older == ["m5", "m4", "m3", "m2"]
    assert (await texts(after=more["m2"], limit=3))[0] == ["m5", "m4", "m3"]
    assert (await texts(after=ids["m9"], limit=3))[0] == []
    await store.run(lambda tx: threads.delete_message(tx, more["m4"]))
    assert (await texts(before=more["m4"], limit=2))[0] == ["m3", "m2"]
    assert (await texts(after=more["m4"], limit=2))[0] == ["m6", "m5"]


async def test_somebody_elses_and_removed_conversations_do_not_exist(store, clock):
    cid = await talk(store, clock, "ann", "hi")
    await store.read(lambda tx: own.check_own(tx, cid, "web:ann"))
    for person in ("web:bob", "web:Ann", "web:ann ", "qq:ann"):
        with pytest.raises(ConversationNotFound):
            await store.read(lambda tx, p=person: own.check_own(tx, cid, p))
    await store.run(lambda tx: conversations.hide(tx, cid))
    with pytest.raises(ConversationNotFound):
        await store.read(lambda tx: own.check_own(tx, cid, "web:ann"))


async def test_questions_without_an_answer_are_found_by_their_asker_until_they_end(store):
    def arrival(user, request_id, text, **more):
        message = InboundMessage("web", event_key_of(user, request_id), sender_id=user, text=text)
        return Arrival("web", message.event_key, f"conv:{request_id[:9]}", message.to_json(), **more)

    asked = [
        arrival("ann", "r:1 %", "first"),
        arrival("ann", "r2", "done", state="ignored", reason="x"),
        arrival("annabel", "r3", "hers"),
        arrival("an_", "r4", "his"),
        arrival("ann", "x" * 300, "too long a name to come back by"),
    ]
    await store.run(lambda tx: receive(tx, asked, shard=0))
    found = await store.read(lambda tx: own.pending(tx, "web", "ann"))
    assert [(item["request_id"], item["message"]) for item in found] == [("r:1 %", "first")]
    assert [i["request_id"] for i in await store.read(lambda tx: own.pending(tx, "web", "an_"))] == ["r4"]
    assert await store.read(lambda tx: own.pending(tx, "qq", "ann")) == []
