"""Pictures for a model: which models take them, what kind of file they are, and what they cost.

Sources: OpenAI, "Images and vision" (calculating costs); the formats' own headers.
"""

from __future__ import annotations

import math
import struct
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from feishu_bot.ai.chat_model import Image

if TYPE_CHECKING:
    from feishu_bot.ai.chat_model import Detail

_SEES: Final = (
    "gpt-4o", "chatgpt-4o", "gpt-4.1", "gpt-4.5", "gpt-4-turbo", "gpt-5", "o1", "o3", "o4-mini",
    "claude-", "gemini-", "glm-4v", "glm-4.1v", "glm-4.5v", "glm-4.6v", "llava", "gemma3", "qvq",
)  # fmt: skip
_SEES_NOT: Final = ("o1-mini", "o1-preview", "o3-mini", "gpt-4o-audio", "gpt-4o-search")
_SEES_BY_NAME: Final = (
    "-vl",
    "vision",
)  # anywhere in the name: qwen2.5-vl-72b, moonshot-v1-8k-vision-preview

# Tokens of a picture, by the beginning of the model's name; the longest match holds.
_BY_TILES: Final = MappingProxyType({  # of the picture at all, and of each tile of 512 x 512
    "": (85, 170),
    "gpt-4o-mini": (2833, 5667),
    "gpt-5": (70, 140),
    "o1": (75, 150),
    "o3": (75, 150),
})  # fmt: skip
_BY_PATCHES: Final = MappingProxyType({  # of each patch of 32 x 32, whatever the detail
    "gpt-4.1-mini": 1.62,
    "gpt-4.1-nano": 2.46,
    "gpt-5-mini": 1.62,
    "gpt-5-nano": 2.46,
    "o4-mini": 1.72,
})  # fmt: skip
_TILE: Final = 512
_LONGEST: Final = 2048  # a picture is made smaller until its sides are at most so long,
_SHORTEST: Final = 768  # and then until the shorter one is at most so long
_MOST_TILES: Final = 8
_PATCH: Final = 32
_MOST_PATCHES: Final = 1536

_SIZED_BY: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # JPEG segments that tell the size
_ALONE: Final = frozenset({0x01, *range(0xD0, 0xDA)})  # JPEG markers without a length


def takes_images(model: str, configured: bool | None) -> bool:  # noqa: FBT001  # the setting's own value
    """Return whether ``model`` is given users' pictures: as configured, else if it is known to take them."""
    if model == "echo":
        return False
    if configured is not None:
        return configured
    name = _own_name(model)
    if name.startswith(_SEES_NOT):
        return False
    return name.startswith(_SEES) or any(part in name for part in _SEES_BY_NAME)


def image_tokens(model: str, width: int, height: int, detail: Detail) -> int:
    """Return what a picture of so many pixels costs; by OpenAI's rule also where the provider has another."""
    name = _own_name(model)
    patches = _longest(name, _BY_PATCHES)
    if patches is not None:
        count = math.ceil(width / _PATCH) * math.ceil(height / _PATCH)
        return math.ceil(min(count, _MOST_PATCHES) * _BY_PATCHES[patches])
    base, tile = _BY_TILES[_longest(name, _BY_TILES) or ""]
    if detail == "low":
        return base
    shrink = min(1.0, _LONGEST / max(width, height))
    width, height = max(1, round(width * shrink)), max(1, round(height * shrink))
    shrink = min(1.0, _SHORTEST / min(width, height))
    width, height = max(1, round(width * shrink)), max(1, round(height * shrink))
    return base + tile * math.ceil(width / _TILE) * math.ceil(height / _TILE)


def most_image_tokens(model: str, detail: Detail) -> int:
    """Return what the dearest picture costs: what is reserved while it is not at hand yet."""
    name = _own_name(model)
    patches = _longest(name, _BY_PATCHES)
    if patches is not None:
        return math.ceil(_MOST_PATCHES * _BY_PATCHES[patches])
    base, tile = _BY_TILES[_longest(name, _BY_TILES) or ""]
    return base if detail == "low" else base + tile * _MOST_TILES


def read_image(data: bytes, detail: Detail) -> Image:
    """Return the picture that a file is: PNG, JPEG, GIF or WebP, by its bytes. ValueError for anything else."""
    try:
        kind, width, height = _header(data)
    except (struct.error, IndexError):
        raise ValueError("a picture that is cut off") from None
    if not (width and height):
        raise ValueError("a picture without a size")
    return Image(data, f"image/{kind}", width, height, detail)


def _own_name(model: str) -> str:
    """Return the provider's own name of a model, in lower case and without whoever passes it on."""
    return model.partition(":")[2].rpartition("/")[2].lower() if ":" in model else model.lower()


def _longest(name: str, table: MappingProxyType[str, object] | MappingProxyType[str, float]) -> str | None:
    return max((prefix for prefix in table if name.startswith(prefix)), key=len, default=None)


def _header(data: bytes) -> tuple[str, int, int]:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return ("png", *struct.unpack(">II", data[16:24]))
    if data[:6] in {b"GIF87a", b"GIF89a"}:
        return ("gif", *struct.unpack("<HH", data[6:10]))
    if data[:3] == b"\xff\xd8\xff":
        return ("jpeg", *_jpeg_size(data))
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ("webp", *_webp_size(data))
    raise ValueError("no picture of a known kind")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    at = 2
    while data[at] == 0xFF:  # noqa: PLR2004  # what every marker begins with
        marker = data[at + 1]
        if marker in _SIZED_BY:
            height, width = struct.unpack(">HH", data[at + 5 : at + 9])
            return width, height
        if marker == 0xFF:  # noqa: PLR2004  # padding
            at += 1
        elif marker in _ALONE:
            at += 2
        else:
            at += 2 + max(2, *struct.unpack(">H", data[at + 2 : at + 4]))
    raise ValueError("a picture without a size")


def _webp_size(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        return _three(data[24:27]) + 1, _three(data[27:30]) + 1
    if kind == b"VP8L":
        (bits,) = struct.unpack("<I", data[21:25])
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF
    raise ValueError("a picture without a size")


def _three(data: bytes) -> int:
    if len(data) < 3:  # noqa: PLR2004  # bytes of the number
        raise IndexError
    return int.from_bytes(data, "little")
