"""Pictures and files of OneBot's people: from the address QQ names, else out of the hands of the client itself.

Nothing is read from a path, and no address of a private network is asked, the client's own API included: whoever can
have an address written into a message could make calls there. Sources: the OneBot 11 standard, "api" (``get_msg``,
``get_image``); NapCat's and go-cqhttp's additions (``get_file``, ``get_group_file_url``, ``base64``).
"""

from __future__ import annotations

import asyncio
import base64
from typing import TYPE_CHECKING, Any, Final, Protocol

from yarl import URL

from feishu_bot.errors import Undeliverable
from feishu_bot.model import ChatType
from feishu_bot.platforms.download import download
from feishu_bot.platforms.onebot_content import is_address, number_or_text, read_message, text_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from feishu_bot.config import NetworkSettings
    from feishu_bot.model import Attachment, InboundMessage
    from feishu_bot.platforms.onebot_api import Answer

_TOTAL_S: Final = 60.0  # of all ways together
_BASE64: Final = "base64://"
_MORE: Final = 65536  # of an answer, beside the file in it


class Call(Protocol):
    """Makes an API call as the bot that was written to. Raises RetryLater or Undeliverable without an answer."""

    async def __call__(self, action: str, params: dict[str, Any], *, max_bytes: int) -> Answer: ...


async def fetch(
    call: Call,
    message: InboundMessage,
    attachment: Attachment,
    *,
    max_bytes: int,
    network: NetworkSettings | None,
) -> bytes:
    """Return a picture or a file of a message. Raises RetryLater or Undeliverable."""
    finder = _Finder(call, message, attachment, max_bytes, network)
    try:
        async with asyncio.timeout(_TOTAL_S):
            return await finder.find()
    except TimeoutError:
        raise Undeliverable("no answer in time") from None


class _Finder:
    """Looks for one attachment, one way after the other."""

    def __init__(
        self,
        call: Call,
        message: InboundMessage,
        attachment: Attachment,
        max_bytes: int,
        network: NetworkSettings | None,
    ) -> None:
        self._call = call
        self._message = message
        self._attachment = attachment
        self._max_bytes = max_bytes
        self._network = network
        self._refused: Undeliverable = Undeliverable("the client gives no such file")

    async def find(self) -> bytes:
        key = self._attachment.key
        if is_address(key):
            if (found := await self._download(key)) is not None:
                return found
            # QQ's addresses are good for some hours. The client names new ones, and keeps what it has fetched.
            address, key = await self._told_again()
            if (
                address not in {"", self._attachment.key}
                and (found := await self._download(address)) is not None
            ):
                return found
        for action, params in self._ways(key) if key else ():
            answer = await self._call(action, params, max_bytes=self._max_bytes * 4 // 3 + _MORE)
            if answer.ok:
                found = await self._taken(answer)
                if found is not None:
                    return found
            elif not isinstance(error := answer.error(), Undeliverable):
                raise error
        raise self._refused

    async def _download(self, address: str) -> bytes | None:
        """Return what lies at a public address, None where nothing can be had of it."""
        try:
            url = URL(address)
            if url.scheme == "http" and url.explicit_port is None:
                address = str(url.with_scheme("https"))  # QQ's servers speak both
            return await download(address, max_bytes=self._max_bytes, network=self._network)
        except Undeliverable as error:
            self._refused = error
        except ValueError:
            self._refused = Undeliverable("no address that can be fetched")
        return None

    async def _told_again(self) -> tuple[str, str]:
        """Return the address and the id of the attachment, as the client tells them now; ``""`` for none."""
        message_id = self._message.message_id
        if not message_id:
            return "", ""
        answer = await self._call("get_msg", {"message_id": number_or_text(message_id)}, max_bytes=_MORE * 64)
        if not answer.ok:
            return "", ""
        content = read_message(answer.field("message"), text_of(self._message.extra.get("self_id")))
        place = self._message.attachments.index(self._attachment)
        if place >= len(content.attachments) or content.attachments[place].kind != self._attachment.kind:
            return "", ""
        address = content.attachments[place].key
        return address if is_address(address) else "", content.ids[place]

    def _ways(self, file_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
        if self._attachment.kind == "image":
            yield "get_image", {"file": file_id, "file_id": file_id}
        elif self._message.chat_type is ChatType.GROUP:
            group = number_or_text(self._message.chat_id)
            yield "get_group_file_url", {"group_id": group, "file_id": file_id}
        else:
            user = number_or_text(self._message.sender_id)
            yield "get_private_file_url", {"user_id": user, "file_id": file_id}
        yield "get_file", {"file": file_id, "file_id": file_id}

    async def _taken(self, answer: Answer) -> bytes | None:
        """Return the file that an answer holds or names. A path in it says nothing to us."""
        held, named = answer.field("base64"), text_of(answer.field("file"))
        if not held and named.startswith(_BASE64):
            held = named
        if isinstance(held, str) and held:
            try:
                data = base64.b64decode(held.removeprefix(_BASE64), validate=True)
            except ValueError:
                self._refused = Undeliverable("the client's answer holds no file")
                return None
            if len(data) > self._max_bytes:
                raise Undeliverable(f"larger than {self._max_bytes} bytes")
            return data
        address = text_of(answer.field("url"))
        return await self._download(address) if is_address(address) else None
