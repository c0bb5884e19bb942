"""The browser chat and scripts: questions come through ``POST /chat``, answers are read from the record."""

from __future__ import annotations

from base64 import b64decode
from typing import TYPE_CHECKING, Any, ClassVar

from feishu_bot.config import PlatformSettings
from feishu_bot.errors import BadPayload, Undeliverable
from feishu_bot.platforms.base import Platform, Received, WebhookRequest

if TYPE_CHECKING:
    from feishu_bot.model import Attachment, InboundMessage


class WebSettings(PlatformSettings):
    """Settings of the browser chat."""

    builtin: ClassVar[dict[str, Any]] = {"enabled": True}


class Web(Platform):
    """Has no webhook and sends nothing: the asker waits at the door, or comes back for the answer."""

    name = "web"
    settings_type = WebSettings
    pull = True
    fetches = frozenset({"image", "file"})

    def receive(self, request: WebhookRequest) -> Received:  # noqa: ARG002  # the platform's signature
        raise BadPayload("the web platform has no webhook")

    async def send(self, outgoing: Any) -> str | None:  # noqa: ARG002  # the platform's signature
        return None

    async def fetch(self, message: InboundMessage, attachment: Attachment, *, max_bytes: int) -> bytes:
        """Return what came with the question itself, in base64."""
        data = b64decode(message.extra["files"][int(attachment.key)])
        if len(data) > max_bytes:
            raise Undeliverable(f"{attachment.kind}: larger than {max_bytes} bytes")
        return data
