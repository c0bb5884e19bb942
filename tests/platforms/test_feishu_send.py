from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feishu_bot.config import NetworkSettings
from feishu_bot.errors import ConfigError, DeliveryError, RetryLater, Undeliverable
from feishu_bot.model import ChatType, Outgoing, Target
from feishu_bot.platforms.base import PlatformContext
from feishu_bot.platforms.feishu import Feishu, FeishuSettings
from feishu_bot.platforms.feishu_content import escape_mentions, outgoing_content
from feishu_bot.platforms.markdown import holds_markdown
from feishu_bot.testing.feishu import BOT_OPEN_ID, FakeFeishu
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
async def connected(
    url: str, *, clock: Clock | None = None, context: PlatformContext | None = None, **keys: Any
):
    clock = clock or Clock()
    chosen = FeishuSettings(
        **{
            "type": "feishu",
            "app_id": "cli_x",
            "app_secret": SECRETS,
            "encrypt_key": "the-encrypt-key",
            "verification_token": "the-verification-token",
            "bot_open_id": "ou_own",
            "base_url": url,
            **keys,
        }
    )
    platform = Feishu("feishu", chosen, context or PlatformContext(), clock=clock, sleep=clock.sleep)
    try:
        yield platform
    finally:
        await platform.stop()


@pytest.fixture
async def fake():
    async with FakeFeishu() as server:
        yield server


@pytest.fixture
async def platform(fake):
    async with connected(fake.url) as connection:
        yield connection


GROUP = Target(ChatType.GROUP, chat_id="oc_group", sender_id="ou_asker", reply_to="om_question")


def part(text: str = "hello", *, target: Target = GROUP, number: int = 0, **options: Any) -> Outgoing:
    return Outgoing("feishu", "in:7", "answer", number, target, text, **options)


# -------------------------------------------------------------------------------------------------- routes


async def test_an_answer_is_a_reply_to_the_question_and_its_id_comes_back(fake, platform):
    sent_id = await platform.send(part())
    (message,) = fake.visible
    assert sent_id == message.message_id
    assert (message.reply_to, message.thread, message.msg_type, message.text) == (
        "om_question",
        False,
        "text",
        "hello",
    )


async def test_an_answer_in_a_topic_stays_in_the_topic(fake, platform):
    await platform.send(part(target=replace(GROUP, thread_id="omt_1")))
    assert fake.visible[0].thread


async def test_without_a_question_the_message_goes_to_the_chat(fake, platform):
    await platform.send(part(target=replace(GROUP, reply_to=None)))
    assert (fake.visible[0].chat, fake.visible[0].reply_to) == ("oc_group", None)


async def test_without_a_chat_the_message_goes_to_the_person(fake, platform):
    await platform.send(part(target=Target(ChatType.PRIVATE, sender_id="ou_asker")))
    assert fake.visible[0].chat == "ou_asker"


async def test_a_message_to_nobody_is_undeliverable(platform):
    with pytest.raises(Undeliverable):
        await platform.send(part(target=Target(ChatType.PRIVATE)))


async def test_a_strange_message_id_stays_inside_its_path(fake, platform):
    await platform.send(part(target=replace(GROUP, reply_to="../../x?y=1#z")))
    assert fake.visible[0].reply_to == "../../x?y=1#z"


@pytest.mark.parametrize("code", [230011, 230110])
async def test_the_answer_to_a_recalled_question_goes_to_the_chat(fake, platform, code):
    fake.fail(Failure(status=400, code=code))
    await platform.send(part())
    (message,) = fake.visible
    assert (message.chat, message.reply_to) == ("oc_group", None)


async def test_the_answer_to_a_recalled_private_question_without_chat_goes_to_the_person(fake, platform):
    fake.fail(Failure(status=400, code=230011))
    await platform.send(part(target=Target(ChatType.PRIVATE, sender_id="ou_a", reply_to="om_q")))
    assert fake.visible[0].chat == "ou_a"


async def test_a_group_without_topics_gets_a_plain_reply(fake, platform):
    fake.fail(Failure(status=400, code=230071))
    await platform.send(part(target=replace(GROUP, thread_id="omt_1")))
    (message,) = fake.visible
    assert (message.reply_to, message.thread) == ("om_question", False)


@pytest.mark.parametrize("code", [230001, 230025, 230054, 230099])
async def test_a_post_that_cannot_be_shown_is_sent_as_text(fake, platform, code):
    fake.fail(Failure(status=400, code=code))
    await platform.send(part("**bold**"))
    (message,) = fake.visible
    assert (message.msg_type, message.text) == ("text", "**bold**")


async def test_every_fallback_may_be_needed_for_one_message(fake, platform):
    for code in (230071, 230099, 230011):
        fake.fail(Failure(status=400, code=code))
    await platform.send(part("**bold**", target=replace(GROUP, thread_id="omt_1")))
    (message,) = fake.visible
    assert (message.chat, message.msg_type) == ("oc_group", "text")
    assert len(message.uuid) <= 50


async def test_a_fallback_ends_when_it_is_refused_as_well(fake, platform):
    fake.fail(Failure(status=400, code=230011), times=50)
    with pytest.raises(Undeliverable, match="230011"):
        await platform.send(part())
    assert sum(method == "POST" and "messages" in path for method, path in fake.requests) == 2


# ---------------------------------------------------------------------------------------------- idempotency


async def test_a_part_sent_twice_is_seen_once(fake, platform):
    first = await platform.send(part())
    assert await platform.send(part(attempts=2)) == first
    assert len(fake.visible) == 1
    assert fake.folded == 1


async def test_a_fallback_sent_twice_is_seen_once(fake, platform):
    ids = []
    for attempt in (1, 2):
        fake.fail(Failure(status=400, code=230011))
        ids.append(await platform.send(part(attempts=attempt)))
    assert ids[0] == ids[1]
    assert len(fake.visible) == 1


async def test_parts_and_fallbacks_have_keys_of_their_own(fake, platform):
    answer = part("**bold**", target=replace(GROUP, thread_id="omt_1"))
    await platform.send(answer)
    await platform.send(replace(answer, part=1))
    for code in (230071, 230011, 230099):
        fake.fail(Failure(status=400, code=code))
        await platform.send(answer)
    keys = [message.uuid for message in fake.visible]
    assert len(set(keys)) == 5
    assert all(0 < len(key) <= 50 for key in keys)


async def test_an_attempt_whose_answer_was_lost_is_not_shown_again(fake, platform):
    fake.fail(Failure(drop="after"))
    with pytest.raises(RetryLater) as lost:
        await platform.send(part())
    assert lost.value.outcome_unknown
    await platform.send(part(attempts=2))
    assert fake.texts() == ["hello"]


@pytest.mark.parametrize(("language", "mark"), [("zh", "(可能重复) "), ("en", "(possibly repeated) ")])
async def test_a_part_that_may_be_a_repeat_says_so(fake, language, mark):
    async with connected(fake.url, context=PlatformContext(language=language)) as platform:
        await platform.send(part(possibly_repeated=True))
    assert fake.texts() == [mark + "hello"]


# ------------------------------------------------------------------------------------------ the retry table


LATER = [1500, 2200, 11232, 11233, 11247, 230020, 230049, 232096, 300120, 99991400]
NEVER = [
    230001, 230002, 230006, 230013, 230017, 230018, 230019, 230022, 230025, 230027, 230028, 230029, 230034,
    230035, 230038, 230050, 230053, 230054, 230055, 230071, 230072, 230075, 230099, 230111, 232009, 99991672,
    99991403, 99991401, 424242,
]  # fmt: skip


async def failure_of(fake: FakeFeishu, platform: Feishu, failure: Failure) -> DeliveryError:
    fake.fail(failure)
    with pytest.raises(DeliveryError) as raised:
        await platform.send(part())
    assert not fake.visible or failure.drop == "after"
    return raised.value


@pytest.mark.parametrize("status", [200, 400])
@pytest.mark.parametrize("code", LATER)
async def test_a_code_that_passes_is_tried_later(fake, platform, code, status):
    error = await failure_of(fake, platform, Failure(status=status, code=code))
    assert isinstance(error, RetryLater)
    assert str(code) in error.reason
    assert error.outcome_unknown is (code == 230049)
    assert error.chat_only is (code in {230020, 230049, 11233, 232096})


@pytest.mark.parametrize("status", [200, 400])
@pytest.mark.parametrize("code", NEVER)
async def test_a_code_that_stays_is_undeliverable_with_its_number_and_words(fake, platform, code, status):
    error = await failure_of(fake, platform, Failure(status=status, code=code))
    assert isinstance(error, Undeliverable)
    assert error.reason.startswith(f"{code} ")
    assert len(error.reason) > len(str(code)) + 5


@pytest.mark.parametrize(
    ("header", "after_s"),
    [("7", 7.0), ("0.5", 0.5), ("999999", 3600.0), ("soon", None), ("-1", None), ("nan", None)],
)
async def test_the_wait_that_the_platform_asks_for_is_kept(fake, platform, header, after_s):
    failure = Failure(status=400, code=99991400, headers={"x-ogw-ratelimit-reset": header})
    error = await failure_of(fake, platform, failure)
    assert error.after_s == after_s


@pytest.mark.parametrize("raw", [None, b"slow down", b""])
async def test_429_is_later_whatever_it_says(fake, platform, raw):
    failure = Failure(status=429, raw=raw, headers={"x-ogw-ratelimit-reset": "3"})
    error = await failure_of(fake, platform, failure)
    assert isinstance(error, RetryLater)
    assert (error.after_s, error.outcome_unknown) == (3.0, False)


@pytest.mark.parametrize("status", [500, 502, 503, 504])
@pytest.mark.parametrize("raw", [None, b"<html>", b'{"code": 0}'])
async def test_a_server_error_is_later_and_only_503_is_sure_not_to_have_sent(fake, platform, status, raw):
    error = await failure_of(fake, platform, Failure(status=status, raw=raw))
    assert isinstance(error, RetryLater)
    assert error.outcome_unknown is (status != 503)


@pytest.mark.parametrize("raw", [b"", b"<html>OK</html>", b"{}", b"[]", b'{"code": "0"}', b'{"code": null}'])
async def test_an_unreadable_success_leaves_the_outcome_unknown(fake, platform, raw):
    error = await failure_of(fake, platform, Failure(status=200, raw=raw))
    assert isinstance(error, RetryLater)
    assert error.outcome_unknown


@pytest.mark.parametrize("status", [302, 401, 403, 404, 407])
async def test_an_error_page_of_something_in_between_is_later(fake, platform, status):
    error = await failure_of(
        fake, platform, Failure(status=status, raw=b"<html>", headers={"Location": "/x"})
    )
    assert isinstance(error, RetryLater)
    assert not error.outcome_unknown


async def test_a_redirect_is_not_followed_so_that_the_token_stays_here(fake, platform):
    async with FakeFeishu() as elsewhere:
        await failure_of(
            fake, platform, Failure(status=307, raw=b"", headers={"Location": elsewhere.url + "/x"})
        )
        assert not elsewhere.requests


async def test_a_gateway_that_finds_the_part_too_large_makes_it_undeliverable(fake, platform):
    assert isinstance(await failure_of(fake, platform, Failure(status=413, raw=b"too large")), Undeliverable)


@pytest.mark.parametrize("drop", ["before", "after"])
async def test_a_connection_that_breaks_leaves_the_outcome_unknown(fake, platform, drop):
    error = await failure_of(fake, platform, Failure(drop=drop))
    assert isinstance(error, RetryLater)
    assert error.outcome_unknown


async def test_a_success_without_an_id_is_a_success(fake, platform):
    fake.fail(Failure(raw=b'{"code": 0, "msg": "success"}'))
    assert await platform.send(part()) is None


async def test_a_refused_connection_is_sure_not_to_have_sent():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    async with connected(f"http://127.0.0.1:{port}") as platform:
        with pytest.raises(RetryLater) as refused:
            await platform.send(part())
    assert not refused.value.outcome_unknown


async def test_a_connection_refused_once_the_token_is_there_is_sure_not_to_have_sent():
    async with FakeFeishu() as fake, connected(fake.url) as platform:
        await platform.send(part())
        await platform._client.close()  # no connection of the time before is left
        await fake.stop()
        with pytest.raises(RetryLater, match="no connection") as refused:
            await platform.send(part(number=1))
    assert not refused.value.outcome_unknown


async def test_a_platform_that_is_down_is_later_and_works_again_afterwards(fake):
    clock = Clock()
    async with connected(fake.url, clock=clock) as platform:
        fake.down = True
        with pytest.raises(RetryLater) as refused:
            await platform.send(part())
        assert not refused.value.outcome_unknown
        fake.down = False
        clock.now += 5
        assert await platform.send(part())


# -------------------------------------------------------------------------------------------- tenant token


async def test_many_parts_at_once_ask_for_one_token(fake, platform):
    await asyncio.gather(*(platform.send(part(number=n)) for n in range(20)))
    assert fake.token_calls == 1
    assert len(fake.visible) == 20


async def test_a_token_that_the_platform_refuses_is_renewed_once_under_the_same_key(fake, platform):
    await platform.send(part())
    fake.expire_tokens()
    await platform.send(part(number=1))
    assert fake.token_calls == 2
    assert len(fake.visible) == 2


async def test_a_fresh_token_that_is_refused_too_is_later_and_no_endless_loop(fake, platform):
    fake.fail(Failure(status=400, code=99991663), times=10)
    with pytest.raises(RetryLater) as refused:
        await platform.send(part())
    assert not refused.value.outcome_unknown
    assert sum("messages" in path for _, path in fake.requests) == 2


async def test_a_token_is_renewed_before_its_end_while_the_old_one_serves(fake):
    clock = Clock()
    async with connected(fake.url, clock=clock) as platform:
        await platform.send(part())
        clock.now += 7200 - 601
        await platform.send(part(number=1))
        assert fake.token_calls == 1
        clock.now += 2
        fake.fail(Failure(delay_s=0.05), on="token")
        await platform.send(part(number=2))
        assert (len(fake.visible), fake.token_calls) == (3, 1)  # nobody waited for the new one
        await platform._client._token._task
        assert fake.token_calls == 2


async def test_an_early_renewal_that_fails_disturbs_nobody(fake):
    clock = Clock()
    async with connected(fake.url, clock=clock) as platform:
        await platform.send(part())
        clock.now += 7200 - 300
        fake.fail(Failure(status=500), on="token", times=2)
        for number in range(1, 4):
            await platform.send(part(number=number))
        assert len(fake.visible) == 4


async def test_the_old_secret_is_tried_while_it_rotates():
    async with FakeFeishu(app_secret=SECRETS[1]) as fake, connected(fake.url) as platform:
        assert await platform.send(part())
        assert fake.token_calls == 2


async def test_without_a_token_nothing_was_sent_and_the_platform_is_not_hammered(fake):
    clock = Clock()
    async with connected(fake.url, clock=clock) as platform:
        fake.fail(Failure(code=10014), on="token", times=2)
        for _ in range(5):
            with pytest.raises(RetryLater, match="10014") as refused:
                await platform.send(part())
            assert not refused.value.outcome_unknown
        assert len(fake.requests) == 2  # one for each of the two secrets
        clock.now += 2
        assert await platform.send(part())


@pytest.mark.parametrize("raw", [b"{}", b'{"code": 0}', b'{"code": 0, "tenant_access_token": "a\\nb"}', b"x"])
async def test_an_answer_without_a_token_is_later(fake, platform, raw):
    fake.fail(Failure(raw=raw), on="token", times=2)
    with pytest.raises(RetryLater) as refused:
        await platform.send(part())
    assert not refused.value.outcome_unknown


# --------------------------------------------------------------------------------------------------- secrets


@pytest.mark.parametrize("kind", ["token", "messages"])
@pytest.mark.parametrize("status", [200, 400, 500])
async def test_no_secret_and_no_token_stands_in_an_error_or_a_log(fake, platform, caplog, kind, status):
    caplog.set_level(logging.DEBUG, logger="feishu_bot")
    await platform.send(part())
    secrets = [*SECRETS, "the-encrypt-key", "the-verification-token", platform._client._token.value]
    if kind == "token":
        fake.expire_tokens()
    fake.fail(Failure(status=status, code=5, msg=f"bad: {' '.join(secrets)}"), on=kind, times=2)
    with pytest.raises(DeliveryError) as raised:
        await platform.send(part(number=1))
    told = f"{raised.value!r} {raised.value.reason} {caplog.text}"
    assert "***" in told
    assert not [secret for secret in secrets if secret in told]


# ------------------------------------------------------------------------------------------------- identity


async def test_the_bots_own_id_is_asked_for_and_announced(fake):
    known = asyncio.Event()
    async with connected(
        fake.url, bot_open_id=None, context=PlatformContext(identified=known.set)
    ) as platform:
        await platform.start()
        await asyncio.wait_for(known.wait(), 10)
        assert platform._own_id == BOT_OPEN_ID
        assert platform.problems() == []


async def test_a_configured_id_is_announced_without_asking(fake):
    known = asyncio.Event()
    async with connected(fake.url, context=PlatformContext(identified=known.set)) as platform:
        await platform.start()
        assert known.is_set()
        assert not fake.requests


@pytest.mark.parametrize(
    "failure",
    [Failure(status=500), Failure(code=99991672), Failure(raw=b"x"), Failure(raw=b'{"code":0,"data":{}}'),
     Failure(raw=b'{"code":0,"bot":{"open_id":5}}')],
)  # fmt: skip
async def test_the_id_is_asked_for_again_with_longer_pauses_until_it_is_known(fake, failure):
    known, clock = asyncio.Event(), Clock()
    fake.fail(failure, on="info", times=8)
    context = PlatformContext(identified=known.set)
    async with connected(fake.url, clock=clock, bot_open_id=None, context=context) as platform:
        await platform.start()
        await asyncio.wait_for(known.wait(), 10)
    assert clock.pauses == [1, 2, 4, 8, 16, 32, 60, 60]


async def test_an_unknown_id_is_a_problem_with_its_reason(fake):
    paused, reached = asyncio.Event(), asyncio.Event()

    async def sleep(_: float) -> None:
        reached.set()
        await paused.wait()

    fake.fail(Failure(code=99991672), on="info")
    chosen = FeishuSettings(type="feishu", app_id="a", app_secret="s", encrypt_key="k", base_url=fake.url)
    platform = Feishu("feishu", chosen, PlatformContext(), sleep=sleep)
    await platform.start()
    await asyncio.wait_for(reached.wait(), 10)
    assert "99991672" in platform.problems()[0]
    await platform.stop()


async def test_start_does_not_wait_for_a_platform_that_is_silent(fake):
    fake.fail(Failure(delay_s=60), on="token")
    async with connected(fake.url, bot_open_id=None) as platform:
        await asyncio.wait_for(platform.start(), 5)


# -------------------------------------------------------------------------------------------------- content


@pytest.mark.parametrize(
    "text",
    [
        "**bold**",
        "see `x`",
        "```\ncode\n```",
        "# Title",
        "- item",
        "[a](https://b)",
        "|a|b|\n|---|---|\n|1|2|",
        "~~x~~",
    ],
)
async def test_markdown_travels_as_a_post(fake, platform, text):
    await platform.send(part(text))
    (message,) = fake.visible
    assert (message.msg_type, message.text) == ("post", text)
    assert list(orjson.loads(message.content)) == ["zh_cn"]


@pytest.mark.parametrize(
    "text", ["hello", "2 * 3 * 4", "a_b_c", "1. one", "#tag", "5 > 3", "x ** y", "a - b", ""]
)
def test_plain_words_are_no_markdown(text):
    assert not holds_markdown(text)


def test_markdown_too_large_for_a_post_is_a_text():
    assert outgoing_content("**b** " + "x" * 29_000)[0] == "post"
    assert outgoing_content("**b** " + "x" * 30_000)[0] == "text"
    assert outgoing_content("**b** " + '"' * 10_000)[0] == "text"


@pytest.mark.parametrize("character", ["x", '"', "\\", "\n", "\x01", "字", "🙂", "<at>"])
async def test_a_part_as_large_as_allowed_passes_whatever_it_is_made_of(fake, platform, character):
    assert Feishu.max_part_bytes is not None
    text = character * (Feishu.max_part_bytes // len(character.encode()))
    await platform.send(part(text))
    assert len(fake.visible) == 1


async def test_a_text_with_broken_characters_is_sent_all_the_same(fake, platform):
    await platform.send(part("a\ud800b"))
    assert fake.texts() == ["a?b"]


TAGS = ['<at user_id="all"></at>', "<AT user_id='ou_x'>", "< at id=all>", "<\tAt id=all>", "</at>", "<\u200bat id=all>",
        "<at/>", "<\nat\nuser_id=all>", "<<at id=all>", "< / at >", "<a\u200bt id=all>", "<at", "<at1"]  # fmt: skip


@pytest.mark.parametrize("tag", TAGS)
def test_nothing_in_an_answer_notifies_anybody(tag):
    escaped = escape_mentions(f"a {tag} b")
    visible = "".join(c for c in escaped if c.isprintable() and not c.isspace()).lower()
    assert "<at" not in visible
    assert "</at" not in visible
    assert escaped.replace("\uff1c", "<") == f"a {tag} b"


@given(st.text(st.sampled_from("<</aAtT \n\t\u200b>=x"), max_size=12))
def test_no_mixture_of_brackets_and_blanks_makes_a_mention(text):
    squeezed = "".join(c for c in escape_mentions(text) if c not in " \n\t\u200b").lower()
    for tag in ("<at", "</at"):
        position = squeezed.find(tag)
        while position >= 0:
            assert squeezed[position + len(tag) :][:1] in {"a", "t", "x"}  # a longer name: no mention
            position = squeezed.find(tag, position + 1)


@pytest.mark.parametrize("text", ["a < b", "<attribute>", "<b>at</b>", "x<y, at home", "List<String>"])
def test_other_brackets_stay(text):
    assert escape_mentions(text) == text


# -------------------------------------------------------------------------------------------------- network


async def test_a_proxy_is_never_asked_for_a_platform_on_this_machine(fake):
    network = NetworkSettings(proxy="http://127.0.0.1:9")
    async with connected(fake.url, context=PlatformContext(network=network)) as platform:
        assert await platform.send(part())


async def test_the_accounts_own_network_settings_come_before_the_servers():
    async with connected(
        "https://open.example.test",
        network={"proxy": "http://127.0.0.1:9"},
        context=PlatformContext(network=NetworkSettings(proxy="http://other.example.test:1")),
    ) as platform:
        with pytest.raises(RetryLater) as refused:
            await platform.send(part())
    assert "Proxy" in refused.value.reason


def test_a_file_of_certificates_that_is_missing_is_a_mistake_in_the_configuration(tmp_path):
    network = NetworkSettings(ca_file=str(tmp_path / "none.pem"))
    chosen = FeishuSettings(type="feishu", app_id="a", app_secret="s", encrypt_key="k")
    with pytest.raises(ConfigError):
        Feishu("feishu", chosen, PlatformContext(network=network))


# -------------------------------------------------------------------------------------------------- typing


async def test_a_reaction_shows_on_the_question_that_an_answer_is_being_made_until_it_is_taken_back(
    fake, platform
):
    shown = await platform.show_typing(GROUP)
    assert list(fake.shown.values()) == [("om_question", "Typing")]
    await platform.hide_typing(GROUP, shown)
    assert fake.shown == {}


async def test_without_a_question_nothing_is_shown(fake, platform):
    assert await platform.show_typing(replace(GROUP, reply_to=None)) is None
    assert fake.requests == type(fake.requests)()


@pytest.mark.parametrize(("code", "calls"), [(231002, 1), (99991672, 1), (231003, 2), (231015, 2)])
async def test_an_app_without_the_permission_is_asked_to_react_only_once(fake, platform, code, calls):
    fake.fail(Failure(status=400, code=code), times=5, on="reactions")
    for _ in range(2):
        with contextlib.suppress(DeliveryError):
            assert await platform.show_typing(GROUP) is None
    assert sum(path.endswith("/reactions") for _, path in fake.requests) == calls
