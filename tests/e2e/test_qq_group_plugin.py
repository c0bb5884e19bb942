"""The plugin that comes with the server for QQ groups: who may do what to whom."""

from __future__ import annotations

import pytest

from feishu_bot.testing.onebot import FakeOneBot
from tests.e2e.bots import ROOT, configuration, until

TOKEN = "token-of-the-tests"
ADMIN, MEMBER = 20001, 20002


@pytest.fixture
async def qq():
    async with FakeOneBot(access_token=TOKEN) as fake:
        yield fake


@pytest.fixture
async def group(bots, qq, sqlite_url):
    """Say something to the bot in the group; return its answer and the calls that it has made."""
    account = {"enabled": True, "access_token": TOKEN, "api_url": None}
    plugins = {"directory": str(ROOT / "plugins"), "enabled": ["qq_group"]}
    chat = {"admins": [f"onebot:{ADMIN}"]}
    config = configuration(sqlite_url, platforms={"onebot": account}, plugins=plugins, chat=chat)
    bot = await bots.start(config)
    await qq.connect(f"{bot.url}/ws/onebot")

    async def say(words, *, user=ADMIN, **more):
        before, made = len(qq.texts()), len(qq.calls)
        await qq.say(words, user_id=user, **({"group_id": 30003, "at": True} | more))
        await until(lambda: len(qq.texts()) > before, "an answer")
        calls = [(action, params) for _, action, params in qq.calls[made:]]
        return qq.texts()[-1], [call for call in calls if not call[0].startswith(("send_", "get_"))]

    return say


def at(user):
    return {"type": "at", "data": {"qq": str(user)}}


def words(text):
    return {"type": "text", "data": {"text": text}}


async def test_a_mention_says_who_is_meant_and_the_number_behind_it_for_how_long(group):
    said, calls = await group([words(" /mute "), at(MEMBER), words(" 60")])
    assert said == f"{MEMBER} is silent for 60 minute(s)."
    assert calls == [("set_group_ban", {"user_id": MEMBER, "group_id": 30003, "duration": 3600})]


async def test_the_mention_of_the_bot_itself_names_nobody(group):
    said, calls = await group("/kick")
    assert said.startswith("Please mention whom you mean")
    assert calls == []
    said, calls = await group(f"/kick {MEMBER}")
    assert said == f"{MEMBER} was removed from the group."
    assert calls == [("set_group_kick", {"user_id": MEMBER, "group_id": 30003, "reject_add_request": False})]


async def test_members_may_poke_but_silence_and_remove_nobody(group):
    for command in (f"/mute {ADMIN}", f"/unmute {ADMIN}", f"/kick {ADMIN}"):
        said, calls = await group(command, user=MEMBER)
        assert (said, calls) == ("Only administrators may use this command.", [])
    said, calls = await group(f"/poke {ADMIN}", user=MEMBER)
    assert (said, calls) == (f"Poked {ADMIN}.", [("group_poke", {"user_id": ADMIN, "group_id": 30003})])
    assert (await group("/groupinfo", user=MEMBER))[0] == "team (30003): 3 of 200 members"


async def test_what_makes_no_sense_is_said_and_not_done(group):
    for minutes in ("0", "-1", "999999999999", "x"):
        said, calls = await group(f"/mute {MEMBER} {minutes}")
        assert (said, calls) == ("The minutes must be a whole number from 1 to 43200.", [])
    said, calls = await group(f"/mute {MEMBER}", group_id=None, at=False)
    assert (said, calls) == ("This command works in groups only.", [])
