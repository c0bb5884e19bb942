"""What QQ shows while an answer is being made, pressed buttons and media: through a running server."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import pairwise
from typing import Any

import orjson
import pytest

from feishu_bot.errors import RetryLater
from feishu_bot.model import ChatType, Outgoing, Target
from feishu_bot.store.schema import inbox, outbox
from feishu_bot.testing.model import Behaviour
from feishu_bot.testing.qq import (
    FakeQQ,
    button_event,
    channel_event,
    full_group_event,
    group_event,
    private_event,
)
from feishu_bot.testing.serving import Failure
from tests.platforms.rooms import house, until
from tests.platforms.test_qq_send import connected

WORDS = " ".join(f"word{n}" for n in range(40))  # 35 pieces of eight characters
SLOWLY = Behaviour(text=WORDS, chunk_delay_s=0.05)


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def qq_of(found: Any, *, streaming: bool = True) -> Any:
    """Return the fake; answers are shown as soon as there is something."""
    found.app.pipeline.indicator.waiting.limit_s = 0.0
    fake = found.rooms["qq"].fake
    fake.streaming = streaming
    return fake


# ------------------------------------------------------------------------------------------------ streaming


async def test_a_private_answer_appears_while_it_is_written_and_is_one_message(folder):
    async with house(folder) as found:
        fake = qq_of(found)
        found.model.script(SLOWLY)
        await found.post("qq", private_event("tell me", message_id="m1"))
        await until(lambda: fake.frames, "the first frame")
        (shown,) = fake.texts()
        assert WORDS.startswith(shown)
        assert shown != WORDS
        await found.settled()
        states, texts = zip(*fake.frames, strict=True)
        assert states == (1,) * (len(states) - 1) + (10,)
        assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
        assert fake.texts() == [WORDS]
        (part,) = await found.rows(outbox)
        assert (part.state, part.sent_id) == ("sent", fake.visible[0].message_id)
        assert await found.said() == ["tell me", WORDS]
        assert not fake.typing


@pytest.mark.parametrize("make", [group_event, channel_event])
async def test_in_groups_and_guilds_nothing_is_shown_before_the_answer(folder, make):
    async with house(folder) as found:
        fake = qq_of(found)
        found.model.script(SLOWLY)
        await found.post("qq", make("tell me"))
        await found.settled()
        assert (list(fake.frames), list(fake.typing)) == ([], [])
        assert [m.msg_seq for m in fake.visible] == [1]


async def test_a_quick_answer_is_not_streamed(folder):
    async with house(folder) as found:
        found.rooms["qq"].fake.streaming = True
        await found.post("qq", private_event("quick"))
        await found.settled()
        assert not found.rooms["qq"].fake.frames
        assert found.rooms["qq"].texts() == ["on quick"]


async def test_of_a_long_answer_the_first_part_is_what_was_being_written_and_the_others_follow(folder):
    async with house(folder, chat={"language": "en", "max_message_length": 150}) as found:
        fake = qq_of(found)
        found.model.script(SLOWLY)
        await found.post("qq", private_event("tell me", message_id="m1"))
        await found.settled()
        texts = fake.texts()
        assert len(texts) > 1
        assert " ".join(texts).split() == WORDS.split()
        assert [m.msg_seq for m in fake.visible] == [491, *range(2, len(texts) + 1)]
        assert [r.state for r in await found.rows(outbox)] == ["sent"] * len(texts)


async def test_the_last_frame_that_is_refused_becomes_a_message_of_its_own(folder):
    async with house(folder) as found:
        fake = qq_of(found)
        found.model.script(SLOWLY)
        await found.post("qq", private_event("tell me"))
        await until(lambda: fake.frames, "the first frame")
        fake._streams.clear()  # as if the platform had closed it
        await found.settled()
        assert fake.texts()[1:] == [WORDS]


@pytest.mark.parametrize(("drop", "texts"), [("before", ["whole"]), ("after", ["whole", "whole"])])
async def test_of_a_last_frame_that_nobody_answered_the_words_are_never_lost(drop, texts):
    async with FakeQQ(streaming=True) as fake, connected(fake) as platform:
        target = Target(ChatType.PRIVATE, sender_id="USER", reply_to="m1")
        await platform.show_text(target, "who")
        fake.fail(Failure(drop=drop))
        answer = Outgoing("qq", "in:1", "answer", 0, target, "whole")
        with pytest.raises(RetryLater) as lost:
            await platform.send(answer)
        assert lost.value.outcome_unknown
        sent_id = await platform.send(replace(answer, attempts=2))
        assert sent_id.removeprefix("REFIDX_") == fake.visible[-1].message_id
        assert fake.texts() == texts


async def test_the_note_before_the_window_closes_does_not_end_what_is_being_written():
    async with FakeQQ(streaming=True) as fake, connected(fake) as platform:
        target = Target(ChatType.PRIVATE, sender_id="USER", reply_to="m1")
        await platform.show_text(target, "who")
        await platform.send(Outgoing("qq", "in:1", "wait", 0, target, "soon"))
        await platform.send(Outgoing("qq", "in:1", "answer", 0, target, "whole <@all>"))
        assert fake.texts() == ["whole <\uff20all>", "soon"]


async def test_a_first_frame_without_an_answer_is_not_gone_on_with():
    async with FakeQQ(streaming=True) as fake, connected(fake) as platform:
        target = Target(ChatType.PRIVATE, sender_id="USER", reply_to="m1")
        fake.fail(Failure(drop="before"))
        with pytest.raises(RetryLater):
            await platform.show_text(target, "who")
        await platform.show_text(target, "whol")
        await platform.send(Outgoing("qq", "in:1", "answer", 0, target, "whole"))
        assert (fake.texts(), list(fake.frames)) == (["whole"], [])


async def test_an_answer_that_fails_ends_with_the_sentence_in_its_place(folder):
    async with house(folder, chat={"error_message": "It failed."}, ai={"max_calls": 1}) as found:
        fake = qq_of(found)
        found.model.script(
            Behaviour(kind="error_event", text=WORDS, chunk_delay_s=0.1), Behaviour(kind="filtered")
        )
        await found.post("qq", private_event("tell me"))
        await found.settled()
        assert fake.frames[0][0] == 1
        assert fake.texts() == ["It failed."]


async def test_where_it_is_not_granted_answers_come_whole_and_it_is_not_asked_for_for_ever(folder):
    async with house(folder) as found:
        fake = qq_of(found, streaming=False)
        for n in range(5):
            found.model.script(SLOWLY)
            await found.post("qq", private_event(f"tell me {n}"))
            await found.settled()
        assert fake.texts() == [WORDS] * 5
        assert sum(path.endswith("stream_messages") for _, path in fake.requests) == 3
        assert len(fake.typing) == 2  # which takes its place


async def test_an_address_that_is_not_registered_ends_the_stream_and_the_answer_comes_without_dots(folder):
    async with house(folder) as found:
        fake = qq_of(found)
        found.model.script(Behaviour(text="see example.com " + WORDS, chunk_delay_s=0.05))
        await found.post("qq", private_event("where?"))
        await found.settled()
        assert fake.texts()[-1] == f"see example\u3002com {WORDS}"


async def test_while_a_plugin_has_the_last_word_on_answers_nobody_sees_them_before(folder):
    (folder / "censor.py").write_text("async def on_answer(context, answer):\n    return 'censored'\n")
    plugins = {"directory": str(folder), "enabled": ["censor"]}
    async with house(folder, plugins=plugins) as found:
        fake = qq_of(found)
        found.model.script(SLOWLY)
        await found.post("qq", private_event("tell me"))
        await found.settled()
        assert (fake.texts(), list(fake.frames)) == (["censored"], [])


async def test_a_message_that_cannot_be_streamed_to_any_more_is_answered_all_the_same(folder):
    async with house(folder) as found:
        fake = qq_of(found)
        fake.know_message("old", found.app.store.now_ms() / 1000 - 400)
        found.model.script(SLOWLY)
        await found.post("qq", private_event("tell me", message_id="old"))
        await found.settled()
        assert (fake.texts(), list(fake.frames)) == ([WORDS], [])


# -------------------------------------------------------------------------------------------------- quotes


def quoting(text, index, words, **more):
    elements = [{"msg_idx": index, "message_type": 0, "content": words}]
    scene = {"source": "default", "ext": [f"ref_msg_idx={index}", "msg_idx=REFIDX_own"]}
    return {"message_type": 103, "message_scene": scene, "msg_elements": elements, **more}, text


async def test_the_words_quoted_stand_before_the_question_once_and_are_not_stored(folder):
    async with house(folder) as found:
        await found.post("qq", private_event("first"))
        await found.settled()
        index = f"REFIDX_{found.rooms['qq'].fake.visible[0].message_id}"
        assert await found.sent_ids() == [index]
        more, text = quoting("why?", index, "on first, as QQ shows it")
        await found.post("qq", private_event(text, **more))
        await found.settled()
        assert found.asked()[-1][-1] == "> on first\n\nwhy?"
        more, text = quoting("and this?", "REFIDX_unknown", "somebody's words")
        await found.post("qq", private_event(text, **more))
        await found.settled()
        assert found.asked()[-1][-1] == "> somebody's words\n\nand this?"
        more, _ = quoting("", "REFIDX_other", "only this")
        await found.post("qq", private_event("", **more))
        await found.settled()
        assert found.asked()[-1][-1] == "only this"
        assert [t for t in await found.said() if not t.startswith("on ")] == [
            "first", "why?", "and this?", "only this",
        ]  # fmt: skip


async def test_a_group_message_that_quotes_the_bot_is_meant_for_it_and_any_other_leaves_no_words(folder):
    async with house(folder) as found:
        await found.post("qq", group_event("first"))
        await found.settled()
        (index,) = await found.sent_ids()
        more, text = quoting("and then?", index, "on first")
        await found.post("qq", full_group_event(text, **more))
        await found.settled()
        assert found.asked()[-1][-1] == "> on first\n\nand then?"
        more, text = quoting("not for you", "REFIDX_x", "secret words")
        await found.post("qq", full_group_event(text, **more))
        await found.settled()
        assert (await found.ends())[-1] == ("ignored", "not addressed")
        kept = str(await found.rows_of_all())
        assert "secret words" not in kept
        assert "not for you" not in kept


# ------------------------------------------------------------------------------------------------- typing


async def test_typing_is_shown_once_in_private_and_leaves_replies_for_answer_and_note(folder):
    long = "\n\n".join(f"Paragraph {n} " + "words " * 60 for n in range(80))
    async with house(folder, ai={"max_output_tokens": 100_000}) as found:
        fake = qq_of(found, streaming=False)
        found.app.platforms["qq"]._streams._left = 0
        found.model.script(Behaviour(kind="hang"))
        await found.post("qq", private_event("tell me", message_id="m1"))
        await until(lambda: list(fake.typing) == [("E4F4AEA33253A2797FB897C50B81D7ED", "m1")], "typing")
        (row,) = await found.rows(inbox)
        found.model.script(Behaviour(text=long, delay_s=0.2))
        found.app.worker.drop(row.lane_key, row.id)  # the second attempt shows it again, and is folded
        await found.settled()
        assert len(fake.typing) == 1
        assert len(fake.texts()) == 3
        assert len(fake._seqs["m1"]) == 4  # of five; the note before the window closes is the last
        assert {r.state for r in await found.rows(outbox)} == {"sent"}


async def test_typing_that_is_refused_is_nobodys_concern_and_not_asked_for_again(folder):
    async with house(folder) as found:
        fake = qq_of(found)
        found.app.platforms["qq"]._streams._left = 0
        fake.fail(Failure(status=400, code=11253))
        for n in range(2):
            found.model.script(Behaviour(delay_s=0.2))
            await found.post("qq", private_event(f"tell me {n}"))
            await found.settled()
        assert fake.texts() == ["on tell me 0", "on tell me 1"]
        assert not fake.typing


# ------------------------------------------------------------------------------------------ buttons, media

PLUGIN = """
from feishu_bot.errors import Undeliverable


async def on_event(context):
    user = context.message.sender_id
    found = await context.bot.call("qq", f"POST /v2/users/{user}/files", file_type=1, url="https://x.test/a.png")
    body = {"msg_type": 7, "content": " ", "media": {"file_info": found["file_info"]}}
    body["event_id"] = context.message.extra["event_id"]
    try:
        await context.bot.call(context.message, f"POST /v2/users/{user}/messages", **body)
    except Undeliverable as refused:
        print(refused.reason)


async def on_message(context):
    target = f"/v2/groups/{context.message.chat_id}"
    found = await context.bot.call(context.message, f"POST {target}/files", file_type=1, file_data="aGk=")
    media = {"msg_type": 7, "content": " ", "media": {"file_info": found["file_info"]}}
    media |= {"msg_id": context.message.message_id, "msg_seq": 450}
    await context.bot.call_later(context.message, f"POST {target}/messages", **media)
    return "here it is"
"""


async def test_a_pressed_button_is_confirmed_once_it_is_on_record_whether_a_plugin_wants_it_or_not(folder):
    async with house(folder) as found:
        fake = found.rooms["qq"].fake
        event = button_event("approve:42")
        fake.fail(Failure(status=503))
        found.app.platforms["qq"]._sleep = _no_sleep
        await found.post("qq", event)
        await until(lambda: fake.confirmed == {event["d"]["id"]: 0}, "the confirmation")
        assert await found.ends() == [("ignored", "event")]
        await found.post("qq", event)
        await until(lambda: sum(m == "PUT" for m, _ in fake.requests) == 3, "the repeat's confirmation")
        assert len(await found.rows(inbox)) == 1


async def test_a_button_that_cannot_be_confirmed_is_given_up_after_some_seconds(folder):
    async with house(folder) as found:
        fake = found.rooms["qq"].fake
        found.app.platforms["qq"]._sleep = _no_sleep
        fake.fail(Failure(status=400, code=10001), times=10)
        await found.post("qq", button_event("x"))
        await until(lambda: not found.app.platforms["qq"]._confirming, "the end")
        assert sum(m == "PUT" for m, _ in fake.requests) == 4
        assert not fake.confirmed


async def _no_sleep(_: float) -> None:
    await asyncio.sleep(0)


async def test_a_plugin_answers_with_media_by_calls_of_the_platforms_own(folder):
    (folder / "media.py").write_text(PLUGIN)
    async with house(folder, plugins={"directory": str(folder), "enabled": ["media"]}) as found:
        fake = found.rooms["qq"].fake
        await found.post("qq", group_event("a picture, please", message_id="m1"))
        await found.settled()
        assert [m.msg_type for m in sorted(fake.visible, key=lambda m: m.msg_type)] == [0, 7]
        (media,) = [m for m in fake.visible if m.msg_type == 7]
        assert fake.uploaded[media.body["media"]["file_info"]][1]["file_data"] == "aGk="
        assert (media.msg_id, media.msg_seq) == ("m1", 450)
        fake.proactive = True
        await found.post("qq", button_event("more"))
        await until(lambda: sum(m.msg_type == 7 for m in fake.visible) == 2, "the second picture")
        assert fake.visible[-1].body["event_id"].startswith("INTERACTION_CREATE:")


async def test_a_plugins_call_of_the_wrong_form_is_never_made(folder):
    async with house(folder) as found:
        for action in ("send_message", "POST https://evil.test/", "GET //evil.test/", "TRACE /", "GET /a b"):
            for account in ("qq", "feishu"):
                with pytest.raises(Exception, match="METHOD"):
                    await found.app.platforms[account].call(action, {})
        assert not [p for _, p in found.rooms["qq"].fake.requests if "evil" in p]


async def test_a_plugins_call_on_feishu_returns_its_data(folder):
    async with house(folder) as found:
        card = {"msg_type": "interactive", "content": orjson.dumps({"elements": []}).decode(), "uuid": "u"}
        sent = await found.app.platforms["feishu"].call(
            "POST /open-apis/im/v1/messages?receive_id_type=chat_id", {"receive_id": "oc_team", **card}
        )
        assert sent["message_id"] == found.rooms["feishu"].fake.visible[0].message_id
