"""Calls to Feishu's open platform: one session, one tenant token, and what each answer means for a retry.

Sources: open.feishu.cn, "Get tenant_access_token", "Send message", "Reply to message" and the general error
codes.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson

from feishu_bot.errors import DeliveryError, RetryLater, Undeliverable
from feishu_bot.network import proxy_for, ssl_context

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from feishu_bot.config import NetworkSettings

TOKEN_PATH = "/open-apis/auth/v3/tenant_access_token/internal"  # noqa: S105 - a path, no secret

TOKEN_EXPIRED = 99991663
REPLY_GONE = frozenset({230011, 230110})  # the message to reply to was recalled or deleted
NO_THREADS = 230071  # on a reply: this group has no topics
POST_REFUSED = frozenset({230001, 230025, 230054, 230099})  # as text the same words may pass

_CONNECT_S = 5.0
_TOTAL_S = 20.0
_REFRESH_BEFORE_S = 600.0  # from 30 min before its end Feishu gives a new token; both stay valid
_ASK_AGAIN_S = 1.0  # after a failure, so that a hundred waiting parts do not ask a hundred times
_MAX_WAIT_S = 3600.0
_MAX_WORDS = 200
_UNAVAILABLE = HTTPStatus.SERVICE_UNAVAILABLE  # nobody took the request, so nothing was sent
_OK_STATUSES = range(200, 300)
_TOO_LARGE = frozenset({413, 414, 431})

_LATER: dict[int, str] = {
    99991400: "too many calls",
    230020: "too many messages to this chat",
    230049: "the message is still being sent",
    1500: "internal error",
    2200: "internal error",
    300120: "internal error",
    11232: "too many messages",
    11233: "too many messages to this chat",
    11247: "too many messages",
    232096: "the chat is being changed",
}
_CHAT_ONLY = frozenset({230020, 230049, 11233, 232096})
_SENT_PERHAPS = frozenset({230049})
_NEVER: dict[int, str] = {
    230001: "a parameter is not valid",
    230002: "the bot is not in this group",
    230006: "the app has no bot capability",
    230011: "the message was recalled",
    230013: "the user is outside the app's availability range",
    230017: "the bot does not own this resource",
    230018: "the group's settings forbid it",
    230019: "the topic is gone",
    230022: "the text holds words that are not allowed",
    230025: "the message is too long",
    230027: "a permission is missing",
    230028: "refused by the data loss audit",
    230029: "the user has left the company",
    230034: "the receiver's id is not valid",
    230035: "the bot may not speak here",
    230038: "private chats between companies are not allowed",
    230050: "the message is not visible to the bot",
    230053: "the user has stopped the bot",
    230054: "this type of message is not supported here",
    230055: "the uploaded file does not suit the type of message",
    230071: "the group has no topics",
    230072: "a merged message cannot be replied to",
    230075: "not allowed in a secret chat",
    230099: "the content cannot be shown",
    230110: "the message was deleted",
    230111: "the message destroys itself",
    232009: "the group was dissolved",
    99991672: "the app lacks a permission",
    99991679: "the app lacks a permission",
    99991401: "this address is not in the app's IP allow list",
    99991403: "the month's quota is used up",
    10003: "app_id or app_secret is not valid",
    10014: "the app is disabled, or app_secret is wrong",
    10015: "app_secret is wrong",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What the platform answered in its own words. ``code`` 0 is success."""

    status: int
    code: int
    words: str
    body: dict[str, Any]
    after_s: float | None = None

    @property
    def reason(self) -> str:
        """The code and what it means, without any secret."""
        return f"{self.code} {_LATER.get(self.code) or _NEVER.get(self.code) or self.words}".rstrip()

    def error(self) -> DeliveryError:
        """Return what a code other than 0 means for the part that was sent."""
        if self.code == TOKEN_EXPIRED:
            return RetryLater(f"{self.code} a fresh tenant token is refused")
        if self.code in _LATER or self.status == HTTPStatus.TOO_MANY_REQUESTS:
            return RetryLater(
                self.reason,
                after_s=self.after_s,
                outcome_unknown=self.code in _SENT_PERHAPS,
                chat_only=self.code in _CHAT_ONLY,
            )
        if self.status >= HTTPStatus.INTERNAL_SERVER_ERROR and self.code not in _NEVER:
            return RetryLater(
                f"HTTP {self.status}: {self.reason}",
                after_s=self.after_s,
                outcome_unknown=self.status != _UNAVAILABLE,
            )
        return Undeliverable(self.reason)


class TenantToken:
    """The app's token: asked for by one caller for all, renewed early while the old one still works."""

    def __init__(self, fetch: Callable[[], Awaitable[tuple[str, float]]], clock: Callable[[], float]) -> None:
        self._fetch = fetch
        self._clock = clock
        self._value = ""
        self._refresh_at = float("-inf")
        self._expires_at = float("-inf")
        self._ask_again_at = float("-inf")
        self._problem = "no tenant token yet"
        self._task: asyncio.Task[None] | None = None

    @property
    def value(self) -> str:
        """The last token, ``""`` before the first."""
        return self._value

    async def get(self) -> str:
        """Return a token that is valid by our clock. Raises RetryLater; nothing was sent then."""
        now = self._clock()
        if now < self._refresh_at:
            return self._value
        if self._task is None and now >= self._ask_again_at:
            self._task = asyncio.get_running_loop().create_task(self._renew())
        if now < self._expires_at:
            return self._value
        if self._task is not None:
            await asyncio.shield(self._task)
        if self._clock() < self._expires_at:
            return self._value
        raise RetryLater(self._problem)

    def drop(self, value: str) -> None:
        """Forget a token the platform has refused, unless it was replaced meanwhile."""
        if value == self._value:
            self._refresh_at = self._expires_at = float("-inf")

    async def close(self) -> None:
        """Stop a renewal that runs."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _renew(self) -> None:
        try:
            value, lifetime_s = await self._fetch()
        except DeliveryError as error:
            self._problem = f"no tenant token: {error.reason}"
            self._ask_again_at = self._clock() + _ASK_AGAIN_S
        else:
            now = self._clock()
            self._value = value
            self._expires_at = now + lifetime_s
            self._refresh_at = now + max(lifetime_s - _REFRESH_BEFORE_S, lifetime_s / 2)
        finally:
            self._task = None


class FeishuClient:
    """Calls one app's API. Opens its session at the first call; ``close`` ends it.

    Raises ConfigError for a proxy or file of certificates that cannot be used.
    """

    def __init__(
        self,
        *,
        base_url: str,
        app_id: str,
        app_secrets: Sequence[str],
        network: NetworkSettings,
        clock: Callable[[], float],
        hidden: Sequence[str] = (),
    ) -> None:
        self._base_url = base_url
        self._app_id = app_id
        self._app_secrets = tuple(app_secrets) or ("",)
        self._hidden = (*app_secrets, *hidden)
        self._proxy = proxy_for(base_url, network)
        self._tls = ssl_context(network)
        self._session: aiohttp.ClientSession | None = None
        self._token = TenantToken(self._fetch_token, clock)

    async def call(self, method: str, path: str, body: bytes | None = None) -> Answer:
        """Make one call with the tenant token, a second one if the platform wants a newer token.

        Raises RetryLater or Undeliverable where there is no answer of the platform's to judge.
        """
        token = await self._token.get()
        answer = await self._exchange(method, path, body, token)
        if answer.code == TOKEN_EXPIRED:
            self._token.drop(token)
            answer = await self._exchange(method, path, body, await self._token.get())
        return answer

    async def close(self) -> None:
        """End the session and what runs in it."""
        await self._token.close()
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _open(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self._tls),
            headers={"Content-Type": "application/json; charset=utf-8"},
            timeout=aiohttp.ClientTimeout(total=_TOTAL_S, sock_connect=_CONNECT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def _fetch_token(self) -> tuple[str, float]:
        problem = ""
        for secret in self._app_secrets:
            body = orjson.dumps({"app_id": self._app_id, "app_secret": secret})
            answer = await self._exchange("POST", TOKEN_PATH, body, None)
            token = answer.body.get("tenant_access_token")
            if answer.code == 0 and isinstance(token, str) and token.isascii() and token.isprintable():
                return token, _seconds(answer.body.get("expire"), default=_MAX_WAIT_S)
            problem = answer.reason if answer.code else "the answer holds no token"
        raise RetryLater(problem)

    async def _exchange(self, method: str, path: str, body: bytes | None, token: str | None) -> Answer:
        if self._session is None:
            self._session = self._open()
        try:
            async with self._session.request(
                method,
                self._base_url + path,
                data=body,
                headers=None if token is None else {"Authorization": f"Bearer {token}"},
                proxy=self._proxy,
                allow_redirects=False,
            ) as response:
                return self._read(response.status, response.headers, await response.read())
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            # Refused, no such host, no TLS: the request was not sent.
            raise RetryLater(f"no connection: {type(error).__name__}") from None
        except aiohttp.ClientHttpProxyError as error:
            raise RetryLater(f"the proxy refuses: HTTP {error.status}") from None
        except TimeoutError:
            raise RetryLater("no answer in time", outcome_unknown=True) from None
        except (aiohttp.ClientError, OSError) as error:
            raise RetryLater(f"connection broke: {type(error).__name__}", outcome_unknown=True) from None

    def _read(self, status: int, headers: Any, raw: bytes) -> Answer:
        after_s = _wait(headers.get("x-ogw-ratelimit-reset") or headers.get("Retry-After"))
        try:
            body = orjson.loads(raw)
        except ValueError:
            body = None
        code = body.get("code") if isinstance(body, dict) else None
        if isinstance(code, int) and not isinstance(code, bool) and (code or status in _OK_STATUSES):
            return Answer(status, code, self._clean(body.get("msg")), body, after_s)
        # Not the platform's words: a gateway, a proxy or an error page in front of it.
        reason = f"HTTP {status} without a readable answer"
        if status in _TOO_LARGE:
            raise Undeliverable(reason)
        unknown = status in _OK_STATUSES or (
            status >= HTTPStatus.INTERNAL_SERVER_ERROR and status != _UNAVAILABLE
        )
        raise RetryLater(reason, after_s=after_s, outcome_unknown=unknown)

    def _clean(self, words: object) -> str:
        """Return the platform's words short, printable and without any secret of ours."""
        if not isinstance(words, str):
            return ""
        for secret in (*self._hidden, self._token.value):
            if secret:
                words = words.replace(secret, "***")
        return "".join(c if c.isprintable() else " " for c in words[:_MAX_WORDS])


def _seconds(value: object, *, default: float) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf"):
        return float(value)
    return default


def _wait(header: str | None) -> float | None:
    """Read a number of seconds, at most an hour; anything else is no advice."""
    if header is None or not header.isascii():
        return None
    try:
        seconds = float(header)
    except ValueError:
        return None
    return min(seconds, _MAX_WAIT_S) if seconds >= 0 else None
