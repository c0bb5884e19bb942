"""What plugins do by the clock, and what they say unasked."""

from __future__ import annotations

import re

from sqlalchemy import update

from feishu_bot.store import schema
from tests.e2e.bots import ROOT, configuration, until

DAY_MS = 24 * 3600 * 1000


def documented() -> str:
    """Return the example of the documentation."""
    text = (ROOT / "docs" / "plugins.md").read_text()
    (found,) = re.findall(r"^```python\n([^`]*?Job\(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return str(found)


def with_plugin(db_url, feishu, folder, source):
    folder.mkdir()
    (folder / "ours.py").write_text(source)
    plugins = {"directory": str(folder), "enabled": ["ours"], "settings": {"ours": {"chat": "oc_team"}}}
    return configuration(db_url, feishu=feishu, plugins=plugins)


async def test_the_documented_job_speaks_in_the_group_once_for_what_was_missed(
    bots, people, feishu, db_url, record, tmp_path
):
    config = with_plugin(db_url, feishu, tmp_path / "plugins", documented())
    bot = await bots.start(config)
    job = "plugin ours.morning"
    await until(lambda: record.count(schema.job_runs, job=job), "the job's first row")
    assert feishu.texts() == []
    assert await bot.stop() == 0
    runs = schema.job_runs
    record.execute(update(runs).where(runs.c.job == job).values(fire_time=runs.c.fire_time - 7 * DAY_MS))
    for _ in range(2):
        bot = await bots.start(config)
        assert await people.replies(1, "oc_team") == ["Good morning!"]
        await record.settled()
        assert await bot.stop() == 0
    assert len(feishu.texts()) == 1
    newest = max(record.rows(schema.job_runs, job=job), key=lambda row: row.fire_time)
    assert newest.finished_at is not None
    assert newest.error is None


async def test_what_a_plugin_says_unasked_is_sent_once_by_its_key_and_to_whom_it_says(
    bots, people, feishu, sqlite_url, sqlite_record, tmp_path
):
    source = """
from feishu_bot.errors import Undeliverable
from feishu_bot.hooks import Command


async def tell(context, args):
    bot = context.bot
    for _ in range(2):
        await bot.send("feishu", "to the group", chat="oc_team", key="k")
        await bot.send("feishu", "to ann", user="feishu:private:ou_ann", key="p")
    errors = []
    for how in ({}, {"chat": "c", "user": "u"}, {"user": "qq:u"}):
        try:
            await bot.send("feishu", "x", **how)
        except ValueError:
            errors.append("value")
    for where, text in (("nowhere", "x"), ("web", "x"), ("feishu", " ")):
        try:
            await bot.send(where, text, chat="c")
        except Undeliverable:
            errors.append("undeliverable")
    return " ".join(errors)


async def commands(bot):
    return [Command("tell", tell)]
"""
    bot = await bots.start(with_plugin(sqlite_url, feishu, tmp_path / "plugins", source))
    await people.say(bot, "/tell")
    expected = "value value value undeliverable undeliverable undeliverable"
    await until(lambda: len(feishu.texts()) == 3, "three messages")
    await sqlite_record.settled()
    assert sorted(feishu.texts()) == sorted(["to the group", "to ann", expected])
    assert await people.replies(1, "oc_team") == ["to the group"]
