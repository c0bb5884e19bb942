"""Token counts by tiktoken without any network: the ranks lie packed in ``ranks/``.

tiktoken itself downloads its ranks at first use, without a time-out; here an ``Encoding`` is built from our own
copy. Text is only ever encoded as ordinary text: what a user writes is never a control token.
"""

from __future__ import annotations

import asyncio
import lzma
import threading
from functools import lru_cache
from importlib.resources import files
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import tiktoken
from tiktoken.model import encoding_name_for_model

if TYPE_CHECKING:
    from collections.abc import Collection

DEFAULT_ENCODING: Final = "o200k_base"

# OpenAI's accounting of a chat prompt: each message costs three tokens of framing and one for its role, and
# the answer is primed with three more ("How to count tokens with tiktoken", OpenAI cookbook).
TOKENS_PER_MESSAGE: Final = 4
TOKENS_OF_PRIMING: Final = 3

# tiktoken's o200k_base panics on a million blanks in a row, and the panic is a BaseException. Pieces of this
# size stay far below, and where they meet the count grows by 0.02 % at most.
_PIECE_CHARS: Final = 20_000

# "Yes", "/help me", a greeting, what an echo says: a lookup takes a hundredth of the time of a count. Half a megabyte.
_REMEMBERED_CHARS: Final = 100

_COUNTED_AT_ONCE: Final = 4000  # characters: half a millisecond, and at most two of a single letter

# How each encoding splits text before merging, from tiktoken_ext.openai_public.
_PATTERNS: Final = MappingProxyType({
    "cl100k_base": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s""",
    "o200k_base": (
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
        r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
        r"""|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
    ),
})  # fmt: skip
_SIZES: Final = MappingProxyType({"cl100k_base": 100_256, "o200k_base": 199_998})


def unpack_ranks(name: str) -> dict[bytes, int]:
    """Return the ranks of an encoding: token bytes -> rank. About 0.1 s and, while it lives, 25 MB."""
    packed = files("feishu_bot.ai.ranks").joinpath(f"{name}.ranks.xz").read_bytes()
    data = lzma.decompress(packed)
    size = _SIZES[name]
    ranks: dict[bytes, int] = {}
    start = size
    for rank, length in enumerate(data[:size]):
        ranks[data[start : start + length]] = rank
        start += length
    return ranks


class _Encoder:
    """One encoding, loaded once by whichever thread needs it first."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._encoding: tiktoken.Encoding | None = None

    def load(self) -> tiktoken.Encoding:
        encoding = self._encoding
        if encoding is None:
            with self._lock:
                encoding = self._encoding
                if encoding is None:
                    encoding = self._encoding = self._build()
        return encoding

    def _build(self) -> tiktoken.Encoding:
        encoding = tiktoken.Encoding(
            self._name,
            pat_str=_PATTERNS[self._name],
            mergeable_ranks=unpack_ranks(self._name),
            special_tokens={},
        )
        # The Rust side has its own copy; this one is read by pickling only and costs 25 MB.
        encoding._mergeable_ranks = {}  # noqa: SLF001 - there is no public way to give it back
        return encoding

    def count(self, text: str) -> int:
        encode = (self._encoding or self.load()).encode_ordinary
        if len(text) <= _PIECE_CHARS:
            return len(encode(text))
        return sum(len(encode(text[at : at + _PIECE_CHARS])) for at in range(0, len(text), _PIECE_CHARS))


# Immutable data, read lazily: as constant as the patterns above, only too large to read at import.
_ENCODERS: Final = MappingProxyType({name: _Encoder(name) for name in _PATTERNS})


@lru_cache(maxsize=1024)
def _encoding_of(model: str) -> tuple[str, bool]:
    """Return the encoding to count ``model`` by, and whether it is the model's own."""
    if model == "echo":
        return DEFAULT_ENCODING, True
    try:
        name = encoding_name_for_model(model.removeprefix("openai:"))
    except KeyError:
        return DEFAULT_ENCODING, False
    return (name, True) if name in _ENCODERS else (DEFAULT_ENCODING, False)


@lru_cache(maxsize=1024)
def _encoder_of(model: str) -> _Encoder:
    return _ENCODERS[_encoding_of(model)[0]]


def count_tokens(text: str, model: str) -> int:
    """Return how many tokens ``text`` is for ``model``, counted by o200k_base where its encoding is unknown.

    ``model`` is a name as in the configuration (``openai:gpt-4o``, ``deepseek:deepseek-chat``, ``echo``).
    Linear in the text's length: about 1 µs for a short message, 0.15 s for a megabyte of one letter. Never
    raises for any text; lone surrogates count as U+FFFD. A short text that was counted lately is not counted again.
    """
    if len(text) <= _REMEMBERED_CHARS:
        return _count_short(text, model)
    return _encoder_of(model).count(text)


@lru_cache(maxsize=2048)
def _count_short(text: str, model: str) -> int:
    return _encoder_of(model).count(text)


async def count_aside(text: str, model: str) -> int:
    """Count without holding up the event loop: a long text is counted in a thread (encoding frees the interpreter)."""
    if len(text) <= _COUNTED_AT_ONCE:
        return count_tokens(text, model)
    return await asyncio.to_thread(count_tokens, text, model)


def encoding_name(model: str) -> str:
    """Return the encoding that ``model`` is counted by: ``o200k_base`` or ``cl100k_base``."""
    return _encoding_of(model)[0]


def is_exact(model: str) -> bool:
    """Return whether counts for ``model`` are its own; if not, a reservation is widened by ``budget_margin``."""
    return _encoding_of(model)[1]


def warm(model: str) -> None:
    """Load the encoding of ``model`` now, about 0.2 s, so that no message waits for it. Call before listening."""
    _encoder_of(model).load()


def prompt_tokens(counts: Collection[int]) -> int:
    """Return what a prompt costs whose messages have these token counts, with the framing of each message."""
    return sum(counts) + TOKENS_PER_MESSAGE * len(counts) + TOKENS_OF_PRIMING
