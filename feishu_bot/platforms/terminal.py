"""The operator's terminal: questions come from ``bot.py chat``, answers are read from the record."""

from __future__ import annotations

from feishu_bot.platforms.base import PullPlatform


class Terminal(PullPlatform):
    """The asker waits at the terminal."""

    name = "terminal"
