"""Pictures and files of users, on their way to a model: through a running server, from the platforms' own servers."""

from __future__ import annotations

import base64
from typing import Any

import orjson
import pytest

from feishu_bot.config import BudgetSettings
from feishu_bot.store.schema import budget_windows, inbox, messages, reservations, usage
from feishu_bot.testing.feishu import make_event, mention, message_event
from feishu_bot.testing.model import Behaviour
from feishu_bot.testing.onebot import Failure as OneBotFailure
from feishu_bot.testing.qq import group_event, private_event
from feishu_bot.testing.serving import Failure
from tests.ai.pictures import png
from tests.platforms.rooms import house, until

PICTURE = png(300, 200)  # a tile: 255 tokens
READ_TEXT_ONLY = "Sorry, I can only read text. Please write your question; /help lists what I can do."
LOST = "Sorry, I could not load your picture or file. Please send it again, or describe it in words."


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def parts_of(found: Any, call: int = -1) -> list[Any]:
    """Return what the model was told last: the texts, and the pictures as bytes."""
    content = found.model.requests[call].body["messages"][-1]["content"]
    if isinstance(content, str):
        return [content]
    return [
        part["text"]
        if part["type"] == "text"
        else base64.b64decode(part["image_url"]["url"].partition(",")[2])
        for part in content
    ]


async def send_picture(found: Any, platform: str, data: bytes = PICTURE, *, words: str = "") -> None:
    """Have somebody send a picture in a private chat, with ``words`` or without."""
    fake = found.rooms[platform].fake
    if platform == "feishu":
        content: dict[str, Any] = {"image_key": "img_1"}
        kind = "image"
        if words:
            kind = "post"
            elements = [[{"tag": "text", "text": words}], [{"tag": "img", "image_key": "img_1"}]]
            content = {"title": "", "content": elements}
        event = message_event(content, message_type=kind, message_id="om_picture", open_id="ou_ann")
        fake.resources["om_picture", "img_1"] = data
    elif platform == "onebot":
        event = fake.make([{"type": "text", "data": {"text": words}}, fake.attach(data)])
    else:
        event = private_event(words or " ", attachments=[fake.attach(data)])
    await found.post(platform, event)
    await found.settled()


@pytest.mark.parametrize("words", ["", "what is it?"])
@pytest.mark.parametrize("platform", ["feishu", "qq", "onebot"])
async def test_a_model_that_takes_pictures_is_shown_what_a_user_sends(folder, platform, words):
    async with house(folder) as found:
        await send_picture(found, platform, words=words)
        assert parts_of(found) == ([words] if words else []) + [PICTURE]
        assert found.rooms[platform].texts() == [f"on {words}"]
        (row,) = await found.rows(inbox)
        assert row.state == "answered"


@pytest.mark.parametrize("platform", ["feishu", "qq"])
async def test_the_record_keeps_a_placeholder_and_what_it_was_never_the_picture(folder, platform):
    async with house(folder) as found:
        await send_picture(found, platform, words="look")
        question, _ = await found.rows(messages)
        assert question.content == "look\n[image]"
        note = {"kind": "image"} | ({"name": "a.png"} if platform == "qq" else {})
        assert orjson.loads(question.metadata_json) == {"attachments": [note]}
        encoded = base64.b64encode(PICTURE).decode()[:40]
        assert not any(encoded in str(row) for row in await found.rows_of_all())
        fake = found.rooms[platform].fake
        await found.post(
            platform,
            message_event({"text": "and now?"}, open_id="ou_ann")
            if platform == "feishu"
            else private_event("and now?"),
        )
        await found.settled()
        assert found.asked()[-1] == ["look\n[image]", "on look", "and now?"]
        assert sum("/resources/" in path or "/download/" in path for _, path in fake.requests) == 1


@pytest.mark.parametrize("platform", ["feishu", "qq", "onebot"])
@pytest.mark.parametrize("ai", [{"images": False}, {"model": "openai:gpt-3.5-turbo"}, {"model": "echo"}])
async def test_for_a_model_that_takes_none_a_picture_is_one_sentence_as_ever(folder, platform, ai):
    async with house(folder, ai=ai) as found:
        if platform == "onebot":
            event = found.rooms[platform].event("", "77", chat=None)
            event["message"] = [{"type": "image", "data": {"file": "a.jpg", "url": "https://192.0.2.1/a"}}]
            await found.post(platform, event)
            await found.settled()
        else:
            await send_picture(found, platform)
        assert found.rooms[platform].texts() == [READ_TEXT_ONLY]
        assert await found.ends() == [("refused", "cannot read: image")]
        assert not found.model.requests
        calls = [path for name in ("feishu", "qq") for _, path in found.rooms[name].fake.requests]
        assert not [path for path in calls if "/resources/" in path or "/download/" in path]


async def test_a_picture_in_a_group_is_shown_where_the_bot_is_mentioned_with_it(folder):
    async with house(folder) as found:
        fake = found.rooms["feishu"].fake
        fake.know_message("om_post", "oc_team")
        fake.resources["om_post", "img_1"] = PICTURE
        at = [{"tag": "at", "user_id": "@_user_1"}, {"tag": "text", "text": " this?"}]
        post = {"title": "", "content": [at, [{"tag": "img", "image_key": "img_1"}]]}
        named = [{**mention("ou_fake_bot", bot=True), "key": "@_user_1"}]
        for mentions in ([], named):
            event = message_event(
                post,
                message_type="post",
                chat_type="group",
                message_id="om_post" if mentions else "om_other",
                mentions=mentions,
            )
            await found.post("feishu", event)
            await found.settled()
        assert [parts_of(found, n) for n in range(found.model.count)] == [["this?", PICTURE]]
        qq = found.rooms["qq"].fake
        await found.post("qq", group_event("and this?", attachments=[qq.attach(PICTURE)]))
        await found.settled()
        assert parts_of(found) == ["and this?", PICTURE]


async def test_a_picture_that_a_question_quotes_is_shown_with_it(folder):
    async with house(folder) as found:
        picture = found.rooms["qq"].fake.attach(PICTURE)
        quote = {"message_type": 103, "msg_elements": [{"msg_idx": "REFIDX_1", "attachments": [picture]}]}
        await found.post("qq", group_event("what is it?", **quote))
        await found.settled()
        assert parts_of(found) == ["what is it?", PICTURE]


async def test_of_many_pictures_the_first_four_are_shown(folder):
    async with house(folder) as found:
        fake = found.rooms["qq"].fake
        album = [fake.attach(png(10, n)) for n in range(1, 7)]
        await found.post("qq", private_event("album", attachments=album))
        await found.settled()
        assert parts_of(found)[1:] == [png(10, n) for n in range(1, 5)]


async def test_a_text_file_is_read_to_the_model_and_kept_by_its_name(folder):
    async with house(folder) as found:
        fake = found.rooms["feishu"].fake
        fake.resources["om_file", "file_1"] = "姓名,分数\n张三,90\n".encode("gb18030")
        content = {"file_key": "file_1", "file_name": "成绩.csv"}
        await found.post("feishu", message_event(content, message_type="file", message_id="om_file"))
        await found.settled()
        assert parts_of(found) == ["成绩.csv:\n姓名,分数\n张三,90\n"]
        assert (await found.said())[0] == "[file: 成绩.csv]"
        qq = found.rooms["qq"].fake
        note = qq.attach("注意".encode(), "file", "note.md")
        await found.post("qq", private_event("sum it up", attachments=[note]))
        await found.settled()
        assert parts_of(found) == ["sum it up\n\nnote.md:\n注意"]


async def test_a_file_that_is_no_text_is_one_sentence(folder):
    async with house(folder) as found:
        content = {"file_key": "file_1", "file_name": "report.pdf"}
        await found.post("feishu", message_event(content, message_type="file", message_id="om_file"))
        await found.settled()
        found.rooms["feishu"].fake.resources["om_text", "file_1"] = b"a\0b"
        content["file_name"] = "not-text.txt"
        await found.post("feishu", message_event(content, message_type="file", message_id="om_text"))
        await found.settled()
        assert found.rooms["feishu"].texts() == [READ_TEXT_ONLY, LOST]
        assert not found.model.requests


async def test_a_file_that_is_longer_than_a_question_may_be_is_refused_with_both_numbers(folder):
    async with house(folder, chat={"max_input_tokens": 50}) as found:
        qq = found.rooms["qq"].fake
        await found.post(
            "qq", private_event("x", attachments=[qq.attach(b"word " * 300, "file", "long.txt")])
        )
        await found.settled()
        (said,) = found.rooms["qq"].texts()
        assert said.startswith("Your message has 30")
        assert "the limit is 50" in said
        assert (await found.ends(), await found.rows(reservations)) == ([("refused", "too long")], [])
        assert not found.model.requests


# ------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    "failure",
    [
        Failure(status=400, code=234003),
        Failure(status=200, code=234043),
        Failure(raw=b"<html>no picture</html>"),
        Failure(raw=PICTURE[:20]),
        Failure(raw=b"\x89PNG" + b"x" * 9_000_000),
        Failure(status=400, code=99991672),
    ],
)
async def test_a_picture_that_cannot_be_had_is_told_and_costs_nothing(folder, failure):
    async with house(folder, budgets=[BudgetSettings(name="day", limit_tokens=50_000)]) as found:
        found.rooms["feishu"].fake.fail(failure, on="resources")
        await send_picture(found, "feishu", words="look")
        assert found.rooms["feishu"].texts() == [LOST]
        ((end, reason),) = await found.ends()
        assert end == "refused"
        assert reason.startswith("not loaded: image")
        assert not found.model.requests
        assert (await found.rows(reservations), await found.said()) == ([], [])
        assert [(w.used, w.reserved) for w in await found.rows(budget_windows)] == [(0, 0)]


async def test_what_fails_for_the_moment_is_fetched_again_also_with_a_new_token(folder):
    async with house(folder) as found:
        found.app.pipeline._attachments._sleep = _no_sleep
        fake = found.rooms["feishu"].fake
        fake.fail(Failure(status=502, raw=b"<html>"), on="resources")
        fake.fail(Failure(status=400, code=99991663), on="resources")
        await send_picture(found, "feishu")
        assert parts_of(found) == [PICTURE]


async def _no_sleep(_: float) -> None:
    pass


@pytest.mark.parametrize(
    "url",
    [
        "http://multimedia.nt.qq.com.cn/a.png",
        "https://127.0.0.1:1/a.png",
        "https://localhost/a.png",
        "https://[::1]/a.png",
        "https://[::ffff:10.0.0.1]/a.png",
        "https://2130706433/a.png",
        "https://169.254.169.254/latest/meta-data",
        "https://user:word@127.0.0.1/a.png",
        "file:///etc/passwd",
        "https://",
    ],
)
async def test_an_address_in_our_own_network_is_never_fetched(folder, url):
    async with house(folder) as found:
        found.app.pipeline._attachments._sleep = _no_sleep
        picture = {"content_type": "image/png", "url": url, "filename": "a.png"}
        await found.post("qq", private_event("look", attachments=[picture]))
        await found.settled()
        assert found.rooms["qq"].texts() == [LOST]


# -------------------------------------------------------------------------------------------------- OneBot


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "data": {"text": words}}


@pytest.mark.parametrize("where", ["http://{api}/send_private_msg?user_id=1&message=x", "https://127.0.0.1:1/a.png",
                                   "https://10.0.0.1/a", "http://localhost/a", "https://[::1", "http://"])  # fmt: skip
async def test_a_picture_at_a_private_address_is_asked_of_the_client_and_nobody_calls_there(folder, where):
    async with house(folder) as found:
        fake = found.rooms["onebot"].fake
        url = where.format(api=fake.url.removeprefix("http://"))
        picture = fake.attach(PICTURE, url=url)
        await found.post("onebot", fake.make([text("look"), picture]))
        await found.settled()
        assert parts_of(found) == ["look", PICTURE]
        assert [action for _, action, _ in fake.calls] == ["get_msg", "get_image", "send_private_msg"]


@pytest.mark.parametrize(
    "answer",
    [
        {"file": "/etc/passwd"},
        {"file": "file:///etc/passwd", "url": "file:///etc/passwd"},
        {"file": "", "url": "https://127.0.0.1:1/a.png"},
        {"base64": "no base64!"},
        {"base64": ["x"], "url": 7},
        {"base64": "AAAA" * 3_000_000},
        [],
    ],
    ids=["path", "file", "private", "broken", "of other types", "too large", "nothing"],
)
async def test_what_the_client_cannot_give_is_told_and_no_path_is_read(folder, answer):
    async with house(folder) as found:
        found.app.pipeline._attachments._sleep = _no_sleep
        fake = found.rooms["onebot"].fake
        await found.post("onebot", fake.make([text("look"), fake.attach(answer)]))
        await found.settled()
        assert fake.texts() == [LOST]
        assert not found.model.requests


@pytest.mark.parametrize("group", [None, 30003])
async def test_a_file_of_a_onebot_chat_is_read_to_the_model(folder, group):
    async with house(folder) as found:
        fake = found.rooms["onebot"].fake
        note = fake.attach("注意".encode(), "file", "note.md")
        await found.post("onebot", fake.make([text("sum it up"), note], group_id=group, at=group is not None))
        await found.settled()
        assert parts_of(found) == ["sum it up\n\nnote.md:\n注意"]
        first = "get_private_file_url" if group is None else "get_group_file_url"
        assert [action for _, action, _ in fake.calls][:2] == [first, "get_file"]


async def test_a_client_that_is_away_for_a_moment_is_asked_again(folder):
    async with house(folder) as found:
        found.app.pipeline._attachments._sleep = _no_sleep
        fake = found.rooms["onebot"].fake
        fake.fail(OneBotFailure(words="timeout"), on="get_image")
        await send_picture(found, "onebot", words="look")
        assert parts_of(found) == ["look", PICTURE]


# -------------------------------------------------------------------------------------------------- budgets


async def test_a_picture_is_reserved_for_as_the_largest_there_is_and_booked_as_it_was(folder):
    async with house(folder, budgets=[BudgetSettings(name="day", limit_tokens=50_000)]) as found:
        found.model.script(Behaviour(kind="hang"), Behaviour(usage=False))
        fake = found.rooms["qq"].fake
        await found.post("qq", private_event(" ", attachments=[fake.attach(PICTURE)]))
        await found.model.asked.wait()
        (held,) = await found.rows(reservations)
        assert held.tokens - held.input_tokens == 1024
        assert held.input_tokens == 3 + 2 * 4 + 6 + 1445  # framing, system prompt, the largest picture
        (row,) = await found.rows(inbox)
        found.app.worker.drop(row.lane_key, row.id)
        await found.settled()
        first, second = await found.rows(usage)
        assert (first.outcome, first.input_tokens + first.output_tokens) == ("unknown", held.tokens)
        assert (second.outcome, second.input_tokens) == ("ok", held.input_tokens - 1445 + 255)
        (window,) = await found.rows(budget_windows)
        assert (window.used, window.reserved) == (held.tokens + second.input_tokens + second.output_tokens, 0)


async def test_a_picture_that_the_budget_does_not_hold_is_neither_fetched_nor_asked_about(folder):
    async with house(folder, budgets=[BudgetSettings(name="day", limit_tokens=2_000)]) as found:
        await send_picture(found, "feishu")
        assert found.rooms["feishu"].texts()[0].startswith("Not enough of your budget is left")
        assert not found.model.requests
        assert not [path for _, path in found.rooms["feishu"].fake.requests if "resources" in path]


async def test_while_a_picture_comes_slowly_nothing_else_waits_and_a_recall_ends_it(folder):
    async with house(folder) as found:
        fake = found.rooms["feishu"].fake
        fake.fail(Failure(delay_s=600), on="resources")
        fake.resources["om_slow", "img_1"] = PICTURE
        event = message_event(
            {"image_key": "img_1"}, message_type="image", message_id="om_slow", open_id="ou_bob"
        )
        await found.post("feishu", event)
        await until(lambda: any("/resources/" in path for _, path in fake.requests), "the call")
        await found.say("feishu", "quick", chat=None)
        await until(lambda: fake.texts() == ["on quick"], "somebody else's answer")
        gone = make_event(
            {"message_id": "om_slow", "chat_id": "oc_fake_p2p"}, event_type="im.message.recalled_v1"
        )
        await found.post("feishu", gone)
        await found.settled()
        assert ("ignored", "recalled") in await found.ends()
        assert fake.texts() == ["on quick"]
