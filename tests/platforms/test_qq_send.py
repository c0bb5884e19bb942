from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feishu_bot.errors import DeliveryError, RetryLater, Undeliverable
from feishu_bot.model import ChatType, Outgoing, Target
from feishu_bot.platforms.base import PlatformContext
from feishu_bot.platforms.qq import QQ, QQSettings
from feishu_bot.platforms.qq_client import LINK_REFUSED, MARKDOWN_REFUSED
from feishu_bot.platforms.qq_content import inert, without_links
from feishu_bot.testing.qq import FakeQQ
from feishu_bot.testing.serving import Failure

SECRETS = ["app-secret-current", "app-secret-old"]


class Clock:
    """Seconds that pass only when told, and pauses that are taken at once."""

    def __init__(self) -> None:
        self.now = 1_000_000.0
        self.pauses: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


@asynccontextmanager
async def connected(fake: FakeQQ, *, clock: Clock | None = None, **keys: Any):
    clock = clock or Clock()
    chosen = QQSettings(
        **{
            "type": "qq",
            "app_id": "102000001",
            "app_secret": SECRETS,
            "base_url": fake.url,
            "token_url": fake.token_url,
            **keys,
        }
    )
    platform = QQ("qq", chosen, PlatformContext(), clock=clock, sleep=clock.sleep)
    try:
        yield platform
    finally:
        await platform.stop()


@pytest.fixture
async def fake():
    async with FakeQQ() as server:
        yield server


@pytest.fixture
async def platform(fake):
    async with connected(fake) as connection:
        yield connection


GROUP = Target(ChatType.GROUP, chat_id="GROUP", sender_id="MEMBER", reply_to="ROBOT1.0_question")


def part(text: str = "hello", *, target: Target = GROUP, number: int = 0, **options: Any) -> Outgoing:
    return Outgoing("qq", "in:7", options.pop("kind", "answer"), number, target, text, **options)


def calls(fake: FakeQQ) -> int:
    return sum(path.endswith("/messages") for _, path in fake.requests)


# -------------------------------------------------------------------------------------------------- routes


@pytest.mark.parametrize(
    ("target", "where", "chat"),
    [
        (GROUP, "v2/groups", "GROUP"),
        (Target(ChatType.PRIVATE, chat_id="USER", sender_id="USER", reply_to="m"), "v2/users", "USER"),
        (Target(ChatType.PRIVATE, sender_id="USER", reply_to="m"), "v2/users", "USER"),
        (Target(ChatType.CHANNEL, chat_id="1000", sender_id="12", reply_to="m"), "channels", "1000"),
        (
            Target(ChatType.PRIVATE, chat_id="1870", sender_id="12", reply_to="m", extra={"dms": True}),
            "dms",
            "1870",
        ),
    ],
)
async def test_an_answer_goes_to_where_the_question_came_from(fake, platform, target, where, chat):
    sent_id = await platform.send(part(target=target))
    (message,) = fake.visible
    assert (message.where, message.chat, message.msg_id) == (where, chat, target.reply_to)
    assert sent_id == ("REFIDX_" if where.startswith("v2/") else "") + message.message_id


async def test_a_strange_id_stays_inside_its_path(fake, platform):
    await platform.send(part(target=replace(GROUP, chat_id="a?b#c%d")))
    assert fake.visible[0].chat == "a?b#c%d"


async def test_a_message_to_nobody_is_undeliverable(fake, platform):
    for kind in (ChatType.PRIVATE, ChatType.GROUP, ChatType.CHANNEL):
        with pytest.raises(Undeliverable):
            await platform.send(part(target=Target(kind, reply_to="m")))
    assert not fake.requests


async def test_an_answer_without_a_message_to_reply_to_is_never_sent(fake, platform):
    fake.proactive = True
    with pytest.raises(Undeliverable):
        await platform.send(part(target=replace(GROUP, reply_to=None)))
    assert not fake.requests


async def test_what_an_operator_pushes_is_sent_where_the_platform_lets_him(fake, platform):
    push = part(target=replace(GROUP, reply_to=None), kind="push")
    with pytest.raises(Undeliverable, match="40034102") as refused:
        await platform.send(push)
    assert not refused.value.expired
    fake.proactive = True
    assert await platform.send(push)
    assert fake.visible[0].msg_id is None


# ---------------------------------------------------------------------------------------------- idempotency


async def test_the_parts_of_an_answer_are_numbered_from_one(fake, platform):
    for number in range(QQ.max_parts):
        await platform.send(part(f"part {number}", number=number))
    assert [m.msg_seq for m in fake.visible] == [1, 2, 3, 4]


async def test_a_whole_answer_leaves_room_for_a_note(fake, platform):
    for number in range(QQ.max_parts):
        await platform.send(part(number=number))
    assert await platform.send(part(kind="note"))
    with pytest.raises(RetryLater, match="22009") as refused:
        await platform.send(part(kind="error"))
    assert refused.value.chat_only


async def test_every_kind_and_part_and_form_has_a_number_of_its_own(fake, platform):
    sent = [(kind, n) for kind in ("answer", "note", "error", "card", "push", "other") for n in range(4)]
    numbers = set()
    for granted in (True, False):
        fake.markdown = granted
        for kind, number in sent:
            for text in ("plain", "**bold**", "**x.com**", "x.com"):
                fresh = replace(GROUP, reply_to=f"{kind}{number}{text}{granted}")
                platform._markdown = True
                await platform.send(part(text, target=fresh, kind=kind, number=number))
                numbers.add((fake.visible[-1].msg_seq, kind, number, fake.visible[-1].msg_type, text))
    assert (
        len({n[0] for n in numbers})
        == len({(n[1], n[2], n[3], "x.com" in n[4]) for n in numbers})
        == 6 * 4 * 4
    )
    assert max(n[0] for n in numbers) < 65536


async def test_an_attempt_whose_answer_was_lost_is_not_shown_again(fake, platform):
    fake.fail(Failure(drop="after"))
    with pytest.raises(RetryLater) as lost:
        await platform.send(part())
    assert lost.value.outcome_unknown
    assert await platform.send(part(attempts=2)) is None
    assert fake.texts() == ["hello"]
    assert fake.folded == 1


async def test_a_number_that_is_taken_at_the_first_attempt_is_no_success(fake, platform):
    await platform.send(part())
    with pytest.raises(Undeliverable, match="40054005"):
        await platform.send(part("something else"))


@pytest.mark.parametrize("text", ["**bold**", "see readme.md", "**readme.md**"])
async def test_a_fallback_whose_answer_was_lost_is_not_shown_again(fake, platform, text):
    await platform.send(part(text))
    platform._markdown = True  # as after a restart
    await platform.send(part(text, attempts=2))
    assert len(fake.visible) == 1


# -------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize(
    ("target", "window_s"),
    [(GROUP, 300), (Target(ChatType.PRIVATE, sender_id="USER", reply_to="ROBOT1.0_question"), 3600)],
)
async def test_an_answer_after_the_window_is_expired_and_nothing_else_is_tried(target, window_s):
    now = [0.0]
    async with FakeQQ(clock=lambda: now[0]) as fake, connected(fake) as platform:
        fake.know_message("ROBOT1.0_question", 0.0)
        now[0] = window_s
        assert await platform.send(part(target=target))
        now[0] = window_s + 1.0
        with pytest.raises(Undeliverable, match="304027") as refused:
            await platform.send(part(target=target, number=1))
        assert refused.value.expired
        assert calls(fake) == 2


async def test_a_group_that_takes_no_more_replies_is_an_expired_answer(fake, platform):
    fake.fail(Failure(status=400, code=40034102))
    with pytest.raises(Undeliverable) as refused:
        await platform.send(part())
    assert refused.value.expired


# ------------------------------------------------------------------------------------------ the retry table

LATER = [22009, 20028, 1100100, 1100308, 304082, 304083, 306003, 306005, 306006]
NEVER = [
    304026,
    304028,
    40034025,
    11253,
    11254,
    11264,
    11265,
    11282,
    50006,
    304057,
    304018,
    304031,
    304020,
]


async def failure_of(fake: FakeQQ, platform: QQ, failure: Failure, *, times: int = 1) -> DeliveryError:
    fake.fail(failure, times=times)
    with pytest.raises(DeliveryError) as raised:
        await platform.send(part())
    assert not fake.visible or failure.drop == "after"
    return raised.value


@pytest.mark.parametrize("status", [200, 400, 500])
@pytest.mark.parametrize("code", LATER)
async def test_a_code_that_passes_is_tried_later(fake, platform, code, status):
    error = await failure_of(fake, platform, Failure(status=status, code=code))
    assert isinstance(error, RetryLater)
    assert str(code) in error.reason
    assert not error.outcome_unknown


@pytest.mark.parametrize(
    ("code", "status"),
    [*((code, status) for code in NEVER for status in (200, 400, 401)), (424242, 200), (424242, 400)],
)
async def test_a_code_that_stays_is_undeliverable_with_its_number_and_words(fake, platform, code, status):
    error = await failure_of(fake, platform, Failure(status=status, code=code))
    assert isinstance(error, Undeliverable)
    assert not error.expired
    assert error.reason.startswith(f"{code} ")
    assert len(error.reason) > len(str(code)) + 5


@pytest.mark.parametrize("code", [11242, 11252, 11263, 11281])
async def test_a_call_that_may_be_repeated_once_is_repeated_once(fake, platform, code):
    fake.fail(Failure(status=500, code=code))
    assert await platform.send(part())
    fake.fail(Failure(status=500, code=code), times=5)
    with pytest.raises(Undeliverable, match=str(code)):
        await platform.send(part(number=1))
    assert calls(fake) == 4


@pytest.mark.parametrize("status", [201, 202])
@pytest.mark.parametrize("code", [304023, 304024])
async def test_a_message_in_audit_was_taken(fake, platform, status, code):
    fake.fail(Failure(status=status, code=code))
    assert await platform.send(part()) is None


@pytest.mark.parametrize("raw", [None, b"slow down", b""])
async def test_429_is_later_whatever_it_says(fake, platform, raw):
    error = await failure_of(fake, platform, Failure(status=429, raw=raw, headers={"Retry-After": "3"}))
    assert isinstance(error, RetryLater)
    assert (error.after_s, error.outcome_unknown) == (3.0, False)


@pytest.mark.parametrize("status", [500, 502, 503, 504])
@pytest.mark.parametrize("raw", [None, b"<html>", b'{"id": "x"}'])
async def test_a_server_error_is_later_and_only_503_is_sure_not_to_have_sent(fake, platform, status, raw):
    error = await failure_of(fake, platform, Failure(status=status, raw=raw))
    assert isinstance(error, RetryLater)
    assert error.outcome_unknown is (status != 503)


@pytest.mark.parametrize("raw", [b"", b"<html>OK</html>", b"{}", b"[]", b'{"code": "0"}', b'{"id": 5}'])
async def test_an_unreadable_success_leaves_the_outcome_unknown(fake, platform, raw):
    error = await failure_of(fake, platform, Failure(raw=raw))
    assert isinstance(error, RetryLater)
    assert error.outcome_unknown


@pytest.mark.parametrize("drop", ["before", "after"])
async def test_a_connection_that_breaks_leaves_the_outcome_unknown(fake, platform, drop):
    error = await failure_of(fake, platform, Failure(drop=drop))
    assert isinstance(error, RetryLater)
    assert error.outcome_unknown


async def test_a_platform_that_is_down_is_later_and_works_again_afterwards(fake):
    clock = Clock()
    async with connected(fake, clock=clock) as platform:
        fake.down = True
        with pytest.raises(RetryLater) as refused:
            await platform.send(part())
        assert not refused.value.outcome_unknown
        fake.down = False
        clock.now += 5
        assert await platform.send(part())


# ---------------------------------------------------------------------------------------------------- token


async def test_many_parts_at_once_ask_for_one_token(fake, platform):
    targets = [replace(GROUP, reply_to=f"m{n}") for n in range(20)]
    await asyncio.gather(*(platform.send(part(target=target)) for target in targets))
    assert fake.token_calls == 1
    assert len(fake.visible) == 20


async def test_a_life_time_that_is_a_text_is_understood(fake):
    clock = Clock()
    async with connected(fake, clock=clock) as platform:
        await platform.send(part())
        clock.now += 7200 - 46
        await platform.send(part(number=1))
        assert fake.token_calls == 1
        clock.now += 50
        await platform.send(part(number=2))
        assert fake.token_calls == 2


async def test_a_token_that_the_platform_refuses_is_renewed_once_under_the_same_number(fake, platform):
    await platform.send(part())
    fake.expire_tokens()
    await platform.send(part(number=1))
    assert fake.token_calls == 2
    assert [m.msg_seq for m in fake.visible] == [1, 2]


@pytest.mark.parametrize(
    ("status", "code"), [(401, 11244), (500, 11244), (400, 11241), (400, 11243), (401, 1)]
)
async def test_a_fresh_token_that_is_refused_too_is_later_and_no_endless_loop(fake, platform, status, code):
    error = await failure_of(fake, platform, Failure(status=status, code=code), times=10)
    assert isinstance(error, RetryLater)
    assert not error.outcome_unknown
    assert calls(fake) == 2


async def test_the_old_secret_is_tried_while_it_rotates():
    async with FakeQQ(app_secret=SECRETS[1]) as fake, connected(fake) as platform:
        assert await platform.send(part())
        assert fake.token_calls == 2


@pytest.mark.parametrize(
    "failure",
    [Failure(code=100016), Failure(raw=b"{}"), Failure(raw=b'{"access_token": ""}'), Failure(raw=b"x"),
     Failure(raw=b'{"access_token": "a\\nb"}'), Failure(status=500, raw=b"<html>")],
)  # fmt: skip
async def test_without_a_token_nothing_was_sent_and_the_platform_is_not_hammered(fake, failure):
    clock = Clock()
    async with connected(fake, clock=clock) as platform:
        fake.fail(failure, on="token", times=2)
        for _ in range(5):
            with pytest.raises(RetryLater) as refused:
                await platform.send(part())
            assert not refused.value.outcome_unknown
        assert len(fake.requests) == 2  # one for each of the two secrets
        clock.now += 2
        assert await platform.send(part())


async def test_a_wrong_secret_is_a_problem_until_it_works():
    async with FakeQQ() as fake:
        paused, reached = asyncio.Event(), asyncio.Event()

        async def sleep(_: float) -> None:
            reached.set()
            await paused.wait()

        fake.fail(Failure(code=100016), on="token", times=2)
        chosen = QQSettings(
            type="qq", app_id="1", app_secret=SECRETS, base_url=fake.url, token_url=fake.token_url
        )
        clock = Clock()
        platform = QQ("qq", chosen, PlatformContext(), clock=clock, sleep=sleep)
        await platform.start()
        await asyncio.wait_for(reached.wait(), 10)
        assert "100016" in platform.problems()[0]
        clock.now += 2
        paused.set()
        await asyncio.wait_for(platform._task, 10)
        assert platform.problems() == []
        await platform.stop()


@pytest.mark.parametrize("kind", ["token", "messages"])
@pytest.mark.parametrize("status", [200, 400, 500])
async def test_no_secret_and_no_token_stands_in_an_error_or_a_log(fake, platform, caplog, kind, status):
    caplog.set_level(logging.DEBUG, logger="feishu_bot")
    await platform.send(part())
    secrets = [*SECRETS, platform._client._token.value]
    if kind == "token":
        fake.expire_tokens()
        secrets.pop()
    fake.fail(Failure(status=status, code=5, msg=f"bad: {' '.join(secrets)}"), on=kind, times=2)
    with pytest.raises(DeliveryError) as raised:
        await platform.send(part(number=1))
    told = f"{raised.value!r} {raised.value.reason} {caplog.text}"
    assert "***" in told
    assert not [secret for secret in secrets if secret in told]


# -------------------------------------------------------------------------------------------------- content


async def test_markdown_travels_as_markdown_where_it_is_granted(fake, platform):
    fake.markdown = True
    await platform.send(part("**bold**"))
    await platform.send(part("plain", number=1))
    assert [(m.msg_type, m.text) for m in fake.visible] == [(2, "**bold**"), (0, "plain")]


@pytest.mark.parametrize("code", sorted(MARKDOWN_REFUSED))
async def test_markdown_that_is_refused_travels_as_text(fake, platform, code):
    fake.markdown = True
    fake.fail(Failure(status=400, code=code))
    await platform.send(part("**bold**"))
    assert [(m.msg_type, m.text) for m in fake.visible] == [(0, "**bold**")]


async def test_markdown_that_is_not_granted_is_asked_for_only_once(fake, platform):
    for number in range(3):
        await platform.send(part("**bold**", number=number))
    assert calls(fake) == 4


async def test_markdown_that_is_not_valid_is_asked_for_again_the_next_time(fake, platform):
    fake.markdown = True
    fake.fail(Failure(status=400, code=50055))
    await platform.send(part("**bad**"))
    await platform.send(part("**good**", number=1))
    assert [m.msg_type for m in fake.visible] == [0, 2]


async def test_guilds_get_text_without_trying_markdown(fake, platform):
    fake.markdown = True
    await platform.send(part("**b** <@!1> & @everyone", target=Target(ChatType.CHANNEL, "1", reply_to="m")))
    assert fake.texts() == ["**b** &lt;@!1&gt; &amp; \uff20everyone"]
    assert calls(fake) == 1


@pytest.mark.parametrize("code", sorted(LINK_REFUSED))
async def test_an_address_that_is_not_registered_loses_its_dots(fake, platform, code):
    fake.filter_links = False
    fake.fail(Failure(status=400, code=code))
    await platform.send(part("see https://example.com/a.html, install.sh and 3.14. Done."))
    assert fake.texts() == ["see https\uff1a//example\u3002com/a\u3002html, install\u3002sh and 3.14. Done."]


async def test_a_filter_that_refuses_even_that_makes_it_undeliverable(fake, platform):
    error = await failure_of(fake, platform, Failure(status=400, code=40054010), times=5)
    assert isinstance(error, Undeliverable)
    assert calls(fake) == 2


async def test_every_fallback_may_be_needed_for_one_message(fake, platform):
    await platform.send(part("**see** readme.md"))
    assert fake.texts() == ["**see** readme\u3002md"]
    assert calls(fake) == 3


async def test_a_text_with_broken_characters_is_sent_all_the_same(fake, platform):
    await platform.send(part("a\ud800b"))
    assert fake.texts() == ["a?b"]


@given(st.text(st.sampled_from("ab.:/1 中"), max_size=20))
def test_a_text_without_links_never_becomes_one_again(text):
    changed = without_links(text)
    assert "a://" not in changed
    assert without_links(changed) == changed


@pytest.mark.parametrize(
    "text",
    ["<@USER>", "<@!1>", "< @USER>", "<\u200b@x>", '<qqbot-at-user id="x" />', "<qqbot-at-everyone />",
     "<#100>", "<emoji:4>", "<faceType=1>", "</qqbot-x>", "<QQBOT-at-everyone />"],
)  # fmt: skip
def test_nothing_in_an_answer_mentions_anybody(text):
    assert inert(text, guild=False) == "\uff1c" + text[1:]
    assert "<" not in inert(text, guild=True)


@pytest.mark.parametrize("text", ["@everyone", "@Everyone", "@all", "@全体成员"])
@pytest.mark.parametrize("guild", [True, False])
def test_nothing_in_an_answer_calls_everybody(text, guild):
    assert inert(f"x {text}", guild=guild) == "x \uff20" + text[1:]


@pytest.mark.parametrize("text", ["a < b", "<stdio.h>", "List<String>", "me@allied.com", "@Bob", "a & b"])
def test_other_words_stay(text):
    assert inert(text, guild=False) == text


def test_a_link_that_would_send_a_command_when_touched_does_not():
    assert "mqqapi://" not in inert("[/x](mqqapi://aio/inlinecmd?command=x)", guild=False)


async def test_the_body_is_what_the_documentation_shows(fake, platform):
    await platform.send(part("hi"))
    reply = {"msg_id": "ROBOT1.0_question", "msg_seq": 1}
    assert fake.visible[0].body == {"msg_type": 0, "content": "hi", **reply}
    fake.markdown = True
    await platform.send(part("# hi", number=1))
    assert fake.visible[1].body == {"msg_type": 2, "markdown": {"content": "# hi"}, **reply, "msg_seq": 52}
