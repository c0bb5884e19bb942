"""The browser chat and scripts: questions come through ``POST /chat``, answers are read from the record."""

from __future__ import annotations

from base64 import b64decode
from typing import TYPE_CHECKING

from feishu_bot.errors import Undeliverable
from feishu_bot.platforms.base import PullPlatform

if TYPE_CHECKING:
    from feishu_bot.model import Attachment, InboundMessage


class Web(PullPlatform):
    """The asker waits at the door, or comes back for the answer."""

    name = "web"
    fetches = frozenset({"image", "file"})

    async def fetch(self, message: InboundMessage, attachment: Attachment, *, max_bytes: int) -> bytes:
        """Return what came with the question itself, in base64."""
        data = b64decode(message.extra["files"][int(attachment.key)])
        if len(data) > max_bytes:
            raise Undeliverable(f"{attachment.kind}: larger than {max_bytes} bytes")
        return data
