"""The newest messages of conversations: read in one statement for many, and kept while their version holds."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import orjson
from sqlalchemy import bindparam, case, func, select

from feishu_bot.store.schema import conversations, messages
from feishu_bot.store.work import ConversationState, HistoryRow

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from feishu_bot.store.work import Transaction

CACHED_CONVERSATIONS = 1000  # whose tails a cache keeps
ROWS_PER_TURN = 3  # read at first; a conversation full of tool calls is read again with a longer span

SPEAKER = "speaker"  # in a message's metadata: who said it, where several share a conversation
CALLS = '{"tool_calls"'  # how the metadata of an assistant's message begin that calls tools

# As one value: of two bounds a database may choose the wrong one to go by.
_CLEARED = func.coalesce(conversations.c.cleared_seq, 0)
_SPAN = conversations.c.last_seq - bindparam("span")
_BEFORE_TAIL = case((_SPAN > _CLEARED, _SPAN), else_=_CLEARED)
_TAILS = (
    select(messages.c.conversation_id, messages.c.seq, messages.c.role, messages.c.content, messages.c.tokens)
    .add_columns(
        case(
            (
                (messages.c.role != "assistant") | messages.c.metadata_json.startswith(CALLS),
                messages.c.metadata_json,
            )
        ).label("metadata"),
        messages.c.recalled_at,
    )
    .select_from(
        conversations.join(
            messages,
            (messages.c.conversation_id == conversations.c.id) & (messages.c.seq > _BEFORE_TAIL),
        )
    )
    .where(conversations.c.id.in_(bindparam("ids", expanding=True)))
    .order_by(messages.c.conversation_id, messages.c.seq)
)


class HistoryCache:
    """The tails of recently used conversations, each with the version of the conversation it shows.

    It is right by a number, never by hope: whoever uses it has read the conversation's row in the same
    transaction, and a tail of another version is not used. Not thread-safe: each writer thread has its own.
    """

    def __init__(self, *, conversations: int = CACHED_CONVERSATIONS, rows: int = 200) -> None:
        self._limit = conversations
        self._rows = rows
        self._tails: OrderedDict[int, tuple[int, tuple[HistoryRow, ...]]] = OrderedDict()

    def get(self, conversation_id: int, version: int) -> tuple[HistoryRow, ...] | None:
        """Return the tail of exactly this version, or None."""
        found = self._tails.get(conversation_id)
        if found is None or found[0] != version:
            return None
        self._tails.move_to_end(conversation_id)
        return found[1]

    def put(self, conversation_id: int, version: int, tail: Sequence[HistoryRow]) -> None:
        """Keep ``tail``, the newest messages as of ``version``; the least used one makes room."""
        if len(tail) > self._rows:
            tail = ()  # too long to keep; drop it rather than keep a part that looks whole
            self._tails.pop(conversation_id, None)
            return
        self._tails[conversation_id] = (version, tuple(tail))
        self._tails.move_to_end(conversation_id)
        while len(self._tails) > self._limit:
            self._tails.popitem(last=False)

    def append(
        self, conversation_id: int, before: int, after: int, new: Sequence[HistoryRow], *, turns: int
    ) -> None:
        """Carry a tail from version ``before`` to ``after``; of a long one the last ``turns`` turns stay."""
        found = self._tails.get(conversation_id)
        if found is not None and found[0] == before:
            tail = (*found[1], *new)
            if len(tail) > turns * ROWS_PER_TURN:
                tail = tail[_start_of(tail, turns) :]
            self.put(conversation_id, after, tail)

    def fill(self, conversation_id: int, version: int, tail: Sequence[HistoryRow]) -> None:
        """Keep a tail that was read outside the writer, unless there is one of this conversation already."""
        if conversation_id not in self._tails:
            self.put(conversation_id, version, tail)

    def drop(self, conversation_id: int) -> None:
        self._tails.pop(conversation_id, None)


def _start_of(tail: Sequence[HistoryRow], turns: int) -> int:
    """Return where the last ``turns`` turns begin; 0 if there are fewer."""
    for index in range(len(tail) - 1, -1, -1):
        if tail[index].role == "user":
            turns -= 1
            if turns <= 0:
                return index
    return 0


def history_row(role: str, content: str, tokens: int, seq: int, metadata_json: str | None) -> HistoryRow:
    """Return a stored message as a prompt needs it."""
    if metadata_json is None:
        return HistoryRow(role, content, tokens, seq)
    if role == "user":
        return HistoryRow(role, content, tokens, seq, speaker_of(metadata_json))
    tools = metadata_json if role == "tool" or metadata_json.startswith(CALLS) else None
    return HistoryRow(role, content, tokens, seq, None, tools)


def speaker_of(metadata_json: str | None) -> str | None:
    """Return who said a message, as its metadata tell it."""
    if metadata_json is None or f'"{SPEAKER}"' not in metadata_json:
        return None
    try:
        speaker = orjson.loads(metadata_json).get(SPEAKER)
    except (ValueError, AttributeError):
        return None
    return speaker if isinstance(speaker, str) else None


class Known(NamedTuple):
    """What of a conversation has to be known to read its tail."""

    id: int
    version: int
    last_seq: int


class RecentTail(NamedTuple):
    """The tail of a conversation that is current in its lane."""

    lane_key: str
    conversation_id: int
    version: int
    tail: tuple[HistoryRow, ...]


_RECENT = (
    select(
        *(conversations.c[name] for name in ("id", "version", "last_seq", "scope_key")),
    )
    .where(conversations.c.hidden_at.is_(None), conversations.c.scope_key.is_not(None))
    .order_by(conversations.c.last_activity.desc())
    .limit(bindparam("most"))
)


def load_recent(tx: Transaction, most: int, *, turns: int) -> list[RecentTail]:
    """Return the tails of the conversations that were used last, the newest first; only reads."""
    rows = tx.connection.execute(_RECENT, {"most": most}).all()
    known = [Known(row.id, row.version, row.last_seq) for row in rows]
    tails = load_tails(tx, known, turns=turns, cache=HistoryCache())
    return [RecentTail(row.scope_key, row.id, row.version, tails[row.id]) for row in rows]


def load_tails(
    tx: Transaction, states: Iterable[ConversationState | Known], *, turns: int, cache: HistoryCache
) -> dict[int, tuple[HistoryRow, ...]]:
    """Return the newest messages of each conversation, oldest first: at least ``turns`` whole turns if it has them.

    What was recalled is left out, a question with all that answers it. One statement for all that the cache does not hold.
    """
    tails: dict[int, tuple[HistoryRow, ...]] = {}
    missing: dict[int, ConversationState | Known] = {}
    for state in states:
        if not state.last_seq or turns <= 0:
            tails[state.id] = ()
            continue
        tail = cache.get(state.id, state.version)
        if tail is None:
            missing[state.id] = state
        else:
            tails[state.id] = tail
    span = turns * ROWS_PER_TURN
    while missing:
        found: dict[int, list[HistoryRow]] = {i: [] for i in missing}
        unsaid: set[int] = set()  # conversations whose last question was recalled: its answer goes with it
        for row in tx.connection.execute(_TAILS, {"ids": list(missing), "span": span}):
            if row[2] == "user":
                (unsaid.discard if row[6] is None else unsaid.add)(row[0])
            if row[6] is None and row[0] not in unsaid:
                found[row[0]].append(history_row(row[2], row[3], row[4], row[1], row[5]))
        span *= 8
        for conversation_id, rows in found.items():
            state = missing[conversation_id]
            users = sum(1 for r in rows if r.role == "user")
            if users >= turns or span // 8 >= state.last_seq:
                tails[conversation_id] = tuple(rows)
                # The version may be this transaction's own work, and undone with it.
                tx.after_commit.append(partial(cache.put, conversation_id, state.version, tuple(rows)))
                del missing[conversation_id]
    return tails
