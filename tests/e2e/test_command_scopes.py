"""Every command in every scope: it is obeyed with a mention before it, and keeps to the chat it is typed in."""

from __future__ import annotations

import pytest

from feishu_bot.store import schema
from feishu_bot.testing.model import Behaviour
from tests.e2e.bots import configuration, until
from tests.e2e.test_conversation_commands import prompts, talk

ALIASES = {  # what removes or archives comes last
    "help": "帮助", "threads": "对话列表", "switch": "切换", "rename": "改名", "fork": "分叉",
    "retry": "重试", "history": "历史", "export": "导出", "search": "搜索",
    "usage": "用量", "model": "模型", "agent": "助手", "persona": "人格", "stats": "统计", "whoami": "我是谁",
    "why": "为什么", "undo": "撤销", "clear": "清空", "new": "新对话",
}  # fmt: skip
ARGUMENTS = {"switch": " 1", "rename": " a name", "search": " secret", "persona": " off"}
SCOPES = ("user", "user_in_chat", "chat", "thread")


def by_rule(scope):
    """Return settings by which only one rule of ``chats`` says the scope of the groups."""
    other = "user_in_chat" if scope != "user_in_chat" else "chat"
    return {"chat": {"scope": other}, "chats": [{"match": {"type": "group"}, "scope": scope}]}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("ruled", [False, True], ids=["everywhere", "by rule"])
async def test_each_command_and_its_chinese_alias_do_the_same_in_a_group_and_show_nothing_of_another_one(
    bots, people, feishu, model, sqlite_url, scope, ruled
):
    more = by_rule(scope) if ruled else {"chat": {"scope": scope}}
    bot = await bots.start(configuration(sqlite_url, feishu=feishu, model=model, **more))
    await talk(bot, people, ["my private secret", "more of the secret"])
    await talk(bot, people, ["the secret of the others"], chat="oc_other")
    asked = model.count
    for n, name in enumerate(ALIASES):
        words = ARGUMENTS.get(name, "")
        # A chat for each: nothing was said in it.
        english, chinese = f"oc_en{n}", f"oc_zh{n}"
        (one,) = await talk(bot, people, [f"/{name}{words}"], chat=english)
        (other,) = await talk(bot, people, [f"／{ALIASES[name]}{words}"], chat=chinese)
        assert one.replace(english, "") == other.replace(chinese, ""), name
        shown = one.replace("“secret”", "")  # what was searched for
        assert "secret" not in shown.lower(), name
        assert "Unknown" not in one
    assert model.count == asked, "no command asks the model about what was said elsewhere"
    assert model.requests[-1].body["messages"][-1]["content"].endswith("the secret of the others")


@pytest.mark.parametrize("scope", SCOPES)
async def test_what_a_command_changes_in_one_chat_stays_as_it_was_in_another(
    bots, people, feishu, model, sqlite_url, sqlite_record, scope
):
    bot = await bots.start(configuration(sqlite_url, feishu=feishu, model=model, chat={"scope": scope}))
    await talk(bot, people, ["one", "two"], chat="oc_first")
    await sqlite_record.settled()
    before = sqlite_record.messages()
    words = ["/undo", "/clear", "/retry", "/fork 1", "/switch 1"]
    await talk(bot, people, words, chat="oc_second")
    await sqlite_record.settled()
    assert sqlite_record.messages() == before
    assert model.count == 2
    assert await talk(bot, people, ["/unod"], chat="oc_second") == [
        "Unknown command: /unod. Did you mean /undo? /help lists all commands."
    ]


async def test_in_a_shared_conversation_everybody_sees_and_repeats_what_was_said(
    bots, people, feishu, model, sqlite_url, sqlite_record
):
    bot = await bots.start(configuration(sqlite_url, feishu=feishu, model=model, chat={"scope": "chat"}))
    await people.say(bot, "one", user="ann", chat="oc_team")
    await people.replies(1, "oc_team")
    await people.say(bot, "/history", user="bob", chat="oc_team")
    assert "1. user ou_ann: one\n" in (await people.replies(2, "oc_team"))[-1]
    await people.say(bot, "/export", user="bob", chat="oc_team")
    assert "**user ou_ann** " in (await people.replies(3, "oc_team"))[-1]
    await people.say(bot, "/retry", user="bob", chat="oc_team")
    await people.replies(4, "oc_team")
    assert len(prompts(model)[-1]) == 1
    assert prompts(model)[-1][0].endswith("one")
    await sqlite_record.settled()
    (conversation,) = sqlite_record.rows(schema.conversations)
    assert (conversation.user_key, conversation.message_count) == ("feishu:chat:oc_team", 2)


async def test_what_once_spanned_all_groups_is_not_shown_in_one_after_the_scope_has_changed(
    bots, people, feishu, model, sqlite_url, sqlite_record
):
    config = configuration(sqlite_url, feishu=feishu, model=model, chat={"scope": "user"})
    bot = await bots.start(config)
    await talk(bot, people, ["harmless"], chat="oc_first")
    await talk(bot, people, ["the secret of the second", "/new"], chat="oc_second")
    await sqlite_record.settled()
    await bot.stop()
    bot = await bots.start(configuration(sqlite_url, feishu=feishu, model=model))
    (old,) = sqlite_record.rows(schema.conversations)
    listed, switched, found, _, history = await talk(
        bot, people, ["/threads", f"/switch {old.id}", "/search secret", "new", "/history"], chat="oc_first"
    )
    assert listed == "This conversation has no messages yet."
    assert switched.startswith(f"There is no conversation {old.id} here")
    assert found.startswith("“secret” was not found")
    assert "secret" not in history
    assert prompts(model)[-1] == ["new"]


async def test_an_empty_copy_is_never_made(bots, people, feishu, model, sqlite_url, sqlite_record):
    bot = await bots.start(configuration(sqlite_url, feishu=feishu, model=model))
    *_, refused = await talk(bot, people, ["one", "/undo", "two", "/fork 1"])
    assert refused.startswith("The copy would be empty")
    *_, refused = await talk(bot, people, ["/clear", "three", "/fork 1"])
    assert refused.startswith("The copy would be empty")
    await sqlite_record.settled()
    assert len(sqlite_record.rows(schema.conversations)) == 1


# ------------------------------------------------------------------------- while an answer is being made

RACING = {
    # What is typed while "two" is being answered: what is stored in the end, of the current conversation.
    "/retry": ["one", "echo: one", "two", "echo: two"],
    "/undo": ["one", "echo: one"],
    "/fork 1": ["one", "echo: one"],
    "/clear": [],
    "/new": None,
    "/switch": ["old", "echo: old"],
}


@pytest.mark.parametrize("words", RACING)
@pytest.mark.parametrize("dies", ["never", "while asking", "answered", "committed"])
async def test_a_command_typed_while_the_answer_is_made_acts_on_it_whole_and_once(
    bots, people, feishu, model, sqlite_url, sqlite_record, words, dies
):
    config = configuration(
        sqlite_url,
        feishu=feishu,
        model=model,
        budgets=[{"name": "b", "window": "total", "limit_tokens": 10**6}],
    )
    bot = await bots.start(config)
    await talk(bot, people, ["old", "/new", "one"])
    await sqlite_record.settled()
    old, current = sqlite_record.rows(schema.conversations)
    typed = f"/switch {old.id}" if words == "/switch" else words
    await bot.stop()
    crash = (dies, 2) if dies in {"answered", "committed"} else None
    bot = await bots.start(config, crash=crash)
    model.script(Behaviour("hang") if dies == "while asking" else Behaviour(delay_s=0.3))
    before = model.count
    await people.say(bot, "two")
    await until(lambda: model.count > before, "the question")
    command = people.event(typed)
    assert await people.post(bot, command) == 200
    assert await people.post(bot, command) == 200, "the platform repeats it"
    if dies == "while asking":
        await bot.kill()
    if dies != "never":
        assert await bot.ended() == -9
        bot = await bots.start(config)
        assert await people.post(bot, command) == 200
    await sqlite_record.ended(5)
    await sqlite_record.settled()
    texts = people.feishu.texts("oc_ann")
    assert len(texts) == 5, texts
    assert texts[3] == "echo: two"
    (now,) = sqlite_record.rows(schema.conversations, scope_key="user:feishu:private:ou_ann") or [None]
    stored = None if now is None else [m.content for m in sqlite_record.messages(conversation_id=now.id)]
    assert stored == RACING[words]
    for conversation in sqlite_record.rows(schema.conversations):
        kept = sqlite_record.messages(conversation_id=conversation.id)
        assert conversation.message_count == len(kept)
        assert conversation.total_tokens == sum(m.tokens for m in kept)
    assert len(sqlite_record.rows(schema.conversations)) == (3 if words.startswith("/fork") else 2)
    if words == "/fork 1":
        kept = [m.content for m in sqlite_record.messages(conversation_id=current.id)]
        assert kept == ["one", "echo: one", "two", "echo: two"]
    sqlite_record.check_accounts()
    sqlite_record.check_ends()
