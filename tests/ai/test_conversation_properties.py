"""Any sequence of operations leaves counters, order and search as a simple model says."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule
from sqlalchemy import text

from feishu_bot.ai.conversation_store import (
    ConversationNotFound,
    ConversationRecord,
    MessageNotFound,
    MessageRecord,
    PersistentConversationManager,
)
from feishu_bot.store import inspection
from tests.sizes import FULL_SIZE

# Whatever can be stored: no NUL and no lone surrogate.
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)
roles = st.sampled_from(["user", "assistant", "system", "tool"])
tokens = st.integers(0, 5000)
users = st.sampled_from(["a:private:u", "a:private:U", "a:private:u "])


@dataclass
class Said:
    id: int
    role: str
    content: str
    tokens: int


@dataclass
class Talk:
    user: str
    said: list[Said] = field(default_factory=list)
    extra: int = 0
    keys: dict[str, int] = field(default_factory=dict)


class Operations(RuleBasedStateMachine):
    manager: PersistentConversationManager

    def __init__(self):
        super().__init__()
        self.talks: dict[int, Talk] = {}
        self.current: dict[str, int] = {}

    conversations = Bundle("conversations")

    @initialize()
    def start_empty(self):
        with self.manager.engine.begin() as connection:
            connection.execute(text("DELETE FROM messages"))
            connection.execute(text("DELETE FROM conversations"))

    @rule(target=conversations, user=users)
    def get_or_create(self, user):
        made = self.manager.get_or_create(user, "a")
        assert made.id == self.current.setdefault(user, made.id)
        if made.id in self.talks:
            return multiple()
        self.talks[made.id] = Talk(user)
        return made.id

    @rule(target=conversations, user=users, name=texts)
    def create_thread(self, user, name):
        made = self.manager.create_thread(user, name)
        self.current[user] = made.id
        self.talks[made.id] = Talk(user)
        return made.id

    @rule(where=conversations, user=users)
    def switch_thread(self, where, user):
        if self.talks[where].user == user:
            self.manager.switch_thread(user, where)
            self.current[user] = where
        else:
            with pytest.raises(ConversationNotFound):
                self.manager.switch_thread(user, where)

    @rule(where=conversations, role=roles, content=texts, count=tokens)
    def save_message(self, where, role, content, count):
        saved = self.manager.save_message(where, role, content, count)
        self.talks[where].said.append(Said(saved.id, role, content, count))

    @rule(where=conversations, content=texts, key=st.sampled_from(["k1", "k2"]))
    def save_with_key(self, where, content, key):
        talk = self.talks[where]
        saved = self.manager.save_message(where, "user", content, 7, key=key)
        if key in talk.keys:
            assert saved.id == talk.keys[key]
        else:
            talk.keys[key] = saved.id
            talk.said.append(Said(saved.id, "user", content, 7))

    @rule(where=conversations, said=st.lists(st.tuples(roles, texts, tokens), max_size=8))
    def save_messages(self, where, said):
        new = [{"role": r, "content": c, "tokens": n} for r, c, n in said]
        for record in self.manager.save_messages(where, new):
            self.talks[where].said.append(Said(record.id, record.role, record.content, record.tokens))

    @rule(where=conversations, count=tokens)
    def update_stats(self, where, count):
        self.manager.update_conversation_stats(where, count)
        self.talks[where].extra += count

    @rule(where=conversations, data=st.data(), content=texts, count=st.none() | tokens)
    def edit_message(self, where, data, content, count):
        if self.talks[where].said:
            said = data.draw(st.sampled_from(self.talks[where].said))
            self.manager.edit_message(said.id, content, count)
            said.content = content
            said.tokens = said.tokens if count is None else count

    @rule(where=conversations, data=st.data())
    def delete_message(self, where, data):
        talk = self.talks[where]
        if talk.said:
            said = data.draw(st.sampled_from(talk.said))
            self.manager.delete_message(said.id)
            talk.said.remove(said)
            talk.keys = {key: i for key, i in talk.keys.items() if i != said.id}
            with pytest.raises(MessageNotFound):
                self.manager.delete_message(said.id)

    @rule(target=conversations, where=conversations, data=st.data())
    def fork(self, where, data):
        talk = self.talks[where]
        if not talk.said:
            return multiple()
        at = data.draw(st.integers(0, len(talk.said) - 1))
        made = self.manager.fork_conversation(where, talk.said[at].id)
        copies = list(self.manager.iter_messages(made.id))
        self.talks[made.id] = Talk(
            talk.user,
            [
                Said(c.id, s.role, s.content, s.tokens)
                for c, s in zip(copies, talk.said[: at + 1], strict=True)
            ],
        )
        return made.id

    @rule(where=conversations)
    def clear(self, where):
        self.manager.clear_conversation(where)
        self.talks[where] = Talk(self.talks[where].user)

    @rule(where=conversations)
    def clear_and_die(self, where):
        """What a long conversation looks like whose clearing was cut off: no row is gone yet."""
        clear = "total_tokens = 0, message_count = 0, summary = NULL, cleared_seq = last_seq, version = version + 1"
        with self.manager.engine.begin() as connection:
            connection.execute(text(f"UPDATE conversations SET {clear} WHERE id = :id"), {"id": where})
        for said in self.talks[where].said[:1]:
            with pytest.raises(MessageNotFound):
                self.manager.edit_message(said.id, "back again")
            with pytest.raises(MessageNotFound):
                self.manager.delete_message(said.id)
            with pytest.raises(MessageNotFound):
                self.manager.fork_conversation(where, said.id)
        self.talks[where] = Talk(self.talks[where].user)

    @rule()
    def cleanup(self):
        assert self.manager.cleanup_old_conversations(days=1) == 0
        with self.manager.get_session() as session:
            assert session.query(MessageRecord).count() == sum(len(t.said) for t in self.talks.values())

    @rule(where=consumes(conversations))
    def delete(self, where):
        self.manager.delete_conversation(where)
        talk = self.talks.pop(where)
        if self.current.get(talk.user) == where:
            del self.current[talk.user]

    @rule(where=conversations, turns=st.integers(0, 4))
    def load_history(self, where, turns):
        said = self.talks[where].said
        starts = [n for n, message in enumerate(said) if message.role == "user"]
        begin = starts[-turns] if 0 < turns <= len(starts) else 0
        expected = said[begin:] if turns else []
        found = self.manager.load_history(where, turns)
        assert [(m["role"], m["content"], m["tokens"]) for m in found] == [
            (m.role, m.content, m.tokens) for m in expected
        ]

    @invariant()
    def everything_adds_up(self):
        for where, talk in self.talks.items():
            record = self.manager.get_conversation(where)
            stored = list(self.manager.iter_messages(where))
            assert [(m.id, m.role, m.content, m.tokens) for m in stored] == [
                (s.id, s.role, s.content, s.tokens) for s in talk.said
            ]
            assert [m.seq for m in stored] == sorted({m.seq for m in stored})
            assert record.message_count == len(stored)
            assert record.total_tokens == sum(m.tokens for m in stored) + talk.extra
            assert record.is_current == (self.current.get(talk.user) == where)
            exported = self.manager.export_conversation(where)
            assert [m["id"] for m in exported["messages"]] == [s.id for s in talk.said]
            assert exported["conversation"]["message_count"] == len(talk.said)
        with self.manager.get_session() as session:
            for record in session.query(ConversationRecord).limit(2):
                assert [m.id for m in record.messages] == [s.id for s in self.talks[record.id].said]
        stats = self.manager.get_stats()
        assert stats["total_conversations"] == len(self.talks)
        assert stats["total_messages"] == sum(len(talk.said) for talk in self.talks.values())

    @invariant()
    def what_was_said_is_found(self):
        words = [s.content for talk in self.talks.values() for s in talk.said if s.content.isalnum()]
        for word in words[:2]:
            hits = {hit["message_id"] for hit in self.manager.search_messages(word, limit=1000)}
            said = [s for talk in self.talks.values() for s in talk.said]
            # Inside of another word it need not be found.
            assert {s.id for s in said if s.content == word} <= hits <= {s.id for s in said}

    def teardown(self):
        url = self.manager.engine.url.render_as_string(hide_password=False)
        assert [finding for finding in inspection.check(url) if finding.wrong] == []


def test_any_sequence_of_operations_leaves_everything_consistent(db_url):
    examples = 30 if db_url.startswith("sqlite") else 6  # a server takes ten times as long
    if FULL_SIZE:
        examples *= 10
    with PersistentConversationManager(db_url) as manager:
        machine = type("Operations", (Operations,), {"manager": manager})
        machine.TestCase.settings = settings(
            max_examples=examples,
            stateful_step_count=25,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],  # a failing sequence is short enough; to shrink it takes minutes
            suppress_health_check=list(HealthCheck),
        )
        machine.TestCase().runTest()
