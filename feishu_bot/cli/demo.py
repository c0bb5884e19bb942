"""``demo``: the bot tried out without an account anywhere."""

from __future__ import annotations

import asyncio

import click

from feishu_bot import log
from feishu_bot.cli.shared import load_config
from feishu_bot.config.settings import LogSettings
from feishu_bot.errors import BotError

_PLATFORMS = ("feishu", "qq", "onebot")


@click.command()
@click.option(
    "--platform",
    type=click.Choice([*_PLATFORMS, "all"]),
    default="all",
    help="Which fake platform to start. Default: all.",
)
@click.option(
    "--language",
    type=click.Choice(["zh", "en"]),
    help="Of the bot and of what is printed. Default: the configuration's, else zh.",
)
@click.option(
    "--config",
    "config_file",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="Answer by the model of this configuration (its part `ai`). Default: the echo model, no network.",
)
@click.option("--verbose", is_flag=True, help="Show the server's log too.")
def demo(platform: str, language: str | None, config_file: str | None, *, verbose: bool) -> None:
    """Talk to the bot in a Feishu group, a QQ group and a OneBot group, without an account.

    Starts fake platforms and a server of its own on this machine, with a database that is thrown away. Lines are
    read from the terminal or from a pipe. Exit 1 when something said was not answered.

    在本机用假的飞书、QQ 和 OneBot 平台试用机器人，不需要任何账号。
    """
    from feishu_bot.testing.demo import Demo  # noqa: PLC0415  # takes longer than --help

    model, secrets = None, frozenset[str]()
    if config_file is not None:
        loaded = load_config(config_file)
        model, secrets = loaded.settings, loaded.secret_values()
        language = language or model.chat.language
    logging = log.configure(LogSettings(level="INFO" if verbose else "ERROR"), secrets=secrets)
    platforms = _PLATFORMS if platform == "all" else (platform,)
    try:
        if not asyncio.run(Demo(platforms, language=language or "zh", model=model).run()):
            raise BotError("not everything was answered")
    finally:
        logging.close()
