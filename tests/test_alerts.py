"""Alerts: what is told, to whom, and how often."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson
import pytest
from aiohttp import web
from sqlalchemy import insert

from feishu_bot.alerts import EVERY_MS, Alerts, Local
from feishu_bot.config import AlertSettings, BotSettings, BudgetSettings, ChatSettings
from feishu_bot.platforms.base import PlatformContext
from feishu_bot.platforms.feishu import Feishu, FeishuSettings
from feishu_bot.store import schema
from feishu_bot.store.leases import Depth
from tests.stores import HOUR, Clock, opened, put, put_conversations, rows

if TYPE_CHECKING:
    from collections.abc import Sequence

HOOK = "/open-apis/bot/v2/hook/token"
BUDGETS = (
    BudgetSettings(name="daily", limit_tokens=1000),
    BudgetSettings(name="ever", window="total", limit_tokens=10),
)


class World:
    """What a process knows without the database, as the test sets it."""

    def __init__(self) -> None:
        self.depth: Depth | None = None
        self.free: float | None = None
        self.backups: list[str] = []
        self.paused = False
        self.lanes: list[str] = []

    @property
    def local(self) -> Local:
        return Local(
            depth=lambda: self.depth,
            free_mb=lambda: self.free,
            backup_problems=lambda: self.backups,
            is_paused=lambda: self.paused,
        )


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def store(db_url, clock):
    async with opened(db_url, clock) as made:
        yield made


@pytest.fixture
def world() -> World:
    return World()


def alerts_of(
    store, world: World, *settings: AlertSettings, budgets: Sequence[BudgetSettings] = ()
) -> Alerts:
    account = FeishuSettings(type="feishu", enabled=True, app_id="a", app_secret="s", encrypt_key="k")
    whole = BotSettings(
        chat=ChatSettings(language="en"),
        alerts=settings,
        budgets=tuple(budgets),
        platforms={"feishu": account},
    )
    platforms = {"feishu": Feishu("feishu", account, PlatformContext())}
    return Alerts(whole, store, platforms, local=world.local, sent=world.lanes.append, host="bot-1")


def to_chat(*kinds: str, **more: Any) -> AlertSettings:
    return AlertSettings(to="feishu", chat="oc_ops", **({"on": kinds} if kinds else {}), **more)


async def told(store) -> list[str]:
    """Return the texts in the outbox, in their order."""
    return [
        orjson.loads(row["payload"])["text"]
        for row in await rows(store, schema.outbox)
        if row["kind"] == "push"
    ]


async def put_dead(store, clock: Clock, key: str) -> None:
    event = {
        "account": "feishu",
        "event_key": key,
        "lane_key": "l",
        "payload": "{}",
        "received_at": clock.now_ms,
    }
    await put(store, schema.inbox, {**event, "state": "dead", "reason": "r", "ended_at": clock.now_ms})


async def test_nothing_is_told_while_nothing_is_wrong(store, world):
    await alerts_of(store, world, to_chat(tokens=1, conversations=1), budgets=BUDGETS).look()
    assert await told(store) == []


async def test_dead_letters_are_told_through_the_outbox_at_most_once_an_hour_over_all_processes(
    store, world, clock
):
    processes = [alerts_of(store, world, to_chat()) for _ in range(3)]
    await put_dead(store, clock, "one")
    for process in processes:
        await process.look()
    sentence = "[bot-1] In the last hour 1 message(s) and 0 part(s) of replies were given up. bot.py dead list says why."
    assert await told(store) == [sentence]
    assert world.lanes == ["push:feishu:oc_ops"]
    clock.now_ms += EVERY_MS - 1
    await put_dead(store, clock, "two")
    await processes[1].look()
    assert len(await told(store)) == 1
    clock.now_ms += 1
    await processes[1].look()
    assert len(await told(store)) == 2
    clock.now_ms += 2 * HOUR
    await processes[1].look()
    assert len(await told(store)) == 2, "nothing has died since"


async def test_each_receiver_and_each_kind_has_an_hour_of_its_own(store, world, clock):
    others = AlertSettings(to="feishu", chat="oc_others", on=("dead", "disk"))
    alerts = alerts_of(store, world, to_chat("dead"), others)
    await put_dead(store, clock, "one")
    await alerts.look()
    assert len(await told(store)) == 2
    world.free = 10.0
    await alerts.look()
    assert (await told(store))[2:] == ["[bot-1] 10 MB of disk are left (at least 200); nothing new is taken."]


async def test_a_budget_near_its_end_is_told_once_in_its_window(store, world, clock):
    alerts = alerts_of(store, world, to_chat("budget"), budgets=BUDGETS)
    day = int(clock.utc().replace(hour=16, minute=0).timestamp() * 1000) - 24 * HOUR  # midnight in Shanghai
    window = {"budget": "daily", "window_start": day, "reserved": 0}
    await put(
        store,
        schema.budget_windows,
        {**window, "key": "web:ann", "used": 799},
        {**window, "key": "web:bob", "used": 800},
    )
    await alerts.look()
    assert await told(store) == ["[bot-1] Budgets nearly used up:\ndaily web:bob: 800/1000"]
    clock.now_ms += EVERY_MS
    await alerts.look()
    assert len(await told(store)) == 1, "told of already"
    ever = {"budget": "ever", "window_start": 0, "reserved": 0, "key": "web:ann", "used": 11}
    await put(store, schema.budget_windows, ever)
    await alerts.look()
    assert (await told(store))[
        1
    ] == "[bot-1] Budgets nearly used up:\ndaily web:bob: 800/1000\never web:ann: 11/10"
    clock.now_ms += 24 * HOUR
    await alerts.look()
    assert len(await told(store)) == 2, "the old day is over"


async def test_messages_that_wait_too_long_are_told_unless_a_pause_is_why(store, world, clock):
    alerts = alerts_of(store, world, to_chat("queue"))
    world.depth = Depth(3, clock.now_ms - 300_000, 0, None)
    await alerts.look()
    assert await told(store) == [], "not longer than server.max_waiting_age_s"
    world.depth = Depth(3, clock.now_ms - 301_000, 0, None)
    world.paused = True
    await alerts.look()
    assert await told(store) == []
    world.paused = False
    await alerts.look()
    assert await told(store) == ["[bot-1] 3 message(s) wait, the oldest for 301 s."]


async def test_a_failed_backup_is_told_and_so_is_one_that_is_too_old(store, world, clock):
    alerts = alerts_of(store, world, to_chat("backup"))
    run = {"job": "backup", "node": "h|1|2#x", "started_at": clock.now_ms, "finished_at": clock.now_ms}
    await put(store, schema.job_runs, {**run, "fire_time": 1, "error": None})
    await alerts.look()
    assert await told(store) == []
    await put(store, schema.job_runs, {**run, "fire_time": 2, "error": "StoreUnavailable: no space"})
    world.backups = ["the last good backup is 3 days old"]
    await alerts.look()
    assert await told(store) == [
        "[bot-1] Backups: the last good backup is 3 days old; StoreUnavailable: no space"
    ]


async def test_more_tokens_or_conversations_than_named_are_told(store, world, clock):
    alerts = alerts_of(store, world, to_chat("tokens", "conversations", tokens=100, conversations=2))
    call = {"attempt": 1, "call": 0, "platform": "web", "model": "m", "outcome": "ok", "at": clock.utc()}
    await put(store, schema.usage, {**call, "inbox_id": 1, "input_tokens": 60, "output_tokens": 40})
    await put_conversations(store, [0, 0])
    await alerts.look()
    assert await told(store) == []
    await put(store, schema.usage, {**call, "inbox_id": 2, "input_tokens": 1, "output_tokens": 0})
    await store.run(
        lambda tx: tx.connection.execute(insert(schema.conversations), [_conversation(clock)]) and None
    )
    await alerts.look()
    assert await told(store) == [
        "[bot-1] 101 tokens were used today, more than 100.",
        "[bot-1] There are 3 conversations, more than 2.",
    ]


def _conversation(clock: Clock) -> dict[str, Any]:
    instants = {"created_at": clock.utc(), "last_activity": clock.utc()}
    return {"id": 9, "public_id": "p9", "user_key": "web:private:x", "platform": "web", **instants}


# ----------------------------------------------------------------------------------------- the custom bot


@pytest.fixture
async def hook():
    """A custom bot's address that keeps the texts, and can be told to refuse."""
    texts: list[str] = []
    codes: list[int] = []

    async def take(request: web.Request) -> web.Response:
        code = codes.pop(0) if codes else 0
        if code == 0:
            texts.append(orjson.loads(await request.read())["content"]["text"])
        return web.json_response({"code": code, "msg": "frequency limited"})

    application = web.Application()
    application.router.add_post(HOOK, take)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{site.port}{HOOK}", texts, codes
    await runner.cleanup()


async def test_a_custom_bot_is_told_directly_and_again_if_it_did_not_take_it(store, world, hook):
    url, texts, codes = hook
    alerts = alerts_of(store, world, AlertSettings(to=url, secret="hush"))
    world.free = 1.0
    codes.append(11232)
    await alerts.look()
    assert texts == []
    await alerts.look()
    await alerts.look()
    assert texts == ["[bot-1] 1 MB of disk are left (at least 200); nothing new is taken."]
    assert await told(store) == []
    await alerts.stop()


async def test_a_budget_warning_that_did_not_arrive_is_given_again(store, world, hook):
    url, texts, codes = hook
    alerts = alerts_of(store, world, AlertSettings(to=url, on=("budget",)), budgets=BUDGETS)
    used_up = {"budget": "ever", "window_start": 0, "reserved": 0, "key": "web:ann", "used": 10}
    await put(store, schema.budget_windows, used_up)
    codes.append(19024)
    await alerts.look()
    await alerts.look()
    assert texts == ["[bot-1] Budgets nearly used up:\never web:ann: 10/10"]
    await alerts.stop()


async def test_after_a_reload_others_are_told(store, world, clock):
    alerts = alerts_of(store, world)
    await put_dead(store, clock, "one")
    await alerts.look()
    assert await told(store) == []
    alerts.configure(alerts_of(store, world, to_chat("dead"))._settings)
    await alerts.look()
    assert len(await told(store)) == 1
