"""What Feishu's requests are sealed with: AES under the Encrypt Key, and the instant that was signed with it.

Source: open.feishu.cn, "Configure Encrypt Key".
"""

from __future__ import annotations

import base64
import binascii
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.modes import CBC

from feishu_bot.errors import BadPayload

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.algorithms import AES

_BLOCK = 16  # bytes of an AES block
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")
_WRITTEN_TIME = re.compile(  # time.Time.String() of Go, and ISO 8601
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[ T]([0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.[0-9]+)? ?([+-][0-9]{2}:?[0-9]{2}|Z)"
)


def header_bytes(text: str) -> bytes:
    """Return a header's bytes; never raises, whatever the peer sent."""
    return text.encode("utf-8", "surrogatepass")


def decrypted(outer: dict[str, Any], cipher: AES) -> bytes:
    """Return the plain text of ``{"encrypt": base64(iv + AES-256-CBC)}``; raise BadPayload if there is none."""
    encrypted = outer.get("encrypt")
    if not isinstance(encrypted, str):
        raise BadPayload("not encrypted, though an encrypt_key is configured")
    try:
        raw = base64.b64decode(encrypted, validate=True)
    except (binascii.Error, ValueError):
        raise BadPayload("not base64") from None
    if len(raw) < 2 * _BLOCK or len(raw) % _BLOCK:
        raise BadPayload("not whole blocks")
    decryptor = Cipher(cipher, CBC(raw[:_BLOCK])).decryptor()
    padded = decryptor.update(raw[_BLOCK:]) + decryptor.finalize()
    size = padded[-1]
    if not 1 <= size <= _BLOCK or padded[-size:] != bytes((size,)) * size:
        raise BadPayload("cannot be decrypted")
    return padded[:-size]


def instant_of(timestamp: str) -> float | None:
    """Return the Unix seconds of a signed timestamp, None where none can be read without guessing.

    Card callbacks have been seen with Go's written time. A zone that is only a name (CST) names several.
    """
    if _NUMBER.fullmatch(timestamp):
        return float(timestamp)
    match = _WRITTEN_TIME.match(timestamp)
    if match is None:
        return None
    try:
        written = datetime.fromisoformat(f"{match[1]}T{match[2]}{match[3]}")
        return written.astimezone(UTC).timestamp()
    except (ValueError, OverflowError):
        return None
