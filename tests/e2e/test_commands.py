"""Commands, in private and after a mention in a group."""

from __future__ import annotations

import pytest

from feishu_bot.ai.conversation_store import PersistentConversationManager
from feishu_bot.store import schema
from feishu_bot.store.conversations import PIECE
from tests.e2e.bots import configuration, until


@pytest.fixture
async def bot(bots, feishu, model, sqlite_url):
    return await bots.start(configuration(sqlite_url, feishu=feishu, model=model))


@pytest.mark.parametrize("where", [{}, {"chat": "oc_team"}], ids=["private", "group"])
async def test_help_lists_the_commands_and_asks_no_model(
    bot, people, model, sqlite_url, sqlite_record, where
):
    await people.say(bot, "/help", **where)
    (text,) = await people.replies(1)
    assert all(f"/{name}" in text for name in ("help", "new", "clear", "history", "usage"))
    await sqlite_record.settled()
    assert model.count == 0
    assert sqlite_record.messages() == []
    (row,) = sqlite_record.inbox()
    assert (row.state, row.reason) == ("answered", "command")


@pytest.mark.parametrize(
    ("alias", "command"),
    [("/帮助", "/help"), ("／帮助", "/help"), ("/用量", "/usage"), ("/历史", "/history"), ("/HELP", "/help")],
)
async def test_a_command_answers_to_its_aliases_also_with_full_width_slash(bot, people, alias, command):
    await people.say(bot, command)
    await people.replies(1)
    await people.say(bot, alias)
    first, second = await people.replies(2)
    assert first == second


async def test_the_chinese_bot_speaks_chinese(bots, people, feishu, sqlite_url):
    bot = await bots.start(configuration(sqlite_url, feishu=feishu, chat={"language": "zh"}))
    await people.say(bot, "/帮助")
    assert (await people.replies(1))[0].startswith("可用命令：")
    await people.say(bot, "/hlep")
    assert "/help" in (await people.replies(2))[1]


async def test_an_unknown_command_names_the_nearest(bot, people, model):
    await people.say(bot, "/histroy 3")
    (text,) = await people.replies(1)
    assert text == "Unknown command: /histroy. Did you mean /history? /help lists all commands."
    assert model.count == 0


async def test_new_archives_the_conversation_and_clear_empties_it(
    bot, people, model, sqlite_url, sqlite_record
):
    for n, text in enumerate(["one", "/new", "two", "three", "/clear", "four", "/history"], start=1):
        await people.say(bot, text)
        await people.replies(n)
    *_, cleared, _, history = people.feishu.texts()
    assert cleared == "This conversation was cleared: 4 message(s) removed."
    assert "You: four" in history
    assert "three" not in history
    await sqlite_record.settled()
    old, current = sqlite_record.rows(schema.conversations)
    assert (old.scope_key, old.message_count) == (None, 2)
    assert (current.scope_key, current.message_count) == ("user:feishu:private:ou_ann", 2)
    prompts = [[m["content"] for m in r.body["messages"]][1:] for r in model.requests]
    assert prompts == [["one"], ["two"], ["two", "echo: two", "three"], ["four"]]
    assert [m.content for m in sqlite_record.messages(conversation_id=old.id)] == ["one", "echo: one"]


async def test_a_long_conversation_is_cleared_at_once_and_its_rows_are_removed_while_others_talk(
    bot, people, sqlite_url, sqlite_record
):
    await people.say(bot, "one", user="ann")
    await people.replies(1)
    await sqlite_record.settled()
    (conversation,) = sqlite_record.rows(schema.conversations)
    with PersistentConversationManager(sqlite_url) as manager:
        said = [{"role": "user", "content": f"word{n}"} for n in range(3 * PIECE)]
        manager.save_messages(conversation.id, said)
        await people.say(bot, "/clear", user="ann")
        await people.replies(2)
        assert manager.load_history(conversation.id) == []
        await people.say(bot, "two", user="bob")
        await people.replies(3)
        await until(lambda: len(sqlite_record.messages()) == 2, "the cleared rows to be removed")
        assert manager.get_conversation(conversation.id).message_count == 0
        assert sqlite_record.rows(schema.conversations)[0].cleared_seq is None


async def test_clear_and_new_change_nothing_of_what_a_budget_has_counted(
    bots, people, feishu, model, db_url, record
):
    budgets = [{"name": "ever", "window": "total", "limit_tokens": 100_000}]
    bot = await bots.start(configuration(db_url, feishu=feishu, model=model, budgets=budgets))
    for n, text in enumerate(["one", "/clear", "two", "/new"], start=1):
        await people.say(bot, text)
        await people.replies(n)
    await record.settled()
    assert len(record.ledger()) == 2
    record.check_accounts()


async def test_a_command_shows_only_what_was_said_in_its_own_chat(bot, people):
    await people.say(bot, "my secret")
    await people.replies(1)
    await people.say(bot, "/history", chat="oc_team")
    assert await people.replies(1, "oc_team") == ["This conversation has no messages yet."]


async def test_a_plugins_command_and_answer_work_and_its_failure_is_one_sentence(
    bots, people, feishu, model, sqlite_url, sqlite_record
):
    plugins = bots.folder / "plugins"
    plugins.mkdir()
    (plugins / "tester.py").write_text(
        "from feishu_bot.hooks import Command\n"
        "async def commands(bot):\n"
        "    return [Command('boom', boom), Command('nul', nul)]\n"
        "async def boom(context, args):\n"
        "    raise RuntimeError('no')\n"
        "async def nul(context, args):\n"
        "    return 'a\\0b\\ud800c'\n"
        "async def on_message(context):\n"
        "    return 'by plugin' if context.message.text == 'ping' else None\n"
    )
    budgets = [{"name": "ever", "window": "total", "limit_tokens": 100_000}]
    bot = await bots.start(
        configuration(
            sqlite_url,
            feishu=feishu,
            model=model,
            budgets=budgets,
            plugins={"directory": str(plugins), "enabled": ["tester"]},
        )
    )
    said = ["/boom", "/nul", "ping", "hi"]
    for n, text in enumerate(said, start=1):
        await people.say(bot, text)
        await people.replies(n)
    assert feishu.texts() == [
        "Something went wrong while running /boom. Please try again later.",
        "a\ufffdb?c",
        "by plugin",
        "echo: hi",
    ]
    await sqlite_record.settled()
    by_plugin = sqlite_record.messages()[1]
    assert (by_plugin.content, by_plugin.tokens) == ("by plugin", 2)
    assert len(sqlite_record.ledger()) == 1, "a call that a plugin made unnecessary is not booked"
    sqlite_record.check_accounts()
