"""``POST /send``: a message that answers nobody, through the outbox with its order, retries and dead letters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from feishu_bot.errors import BadPayload
from feishu_bot.model import ChatType, Target, make_key
from feishu_bot.platforms.base import parse_json
from feishu_bot.push import chat_target, person_target, push_rows
from feishu_bot.store import outbox
from feishu_bot.web.errors import error_response, json_response, unavailable
from feishu_bot.web.webhooks import read_body

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aiohttp import web

    from feishu_bot.platforms.base import Platform
    from feishu_bot.store.store import Store

MAX_REQUEST_ID: Final = 200  # characters
_KEYS: Final = frozenset({"platform", "chat_id", "chat_type", "user_key", "text", "request_id"})


class Send:
    """Takes ``{platform, chat_id or user_key, text, request_id?, chat_type?}``; 202 once it is on disk.

    A repeated ``request_id`` is sent once. Whoever calls ``handle`` has seen to it that an administrator asks.
    """

    def __init__(
        self,
        store: Store,
        platforms: Mapping[str, Platform],
        *,
        max_chars: Callable[[], int],
        sent: Callable[[str], None],
    ) -> None:
        self._store = store
        self._platforms = platforms
        self._max_chars = max_chars
        self._sent = sent

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Put a message into the outbox."""
        try:
            order = _read(parse_json(await read_body(request)))
            platform = self._platform(order["platform"])
            target = _target(order)
        except BadPayload as error:
            return error_response(400, error.reason)
        if self._store.problem() is not None:
            return unavailable()
        request_id = order["request_id"] or str(uuid4())
        rows = push_rows(
            order["platform"],
            platform,
            source=make_key("api", order["platform"], request_id),
            target=target,
            text=order["text"],
            max_chars=self._max_chars(),
        )
        await self._store.run(lambda tx: outbox.push(tx, rows))
        self._sent(rows[0]["lane_key"])
        return json_response({"request_id": request_id, "parts": len(rows)}, status=202)

    def _platform(self, account: str) -> Platform:
        platform = self._platforms.get(account)
        if platform is None or platform.pull:
            raise BadPayload("platform: expected the name of an account that is enabled and can send")
        return platform


def _read(data: Any) -> dict[str, Any]:
    """Return the order with all its keys. Raises BadPayload with what is wrong."""
    if not isinstance(data, dict):
        raise BadPayload("expected a JSON object")
    unknown = sorted(data.keys() - _KEYS)
    if unknown:
        raise BadPayload(f"{unknown[0][:40]}: unknown; expected {', '.join(sorted(_KEYS))}")
    order = {key: data.get(key) for key in _KEYS}
    for key, value in order.items():
        if value is not None and (not isinstance(value, str) or not value.strip() or "\0" in value):
            raise BadPayload(f"{key}: expected a text that is not empty")
    for key in ("platform", "text"):
        if order[key] is None:
            raise BadPayload(f"{key}: missing")
    if (order["chat_id"] is None) == (order["user_key"] is None):
        raise BadPayload("expected one of chat_id and user_key")
    if len(order["request_id"] or "") > MAX_REQUEST_ID:
        raise BadPayload(f"request_id: expected a text of 1 to {MAX_REQUEST_ID} characters")
    return order


def _target(order: Mapping[str, Any]) -> Target:
    if order["user_key"] is not None:
        try:
            return person_target(order["platform"], order["user_key"])
        except ValueError as error:
            raise BadPayload(f"user_key: {error}") from None
    try:
        return chat_target(order["chat_id"], ChatType(order["chat_type"] or ChatType.GROUP))
    except ValueError:
        raise BadPayload("chat_type: expected group, channel or private") from None
