from __future__ import annotations

import json
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from sqlalchemy import inspect, text
from sqlalchemy.orm.exc import DetachedInstanceError

from feishu_bot.ai.conversation_store import (
    ConversationNotFound,
    ConversationRecord,
    MessageNotFound,
    MessageRecord,
    PersistentConversationManager,
    StoreUnavailable,
)
from feishu_bot.store import conversations

USER = "feishu:group:user123"


@pytest.fixture
def manager(db_url):
    with PersistentConversationManager(db_url) as opened:
        yield opened


@pytest.fixture
def memory():
    with PersistentConversationManager("sqlite://") as opened:
        yield opened


def say(manager, conversation, *pairs):
    return manager.save_messages(
        conversation.id, [{"role": role, "content": content, "tokens": 1} for role, content in pairs]
    )


def contents(manager, conversation_id):
    return [message.content for message in manager.iter_messages(conversation_id)]


def check_counters(manager, conversation_id, extra=0):
    record = manager.get_conversation(conversation_id)
    messages = list(manager.iter_messages(conversation_id))
    assert record.message_count == len(messages)
    assert record.total_tokens == sum(m.tokens for m in messages) + extra
    assert [m.seq for m in messages] == sorted({m.seq for m in messages})
    return record


# --------------------------------------------------------------------------------------------- opening


def test_without_a_url_the_database_is_a_file_in_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with PersistentConversationManager() as manager:
        manager.get_or_create(USER, "feishu")
    assert (tmp_path / "data" / "conversations.db").is_file()
    with PersistentConversationManager(data_dir="other/folder"):
        assert (tmp_path / "other" / "folder" / "conversations.db").is_file()


def test_the_environment_names_the_database_where_the_caller_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONVERSATION_DATA_DIR", str(tmp_path / "from_env"))
    with PersistentConversationManager(), PersistentConversationManager(data_dir="mine"):
        assert (tmp_path / "from_env" / "conversations.db").is_file()
        assert (tmp_path / "mine" / "conversations.db").is_file()
    monkeypatch.setenv("CONVERSATION_DB_URL", f"sqlite:///{tmp_path}/named.db")
    with PersistentConversationManager():
        assert (tmp_path / "named.db").is_file()
    with PersistentConversationManager(f"sqlite:///{tmp_path}/given.db"):
        assert (tmp_path / "given.db").is_file()


def test_the_folders_of_a_sqlite_url_are_made(tmp_path):
    with PersistentConversationManager(f"sqlite:///{tmp_path}/a/b/c.db"):
        assert (tmp_path / "a" / "b" / "c.db").is_file()


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://postgres:hunter2@127.0.0.1:1/none",
        "mariadb://root:hunter2@127.0.0.1:1/none",
        "redis://user:hunter2@localhost/0",
        "nonsense hunter2",
        "sqlite:////proc/nowhere/hunter.db",
    ],
)
def test_a_database_that_cannot_be_used_is_store_unavailable_without_the_password(url):
    with pytest.raises(StoreUnavailable) as caught:
        PersistentConversationManager(url)
    assert isinstance(caught.value, ValueError)
    assert "hunter2" not in str(caught.value)
    assert str(caught.value)


def test_a_file_that_is_no_database_is_store_unavailable(tmp_path):
    (tmp_path / "x.db").write_bytes(b"this is no database at all" * 100)
    with pytest.raises(StoreUnavailable, match="not a database"):
        PersistentConversationManager(f"sqlite:///{tmp_path}/x.db")


def test_a_closed_manager_says_so_and_may_be_closed_again(memory):
    memory.close()
    memory.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        memory.get_or_create(USER, "feishu")
    with pytest.raises(StoreUnavailable, match="closed"):
        memory.get_session()


@pytest.mark.parametrize("url", ["sqlite://", ":memory:", "sqlite:///:memory:"])
def test_a_memory_database_is_one_for_all_threads_and_gone_with_its_manager(url):
    with PersistentConversationManager(url) as manager, PersistentConversationManager(url) as other:
        conversation = manager.get_or_create(USER, "feishu")
        threads = [
            threading.Thread(target=manager.save_message, args=(conversation.id, "user", f"{n}"))
            for n in range(8)
        ]
        with manager.get_session() as reading:  # an open reader stops no writer, here as in a file
            assert reading.query(MessageRecord).count() == 0
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert manager.get_conversation(conversation.id).message_count == 8
        assert other.get_stats()["total_conversations"] == 0
        file = Path(manager.engine.url.database)
        assert file.is_file()
    assert not file.parent.exists()


def test_the_library_needs_no_web_client_no_scheduler_and_no_event_loop_and_sets_up_no_logging(tmp_path):
    program = f"""
import logging, sys, threading
before = (list(logging.getLogger().handlers), logging.getLogger().level)
import feishu_bot.ai
from feishu_bot.ai.conversation_store import PersistentConversationManager
with PersistentConversationManager("sqlite:///{tmp_path}/x.db") as manager:
    conversation = manager.get_or_create("a:b:c", "a")
    manager.save_message(conversation.id, "user", "hello")
    assert manager.load_history(conversation.id)
    assert manager.search_messages("hello")
assert (list(logging.getLogger().handlers), logging.getLogger().level) == before
assert threading.active_count() == 1, threading.enumerate()
print(sorted({{"aiohttp", "apscheduler", "tiktoken", "alembic"}} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.stderr, done.stdout.strip()) == ("", "[]")


def test_echo_shows_the_statements_and_not_what_people_said(tmp_path):
    program = f"""
from feishu_bot.ai.conversation_store import PersistentConversationManager
with PersistentConversationManager("sqlite:///{tmp_path}/x.db", echo=True) as manager:
    conversation = manager.get_or_create("a:b:c", "a")
    manager.save_message(conversation.id, "user", "a secret")
    assert manager.load_history(conversation.id)[0]["timestamp"].endswith("Z")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "INSERT INTO messages" in done.stdout + done.stderr
    assert "a secret" not in done.stdout + done.stderr


# ------------------------------------------------------------------------------------- get_or_create


def test_a_conversation_is_made_once_and_found_again(manager):
    first = manager.get_or_create(USER, "feishu", "chat456")
    again = manager.get_or_create(USER, "feishu")
    assert (first.id, first.user_key, first.platform) == (again.id, USER, "feishu")
    assert again.chat_id == "chat456"
    assert first.created_at.tzinfo is UTC
    assert again.created_at == first.created_at
    assert again.last_activity >= first.last_activity
    assert (first.message_count, first.total_tokens, first.summary) == (0, 0, None)
    assert first.user_id == "feishu:user123"


def test_another_chat_or_platform_is_stored(manager):
    made = manager.get_or_create(USER, "feishu", "one")
    changed = manager.get_or_create(USER, "lark", "two")
    assert (changed.id, changed.platform, changed.chat_id) == (made.id, "lark", "two")
    assert manager.get_conversation(made.id).platform == "lark"


def test_user_keys_are_told_apart_by_every_byte(manager):
    keys = [
        "feishu:group:Ou_A",
        "feishu:group:ou_a",
        "feishu:group:ou_a ",
        "feishu:group:öu_a",
        "plain",
        "%:%",
    ]
    ids = {manager.get_or_create(key, "feishu").id for key in keys}
    assert len(ids) == len(keys)
    for key in keys:
        assert manager.get_conversation_by_user(key).user_key == key


def test_one_user_key_in_two_tenants_is_two_conversations(manager):
    one = manager.get_or_create(USER, "feishu", tenant_id="acme")
    two = manager.get_or_create(USER, "feishu", tenant_id="other")
    manager.save_message(one.id, "user", "ours")
    assert one.id != two.id
    assert manager.get_conversation_by_user(USER, tenant_id="acme").id == one.id
    assert manager.get_conversation_by_user(USER, tenant_id="none") is None
    assert [t.id for t in manager.list_threads(USER, tenant_id="other")] == [two.id]
    assert manager.get_stats(tenant_id="other")["total_messages"] == 0
    assert manager.search_messages("ours", tenant_id="other") == []
    for refused in (manager.get_conversation, manager.load_history, manager.iter_messages):
        with pytest.raises(ConversationNotFound):
            refused(one.id, tenant_id="other")


def test_user_and_traits_are_kept_until_others_are_given(manager):
    traits = {"plan": "gold", "tags": ["a", {"b": None}], "名": "值"}
    manager.get_or_create(USER, "feishu", user_id="person-1", traits=traits)
    kept = manager.get_or_create(USER, "feishu")
    assert kept.traits == traits
    assert manager.get_or_create("bare", "feishu").traits == {}
    changed = manager.get_or_create(USER, "feishu", traits={"plan": "silver"})
    assert changed.traits == {"plan": "silver"}


def test_a_conversation_of_another_scope_is_never_returned(manager):
    with manager.engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO conversations (public_id, scope_key, user_key, platform, created_at, last_activity)"
                " VALUES ('p', 'in:feishu:group:chat:user123', :user, 'feishu', '2030-01-01', '2030-01-01')"
            ),
            {"user": USER},
        )
    server = manager.get_conversation_by_user(USER)
    own = manager.get_or_create(USER, "feishu")
    assert own.id != server.id
    assert manager.get_conversation_by_user(USER).id == server.id  # latest by activity, any scope
    assert [t.id for t in manager.list_threads(USER)] == [own.id]
    with pytest.raises(ConversationNotFound):
        manager.switch_thread(USER, server.id)


def test_an_unknown_conversation_is_not_found_by_any_method(manager):
    for call in (
        lambda: manager.get_conversation(7),
        lambda: manager.save_message(7, "user", "x"),
        lambda: manager.save_message(7, "user", "x", key="k"),
        lambda: manager.save_messages(7, []),
        lambda: manager.save_messages(7, [{"role": "user", "content": "x"}] * 2),
        lambda: manager.load_history(7),
        lambda: manager.load_history(7, max_turns=0),
        lambda: manager.iter_messages(7),
        lambda: manager.update_conversation_stats(7, 5),
        lambda: manager.clear_conversation(7),
        lambda: manager.delete_conversation(7),
        lambda: manager.rename_thread(7, "x"),
        lambda: manager.switch_thread(USER, 7),
        lambda: manager.fork_conversation(7, 1),
    ):
        with pytest.raises(ConversationNotFound, match=r"^Conversation not found: 7$"):
            call()
    assert issubclass(ConversationNotFound, ValueError)
    assert manager.get_conversation_by_user("nobody") is None


# ------------------------------------------------------------------------------------------- messages


def test_a_saved_message_is_returned_and_counted(manager):
    conversation = manager.get_or_create(USER, "feishu")
    first = manager.save_message(conversation.id, "user", "Hello, how are you?", tokens=15)
    second = manager.save_message(
        conversation.id, "tool", '{"result": "sunny, 25°C"}', 10, {"tool_name": "weather", "n": [1.5]}
    )
    assert (first.id, first.role, first.tokens, first.get_metadata()) == (first.id, "user", 15, {})
    assert second.get_metadata() == {"tool_name": "weather", "n": [1.5]}
    record = check_counters(manager, conversation.id)
    assert (record.message_count, record.total_tokens) == (2, 25)
    assert record.title == "Hello, how are you?"
    assert record.last_activity == second.timestamp


def test_messages_saved_together_are_all_there_or_none(manager):
    conversation = manager.get_or_create(USER, "feishu")
    saved = say(manager, conversation, ("user", "one"), ("assistant", "two"), ("user", "three"))
    assert [m.content for m in saved] == ["one", "two", "three"]
    stored = {m.id: m.content for m in manager.iter_messages(conversation.id)}
    assert stored == {m.id: m.content for m in saved}
    with pytest.raises(ValueError, match="role"):
        say(manager, conversation, ("user", "four"), ("nobody", "five"))
    assert check_counters(manager, conversation.id).message_count == 3


def test_a_second_save_with_the_same_key_changes_nothing(manager):
    conversation = manager.get_or_create(USER, "feishu")
    first = manager.save_message(conversation.id, "user", "once", tokens=3, key="in:7")
    again = manager.save_message(conversation.id, "user", "other text", tokens=9, key="in:7")
    assert (again.id, again.content, again.tokens) == (first.id, "once", 3)
    both = manager.save_messages(
        conversation.id,
        [
            {"role": "user", "content": "x", "key": "in:7"},
            {"role": "assistant", "content": "plain"},
            {"role": "assistant", "content": "new", "key": "in:8"},
            {"role": "assistant", "content": "repeated", "key": "in:8"},
        ],
    )
    assert [m.content for m in both] == ["once", "plain", "new", "new"]
    assert check_counters(manager, conversation.id).message_count == 3
    elsewhere = manager.get_or_create("another", "feishu")
    assert manager.save_message(elsewhere.id, "user", "there", key="in:7").content == "there"


def test_tokens_of_no_message_are_added(manager):
    conversation = manager.get_or_create(USER, "feishu")
    manager.save_message(conversation.id, "user", "x", tokens=5)
    manager.update_conversation_stats(conversation.id, tokens_used=150)
    assert check_counters(manager, conversation.id, extra=150).total_tokens == 155


def test_clear_keeps_the_record_and_numbers_go_on(manager):
    conversation = manager.get_or_create(USER, "feishu")
    before = say(manager, conversation, ("user", "one"), ("assistant", "two"))
    manager.update_conversation_stats(conversation.id, 10)
    manager.clear_conversation(conversation.id)
    record = check_counters(manager, conversation.id)
    assert (record.message_count, record.total_tokens, record.summary) == (0, 0, None)
    assert manager.load_history(conversation.id) == []
    assert manager.search_messages("one") == []
    assert manager.save_message(conversation.id, "user", "three").seq > before[-1].seq


def test_a_long_conversation_that_is_cleared_is_out_of_sight_at_once_and_its_rows_go_in_pieces(manager):
    long, other = manager.get_or_create(USER, "feishu"), manager.get_or_create("other", "feishu")
    say(manager, long, *[("user", f"word{n}") for n in range(1203)])
    say(manager, other, ("user", "word0"))
    manager.save_message(long.id, "user", "once", key="k")
    manager._database.write(lambda tx: conversations.clear(tx, long.id))  # and here its process dies
    with manager.get_session() as session:
        assert session.query(MessageRecord).count() == 1204 - conversations.PIECE + 1
    assert check_counters(manager, long.id).message_count == 0
    assert [hit["conversation_id"] for hit in manager.search_messages("word")] == [other.id]
    assert manager.export_conversation(long.id)["messages"] == []
    assert manager.get_stats()["longest_conversation_messages"] == 1
    again = manager.save_message(long.id, "user", "again", key="k")  # the key of a message that was cleared
    assert manager.save_message(long.id, "user", "again", key="k").id == again.id
    assert [m["content"] for m in manager.load_history(long.id)] == ["again"]
    assert manager.cleanup_old_conversations() == 0  # what the next start does as well
    with manager.get_session() as session:
        assert session.query(MessageRecord).count() == 2
    assert contents(manager, long.id) == ["again"]


def test_a_conversation_that_is_cleared_twice_while_its_rows_go_keeps_what_was_said_last(manager):
    long = manager.get_or_create(USER, "feishu")
    for last in ("before", "after"):
        say(manager, long, *[("user", f"word{n}") for n in range(700)])
        manager._database.write(lambda tx: conversations.clear(tx, long.id))
        manager.save_message(long.id, "user", last)
    manager.cleanup_old_conversations()
    assert contents(manager, long.id) == ["after"]
    with manager.get_session() as session:
        assert session.query(MessageRecord).count() == 1


def test_delete_takes_the_conversation_and_all_its_messages(manager):
    conversation = manager.get_or_create(USER, "feishu")
    other = manager.get_or_create("other", "feishu")
    say(manager, other, ("user", "stays"))
    say(manager, conversation, *[("user", f"word{n}") for n in range(1203)])  # in several pieces
    manager.delete_conversation(conversation.id)
    with pytest.raises(ConversationNotFound):
        manager.delete_conversation(conversation.id)
    with manager.get_session() as session:
        assert [m.content for m in session.query(MessageRecord)] == ["stays"]
        assert session.query(ConversationRecord).count() == 1
    assert manager.search_messages("word1") == []
    assert manager.get_or_create(USER, "feishu").id != conversation.id


def test_what_is_being_removed_is_seen_by_nobody(manager):
    conversation = manager.get_or_create(USER, "feishu")
    message = manager.save_message(conversation.id, "user", "x")
    with manager.engine.begin() as connection:
        connection.execute(text("UPDATE conversations SET hidden_at = '2020-01-01', scope_key = NULL"))
    assert manager.get_conversation_by_user(USER) is None
    assert manager.get_stats()["total_conversations"] == 0
    for call in (
        lambda: manager.get_conversation(conversation.id),
        lambda: manager.load_history(conversation.id),
        lambda: manager.save_message(conversation.id, "user", "late"),
    ):
        with pytest.raises(ConversationNotFound):
            call()
    with pytest.raises(MessageNotFound):
        manager.edit_message(message.id, "y")
    assert manager.cleanup_old_conversations(30) == 0  # finishes what was begun
    with manager.get_session() as session:
        assert session.query(MessageRecord).count() == 0


# -------------------------------------------------------------------------------------------- history


def test_history_is_the_newest_turns_oldest_first(manager):
    conversation = manager.get_or_create(USER, "feishu")
    for n in range(30):
        say(manager, conversation, ("user", f"q{n}"), ("assistant", f"a{n}"))
    history = manager.load_history(conversation.id, max_turns=3)
    assert [m["content"] for m in history] == ["q27", "a27", "q28", "a28", "q29", "a29"]
    assert list(history[0]) == ["role", "content", "tokens", "timestamp"]
    assert history[0]["timestamp"].endswith("Z")
    assert datetime.fromisoformat(history[0]["timestamp"]).tzinfo is not None
    assert len(manager.load_history(conversation.id)) == 20
    assert len(manager.load_history(conversation.id, 1000)) == 60
    assert manager.load_history(conversation.id, 0) == []
    with pytest.raises(ValueError, match="max_turns"):
        manager.load_history(conversation.id, -1)


def test_a_turn_is_cut_only_before_a_user_message(manager):
    conversation = manager.get_or_create(USER, "feishu")
    tools = [("tool", f"t{n}") for n in range(100)]
    said = [("system", "s"), ("user", "one"), *tools, ("assistant", "1"), ("user", "two"), ("user", "three")]
    say(manager, conversation, *said)
    loaded = {n: [m["content"] for m in manager.load_history(conversation.id, n)] for n in range(1, 5)}
    everything = [content for _, content in said]
    assert loaded[1] == ["three"]
    assert loaded[2] == ["two", "three"]
    assert loaded[3] == everything[1:]
    assert loaded[4] == everything  # there are only three turns, so nothing is cut


def test_reading_the_history_of_a_long_conversation_reads_only_what_is_asked_for(memory):
    conversation = memory.get_or_create(USER, "feishu")
    for _ in range(10):
        say(memory, conversation, *[("user", "q"), ("assistant", "a")] * 500)
    with memory.engine.connect() as connection:
        plan = connection.execute(
            text(
                "EXPLAIN QUERY PLAN SELECT content FROM messages WHERE conversation_id = 1 AND seq < 99999"
                " AND recalled_at IS NULL ORDER BY seq DESC LIMIT 20"
            )
        ).all()
    assert "USING INDEX" in plan[0][3]
    assert not any("TEMP B-TREE" in step[3] for step in plan)
    assert len(memory.load_history(conversation.id, 10)) == 20


# --------------------------------------------------------------------------------------------- records


def test_records_are_plain_sqlalchemy_objects_and_stay_readable(manager):
    conversation = manager.get_or_create(USER, "feishu", "c")
    say(manager, conversation, ("user", "one"), ("assistant", "two"))
    session = manager.get_session()
    try:
        found = session.query(ConversationRecord).filter_by(user_key=USER).all()
        assert "messages" in inspect(found[0]).unloaded
        loaded = [m.content for m in found[0].messages]
        messages = session.query(MessageRecord).order_by(MessageRecord.seq).all()
    finally:
        session.close()
    assert loaded == ["one", "two"]
    assert found[0].last_activity.tzinfo is UTC
    assert [m.content for m in messages] == ["one", "two"]
    assert messages[0].conversation_id == conversation.id
    with pytest.raises(DetachedInstanceError):  # never a hundred thousand messages by accident
        _ = conversation.messages


def test_a_record_can_be_taken_into_a_session_again(manager):
    conversation = manager.get_or_create(USER, "feishu")
    message = manager.save_message(conversation.id, "user", "one")
    with manager.get_session() as session:
        merged = session.merge(message)
        assert merged.conversation.user_key == USER
    with manager.get_session() as session:
        session.add(conversation)
        assert [m.content for m in conversation.messages] == ["one"]
        conversation.summary = "short"
        session.commit()
    assert manager.get_conversation(conversation.id).summary == "short"


def test_dicts_of_records_hold_what_json_can(manager):
    conversation = manager.get_or_create(USER, "feishu", "c", traits={"a": 1})
    message = manager.save_message(conversation.id, "user", "hi", 2, {"model": "gpt-4o"})
    as_dict = json.loads(json.dumps(manager.get_conversation(conversation.id).to_dict()))
    assert as_dict["user_key"] == USER
    assert as_dict["created_at"].endswith("Z")
    assert (as_dict["total_tokens"], as_dict["message_count"], as_dict["traits"]) == (2, 1, {"a": 1})
    as_dict = json.loads(json.dumps(message.to_dict()))
    assert as_dict["metadata"] == {"model": "gpt-4o"}
    assert as_dict["timestamp"].endswith("Z")


@pytest.mark.parametrize("broken", ["{", "[1]", "null", "x", ""])
def test_metadata_that_is_no_object_reads_as_empty(manager, broken):
    conversation = manager.get_or_create(USER, "feishu")
    message = manager.save_message(conversation.id, "user", "x", metadata={"a": 1})
    with manager.engine.begin() as connection:
        connection.execute(text("UPDATE messages SET metadata_json = :broken"), {"broken": broken})
    with manager.get_session() as session:
        assert session.get(MessageRecord, message.id).get_metadata() == {}


def test_a_session_can_change_rows_and_vacuum(sqlite_url):
    with PersistentConversationManager(sqlite_url) as manager:
        conversation = manager.get_or_create(USER, "feishu")
        say(manager, conversation, ("user", "one"))
        with manager.get_session() as session:
            session.execute(text("VACUUM"))
        with manager.get_session() as session:
            session.get(ConversationRecord, conversation.id).summary = "short"
            session.commit()
        with manager.get_session() as session:
            session.delete(session.get(ConversationRecord, conversation.id))
            session.rollback()
        assert manager.get_conversation(conversation.id).summary == "short"


def test_an_open_session_that_reads_stops_no_writer(manager):
    conversation = manager.get_or_create(USER, "feishu")
    with manager.get_session() as session:
        assert session.query(ConversationRecord).count() == 1
        manager.save_message(conversation.id, "user", "meanwhile")
    assert check_counters(manager, conversation.id).message_count == 1


# --------------------------------------------------------------------------------- edit, delete, fork


def test_an_edited_message_changes_the_counters_by_the_difference(manager):
    conversation = manager.get_or_create(USER, "feishu")
    first, _ = say(manager, conversation, ("user", "before"), ("assistant", "answer"))
    manager.update_conversation_stats(conversation.id, 100)
    edited = manager.edit_message(first.id, "after 你好", tokens=40)
    assert (edited.content, edited.tokens) == ("after 你好", 40)
    assert edited.edited_at.tzinfo is UTC
    assert check_counters(manager, conversation.id, extra=100).total_tokens == 141
    assert manager.edit_message(first.id, "again").tokens == 40
    assert [hit["message_id"] for hit in manager.search_messages("again")] == [first.id]
    assert manager.search_messages("before") == manager.search_messages("after") == []


def test_a_deleted_message_leaves_the_rest_in_order(manager):
    conversation = manager.get_or_create(USER, "feishu")
    saved = say(manager, conversation, ("user", "one"), ("assistant", "two"), ("user", "three"))
    manager.delete_message(saved[1].id)
    assert contents(manager, conversation.id) == ["one", "three"]
    check_counters(manager, conversation.id)
    assert manager.search_messages("two") == []
    for call in (lambda: manager.delete_message(saved[1].id), lambda: manager.edit_message(saved[1].id, "x")):
        with pytest.raises(MessageNotFound, match=f"^Message not found: {saved[1].id}$"):
            call()


def test_a_fork_shares_nothing_that_can_change_under_it(manager):
    conversation = manager.get_or_create(USER, "feishu", "c", traits={"a": 1})
    saved = say(manager, conversation, ("user", "one"), ("assistant", "two"), ("user", "three"))
    manager.delete_message(saved[0].id)
    fork = manager.fork_conversation(conversation.id, saved[1].id)
    assert (fork.parent_id, fork.forked_at, fork.is_current) == (conversation.id, saved[1].id, False)
    assert (fork.user_key, fork.chat_id, fork.traits, fork.title) == (USER, "c", {"a": 1}, "one")
    assert contents(manager, fork.id) == ["two"]
    check_counters(manager, fork.id)
    manager.edit_message(saved[1].id, "changed")
    manager.save_message(fork.id, "user", "elsewhere")
    manager.delete_conversation(conversation.id)
    assert contents(manager, fork.id) == ["two", "elsewhere"]
    assert len(manager.search_messages("two")) == 1
    check_counters(manager, fork.id)
    with pytest.raises(MessageNotFound):
        manager.fork_conversation(fork.id, saved[2].id)


# --------------------------------------------------------------------------------------------- threads


def test_a_new_thread_becomes_current_and_the_old_one_stays(manager):
    first = manager.get_or_create(USER, "feishu", "c", traits={"a": 1})
    say(manager, first, ("user", "first question " * 10))
    second = manager.create_thread(USER, "Travel")
    assert (second.title, second.platform, second.chat_id) == ("Travel", "feishu", "c")
    assert second.traits == {"a": 1}
    assert manager.get_or_create(USER, "feishu").id == second.id
    assert not manager.get_conversation(first.id).is_current
    back = manager.switch_thread(USER, first.id)
    assert back.is_current
    assert manager.get_or_create(USER, "feishu").id == first.id
    assert [t.id for t in manager.list_threads(USER)] == [first.id, second.id]
    assert [t.id for t in manager.list_threads(USER, limit=1, offset=1)] == [second.id]
    assert back.title == ("first question " * 10)[:50]
    assert manager.rename_thread(first.id, "Work 工作").title == "Work 工作"
    with pytest.raises(ConversationNotFound):
        manager.switch_thread("somebody else", first.id)


def test_a_first_thread_needs_no_conversation_before_it(manager):
    thread = manager.create_thread("feishu:private:x", name="one")
    assert (thread.platform, thread.is_current) == ("feishu", True)
    assert manager.switch_thread("feishu:private:x", thread.id).is_current


def test_a_persona_belongs_to_the_conversation(manager):
    assert manager.get_active_persona_id(USER) is None
    manager.set_active_persona_id(USER, "Pirate")
    assert manager.get_active_persona_id(USER) == "Pirate"
    assert manager.get_conversation_by_user(USER).platform == "feishu"
    manager.set_active_persona_id(USER, None)
    assert manager.get_active_persona_id(USER) is None


# --------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("value", [{}, [], b"", 2**64, b"x", "\ud800", "a\0b"], ids=repr)
def test_what_a_query_is_limited_to_is_a_text_or_a_value_error(manager, value):
    conversation = manager.get_or_create(USER, "feishu")
    queries = [
        lambda: manager.get_conversation(conversation.id, tenant_id=value),
        lambda: manager.get_conversation_by_user(USER, tenant_id=value),
        lambda: manager.list_threads(USER, tenant_id=value),
        lambda: manager.load_history(conversation.id, tenant_id=value),
        lambda: manager.export_conversation(conversation.id, tenant_id=value),
        lambda: manager.get_stats(tenant_id=value),
        lambda: manager.get_usage(tenant_id=value),
        lambda: manager.save_messages(conversation.id, [value]),
    ]
    for query in queries:
        with pytest.raises(ValueError, match=r"must be a|holds a|a message has") as caught:
            query()
        assert not isinstance(caught.value, StoreUnavailable)
    for name in ("user_key", "platform", "role", "tenant_id"):
        if isinstance(value, str):
            assert manager.search_messages("x", **{name: value}) == []
        else:
            with pytest.raises(ValueError, match="must be a text"):
                manager.search_messages("x", **{name: value})


@pytest.mark.parametrize("hours", [-14, 0, 14])
def test_any_instant_can_be_asked_for(manager, hours):
    say(manager, manager.get_or_create(USER, "feishu"), ("user", "hello"))
    zone = timezone(timedelta(hours=hours))
    first, last = datetime.min.replace(tzinfo=zone), datetime.max.replace(tzinfo=zone)
    for since, until, found in ((first, last, 1), (last, None, 0), (None, first, 0), (last, first, 0)):
        assert manager.get_stats(since, until)["total_conversations"] == found
        assert len(manager.search_messages("hello", since=since, until=until)) == found
        for by in ("user", "day", "model"):
            assert manager.get_usage(by, since, until) == []


def test_statistics_of_an_empty_database_are_nothing(manager):
    assert manager.get_stats() == {
        "total_conversations": 0,
        "total_messages": 0,
        "total_tokens": 0,
        "average_messages_per_conversation": 0.0,
        "average_tokens_per_conversation": 0.0,
        "longest_conversation_messages": 0,
        "longest_conversation_user": None,
    }
    assert manager.get_stats(by="day")["by"] == {}
    assert manager.get_usage() == []


def test_statistics_sum_what_is_stored(db_url):
    times = [datetime(2025, 1, 8, 10, tzinfo=UTC)]
    with PersistentConversationManager(db_url, clock=lambda: times[0]) as manager:
        one = manager.get_or_create(USER, "feishu")
        say(manager, one, *[("user", "x")] * 5)
        times[0] += timedelta(days=1)
        two = manager.get_or_create("qq:group:z", "qq")
        say(manager, two, ("user", "x"))
        three = manager.get_or_create("qq:group:y", "qq")
        stats = manager.get_stats()
        assert (stats["total_conversations"], stats["total_messages"], stats["total_tokens"]) == (3, 6, 6)
        assert stats["average_messages_per_conversation"] == 2.0
        assert stats["longest_conversation_messages"] == 5
        assert stats["longest_conversation_user"] == USER
        by = manager.get_stats(by="platform")["by"]
        assert by["qq"] == {"total_conversations": 2, "total_messages": 1, "total_tokens": 1}
        assert list(manager.get_stats(by="day")["by"]) == ["2025-01-09", "2025-01-08"]
        assert manager.get_stats(by="user")["by"][USER]["total_messages"] == 5
        assert manager.get_stats(since=datetime(2025, 1, 9))["total_conversations"] == 2  # noqa: DTZ001  # naive is UTC
        assert manager.get_stats(until=datetime(2025, 1, 9, tzinfo=UTC))["total_messages"] == 5
        with pytest.raises(ValueError, match="by must be one of"):
            manager.get_stats(by="moon")
        assert three.created_at == times[0]


def test_usage_is_read_from_the_ledger(manager):
    with manager.engine.begin() as connection:
        for n, (person, model) in enumerate([("a:1", "m"), ("a:1", "n"), ("b:2", "m")]):
            connection.execute(
                text(
                    "INSERT INTO usage (inbox_id, attempt, call, user_id, platform, model, input_tokens,"
                    " output_tokens, cost_micro_usd, outcome, at)"
                    " VALUES (:n, 1, 0, :person, 'a', :model, 10, 5, 500000, 'ok', '2025-01-08 10:00:00')"
                    if manager.engine.dialect.name != "mysql"
                    else "INSERT INTO `usage` (inbox_id, attempt, `call`, user_id, platform, model, input_tokens,"
                    " output_tokens, cost_micro_usd, outcome, `at`)"
                    " VALUES (:n, 1, 0, :person, 'a', :model, 10, 5, 500000, 'ok', '2025-01-08 10:00:00')"
                ),
                {"n": n, "person": person, "model": model},
            )
    found = {row["user"]: row for row in manager.get_usage()}
    assert found["a:1"]["total_tokens"] == 30
    assert found["a:1"]["cost_usd"] == 1.0
    assert found["b:2"]["calls"] == 1
    assert [row["day"] for row in manager.get_usage(by="day")] == ["2025-01-08"]
    assert manager.get_usage(by="model", since=datetime(2026, 1, 1, tzinfo=UTC)) == []
    with pytest.raises(ValueError, match="by must be one of"):
        manager.get_usage(by="moon")


def test_cleanup_removes_what_is_idle_for_longer(db_url):
    times = [datetime(2025, 1, 8, 10, tzinfo=UTC)]
    with PersistentConversationManager(db_url, clock=lambda: times[0]) as manager:
        old = manager.get_or_create("old", "feishu")
        say(manager, old, *[("user", "x")] * 501)
        times[0] += timedelta(days=20)
        young = manager.get_or_create("young", "feishu")
        times[0] += timedelta(days=11)
        assert manager.cleanup_old_conversations() == 1
        assert manager.get_conversation(young.id)
        assert manager.cleanup_old_conversations(days=30) == 0
        assert manager.cleanup_old_conversations(days=10**6 // 2) == 0
        assert manager.cleanup_old_conversations(days=0) == 1
        assert manager.get_stats()["total_conversations"] == 0
        for wrong in (-1, 1.5, True):
            with pytest.raises(ValueError, match="days"):
                manager.cleanup_old_conversations(days=wrong)


def test_tokens_are_estimated_without_a_network(memory):
    assert memory.estimate_tokens("hello world", "gpt-4o") == 2


# ------------------------------------------------------------------------------------- values and text


@pytest.mark.parametrize(
    "content",
    [
        "",
        " \t\r\n trailing \n",
        "你好，世界 🌏 👩‍👩‍👧‍👦",
        "\u202eright to left\u202c \ufeff bom \u200b",
        "'; DROP TABLE messages; -- %s %(x)s {x} \\ \" ` $1 :name ?",
        "\x01\x1b[31m\x7f\x85\u2028",
        "\U0010ffff \ufffe \uffff",
        "e\u0301 vs é",
    ],
)
def test_any_text_is_read_back_unchanged(manager, content):
    key = "a:b:%:" + (content.strip("\0")[:20] or "x")
    conversation = manager.get_or_create(key, "feishu", content)
    saved = manager.save_message(conversation.id, "user", content, metadata={"k": content, content: "v"})
    assert manager.get_conversation(conversation.id).user_key == key
    assert manager.get_conversation(conversation.id).chat_id == content
    assert manager.load_history(conversation.id)[0]["content"] == content
    stored = next(manager.iter_messages(conversation.id))
    assert (stored.content, stored.get_metadata()) == (content, {"k": content, content: "v"})
    assert saved.content == content


def test_metadata_keeps_what_text_columns_refuse(manager):
    conversation = manager.get_or_create(USER, "feishu")
    odd = {"nul": "\0", "surrogate": "\ud800", "deep": [[[{}]]], "big": 2**80}
    manager.save_message(conversation.id, "user", "x", metadata=odd)
    assert next(manager.iter_messages(conversation.id)).get_metadata() == odd


def test_ten_megabytes_are_read_back(manager):
    content = "中文 text\n" * 900_000
    assert len(content.encode()) > 10_000_000
    conversation = manager.get_or_create(USER, "feishu")
    manager.save_message(conversation.id, "assistant", content)
    assert manager.load_history(conversation.id)[0]["content"] == content


BAD_TEXTS = ["nul\0", "\0", "lone \ud800", "\udfff", 7, None, b"bytes", ["list"]]


@pytest.mark.parametrize("bad", BAD_TEXTS, ids=repr)
def test_what_cannot_be_stored_everywhere_is_refused_before_anything_is_written(manager, bad):
    conversation = manager.get_or_create(USER, "feishu")
    message = manager.save_message(conversation.id, "user", "x")
    before = manager.get_conversation(conversation.id).to_dict()
    for call in (
        lambda: manager.save_message(conversation.id, "user", bad),
        lambda: manager.save_messages(conversation.id, [{"role": "user", "content": bad}]),
        lambda: manager.edit_message(message.id, bad),
        lambda: manager.get_or_create(bad, "feishu"),
        lambda: manager.get_or_create("new", bad),
        lambda: manager.get_or_create("new", "feishu", tenant_id=bad),
        lambda: manager.get_conversation_by_user(bad),
        lambda: manager.list_threads(bad),
        lambda: manager.set_active_persona_id(bad, "p"),
    ):
        with pytest.raises(ValueError):  # noqa: PT011  # each names another argument
            call()
    assert manager.get_conversation(conversation.id).to_dict() == before
    assert manager.get_stats()["total_conversations"] == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"role": "robot"}, "role"),
        ({"role": "User"}, "role"),
        ({"role": None}, "role"),
        ({"role": []}, "role"),
        ({"tokens": -1}, "tokens"),
        ({"tokens": 1.5}, "tokens"),
        ({"tokens": True}, "tokens"),
        ({"tokens": 2**63}, "tokens"),
        ({"metadata": {"x": object()}}, "metadata"),
        ({"metadata": {"x": float("nan")}}, "metadata"),
        ({"metadata": ["list"]}, "metadata"),
        ({"key": ""}, "key"),
        ({"key": "x" * 256}, "key"),
        ({"sender_id": "x" * 256}, "sender_id"),
    ],
)
def test_a_wrong_value_is_a_value_error_that_names_it(memory, arguments, named):
    conversation = memory.get_or_create(USER, "feishu")
    with pytest.raises(ValueError, match=named):
        memory.save_message(conversation.id, **{"role": "user", "content": "x", **arguments})
    assert memory.get_conversation(conversation.id).message_count == 0


def test_too_long_keys_are_refused_and_the_longest_kept(manager):
    longest = "键" * 255
    made = manager.get_or_create(longest, "p" * 50, "c" * 255, tenant_id="t" * 255, user_id="u" * 255)
    assert manager.get_conversation(made.id).user_key == longest
    for arguments in (
        {"user_key": longest + "x", "platform": "p"},
        {"user_key": "", "platform": "p"},
        {"user_key": "u", "platform": "p" * 51},
        {"user_key": "u", "platform": "p", "chat_id": "c" * 256},
        {"user_key": "u", "platform": "p", "user_id": ""},
    ):
        with pytest.raises(ValueError, match="characters"):
            manager.get_or_create(**arguments)
    with pytest.raises(ValueError, match="name"):
        manager.create_thread("u", "n" * 256)


@pytest.mark.parametrize("bad", ["1", 1.0, None, True, 2**64], ids=repr)
def test_an_id_that_is_none_is_a_value_error(memory, bad):
    for call in (
        lambda: memory.get_conversation(bad),
        lambda: memory.save_message(bad, "user", "x"),
        lambda: memory.load_history(bad),
        lambda: memory.edit_message(bad, "x"),
    ):
        with pytest.raises(ValueError, match="_id must"):
            call()


def test_a_conversation_is_made_by_three_statements_and_found_by_one(memory):
    memory.get_stats()
    seen: list[str] = []
    with memory._database._reader() as connection:  # the one connection that a single thread uses
        connection.connection.dbapi_connection.set_trace_callback(seen.append)
    memory.get_or_create(USER, "feishu")
    memory.get_or_create(USER, "feishu")
    made = ["BEGIN", "UPDATE", "INSERT", "UPDATE", "COMMIT"]
    assert [s.split()[0] for s in seen] == [*made, "BEGIN", "UPDATE", "COMMIT"]


def test_a_turn_takes_few_statements(memory):
    conversation = memory.get_or_create(USER, "feishu")
    seen: list[str] = []
    with memory._database._reader() as connection:  # the one connection that a single thread uses
        connection.connection.dbapi_connection.set_trace_callback(seen.append)
    memory.save_message(conversation.id, "user", "hello")
    memory.load_history(conversation.id)
    memory.save_message(conversation.id, "assistant", "hi")
    ours = [
        s.split()[0] for s in seen if not s.startswith("--")
    ]  # -- is what the full-text index does inside
    save = ["BEGIN", "UPDATE", "INSERT", "INSERT", "COMMIT"]
    assert ours == [*save, "SELECT", *save]
