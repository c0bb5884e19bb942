"""What becomes of messages on the platforms, and what is pressed there, as events: normalised, and seen by plugins."""

from __future__ import annotations

import pytest
from multidict import CIMultiDict
from sqlalchemy import update

from feishu_bot.model import ChatType, InboundMessage
from feishu_bot.platforms.base import PlatformContext, WebhookRequest
from feishu_bot.platforms.feishu import Feishu
from feishu_bot.platforms.onebot import OneBot
from feishu_bot.platforms.qq import QQ
from feishu_bot.store.schema import inbox, outbox
from feishu_bot.testing.feishu import make_event
from feishu_bot.testing.model import Behaviour
from feishu_bot.testing.qq import group_event
from feishu_bot.testing.qq import make_event as qq_event
from tests.platforms.rooms import FeishuRoom, OneBotRoom, QQRoom, Room, accounts, house, until

ROOMS: dict[str, tuple[type[Room], type]] = {
    "feishu": (FeishuRoom, Feishu),
    "qq": (QQRoom, QQ),
    "onebot": (OneBotRoom, OneBot),
}


class Unused:
    """Stands for a platform's server that is not called."""

    url = token_url = "http://127.0.0.1:9"

    def know_message(self, message_id: str, chat_id: str) -> None:
        pass


def platform_of(name: str, *, require_at: bool = True):
    rooms = {n: room(Unused()) for n, (room, _) in ROOMS.items()}
    settings = accounts(rooms)[name]
    context = PlatformContext(require_at_in_groups=require_at)
    return rooms[name], ROOMS[name][1](name, settings, context)


def received(name: str, make, **more) -> InboundMessage:
    room, platform = platform_of(name, **more)
    headers, body = room.prove(make(room))
    (message,) = platform.receive(WebhookRequest("POST", CIMultiDict(headers), {}, body, 0.0)).messages
    return message


# ------------------------------------------------------------------------------------------------ recalled


@pytest.mark.parametrize("name", ROOMS)
def test_a_recall_names_the_message_as_it_was_named_when_it_came(name):
    said = received(name, lambda room: room.event("hello", "77"))
    gone = received(name, lambda room: room.recall("77"))
    assert (gone.kind, gone.change, gone.text) == ("event", "recalled", "")
    assert (gone.message_id, gone.target_key) == (said.message_id, said.event_key)
    assert gone.chat_id == said.chat_id
    assert gone.event_key != said.event_key


def test_a_recall_in_a_private_chat_of_onebot_names_the_message_too():
    said = received("onebot", lambda room: room.event("hello", "77", chat=None))
    gone = received(
        "onebot",
        lambda room: {
            "time": 1, "self_id": 10001, "post_type": "notice", "notice_type": "friend_recall", "user_id": 20000,
            "message_id": 77,
        },
    )  # fmt: skip
    assert (gone.target_key, gone.user_key) == (said.event_key, said.user_key)


def test_a_recall_in_a_direct_chat_of_a_guild_is_told_with_the_chat():
    message = {"id": "77", "guild_id": "g100", "channel_id": "9", "author": {"id": "100"}}
    gone = received("qq", lambda _: qq_event({"message": message}, event_type="DIRECT_MESSAGE_DELETE"))
    said = received("qq", lambda room: room.event("hello", "77", chat=None))
    assert (gone.chat_type, gone.chat_id) == (ChatType.PRIVATE, said.chat_id) == (said.chat_type, "g100")


@pytest.mark.parametrize("event_type", ["im.message.recalled_v1", "im.message.reaction.created_v1"])
def test_what_names_no_message_or_is_no_recall_changes_nothing(event_type):
    event = {} if "recalled" in event_type else {"message_id": "om_1"}
    found = received("feishu", lambda _: make_event(event, event_type=event_type))
    assert (found.change, found.target_key) == (None, None)


# ------------------------------------------------------------------------------------------------- replies


@pytest.mark.parametrize("name", ROOMS)
def test_the_words_of_what_is_not_for_the_bot_are_kept_only_where_it_replies_to_something(name):
    plain = received(name, lambda room: room.event("words", "77", at=False))
    assert (plain.addressed, plain.text, plain.reply_to) == (False, "", None)
    reply = received(name, lambda room: room.event("words", "78", at=False, reply_to="76"))
    assert (reply.addressed, reply.text, reply.reply_to) == (False, "words", "76")


# ------------------------------------------------------------------------------------------------- pressed

CARD = {
    "operator": {"open_id": "ou_ann"},
    "token": "c-295ee57216a5",
    "action": {
        "value": {"action": "approve", "id": "42"},
        "tag": "button",
        "name": "ok",
        "form_value": {"Input_1": "hello"},
    },
    "context": {"open_message_id": "om_card", "open_chat_id": "oc_team"},
}

PLUGIN = """
from pathlib import Path

import orjson


async def on_event(context):
    m = context.message
    line = orjson.dumps([m.event_type, m.chat_id, m.sender_id, m.message_id, m.extra])
    with Path(context.bot.settings["file"]).open("ab") as file:
        file.write(line + b"\\n")
"""


def test_a_pressed_button_says_what_it_stands_for():
    event = received("feishu", lambda _: make_event(CARD, event_type="card.action.trigger"))
    assert event.extra["value"] == {"action": "approve", "id": "42"}
    assert event.extra["form_value"] == {"Input_1": "hello"}
    assert event.extra["token"] == "c-295ee57216a5"
    assert (event.chat_id, event.sender_id, event.message_id) == ("oc_team", "ou_ann", "om_card")


def test_what_a_button_says_is_kept_up_to_a_sensible_size():
    big = {**CARD, "action": {"value": "x" * 100_000, "tag": "button"}}
    event = received("feishu", lambda _: make_event(big, event_type="card.action.trigger"))
    assert set(event.extra) == {"token", "tag"}


async def test_a_plugin_is_told_of_a_pressed_button_and_the_record_keeps_nothing_of_it(tmp_path):
    (tmp_path / "pressed.py").write_text(PLUGIN)
    told = tmp_path / "told"
    plugins = {
        "directory": str(tmp_path),
        "enabled": ["pressed"],
        "settings": {"pressed": {"file": str(told)}},
    }
    async with house(tmp_path, plugins=plugins) as found:
        await found.post("feishu", make_event(CARD, event_type="card.action.trigger"))
        await found.settled()
        assert await found.ends() == [("ignored", "event")]
        assert not any("approve" in str(row) for row in await found.rows_of_all())
    assert '"card.action.trigger","oc_team","ou_ann","om_card"' in told.read_text()
    assert '"value":{"action":"approve","id":"42"}' in told.read_text()


# ------------------------------------------------------------------------------------- typing, and windows


async def test_while_a_model_thinks_the_question_has_a_reaction_and_afterwards_none(tmp_path):
    async with house(tmp_path) as found:
        fake = found.rooms["feishu"].fake
        found.app.pipeline.indicator.waiting.limit_s = 0.0
        found.model.script(Behaviour(kind="hang"))
        message_id = await found.say("feishu", "think")
        await until(lambda: list(fake.shown.values()) == [(message_id, "Typing")], "the reaction")
        (row,) = await found.rows(inbox)
        found.app.worker.drop(row.lane_key, row.id)  # the second attempt is answered at once
        await found.settled()
        await until(lambda: not fake.shown, "the end of the reaction")
        assert fake.texts() == ["on think"]


async def test_a_quick_answer_a_command_and_a_platform_without_reactions_show_none(tmp_path):
    async with house(tmp_path) as found:
        await found.ask("feishu", "quick")
        found.app.pipeline.indicator.waiting.limit_s = 0.0
        await found.ask("feishu", "/help")
        await found.ask("onebot", "slow")
        assert list(found.rooms["feishu"].fake.reactions) == []


async def test_who_waits_until_shortly_before_the_reply_window_closes_is_told_in_time(tmp_path):
    async with house(tmp_path) as found:
        found.model.script(Behaviour(kind="hang"))
        now = found.app.store.now_ms()
        await found.post("qq", group_event("slow", message_id="ROBOT1.0_a", at=now / 1000 - 275))
        await found.model.asked.wait()
        assert await found.app.closing.look() == 0, "it has come just now"
        earlier = update(inbox).values(received_at=now - 275_000)
        await found.app.store.run(lambda tx: tx.connection.execute(earlier) and None)
        assert await found.app.closing.look() == 1
        fake = found.rooms["qq"].fake
        await until(lambda: len(fake.visible) == 1, "the note")
        assert fake.texts()[0].startswith("Still working on your question.")
        assert await found.app.closing.look() == 0
        (row,) = await found.rows(inbox)
        found.app.worker.drop(row.lane_key, row.id)
        await found.settled()
        assert fake.texts()[1:] == ["on slow"]
        assert [(m.msg_id, m.msg_seq) for m in fake.visible] == [("ROBOT1.0_a", 401), ("ROBOT1.0_a", 1)]
        assert [(r.kind, r.state) for r in await found.rows(outbox)] == [("wait", "sent"), ("answer", "sent")]
