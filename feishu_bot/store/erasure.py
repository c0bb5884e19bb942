"""Erasing one person everywhere: conversations, words in those of others, queues, summaries, the index, the ledger.

In pieces, each a transaction that takes lanes before conversations, as the way of a message does. Every piece finds
by itself what is left to do, so an erasure that dies half-way is finished by running it again.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import orjson
from sqlalchemy import bindparam, case, delete, func, select, text, update

from feishu_bot.model import End, escape_part, person_key
from feishu_bot.store import budgets, search, sums
from feishu_bot.store.cleanup import remove_hidden
from feishu_bot.store.conversations import remove_cleared
from feishu_bot.store.inbox import count_ends
from feishu_bot.store.people import Person
from feishu_bot.store.schema import (
    NOT_CLEARED,
    OPEN,
    UNSENT,
    audit,
    budget_windows,
    conversations,
    inbox,
    lanes,
    messages,
    outbox,
    refusals,
    usage,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from sqlalchemy import Row

    from feishu_bot.store.transactions import Transactions
    from feishu_bot.store.work import Transaction

    AnyRow = Row[*tuple[Any, ...]]
    Progress = Callable[[str, int], None]
    _Done = Mapping[str, int | float]  # fields of the receipt, and what one piece adds to them

_T = TypeVar("_T")

PIECE: Final = 500  # rows changed by one transaction
REASON: Final = "forgotten"
TITLE_CHARS: Final = 50  # a title that nobody chose is the beginning of the first message
_SCANNED: Final = 1000  # queue rows looked at by one read
_GIVEN_UP: Final = frozenset({End.DEAD.value, End.EXPIRED.value})

_MICRO = 1_000_000  # parts of a dollar in the ledger
_c, _m, _i, _o, _u = conversations.c, messages.c, inbox.c, outbox.c, usage.c
_SEEN = _c.hidden_at.is_(None)


@dataclass(slots=True)
class Receipt:
    """What was erased (or would be). ``usage_*``: rows of the ledger that name nobody now; their sums are kept."""

    person: str
    dry_run: bool
    at: str
    conversations: int = 0
    messages: int = 0  # in those conversations
    messages_elsewhere: int = 0  # said in conversations of others
    summaries: int = 0  # of conversations of others, which may repeat what was said
    inbox: int = 0
    outbox: int = 0
    usage_rows: int = 0
    usage_tokens: int = 0
    usage_cost_usd: float | None = None
    budget_windows: int = 0
    lanes: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def forget(
    database: Transactions, name: str, *, dry_run: bool = False, progress: Progress | None = None
) -> Receipt:
    """Erase a person (or the person of a user key) and return what was done; ``dry_run`` only counts.

    ``progress`` is told a field of the receipt and its number so far. Raises StoreUnavailable.
    """
    person = Person.of(name)
    at = database.clock().astimezone(UTC).replace(tzinfo=None, microsecond=0).isoformat() + "Z"
    receipt = Receipt(person.ids[-1], dry_run, at)
    work = _Count(database, person, receipt) if dry_run else _Erase(database, person, receipt, progress)
    work.run()
    return receipt


# --------------------------------------------------------------------------------------------- what is theirs


class _Lanes:
    """Which lanes carry a person's name."""

    def __init__(self, person: Person) -> None:
        self._names = frozenset(
            f"{kind}:{key}" for kind in ("user", "note") for key in (*person.keys, *person.ids)
        )
        self._account = "" if person.platform is None else escape_part(person.platform)
        self._senders: frozenset[str] = frozenset()
        if person.sender_id is not None:
            digest = hashlib.sha256(person.sender_id.encode("utf-8", "surrogatepass")).hexdigest()[:40]
            self._senders = frozenset({escape_part(person.sender_id), f"sha256-{digest}"})
        self.prefix = f"in:{self._account}:"

    def __contains__(self, lane_key: str) -> bool:
        if lane_key in self._names:
            return True
        parts = lane_key.split(":")  # in, account, chat type, chat, sender
        return lane_key.startswith(self.prefix) and len(parts) == 5 and parts[4] in self._senders  # noqa: PLR2004  # the parts above

    @property
    def names(self) -> frozenset[str]:
        """Those that can be named without looking."""
        return self._names


class _Queued(NamedTuple):
    """A queue row of theirs."""

    id: int
    lane_key: str
    source: str | None = None


def _find_inbox(database: Transactions, person: Person) -> Iterator[list[_Queued]]:
    lane = _Lanes(person)
    columns = (_i.id, _i.lane_key, _i.payload, _i.reason)
    for rows in _scan(database, select(*columns).where(_i.account == person.platform), _i.id):
        yield [
            _Queued(row.id, row.lane_key)
            for row in rows
            if row.lane_key in lane or _is_from(row.payload, person)
        ]


def _find_outbox(database: Transactions, person: Person, sources: set[str]) -> Iterator[list[_Queued]]:
    lane = _Lanes(person)
    columns = (_o.id, _o.lane_key, _o.payload, _o.source)
    for rows in _scan(database, select(*columns).where(_o.account == person.platform), _o.id):
        yield [
            _Queued(row.id, row.lane_key, row.source)
            for row in rows
            if row.source in sources or row.lane_key in lane or _is_from(row.payload, person)
        ]


def _scan(database: Transactions, statement: Any, key: Any) -> Iterator[Sequence[AnyRow]]:
    after = 0
    while True:
        page = statement.where(key > after).order_by(key).limit(_SCANNED)
        rows = database.read(lambda tx, query=page: tx.connection.execute(query).all())  # type: ignore[misc]
        if rows:
            yield rows
        if len(rows) < _SCANNED:
            return
        after = rows[-1].id


def _is_from(payload: str, person: Person) -> bool:
    """Say whether an event came from, or a part goes to, this person."""
    sender = orjson.loads(payload).get("sender_id")
    return bool(sender) and person_key(person.platform or "", sender) in person.ids


class _Count:
    """Counts what an erasure would do, by looking for the same rows."""

    def __init__(self, database: Transactions, person: Person, receipt: Receipt) -> None:
        self._database = database
        self._person = person
        self._receipt = receipt

    def run(self) -> None:
        receipt, person = self._receipt, self._person
        if person.platform is not None:
            sources: set[str] = set()
            for found in _find_inbox(self._database, person):
                receipt.inbox += len(found)
                sources |= {f"in:{row.id}" for row in found}
            receipt.outbox = sum(len(found) for found in _find_outbox(self._database, person, sources))
        own = select(func.count(), func.sum(_c.message_count)).where(person.owns, _SEEN)
        receipt.conversations, receipt.messages = self._numbers(own)
        elsewhere = select(func.count()).join_from(messages, conversations, _c.id == _m.conversation_id)
        (receipt.messages_elsewhere,) = self._numbers(
            elsewhere.where(person.said, _SEEN, NOT_CLEARED, ~person.owns)
        )
        heard = select(_m.conversation_id).where(person.said)
        summaries = select(func.count()).where(_c.id.in_(heard), _SEEN, ~person.owns, _c.summary.is_not(None))
        (receipt.summaries,) = self._numbers(summaries)
        tokens = func.sum(_u.input_tokens + _u.output_tokens)
        ledger = select(func.count(), tokens).where(_u.user_id.in_(person.ids))
        receipt.usage_rows, receipt.usage_tokens = self._numbers(ledger)
        cost = select(func.sum(_u.cost_micro_usd)).where(_u.user_id.in_(person.ids))
        micro_usd = self._database.read(lambda tx: tx.connection.execute(cost).scalar_one())
        receipt.usage_cost_usd = None if micro_usd is None else int(micro_usd) / _MICRO
        windows = select(func.count()).where(budget_windows.c.key.in_((*person.keys, *person.ids)))
        (receipt.budget_windows,) = self._numbers(windows)
        receipt.lanes = len(_find_lanes(self._database, person))

    def _numbers(self, statement: Any) -> tuple[int, ...]:
        row = self._database.read(lambda tx: tx.connection.execute(statement).one())
        return tuple(int(number or 0) for number in row)


def _find_lanes(database: Transactions, person: Person) -> list[str]:
    theirs = _Lanes(person)
    key = lanes.c.key
    named = select(key).where(key.in_(theirs.names))
    found = list(database.read(lambda tx: list(tx.connection.execute(named).scalars())))
    if person.platform is None:
        return found
    after = theirs.prefix
    while True:
        page = (
            select(key).where(key > after, key < theirs.prefix + "\U0010ffff").order_by(key).limit(_SCANNED)
        )
        keys = database.read(lambda tx, query=page: list(tx.connection.execute(query).scalars()))  # type: ignore[misc]
        found += [k for k in keys if k in theirs]
        if len(keys) < _SCANNED:
            return found
        after = keys[-1]


# ------------------------------------------------------------------------------------------------- erasing

_LOCK_LANES = (
    select(lanes.c.key, lanes.c.lease_token)
    .where(lanes.c.key.in_(bindparam("keys", expanding=True)))
    .order_by(lanes.c.key)
    .with_for_update()
)
_LOCK_FREE_LANES = (
    select(lanes.c.key)
    .where(
        lanes.c.key.in_(bindparam("keys", expanding=True)),
        lanes.c.lease_token.is_(None),
        lanes.c.send_token.is_(None),
    )
    .order_by(lanes.c.key)
    .with_for_update(skip_locked=True)
)
_END_LEASES = (
    update(lanes)
    .where(lanes.c.key.in_(bindparam("keys", expanding=True)))
    .values(lease_owner=None, lease_token=None, lease_until=0)
)
_ERASE_INBOX = (
    update(inbox)
    .where(_i.id == bindparam("row_id"))
    .values(
        payload="{}",
        lane_key="erased",
        event_key=bindparam("new_event_key"),
        state=bindparam("new_state"),
        reason=bindparam("new_reason"),
        ended_at=func.coalesce(_i.ended_at, bindparam("now")),
        begun_token=None,
    )
)


class _Erase:
    """Does it, piece by piece."""

    def __init__(
        self, database: Transactions, person: Person, receipt: Receipt, progress: Progress | None
    ) -> None:
        self._database = database
        self._person = person
        self._receipt = receipt
        self._progress = progress

    def run(self) -> None:
        # What waits first: afterwards no answer that is being made can bring anything back.
        if self._person.platform is not None:
            self._outbox(self._inbox())
        self._repeat(self._hide_conversations)
        self._repeat(self._remove_elsewhere)
        for piece in (remove_hidden, remove_cleared):
            self._repeat(lambda tx, piece=piece: {"": done} if (done := piece(tx)) else {})  # type: ignore[misc]
        self._repeat(self._anonymise_usage)
        self._do(self._remove_windows)
        self._do(self._anonymise_audit)
        self._lanes()
        self._compact()

    # ------------------------------------------------------------------------------------------ helpers

    def _write(self, piece: Callable[[Transaction], _T]) -> _T:
        def securely(tx: Transaction) -> _T:
            if tx.kind == "sqlite":
                tx.connection.exec_driver_sql("PRAGMA secure_delete=ON")  # the bytes go, not only the rows
            return piece(tx)

        return self._database.write(securely, repeatable=True)

    def _do(self, piece: Callable[[Transaction], _Done]) -> bool:
        """Run a piece and add what it did to the receipt, once, however often it had to be run."""
        done = self._write(piece)
        for field, number in done.items():
            if not field:
                continue
            total = (getattr(self._receipt, field) or 0) + number
            setattr(self._receipt, field, total)
            if self._progress is not None and isinstance(number, int):
                self._progress(field, int(total))
        return any(done.values())

    def _repeat(self, piece: Callable[[Transaction], _Done]) -> None:
        while self._do(piece):
            pass

    # ------------------------------------------------------------------------------------------- queues

    def _inbox(self) -> set[str]:
        sources: set[str] = set()
        for found in _find_inbox(self._database, self._person):
            sources |= {f"in:{row.id}" for row in found}
            for piece in _pieces(found):
                self._do(partial(self._erase_inbox, found=piece))
        return sources

    def _erase_inbox(self, tx: Transaction, found: Sequence[_Queued]) -> _Done:
        """End what is open, keep no text, and of keys only what holds a platform's repeats off."""
        locked = {row.key: row for row in tx.connection.execute(_LOCK_LANES, {"keys": _keys_of(found)})}
        rows = tx.connection.execute(select(inbox).where(_i.id.in_([row.id for row in found]))).all()
        ended: dict[tuple[str, str], int] = {}
        at_work: list[str] = []
        changes = []
        for row in rows:
            state = row.state
            if state == OPEN or state in _GIVEN_UP:
                state = End.IGNORED.value
                for name, step in ((row.state, -1), (state, 1)):
                    if name != OPEN:
                        ended[row.account, name] = ended.get((row.account, name), 0) + step
            lane = locked.get(row.lane_key)
            if row.state == OPEN and lane is not None and lane.lease_token == row.begun_token is not None:
                at_work.append(row.lane_key)
            changes.append(
                {
                    "row_id": row.id,
                    "new_event_key": self._event_key(row.event_key),
                    "new_state": state,
                    "new_reason": REASON if state != row.state else row.reason,
                    "now": tx.now_ms,
                }
            )
        if not changes:
            return {}
        tx.connection.execute(_ERASE_INBOX, changes)
        if at_work:
            # Whoever ends a message ends the lease it was worked on under.
            tx.connection.execute(_END_LEASES, {"keys": sorted(at_work)})
        budgets.settle(tx, [row.id for row in rows if row.state == OPEN], {}, {})
        count_ends(tx, ended, shard=0)
        return {"inbox": len(changes)}

    def _event_key(self, key: str) -> str:
        """Return a key that names nobody; a platform's own event id is none of the person's."""
        sender = self._person.sender_id or ""
        if sender not in key and escape_part(sender) not in key:
            return key
        return "erased:" + hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:40]

    def _outbox(self, sources: set[str]) -> None:
        for found in _find_outbox(self._database, self._person, sources):
            for piece in _pieces(found):
                self._do(partial(self._remove_parts, found=piece))

    def _remove_parts(self, tx: Transaction, found: Sequence[_Queued]) -> _Done:
        tx.connection.execute(_LOCK_LANES, {"keys": _keys_of(found)}).all()
        gone = delete(outbox).where(_o.id.in_([row.id for row in found]))
        return {"outbox": int(tx.connection.execute(gone).rowcount)}

    # ------------------------------------------------------------------------------------ conversations

    def _hide_conversations(self, tx: Transaction) -> _Done:
        wanted = select(_c.id, _c.scope_key, _c.public_id).where(self._person.owns, _SEEN).limit(PIECE)
        rows = self._locked(tx, tx.connection.execute(wanted).all())
        if not rows:
            return {}
        ids = [row.id for row in rows]
        tx.connection.execute(
            update(conversations)
            .where(_c.id.in_(ids))
            .values(
                hidden_at=datetime.fromtimestamp(tx.now_ms / 1000, UTC),
                scope_key=None,
                summary=None,
                summarized_to=0,
                title=None,
                traits=None,
                version=_c.version + 1,
            )
        )
        return {"conversations": len(ids), "messages": sum(row.message_count for row in rows)}

    def _locked(self, tx: Transaction, rows: Iterable[AnyRow]) -> Sequence[AnyRow]:
        """Lock conversations, their lanes first, and return those that are still there."""
        rows = list(rows)
        if not rows:
            return []
        keys = {f"conv:{row.public_id}" for row in rows} | {row.scope_key for row in rows if row.scope_key}
        tx.connection.execute(_LOCK_LANES, {"keys": sorted(keys)}).all()
        lock = (
            select(_c.id, _c.title, _c.summary, _c.message_count)
            .where(_c.id.in_([row.id for row in rows]), _SEEN)
            .order_by(_c.id)
            .with_for_update()
        )
        return tx.connection.execute(lock).all()

    def _remove_elsewhere(self, tx: Transaction) -> _Done:
        """Remove one piece of what was said in conversations of others; their numbers stay right."""
        wanted = (
            select(_m.id, _m.conversation_id, _m.content, _m.tokens)
            .join_from(messages, conversations, _c.id == _m.conversation_id)
            .where(self._person.said, _SEEN, NOT_CLEARED)
            .order_by(_m.id)
            .limit(PIECE)
        )
        homes = {row.conversation_id for row in tx.connection.execute(wanted)}
        places = select(_c.id, _c.scope_key, _c.public_id).where(_c.id.in_(homes))
        locked = {
            row.id: row for row in self._locked(tx, tx.connection.execute(places).all() if homes else [])
        }
        said = [
            row for row in tx.connection.execute(wanted).mappings().all() if row["conversation_id"] in locked
        ]
        if not said:
            return {}
        search.remove_messages(tx.connection, tx.kind, said)
        tx.connection.execute(delete(messages).where(_m.id.in_([row["id"] for row in said])))
        touched = sorted({row["conversation_id"] for row in said})
        for home in touched:
            self._recount(tx, locked[home], [row for row in said if row["conversation_id"] == home])
        summaries = sum(locked[home].summary is not None for home in touched)
        return {"messages_elsewhere": len(said), "summaries": summaries}

    def _recount(self, tx: Transaction, home: AnyRow, said: Sequence[Any]) -> None:
        tokens = sum(row["tokens"] for row in said)
        named_after = any(row["content"].strip()[:TITLE_CHARS] == home.title for row in said)
        left = _c.total_tokens - tokens
        tx.connection.execute(
            update(conversations)
            .where(_c.id == home.id)
            .values(
                message_count=_c.message_count - len(said),
                # Saved before the counters were cleared and removed after it: never below nothing.
                total_tokens=case((left < 0, 0), else_=left),
                summary=None,
                summarized_to=0,
                title=None if named_after else _c.title,
                version=_c.version + 1,
            )
        )

    # ------------------------------------------------------------------------------- ledger and budgets

    def _anonymise_usage(self, tx: Transaction) -> _Done:
        columns = [_u.id, _u.user_key, _u.user_id, _u.chat_id, _u.tenant_id, _u.fresh, *sums.AMOUNTS]
        wanted = select(*columns).where(_u.user_id.in_(self._person.ids)).order_by(_u.id).limit(PIECE)
        rows = tx.connection.execute(wanted.with_for_update()).all()
        nobody: dict[str, Any] = {"user_key": None, "user_id": None, "conversation_id": None}
        # A private chat's id names the person as well.
        private_rows = [row for row in rows if ":private:" in (row.user_key or ":private:")]
        private = [row.id for row in private_rows]
        others = [row.id for row in rows if row.id not in set(private)]
        if private:
            tx.connection.execute(update(usage).where(_u.id.in_(private)).values(nobody | {"chat_id": None}))
        if others:
            tx.connection.execute(update(usage).where(_u.id.in_(others)).values(nobody))
        if not rows:
            return {}
        sums.take_names_off(tx, rows, chats=private_rows)
        costs = [row.cost_micro_usd for row in rows if row.cost_micro_usd is not None]
        return {
            "usage_rows": len(rows),
            "usage_tokens": sum(row.input_tokens + row.output_tokens for row in rows),
            **({"usage_cost_usd": sum(costs) / _MICRO} if costs else {}),
        }

    def _remove_windows(self, tx: Transaction) -> _Done:
        keys = (*self._person.keys, *self._person.ids)
        gone = delete(budget_windows).where(budget_windows.c.key.in_(keys))
        if self._person.sender_id is not None:
            own = (refusals.c.account == self._person.platform) & (refusals.c.chat == self._person.sender_id)
            tx.connection.execute(delete(refusals).where(own))
        return {"budget_windows": int(tx.connection.execute(gone).rowcount)}

    def _anonymise_audit(self, tx: Transaction) -> _Done:
        """Have the record of what was changed say what, and no longer to whom or by whom."""
        keys = (*self._person.keys, *self._person.ids)
        for column in (audit.c.actor, audit.c.target):
            tx.connection.execute(update(audit).where(column.in_(keys)).values({column.name: None}))
        return {}

    def _lanes(self) -> None:
        """Remove the lanes that carry the name; one with something in it again is a new message's."""
        for piece in _pieces(_find_lanes(self._database, self._person)):
            self._do(partial(_remove_lanes, keys=piece))

    def _compact(self) -> None:
        """Have SQLite forget the words as well: in its search index, and in the log of what was written."""
        if self._database.kind != "sqlite":
            return
        begin = True
        while self._write(lambda tx, first=begin: search.compact(tx.connection, tx.kind, begin=first)):  # type: ignore[misc]
            begin = False
        with self._database.session() as session:
            session.execute(text("PRAGMA wal_checkpoint(TRUNCATE)"))


def _compact_index(tx: Transaction, begin: bool) -> bool:  # noqa: FBT001  # given by name
    return search.compact(tx.connection, tx.kind, begin=begin)


def _remove_lanes(tx: Transaction, keys: Sequence[str]) -> _Done:
    free = list(tx.connection.execute(_LOCK_FREE_LANES, {"keys": list(keys)}).scalars())
    if not free:
        return {}
    # Asked after the lock was got: whoever puts something into a lane holds its row.
    waiting = set(
        tx.connection.execute(select(_i.lane_key).where(_i.lane_key.in_(free), _i.state == OPEN)).scalars()
    )
    waiting |= set(
        tx.connection.execute(
            select(_o.lane_key).where(_o.lane_key.in_(free), _o.state.in_(UNSENT))
        ).scalars()
    )
    gone = [key for key in free if key not in waiting]
    if gone:
        tx.connection.execute(delete(lanes).where(lanes.c.key.in_(gone)))
    return {"lanes": len(gone)}


def _keys_of(found: Iterable[_Queued]) -> list[str]:
    return sorted({row.lane_key for row in found})


def _pieces(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), PIECE):
        yield items[start : start + PIECE]
