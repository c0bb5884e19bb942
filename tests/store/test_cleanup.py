from __future__ import annotations

import json
from functools import partial

import pytest
from sqlalchemy import update

from feishu_bot.config import ChatMatchSettings
from feishu_bot.errors import LeaseLost
from feishu_bot.model import End, InboundMessage
from feishu_bot.retention import Retention, Rule
from feishu_bot.schedule import CleanupResult, cleanup, remove_hidden
from feishu_bot.store import cleanup as removing
from feishu_bot.store import jobs
from feishu_bot.store.schema import (
    budget_windows,
    conversations,
    inbox,
    job_runs,
    lanes,
    messages,
    outbox,
    reservations,
    totals,
    usage,
)
from feishu_bot.store.work import LEASE_MS, Arrival, Lease, NewMessage, Outcome, Work
from tests.stores import DAY, HOUR, NOON, count, opened, put, put_conversations, rows

LANE = "user:web:private:u1"  # of the first conversation of put_conversations


async def receive(store, *keys, lane=LANE, state="open", **message):
    """Record one message for each key."""
    for key in keys:
        payload = InboundMessage("web", key, text="hello", sender_id="u1", **message).to_json()
        await store.receive([Arrival("web", key, lane, payload, state)])


async def begin(store, *, lane=LANE, token="a"):
    (found,) = await store.begin([Lease(lane, str(store.owner), token)])
    return found


async def end(store, work, outcome=End.ANSWERED, **more):
    return await store.commit(Outcome(work, outcome, **more))


async def put_part(store, n, *, state="sent", ended_at=NOON, lane=LANE, **more):
    part = {
        "id": n,
        "source": f"in:{n}",
        "kind": "answer",
        "part": 0,
        "lane_key": lane,
        "account": "web",
        "payload": '{"text": "hello"}',
        "state": state,
        "created_at": NOON,
        "ended_at": ended_at,
    }
    await put(store, outbox, part | more)


async def ids(store, table):
    return [row["id"] for row in await rows(store, table)]


async def hide(store, days=30):
    kept = Retention(days)
    found = await store.read(partial(removing.find_idle, retention=kept))
    return await store.run(partial(removing.hide, ids=found.ids, retention=kept))


async def ends(store):
    """Return the totals over all days: how many ended how."""
    found: dict[str, int] = {}
    for row in await rows(store, totals):
        found[row["end"]] = found.get(row["end"], 0) + row["count"]
    return {end: number for end, number in found.items() if number}


# ------------------------------------------------------------------------------------------- conversations


async def test_idle_conversations_are_counted(store):
    await put_conversations(store, [31, 30.01, 29.99, 0])
    assert await store.read(partial(removing.count_idle, retention=Retention(30))) == 2


async def test_what_is_hidden_is_out_of_sight_at_once_and_its_rows_go_later(store):
    await put_conversations(store, [31, 29])
    assert await hide(store) == 1
    first, second = await rows(store, conversations)
    assert first["hidden_at"] is not None
    assert first["scope_key"] is None
    assert first["version"] == second["version"] + 1
    assert second["hidden_at"] is None
    assert await count(store, messages) == 4
    assert await store.read(partial(removing.count_idle, retention=Retention(30))) == 0


async def test_some_chats_are_kept_for_longer_shorter_or_for_ever(store):
    await put_conversations(store, [40, 40, 40, 8, 8])
    for n, chat in enumerate(("normal", "vip", "year", "short", "normal"), start=1):
        which = update(conversations).where(conversations.c.id == n).values(chat_id=chat)
        await store.run(lambda tx, change=which: tx.connection.execute(change) and None)
    rules = [
        (ChatMatchSettings(chat=chat), days) for chat, days in (("v*", None), ("year", 365), ("short", 7))
    ]
    kept = Retention(30, tuple(Rule(*rule) for rule in rules))
    assert (await cleanup(store, kept, dry_run=True)).conversations == 2
    assert (await cleanup(store, kept)).conversations == 2
    assert await ids(store, conversations) == [2, 3, 5]


async def test_with_rules_too_every_piece_is_looked_at(store):
    await put_conversations(store, [40 - n % 3 for n in range(removing.PIECE + 20)], said=0)
    last = update(conversations).where(conversations.c.id > removing.PIECE).values(platform="qq")
    await store.run(lambda tx: tx.connection.execute(last) and None)
    kept = Retention(None, (Rule(ChatMatchSettings(platform="qq"), 7),))
    assert (await cleanup(store, kept, dry_run=True)).conversations == 20
    assert (await cleanup(store, kept)).conversations == 20
    assert await count(store, conversations) == removing.PIECE


async def test_idle_conversations_are_found_in_pieces_each_once(store):
    await put_conversations(store, [40 - n % 3 for n in range(removing.PIECE + 20)], said=0)
    first = await store.read(partial(removing.find_idle, retention=Retention(30)))
    second = await store.read(partial(removing.find_idle, retention=Retention(30), after=first.after))
    assert len(first.ids) == removing.PIECE
    assert len({*first.ids, *second.ids}) == removing.PIECE + 20
    assert second.after is None


async def test_a_conversation_used_since_it_was_found_is_not_hidden(store, clock):
    await put_conversations(store, [31])
    found = await store.read(partial(removing.find_idle, retention=Retention(30)))
    await receive(store, "m1")
    await end(store, await begin(store), messages=(NewMessage("user", "again", 1),))
    assert await store.run(partial(removing.hide, ids=found.ids, retention=Retention(30))) == 0


@pytest.mark.parametrize("lane", [LANE, "conv:public-1"], ids=["by scope", "by id"])
async def test_a_conversation_with_a_message_at_work_is_not_hidden(store, lane):
    await put_conversations(store, [31, 31])
    message = {"conversation": "public-1"} if lane.startswith("conv:") else {}
    await receive(store, "m1", lane=lane, **message)
    assert await hide(store) == 1
    work = await begin(store, lane=lane)
    assert isinstance(work, Work)
    assert work.conversation is not None
    assert await hide(store) == 0
    done = await end(store, work, messages=(NewMessage("user", "hello", 1),))
    assert (done.end, done.conversation_id) == (End.ANSWERED, 1)


async def test_a_piece_ends_when_its_moment_is_over(store, monkeypatch):
    await put_conversations(store, [31, 31], said=2 * removing.BITE)
    await hide(store)
    monkeypatch.setattr(removing, "MOMENT_S", 0.0)
    assert await store.run(removing.remove_hidden) == removing.BITE
    monkeypatch.setattr(removing, "MOMENT_S", 3600.0)
    assert await store.run(removing.remove_hidden) == 3 * removing.BITE + 2
    assert await ids(store, conversations) == []


async def test_hidden_conversations_go_in_pieces_with_their_messages_and_no_others(store):
    await put_conversations(store, [31, 31, 29], said=removing.PIECE - 10)
    await hide(store)
    removed = []
    while removed[-1:] != [0]:
        removed.append(await store.run(removing.remove_hidden))
    assert max(removed) <= removing.PIECE
    assert sum(removed) == 2 * (removing.PIECE - 10) + 2
    assert await ids(store, conversations) == [3]
    assert {row["conversation_id"] for row in await rows(store, messages)} == {3}


# ------------------------------------------------------------------------------------------------- pruning


async def test_what_has_ended_is_kept_as_long_as_a_platform_may_repeat_it(store, clock):
    await receive(store, "seen", state=End.IGNORED.value)
    await put_part(store, 1)
    clock.now_ms += removing.KEEP_ENDED_MS
    assert await store.run(removing.prune) == 0
    clock.now_ms += 1
    assert await store.run(removing.prune) == 2
    assert await count(store, inbox) == await count(store, outbox) == 0
    assert await ends(store) == {"ignored": 1, "removed": 1}


@pytest.mark.parametrize("state", ["open", End.DEAD.value, End.EXPIRED.value])
async def test_what_may_still_be_answered_is_never_pruned(store, clock, state):
    await receive(store, "m1", state=state)
    for n, part in enumerate(["pending", "attempting", "dead", "refused", "expired"]):
        await put_part(store, n + 1, state=part, ended_at=None if n < 2 else NOON)
    clock.now_ms += 30 * DAY
    assert await store.run(removing.prune) == 0


async def test_pruning_goes_in_pieces(store, clock):
    await store.receive(
        [Arrival("web", f"m{n}", LANE, "{}", End.IGNORED.value) for n in range(removing.PIECE + 7)]
    )
    clock.now_ms += removing.KEEP_ENDED_MS + 1
    assert [await store.run(removing.prune) for _ in range(3)] == [removing.PIECE, 7, 0]
    assert (await ends(store))["removed"] == removing.PIECE + 7


async def test_lanes_with_nothing_to_do_go_and_come_back_with_a_message(store):
    await receive(store, "m1")
    await receive(store, "m2", lane="user:web:private:busy")
    await end(store, await begin(store))
    await put(store, lanes, {"key": "sending", "send_ready_at": 1})
    await put(store, lanes, {"key": "quiet"})
    assert await store.run(removing.prune_lanes) == 2
    assert [row["key"] for row in await rows(store, lanes)] == ["sending", "user:web:private:busy"]
    await receive(store, "m3")
    assert isinstance(await begin(store), Work)


async def test_a_lane_at_work_is_not_pruned(store):
    await receive(store, "m1")
    work = await begin(store)
    assert await store.run(removing.prune_lanes) == 0
    assert (await end(store, work)).end is End.ANSWERED


async def test_a_reservation_that_outlived_its_message_is_booked(store):
    await receive(store, "ended", "open")
    await end(store, await begin(store))
    window = {"budget": "daily", "key": "web:u1", "window_start": 0}
    await put(store, budget_windows, window | {"used": 5, "reserved": 300, "reserved_requests": 3})
    ledger = {"user_key": "web:private:u1", "platform": "web", "tenant_id": "default"}
    reserved = {
        "attempt": 1,
        "call": 0,
        "model": "echo",
        "input_tokens": 60,
        "tokens": 100,
        "windows": json.dumps([["daily", "web:u1", 0]]),
        "ledger": json.dumps(ledger),
        "at": NOON,
    }
    await put(store, reservations, *(reserved | {"inbox_id": n} for n in (1, 2, 99)))
    assert await store.run(removing.settle_orphans) == 2
    assert await store.run(removing.settle_orphans) == 0
    assert [row["inbox_id"] for row in await rows(store, reservations)] == [2]
    (found,) = await rows(store, budget_windows)
    assert (found["used"], found["reserved"]) == (205, 100)
    assert (found["used_requests"], found["reserved_requests"]) == (2, 1)
    assert [(row["input_tokens"], row["output_tokens"]) for row in await rows(store, usage)] == [(60, 40)] * 2


# ------------------------------------------------------------------------------------------------ expiring


def note(message, number):
    return {
        "source": f"note:{message.event_key}",
        "kind": "note",
        "part": 0,
        "lane_key": f"note:{message.chat_id or message.person}",
        "account": message.account,
        "payload": f"{number} too old",
    }


async def expire(store, hours=6, note=note):
    ended = await store.run(partial(removing.expire, older_than_ms=hours * HOUR, note=note))
    return ended.total()


async def states(store):
    return {row["event_key"]: row["state"] for row in await rows(store, inbox)}


async def test_messages_that_waited_too_long_end_expired_with_one_note_for_each_chat(store, clock):
    await receive(store, "old-1", "old-2", chat_id="g1", chat_type="group")
    await receive(store, "old-3", lane="user:other", chat_id="g2", chat_type="group")
    clock.now_ms += 7 * HOUR
    await receive(store, "new", chat_id="g1", chat_type="group")
    assert await expire(store) == 3
    assert await states(store) == dict.fromkeys(["old-1", "old-2", "old-3"], "expired") | {"new": "open"}
    assert sorted(row["payload"] for row in await rows(store, outbox)) == ["1 too old", "2 too old"]
    assert await ends(store) == {"expired": 3}
    assert await expire(store) == 0
    assert (await begin(store)).message.event_key == "new"


async def test_a_chat_without_a_note_gets_none(store, clock):
    await receive(store, "old")
    clock.now_ms += 7 * HOUR
    assert await expire(store, note=lambda *_: None) == 1
    assert await count(store, outbox) == 0


async def test_a_message_at_work_does_not_expire_under_its_worker(store, clock):
    await receive(store, "old")
    clock.now_ms += 7 * HOUR
    work = await begin(store)
    assert await expire(store) == 0
    clock.now_ms += LEASE_MS + 1
    assert await expire(store) == 1
    with pytest.raises(LeaseLost):
        await end(store, work)


# -------------------------------------------------------------------------------------------- dead letters


async def dead(store, *keys):
    for key in keys:
        await receive(store, key)
        await end(store, await begin(store), End.DEAD, reason="the model failed")


async def letters(store):
    return [letter.id for letter in await store.read(removing.dead_letters)]


async def test_dead_letters_are_listed_newest_first(store, clock):
    await dead(store, "m1")
    clock.now_ms += 1
    await put_part(store, 4, state="refused", ended_at=clock.now_ms, last_error="no such chat", attempts=3)
    clock.now_ms += 1
    await dead(store, "m2")
    await put_part(store, 5)
    await receive(store, "m3")
    found = await store.read(removing.dead_letters)
    assert [letter.id for letter in found] == ["in-2", "out-4", "in-1"]
    assert (found[0].state, found[0].reason, found[0].attempts) == ("dead", "the model failed", 1)
    assert (found[1].state, found[1].reason, found[1].attempts) == ("refused", "no such chat", 3)
    assert len(await store.read(partial(removing.dead_letters, limit=2))) == 2


@pytest.mark.parametrize("how", [End.DEAD, End.EXPIRED])
async def test_a_dead_message_that_is_retried_is_answered_anew(store, clock, how):
    await receive(store, "m1")
    await end(store, await begin(store), how)
    clock.now_ms += 10 * DAY
    assert await store.run(partial(removing.retry_dead, ids=["in-1"])) == ["in-1"]
    assert await letters(store) == []
    assert await expire(store) == 0
    work = await begin(store)
    assert isinstance(work, Work)
    assert (work.attempt, work.retried) == (1, True)
    await end(store, work)
    assert await states(store) == {"m1": "answered"}
    assert await ends(store) == {"answered": 1}


async def test_a_dead_part_that_is_retried_is_sent_again(store, clock):
    await put_part(store, 4, state="dead", attempts=9, first_attempt_at=NOON)
    assert await store.run(partial(removing.retry_dead, ids=["out-4"])) == ["out-4"]
    (part,) = await rows(store, outbox)
    assert (part["state"], part["ended_at"], part["first_attempt_at"]) == ("pending", None, None)
    (lane,) = await rows(store, lanes)
    assert (lane["key"], lane["send_ready_at"], lane["ready_at"]) == (LANE, NOON, None)


async def test_only_what_is_dead_is_retried_or_dropped(store):
    await receive(store, "answered", "open")
    await end(store, await begin(store))
    await put_part(store, 4)
    ids = ["in-1", "in-2", "in-99", "out-4", "out-99"]
    for function in (removing.retry_dead, removing.drop_dead):
        assert await store.run(partial(function, ids=ids)) == []
    assert await states(store) == {"answered": "answered", "open": "open"}
    assert (await rows(store, outbox))[0]["state"] == "sent"


@pytest.mark.parametrize("function", [removing.retry_dead, removing.drop_dead])
async def test_an_id_that_is_none_finds_nothing(store, function):
    await dead(store, "m1")
    await put_part(store, 1, state="dead")
    ids = ["", "7", "1", "in-", "in-x", "out-1x", "on-1", "in--1", "IN-1", "in-99999999999999999999"]
    assert await store.run(partial(function, ids=ids)) == []
    assert sorted(await letters(store)) == ["in-1", "out-1"]


async def test_dead_letters_that_are_dropped_are_gone_and_counted(store):
    await dead(store, "m1", "m2")
    await put_part(store, 4, state="expired")
    assert await store.run(partial(removing.drop_dead, ids=["in-1", "out-4"])) == ["in-1", "out-4"]
    assert await letters(store) == ["in-2"]
    assert await ends(store) == {"dead": 2, "removed": 1}


# ------------------------------------------------------------------------------------------- the whole job


async def test_a_cleanup_removes_what_is_idle_and_what_has_ended(store, clock):
    await put_conversations(store, [31, 31, 29])
    await receive(store, "m1", lane="user:elsewhere", state=End.IGNORED.value)
    await put_part(store, 1)
    for fire_time in (NOON, NOON + 200 * DAY):
        await store.run(lambda tx, f=fire_time: jobs.claim(tx, "backup", f, "h|1|1#t", host="h"))
    clock.now_ms += 3 * DAY
    told = []
    result = await cleanup(store, Retention(33), progress=lambda what, done: told.append((what, done)))
    assert result == CleanupResult(conversations=2, rows=6, ended=2, lanes=result.lanes)
    assert told[0] == ("conversations", 2)
    assert ("rows", 6) in told
    assert ("ended", 2) in told
    assert await ids(store, conversations) == [3]
    assert await count(store, lanes) == 0
    clock.now_ms += 100 * DAY
    again = await cleanup(store, Retention(None))
    assert again == CleanupResult(conversations=0, job_runs=1)
    assert await count(store, job_runs) == 1


async def test_a_cleanup_of_zero_days_keeps_conversations_for_ever(store):
    await put_conversations(store, [10_000])
    assert (await cleanup(store, Retention(None))).conversations == 0
    assert await ids(store, conversations) == [1]
    assert await cleanup(store, Retention(None), dry_run=True) == CleanupResult(0)


async def test_a_dry_run_counts_and_changes_nothing(store):
    await put_conversations(store, [31, 29])
    assert await cleanup(store, Retention(30), dry_run=True) == CleanupResult(conversations=1)
    assert (await rows(store, conversations))[0]["hidden_at"] is None


async def test_a_cleanup_of_more_than_a_piece_removes_everything(sqlite_url):
    async with opened(sqlite_url) as store:
        await put_conversations(store, [31] * (2 * removing.PIECE + 1), said=1)
        result = await cleanup(store, Retention(30))
        assert (result.conversations, result.rows) == (2 * removing.PIECE + 1, 2 * (2 * removing.PIECE + 1))
        assert await count(store, messages) == 0


async def test_a_start_finishes_what_a_cleanup_has_hidden(store):
    await put_conversations(store, [31, 29])
    await hide(store)
    assert await remove_hidden(store) == 3
    assert await remove_hidden(store) == 0
    assert await ids(store, conversations) == [2]
