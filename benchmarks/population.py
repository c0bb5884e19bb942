"""A database with as many messages as a benchmark asks for, made once and used again.

Ten messages a conversation on average (2 to 30), a user of ten conversations, one call in the ledger for each answer,
spread over two years; words and Chinese characters as common as in speech (the n-th one 1/n as often as the first).
Written as fast as the database takes rows, past the library, with the counters and the search index that the library
would have left. What was interrupted goes on where it stopped.
"""

from __future__ import annotations

import itertools
import random
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sqlalchemy import BindParameter, func, literal, select, text

from feishu_bot.store.conversations import user_scope
from feishu_bot.store.engine import open_engine
from feishu_bot.store.schema import SEARCH_TABLE, conversations, messages, usage, usage_hours, usage_names
from feishu_bot.store.search import column_value, compact
from feishu_bot.store.sums import CHAT, NOBODY, NUMBERS, USER, hour_of
from feishu_bot.store.terms import terms
from feishu_bot.store.transactions import Transactions

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sqlalchemy import Connection, Engine, Table

COMMON_WORD, RARE_WORD, COMMON_PAIR, COMMON_CHARACTER = "weather", "quetzalcoatl", "天气", "天"
RARE: Final = 20  # messages with the rare word, in equal distances
_LENGTHS: Final = (2, 2, 4, 4, 6, 8, 10, 14, 20, 30)  # messages of ten conversations that follow each other
_PER_TEN: Final = sum(_LENGTHS)
_AT_ONCE: Final = 1000  # conversations that are held at the same time: their messages lie mixed
_BATCHES: Final = 5  # such groups in one transaction
_TEXTS: Final = 20_000  # different messages
_SPAN: Final = timedelta(days=730)
_ROWID_CACHE_KIB: Final = 512 * 1024

_MESSAGE = ("id", "conversation_id", "seq", "role", "content", "tokens", "timestamp", "search_terms")
_CONVERSATION = (
    *("id", "public_id", "scope_key", "user_key", "platform", "chat_id", "user_id", "total_tokens"),
    *("message_count", "last_seq", "created_at", "last_activity"),
)
_USAGE = (
    *("id", "inbox_id", "attempt", "call", "conversation_id", "user_key", "user_id", "platform", "model"),
    *("input_tokens", "output_tokens", "cost_micro_usd", "outcome", "at", "fresh"),
)
_SECONDARY: Final = (messages, conversations, usage)  # their indexes are made at the end on PostgreSQL

Row = tuple[Any, ...]


class _Text(NamedTuple):
    content: str
    tokens: int
    terms: str  # as SQLite's index takes them
    column: str  # messages.search_terms


@dataclass(slots=True)
class _Rows:
    conversations: list[Row]
    messages: list[Row]
    usage: list[Row]
    texts: list[_Text]  # of the messages


class Population:
    """What a database of ``count`` messages holds; the same for the same count, whenever it is asked."""

    def __init__(self, kind: str, count: int) -> None:
        group = _AT_ONCE * _PER_TEN // 10
        self.groups = max(1, round(count / group))
        self.count = self.groups * group
        self._kind = kind
        self._begin = datetime(2025, 1, 1, tzinfo=UTC)
        self._texts = [self._text(content) for content in _contents()]
        self._rare = self._text(f"The {RARE_WORD} is a feathered serpent. 羽蛇神")
        self._users = max(1, self.groups * _AT_ONCE // 10)

    @property
    def end(self) -> datetime:
        """When the last message was said."""
        return self._begin + _SPAN

    def conversations_of(self, group: int) -> int:
        """Return how many conversations there are up to this group."""
        return group * _AT_ONCE

    def rows(self, group: int) -> _Rows:
        """Return the rows of one group of conversations."""
        made = _Rows([], [], [], [])
        choose = random.Random(group).randrange
        first, message_id = group * _AT_ONCE + 1, group * _AT_ONCE * _PER_TEN // 10
        begin, step = self._begin + _SPAN * (group / self.groups), _SPAN / self.groups / max(_LENGTHS)
        instants = [self._instant(begin + step * n) for n in range(max(_LENGTHS))]
        tokens = [0] * _AT_ONCE
        rare_each = max(1, self.count // RARE)
        for n in range(max(_LENGTHS)):
            role, instant = ("assistant" if n % 2 else "user"), instants[n]
            for index in range(_AT_ONCE):
                if n >= _LENGTHS[index % 10]:
                    continue
                message_id += 1
                said = self._texts[choose(_TEXTS)] if message_id % rare_each else self._rare
                tokens[index] += said.tokens
                conversation_id = first + index
                made.messages.append(
                    (
                        message_id,
                        conversation_id,
                        n + 1,
                        role,
                        said.content,
                        said.tokens,
                        instant,
                        said.column,
                    )
                )
                made.texts.append(said)
                if n % 2:
                    made.usage.append(self._call(message_id, conversation_id, said.tokens, instant))
        for index in range(_AT_ONCE):
            number, length = first + index, _LENGTHS[index % 10]
            user = self._user(number)
            key = f"feishu:private:{user}"
            newest = number + self._users > self.groups * _AT_ONCE  # of its user
            made.conversations.append(
                (
                    *(
                        number,
                        f"{number:08x}-0000-4000-8000-000000000000",
                        user_scope(key) if newest else None,
                    ),
                    *(key, "feishu", "oc_" + user, user, tokens[index], length, length),
                    *(instants[0], instants[length - 1]),
                )
            )
        return made

    def _user(self, conversation_id: int) -> str:
        return f"ou_{conversation_id % self._users:07x}"

    def _call(self, message_id: int, conversation_id: int, tokens: int, instant: Any) -> Row:
        user = self._user(conversation_id)
        model = ("deepseek-chat", "gpt-4o-mini", "qwen-plus")[conversation_id % 3]
        return (
            *(message_id, message_id, 1, 1, conversation_id, f"feishu:private:{user}", user),
            *("feishu", model, 20 * tokens, tokens, tokens, "ok", instant, None),
        )

    def _text(self, content: str) -> _Text:
        found = " ".join(terms(content))
        return _Text(content, len(content) // 3 + 1, found, column_value(self._kind, content))

    def _instant(self, at: datetime) -> Any:
        """Return an instant as the driver takes it."""
        return at.replace(tzinfo=None).isoformat(" ", "microseconds") if self._kind == "sqlite" else at


def _contents() -> list[str]:
    """Return the different messages: half Chinese, half English."""
    random_ = random.Random(1)
    syllables = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "en", "or")]
    words = ["the", COMMON_WORD, "is", "a", "what", "for", "and", "to", "how", "tomorrow"]
    words += ["".join(random_.choices(syllables, k=2 + n % 3)) for n in range(5000)]
    characters = [chr(code) for code in random_.sample(range(0x4E00, 0x9FA5), 3000)]
    pieces = ["今天", COMMON_PAIR, "怎么样", "我们", "的", "是"]
    pieces += ["".join(random_.choices(characters, k=1 + n % 3)) for n in range(5000)]
    weights = list(itertools.accumulate(1 / n for n in range(1, 5000)))
    found = []
    for n in range(_TEXTS):
        if n % 2:
            chosen = random_.choices(pieces[: len(weights)], cum_weights=weights, k=random_.randint(4, 20))
            found.append("".join(chosen) + "。")
        else:
            chosen = random_.choices(words[: len(weights)], cum_weights=weights, k=random_.randint(4, 24))
            found.append(" ".join(chosen).capitalize() + ".")
    return found


def make(db_url: str, count: int) -> Population:
    """Fill this database, or what is missing of it, and say how it goes on."""
    database = Transactions(db_url)
    try:
        database.prepare()
        kind = database.kind
    finally:
        database.close()
    population = Population(kind, count)
    engine = open_engine(db_url, patient=True)
    try:
        with engine.connect() as connection:
            whole = population.conversations_of(population.groups)
            newest = select(func.max(conversations.c.id)).where(conversations.c.id <= whole)
            done = int(connection.execute(newest).scalar_one() or 0) // _AT_ONCE
            connection.rollback()
        if done < population.groups:
            with _quick(engine, kind):
                _fill(engine, kind, population, done)
            _add_up(engine, kind)
        if kind == "postgresql":
            _finish_postgresql(engine)
    finally:
        engine.dispose()
    return population


@contextmanager
def _quick(engine: Engine, kind: str) -> Iterator[None]:
    """Let go of what makes rows safe or found at once, while the block runs."""
    if kind == "sqlite":
        with engine.connect() as connection:
            _set_hash_size(connection, 64 << 20)
        yield
        with engine.connect() as connection:
            _set_hash_size(connection, 1 << 20)
            # What this filling left to merge, a database that grew by single messages has merged long since.
            _progress("merging the search index")
            while compact(connection, kind, pages=2000):
                connection.commit()
            connection.commit()
        return
    with engine.begin() as connection:
        for table in _SECONDARY:
            for index in table.indexes:
                index.drop(connection, checkfirst=True)
    yield


def _set_hash_size(connection: Connection, size: int) -> None:
    """Set how many bytes of new terms SQLite's index collects before it writes them."""
    connection.exec_driver_sql(
        f"INSERT INTO {SEARCH_TABLE} ({SEARCH_TABLE}, rank) VALUES ('hashsize', {size})"
    )
    connection.commit()


def _fill(engine: Engine, kind: str, population: Population, done: int) -> None:
    start, first = time.perf_counter(), done
    with ExitStack() as stack:
        connection = stack.enter_context(engine.connect())
        if kind == "sqlite":
            driver: Any = connection.connection.driver_connection
            driver.execute("PRAGMA synchronous=OFF")
            driver.execute(f"PRAGMA cache_size=-{_ROWID_CACHE_KIB}")
        while done < population.groups:
            groups = range(done, min(done + _BATCHES, population.groups))
            for group in groups:
                rows = population.rows(group)
                _insert(connection, kind, conversations, _CONVERSATION, rows.conversations)
                _insert(connection, kind, messages, _MESSAGE, rows.messages)
                _insert(connection, kind, usage, _USAGE, rows.usage)
                if kind == "sqlite":
                    connection.exec_driver_sql(
                        f"INSERT INTO {SEARCH_TABLE} (rowid, terms) VALUES (?, ?)",
                        [(row[0], said.terms) for row, said in zip(rows.messages, rows.texts, strict=True)],
                    )
            connection.commit()
            done = groups.stop
            rate = (done - first) * population.count / population.groups / (time.perf_counter() - start)
            _progress(f"{done * population.count // population.groups} of {population.count}, {rate:.0f}/s")
        if kind == "sqlite":
            driver.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            connection.detach()  # its settings are not those of the store
    sys.stderr.write("\n")


def _add_up(engine: Engine, kind: str) -> None:
    """Leave the sums of the ledger as the job would have."""
    _progress("sums of the ledger")
    u = usage.c
    tokens = (u.input_tokens, u.output_tokens, u.cached_tokens, u.reasoning_tokens)
    numbers = (func.count(), *map(func.sum, tokens), func.count(u.cost_micro_usd), func.sum(u.cost_micro_usd))
    parts: list[tuple[Table, Sequence[Any]]] = [
        (usage_hours, (hour_of(kind), u.tenant_id, u.platform, u.model)),
        (usage_names, (literal(USER), u.user_id, u.tenant_id)),
        (usage_names, (literal(CHAT), func.coalesce(u.chat_id, NOBODY), u.tenant_id)),
    ]
    with engine.begin() as connection:
        for table in (usage_hours, usage_names):
            connection.execute(table.delete())
        for table, keys in parts:
            named = [column for column in keys if not isinstance(column, BindParameter)]
            rows = select(*keys, *numbers).group_by(*named)
            connection.execute(
                table.insert().from_select([*table.primary_key.columns.keys(), *NUMBERS], rows)
            )


def _insert(
    connection: Connection, kind: str, table: Table, columns: Sequence[str], rows: Sequence[Row]
) -> None:
    names = ", ".join(f'"{name}"' for name in columns)
    if kind == "sqlite":
        places = ", ".join("?" * len(columns))
        connection.exec_driver_sql(
            f"INSERT INTO {table.name} ({names}) VALUES ({places})",
            rows,
        )
        return
    if not connection.in_transaction():
        connection.begin()
    driver: Any = connection.connection.driver_connection
    with driver.cursor() as cursor, cursor.copy(f'COPY "{table.name}" ({names}) FROM STDIN') as copy:
        for row in rows:
            copy.write_row(row)


def _finish_postgresql(engine: Engine) -> None:
    """Make the indexes that are missing, and go on numbering behind the rows that are there."""
    with engine.connect() as connection:
        for table in _SECONDARY:
            for index in sorted(table.indexes, key=lambda index: str(index.name)):
                made = text("SELECT 1 FROM pg_indexes WHERE indexname = :name")
                if connection.execute(made, {"name": index.name}).first() is None:
                    _progress(f"index {index.name}")
                    index.create(connection)
                    connection.commit()
            newest = f'(SELECT max(id) FROM "{table.name}")'
            connection.execute(text(f"SELECT setval(pg_get_serial_sequence('{table.name}', 'id'), {newest})"))
            connection.commit()
    with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        seen = text("SELECT count(*) FROM pg_stats WHERE tablename = 'messages'")
        if not connection.execute(seen).scalar_one():
            _progress("statistics")
            connection.execute(text("VACUUM ANALYZE"))


def _progress(line: str) -> None:
    end = "\033[K\r" if sys.stderr.isatty() else "\n"
    sys.stderr.write(f"  {line}{end}")
    sys.stderr.flush()
