from __future__ import annotations

import pytest

from feishu_bot.commands import BuiltinCommands, CommandTable, ParsedCommand
from feishu_bot.config.settings import ChatSettings
from feishu_bot.hooks import BudgetView, Command, Reply
from feishu_bot.model import ChatType, Scope
from feishu_bot.texts import TEXTS
from tests.chat import PlainBot, context


async def _nothing(_context, _args):
    return ""


def command(name, *aliases, admin_only=False, **help_by_language):
    return Command(name, _nothing, help_by_language, aliases, admin_only=admin_only)


@pytest.fixture
def table():
    commands = [command("help", "帮助"), command("Shout"), command("shutdown", admin_only=True)]
    return CommandTable("/", "en", commands)


async def builtins(**chat):
    return {c.name: c for c in await BuiltinCommands(ChatSettings(**chat)).commands(PlainBot())}


async def say(name, args="", *, language="en", chat=None, **given):
    """Return what the built-in command answers."""
    found = await builtins(**(chat or {}))
    bot = given.pop("bot", None) or PlainBot(language)
    given.setdefault("commands", tuple(found.values()))
    return await found[name].run(context(bot=bot, **given), args)


TURNS = [("user", "one"), ("assistant", "ONE"), ("user", "two"), ("assistant", "TWO")]

# ------------------------------------------------------------------------------------------------- parsing


@pytest.mark.parametrize(
    ("text", "name", "args"),
    [
        ("/help", "help", ""),
        ("  /help \n", "help", ""),
        ("/HELP", "help", ""),
        ("/help@bot", "help", ""),
        ("/help@bot New", "help", "New"),
        ("/Shout  Über  ALLES ", "shout", "Über  ALLES"),
        ("/shout\nline one\nline two", "shout", "line one\nline two"),
        ("／help", "help", ""),
        ("/帮助", "帮助", ""),
        ("／帮助　新对话", "帮助", "新对话"),
        ("/unknown x", "unknown", "x"),
        ("/8ball", "8ball", ""),
    ],
)
def test_a_command_is_the_prefix_with_a_name_right_behind_it(table, text, name, args):
    assert table.parse(text) == ParsedCommand(name, args)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "／",
        "/ help",
        "//help",
        "/@bot",
        "/usr/bin/env python",
        "/help/me",
        "/etc/",
        "https://example.com/help",
        "what does /help do?",
        "/" + "x" * 33,
        "/?",
        "help",
    ],
)
def test_what_could_be_no_command_is_said_to_the_bot(table, text):
    assert table.parse(text) is None


def test_another_prefix_takes_the_place_of_the_slash():
    table = CommandTable("!", "en", [command("help")])
    assert table.parse("!help x") == ParsedCommand("help", "x")
    assert table.parse("！help") == ParsedCommand("help", "")
    assert table.parse("/help") is None


def test_a_command_is_found_by_name_and_alias_in_any_case(table):
    assert table.find("HELP") is table.find("帮助") is table.commands[0]
    assert table.find("shout") is table.commands[1]
    assert table.find("nothing") is None


def test_the_nearest_command_is_named_and_those_of_admins_only_to_admins(table):
    assert table.nearest("halp") == "help"
    assert table.nearest("xyzzy") is None
    assert table.nearest("shutdwn") != "shutdown"
    assert table.nearest("shutdwn", is_admin=True) == "shutdown"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("清除", "清空"),
        ("新会话", "新对话"),
        ("用两", "用量"),
        ("天气", None),
        ("resett", "reset"),
        ("claer", "clear"),
    ],
)
async def test_of_the_built_in_names_the_nearest_is_found_in_both_languages(typed, meant):
    commands = (await builtins()).values()
    assert CommandTable("/", "zh", list(commands)).nearest(typed) == meant


@pytest.mark.parametrize("second", [command("HELP"), command("other", "帮助"), command("other", "Help")])
def test_no_command_takes_the_place_of_another(second):
    with pytest.raises(ValueError, match="is both"):
        CommandTable("/", "en", [command("help", "帮助"), second])


@pytest.mark.parametrize("name", ["", "a b", "/help", "a/b", "-x", "x" * 33, "a@b"])
def test_a_name_that_nobody_could_type_is_no_command(name):
    with pytest.raises(ValueError, match="cannot be a command"):
        command(name)


# ---------------------------------------------------------------------------------------------------- help


async def test_help_lists_every_command_with_usage_and_the_way_to_talk_in_groups():
    text = await say("help")
    for name, command in (await builtins()).items():
        assert f"/{name}" in text
        assert command.help["en"] in text
    assert "/history [N]" in text
    assert "mention me" in text
    assert "帮助" not in text


async def test_help_speaks_the_language_of_the_chat():
    text = await say("help", language="zh")
    assert "/history [N]（/历史）：显示最近 N 轮对话" in text
    assert "请先 @ 我" in text


async def test_help_shows_the_prefix_that_is_configured():
    text = await say("help", chat={"command_prefix": "!"})
    assert "!new" in text
    assert "/new" not in text


@pytest.mark.parametrize(
    ("chat", "sentence"),
    [({"require_at_in_groups": False}, "just write"), ({"enable_in_groups": False}, "private chats only")],
)
async def test_help_tells_how_groups_are_configured(chat, sentence):
    assert sentence in await say("help", chat=chat)


async def test_help_shows_commands_of_admins_to_admins_only():
    commands = (command("open", en="for all"), command("kick", admin_only=True, en="not for all"))
    assert "kick" not in await say("help", commands=commands)
    assert "/kick: not for all" in await say("help", commands=commands, is_admin=True)
    assert "no command /kick" in await say("help", "kick", commands=commands)


@pytest.mark.parametrize("args", ["history", "/history", "HISTORY", "历史"])
async def test_help_with_a_name_tells_of_that_command_alone(args):
    assert await say("help", args) == f"/history [N]: {TEXTS['en']['help_of_history']}"


async def test_help_with_an_unknown_name_says_so_and_what_comes_near():
    text = await say("help", "histery")
    assert "no command /histery" in text
    assert "Did you mean /history?" in text


async def test_help_takes_the_text_of_another_language_where_its_own_is_missing():
    assert "/ping: 测试" in await say("help", commands=(command("ping", zh="测试"),))
    assert (await say("help", "ping", commands=(command("ping"),))) == "/ping"


# -------------------------------------------------------------------------------------------- conversation


async def test_new_archives_the_conversation():
    reply = await say("new", said=TURNS)
    assert reply.change == "archive"
    assert reply.text == TEXTS["en"]["new"]


async def test_new_changes_nothing_where_there_is_no_conversation():
    assert await say("new", new=True) == Reply(TEXTS["en"]["new"])


async def test_clear_says_how_many_messages_went():
    reply = await say("clear", said=TURNS)
    assert reply.change == "clear"
    assert "4 message" in reply.text


async def test_clear_changes_nothing_where_there_is_no_conversation():
    reply = await say("clear", new=True)
    assert reply.change is None
    assert "0 message" in reply.text


@pytest.mark.parametrize("name", ["new", "clear"])
async def test_a_command_that_takes_no_arguments_does_nothing_when_it_gets_some(name):
    reply = await say(name, "the table please", said=TURNS)
    assert reply.change is None
    assert f"/{name} takes no arguments" in reply.text


async def test_a_conversation_over_several_groups_is_neither_shown_nor_cleared_in_one():
    given = {"scope": Scope.USER, "said": [("user", "a secret"), ("assistant", "kept")]}
    assert "secret" not in await say("history", chat_type=ChatType.GROUP, **given)
    assert (await say("clear", chat_type=ChatType.GROUP, **given)).change is None
    assert (await say("new", chat_type=ChatType.GROUP, **given)).change == "archive"
    assert "secret" in await say("history", **given)
    assert (await say("clear", **given)).change == "clear"


# ------------------------------------------------------------------------------------------------- history


async def test_history_shows_the_newest_turns_oldest_first():
    said = [(role, f"{role} {n}") for n in range(1, 9) for role in ("user", "assistant")]
    lines = (await say("history", said=said)).splitlines()
    assert lines[0] == "The last 5 turn(s):"
    assert lines[1:3] == ["1. You: user 4", "    Bot: assistant 4"]
    assert lines[-1] == "    Bot: assistant 8"
    assert len((await say("history", "2", said=said)).splitlines()) == 5


async def test_history_counts_a_question_without_an_answer_and_leaves_tools_out():
    said = [("assistant", "half a turn"), ("user", "q1"), ("user", "q2"), ("tool", "{}"), ("assistant", "a2")]
    assert (await say("history", said=said)).splitlines()[1:] == [
        "1. You: q1",
        "2. You: q2",
        "    Bot: a2",
    ]


async def test_history_shortens_what_is_long_and_keeps_each_message_on_one_line():
    text = await say("history", said=[("user", "a\nb   c"), ("assistant", "x" * 1000)])
    assert "You: a b c\n" in text
    assert text.endswith("x" * 99 + "…")


async def test_history_says_when_there_is_none():
    assert await say("history", new=True) == TEXTS["en"]["history_empty"]


@pytest.mark.parametrize("args", ["0", "21", "-1", "5 6", "many", "9" * 5000, "1.5", "²"])
async def test_history_tells_its_usage_when_the_number_is_wrong(args):
    assert (
        await say("history", args, said=TURNS)
        == "Usage: /history [N], where N is a whole number from 1 to 20."
    )


# --------------------------------------------------------------------------------------------------- usage


async def test_usage_tells_the_tokens_of_the_conversation_and_what_is_left_of_each_budget():
    bot = PlainBot(
        views=[
            BudgetView("daily-user", "day", 1200, 300, 100_000, 86_400_000),
            BudgetView("once", "total", 90, 0, 50, None),
        ]
    )
    assert (await say("usage", bot=bot, said=TURNS)).splitlines() == [
        "This conversation: 4 message(s), 40 tokens.",
        (
            "Budget “daily-user” (per day): 1200 used of 100000, 98500 left. "
            "300 more are in use right now. It is renewed at 1970-01-02 00:00."
        ),
        "Budget “once” (in total): 90 used of 50, 0 left.",
    ]


async def test_usage_without_conversation_and_budget_says_so():
    assert (await say("usage", new=True)).splitlines() == [
        "This conversation: 0 message(s), 0 tokens.",
        TEXTS["en"]["usage_no_budget"],
    ]


async def test_usage_takes_no_arguments():
    assert "takes no arguments" in await say("usage", "please")


# ------------------------------------------------------------------------------------------------ sentences


def test_both_languages_have_the_same_sentences():
    assert TEXTS["zh"].keys() == TEXTS["en"].keys()


@pytest.mark.parametrize("language", ["zh", "en"])
async def test_every_built_in_command_answers_in_both_languages(language):
    bot = PlainBot(language, views=[BudgetView("b", "week", 1, 1, 9, 0)])
    for name in await builtins():
        for args in ("", "?", "3"):
            for said in ((), TURNS):
                reply = await say(name, args, bot=bot, said=said)
                text = reply.text if isinstance(reply, Reply) else reply
                assert text
                assert "{" not in text
