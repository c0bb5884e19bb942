"""The operator's terminal: questions come from ``bot.py chat``, answers are read from the record."""

from __future__ import annotations

from typing import Any, ClassVar

from feishu_bot.config import PlatformSettings
from feishu_bot.errors import BadPayload
from feishu_bot.platforms.base import Platform, Received, WebhookRequest


class TerminalSettings(PlatformSettings):
    """Settings of the terminal."""

    builtin: ClassVar[dict[str, Any]] = {"enabled": True}


class Terminal(Platform):
    """Has no webhook and sends nothing: the asker waits at the terminal."""

    name = "terminal"
    settings_type = TerminalSettings
    pull = True

    def receive(self, request: WebhookRequest) -> Received:  # noqa: ARG002  # the platform's signature
        raise BadPayload("the terminal has no webhook")

    async def send(self, outgoing: Any) -> str | None:  # noqa: ARG002  # the platform's signature
        return None
