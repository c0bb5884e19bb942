"""The tables of the first release."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql, postgresql

revision = "0001"
down_revision = None

# Written out, not taken from the schema of today: that one goes on.
BIG_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
LONG_TEXT = sa.Text().with_variant(
    mysql.LONGTEXT(charset="utf8mb4", collation="utf8mb4_bin"), "mysql", "mariadb"
)
TERMS = (
    sa.Text()
    .with_variant(postgresql.TSVECTOR(), "postgresql")
    .with_variant(mysql.MEDIUMTEXT(charset="ascii", collation="ascii_bin"), "mysql", "mariadb")
)
INSTANT = (
    sa.DateTime()
    .with_variant(sa.DateTime(timezone=True), "postgresql")
    .with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
)
FTS = (
    "CREATE VIRTUAL TABLE messages_search USING "
    "fts5(terms, content='', tokenize='ascii', detail=none, columnsize=0)"
)


def key(length: int) -> Any:
    binary = mysql.VARCHAR(length, charset="utf8mb4", collation="utf8mb4_nopad_bin")
    return sa.String(length).with_variant(binary, "mysql", "mariadb")


def only(condition: str) -> dict[str, Any]:
    return {"sqlite_where": sa.text(condition), "postgresql_where": sa.text(condition)}


def sums() -> list[Any]:
    names = (
        "calls",
        "input_tokens",
        "output_tokens",
        "cached_tokens",
        "reasoning_tokens",
        "priced",
        "cost_micro_usd",
    )
    return [sa.Column(name, sa.BigInteger(), nullable=False) for name in names]


def upgrade() -> None:
    kind = op.get_bind().dialect.name
    op.create_table(
        "accounts",
        sa.Column("name", key(64), nullable=False),
        sa.Column("password", sa.String(255), nullable=False),
        sa.Column("role", key(16), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_accounts")),
        mysql_charset="utf8mb4",
        mysql_engine="InnoDB",
        sqlite_with_rowid=False,
    )
    op.create_table(
        "refusals",
        sa.Column("account", key(32), nullable=False),
        sa.Column("chat", key(255), nullable=False),
        sa.Column("refused", sa.Integer(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("account", "chat", name=op.f("pk_refusals")),
        mysql_charset="utf8mb4",
        mysql_engine="InnoDB",
        sqlite_with_rowid=False,
    )
    op.create_table(
        "login_attempts",
        sa.Column("kind", key(16), nullable=False),
        sa.Column("name", key(64), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("until", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("kind", "name", name=op.f("pk_login_attempts")),
        mysql_charset="utf8mb4",
        mysql_engine="InnoDB",
        sqlite_with_rowid=False,
    )
    op.create_index(op.f("ix_login_attempts_until"), "login_attempts", ["until"])
    op.create_table(
        "tokens",
        sa.Column("id", BIG_ID, autoincrement=True, nullable=False),
        sa.Column("account", key(64), nullable=False),
        sa.Column("kind", key(16), nullable=False),
        sa.Column("hash", key(64), nullable=False),
        sa.Column("label", sa.String(255), nullable=False),
        sa.Column("address", sa.String(64), nullable=False, server_default=""),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("used_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger()),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tokens")),
        sa.UniqueConstraint("hash", name=op.f("uq_tokens_hash")),
        mysql_charset="utf8mb4",
        mysql_engine="InnoDB",
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_tokens_account"), "tokens", ["account"])
    op.create_table(
        "audit",
        sa.Column("id", BIG_ID, autoincrement=True, nullable=False),
        sa.Column("at", INSTANT, nullable=False),
        sa.Column("actor", key(255)),
        sa.Column("action", key(64), nullable=False),
        sa.Column("target", key(255)),
        sa.Column("before", LONG_TEXT),
        sa.Column("after", LONG_TEXT),
        sa.Column("source", key(255)),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit")),
        sa.UniqueConstraint("source", name=op.f("uq_audit_source")),
        mysql_charset="utf8mb4",
        mysql_engine="InnoDB",
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_audit_at"), "audit", ["at"])
    op.create_table(
        "budget_windows",
        sa.Column("budget", key(64), nullable=False),
        sa.Column("key", key(255), nullable=False),
        sa.Column("window_start", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("used", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("reserved", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("used_requests", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("reserved_requests", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("used_micro_usd", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("reserved_micro_usd", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("granted", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("granted_requests", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("granted_micro_usd", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("told", sa.Integer(), nullable=False, server_default="0"),
        sa.CheckConstraint(
            "used >= 0 AND reserved >= 0 AND used_requests >= 0 AND reserved_requests >= 0"
            " AND used_micro_usd >= 0 AND reserved_micro_usd >= 0",
            name=op.f("ck_budget_windows_not_negative"),
        ),
        sa.PrimaryKeyConstraint("budget", "key", "window_start", name=op.f("pk_budget_windows")),
        mysql_charset="utf8mb4",
        mysql_engine="InnoDB",
        sqlite_with_rowid=False,
    )
    op.create_table(
        "controls",
        sa.Column("kind", key(16), nullable=False),
        sa.Column("name", key(255), nullable=False),
        sa.Column("value", LONG_TEXT, nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("kind", "name", name=op.f("pk_controls")),
        mysql_charset="utf8mb4",
        mysql_engine="InnoDB",
        sqlite_with_rowid=False,
    )
    op.create_table(
        "conversations",
        sa.Column("id", BIG_ID, autoincrement=True, nullable=False),
        sa.Column("public_id", key(36), nullable=False),
        sa.Column("scope_key", key(263)),
        sa.Column("tenant_id", key(255), nullable=False, server_default="default"),
        sa.Column("user_key", key(255), nullable=False),
        sa.Column("platform", sa.String(50), nullable=False),
        sa.Column("chat_id", key(255)),
        sa.Column("user_id", key(255)),
        sa.Column("agent", sa.String(64)),
        sa.Column("title", sa.String(255)),
        sa.Column("traits", LONG_TEXT),
        sa.Column("summary", LONG_TEXT),
        sa.Column("active_persona_id", sa.String(255)),
        sa.Column("model", sa.String(255)),
        sa.Column("summarized_to", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("parent_id", BIG_ID),
        sa.Column("forked_at", BIG_ID),
        sa.Column("total_tokens", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("message_count", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("last_seq", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("cleared_seq", sa.BigInteger()),
        sa.Column("version", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("hidden_at", INSTANT),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("last_activity", INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_conversations")),
        sa.UniqueConstraint("public_id", name=op.f("uq_conversations_public_id")),
        sa.UniqueConstraint("scope_key", "tenant_id", name=op.f("uq_conversations_scope_key_tenant_id")),
        mysql_charset="utf8mb4",
        mysql_engine="InnoDB",
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_conversations_chat_id"), "conversations", ["chat_id"])
    op.create_index(
        op.f("ix_conversations_cleared_seq"),
        "conversations",
        ["cleared_seq"],
        **only("cleared_seq IS NOT NULL"),
    )
    op.create_index(
        op.f("ix_conversations_hidden_at"), "conversations", ["hidden_at"], **only("hidden_at IS NOT NULL")
    )
    op.create_index(op.f("ix_conversations_last_activity"), "conversations", ["last_activity"])
    op.create_index(op.f("ix_conversations_user_id"), "conversations", ["user_id"])
    op.create_index(
        op.f("ix_conversations_user_key_last_activity"), "conversations", ["user_key", "last_activity"]
    )
    op.create_table(
        "inbox",
        sa.Column("id", BIG_ID, autoincrement=True, nullable=False),
        sa.Column("account", key(32), nullable=False),
        sa.Column("event_key", key(263), nullable=False),
        sa.Column("lane_key", key(263), nullable=False),
        sa.Column("payload", LONG_TEXT, nullable=False),
        sa.Column("state", key(16), nullable=False),
        sa.Column("reason", sa.String(255)),
        sa.Column("attempts", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("runs", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("begun_token", key(32)),
        sa.Column("reply_before", sa.BigInteger()),
        sa.Column("received_at", sa.BigInteger(), nullable=False),
        sa.Column("ended_at", sa.BigInteger()),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_inbox")),
        sa.UniqueConstraint("account", "event_key", name=op.f("uq_inbox_account_event_key")),
        mysql_charset="utf8mb4",
        mysql_engine="InnoDB",
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_inbox_ended_at"), "inbox", ["ended_at"], **only("ended_at IS NOT NULL"))
    op.create_index("ix_inbox_open_age", "inbox", ["state", "received_at"], **only("state = 'open'"))
    op.create_index("ix_inbox_open_lane", "inbox", ["lane_key", "state", "id"], **only("state = 'open'"))
    op.create_table(
        "job_runs",
        sa.Column("job", key(64), nullable=False),
        sa.Column("fire_time", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("node", key(160), nullable=False),
        sa.Column("started_at", sa.BigInteger(), nullable=False),
        sa.Column("finished_at", sa.BigInteger()),
        sa.Column("error", sa.String(500)),
        sa.PrimaryKeyConstraint("job", "fire_time", name=op.f("pk_job_runs")),
        mysql_charset="utf8mb4",
        mysql_engine="InnoDB",
        sqlite_with_rowid=False,
    )
    op.create_table(
        "lanes",
        sa.Column("key", key(263), nullable=False),
        sa.Column("ready_at", sa.BigInteger()),
        sa.Column("lease_owner", key(160)),
        sa.Column("lease_until", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("lease_token", key(32)),
        sa.Column("send_ready_at", sa.BigInteger()),
        sa.Column("send_owner", key(160)),
        sa.Column("send_until", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("send_token", key(32)),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_lanes")),
        mysql_charset="utf8mb4",
        mysql_engine="InnoDB",
        sqlite_with_rowid=False,
    )
    op.create_index(op.f("ix_lanes_ready_at"), "lanes", ["ready_at"], **only("ready_at IS NOT NULL"))
    op.create_index(
        op.f("ix_lanes_send_ready_at"), "lanes", ["send_ready_at"], **only("send_ready_at IS NOT NULL")
    )
    op.create_table(
        "outbox",
        sa.Column("id", BIG_ID, autoincrement=True, nullable=False),
        sa.Column("source", key(255), nullable=False),
        sa.Column("kind", key(16), nullable=False),
        sa.Column("part", sa.Integer(), nullable=False),
        sa.Column("lane_key", key(263), nullable=False),
        sa.Column("account", key(32), nullable=False),
        sa.Column("payload", LONG_TEXT, nullable=False),
        sa.Column("state", key(16), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("attempt_token", key(32)),
        sa.Column("not_before", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("reply_before", sa.BigInteger()),
        sa.Column("first_attempt_at", sa.BigInteger()),
        sa.Column("unknown_at", sa.BigInteger()),
        sa.Column("sent_id", key(255)),
        sa.Column("conversation_id", BIG_ID),
        sa.Column("last_error", sa.String(500)),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("ended_at", sa.BigInteger()),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_outbox")),
        sa.UniqueConstraint("source", "kind", "part", name=op.f("uq_outbox_source_kind_part")),
        mysql_charset="utf8mb4",
        mysql_engine="InnoDB",
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_outbox_ended_at"), "outbox", ["ended_at"], **only("ended_at IS NOT NULL"))
    op.create_index(op.f("ix_outbox_sent_id"), "outbox", ["sent_id"], **only("sent_id IS NOT NULL"))
    op.create_index(
        "ix_outbox_unsent_lane",
        "outbox",
        ["lane_key", "state", "id"],
        **only("state IN ('pending', 'attempting')"),
    )
    if kind == "mysql":
        op.create_index("ix_outbox_unsent_age", "outbox", ["state", "created_at"])
    op.create_table(
        "processes",
        sa.Column("owner", key(160), nullable=False),
        sa.Column("host", key(100), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("version", sa.String(32), nullable=False),
        sa.Column("started_at", sa.BigInteger(), nullable=False),
        sa.Column("heartbeat_at", sa.BigInteger(), nullable=False),
        sa.Column("report", LONG_TEXT),
        sa.PrimaryKeyConstraint("owner", name=op.f("pk_processes")),
        mysql_charset="utf8mb4",
        mysql_engine="InnoDB",
        sqlite_with_rowid=False,
    )
    op.create_table(
        "reservations",
        sa.Column("inbox_id", BIG_ID, autoincrement=False, nullable=False),
        sa.Column("attempt", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("call", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("model", sa.String(255), nullable=False),
        sa.Column("input_tokens", sa.BigInteger(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("micro_usd", sa.BigInteger()),
        sa.Column("windows", LONG_TEXT, nullable=False),
        sa.Column("ledger", LONG_TEXT, nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("inbox_id", "attempt", "call", name=op.f("pk_reservations")),
        mysql_charset="utf8mb4",
        mysql_engine="InnoDB",
        sqlite_with_rowid=False,
    )
    op.create_table(
        "totals",
        sa.Column("day", key(10), nullable=False),
        sa.Column("account", key(32), nullable=False),
        sa.Column("end", key(16), nullable=False),
        sa.Column("shard", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("day", "account", "end", "shard", name=op.f("pk_totals")),
        mysql_charset="utf8mb4",
        mysql_engine="InnoDB",
        sqlite_with_rowid=False,
    )
    op.create_table(
        "usage",
        sa.Column("id", BIG_ID, autoincrement=True, nullable=False),
        sa.Column("inbox_id", BIG_ID, nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("call", sa.Integer(), nullable=False),
        sa.Column("conversation_id", BIG_ID),
        sa.Column("user_key", key(255)),
        sa.Column("user_id", key(255)),
        sa.Column("chat_id", key(255)),
        sa.Column("platform", key(50), nullable=False),
        sa.Column("tenant_id", key(255), nullable=False, server_default="default"),
        sa.Column("model", key(255), nullable=False),
        sa.Column("input_tokens", sa.BigInteger(), nullable=False),
        sa.Column("output_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cached_tokens", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("reasoning_tokens", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("cost_micro_usd", sa.BigInteger()),
        sa.Column("outcome", key(16), nullable=False),
        sa.Column("at", INSTANT, nullable=False),
        sa.Column("fresh", sa.Integer(), server_default="1"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_usage")),
        sa.UniqueConstraint("inbox_id", "attempt", "call", name=op.f("uq_usage_inbox_id_attempt_call")),
        mysql_charset="utf8mb4",
        mysql_engine="InnoDB",
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_usage_at"), "usage", ["at"])
    op.create_index(op.f("ix_usage_fresh"), "usage", ["fresh"], **only("fresh IS NOT NULL"))
    op.create_index(op.f("ix_usage_user_id_at"), "usage", ["user_id", "at"])
    op.create_table(
        "usage_hours",
        sa.Column("hour", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("tenant_id", key(255), nullable=False),
        sa.Column("platform", key(50), nullable=False),
        sa.Column("model", key(255), nullable=False),
        *sums(),
        sa.PrimaryKeyConstraint("hour", "tenant_id", "platform", "model", name=op.f("pk_usage_hours")),
        mysql_charset="utf8mb4",
        mysql_engine="InnoDB",
        sqlite_with_rowid=False,
    )
    op.create_table(
        "usage_names",
        sa.Column("kind", key(4), nullable=False),
        sa.Column("name", key(255), nullable=False),
        sa.Column("tenant_id", key(255), nullable=False),
        *sums(),
        sa.PrimaryKeyConstraint("kind", "name", "tenant_id", name=op.f("pk_usage_names")),
        mysql_charset="utf8mb4",
        mysql_engine="InnoDB",
        sqlite_with_rowid=False,
    )
    op.create_table(
        "messages",
        sa.Column("id", BIG_ID, autoincrement=True, nullable=False),
        sa.Column("conversation_id", BIG_ID, nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("role", sa.String(20), nullable=False),
        sa.Column("content", LONG_TEXT, nullable=False),
        sa.Column("sender_id", key(255)),
        sa.Column("source_id", key(255)),
        sa.Column("tokens", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("metadata_json", LONG_TEXT),
        sa.Column("save_key", key(255)),
        sa.Column("timestamp", INSTANT, nullable=False),
        sa.Column("edited_at", INSTANT),
        sa.Column("recalled_at", INSTANT),
        sa.Column("search_terms", TERMS),
        sa.ForeignKeyConstraint(
            ["conversation_id"],
            ["conversations.id"],
            name=op.f("fk_messages_conversation_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_messages")),
        sa.UniqueConstraint("conversation_id", "save_key", name=op.f("uq_messages_conversation_id_save_key")),
        sa.UniqueConstraint("conversation_id", "seq", name=op.f("uq_messages_conversation_id_seq")),
        mysql_charset="utf8mb4",
        mysql_engine="InnoDB",
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_messages_sender_id"), "messages", ["sender_id"], **only("sender_id IS NOT NULL"))
    op.create_index(op.f("ix_messages_source_id"), "messages", ["source_id"], **only("source_id IS NOT NULL"))
    op.create_index(op.f("ix_messages_timestamp"), "messages", ["timestamp"])
    if kind != "sqlite":
        op.create_index(
            op.f("ix_messages_search_terms"),
            "messages",
            ["search_terms"],
            postgresql_using="gin",
            mysql_prefix="FULLTEXT",
        )
    if kind == "sqlite":
        op.execute(FTS)
