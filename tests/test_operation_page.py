"""The night-time page names commands, options, keys and metrics that exist."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from feishu_bot.cli import bot
from feishu_bot.config import BotSettings
from feishu_bot.intake import IntakeCounts
from feishu_bot.metrics import Metrics

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "operation.md").read_text()
COMMANDS = sorted({line.strip() for line in re.findall(r"bot\.py ([a-z][^`|\n#&]*)", PAGE)})


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_exists_with_its_options(line):
    words = line.split()
    command: click.Command = bot
    while isinstance(command, click.Group) and words and words[0] in command.commands:
        command = command.commands[words.pop(0)]
    assert command is not bot, line
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_every_key_exists():
    for path in re.findall(r"`((?:server|chat|ai|schedule)\.[a-z_.]+[a-z])`", PAGE):
        part = BotSettings()
        for name in path.split("."):
            part = getattr(part, name)


def test_every_metric_exists():
    source = "".join((ROOT / "feishu_bot" / f"{name}.py").read_text() for name in ("app", "metrics"))
    page = {line for m in Metrics(IntakeCounts(), dict).registry.collect() for line in [m.name]}
    for name in set(re.findall(r"`feishu_bot_([a-z_]+?)(?:_total)?(?:\{[^`]*)?`", PAGE)):
        assert f"feishu_bot_{name}" in page or name in source, name
