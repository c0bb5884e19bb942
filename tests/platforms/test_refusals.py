"""Who refuses messages, or has removed the bot, is written to no more; questions are answered as ever."""

from __future__ import annotations

import pytest

from feishu_bot.model import ChatType
from feishu_bot.push import chat_target, person_target, push_rows
from feishu_bot.store import outbox as sending
from feishu_bot.store.schema import outbox
from feishu_bot.testing.feishu import make_event as feishu_event
from feishu_bot.testing.feishu import text_event
from feishu_bot.testing.qq import group_event, make_event, private_event
from tests.platforms.rooms import house


@pytest.fixture
def folder(tmp_path):
    return tmp_path


async def push(found, platform, target, text):
    """Send something that answers nobody, and return what became of it."""
    rows = push_rows(
        platform,
        found.app.platforms[platform],
        source=f"api:{text}",
        target=target,
        text=text,
        max_chars=1000,
    )
    await found.app.store.run(lambda tx: sending.push(tx, rows))
    found.app.delivery.nudge(rows[0]["lane_key"])
    await found.settled()
    return [(r.state, r.last_error) for r in await found.rows(outbox)][-1]


REFUSED = ("refused", "this chat takes nothing but answers any more")


@pytest.mark.parametrize(("no", "yes"), [("C2C_MSG_REJECT", "C2C_MSG_RECEIVE"), ("FRIEND_DEL", "FRIEND_ADD")])
async def test_a_person_who_refuses_on_qq_is_answered_and_never_written_to(folder, no, yes):
    async with house(folder) as found:
        fake = found.rooms["qq"].fake
        fake.proactive = True
        person = person_target("qq", "U1")
        assert (await push(found, "qq", person, "before"))[0] == "sent"
        await found.post("qq", make_event({"openid": "U1", "timestamp": 1767225600}, event_type=no))
        await found.settled()
        assert await push(found, "qq", person, "never") == REFUSED
        assert (await push(found, "qq", person_target("qq", "U2"), "another"))[0] == "sent"
        await found.post("qq", private_event("but I ask", user="U1"))
        await found.settled()
        await found.post("qq", make_event({"openid": "U1", "timestamp": 1767225599}, event_type=yes))  # older
        await found.settled()
        assert await push(found, "qq", person, "nor now") == REFUSED
        await found.post("qq", make_event({"openid": "U1", "timestamp": 1767225601}, event_type=yes))
        await found.settled()
        assert (await push(found, "qq", person, "again"))[0] == "sent"
        assert fake.texts("U1") == ["before", "on but I ask", "again"]


@pytest.mark.parametrize("no", ["GROUP_MSG_REJECT", "GROUP_DEL_ROBOT"])
async def test_a_group_that_refuses_on_qq_is_answered_and_never_written_to(folder, no):
    async with house(folder) as found:
        fake = found.rooms["qq"].fake
        fake.proactive = True
        gone = {"group_openid": "G1", "op_member_openid": "M", "timestamp": 1767225600}
        await found.post("qq", make_event(gone, event_type=no))
        await found.settled()
        assert await push(found, "qq", chat_target("G1"), "never") == REFUSED
        await found.post("qq", group_event("hello", group="G1"))
        await found.settled()
        assert fake.texts() == ["on hello"]
        assert await found.ends() == [("ignored", "event"), ("answered", None)]


async def test_a_group_that_the_bot_was_removed_from_on_feishu_is_not_written_to_until_it_is_added_again(
    folder,
):
    async with house(folder) as found:
        fake, group = found.rooms["feishu"].fake, chat_target("oc_g", ChatType.GROUP)
        for n, (event_type, text) in enumerate(
            [("deleted", "never"), ("added", "welcome"), ("deleted", "nor now"), ("added", "again")]
        ):
            event = feishu_event(
                {"chat_id": "oc_g", "operator_id": {"open_id": "ou_a"}},
                event_type=f"im.chat.member.bot.{event_type}_v1",
                create_time_ms=1767225600000 + n,
            )
            await found.post("feishu", event)
            await found.settled()
            state = await push(found, "feishu", group, text)
            assert state == REFUSED if event_type == "deleted" else state[0] == "sent"
        await found.post("feishu", text_event("hi", message_id="om_1"))
        await found.settled()
        assert fake.texts() == ["welcome", "again", "on hi"]
