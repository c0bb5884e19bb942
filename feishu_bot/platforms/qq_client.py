"""Calls to QQ's bot API: one token, and what each answer means for a retry.

Sources: bot.q.qq.com/wiki, "接口调用与鉴权" (token), "发送消息", "openapi 错误" (codes).
"""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import orjson

from feishu_bot.errors import RetryLater, Undeliverable
from feishu_bot.platforms.connection import (
    MAX_WAIT_S,
    Connection,
    is_unsure,
    unreadable,
    wait_of,
    words_of,
)
from feishu_bot.platforms.token import AccessToken

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from feishu_bot.config import NetworkSettings
    from feishu_bot.errors import DeliveryError

REPEATED = 40054005  # a message with this msg_id and msg_seq was taken before
MARKDOWN_NOT_GRANTED = frozenset({40034012, 304036, 304041, 50056})
MARKDOWN_REFUSED = MARKDOWN_NOT_GRANTED | {50037, 50041, 50042, 50054, 50055, 50057}
LINK_REFUSED = frozenset({40054010, 304003})

_REFRESH_BEFORE_S = 45.0  # a new token is given in the last 60 s of the old one; both work that long
_OK_STATUSES = range(200, 300)

_TOKEN_REFUSED = frozenset({11241, 11243, 11244})
_IN_AUDIT = frozenset({304023, 304024})  # taken; a person looks at it first
_ONCE_MORE = frozenset({11242, 11252, 11263, 11281})  # "usually works the second time, at most once"
_LATER: dict[int, str] = {
    22009: "too many messages",
    20028: "too many messages to this channel",
    1100100: "slowed down by the platform's safety rules",
    1100308: "too many messages to this guild",
    304082: "the file is not ready",
    304083: "the file is not ready",
    306003: "the message could not be found",
    306005: "the platform failed",
    306006: "the channel could not be found",
}
_CHAT_ONLY = frozenset({22009, 20028, 1100308, 304082, 304083})
_CLOSED: dict[int, str] = {
    304027: "the reply window of the message has closed",
    40034102: "no right to send without a message to reply to, or its reply window has closed",
}
_NEVER: dict[int, str] = {
    REPEATED: "another message was sent under this number (is the app in use elsewhere?)",
    304026: "the message to reply to is not known",
    304028: "the message was not meant for the bot, so it cannot be replied to",
    304031: "the private chat is closed",
    304034: "the bot is no member of this private chat",
    304018: "the bot is not connected",
    304020: "the file is too large",
    304057: "buttons are not granted",
    304003: "an address in the text is not registered",
    40054010: "an address in the text is not registered",
    40034025: "the message or event to reply to is not valid",
    40034012: "Markdown is not granted",
    304036: "Markdown templates are not granted",
    304041: "Markdown is not granted",
    50006: "the message is empty",
    50055: "the Markdown is not valid",
    50056: "Markdown is not granted",
    50057: "the Markdown is not valid",
    11253: "the app lacks this permission",
    11254: "the app is barred from this call",
    11264: "the guild has not granted this permission",
    11265: "the bot is banned",
    11282: "only for administrators",
    1100101: "the text holds words that are not allowed",
    1100104: "the group is gone",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What the platform answered. ``code`` 0 is success."""

    status: int
    code: int
    words: str
    body: dict[str, Any]
    after_s: float | None = None

    @property
    def ok(self) -> bool:
        """Whether the platform has taken the message."""
        return self.status in _OK_STATUSES and (self.code == 0 or self.code in _IN_AUDIT)

    @property
    def sent_id(self) -> str | None:
        """The id of the message that was sent, None while it is in audit."""
        found = self.body.get("id")
        return found if isinstance(found, str) and found else None

    @property
    def quoted_as(self) -> str | None:
        """What names the message that was sent when somebody quotes it: an index in groups and private chats."""
        more = self.body.get("ext_info")
        index = more.get("ref_idx") if isinstance(more, dict) else None
        return index if isinstance(index, str) and index else self.sent_id

    @property
    def reason(self) -> str:
        """The code and what it means, without any secret."""
        known = _LATER.get(self.code) or _CLOSED.get(self.code) or _NEVER.get(self.code)
        return f"{self.code} {known or self.words}".rstrip()

    @property
    def refuses_token(self) -> bool:
        """Whether a newer token may help."""
        known = self.code in _NEVER or self.code in _ONCE_MORE
        return self.code in _TOKEN_REFUSED or (self.status == HTTPStatus.UNAUTHORIZED and not known)

    @property
    def window_closed(self) -> bool:
        """Whether it came too late as a reply."""
        return self.code in _CLOSED

    def error(self, *, is_reply: bool) -> DeliveryError:
        """Return what a refusal means for the part that was sent."""
        if self.refuses_token:
            return RetryLater(f"{self.code} a fresh token is refused")
        if self.code in _LATER or self.status == HTTPStatus.TOO_MANY_REQUESTS:
            return RetryLater(self.reason, after_s=self.after_s, chat_only=self.code in _CHAT_ONLY)
        if self.code in _CLOSED:
            return Undeliverable(self.reason, expired=is_reply)
        known = self.code in _NEVER or self.code in _ONCE_MORE
        if self.status >= HTTPStatus.INTERNAL_SERVER_ERROR and not known:
            reason = f"HTTP {self.status}: {self.reason}"
            return RetryLater(reason, after_s=self.after_s, outcome_unknown=is_unsure(self.status))
        return Undeliverable(self.reason)


class QQClient:
    """Calls one app's API; ``close`` ends its connections.

    Raises ConfigError for a proxy or file of certificates that cannot be used.
    """

    def __init__(
        self,
        *,
        base_url: str,
        token_url: str,
        app_id: str,
        app_secrets: Sequence[str],
        network: NetworkSettings,
        clock: Callable[[], float],
    ) -> None:
        self._app_id = app_id
        self._app_secrets = tuple(app_secrets) or ("",)
        self._api = Connection(base_url, network)
        self._tokens = Connection(token_url, network)
        self._token = AccessToken(self._fetch_token, clock, refresh_before_s=_REFRESH_BEFORE_S)

    async def sign_in(self) -> None:
        """Have a token. Raises RetryLater with the reason there is none."""
        await self._token.get()

    async def call(self, method: str, path: str, body: bytes | None = None, *, sends: bool = True) -> Answer:
        """Make one call, and one more where the platform's documentation says that this helps.

        ``sends``: a success names the message that was sent; what does not is no answer.

        Raises RetryLater or Undeliverable where there is no answer of the platform's to judge.
        """
        token = await self._token.get()
        answer = await self._exchange(method, path, body, token, sends=sends)
        if answer.refuses_token:
            self._token.drop(token)
            return await self._exchange(method, path, body, await self._token.get(), sends=sends)
        if answer.code in _ONCE_MORE:
            return await self._exchange(method, path, body, token, sends=sends)
        return answer

    async def close(self) -> None:
        """End the sessions and what runs in them."""
        await self._token.close()
        await self._api.close()
        await self._tokens.close()

    async def _fetch_token(self) -> tuple[str, float]:
        problem = ""
        for secret in self._app_secrets:
            asked = orjson.dumps({"appId": self._app_id, "clientSecret": secret})
            response = await self._tokens.call("POST", "", asked)
            answer = _object(response.body)
            token = answer.get("access_token")
            # A refusal is HTTP 200 too, so what counts is the field.
            if isinstance(token, str) and token and token.isascii() and token.isprintable():
                return token, _seconds(answer.get("expires_in"))
            words = words_of(answer.get("message"), without=self._app_secrets)
            problem = f"HTTP {response.status}: {answer.get('code', 'no token')} {words}".rstrip()
        raise RetryLater(problem)

    async def _exchange(
        self, method: str, path: str, body: bytes | None, token: str, *, sends: bool
    ) -> Answer:
        response = await self._api.call(method, path, body, authorization=f"QQBot {token}")
        status = response.status
        after_s = wait_of(response.headers.get("Retry-After"))
        answer = _object(response.body)
        code = answer.get("code")
        if isinstance(code, int) and not isinstance(code, bool) and (code or status in _OK_STATUSES):
            words = words_of(answer.get("message"), without=(*self._app_secrets, token))
            return Answer(status, code, words, answer, after_s)
        if status in _OK_STATUSES and (isinstance(answer.get("id"), str) or (not sends and code is None)):
            return Answer(status, 0, "", answer)
        raise unreadable(status, after_s)


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(body)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _seconds(value: object) -> float:
    """Read a life time, which QQ writes as a text; an hour where there is none."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:  # noqa: PLR2004  # years
        value = int(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf"):
        return float(value)
    return MAX_WAIT_S
