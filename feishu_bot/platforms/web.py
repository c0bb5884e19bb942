"""The browser chat and scripts: questions come through ``POST /chat``, answers are read from the record."""

from __future__ import annotations

from typing import Any, ClassVar

from feishu_bot.config import PlatformSettings
from feishu_bot.errors import BadPayload
from feishu_bot.platforms.base import Platform, Received, WebhookRequest


class WebSettings(PlatformSettings):
    """Settings of the browser chat."""

    builtin: ClassVar[dict[str, Any]] = {"enabled": True}


class Web(Platform):
    """Has no webhook and sends nothing: the asker waits at the door, or comes back for the answer."""

    name = "web"
    settings_type = WebSettings
    pull = True

    def receive(self, request: WebhookRequest) -> Received:  # noqa: ARG002  # the platform's signature
        raise BadPayload("the web platform has no webhook")

    async def send(self, outgoing: Any) -> str | None:  # noqa: ARG002  # the platform's signature
        return None
