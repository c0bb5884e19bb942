"""The tables, once for every database.

Two kinds of instants: what people and the library see (``created_at``, ``timestamp``) is a real date and time
in UTC; what the machinery decides with (leases, retries, windows) is a number of milliseconds since 1970.
Identifiers compare as bytes everywhere (``Key``): on MariaDB the default collation would make ``Ou_A``, ``ou_a``
and ``ou_a `` one person.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    DDL,
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    event,
    func,
    text,
)
from sqlalchemy.dialects import mysql, postgresql

from feishu_bot.model import MAX_KEY_LENGTH, MAX_SCOPE_LENGTH

if TYPE_CHECKING:
    from sqlalchemy.engine import Dialect
    from sqlalchemy.types import TypeEngine

HEAD = "0001"  # the newest migration; a database with another one is upgraded or refused

OPEN = "open"  # inbox.state of a message that has not ended
PENDING, ATTEMPTING, SENT = "pending", "attempting", "sent"  # outbox.state on its way
UNSENT = (PENDING, ATTEMPTING)


class UTCDateTime(TypeDecorator[datetime]):
    """An aware UTC datetime, with microseconds, whatever the database keeps."""

    impl = DateTime
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(DateTime(timezone=True))
        if dialect.name in {"mysql", "mariadb"}:
            return dialect.type_descriptor(mysql.DATETIME(fsp=6))
        return dialect.type_descriptor(DateTime())

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        # A naive value is read as UTC: the library promises so.
        value = value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
        return value if dialect.name == "postgresql" else value.replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002  # the signature is SQLAlchemy's
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def Key(length: int = MAX_KEY_LENGTH) -> TypeEngine[str]:  # noqa: N802  # reads like the type it returns
    """Return a string type that compares as bytes."""
    binary = mysql.VARCHAR(length, charset="utf8mb4", collation="utf8mb4_nopad_bin")
    return String(length).with_variant(binary, "mysql", "mariadb")


def LongText() -> TypeEngine[str]:  # noqa: N802  # reads like the type it returns
    """Return a text type without MariaDB's bound of 64 KiB."""
    return Text().with_variant(mysql.LONGTEXT(charset="utf8mb4", collation="utf8mb4_bin"), "mysql", "mariadb")


def SearchTerms() -> TypeEngine[str]:  # noqa: N802  # reads like the type it returns
    """Return the type of what a full-text index reads; on SQLite the terms are in a table of their own."""
    on_mariadb = mysql.MEDIUMTEXT(charset="ascii", collation="ascii_bin")
    return (
        Text().with_variant(postgresql.TSVECTOR(), "postgresql").with_variant(on_mariadb, "mysql", "mariadb")
    )


BigId = BigInteger().with_variant(Integer, "sqlite")  # only INTEGER is a rowid alias on SQLite

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _table(name: str, *items: Any, **options: Any) -> Table:
    return Table(name, metadata, *items, mysql_charset="utf8mb4", mysql_engine="InnoDB", **options)


def _sums() -> list[Column[Any]]:
    """Return what calls of the ledger come to; ``priced`` are those whose cost is known."""
    names = (
        "calls",
        "input_tokens",
        "output_tokens",
        "cached_tokens",
        "reasoning_tokens",
        "priced",
        "cost_micro_usd",
    )
    return [Column(name, BigInteger, nullable=False) for name in names]


def _only(condition: str) -> dict[str, Any]:
    """Return the arguments of a partial index; MariaDB has none and indexes every row."""
    return {"sqlite_where": text(condition), "postgresql_where": text(condition)}


conversations = _table(
    "conversations",
    Column("id", BigId, primary_key=True, autoincrement=True),
    Column("public_id", Key(36), nullable=False, unique=True),
    Column("scope_key", Key(MAX_SCOPE_LENGTH)),  # null when archived
    Column("tenant_id", Key(), nullable=False, server_default="default"),
    Column("user_key", Key(), nullable=False),
    Column("platform", String(50), nullable=False),
    Column("chat_id", Key()),
    Column("user_id", Key()),
    Column("agent", String(64)),
    Column("title", String(255)),
    Column("traits", LongText()),
    Column("summary", LongText()),
    Column("active_persona_id", String(255)),
    Column("model", String(255)),  # chosen for this conversation
    Column("summarized_to", BigInteger, nullable=False, server_default="0"),  # seq; 0: there is no summary
    Column("parent_id", BigId),
    Column("forked_at", BigId),
    Column("total_tokens", BigInteger, nullable=False, server_default="0"),
    Column("message_count", BigInteger, nullable=False, server_default="0"),
    Column("last_seq", BigInteger, nullable=False, server_default="0"),
    # Messages up to this number were cleared and are on their way out; null: there are none.
    Column("cleared_seq", BigInteger),
    Column("version", BigInteger, nullable=False, server_default="0"),
    Column("hidden_at", UTCDateTime),
    Column("created_at", UTCDateTime, nullable=False),
    Column("last_activity", UTCDateTime, nullable=False),
    UniqueConstraint("scope_key", "tenant_id"),  # in this order: the way of a message looks for scopes
    Index(None, "user_key", "last_activity"),
    Index(None, "last_activity"),
    Index(None, "chat_id"),
    Index(None, "user_id"),
    Index(None, "hidden_at", **_only("hidden_at IS NOT NULL")),
    Index(None, "cleared_seq", **_only("cleared_seq IS NOT NULL")),
    sqlite_autoincrement=True,
)

messages = _table(
    "messages",
    Column("id", BigId, primary_key=True, autoincrement=True),
    Column("conversation_id", BigId, ForeignKey("conversations.id", ondelete="CASCADE"), nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("role", String(20), nullable=False),
    Column("content", LongText(), nullable=False),
    Column("sender_id", Key()),
    Column("source_id", Key()),
    Column("tokens", BigInteger, nullable=False, server_default="0"),
    Column("metadata_json", LongText()),
    Column("save_key", Key()),
    Column("timestamp", UTCDateTime, nullable=False),
    Column("edited_at", UTCDateTime),
    Column("recalled_at", UTCDateTime),
    Column("search_terms", SearchTerms()),  # null: not in the search index; written by store.search alone
    UniqueConstraint("conversation_id", "seq"),
    UniqueConstraint("conversation_id", "save_key"),
    Index(None, "timestamp"),
    Index(None, "search_terms", postgresql_using="gin", mysql_prefix="FULLTEXT").ddl_if(
        callable_=lambda *_, dialect, **__: dialect.name != "sqlite"
    ),
    Index(None, "source_id", **_only("source_id IS NOT NULL")),
    Index(None, "sender_id", **_only("sender_id IS NOT NULL")),
    sqlite_autoincrement=True,
)

#: Of messages beside their conversations: they were not cleared. Who reads messages asks for it, or for ``cleared_seq``.
NOT_CLEARED = messages.c.seq > func.coalesce(conversations.c.cleared_seq, 0)

# Keeps terms only, no text: a quarter of the size. Who removes a message gives its text once more (store.search).
SEARCH_TABLE = "messages_search"


def _on_sqlite(statement: str) -> Any:
    return DDL(statement).execute_if(dialect="sqlite")  # type: ignore[no-untyped-call]


_FTS5 = "fts5(terms, content='', tokenize='ascii', detail=none, columnsize=0)"
event.listen(messages, "after_create", _on_sqlite(f"CREATE VIRTUAL TABLE {SEARCH_TABLE} USING {_FTS5}"))
event.listen(messages, "before_drop", _on_sqlite(f"DROP TABLE IF EXISTS {SEARCH_TABLE}"))

lanes = _table(
    "lanes",
    Column("key", Key(MAX_SCOPE_LENGTH), primary_key=True),
    # Work to do on messages, and who does it.
    Column("ready_at", BigInteger),
    Column("lease_owner", Key(160)),
    Column("lease_until", BigInteger, nullable=False, server_default="0"),
    Column("lease_token", Key(32)),
    # Parts to deliver, and who delivers them.
    Column("send_ready_at", BigInteger),
    Column("send_owner", Key(160)),
    Column("send_until", BigInteger, nullable=False, server_default="0"),
    Column("send_token", Key(32)),
    Index(None, "ready_at", **_only("ready_at IS NOT NULL")),
    Index(None, "send_ready_at", **_only("send_ready_at IS NOT NULL")),
    sqlite_with_rowid=False,
)

inbox = _table(
    "inbox",
    Column("id", BigId, primary_key=True, autoincrement=True),
    Column("account", Key(32), nullable=False),
    Column("event_key", Key(MAX_SCOPE_LENGTH), nullable=False),
    Column("lane_key", Key(MAX_SCOPE_LENGTH), nullable=False),
    Column("payload", LongText(), nullable=False),
    Column("state", Key(16), nullable=False),
    Column("reason", String(255)),
    Column("attempts", Integer, nullable=False, server_default="0"),  # since it was last opened
    Column(
        "runs", Integer, nullable=False, server_default="0"
    ),  # attempts ever: numbers its calls in the ledger
    Column("begun_token", Key(32)),  # the lease under which the last attempt began
    Column("reply_before", BigInteger),
    Column("received_at", BigInteger, nullable=False),
    Column("ended_at", BigInteger),
    UniqueConstraint("account", "event_key"),
    Index("ix_inbox_open_lane", "lane_key", "state", "id", **_only("state = 'open'")),
    Index("ix_inbox_open_age", "state", "received_at", **_only("state = 'open'")),
    Index(None, "ended_at", **_only("ended_at IS NOT NULL")),
    sqlite_autoincrement=True,
)

outbox = _table(
    "outbox",
    Column("id", BigId, primary_key=True, autoincrement=True),
    Column("source", Key(), nullable=False),
    Column("kind", Key(16), nullable=False),
    Column("part", Integer, nullable=False),
    Column("lane_key", Key(MAX_SCOPE_LENGTH), nullable=False),
    Column("account", Key(32), nullable=False),
    Column("payload", LongText(), nullable=False),
    Column("state", Key(16), nullable=False),
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("attempt_token", Key(32)),  # the lease under which it is being sent
    Column("not_before", BigInteger, nullable=False, server_default="0"),
    Column("reply_before", BigInteger),
    Column("first_attempt_at", BigInteger),
    Column("unknown_at", BigInteger),  # first attempt whose outcome is not known
    Column("sent_id", Key()),
    Column("conversation_id", BigId),  # where the answer is stored
    Column("last_error", String(500)),
    Column("created_at", BigInteger, nullable=False),
    Column("ended_at", BigInteger),
    UniqueConstraint("source", "kind", "part"),
    Index(
        "ix_outbox_unsent_lane",
        "lane_key",
        "state",
        "id",
        **_only("state IN ('pending', 'attempting')"),
    ),
    # MariaDB's index above holds all rows: there, what is unsent is counted by this one.
    Index("ix_outbox_unsent_age", "state", "created_at").ddl_if(dialect="mysql"),
    Index(None, "sent_id", **_only("sent_id IS NOT NULL")),
    Index(None, "ended_at", **_only("ended_at IS NOT NULL")),
    sqlite_autoincrement=True,
)

usage = _table(
    "usage",
    Column("id", BigId, primary_key=True, autoincrement=True),
    Column("inbox_id", BigId, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("call", Integer, nullable=False),
    Column("conversation_id", BigId),
    Column("user_key", Key()),
    Column("user_id", Key()),
    Column("chat_id", Key()),
    Column("platform", Key(50), nullable=False),
    Column("tenant_id", Key(), nullable=False, server_default="default"),
    Column("model", Key(), nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False, server_default="0"),  # of the input
    Column("reasoning_tokens", BigInteger, nullable=False, server_default="0"),  # of the output
    Column(
        "cost_micro_usd", BigInteger
    ),  # millionths of a dollar, so that sums are exact; null: no price known
    Column("outcome", Key(16), nullable=False),
    Column("at", UTCDateTime, nullable=False),
    Column("fresh", Integer, server_default="1"),  # null: it is in the two tables of sums below
    UniqueConstraint("inbox_id", "attempt", "call"),
    Index(None, "at"),
    Index(None, "user_id", "at"),
    Index(None, "fresh", **_only("fresh IS NOT NULL")),
    sqlite_autoincrement=True,
)

usage_hours = _table(
    "usage_hours",
    Column("hour", BigInteger, primary_key=True, autoincrement=False),  # since 1970
    Column("tenant_id", Key(), primary_key=True),
    Column("platform", Key(50), primary_key=True),
    Column("model", Key(), primary_key=True),
    *_sums(),
    sqlite_with_rowid=False,
)

usage_names = _table(
    "usage_names",
    Column("kind", Key(4), primary_key=True),  # user or chat
    Column("name", Key(), primary_key=True),  # empty: of nobody, or of no chat
    Column("tenant_id", Key(), primary_key=True),
    *_sums(),
    sqlite_with_rowid=False,
)

budget_windows = _table(
    "budget_windows",
    Column("budget", Key(64), primary_key=True),
    Column("key", Key(), primary_key=True),
    Column("window_start", BigInteger, primary_key=True, autoincrement=False),
    # All three are counted whatever the budget limits now: another limit then finds what was used.
    Column("used", BigInteger, nullable=False, server_default="0"),  # tokens
    Column("reserved", BigInteger, nullable=False, server_default="0"),
    Column("used_requests", BigInteger, nullable=False, server_default="0"),
    Column("reserved_requests", BigInteger, nullable=False, server_default="0"),
    Column("used_micro_usd", BigInteger, nullable=False, server_default="0"),
    Column("reserved_micro_usd", BigInteger, nullable=False, server_default="0"),
    # What operators have added to the limits, for this window.
    Column("granted", BigInteger, nullable=False, server_default="0"),
    Column("granted_requests", BigInteger, nullable=False, server_default="0"),
    Column("granted_micro_usd", BigInteger, nullable=False, server_default="0"),
    Column(
        "told", Integer, nullable=False, server_default="0"
    ),  # 1: that it is nearly used up, 2: that it is
    CheckConstraint(
        "used >= 0 AND reserved >= 0 AND used_requests >= 0 AND reserved_requests >= 0"
        " AND used_micro_usd >= 0 AND reserved_micro_usd >= 0",
        name="not_negative",
    ),
    sqlite_with_rowid=False,
)

reservations = _table(
    "reservations",
    Column("inbox_id", BigId, primary_key=True, autoincrement=False),
    Column("attempt", Integer, primary_key=True, autoincrement=False),
    Column("call", Integer, primary_key=True, autoincrement=False),
    Column("model", String(255), nullable=False),
    Column("input_tokens", BigInteger, nullable=False),  # of ``tokens``, what the prompt takes
    Column("tokens", BigInteger, nullable=False),
    Column("micro_usd", BigInteger),  # null: no price known
    Column("windows", LongText(), nullable=False),  # JSON: [[budget, key, window_start], …]
    Column("ledger", LongText(), nullable=False),  # JSON: who is booked if the call's outcome stays unknown
    Column("at", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

job_runs = _table(
    "job_runs",
    Column("job", Key(64), primary_key=True),
    Column("fire_time", BigInteger, primary_key=True, autoincrement=False),
    Column("node", Key(160), nullable=False),
    Column("started_at", BigInteger, nullable=False),
    Column("finished_at", BigInteger),
    Column("error", String(500)),
    sqlite_with_rowid=False,
)

totals = _table(
    "totals",
    Column("day", Key(10), primary_key=True),
    Column("account", Key(32), primary_key=True),
    Column("end", Key(16), primary_key=True),  # one of the five ends, or ``removed``
    Column("shard", Integer, primary_key=True, autoincrement=False),  # so that processes do not share a row
    Column("count", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

# Who has changed what, for good.
audit = _table(
    "audit",
    Column("id", BigId, primary_key=True, autoincrement=True),
    Column("at", UTCDateTime, nullable=False),
    Column("actor", Key()),  # a person, or the command line's user; null: forgotten
    Column("action", Key(64), nullable=False),  # budget.grant, …
    Column("target", Key()),  # what was changed; null: a person who was forgotten
    Column("before", LongText()),  # JSON
    Column("after", LongText()),
    Column(
        "source", Key(), unique=True
    ),  # of an order that may be carried out twice: the second changes nothing
    Index(None, "at"),
    sqlite_autoincrement=True,
)

processes = _table(
    "processes",
    Column("owner", Key(160), primary_key=True),
    Column("host", Key(100), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("version", String(32), nullable=False),
    Column("started_at", BigInteger, nullable=False),
    Column("heartbeat_at", BigInteger, nullable=False),
    Column("report", LongText()),  # JSON: what a server says of itself; null: a command
    sqlite_with_rowid=False,
)

# What operators have ordered and what every process must know of the others: a few rows, read each second.
controls = _table(
    "controls",
    Column("kind", Key(16), primary_key=True),  # pause, drain, reload, alert, warned, clock or sign
    Column("name", Key(), primary_key=True),
    Column("value", LongText(), nullable=False),  # JSON
    Column("at", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

# What chats have said last of messages that are no answers.
refusals = _table(
    "refusals",
    Column("account", Key(32), primary_key=True),
    Column("chat", Key(), primary_key=True),
    Column("refused", Integer, nullable=False),
    Column("at", BigInteger, nullable=False),  # by the platform's clock
    sqlite_with_rowid=False,
)

# Who may come in by the browser's and scripts' doors.
accounts = _table(
    "accounts",
    Column("name", Key(64), primary_key=True),
    Column("password", String(255), nullable=False),  # argon2id, with its parameters
    Column("role", Key(16), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

# Secrets that stand for an account: sessions of browsers and tokens of scripts. Of the secret only its hash.
tokens = _table(
    "tokens",
    Column("id", BigId, primary_key=True, autoincrement=True),
    Column("account", Key(64), nullable=False),
    Column("kind", Key(16), nullable=False),  # session or api
    Column("hash", Key(64), nullable=False, unique=True),
    Column("label", String(255), nullable=False),  # a browser, or what a token is for
    Column("address", String(64), nullable=False, server_default=""),
    Column("created_at", BigInteger, nullable=False),
    Column("used_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    Index(None, "account"),
    sqlite_autoincrement=True,
)

login_attempts = _table(
    "login_attempts",
    Column("kind", Key(16), primary_key=True),  # account or address
    Column("name", Key(64), primary_key=True),
    Column("count", Integer, nullable=False),
    Column("until", BigInteger, nullable=False),  # then they are forgotten
    Index(None, "until"),
    sqlite_with_rowid=False,
)
