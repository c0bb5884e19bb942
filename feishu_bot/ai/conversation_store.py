"""The conversation store as a library: synchronous, for any number of threads and processes.

::

    manager = PersistentConversationManager("sqlite:///conversations.db")
    conversation = manager.get_or_create("feishu:group:user123", "feishu", "chat456")
    manager.save_message(conversation.id, "user", "Hello!", tokens=2)
    history = manager.load_history(conversation.id, max_turns=10)

It needs no event loop, starts no thread and configures no logging. Wrong values are a ``ValueError`` before anything
is written; an unknown conversation is ``ConversationNotFound`` and a database that cannot be used is
``StoreUnavailable``, both kinds of ``ValueError``. ``docs/library.md`` shows all of it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self
from zoneinfo import ZoneInfo

from feishu_bot.config import database_from, process_variables
from feishu_bot.errors import ConversationNotFound, InvalidImport, MessageNotFound, StoreUnavailable, TooLarge
from feishu_bot.retention import Retention
from feishu_bot.store import cleanup, conversations, ledger, search, statistics, threads, transfer, values
from feishu_bot.store.records import (
    ConversationRecord,
    MessageRecord,
    conversation_record,
    message_record,
    prepare,
)
from feishu_bot.store.transactions import Transactions, utc_now
from feishu_bot.store.values import check_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime
    from types import TracebackType

    from sqlalchemy import Engine
    from sqlalchemy.orm import Session

    from feishu_bot.store.work import NewMessage, StoredRow, Transaction

__all__ = [
    "ConversationNotFound",
    "ConversationRecord",
    "InvalidImport",
    "MessageNotFound",
    "MessageRecord",
    "PersistentConversationManager",
    "StoreUnavailable",
    "TooLarge",
    "check_text",
]

DEFAULT_FOLDER: Final = "data"
_FILE: Final = "conversations.db"
_MAX_DAYS: Final = 700_000  # before the year 1 nothing was said
_MAX_ROWS: Final = 2**31
_UTC: Final = ZoneInfo("UTC")


class PersistentConversationManager:
    """All conversations of one database.

    ``db_url`` None: what ``CONVERSATION_DB_URL`` (or one of the other variables of the configuration) names, else
    the file ``conversations.db`` in ``data_dir``. ``sqlite://`` and ``:memory:`` are one database for all threads,
    gone with the manager. ``echo`` logs every statement, without what people said. ``clock`` gives the current time
    (aware), for tests. The schema is made or brought up to date here.

    Raises StoreUnavailable, or SchemaMismatch for a database of a newer program.
    """

    def __init__(
        self,
        db_url: str | None = None,
        echo: bool = False,  # noqa: FBT001, FBT002  # the seed's signature
        data_dir: str | None = DEFAULT_FOLDER,
        *,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        url, pool = _database(db_url, data_dir)
        prepare()
        self._database = Transactions(url, echo=echo, clock=clock, **pool)
        try:
            self._database.prepare()
        except BaseException:
            self._database.close()
            raise

    @property
    def engine(self) -> Engine:
        """The SQLAlchemy engine, for statements of your own."""
        return self._database.engine

    def get_session(self) -> Session:
        """Return a SQLAlchemy session, to be used in ``with`` or closed; what it reads stays readable.

        Nothing here keeps counters right when a session changes rows: use it to read, and for ``VACUUM``.
        """
        return self._database.session()

    def close(self) -> None:
        """Close all connections. May be called again; every other call raises StoreUnavailable afterwards."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ----------------------------------------------------------------------------------- conversations

    def get_or_create(
        self,
        user_key: str,
        platform: str,
        chat_id: str | None = None,
        *,
        tenant_id: str = "default",
        user_id: str | None = None,
        traits: Mapping[str, Any] | None = None,
    ) -> ConversationRecord:
        """Return the current conversation of a user key; it is made where there is none.

        ``last_activity`` becomes now and ``platform`` what is given; ``chat_id``, ``user_id`` and ``traits`` (a
        mapping that JSON can hold) only where they are not None. ``user_id`` is derived from a user key of three
        parts. Racing calls, of any process, return one record. The same user key in two tenants is two
        conversations.
        """
        key = values.check_key(user_key, "user_key")
        account = values.check_key(platform, "platform", longest=values.MAX_PLATFORM_LENGTH)
        find = functools.partial(
            conversations.get_or_create,
            user_key=key,
            platform=account,
            chat_id=values.check_optional_key(chat_id, "chat_id"),
            **_whose(key, tenant_id, user_id, traits),
        )
        return conversation_record(self._database.write(find, repeatable=True))

    def get_conversation(self, conversation_id: int, *, tenant_id: str | None = None) -> ConversationRecord:
        """Return a conversation. Raises ConversationNotFound, also for one of another tenant than asked for."""
        number = values.check_id(conversation_id, "conversation_id")
        return self._one(lambda tx: conversations.get(tx, number, tenant_id=_tenant(tenant_id)))

    def get_conversation_by_public_id(
        self, public_id: str, *, tenant_id: str | None = None
    ) -> ConversationRecord | None:
        """Return the conversation with this public id, the one that exports carry; or None."""
        key = values.check_key(public_id, "public_id")
        row = self._database.read(
            lambda tx: conversations.get_by_public_id(tx, key, tenant_id=_tenant(tenant_id))
        )
        return None if row is None else conversation_record(row)

    def get_conversation_by_user(
        self, user_key: str, *, tenant_id: str | None = None
    ) -> ConversationRecord | None:
        """Return the conversation of a user key that was used last, of any scope, archived or not; or None."""
        key = values.check_key(user_key, "user_key")
        row = self._database.read(lambda tx: conversations.get_by_user(tx, key, tenant_id=_tenant(tenant_id)))
        return None if row is None else conversation_record(row)

    def update_conversation_stats(self, conversation_id: int, tokens_used: int) -> None:
        """Add tokens that belong to no stored message to ``total_tokens``. Raises ConversationNotFound."""
        number = values.check_id(conversation_id, "conversation_id")
        used = values.check_number(tokens_used, "tokens_used")
        self._database.write(lambda tx: conversations.add_tokens(tx, number, used))

    def clear_conversation(self, conversation_id: int) -> None:
        """Remove all messages and the summary, set both counters to 0, keep the record.

        That holds for everybody after the first of several transactions, as with ``delete_conversation``. Raises
        ConversationNotFound.
        """
        number = values.check_id(conversation_id, "conversation_id")
        self._database.write(lambda tx: conversations.clear(tx, number), repeatable=True)
        while self._database.write(lambda tx: conversations.remove_cleared(tx, number), repeatable=True):
            pass

    def delete_conversation(self, conversation_id: int) -> None:
        """Remove a conversation and all its messages. Raises ConversationNotFound.

        It is gone for everybody after the first of several transactions; the others take its messages in pieces,
        so that nobody waits for a long one. What a crash leaves over is taken by the next cleanup.
        """
        number = values.check_id(conversation_id, "conversation_id")
        self._database.write(lambda tx: conversations.hide(tx, number))
        while self._database.write(lambda tx: conversations.remove_piece(tx, number), repeatable=True):
            pass

    def cleanup_old_conversations(self, days: int = 30) -> int:
        """Remove the conversations without activity for ``days`` days, and return how many.

        One that the server is answering in at this moment is left for the next time.
        """
        age = Retention(min(values.check_number(days, "days"), _MAX_DAYS))
        removed, found = 0, self._database.read(lambda tx: cleanup.find_idle(tx, age))
        while True:
            for some in found.bites():
                removed += self._database.write(lambda tx, some=some: cleanup.hide(tx, some, age))  # type: ignore[misc]
            if found.after is None:
                break
            found = self._database.read(lambda tx, last=found.after: cleanup.find_idle(tx, age, last))  # type: ignore[misc]
        for piece in (cleanup.remove_hidden, conversations.remove_cleared, cleanup.prune_lanes):
            while self._database.write(piece, repeatable=True):
                pass
        return removed

    # ---------------------------------------------------------------------------------------- messages

    def save_message(
        self,
        conversation_id: int,
        role: str,
        content: str,
        tokens: int = 0,
        metadata: Mapping[str, Any] | None = None,
        *,
        key: str | None = None,
        sender_id: str | None = None,
    ) -> MessageRecord:
        """Store a message and return it, once it is on disk and the counters hold it.

        ``role``: user, assistant, system or tool. ``key``: a second save with the same key in the same conversation
        returns the first record and changes nothing, so a save whose connection broke can be repeated.
        ``sender_id``: who spoke; a user message without it is the conversation's own user's. Raises
        ConversationNotFound.
        """
        number = values.check_id(conversation_id, "conversation_id")
        new = [values.new_message(role, content, tokens, metadata, key=key, sender_id=sender_id)]
        rows = self._database.write(
            lambda tx: conversations.append(tx, number, new), repeatable=key is not None
        )
        return message_record(rows[0])

    def save_messages(
        self, conversation_id: int, messages: Iterable[Mapping[str, Any]]
    ) -> list[MessageRecord]:
        """Store messages in one transaction, all or none, and return them in order.

        Each is a mapping with ``role`` and ``content``, and what else ``save_message`` takes. Raises
        ConversationNotFound.
        """
        number = values.check_id(conversation_id, "conversation_id")
        if not isinstance(messages, Iterable):
            raise ValueError(f"messages must be a list, not {type(messages).__name__}")  # noqa: TRY004  # promised
        new = [_message_of(message) for message in messages]
        repeatable = all(message.save_key is not None for message in new)
        rows = self._database.write(lambda tx: conversations.append(tx, number, new), repeatable=repeatable)
        return [message_record(row) for row in rows]

    def load_history(
        self, conversation_id: int, max_turns: int = 10, *, tenant_id: str | None = None
    ) -> list[dict[str, Any]]:
        """Return the newest turns, oldest first, as dicts with ``role, content, tokens, timestamp``.

        A turn is a user message and all that answers it; older turns are left out whole. Costs the same however
        long the conversation is. Raises ConversationNotFound.
        """
        number = values.check_id(conversation_id, "conversation_id")
        turns = values.check_number(max_turns, "max_turns", most=_MAX_ROWS)
        return self._database.read(
            lambda tx: conversations.load_turns(tx, number, turns, tenant_id=_tenant(tenant_id))
        )

    def iter_messages(self, conversation_id: int, *, tenant_id: str | None = None) -> Iterator[MessageRecord]:
        """Yield all messages, oldest first, read in pages: no transaction stays open between them.

        Raises ConversationNotFound, at once and not at the first message.
        """
        self.get_conversation(conversation_id, tenant_id=_tenant(tenant_id))
        return self._pages(conversation_id)

    def _pages(self, conversation_id: int) -> Iterator[MessageRecord]:
        after = 0
        while rows := self._database.read(
            lambda tx, last=after: conversations.page(tx, conversation_id, after=last)  # type: ignore[misc]
        ):
            after = rows[-1]["seq"]
            yield from map(message_record, rows)

    def edit_message(self, message_id: int, content: str, tokens: int | None = None) -> MessageRecord:
        """Replace a message's text, and its token count unless that is None; return it with ``edited_at``.

        The conversation's ``total_tokens`` changes by the difference. Raises MessageNotFound.
        """
        number = values.check_id(message_id, "message_id")
        text = values.check_text(content, "content")
        count = None if tokens is None else values.check_number(tokens, "tokens")
        edit = functools.partial(threads.edit_message, message_id=number, content=text, tokens=count)
        return message_record(self._database.write(edit, repeatable=True))

    def delete_message(self, message_id: int) -> None:
        """Remove one message; the conversation's counters lose it. Raises MessageNotFound."""
        number = values.check_id(message_id, "message_id")
        self._database.write(lambda tx: threads.delete_message(tx, number))

    # ------------------------------------------------------------------------------------------ search

    def search_messages(  # noqa: PLR0917  # the promised signature
        self,
        text: str,
        user_key: str | None = None,
        platform: str | None = None,
        role: str | None = None,
        tenant_id: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        limit: int = 20,
        offset: int = 0,
    ) -> list[dict[str, Any]]:
        """Return the messages in which every word and every "quoted phrase" of ``text`` occurs, newest first.

        Chinese is found from one character up, other words from their beginning; ``snippet`` shows the hit.
        """
        find = functools.partial(
            search.search_messages,
            text=values.check_text(text, "text"),
            user_key=values.check_filter(user_key, "user_key"),
            platform=values.check_filter(platform, "platform"),
            role=values.check_filter(role, "role"),
            tenant_id=values.check_filter(tenant_id, "tenant_id"),
            since=values.check_instant(since, "since"),
            until=values.check_instant(until, "until"),
            limit=values.check_number(limit, "limit", most=_MAX_ROWS),
            offset=values.check_number(offset, "offset", most=_MAX_ROWS),
        )
        return self._database.read(lambda tx: find(tx.connection, tx.kind))

    # ------------------------------------------------------------------------------ export and import

    def export_conversation(self, conversation_id: int, *, tenant_id: str | None = None) -> dict[str, Any]:
        """Return a conversation and its messages as JSON can hold them. Raises ConversationNotFound."""
        number = values.check_id(conversation_id, "conversation_id")
        return self._database.read(
            lambda tx: transfer.export_conversation(tx.connection, number, tenant_id=_tenant(tenant_id))
        )

    def import_conversation(
        self,
        data: Mapping[str, Any],
        *,
        tenant_id: str | None = None,
        user_id: str | None = None,
        traits: Mapping[str, Any] | None = None,
    ) -> ConversationRecord:
        """Store what ``export_conversation`` returned, all of it or nothing, and return its record.

        One that is known (by its ``public_id``; without one, by its user key) is returned unchanged. Counters are
        counted, not believed. What is given goes before what the data says. Raises InvalidImport, a ValueError.
        """
        store = functools.partial(
            transfer.import_conversation,
            data=data,
            tenant_id=None if tenant_id is None else values.check_key(tenant_id, "tenant_id"),
            user_id=None if user_id is None else values.check_key(user_id, "user_id"),
            traits=traits,
        )

        def run(tx: Transaction) -> StoredRow:
            return conversations.get(tx, store(tx.connection, tx.kind, now=conversations.now_of(tx)))

        return conversation_record(self._database.write(run, repeatable=True))

    def export_all(
        self,
        path: str | Path,
        format: str = "json",  # noqa: A002  # the promised name
        *,
        user_key: str | None = None,
        tenant_id: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> transfer.Exported:
        """Write conversations to a file, or one file each to a folder (a path that ends with a slash).

        ``format``: json, jsonl, csv (safe for spreadsheets) or md. ``user_key``: those of one person or user key.
        Needs the same memory however much is stored; ``progress`` is told messages done and in all. A file is
        replaced when all is written. Raises OSError.
        """
        return transfer.export_all(
            self._database, path, format, user=user_key, tenant_id=_tenant(tenant_id), progress=progress
        )

    def import_all(
        self,
        path: str | Path,
        *,
        tenant_id: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> transfer.Imported:
        """Store the conversations of a json, jsonl or csv file or of a folder of them; again, nothing is doubled.

        Each conversation is stored as a whole or not at all; the first damaged one ends it with InvalidImport, a
        ValueError that names the line. ``progress`` is told bytes done and in all. Raises OSError.
        """
        return transfer.import_all(self._database, path, tenant_id=_tenant(tenant_id), progress=progress)

    # ----------------------------------------------------------------------------------------- threads

    def create_thread(
        self,
        user_key: str,
        name: str | None = None,
        *,
        platform: str | None = None,
        chat_id: str | None = None,
        tenant_id: str = "default",
        user_id: str | None = None,
        traits: Mapping[str, Any] | None = None,
    ) -> ConversationRecord:
        """Start a new conversation of a user key and make it the current one; the one before is kept.

        Without a ``name`` the title is made from the first user message. ``platform`` and ``chat_id`` None are
        those of the conversation before, else the key's first part and none.
        """
        key = values.check_key(user_key, "user_key")
        create = functools.partial(
            threads.create,
            user_key=key,
            title=_title(name),
            platform=None
            if platform is None
            else values.check_key(platform, "platform", longest=values.MAX_PLATFORM_LENGTH),
            chat_id=values.check_optional_key(chat_id, "chat_id"),
            **_whose(key, tenant_id, user_id, traits),
        )
        return conversation_record(self._database.write(create))

    def list_threads(
        self, user_key: str, limit: int = 100, offset: int = 0, *, tenant_id: str | None = None
    ) -> list[ConversationRecord]:
        """Return the conversations of a user key, the one used last first."""
        key = values.check_key(user_key, "user_key")
        most = values.check_number(limit, "limit", most=_MAX_ROWS)
        start = values.check_number(offset, "offset", most=_MAX_ROWS)
        rows = self._database.read(
            lambda tx: threads.list_threads(tx, key, limit=most, offset=start, tenant_id=_tenant(tenant_id))
        )
        return [conversation_record(row) for row in rows]

    def switch_thread(
        self, user_key: str, conversation_id: int, *, tenant_id: str | None = None
    ) -> ConversationRecord:
        """Make a conversation of the user key its current one: ``get_or_create`` returns it from now on.

        Raises ConversationNotFound, also for somebody else's conversation.
        """
        key = values.check_key(user_key, "user_key")
        number = values.check_id(conversation_id, "conversation_id")
        row = self._database.write(
            lambda tx: threads.switch(tx, key, number, tenant_id=_tenant(tenant_id)), repeatable=True
        )
        return conversation_record(row)

    def rename_thread(self, conversation_id: int, name: str) -> ConversationRecord:
        """Give a conversation another title. Raises ConversationNotFound."""
        number = values.check_id(conversation_id, "conversation_id")
        title = _title(name)
        row = self._database.write(lambda tx: threads.rename(tx, number, title), repeatable=True)
        return conversation_record(row)

    def fork_conversation(self, conversation_id: int, message_id: int) -> ConversationRecord:
        """Copy a conversation up to and with a message; the copy knows its ``parent_id`` and ``forked_at``.

        It is current nowhere until ``switch_thread``. Raises ConversationNotFound or MessageNotFound.
        """
        number = values.check_id(conversation_id, "conversation_id")
        message = values.check_id(message_id, "message_id")
        return conversation_record(self._database.write(lambda tx: threads.fork(tx, number, message)))

    # ---------------------------------------------------------------------------------------- personas

    def get_active_persona_id(self, user_key: str, *, tenant_id: str | None = None) -> str | None:
        """Return the persona chosen in the conversation that was used last, or None."""
        record = self.get_conversation_by_user(user_key, tenant_id=_tenant(tenant_id))
        return None if record is None else record.active_persona_id

    def set_active_persona_id(
        self,
        user_key: str,
        persona_id: str | None,
        platform: str | None = None,
        chat_id: str | None = None,
        *,
        tenant_id: str = "default",
    ) -> None:
        """Choose a persona for the user key's current conversation, or none; it is made where there is none."""
        key = values.check_key(user_key, "user_key")
        persona = values.check_optional_key(persona_id, "persona_id")
        account = values.check_key(
            platform or key.partition(":")[0][: values.MAX_PLATFORM_LENGTH] or "unknown",
            "platform",
            longest=values.MAX_PLATFORM_LENGTH,
        )
        chat = values.check_optional_key(chat_id, "chat_id")
        whose = _whose(key, tenant_id, None, None)

        def choose(tx: Transaction) -> None:
            row = conversations.get_or_create(tx, key, account, chat, **whose)
            conversations.set_persona(tx, row["id"], persona)

        self._database.write(choose, repeatable=True)

    # ---------------------------------------------------------------------------------------- numbers

    def get_stats(
        self,
        since: datetime | None = None,
        until: datetime | None = None,
        by: str | None = None,
        *,
        tenant_id: str | None = None,
    ) -> dict[str, Any]:
        """Return sums, averages and the longest conversation; quick however much is stored.

        ``since`` and ``until`` choose the conversations last active from one to before the other. ``by``: day,
        platform or user; the sums of each then stand under the key ``by``. On an empty database the numbers are 0
        and 0.0, and ``longest_conversation_user`` is None.
        """
        if by is not None and by not in statistics.STATISTICS_BY:
            raise ValueError(f"by must be one of {', '.join(statistics.STATISTICS_BY)}, not {by!r}")
        start, end = values.check_instant(since, "since"), values.check_instant(until, "until")
        return self._database.read(
            lambda tx: statistics.totals(tx, since=start, until=end, by=by, tenant_id=_tenant(tenant_id))
        )

    def get_usage(
        self,
        by: str = "user",
        since: datetime | None = None,
        until: datetime | None = None,
        *,
        tenant_id: str | None = None,
    ) -> list[dict[str, Any]]:
        """Return calls, tokens and cost of the server's model calls, by user, chat, platform, model, day or tenant.

        Days are those of UTC. All there ever was takes little time; of users and chats, a range of time takes as long
        as it has calls.
        """
        if by not in ledger.USAGE_BY:
            raise ValueError(f"by must be one of {', '.join(ledger.USAGE_BY)}, not {by!r}")
        start, end = values.check_instant(since, "since"), values.check_instant(until, "until")
        return self._database.read(
            lambda tx: ledger.usage_by(tx, by, _UTC, since=start, until=end, tenant_id=_tenant(tenant_id))
        )

    def estimate_tokens(self, text: str, model: str = "gpt-4o") -> int:
        """Return how many tokens a text is for a model, without any network."""
        # Half a second of import and 25 MB, which a program that does not count need not pay.
        from feishu_bot.ai.tokens import count_tokens  # noqa: PLC0415  # see above

        return count_tokens(values.check_text(text, "text"), values.check_key(model, "model"))

    # ------------------------------------------------------------------------------------------ inside

    def _one(self, find: Callable[[Transaction], StoredRow]) -> ConversationRecord:
        return conversation_record(self._database.read(find))


def _database(db_url: str | None, data_dir: str | None) -> tuple[str, dict[str, int]]:
    """Return the URL to open and how many connections it may take, where the environment says so."""
    if db_url is not None:
        return values.check_key(db_url, "db_url", longest=4096), {}
    named = database_from(process_variables())
    folder = DEFAULT_FOLDER if data_dir is None else values.check_key(data_dir, "data_dir", longest=4096)
    if named is None or (named.origin == "CONVERSATION_DATA_DIR" and folder != DEFAULT_FOLDER):
        return f"sqlite:///{Path(folder, _FILE)}", {}
    pool = {"pool_size": named.pool_size, "max_overflow": named.max_overflow}
    return named.url, {name: number for name, number in pool.items() if number is not None}


def _whose(
    user_key: str, tenant_id: object, user_id: object, traits: Mapping[str, Any] | None
) -> dict[str, Any]:
    person = values.person_of(user_key) if user_id is None else values.check_key(user_id, "user_id")
    return {
        "tenant_id": values.check_key(tenant_id, "tenant_id"),
        "user_id": person,
        "traits": values.dump_object(traits, "traits"),
    }


def _tenant(tenant_id: object) -> str | None:
    return values.check_optional_key(tenant_id, "tenant_id")


def _title(name: str | None) -> str | None:
    return values.check_optional_key(name, "name", longest=values.MAX_TITLE_LENGTH) or None


_MESSAGE_KEYS: Final = frozenset({"role", "content", "tokens", "metadata", "key", "sender_id"})


def _message_of(message: Mapping[str, Any]) -> NewMessage:
    if not isinstance(message, Mapping):
        raise ValueError(f"a message must be a mapping, not {type(message).__name__}")  # noqa: TRY004  # promised
    unknown = set(message) - _MESSAGE_KEYS
    if unknown or not {"role", "content"} <= set(message):
        raise ValueError(
            f"a message has role and content, and may have {sorted(_MESSAGE_KEYS)}, not {sorted(message)}"
        )
    return values.new_message(**message)
