"""The example plugin: the command ``/hello [NAME]``. Copy it to begin your own; docs/plugins.md has the rest.

Its part of the configuration, ``plugins.settings.hello``, may hold ``greeting``, e.g. ``"Welcome, {name}!"``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from feishu_bot.hooks import Command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from feishu_bot.hooks import Bot, Context

GREETINGS = {"zh": "你好，{name}！", "en": "Hello, {name}!"}


async def commands(bot: Bot) -> Sequence[Command]:  # noqa: ARG001  # the signature is the hook's
    help_texts = {"zh": "打个招呼", "en": "says hello"}
    return [Command("hello", hello, help_texts, aliases=("你好",), usage="[NAME]")]


async def hello(context: Context, args: str) -> str:
    greeting = str(context.bot.settings.get("greeting") or GREETINGS[context.language])
    name = args or context.message.sender_name or context.message.sender_id
    # Not str.format: somebody's name or the operator's text may hold braces.
    return greeting.replace("{name}", name)


async def on_answer(context: Context, answer: str) -> str | None:  # noqa: ARG001  # the signature is the hook's
    """Leave every answer as it is; return a text here to change it."""
    return None
