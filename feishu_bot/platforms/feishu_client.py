"""Calls to Feishu's open platform: one session, one tenant token, and what each answer means for a retry.

Sources: open.feishu.cn, "Get tenant_access_token", "Send message", "Reply to message" and the general error
codes.
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
    from feishu_bot.platforms.http_pool import Response

TOKEN_PATH = "/open-apis/auth/v3/tenant_access_token/internal"  # noqa: S105 - a path, no secret

TOKEN_EXPIRED = 99991663
REPLY_GONE = frozenset({230011, 230110})  # the message to reply to was recalled or deleted
NO_THREADS = 230071  # on a reply: this group has no topics
REACTIONS_REFUSED = frozenset({231002, 99991672, 99991679})  # the app lacks the permission
POST_REFUSED = frozenset({230001, 230025, 230054, 230099})  # as text the same words may pass

_REFRESH_BEFORE_S = 600.0  # from 30 min before its end Feishu gives a new token; both stay valid
_OK_STATUSES = range(200, 300)

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
    234003: "the resource does not belong to the message",
    234037: "the resource is too large",
    234043: "resources of this kind of message cannot be fetched",
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
                outcome_unknown=is_unsure(self.status),
            )
        return Undeliverable(self.reason)


class FeishuClient:
    """Calls one app's API; ``close`` ends its connections.

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
        self._app_id = app_id
        self._app_secrets = tuple(app_secrets) or ("",)
        self._hidden = (*app_secrets, *hidden)
        self._connection = Connection(base_url, network)
        self._token = AccessToken(self._fetch_token, clock, refresh_before_s=_REFRESH_BEFORE_S)

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

    async def download(self, path: str, *, max_bytes: int) -> bytes:
        """Return a resource. Raises RetryLater or Undeliverable, also for one that is larger than ``max_bytes``."""
        token = await self._token.get()
        found = await self._resource(path, token, max_bytes)
        if isinstance(found, Answer) and found.code == TOKEN_EXPIRED:
            self._token.drop(token)
            found = await self._resource(path, await self._token.get(), max_bytes)
        if isinstance(found, Answer):
            raise found.error()
        return found

    async def _resource(self, path: str, token: str, max_bytes: int) -> bytes | Answer:
        authorization = f"Bearer {token}"
        response = await self._connection.call("GET", path, authorization=authorization, max_bytes=max_bytes)
        if response.status not in _OK_STATUSES or _is_refusal(response):
            return self._read(response, expects_code=True)
        if not response.whole:
            raise Undeliverable(f"larger than {max_bytes} bytes")
        return response.body

    async def close(self) -> None:
        """End the session and what runs in it."""
        await self._token.close()
        await self._connection.close()

    async def _fetch_token(self) -> tuple[str, float]:
        problem = ""
        for secret in self._app_secrets:
            body = orjson.dumps({"app_id": self._app_id, "app_secret": secret})
            answer = await self._exchange("POST", TOKEN_PATH, body, None)
            token = answer.body.get("tenant_access_token")
            if answer.code == 0 and isinstance(token, str) and token.isascii() and token.isprintable():
                return token, _seconds(answer.body.get("expire"), default=MAX_WAIT_S)
            problem = answer.reason if answer.code else "the answer holds no token"
        raise RetryLater(problem)

    async def _exchange(self, method: str, path: str, body: bytes | None, token: str | None) -> Answer:
        authorization = None if token is None else f"Bearer {token}"
        return self._read(await self._connection.call(method, path, body, authorization=authorization))

    def _read(self, response: Response, *, expects_code: bool = False) -> Answer:
        status, headers = response.status, response.headers
        after_s = wait_of(headers.get("x-ogw-ratelimit-reset") or headers.get("Retry-After"))
        try:
            answer = orjson.loads(response.body)
        except ValueError:
            answer = None
        code = answer.get("code") if isinstance(answer, dict) else None
        succeeded = status in _OK_STATUSES and not expects_code
        if isinstance(code, int) and not isinstance(code, bool) and (code or succeeded):
            words = words_of(answer.get("msg"), without=(*self._hidden, self._token.value))
            return Answer(status, code, words, answer, after_s)
        raise unreadable(status, after_s)


def _is_refusal(response: Response) -> bool:
    """Say whether what came instead of a resource is the platform's own no, which it may say with HTTP 200."""
    if "json" not in response.headers.get("Content-Type", ""):
        return False
    try:
        answer = orjson.loads(response.body)
    except ValueError:
        return False
    return isinstance(answer, dict) and isinstance(answer.get("code"), int) and "msg" in answer


def _seconds(value: object, *, default: float) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf"):
        return float(value)
    return default
