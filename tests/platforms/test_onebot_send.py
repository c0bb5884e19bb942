from __future__ import annotations

import asyncio
import logging
import time
from contextlib import asynccontextmanager

import orjson
import pytest

from feishu_bot.errors import RetryLater, Undeliverable
from feishu_bot.model import ChatType, Target
from feishu_bot.platforms.onebot import MAX_REPEATS
from feishu_bot.platforms.onebot_api import Answer
from feishu_bot.testing.onebot import Failure, FakeOneBot
from tests.platforms.onebots import TOKEN, VECTORS, doors, group, onebot, part, private, until

HOSTILE = "[CQ:at,qq=all] [CQ:record,file=file:///etc/passwd] &#91;CQ:at,qq=all&#93; a,b"


@asynccontextmanager
async def by_http(**keys):
    """An account whose only way out is the HTTP API."""
    async with FakeOneBot(access_token=TOKEN, no_history=keys.pop("no_history", False)) as fake:
        platform = onebot(**{"api_url": fake.url, **keys})
        await platform.start()
        yield fake, platform
        await platform.stop()


@asynccontextmanager
async def by_socket(**keys):
    """An account whose only way out is a WebSocket through the server's real door."""
    async with (
        FakeOneBot(access_token=TOKEN, no_history=keys.pop("no_history", False)) as fake,
        doors(onebot(**keys)) as server,
    ):
        link = await fake.connect(server.ws)
        await until(lambda: server.platform.problems() == [])
        fake.server = server
        fake.link = link
        yield fake, server.platform


@pytest.fixture(params=[by_http, by_socket], ids=["http", "ws"])
def way(request):
    return request.param


def now_ms() -> int:
    return int(time.time() * 1000)


# -------------------------------------------------------------------------------------------------- routes


async def test_an_answer_in_a_group_quotes_the_question_and_its_id_comes_back(way):
    async with way() as (fake, platform):
        sent_id = await platform.send(part())
        (message,) = fake.visible
        assert sent_id == str(message.message_id)
        assert (message.chat, message.text, message.quotes) == ("group:30003", "hello", "7")


async def test_only_the_first_part_quotes_and_none_in_private(way):
    async with way() as (fake, platform):
        await platform.send(part(number=1))
        await platform.send(part(target=private(reply_to="7")))
        assert [(m.chat, m.quotes) for m in fake.visible] == [("group:30003", ""), ("private:20002", "")]


async def test_an_answer_to_a_temporary_conversation_names_its_group(way):
    async with way() as (fake, platform):
        await platform.send(part(target=private(extra={"self_id": "10001", "group_id": "30003"})))
        _, action, params = fake.calls[-1]
        assert (action, params["user_id"], params["group_id"]) == ("send_private_msg", 20002, 30003)


async def test_no_text_of_a_model_ever_becomes_a_code(way):
    async with way() as (fake, platform):
        await platform.send(part(HOSTILE))
        (message,) = fake.visible
        assert message.text == HOSTILE
        assert [s["type"] for s in message.segments] == ["reply", "text"]


async def test_a_text_that_no_json_holds_is_sent_all_the_same(way):
    async with way() as (fake, platform):
        await platform.send(part("a\ud800b"))
        assert fake.texts() == ["a?b"]


async def test_a_message_to_nobody_is_undeliverable(way):
    async with way() as (_, platform):
        for target in (Target(ChatType.PRIVATE), Target(ChatType.GROUP)):
            with pytest.raises(Undeliverable):
                await platform.send(part(target=target))


async def test_a_target_that_names_no_bot_is_reached_by_the_one_there_is(way):
    async with way() as (fake, platform):
        await platform.send(part(target=group(extra={}, reply_to=None)))
        assert fake.texts() == ["hello"]


async def test_ids_that_are_words_are_sent_as_words(way):
    async with way() as (fake, platform):
        fake.fail(Failure(words="x"))
        with pytest.raises(Undeliverable):
            await platform.send(part(target=private(sender_id="abc")))
        assert fake.calls[-1][2]["user_id"] == "abc"


async def test_the_http_api_is_asked_with_the_current_token():
    async with by_http(access_token=[TOKEN, "old"]) as (fake, platform):
        await platform.send(part())
        assert fake.texts() == ["hello"]
    async with by_http(access_token=["new", TOKEN]) as (fake, platform):
        with pytest.raises(RetryLater, match="access_token") as caught:
            await platform.send(part())
        assert not caught.value.outcome_unknown


async def test_the_recorded_call_is_what_is_sent():
    expected = VECTORS["api"]["http_request"]["body"]
    async with by_http() as (fake, platform):
        await platform.send(part(" 好的", target=group(reply_to="1540837554")))
        _, action, params = fake.calls[-1]
        assert action == "send_group_msg"
        assert params["group_id"] == expected["group_id"]
        assert params["message"] == [s for s in expected["message"] if s["type"] != "at"]


# ------------------------------------------------------------------------------------------------- answers


ANSWERS = {
    "http_response_ok": None,
    "http_response_failed_napcat": "unknown",
    "http_response_validation_napcat": "never",
    "http_response_unknown_action_napcat": "never",
    "http_response_unknown_action_gocqhttp": "never",
    "http_response_failed_retcode_zero_lagrange": "never",
    "http_response_bad_token_napcat": "later",
}


@pytest.mark.parametrize("name", ANSWERS)
async def test_every_recorded_answer_of_the_http_api_is_understood(name):
    answer = VECTORS["api"][name]
    async with by_http() as (fake, platform):
        fake.fail(Failure(http_status=answer["status"], raw=orjson.dumps(answer["body"])), times=2)
        assert await fate(platform.send(part())) == ANSWERS[name]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ws_response_ok", None),
        ("ws_response_async", None),
        ("ws_response_unknown_action_napcat", "never"),
        ("ws_response_bad_json_napcat", "never"),
    ],
)
def test_every_recorded_answer_of_a_socket_is_understood(name, expected):
    answer = Answer.read(VECTORS["api"][name])
    assert (None if answer.ok else kind_of(answer.error())) == expected


async def fate(sending) -> str | None:
    try:
        await sending
    except (RetryLater, Undeliverable) as error:
        return kind_of(error)
    return None


def kind_of(error) -> str:
    if isinstance(error, Undeliverable):
        return "never"
    return "unknown" if error.outcome_unknown else "later"


@pytest.mark.parametrize(
    ("retcode", "words", "expected"),
    [
        (1200, "Timeout: NTEvent serviceAndMethod:NodeIKernelMsgService/sendMsg", "unknown"),
        (200, "发送超时", "unknown"),
        (1200, "消息发送失败 result: 120", "never"),
        (1200, "", "never"),
        (100, "SEND_MSG_API_ERROR 请参考 go-cqhttp 端输出", "never"),
        (-1, "", "never"),
        (1403, "token验证失败", "later"),
        (1200, "bot is offline", "later"),
        (1200, "账号未登录", "later"),
        (1200, "发送过于频繁", "later"),
        (429, "", "later"),
    ],
)
async def test_a_failure_is_for_later_for_ever_or_leaves_the_outcome_open(way, retcode, words, expected):
    async with way() as (fake, platform):
        fake.fail(Failure(retcode=retcode, words=words), times=2)
        assert await fate(platform.send(part())) == expected


@pytest.mark.parametrize(
    ("status", "raw", "expected"),
    [
        (200, b"<html>", "unknown"),
        (404, b"not found", "later"),
        (405, b"", "later"),
        (400, b"", "never"),
        (413, b"", "never"),
        (502, b"bad gateway", "unknown"),
        (503, b"", "later"),
        (200, b"[]", "unknown"),
        (200, b'{"status": ["ok"], "retcode": {}}', "unknown"),
    ],
)
async def test_what_is_no_answer_of_the_api_is_taken_with_care(status, raw, expected):
    async with by_http() as (fake, platform):
        fake.fail(Failure(http_status=status, raw=raw), times=2)
        assert await fate(platform.send(part())) == expected


async def test_where_the_question_cannot_be_quoted_any_more_the_answer_goes_without(way):
    async with way() as (fake, platform):
        fake.fail(Failure(retcode=1200, words="消息不存在"))
        await platform.send(part())
        assert [(m.text, m.quotes) for m in fake.visible] == [("hello", "")]


async def test_no_secret_stands_in_an_error_or_a_log(way, caplog):
    caplog.set_level(logging.DEBUG)
    async with way() as (fake, platform):
        fake.fail(Failure(words=f"token {TOKEN} is bad"), times=2)
        with pytest.raises(Undeliverable) as caught:
            await platform.send(part())
        assert TOKEN not in str(caught.value)
        assert "***" in str(caught.value)
    ours = [r for r in caplog.records if r.name.startswith("feishu_bot")]
    assert not any(TOKEN in str(vars(r)) for r in ours)


# --------------------------------------------------------------------------------------------------- ways


async def test_without_any_way_out_a_part_waits():
    platform = onebot()
    with pytest.raises(RetryLater) as caught:
        await platform.send(part())
    assert not caught.value.outcome_unknown
    assert caught.value.after_s == pytest.approx(0.05)
    assert platform.problems() == ["onebot: no OneBot client is connected"]


async def test_with_an_api_that_does_not_run_a_part_waits_and_the_operator_is_told():
    platform = onebot(api_url="http://127.0.0.1:9")
    with pytest.raises(RetryLater) as caught:
        await platform.send(part())
    assert not caught.value.outcome_unknown
    assert "api_url" in platform.problems()[0]
    await platform.stop()


async def test_an_open_socket_is_preferred_and_the_http_api_serves_while_there_is_none():
    async with FakeOneBot(access_token=TOKEN) as fake, doors(onebot(api_url=fake.url)) as server:
        await server.platform.send(part("one"))
        link = await fake.connect(server.ws)
        await server.platform.send(part("two"))
        link.drop()
        await until(lambda: not list(server.platform._peers))
        await server.platform.send(part("three"))
        assert [(m.text, m.by) for m in fake.visible] == [("one", "http"), ("two", "ws"), ("three", "http")]


async def test_each_of_several_bots_speaks_for_itself():
    ids = ["10001", "10002"]
    async with (
        FakeOneBot(access_token=TOKEN) as one,
        FakeOneBot(access_token=TOKEN, self_id=10002) as two,
        doors(onebot(self_ids=ids, api_url=one.url)) as server,
    ):
        await two.connect(server.ws)
        await server.platform.send(part("by one", target=group()))
        await server.platform.send(part("by two", target=group(extra={"self_id": "10002"})))
        assert (one.texts(), two.texts()) == (["by one"], ["by two"])
        two.links[0].drop()
        await until(lambda: not list(server.platform._peers))
        with pytest.raises(RetryLater, match="10002"):
            await server.platform.send(part("by two", target=group(extra={"self_id": "10002"})))
        assert one.texts() == ["by one"]


# ------------------------------------------------------------------------------------------------ unknown


UNKNOWN = [
    pytest.param(Failure(words="Timeout: sendMsg", sent=True), id="says timeout, sent"),
    pytest.param(Failure(silent=True, sent=True), id="silent, sent"),
    pytest.param(Failure(drop=True, sent=True), id="dropped, sent"),
]


async def attempt(platform, fake, outgoing, failure):
    """Make an attempt whose outcome stays unknown; return the part as it is tried again."""
    fake.fail(failure)
    since = now_ms()
    with pytest.raises(RetryLater) as caught:
        await platform.send(outgoing)
    assert caught.value.outcome_unknown
    if fake.url != platform.settings.api_url and not fake.links:
        await fake.connect(fake.server.ws)
    return part(
        outgoing.text, target=outgoing.target, number=outgoing.part, attempts=2, unknown_since_ms=since
    )


def waiting(failure):
    return {"waits": {"call_timeout_s": 0.2}} if failure.silent else {}


@pytest.mark.parametrize("failure", UNKNOWN)
@pytest.mark.parametrize("target", [group(), private(reply_to="7")], ids=["group", "private"])
async def test_a_message_that_was_sent_though_nobody_said_so_is_found_and_not_repeated(way, failure, target):
    async with way(**waiting(failure)) as (fake, platform):
        fake.make("question", message_id=7, group_id=30003 if target.chat_id else None)
        again = await attempt(platform, fake, part(target=target), failure)
        await until(lambda: fake.visible)
        assert await platform.send(again) == str(fake.visible[0].message_id)
        assert fake.texts() == ["hello"]


@pytest.mark.parametrize("failure", [Failure(words="Timeout"), Failure(silent=True), Failure(drop=True)])
async def test_a_message_that_was_certainly_not_sent_is_sent_again(way, failure):
    async with way(**waiting(failure)) as (fake, platform):
        fake.make("question", message_id=7, group_id=30003)
        again = await attempt(platform, fake, part(), failure)
        assert await platform.send(again) == str(fake.visible[0].message_id)
        assert fake.texts() == ["hello"]


async def test_where_the_history_cannot_be_asked_nothing_is_repeated(way):
    async with way(no_history=True) as (fake, platform):
        again = await attempt(platform, fake, part(), Failure(words="Timeout"))
        with pytest.raises(Undeliverable, match="outcome unknown"):
            await platform.send(again)
        assert fake.texts() == []


async def test_where_the_history_does_not_reach_back_nothing_is_repeated(way):
    async with way() as (fake, platform):
        again = await attempt(platform, fake, part(), Failure(words="Timeout"))
        for noise in range(120):
            fake.make(f"noise {noise}", group_id=30003)
        with pytest.raises(Undeliverable, match="outcome unknown"):
            await platform.send(again)
        assert fake.texts() == []


async def test_a_history_of_nothing_proves_nothing(way):
    async with way() as (fake, platform):
        again = await attempt(platform, fake, part(), Failure(words="Timeout"))
        with pytest.raises(Undeliverable, match="outcome unknown"):
            await platform.send(again)


async def test_an_equal_answer_to_another_question_is_not_taken_for_this_one(way):
    async with way() as (fake, platform):
        fake.make("question", message_id=7, group_id=30003)
        fake.make("other question", message_id=8, group_id=30003)
        other = [{"type": "reply", "data": {"id": "8"}}, {"type": "text", "data": {"text": "hello"}}]
        fake.make(
            other, group_id=30003, user_id=10001
        )  # before this process, so it does not know whose it is
        again = await attempt(platform, fake, part(), Failure(words="Timeout"))
        await platform.send(again)
        assert [m.quotes for m in fake.visible] == ["7"]


async def test_an_equal_part_that_is_known_to_be_another_is_not_taken_for_this_one(way):
    async with way() as (fake, platform):
        fake.make("question", message_id=7)
        await platform.send(part(target=private(reply_to="7")))
        again = await attempt(
            platform, fake, part(target=private(reply_to="7"), number=1), Failure(words="Timeout")
        )
        await platform.send(again)
        assert fake.texts() == ["hello", "hello"]


async def test_what_somebody_else_says_or_the_bot_said_long_ago_is_not_this_part(way):
    async with way() as (fake, platform):
        fake.make("question", message_id=7, group_id=30003)
        fake.make("hello", group_id=30003)
        fake.make("hello", group_id=30003, user_id=10001, at_time=int(time.time()) - 3600)
        again = await attempt(platform, fake, part(), Failure(words="Timeout"))
        await platform.send(again)
        assert fake.texts() == ["hello"]


async def test_a_part_whose_outcome_stays_unknown_is_repeated_a_few_times_and_then_given_up(way):
    async with way() as (fake, platform):
        fake.make("question", message_id=7, group_id=30003)
        again = await attempt(platform, fake, part(), Failure(words="Timeout"))
        for _ in range(MAX_REPEATS):
            again = await attempt(platform, fake, again, Failure(words="Timeout"))
        with pytest.raises(Undeliverable, match="outcome unknown"):
            await platform.send(again)
        sends = [action for _, action, _ in fake.calls if action == "send_group_msg"]
        assert len(sends) == 1 + MAX_REPEATS


async def test_while_nobody_can_be_asked_the_outcome_stays_unknown_and_nothing_is_sent():
    platform = onebot()
    again = part(attempts=2, unknown_since_ms=now_ms())
    with pytest.raises(RetryLater) as caught:
        await platform.send(again)
    assert caught.value.outcome_unknown


async def test_a_question_about_the_history_that_has_no_answer_leaves_the_outcome_open(way):
    async with way() as (fake, platform):
        fake.make("question", message_id=7, group_id=30003)
        again = await attempt(platform, fake, part(), Failure(words="Timeout", sent=True))
        fake.fail(Failure(words="Timeout"), on="get_group_msg_history")
        assert await fate(platform.send(again)) == "unknown"
        await platform.send(again)
        assert fake.texts() == ["hello"]


# ------------------------------------------------------------------------------------------------- sockets


async def test_calls_beside_each_other_get_their_own_answers():
    async with by_socket() as (fake, platform):
        fake.fail(Failure(delay_s=0.05))
        ids = await asyncio.gather(*(platform.send(part(f"text {n}", number=n)) for n in range(20)))
        told = {str(m.message_id): m.text for m in fake.visible}
        assert [told[i] for i in ids] == [f"text {n}" for n in range(20)]


async def test_answers_nobody_waits_for_are_dropped_and_none_counts_for_a_call_of_another_socket():
    async with by_socket(self_ids=["10001", "10002"]) as (fake, platform):
        fake.fail(Failure(silent=True))
        sending = asyncio.ensure_future(platform.send(part()))
        await until(lambda: fake.calls)
        async with FakeOneBot(access_token=TOKEN, self_id=10002) as other:
            link = await other.connect(fake.server.ws)
            (echo,) = next(iter(platform._peers))._waiting
            forged = {"status": "ok", "retcode": 0, "data": {"message_id": 666}, "echo": echo}
            await link.push(forged)
            for strange in (
                {},
                {"echo": None},
                {"echo": [1]},
                {"status": "ok"},
                {"echo": "x:1", "status": {}},
                b"[]",
                b"nonsense",
            ):
                await fake.link.push(strange if isinstance(strange, bytes) else orjson.dumps(strange))
            await platform.call("get_login_info", {}, self_id="10002")
            assert not sending.done()
            await fake.link.push({**forged, "data": {"message_id": 7}})
            assert await sending == "7"


async def test_a_call_under_way_ends_unknown_when_its_socket_is_replaced():
    async with by_socket() as (fake, platform):
        fake.fail(Failure(silent=True))
        sending = asyncio.ensure_future(platform.send(part()))
        await until(lambda: fake.calls)
        await fake.connect(fake.server.ws)
        assert await fate(sending) == "unknown"


async def test_a_slow_answer_is_waited_for_while_events_come_in():
    async with by_socket() as (fake, platform):
        fake.fail(Failure(delay_s=0.2))
        sending = asyncio.ensure_future(platform.send(part()))
        await until(lambda: fake.calls)
        await fake.say("meanwhile")
        await until(lambda: fake.server.record.texts == ["meanwhile"])
        assert not sending.done()
        assert await sending is not None
