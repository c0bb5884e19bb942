"""What every platform keeps, whatever its protocol; run by ``test_contract.py`` for each one that has a webhook.

To put a platform under it, add ``tests/platforms/samples/<name>.py`` with one function::

    def samples(now: float) -> Samples: ...

It returns one account and what the platform posts to it, said at ``now`` (Unix seconds): see ``Samples`` for each
field, and ``REQUIRED`` for the messages. ``samples/qq.py`` is a model for a platform that has a fake server in
``feishu_bot.testing``; ``docs/platforms/writing-one.md`` shows one that has none and uses ``ScriptedPeer``. Nothing
else needs to be written: the platform is found by ``platform_types()``, and one without samples fails.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import time
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import aiohttp
import orjson
import pytest
from aiohttp import web
from multidict import CIMultiDict
from sqlalchemy import select

from feishu_bot.app import App
from feishu_bot.config import BotSettings
from feishu_bot.errors import Refused, RetryLater, Undeliverable
from feishu_bot.model import ChatType, InboundMessage, Outgoing, Target
from feishu_bot.platforms.base import PlatformContext, WebhookRequest
from feishu_bot.split import fit_text
from feishu_bot.store.schema import inbox, outbox

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from contextlib import AbstractAsyncContextManager

    from feishu_bot.platforms.base import Platform, Received

ACCOUNT = "contract"
NOW = 1767225600.0
PATIENCE_S = 30.0  # after which a test gives up what it waits for; nothing is measured with it

# What each platform shows of itself, and what must be so besides what its samples say.
REQUIRED: dict[str, dict[str, Any]] = {
    "private": {"chat_type": ChatType.PRIVATE, "addressed": True, "kind": "message", "unreadable": None},
    "group": {"addressed": False, "text": ""},  # nobody is mentioned, so its text is not kept
    "mention": {"addressed": True, "unreadable": None},  # the bot is meant; its own mention is taken out
    "quoted": {},  # reply_to names the message
    "rich_text": {},  # whatever is more than plain words: faces, posts, segments
    "image": {},
}


class Post(NamedTuple):
    """A request of the platform's."""

    headers: Mapping[str, str]
    body: bytes


class Peer(Protocol):
    """The platform's own end of ``send``: a server on loopback.

    ``settings``: the account's keys that lead to it. ``later`` and ``never`` script the next answer, with
    ``words`` where the platform explains itself.
    """

    @property
    def settings(self) -> Mapping[str, Any]: ...

    def texts(self) -> list[str]: ...

    def later(self, words: str) -> None: ...

    def never(self, words: str) -> None: ...


@dataclass(frozen=True)
class Case:
    """An event, and those fields of the ``InboundMessage`` that it must become."""

    event: Any
    expect: Mapping[str, Any]


@dataclass(frozen=True)
class Samples:
    """One account of a platform and what is posted to it.

    ``settings``: its keys, without the addresses of servers. ``secrets``: what must never be shown.
    ``prove``: an event (or bytes in its place) as the platform posts it, signed. ``proof``: the headers that prove
    it, without which and with any other character in which it is refused. ``cases``: by the names of ``REQUIRED``;
    one more fails nothing. ``unknown``: a well-formed event of a kind that does not exist yet. ``target``: where
    an answer goes. ``peer`` opens the platform's own end. ``challenge``: the handshake, signed where it has to be,
    and the answer to it; None where there is none. ``refused``: more posts that must be refused.
    """

    settings: Mapping[str, Any]
    secrets: tuple[str, ...]
    prove: Callable[[Any], Post]
    proof: tuple[str, ...]
    cases: Mapping[str, Case]
    unknown: Any
    target: Target
    peer: Callable[[], AbstractAsyncContextManager[Peer]]
    challenge: tuple[Post, Any] | None = None
    refused: tuple[Post, ...] = ()


class Found(NamedTuple):
    """A platform type and what makes its samples."""

    type: type[Platform]
    samples: Callable[[float], Samples]


def has_samples(platform_type: type[Platform]) -> bool:
    """Return whether there is a module of samples for a platform."""
    return find_spec(f"tests.platforms.samples.{platform_type.name}") is not None


def found(platform_type: type[Platform]) -> Found:
    """Return a platform with its samples."""
    module = importlib.import_module(f"tests.platforms.samples.{platform_type.name}")
    return Found(platform_type, module.samples)


@dataclass
class ScriptedPeer:
    """A server that takes what is posted to it, for platforms without a fake of their own.

    ``url_keys``: the settings that lead to it, with what follows its address. ``text_of`` reads the text out of a
    request's JSON, None for a request that sends nothing. ``ok`` is the usual answer, the others are
    ``(status, JSON)`` with the words of ``later`` and ``never`` put in for ``WORDS``.
    """

    url_keys: Mapping[str, str]
    text_of: Callable[[Any], str | None]
    ok: Any
    on_later: tuple[int, Any] = (503, {"error": "WORDS"})
    on_never: tuple[int, Any] = (400, {"error": "WORDS"})
    settings: dict[str, Any] = field(default_factory=dict)
    _said: list[str] = field(default_factory=list)
    _next: list[tuple[int, bytes]] = field(default_factory=list)
    _runner: web.ServerRunner | None = None

    def texts(self) -> list[str]:
        return self._said

    def later(self, words: str) -> None:
        self._script(*self.on_later, words)

    def never(self, words: str) -> None:
        self._script(*self.on_never, words)

    def _script(self, status: int, answer: Any, words: str) -> None:
        self._next.append((status, orjson.dumps(answer).replace(b"WORDS", words.encode())))

    async def __aenter__(self) -> Self:
        self._runner = web.ServerRunner(web.Server(self._handle), shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.settings = {name: f"http://127.0.0.1:{site.port}{end}" for name, end in self.url_keys.items()}
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._runner.cleanup()

    async def _handle(self, request: web.BaseRequest) -> web.Response:
        sent = orjson.loads(await request.read() or b"null")
        text = self.text_of(sent)
        if text is not None and self._next:
            status, answer = self._next.pop(0)
            return web.Response(status=status, body=answer, content_type="application/json")
        if text is not None:
            self._said.append(text)
        return web.json_response(self.ok)


# ------------------------------------------------------------------------------------------------- contract

MALFORMED = [
    "",
    " ",
    "0",
    "é",
    "\udcff\ud800",
    "sha1=",
    "0" * 40,
    "f" * 64,
    "0" * 128,
    "-1",
    "x" * 10_000,
    "\0",
]
GARBAGE = [b"", b"{", b"[]", b"null", b"5", b'""', b"\xff\xfe", b"{}", b'{"a":' * 2000, b"[" * 100_000]


class PlatformContract:
    """The tests. A subclass has a fixture ``platform_found`` that returns a ``Found``."""

    @pytest.fixture
    def platform_found(self) -> Found:
        raise NotImplementedError

    @pytest.fixture
    def samples(self, platform_found: Found) -> Samples:
        return platform_found.samples(NOW)

    @pytest.fixture
    def platform(self, platform_found: Found, samples: Samples) -> Platform:
        return _account(platform_found, samples, PlatformContext())

    # ---------------------------------------------------------------------------------------- authenticity

    def test_a_good_signature_is_accepted(self, platform, samples):
        received = platform.receive(_request(samples.prove(samples.cases["private"].event)))
        assert len(received.messages) == 1
        assert 200 <= received.status < 300

    def test_each_flipped_byte_is_refused(self, platform, samples):
        headers, body = samples.prove(samples.cases["private"].event)
        for position in range(len(body)):
            changed = bytearray(body)
            changed[position] ^= 0x01
            _refused(platform, samples, Post(headers, bytes(changed)))

    def test_each_flipped_character_of_the_proof_is_refused(self, platform, samples):
        headers, body = samples.prove(samples.cases["private"].event)
        assert samples.proof
        for name in samples.proof:
            for position, character in enumerate(headers[name]):
                changed = headers[name][:position] + chr(ord(character) ^ 1) + headers[name][position + 1 :]
                _refused(platform, samples, Post({**headers, name: changed}, body))

    def test_an_event_of_somebody_else_is_refused(self, platform, samples):
        headers, _ = samples.prove(samples.cases["private"].event)
        _, body = samples.prove(samples.cases["mention"].event)
        _refused(platform, samples, Post(headers, body))
        for post in samples.refused:
            _refused(platform, samples, post)

    @pytest.mark.parametrize("value", [*MALFORMED, None])
    def test_malformed_headers_are_refused_and_never_an_accident(self, platform, samples, value):
        headers, body = samples.prove(samples.cases["private"].event)
        for name in samples.proof:
            changed = {key: text for key, text in headers.items() if key != name}
            if value is not None:
                changed[name] = value
            _refused(platform, samples, Post(changed, body))
        _refused(platform, samples, Post({}, body))

    @pytest.mark.parametrize("body", GARBAGE)
    def test_a_body_that_is_no_event_is_never_an_accident(self, platform, samples, body):
        for post in (samples.prove(body), Post({}, body)):
            outcome = _outcome(platform, post)
            if isinstance(outcome, Refused):
                assert 400 <= outcome.status < 500
                assert outcome.reason
            else:
                assert all(message.kind == "event" for message in outcome.messages)

    def test_the_challenge_is_answered_and_records_nothing(self, platform, samples):
        if samples.challenge is None:
            return
        post, answer = samples.challenge
        received = platform.receive(_request(post))
        assert orjson.loads(received.body) == answer
        assert received.messages == ()

    # ----------------------------------------------------------------------------------------- normalising

    @pytest.mark.parametrize("name", REQUIRED)
    def test_every_kind_of_message_is_normalised(self, platform, samples, name):
        case = samples.cases[name]
        message = _message(platform, samples, case)
        assert {key: getattr(message, key) for key in case.expect} == dict(case.expect)
        must = REQUIRED[name]
        assert {key: getattr(message, key) for key in must} == must
        assert message.account == ACCOUNT
        assert message.sender_id
        assert InboundMessage.from_json(message.to_json()) == message

    def test_what_each_kind_shows_is_shown(self, platform, samples):
        got = {name: _message(platform, samples, samples.cases[name]) for name in REQUIRED}
        assert got["private"].text == got["private"].text.strip() != ""
        assert got["mention"].text == got["mention"].text.strip() != ""
        assert got["group"].chat_type is not ChatType.PRIVATE
        assert got["mention"].chat_type is got["group"].chat_type
        assert got["mention"].chat_id
        assert got["quoted"].reply_to
        assert got["rich_text"].text
        assert got["image"].attachments[0].kind == "image"
        assert got["image"].attachments[0].key

    def test_the_same_event_twice_has_the_same_key_and_others_have_others(self, platform, samples):
        keys = {}
        for name in REQUIRED:
            event = samples.cases[name].event
            (first,) = platform.receive(_request(samples.prove(event))).messages
            (again,) = platform.receive(_request(samples.prove(event))).messages
            assert first.event_key == again.event_key
            keys[name] = first.event_key
        assert len(set(keys.values())) == len(REQUIRED)

    def test_an_unknown_event_is_accepted_and_nobody_said_it(self, platform, samples):
        received = platform.receive(_request(samples.prove(samples.unknown)))
        assert 200 <= received.status < 300
        assert all(message.kind == "event" for message in received.messages)

    # --------------------------------------------------------------------------------------------- sending

    async def test_a_long_text_is_split_in_order_within_the_limits(self, platform_found, samples):
        paragraphs = [f"Paragraph <{n}> of many. " + "Some more words. " * 20 for n in range(60)]
        limits = platform_found.type
        parts = fit_text(
            "\n\n".join(paragraphs),
            max_chars=4000,
            platform_chars=limits.max_part_chars,
            max_bytes=limits.max_part_bytes,
            max_parts=limits.max_parts,
        )
        assert limits.max_parts is None or len(parts) <= limits.max_parts
        async with _connected(platform_found, samples) as (platform, peer):
            for number, text in enumerate(parts):
                await platform.send(_part(samples, text, number))
            texts = peer.texts()
        assert len(texts) == len(parts) > 1
        assert all(len(text) <= (limits.max_part_chars or 10**9) for text in texts)
        seen = [n for n in range(60) if any(f"Paragraph <{n}>" in text for text in texts)]
        joined = "\n".join(texts)
        places = [joined.index(f"Paragraph <{n}>") for n in seen]
        assert places == sorted(places)
        assert seen == list(range(len(seen)))
        assert len(seen) == 60 or limits.max_parts is not None

    async def test_later_and_never_are_told_apart_and_no_secret_is_told(
        self, platform_found, samples, caplog
    ):
        caplog.set_level(logging.DEBUG, logger="feishu_bot")
        words = "bad request: " + " ".join(samples.secrets)
        async with _connected(platform_found, samples) as (platform, peer):
            peer.later(words)
            with pytest.raises(RetryLater) as later:
                await platform.send(_part(samples, "first", 0))
            peer.never(words)
            with pytest.raises(Undeliverable) as never:
                await platform.send(_part(samples, "second", 1))
            await platform.send(_part(samples, "third", 2))
            assert peer.texts()[-1] == "third"
        told = f"{later.value!r} {later.value.reason} {never.value!r} {never.value.reason} {caplog.text}"
        told += repr([r.__dict__ for r in caplog.records])
        assert not [secret for secret in samples.secrets if secret in told]
        assert not [secret for secret in samples.secrets if secret in repr(platform.settings)]

    # ------------------------------------------------------------------------------------- through the door

    async def test_through_the_door_an_event_is_one_row_and_is_answered_once(self, platform_found, tmp_path):
        samples = platform_found.samples(time.time())
        private, tampered = samples.prove(samples.cases["private"].event), bytearray()
        async with served(platform_found, samples, tmp_path) as (door, peer):
            tampered = bytearray(private.body)
            tampered[len(tampered) // 2] ^= 1
            refused = [await door.post(Post(private.headers, bytes(tampered)))]
            for name in samples.proof:
                for value in (None, "0", "\xe9"):
                    headers = {k: v for k, v in private.headers.items() if k != name}
                    refused.append(
                        await door.post(
                            Post(headers | ({} if value is None else {name: value}), private.body)
                        )
                    )
            assert {status // 100 for status in refused} == {4}
            assert await door.rows() == []
            assert [(await door.post(private)) // 100 for _ in range(2)] == [2, 2]
            assert len(await door.rows()) == 1
            assert (await door.post(samples.prove(samples.unknown))) // 100 == 2
            text = _message_text(platform_found, samples)
            await until(lambda: any(text in said for said in peer.texts()), "the answer")
            assert sum(text in said for said in peer.texts()) == 1
            await until_rows(door, {"answered", "ignored"})


# ---------------------------------------------------------------------------------------------------- parts


def _account(platform_found: Found, samples: Samples, context: PlatformContext, **keys: Any) -> Platform:
    return platform_found.type(ACCOUNT, _settings(platform_found, samples, **keys), context)


def _settings(platform_found: Found, samples: Samples, **keys: Any) -> Any:
    chosen = {"type": platform_found.type.name, "enabled": True, **samples.settings, **keys}
    settings = platform_found.type.settings_type(**chosen)
    assert settings.missing() == []
    return settings


def _request(post: Post) -> WebhookRequest:
    return WebhookRequest("POST", CIMultiDict(post.headers), {}, post.body, NOW)


def _refused(platform: Platform, samples: Samples, post: Post) -> None:
    with pytest.raises(Refused) as refused:
        platform.receive(_request(post))
    assert 400 <= refused.value.status < 500
    assert not [secret for secret in samples.secrets if secret in refused.value.reason]


def _outcome(platform: Platform, post: Post) -> Received | Refused:
    try:
        return platform.receive(_request(post))
    except Refused as refused:
        return refused


def _message(platform: Platform, samples: Samples, case: Case) -> InboundMessage:
    (message,) = platform.receive(_request(samples.prove(case.event))).messages
    return message


def _message_text(platform_found: Found, samples: Samples) -> str:
    return _message(
        _account(platform_found, samples, PlatformContext()), samples, samples.cases["private"]
    ).text


def _part(samples: Samples, text: str, number: int) -> Outgoing:
    return Outgoing(ACCOUNT, "in:1", "answer", number, samples.target, text)


@asynccontextmanager
async def _connected(platform_found: Found, samples: Samples) -> AsyncIterator[tuple[Platform, Peer]]:
    async with samples.peer() as peer:
        platform = _account(platform_found, samples, PlatformContext(), **peer.settings)
        try:
            yield platform, peer
        finally:
            await platform.stop()


class Door:
    """The webhook of a running server, and what it has recorded."""

    def __init__(self, app: App, http: aiohttp.ClientSession) -> None:
        self._app = app
        self._http = http

    async def post(self, post: Post) -> int:
        url = f"http://127.0.0.1:{self._app.port}/webhook/{ACCOUNT}"
        async with self._http.post(url, data=post.body, headers=post.headers) as answer:
            return answer.status

    async def rows(self) -> list[Any]:
        """Return the inbox."""
        return await self._app.store.read(lambda tx: tx.connection.execute(select(inbox)).all())

    async def parts(self) -> list[Any]:
        """Return the outbox, in order."""
        return await self._app.store.read(
            lambda tx: tx.connection.execute(select(outbox).order_by(outbox.c.id)).all()
        )


@asynccontextmanager
async def served(
    platform_found: Found, samples: Samples, folder: Any, **chat: Any
) -> AsyncIterator[tuple[Door, Peer]]:
    """Run a server with the account, its database in ``folder``; ``chat``: settings of that section."""
    async with AsyncExitStack() as stack:
        peer = await stack.enter_async_context(samples.peer())
        account = _settings(platform_found, samples, **peer.settings)
        settings = BotSettings.model_validate(
            {
                "server": {"port": 0, "min_free_mb": 0},
                "ai": {"conversation_persistence": {"db_url": f"sqlite:///{folder}/contract.db"}},
                "budgets": [],
                "chat": chat,
                "plugins": {"enabled": []},
                "schedule": {"cleanup": {"enabled": False}},
                "platforms": {ACCOUNT: account},
            }
        )
        app = App(settings)
        await app.start()
        stack.push_async_callback(app.stop)
        http = await stack.enter_async_context(aiohttp.ClientSession())
        yield Door(app, http), peer


async def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        await asyncio.sleep(0.01)


async def until_rows(door: Door, ends: set[str]) -> None:
    """Wait until every recorded event has one of these ends."""
    end = time.monotonic() + PATIENCE_S
    while {row.state for row in await door.rows()} - ends:
        assert time.monotonic() < end, f"not all events ended in {ends}"
        await asyncio.sleep(0.01)
