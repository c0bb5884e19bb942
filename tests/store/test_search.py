from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import event, func, insert, select, text, update

from feishu_bot.model import End, InboundMessage, person_key, user_key
from feishu_bot.store import search
from feishu_bot.store.cleanup import remove_hidden
from feishu_bot.store.conversations import clear
from feishu_bot.store.engine import capabilities, open_engine
from feishu_bot.store.people import Person
from feishu_bot.store.schema import SEARCH_TABLE, conversations, messages
from feishu_bot.store.terms import MAX_SEARCHED_CHARS, Query, normalise, terms
from feishu_bot.store.work import (
    Arrival,
    Change,
    Lease,
    NewConversation,
    NewMessage,
    Outcome,
    Transaction,
)
from tests.stores import opened

NOON = datetime(2025, 6, 18, 12, tzinfo=UTC)


class Book:
    """A database with messages in it."""

    def __init__(self, url):
        self.engine = open_engine(url)
        self.kind = capabilities(self.engine).kind
        self.seq = 0

    def conversation(self, number, *, user_key="web:private:ann", **columns):
        row = {
            "id": number,
            "public_id": f"public-{number}",
            "user_key": user_key,
            "platform": user_key.partition(":")[0],
            "created_at": NOON,
            "last_activity": NOON,
        }
        with self.engine.begin() as connection:
            connection.execute(insert(conversations), row | columns)

    def write(self, *texts, conversation=1, at=NOON, **columns):
        rows = []
        for content in texts:
            self.seq += 1
            row = {
                "conversation_id": conversation,
                "seq": self.seq,
                "role": "user",
                "content": content,
                "timestamp": at,
                "search_terms": search.column_value(self.kind, content),
            }
            rows.append(row | columns)
        with self.engine.begin() as connection:
            connection.execute(insert(messages), rows)
            search.index_inserted(connection, self.kind, list(texts))

    def find(self, query, **filters):
        with self.engine.execution_options(reader=True).connect() as connection:
            return search.search_messages(connection, self.kind, query, **filters)

    def texts(self, query, **filters):
        return [hit["content"] for hit in self.find(query, **filters)]

    def do(self, function, *arguments):
        with self.engine.begin() as connection:
            return function(connection, self.kind, *arguments)

    def indexed(self, query):
        """Return how many messages the index itself names."""
        with self.engine.begin() as connection:
            if self.kind == "sqlite":
                found = connection.execute(
                    text(f"SELECT count(*) FROM {SEARCH_TABLE} WHERE {SEARCH_TABLE} MATCH :q"), {"q": query}
                )
            else:
                match, parameters = search._match(self.kind, Query(query))
                found = connection.execute(
                    select(func.count()).select_from(messages).where(match), parameters
                )
            return found.scalar_one()


@pytest.fixture
def book(db_url):
    book = Book(db_url)
    book.conversation(1)
    yield book
    book.engine.dispose()


# ----------------------------------------------------------------------------------------------- what is found


@pytest.mark.parametrize(
    ("query", "content"),
    [
        ("天气", "今天天气真好"),
        ("天", "今天"),
        ("好", "今天天气真好"),
        ("今天天气真好", "今天天气真好"),
        ("plug", "a plugin"),
        ("PLUGIN", "a Plugin"),
        ("plugin 天气", "天气 and a plugin"),
        ("a plugin", "the plugin and a hat"),
        ("plug-in", "a plug-in for it"),
        ("c++", "I like C++ most"),
        ("100%", "surely 100% of it"),
        ("foo_bar", "call foo_bar(1)"),
        ("bar", "call foo_bar(1)"),
        ("@ann", "hello @Ann!"),
        ("ＡＢＣ", "abc"),
        ("abc", "ＡＢＣ"),
        ("strasse", "Straße"),
        ("при", "Привет"),
        ("안녕", "여러분안녕하세요"),
        ("カメラ", "ｶﾒﾗを買う"),
        ("😀", "well 😀 done"),
        ("👍", "👍🏽"),
        ("❤️", "I ❤ it"),
        ("%", "100% of it"),
        ("¿", "¿qué?"),
        ('"天气 好"', "天气 好的"),
        ('"hello world"', "say hello  hello world"),
        ("“天气”", "今天天气"),
        ('say "hi', 'he did say "hi'),
        ("x" * 200, "x" * 201),
        ("the", "the stop words count too"),
        ("a", "a"),
    ],
)
def test_a_message_is_found_by(book, query, content):
    book.write("something else 别的", content)
    assert book.texts(query) == [content]


@pytest.mark.parametrize(
    ("query", "content"),
    [
        ("lugin", "a plugin"),
        ("天好", "天气好"),
        ("天气气好", "天气 气好"),
        ("天气好", "气好 天气"),
        ('"world hello"', "hello world"),
        ('"hello world"', "hello, world"),
        ("plugin missing", "a plugin"),
        ("c++", "c--"),
        ("*", "anything"),
        ("天*", "天气"),
        ("_", "anything"),
        ("天气 OR 别的", "天气"),
        ("NOT plugin", "a plugin"),
        ("' OR 1=1 --", "anything"),
        ("", "anything"),
        (" \t", "anything"),
        ('""', "anything"),
        ("\0", "anything"),
        ("any\0thing", "anything"),
        ("\ud800", "anything"),
    ],
)
def test_a_message_is_not_found_by(book, query, content):
    book.write(content)
    assert book.texts(query) == []


def _corpus(rng):
    alphabets = ["天气好的今明", "ab ", "a天 ", "éÉ%_ ", "😀👍 a", "的的天", "x\"' *", "1½２ "]
    return ["".join(rng.choices(rng.choice(alphabets), k=rng.randrange(1, 12))) for _ in range(250)]


@pytest.mark.parametrize("seed", range(3))
def test_the_index_gives_what_looking_at_every_message_gives(book, seed):
    rng = random.Random(seed)
    corpus = _corpus(rng)
    book.write(*corpus)
    for _ in range(60):
        source = rng.choice(corpus)
        start = rng.randrange(len(source))
        wanted = source[start : start + rng.randrange(1, 5)]
        wanted = rng.choice(["{}", '"{}"', "{} 天"]).format(wanted)
        query = Query(wanted)
        by_hand = [content for content in reversed(corpus) if query and query.matches(content)]
        assert book.texts(wanted, limit=500) == by_hand, wanted


TEXTS = st.text(st.sampled_from("天气好 ab1_%é😀“ﬁ²\u0301\u200d"), max_size=12) | st.text(max_size=12)


@given(TEXTS, TEXTS, TEXTS)
def test_whatever_matches_is_named_by_the_index(before, wanted, after):
    query = Query(wanted)
    content = f"{before}{wanted}{after}"
    if not query or not query.matches(content):
        return
    there = terms(content)
    for term in query.terms:
        assert term.text in there or (term.prefix and any(t.startswith(term.text) for t in there))


@given(TEXTS)
def test_a_text_is_found_by_itself(content):
    quoted = content.translate({ord(c): " " for c in '"“”„«»「」『』'})
    query = Query(f'"{quoted}"')
    assert not query or query.matches(quoted)


@given(TEXTS, TEXTS)
def test_a_snippet_holds_the_text_on_one_line(content, wanted):
    plain = Query(wanted).snippet(content, marks=("", ""), width=100)
    assert plain == " ".join(content.split()) or len(content) > 100
    assert len(normalise(content)) <= MAX_SEARCHED_CHARS


def test_only_the_beginning_of_a_huge_message_is_searched(book):
    book.write("first " + "x" * 1_000_000 + " last" + "天气" * 1000)
    assert len(book.find("first")) == 1
    assert book.find("last") == []


def test_a_huge_message_without_repetition_can_be_indexed(book):
    rng = random.Random(1)
    book.write("".join(chr(rng.randrange(0x20000, 0x2A000)) for _ in range(200_000)) + "饕", "饕")
    assert len(book.find("饕")) == 1


# ---------------------------------------------------------------------------------------- order and filters


def test_the_newest_come_first_also_when_they_were_stored_earlier(book):
    book.write("天气 new", at=NOON)
    book.write("天气 old", at=NOON - timedelta(days=900))
    book.write("天气 middle", at=NOON - timedelta(days=1))
    assert book.texts("天气") == ["天气 new", "天气 middle", "天气 old"]


def test_imported_history_does_not_push_newer_messages_from_the_page(book):
    book.write(*[f"天气 new {n}" for n in range(30)])
    book.write(*[f"天气 old {n}" for n in range(700)], at=NOON - timedelta(days=900))
    assert book.texts("天气", limit=2) == ["天气 new 29", "天气 new 28"]
    assert book.texts("天气", limit=2, offset=29) == ["天气 new 0", "天气 old 699"]


def test_pages_follow_each_other_without_gap_or_repetition(book):
    for n in range(40):
        book.write(f"天气 {n}", at=NOON + timedelta(seconds=n // 7))
    whole = book.texts("天气", limit=100)
    paged = [hit for start in range(0, 44, 4) for hit in book.texts("天气", limit=4, offset=start)]
    assert paged == whole == [f"天气 {n}" for n in reversed(range(40))]


def test_the_first_page_of_a_common_word_is_the_beginning_of_all_its_hits(book):
    book.write(*[f"{'weather' if n % 3 else 'other'} {n}" for n in range(1500)])
    book.write("weather, long ago", at=NOON - timedelta(days=900))
    whole = book.texts("weather", limit=2000)
    assert len(whole) == 1001
    assert whole[-1] == "weather, long ago"
    for offset in (0, 640, 980):
        assert book.texts("wea", limit=20, offset=offset) == whole[offset : offset + 20]


def test_a_common_prefix_is_found_without_putting_all_its_hits_together(sqlite_url):
    book = Book(sqlite_url)
    try:
        book.conversation(1)
        book.write(*[f"天气 {n}" for n in range(50)])
        asked: list[str] = []
        event.listen(book.engine, "before_cursor_execute", lambda *call: asked.append(call[2]))
        assert book.texts("天", limit=20) == [f"天气 {n}" for n in range(49, 29, -1)]
        assert not [statement for statement in asked if "MATCH" in statement]
    finally:
        book.engine.dispose()


def test_a_hit_tells_where_it_was_said_and_by_whom(book):
    book.conversation(2, user_key="qq:chat:g1", chat_id="g1", title="Group", tenant_id="acme")
    book.write("今天天气真好", conversation=2, sender_id="qq:group:bob", tokens=5)
    (hit,) = book.find("天气")
    message_id = hit.pop("message_id")
    assert isinstance(message_id, int)
    assert hit == {
        "conversation_id": 2,
        "public_id": "public-2",
        "tenant_id": "acme",
        "user_key": "qq:group:bob",
        "platform": "qq",
        "chat_id": "g1",
        "title": "Group",
        "role": "user",
        "content": "今天天气真好",
        "tokens": 5,
        "snippet": "今天«天气»真好",
        "timestamp": "2025-06-18T12:00:00Z",
    }


def test_a_search_is_narrowed_by_speaker_platform_role_tenant_and_time(book):
    book.conversation(2, user_key="qq:chat:g1", tenant_id="acme")
    book.write("天气 1", sender_id="web:private:ann", at=NOON)
    book.write("天气 2", role="assistant", at=NOON + timedelta(hours=1))
    book.write("天气 3", conversation=2, sender_id="qq:group:ann", at=NOON + timedelta(hours=2))
    book.write("天气 4", conversation=2, sender_id="qq:group:bob", at=NOON + timedelta(hours=3))
    book.write("天气 5", conversation=2, role="assistant", at=NOON + timedelta(hours=4))
    found = {
        "speaker": book.texts("天气", user_key="qq:group:ann"),
        "own answers too": book.texts("天气", user_key="web:private:ann"),
        "person": book.texts("天气", person="qq:ann"),
        "person by a key": book.texts("天气", person="qq:private:ann"),
        "person's answers": book.texts("天气", person="web:ann"),
        "platform": book.texts("天气", platform="web"),
        "role": book.texts("天气", role="assistant"),
        "tenant": book.texts("天气", tenant_id="acme"),
        "first tenant": book.texts("天气", tenant_id="default"),
        "speaker in a tenant": book.texts("天气", user_key="qq:group:ann", tenant_id="acme"),
        "speaker in another": book.texts("天气", user_key="qq:group:ann", tenant_id="default"),
        "other tenant": book.texts("天气", tenant_id="other"),
        "since": book.texts("天气", since=NOON + timedelta(hours=3)),
        "until": book.texts("天气", until=NOON + timedelta(hours=1)),
        "naive": book.texts("天气", until=datetime(2025, 6, 18, 13)),  # noqa: DTZ001  # naive is meant
        "both": book.texts("天气", since=NOON + timedelta(hours=1), until=NOON + timedelta(hours=2)),
        "nobody": book.texts("天气", user_key="\0\ud800"),
    }
    assert found == {
        "speaker": ["天气 3"],
        "own answers too": ["天气 2", "天气 1"],
        "person": ["天气 3"],
        "person by a key": ["天气 3"],
        "person's answers": ["天气 2", "天气 1"],
        "platform": ["天气 2", "天气 1"],
        "role": ["天气 5", "天气 2"],
        "tenant": ["天气 5", "天气 4", "天气 3"],
        "first tenant": ["天气 2", "天气 1"],
        "speaker in a tenant": ["天气 3"],
        "speaker in another": [],
        "other tenant": [],
        "since": ["天气 5", "天气 4"],
        "until": ["天气 1"],
        "naive": ["天气 1"],
        "both": ["天气 2"],
        "nobody": [],
    }


def test_filters_give_the_same_through_the_index_and_without_it(book):
    book.conversation(2, user_key="qq:private:bob")
    few, many = 30, search.NARROW + 10
    book.write(*[f"天气 {n}" for n in range(many)], conversation=2, at=NOON - timedelta(days=1))
    book.write(*[f"天气 x{n}" for n in range(few)], sender_id="web:private:ann")
    assert len(book.find("x", user_key="web:private:ann", limit=many)) == few
    assert len(book.find("天气", user_key="qq:private:bob", limit=2 * many)) == many
    assert len(book.find("天气", until=NOON, limit=2 * many)) == many
    assert len(book.find("天气", since=NOON - timedelta(days=2), limit=2 * many)) == many + few
    assert len(book.find("天气", platform="web", limit=2 * many)) == few


def test_hidden_conversations_and_recalled_messages_are_not_found(book):
    book.conversation(2, hidden_at=NOON)
    book.write("天气 1", recalled_at=NOON)
    book.write("天气 2", conversation=2)
    assert book.find("天气") == []


def test_a_person_speaks_under_the_keys_of_each_kind_of_chat():
    every = {"qq:private:a%3Ab", "qq:group:a%3Ab", "qq:channel:a%3Ab"}
    assert set(Person.of("qq:group:a%3Ab").keys) == every
    assert set(Person.of("qq:a%3Ab").keys) == every | {"qq:a%3Ab"}
    assert set(Person.of("qq:group:a%3Ab").ids) == {"qq:group:a%3Ab", "qq:a%3Ab"}
    assert Person.of("user123").keys == ("user123",)
    assert Person.of("a:b:c:d").keys == ("a:b:c:d",)
    assert Person.of("qq:chat:g1").keys == ("qq:chat:g1",)


def test_a_person_with_a_long_name_is_found_by_it():
    sender = "x" * 245
    assert user_key("qq", "private", sender) in Person.of(person_key("qq", sender)).keys
    assert user_key("qq", "private", "y" * 300) in Person.of(person_key("qq", "y" * 300)).keys


# --------------------------------------------------------------------------------------------------- snippets


@pytest.mark.parametrize(
    ("query", "content", "snippet"),
    [
        ("天气", "今天\n天气 好", "今天 «天气» 好"),
        ("天", "天天", "«天天»"),
        ("fi", "ﬁne", "«ﬁ»ne"),
        ("strasse", "Die Straße!", "Die «Straße»!"),
        ("ab b", "ab b", "«ab» «b»"),
        ("e\u0301", "caf\u0065\u0301", "caf\u0065\u0301"),
    ],
)
def test_a_snippet_marks_the_hits_in_the_text_as_it_was_written(query, content, snippet):
    assert Query(query).snippet(content) == snippet


def test_a_snippet_of_a_long_text_shows_what_is_around_the_hit():
    snippet = Query("needle").snippet("hay " * 500 + "needle" + " hay" * 500, marks=("<b>", "</b>"))
    assert "<b>needle</b>" in snippet
    assert snippet.startswith("…")
    assert snippet.endswith("…")
    assert len(snippet) < 140


# ------------------------------------------------------------------------------- the index follows the messages


def test_an_edited_message_is_found_by_its_new_words_only(book):
    book.write("天气")
    (hit,) = book.find("天气")
    row = {"id": hit["message_id"], "content": hit["content"]}
    with book.engine.begin() as connection:
        search.remove_messages(connection, book.kind, [row])
        connection.execute(update(messages).values(content="plugin"))
        search.index_messages(connection, book.kind, [row | {"content": "plugin"}])
    assert book.texts("plugin") == ["plugin"]
    assert book.texts("天气") == []
    assert book.indexed("天气") == 0


def test_removing_what_was_never_indexed_or_is_removed_already_is_no_error(book):
    book.write("天气")
    with book.engine.begin() as connection:
        connection.execute(update(messages).values(search_terms=None))
        rows = connection.execute(select(messages.c.id, messages.c.content)).mappings().all()
        for _ in range(3):
            search.remove_messages(connection, book.kind, rows)
        search.index_messages(connection, book.kind, rows)
    assert book.texts("天气") == ["天气"]


def test_what_is_not_in_the_index_yet_can_be_indexed_in_pieces(book):
    book.write(*[f"天气 {n}" for n in range(25)])
    with book.engine.begin() as connection:
        rows = connection.execute(select(messages.c.id, messages.c.content)).mappings().all()
        search.remove_messages(connection, book.kind, rows)
        connection.execute(update(messages).values(search_terms=None))
    assert book.find("天气") == []
    after, pieces = 0, 0
    while after is not None:
        with book.engine.begin() as connection:
            after = search.index_missing(connection, book.kind, after=after, most=10)
        pieces += 1
    assert (len(book.find("天气", limit=50)), pieces) == (25, 3)


def test_a_conversation_that_is_cleared_is_taken_out_of_the_index(book):
    book.write(*[f"天气 {n}" for n in range(30)])
    with book.engine.begin() as connection:
        connection.execute(update(conversations).values(last_seq=40))
        clear(Transaction(connection, book.kind, int(NOON.timestamp() * 1000)), 1)
    assert book.find("天气") == []
    assert book.indexed("天气") == 0


def test_cleaning_up_takes_messages_out_of_the_index(book):
    book.write(*[f"天气 {n}" for n in range(30)])
    with book.engine.begin() as connection:
        connection.execute(update(conversations).values(hidden_at=NOON))
        tx = Transaction(connection, book.kind, int(NOON.timestamp() * 1000))
        while remove_hidden(tx):
            pass
    assert book.indexed("天气") == 0


def test_removed_words_leave_the_file(sqlite_url):
    book = Book(sqlite_url)
    book.conversation(1)
    for n in range(40):
        book.write(f"secretword{n} 天气")
    with book.engine.begin() as connection:
        connection.execute(update(conversations).values(last_seq=40))
        clear(Transaction(connection, "sqlite", int(NOON.timestamp() * 1000)), 1)
    more = first = True
    while more:
        with book.engine.begin() as connection:
            more = search.compact(connection, "sqlite", pages=2, begin=first)
        first = False
    with book.engine.begin() as connection:
        blocks = connection.execute(text(f"SELECT block FROM {SEARCH_TABLE}_data")).scalars().all()
    assert not any(b"secretword" in block for block in blocks)
    book.engine.dispose()


async def test_messages_of_the_server_are_searchable_and_a_cleared_conversation_is_not(db_url):
    async with opened(db_url) as store:
        lane = "user:web:private:ann"

        async def turn(n, content, **more):
            payload = InboundMessage("web", f"e{n}", text=content, sender_id="ann").to_json()
            await store.receive([Arrival("web", f"e{n}", lane, payload)])
            (work,) = await store.begin([Lease(lane, str(store.owner), f"token{n}")])
            new = NewConversation("public", lane, "web:private:ann", "web", None, "web:ann", None, None)
            return await store.commit(Outcome(work, End.ANSWERED, conversation=new, **more))

        def look(query):
            return store.read(
                lambda tx: [h["content"] for h in search.search_messages(tx.connection, tx.kind, query)]
            )

        said = tuple(
            NewMessage(role, content, 1, sender_id="web:private:ann")
            for role, content in (("user", "天气 ask"), ("assistant", "天气 answer"))
        )
        await turn(1, "天气 ask", messages=said)
        assert await look("天气") == ["天气 answer", "天气 ask"]
        assert await look("ans") == ["天气 answer"]
        await turn(2, "/clear", change=Change.CLEAR)
        assert await look("天气") == []
