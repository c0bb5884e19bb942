"""One's own conversations by HTTP: lists, messages, changes, search, export. Somebody else's are 404."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from typing import TYPE_CHECKING, Any, Final, TypeVar

from aiohttp import web

from feishu_bot.errors import BadPayload, MessageNotFound, StoreUnavailable
from feishu_bot.model import person_key
from feishu_bot.platforms.base import parse_json
from feishu_bot.store import conversations, own, threads
from feishu_bot.store.exports import write_conversation
from feishu_bot.store.search import search_messages
from feishu_bot.store.values import load_object
from feishu_bot.web.accounts import VISITOR
from feishu_bot.web.errors import error_response, json_response
from feishu_bot.web.rendering import render
from feishu_bot.web.webhooks import read_body

if TYPE_CHECKING:
    from collections.abc import Callable

    from feishu_bot.store.store import Store
    from feishu_bot.store.work import StoredRow, Transaction

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_PAGE: Final = 200
MAX_TITLE: Final = 200  # characters
MAX_FORKED: Final = 5000  # messages that are copied at once: no other message is stored meanwhile
MAX_QUERY: Final = 200  # characters of a search
MAX_SKIPPED: Final = 10_000  # hits before the page that is asked for
EXPORTS: Final = {
    "json": "application/json",
    "jsonl": "application/x-ndjson",
    "csv": "text/csv",
    "md": "text/markdown",
}
_MAX_ID: Final = 2**53
_CHUNK: Final = 1 << 16  # characters of a file sent at once
MARKS: Final = ("\x02", "\x03")  # around a hit in a snippet; no text of a person can have them shown as such


class Conversations:
    """Reads on reader threads; a change runs with the conversation's lane locked and waits for no model."""

    def __init__(self, store: Store, account: str | None) -> None:
        self._store = store
        self._account = account or ""
        self._removing: set[asyncio.Task[None]] = set()

    def person(self, request: web.Request) -> str:
        """Return whose conversations are meant."""
        return person_key(self._account, request[VISITOR].name)

    # --------------------------------------------------------------------------------------------- reading

    async def list(self, request: web.Request) -> web.StreamResponse:
        """Return one's conversations, the one used last first."""
        before, limit = _id(request, "before"), _limit(request)
        person = self.person(request)
        rows = await self._store.read(lambda tx: own.list_own(tx, person, before=before, limit=limit + 1))
        return json_response(_page([conversation_json(row) for row in rows], limit))

    async def messages(self, request: web.Request) -> web.StreamResponse:
        """Return a conversation's messages, newest first: before one, after one, or the newest."""
        before, after, limit = _id(request, "before"), _id(request, "after"), _limit(request)
        if before is not None and after is not None:
            return error_response(400, "expected one of before and after")
        person, conversation_id = self.person(request), _path_id(request)

        def read(tx: Transaction) -> list[StoredRow]:
            own.check_own(tx, conversation_id, person)
            return own.list_messages(tx, conversation_id, before=before, after=after, limit=limit + 1)

        rows = await self._store.read(read)
        with_html = "html" in request.query
        items = await asyncio.to_thread(lambda: [message_json(row, with_html=with_html) for row in rows])
        if after is None:
            return json_response(_page(items, limit))
        more = len(items) > limit
        items = items[-limit:]
        return json_response({"items": items, "next": items[0]["id"] if more else None})

    async def get(self, request: web.Request) -> web.StreamResponse:
        """Return one conversation."""
        person, conversation_id = self.person(request), _path_id(request)
        row = await self._store.read(lambda tx: own.own_row(tx, conversation_id, person))
        return json_response(conversation_json(row))

    async def search(self, request: web.Request) -> web.StreamResponse:
        """Return the messages of one's conversations in which all words of ``q`` occur, newest first."""
        text = request.query.get("q", "").strip()
        offset, limit = _number(request, "offset", 0, low=0, high=MAX_SKIPPED), _limit(request)
        if not 0 < len(text) <= MAX_QUERY:
            return error_response(400, f"q: expected 1 to {MAX_QUERY} characters")
        person = self.person(request)
        found = await self._store.read(
            lambda tx: search_messages(
                tx.connection, tx.kind, text, person=person, limit=limit + 1, offset=offset, marks=MARKS
            )
        )
        items = [
            {key: hit[key] for key in ("message_id", "conversation_id", "title", "role", "timestamp")}
            | {"snippet": marked(hit["snippet"])}
            for hit in found
        ]
        more = len(items) > limit
        return json_response({"items": items[:limit], "next": offset + limit if more else None})

    async def export(self, request: web.Request) -> web.StreamResponse:
        """Return a conversation as a file: json (which ``import`` takes), jsonl, csv or md."""
        person, conversation_id = self.person(request), _path_id(request)
        await self._store.read(lambda tx: own.check_own(tx, conversation_id, person))
        return await send_export(request, self._store, conversation_id)

    # -------------------------------------------------------------------------------------------- changing

    async def rename(self, request: web.Request) -> web.StreamResponse:
        """Give a conversation another title ``{title}`` and return it."""
        title = _title(parse_json(await read_body(request)))
        row = await self._change(request, lambda tx, cid: threads.rename(tx, cid, title))
        return json_response(conversation_json(row))

    async def clear(self, request: web.Request) -> web.StreamResponse:
        """Remove a conversation's messages, keep it, and return it."""

        def clear(tx: Transaction, conversation_id: int) -> StoredRow:
            conversations.clear(tx, conversation_id)
            return conversations.get(tx, conversation_id)

        row = await self._change(request, clear)
        self._later(conversations.remove_cleared, row["id"])
        return json_response(conversation_json(row))

    async def fork(self, request: web.Request) -> web.StreamResponse:
        """Copy a conversation up to and with ``{message_id}``, and return the copy."""
        data = parse_json(await read_body(request))
        message_id = data.get("message_id") if isinstance(data, dict) else None
        if isinstance(message_id, bool) or not isinstance(message_id, int):
            raise BadPayload("message_id: expected an integer")
        if not 0 < message_id <= _MAX_ID:
            raise MessageNotFound(message_id)

        def fork(tx: Transaction, conversation_id: int) -> StoredRow | None:
            if conversations.get(tx, conversation_id)["message_count"] > MAX_FORKED:
                return None
            return threads.fork(tx, conversation_id, message_id)

        row = await self._change(request, fork)
        if row is None:
            sentence = f"a conversation of more than {MAX_FORKED} messages is not copied"
            return error_response(413, sentence, code="too_long")
        return json_response(conversation_json(row))

    async def delete(self, request: web.Request) -> web.StreamResponse:
        """Remove a conversation: it is gone at once, its rows follow in pieces."""
        conversation_id = _path_id(request)
        await self._change(request, conversations.hide)
        self.remove_rows(conversation_id)
        return web.Response(status=204)

    def remove_rows(self, conversation_id: int) -> None:
        """Remove what is left of a conversation that was hidden, beside all else."""
        self._later(conversations.remove_piece, conversation_id)

    def _later(self, piece: Callable[[Transaction, int], object], conversation_id: int) -> None:
        """Remove rows nobody sees any more, piece by piece; what is left at an end, the next start finds."""

        async def remove() -> None:
            try:
                while await self._store.run(lambda tx: piece(tx, conversation_id)):
                    pass
            except StoreUnavailable as error:
                log.warning("store unavailable", extra={"step": "remove", "reason": str(error)})

        task = asyncio.create_task(remove())
        self._removing.add(task)
        task.add_done_callback(self._removing.discard)

    async def _change(self, request: web.Request, function: Callable[[Transaction, int], T]) -> T:
        """Change one's own conversation in a transaction. Raises ConversationNotFound for somebody else's."""
        person, conversation_id = self.person(request), _path_id(request)

        def change(tx: Transaction) -> T:
            own.check_own(tx, conversation_id, person)
            return function(tx, conversation_id)

        return await self._store.run(change)


async def send_export(request: web.Request, store: Store, conversation_id: int) -> web.StreamResponse:
    """Return a conversation as a file in the ``format`` asked for. Raises ConversationNotFound."""
    kind = request.query.get("format", "json")
    if kind not in EXPORTS:
        return error_response(400, f"format: expected {', '.join(EXPORTS)}")
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace", newline="") as file:

        def write() -> None:
            write_conversation(store.read_now, conversation_id, file, kind)
            file.seek(0)

        await asyncio.to_thread(write)
        response = web.StreamResponse(
            headers={
                "Content-Type": f"{EXPORTS[kind]}; charset=utf-8",
                "Content-Disposition": f'attachment; filename="conversation-{conversation_id}.{kind}"',
                "Cache-Control": "no-store",
            }
        )
        await response.prepare(request)
        while text := await asyncio.to_thread(file.read, _CHUNK):
            await response.write(text.encode())
    return response


# ----------------------------------------------------------------------------------------------------- JSON


def conversation_json(row: StoredRow) -> dict[str, Any]:
    """Return a conversation as its owner sees it."""
    return {
        "id": row["id"],
        "title": row["title"],
        "agent": row["agent"],
        "message_count": row["message_count"],
        "total_tokens": row["total_tokens"],
        "parent_id": row["parent_id"],
        "created_at": conversations.iso_of(row["created_at"]),
        "last_activity": conversations.iso_of(row["last_activity"]),
    }


def message_json(row: StoredRow, *, with_html: bool = False) -> dict[str, Any]:
    """Return a message as its owner sees it; ``html`` is its Markdown, made safe."""
    metadata = load_object(row["metadata_json"]) or {}
    found = {
        "id": row["id"],
        "role": row["role"],
        "content": row["content"],
        "tokens": row["tokens"],
        "model": metadata.get("model"),
        "timestamp": conversations.iso_of(row["timestamp"]),
        "edited_at": None if row["edited_at"] is None else conversations.iso_of(row["edited_at"]),
    }
    if with_html:
        found["html"] = render(row["content"])
    return found


def _page(items: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    more = len(items) > limit
    return {"items": items[:limit], "next": items[limit - 1]["id"] if more else None}


def marked(snippet: str) -> list[dict[str, Any]]:
    """Return a snippet in pieces, those that were looked for marked."""
    pieces = []
    for part in snippet.split(MARKS[0]):
        hit, end, rest = part.partition(MARKS[1])
        if end:
            pieces.append({"text": hit, "hit": True})
        else:
            rest = hit
        if rest:
            pieces.append({"text": rest, "hit": False})
    return pieces


# ------------------------------------------------------------------------------------------------- requests


def _path_id(request: web.Request) -> int:
    return int(request.match_info["id"])


def _id(request: web.Request, name: str) -> int | None:
    return None if name not in request.query else _number(request, name, 0, low=1, high=_MAX_ID)


def _limit(request: web.Request) -> int:
    return _number(request, "limit", 50, low=1, high=MAX_PAGE)


def _number(request: web.Request, name: str, default: int, *, low: int, high: int) -> int:
    text = request.query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) <= 16 and low <= int(text) <= high):  # noqa: PLR2004  # below 2^53
        raise BadPayload(f"{name}: expected a number from {low} to {high}")
    return int(text)


def _title(data: Any) -> str:
    title = data.get("title") if isinstance(data, dict) else None
    if not isinstance(title, str):
        raise BadPayload("title: expected a text")
    title = " ".join(title.split())
    if not 0 < len(title) <= MAX_TITLE or "\0" in title:
        raise BadPayload(f"title: expected 1 to {MAX_TITLE} characters")
    return title
