"""Full-text search, with the same answers on each database.

The index is written by the transaction that writes the message. SQLite: a table of terms alone (FTS5 without
content), from which a message is removed by giving its text once more. PostgreSQL and MariaDB: a column beside the
text with an index on it, gone with the row. The index finds candidates; ``terms.Query`` decides on their text.
"""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sqlalchemy import String, bindparam, cast, literal, or_, select, text, tuple_, update
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import ClauseElement, Executable

from feishu_bot.store.people import Person
from feishu_bot.store.schema import NOT_CLEARED, SEARCH_TABLE, conversations, messages
from feishu_bot.store.terms import MAX_WORD_CHARS, Query, terms

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from sqlalchemy import ColumnElement, Connection, Row, RowMapping, Select
    from sqlalchemy.sql.compiler import SQLCompiler

    Rows = Iterable[Mapping[str, Any] | RowMapping]
    AnyRow = Row[*tuple[Any, ...]]

NARROW: Final = 2000  # messages that are looked through one by one, without the index
SCANNED_WITHOUT_TERMS: Final = 50_000  # newest messages looked through for a query of punctuation alone
_HEX_DIGITS: Final = 80  # of a term on MariaDB, which takes 84 characters
_NEWEST: Final = 1000  # messages looked at one by one before SQLite's index has to put a prefix together
_MANY: Final = 10_000  # candidates after which it is better to go by time than by the index
_LAST: Final = 2**62

_m, _c = messages.c, conversations.c

# ------------------------------------------------------------------------------------------------ writing

ADD = text(f"INSERT INTO {SEARCH_TABLE} (rowid, terms) VALUES (:id, :terms)")
_REMOVE = text(f"INSERT INTO {SEARCH_TABLE} ({SEARCH_TABLE}, rowid, terms) VALUES ('delete', :id, :terms)")
_SET_TERMS = update(messages).where(_m.id == bindparam("mid")).values(search_terms=bindparam("new_terms"))
_INDEXED = select(_m.id).where(_m.id.in_(bindparam("ids", expanding=True)), _m.search_terms.is_not(None))
_ADD_NEWEST = f"INSERT INTO {SEARCH_TABLE} (rowid, terms) VALUES ((SELECT max(id) FROM messages) - ?, ?)"
_NOT_INDEXED = (
    select(_m.id, _m.content)
    .where(_m.search_terms.is_(None), _m.id > bindparam("after"))
    .order_by(_m.id)
    .limit(bindparam("most"))
)


def column_value(kind: str, content: str) -> str:
    """Return what an insert into ``messages`` puts into ``search_terms``.

    On PostgreSQL and MariaDB that is the whole index; on SQLite a mark, and ``index_inserted`` does the rest.
    """
    if kind == "sqlite":
        return ""
    if kind == "postgresql":
        return " ".join([f"'{term}'" for term in terms(content)])
    return " ".join([_encode(term) for term in terms(content)])


def index_inserted(connection: Connection, kind: str, contents: Sequence[str]) -> None:
    """Index the messages that this transaction has just inserted with ``column_value``, in their order.

    Nothing else may have been inserted in between: SQLite numbers them one after the other.
    """
    if kind != "sqlite" or not contents:
        return
    # Past SQLAlchemy, as everything on a message's way.
    last = len(contents) - 1
    connection.exec_driver_sql(
        _ADD_NEWEST, [(last - n, " ".join(terms(content))) for n, content in enumerate(contents)]
    )


def index_messages(connection: Connection, kind: str, rows: Rows) -> None:
    """Index stored messages (``id`` and ``content`` of each) that are not in the index."""
    rows = list(rows)
    if not rows:
        return
    connection.execute(
        _SET_TERMS, [{"mid": row["id"], "new_terms": column_value(kind, row["content"])} for row in rows]
    )
    if kind == "sqlite":
        connection.execute(ADD, _with_terms(rows))


def remove_messages(connection: Connection, kind: str, rows: Rows) -> None:
    """Take messages (``id`` and the ``content`` they were indexed with) out of the index.

    Call it while their rows are still there; what was never indexed is passed over.
    """
    if kind != "sqlite":
        return  # the index is a column of the row
    rows = list(rows)
    if not rows:
        return
    indexed = set(connection.execute(_INDEXED, {"ids": [row["id"] for row in rows]}).scalars())
    if indexed:
        connection.execute(_REMOVE, _with_terms([row for row in rows if row["id"] in indexed]))
        # The mark goes too: removed once more (an edit after a failed one), nothing happens.
        connection.execute(_SET_TERMS, [{"mid": i, "new_terms": None} for i in indexed])


def index_missing(connection: Connection, kind: str, *, after: int = 0, most: int = 500) -> int | None:
    """Index one piece of the messages that are not in the index; return where the next begins, None at the end."""
    rows = connection.execute(_NOT_INDEXED, {"after": after, "most": most}).mappings().all()
    index_messages(connection, kind, rows)
    return rows[-1]["id"] if len(rows) == most else None


def compact(connection: Connection, kind: str, *, pages: int = 500, begin: bool = False) -> bool:
    """Merge one piece of SQLite's index, so that what was removed leaves the file; say whether more is left.

    Each piece is a transaction of its own, after the one that removed something; ``begin`` for the first.
    """
    if kind != "sqlite":
        return False
    before = connection.execute(text("SELECT total_changes()")).scalar_one()
    connection.execute(
        text(f"INSERT INTO {SEARCH_TABLE} ({SEARCH_TABLE}, rank) VALUES ('merge', :pages)"),
        {"pages": -pages if begin else pages},
    )
    after = connection.execute(text("SELECT total_changes()")).scalar_one()
    return bool(after - before >= 2)  # noqa: PLR2004  # what SQLite documents as the sign of work done


def _with_terms(rows: Rows) -> list[dict[str, Any]]:
    return [{"id": row["id"], "terms": " ".join(terms(row["content"]))} for row in rows]


def _encode(term: str) -> str:
    """Return a term as a word that MariaDB takes: no stop word, never too short, in ASCII."""
    if term.isascii():
        return "wx" + term[:MAX_WORD_CHARS]
    return "zq" + term.encode().hex()[:_HEX_DIGITS]


# ------------------------------------------------------------------------------------------------ looking

_COLUMNS = (
    _m.id,
    _m.conversation_id,
    _m.role,
    _m.content,
    _m.sender_id,
    _m.timestamp,
    _m.tokens,
    _c.public_id,
    _c.tenant_id,
    _c.user_key,
    _c.platform,
    _c.chat_id,
    _c.title,
)
_HIT = select(*_COLUMNS).join_from(messages, conversations, _c.id == _m.conversation_id)
_BY_IDS = _m.id.in_(bindparam("ids", expanding=True))
_NEWEST_FIRST = (_m.timestamp.desc(), _m.id.desc())
# Written into the statement: the planner chooses by how common the words are.
_POSTGRESQL_MATCH = _m.search_terms.op("@@", is_comparison=True)(
    cast(bindparam("query", type_=String(), literal_execute=True), postgresql.TSQUERY)
)
_MARIADB_MATCH = mysql.match(_m.search_terms, against=bindparam("query", type_=String())).in_boolean_mode()
_FTS_PIECE = text(
    f"SELECT rowid FROM {SEARCH_TABLE} WHERE {SEARCH_TABLE} MATCH :query AND rowid < :before "
    "ORDER BY rowid DESC LIMIT :most"
)


class _Explain(Executable, ClauseElement):
    """The plan of a query, without running it."""

    inherit_cache = False

    def __init__(self, statement: Select[Any]) -> None:
        self.statement = statement


@compiles(_Explain, "postgresql")
def _explain(element: _Explain, compiler: SQLCompiler, **options: Any) -> str:
    return "EXPLAIN (FORMAT JSON) " + compiler.process(element.statement, **options)


class _Place(NamedTuple):
    """Where a message stands in the order of a search: newest first."""

    timestamp: datetime
    id: int


class _Filters(NamedTuple):
    speakers: list[Person]
    tenant_id: str | None
    role: str | None
    since: datetime | None
    until: datetime | None
    conditions: list[ColumnElement[bool]]


def search_messages(
    connection: Connection,
    kind: str,
    text: str,
    *,
    user_key: str | None = None,
    person: str | None = None,
    platform: str | None = None,
    owner: tuple[str, str | None] | None = None,
    role: str | None = None,
    tenant_id: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    limit: int = 20,
    offset: int = 0,
    marks: tuple[str, str] = ("«", "»"),
) -> list[dict[str, Any]]:
    """Return the messages in which every word and every "quoted phrase" of ``text`` occurs, newest first.

    A word matches from the beginning of a word, Chinese from one character up matches anywhere; case and width of
    characters do not count; nothing but the quotation mark is syntax. ``user_key`` is the speaker, ``person`` (a
    person or a user key) is the speaker in every kind of chat; an answer belongs to the user of its conversation.
    ``owner`` limits to the conversations of one user key and, unless None, of one chat.
    ``until`` is exclusive; naive instants are UTC. The hit stands between ``marks`` in ``snippet``. Of a message the
    first 100,000 characters are looked at.
    """
    query = Query(text)
    if not query or limit <= 0:
        return []
    filters = _filters(
        user_key=user_key,
        person=person,
        platform=platform,
        owner=owner,
        role=role,
        tenant_id=tenant_id,
        since=since,
        until=until,
    )
    if filters is None:
        return []
    found: list[dict[str, Any]] = []
    skip = offset
    for row in _candidates(connection, kind, query, filters, offset + limit):
        if not query.matches(row.content):
            continue
        if skip:
            skip -= 1
            continue
        found.append(_found(row, query, marks))
        if len(found) == limit:
            break
    return found


def _filters(
    *,
    user_key: str | None,
    person: str | None,
    platform: str | None,
    owner: tuple[str, str | None] | None,
    role: str | None,
    tenant_id: str | None,
    since: datetime | None,
    until: datetime | None,
) -> _Filters | None:
    """Return the conditions, or None where nothing can fulfil them."""
    owner_key, owner_chat = owner or (None, None)
    given = (user_key, person, platform, owner_key, owner_chat, role, tenant_id)
    if not all(_storable(v) for v in given if v is not None):
        return None
    speakers: list[Person] = []
    if user_key is not None:
        speakers.append(Person(user_key, (user_key,), ()))
    if person is not None:
        speakers.append(Person.of(person))
    since, until = _utc(since), _utc(until)
    conditions: list[ColumnElement[bool]] = [_c.hidden_at.is_(None), NOT_CLEARED, _m.recalled_at.is_(None)]
    conditions += [or_(who.said, _m.sender_id.is_(None) & who.owns) for who in speakers]
    equal = ((_c.platform, platform), (_c.user_key, owner_key), (_c.chat_id, owner_chat), (_m.role, role))
    conditions += [column == value for column, value in equal if value is not None]
    if tenant_id is not None:
        conditions.append(_c.tenant_id == tenant_id)
    if since is not None:
        conditions.append(_m.timestamp >= since)
    if until is not None:
        conditions.append(_m.timestamp < until)
    return _Filters(speakers, tenant_id, role, since, until, conditions)


def _storable(value: str) -> bool:
    """Say whether a column can hold it; drivers raise errors of their own for NUL and lone surrogates."""
    if "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _utc(instant: datetime | None) -> datetime | None:
    if instant is None:
        return None
    return instant.replace(tzinfo=UTC) if instant.tzinfo is None else instant.astimezone(UTC)


def _found(row: AnyRow, query: Query, marks: tuple[str, str]) -> dict[str, Any]:
    return {
        "message_id": row.id,
        "conversation_id": row.conversation_id,
        "public_id": row.public_id,
        "tenant_id": row.tenant_id,
        "user_key": row.sender_id or row.user_key,
        "platform": row.platform,
        "chat_id": row.chat_id,
        "title": row.title,
        "role": row.role,
        "content": row.content,
        "tokens": row.tokens,
        "snippet": query.snippet(row.content, marks=marks),
        "timestamp": row.timestamp.replace(tzinfo=None).isoformat() + "Z",
    }


# --------------------------------------------------------------------------------------------- candidates


def _candidates(
    connection: Connection, kind: str, query: Query, filters: _Filters, wanted: int
) -> Iterator[AnyRow]:
    """Yield messages that may be hits, newest first: all that are, and some that are not."""
    places = _narrow(connection, filters)
    if places is not None:
        yield from _fetch(connection, filters, sorted(places, reverse=True))
    elif not query.terms:
        yield from _scan(connection, filters, most=SCANNED_WITHOUT_TERMS)
    elif kind == "sqlite":
        yield from _by_fts(connection, query, filters, wanted)
    else:
        match, parameters = _match(kind, query)
        yield from _scan(connection, filters, match, parameters, piece=max(64, 2 * wanted))


def _narrow(connection: Connection, filters: _Filters) -> set[_Place] | None:
    """Return the few messages that the filters leave; None where they leave many."""
    place = (_m.timestamp, _m.id)
    statements: list[Select[Any]] = []
    if filters.speakers:
        who = filters.speakers[0]
        own = select(*place).join_from(conversations, messages, _c.id == _m.conversation_id)
        statements = [
            select(*place).where(who.said),
            own.where(_c.user_key.in_(who.keys)),
            own.where(_c.user_id.in_(who.ids)),
        ]
    elif filters.tenant_id is not None:
        own = select(*place).join_from(conversations, messages, _c.id == _m.conversation_id)
        statements = [own.where(_c.tenant_id == filters.tenant_id)]
    elif filters.since is not None:
        recent = select(*place).where(_m.timestamp >= filters.since)
        statements = [recent if filters.until is None else recent.where(_m.timestamp < filters.until)]
    if not statements:
        return None
    places: set[_Place] = set()
    for statement in statements:
        rows = connection.execute(statement.limit(NARROW + 1)).all()
        if len(rows) > NARROW:
            return None
        places.update(_Place(*row) for row in rows)
    return places


def _fetch(connection: Connection, filters: _Filters, places: Sequence[_Place]) -> Iterator[AnyRow]:
    """Yield the rows at these places that pass the filters, in the order of the places."""
    statement = _HIT.where(_BY_IDS, *filters.conditions)
    start, piece = 0, 200
    while start < len(places):
        ids = [place.id for place in places[start : start + piece]]
        start, piece = start + piece, 1000
        rows = {row.id: row for row in connection.execute(statement, {"ids": ids})}
        yield from (rows[i] for i in ids if i in rows)


def _scan(
    connection: Connection,
    filters: _Filters,
    match: ColumnElement[bool] | None = None,
    parameters: Mapping[str, Any] | None = None,
    *,
    piece: int = 500,
    most: int | None = None,
) -> Iterator[AnyRow]:
    """Yield messages by time, newest first, those that the index names where ``match`` is given.

    First where they stand, then the rows: sorted with their texts, a common word would take ten times as long.
    """
    conditions = [] if match is None else [match]
    if filters.role is not None:
        conditions.append(_m.role == filters.role)
    if filters.since is not None:
        conditions.append(_m.timestamp >= filters.since)
    if filters.until is not None:
        conditions.append(_m.timestamp < filters.until)
    bound = dict(parameters or {})
    source = select(_m.timestamp, _m.id).where(*conditions)
    if match is _POSTGRESQL_MATCH and _expected(connection, source, bound) <= _MANY:
        # Left to choose, the planner would go by time through the whole table for a word that it does not know.
        hits = source.cte("hits").prefix_with("MATERIALIZED", dialect="postgresql")
        columns = hits.c
        source = select(columns.timestamp, columns.id)
    else:
        columns = _m
    statement = source.order_by(columns.timestamp.desc(), columns.id.desc())
    further = statement.where(*_before(columns))
    seen = 0
    while most is None or seen < most:
        places = [_Place(*row) for row in connection.execute(statement.limit(piece), bound)]
        yield from _fetch(connection, filters, places)
        seen += len(places)
        if len(places) < piece:
            return
        statement = further
        bound |= {"last_time": places[-1].timestamp, "last_id": places[-1].id}
        piece = min(4 * piece, 5000)


def _before(columns: Any) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    """Select what stands behind the last place; the first condition is for databases that take a pair for no range."""
    last_time = bindparam("last_time", type_=_m.timestamp.type)
    last = tuple_(last_time, bindparam("last_id", type_=_m.id.type))
    return columns.timestamp <= last_time, tuple_(columns.timestamp, columns.id) < last


def _expected(connection: Connection, source: Select[Any], parameters: Mapping[str, Any]) -> float:
    """Return how many rows PostgreSQL expects of a query."""
    plan = connection.execute(_Explain(source), parameters).scalar_one()
    return float(plan[0]["Plan"]["Plan Rows"])


def _match(kind: str, query: Query) -> tuple[ColumnElement[bool], dict[str, str]]:
    """Return the condition that the index answers, and its parameter."""
    if kind == "postgresql":
        words = [f"'{term.text}'{':*' if term.prefix else ''}" for term in query.terms]
        return _POSTGRESQL_MATCH, {"query": " & ".join(words)}
    words = [f"+{_encode(term.text)}{'*' if term.prefix else ''}" for term in query.terms]
    return _MARIADB_MATCH, {"query": " ".join(words)}


def _by_fts(connection: Connection, query: Query, filters: _Filters, wanted: int) -> Iterator[AnyRow]:
    """Yield SQLite's candidates, newest first.

    Its index gives them by id in no time, and ids mostly follow time, but for imported messages. So they are read
    by id until no message that was stored earlier can be newer than the last one needed.

    A prefix it puts together of every message that has it before the first one is given, a second for millions.
    What is that common stands in the newest messages.
    """
    if filters.role is None and any(term.prefix for term in query.terms):
        newest = _scan(connection, filters, piece=_NEWEST // 5, most=_NEWEST)
        found = list(islice((row for row in newest if query.matches(row.content)), wanted))
        if len(found) == wanted:
            yield from found
            return
    words = [f'"{term.text}"{"*" if term.prefix else ""}' for term in query.terms]
    fts = " AND ".join(words)
    statement = _HIT.where(_BY_IDS, *filters.conditions)
    hits: list[AnyRow] = []
    before, most, seen = _LAST, max(256, 2 * wanted), 0
    while True:
        parameters = {"query": fts, "before": before, "most": most}
        ids = list(connection.execute(_FTS_PIECE, parameters).scalars())
        seen += len(ids)
        for start in range(0, len(ids), 1000):
            rows = connection.execute(statement, {"ids": ids[start : start + 1000]})
            hits += [row for row in rows if query.matches(row.content)]
        hits.sort(key=lambda row: (row.timestamp, row.id), reverse=True)
        del hits[wanted:]
        if len(ids) < most:
            break
        before, most = ids[-1], min(4 * most, 16_000)
        if filters.until is not None and seen > _MANY:
            yield from _scan(connection, filters)
            return
        if len(hits) == wanted:
            earlier = _m.timestamp > hits[-1].timestamp
        elif filters.since is not None:
            earlier = _m.timestamp >= filters.since
        else:
            continue
        if connection.execute(select(literal(1)).where(earlier, _m.id < before).limit(1)).first() is None:
            break
    yield from hits
