"""``POST /chat``: the browser's and scripts' door. The same pipeline, the same record as every platform."""

from __future__ import annotations

import asyncio
import time
from base64 import b64decode
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal
from uuid import NAMESPACE_URL, uuid4, uuid5

import orjson
from aiohttp import web

from feishu_bot.errors import BadPayload
from feishu_bot.model import Attachment, End, InboundMessage, person_key
from feishu_bot.platforms.base import parse_json
from feishu_bot.store import own
from feishu_bot.store.answers import Answer, event_key_of, own_conversation
from feishu_bot.store.controls import stop_answer
from feishu_bot.store.work import Recorded
from feishu_bot.web.accounts import VISITOR
from feishu_bot.web.errors import error_response, json_response, unavailable
from feishu_bot.web.rendering import render
from feishu_bot.web.webhooks import read_body

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from feishu_bot.gate import Gate
    from feishu_bot.intake import Intake
    from feishu_bot.store.controls import Pause
    from feishu_bot.store.store import Store
    from feishu_bot.waiters import Waiter, Waiters

MAX_REQUEST_ID: Final = 200  # characters
MAX_ID: Final = 2**53  # ids are numbers that JavaScript can hold
KEEPALIVE_S: Final = 15.0  # between two lines of a quiet event stream
MAX_FILES: Final = 4
MAX_FILE_NAME: Final = 120  # characters
_HTML_PAUSE_S: Final = 0.15  # between two renderings of an answer that grows
_HTML_SHARE: Final = 10  # and as many times as long as the last one took
_GRACE_S: Final = 5.0  # beyond the model's own time, for queue and commit


@dataclass(frozen=True, slots=True)
class Question:
    """A request to ``/chat`` that has been understood."""

    user: str
    text: str
    request_id: str
    conversation_id: int | None  # as asked for
    public_id: str
    agent: str | None
    files: tuple[File, ...] = ()


@dataclass(frozen=True, slots=True)
class File:
    """A picture or text file that comes with a question: its name and its bytes in base64."""

    kind: Literal["image", "file"]
    name: str
    data: str


class Chat:
    """Records a question like any platform's event and waits for what becomes of it."""

    def __init__(
        self,
        account: str | None,
        *,
        store: Store,
        intake: Intake,
        waiters: Waiters,
        gate: Gate,
        patience_s: float,
        agents: Callable[[], Sequence[str]],
        pause_of: Callable[[InboundMessage], Pause | None] = lambda _message: None,
    ) -> None:
        self._account = account
        self._store = store
        self._intake = intake
        self._waiters = waiters
        self._gate = gate
        self._agents = agents
        self._pause_of = pause_of
        self.patience_s = patience_s

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer ``{message, conversation_id?, follows?, agent?, request_id?, files?}`` with JSON, or with an event stream.

        ``follows``: the request id of the question that began the conversation, while nobody knows that by its id.
        With ``?html`` in the address, the answer comes as safe HTML too.
        """
        if self._account is None:
            return error_response(404, "the browser chat is switched off (platforms.web.enabled)")
        user = request[VISITOR].name
        try:
            question = await self._understand(parse_json(await read_body(request)), user)
        except BadPayload as error:
            return error_response(400, error.reason)
        if question is None:
            return error_response(404, "no such conversation")
        closed = self._gate.closed()
        if closed is not None:
            return unavailable()
        streaming = "text/event-stream" in request.headers.get("Accept", "")
        event_key = event_key_of(user, question.request_id)
        with self._waiters.expect(self._account, event_key) as waiter:
            result, pause = await self._record(question, event_key)
            waiter.look_now = result is Recorded.REPEAT
            if streaming:
                return await self._stream(request, question, event_key, waiter, pause)
            if pause is not None:
                return json_response(_paused(question, pause), status=202)
            answer = await self._waiters.answer(self._account, event_key, waiter, self.patience_s + _GRACE_S)
        return self._respond(question, answer, with_html="html" in request.query)

    async def _understand(self, data: Any, user: str) -> Question | None:
        """Return the question, or None for a conversation that is not this user's. Raises BadPayload."""
        if not isinstance(data, dict):
            raise BadPayload("expected a JSON object with a message")
        files = read_files(data.get("files"))
        text = data.get("message", "" if files else None)
        if not isinstance(text, str) or not (text.strip() or files):
            raise BadPayload("message: expected a text that is not empty")
        request_id = data.get("request_id")
        if request_id is not None and not is_request_id(request_id):
            raise BadPayload(f"request_id: expected a text of 1 to {MAX_REQUEST_ID} printable characters")
        agent = data.get("agent")
        if agent is not None and agent not in self._agents():
            raise BadPayload(f"agent: unknown; this server has {', '.join(self._agents())}")
        conversation_id = data.get("conversation_id")
        if conversation_id is not None and (
            isinstance(conversation_id, bool) or not isinstance(conversation_id, int)
        ):
            raise BadPayload("conversation_id: expected an integer")
        if conversation_id is not None and not 0 < conversation_id <= MAX_ID:
            return None
        follows = data.get("follows")
        if follows is not None and (not is_request_id(follows) or conversation_id is not None):
            raise BadPayload("follows: expected the request_id of a question, and no conversation_id")
        begun_by = follows or request_id
        public_id = str(uuid4()) if begun_by is None else str(uuid5(NAMESPACE_URL, f"{user}\n{begun_by}"))
        if conversation_id is not None:
            person = person_key(self._account or "", user)
            own = await self._store.read(lambda tx: own_conversation(tx, conversation_id, person))
            if own is None:
                return None
            public_id = own.public_id
        return Question(user, text, request_id or str(uuid4()), conversation_id, public_id, agent, files)

    async def _record(self, question: Question, event_key: str) -> tuple[Recorded, Pause | None]:
        """Bring a question on disk; return also the pause that a new one runs into."""
        message = InboundMessage(
            account=self._account or "",
            event_key=event_key,
            sender_id=question.user,
            sender_name=question.user,
            text=question.text,
            conversation=question.public_id,
            continues=question.conversation_id is not None,
            agent=question.agent,
            attachments=tuple(Attachment(f.kind, str(n), f.name) for n, f in enumerate(question.files)),
            # Told where the model is not shown what came along; it is never left out silently.
            unreadable=question.files[0].kind if question.files else None,
            extra={"files": [f.data for f in question.files]} if question.files else {},
        )
        (result,) = await self._intake.record([message])
        return result, self._pause_of(message) if result is Recorded.NEW else None

    def _respond(self, question: Question, answer: Answer | None, *, with_html: bool) -> web.Response:
        if answer is None:
            return json_response(_later(question), status=202)
        status, code = _status(answer)
        if status != 200:  # noqa: PLR2004  # the only one that is no error
            return error_response(status, _sentence(answer), code=code)
        return json_response(_body(answer, with_html=with_html))

    # --------------------------------------------------------------------------- coming back, and leaving

    async def pending(self, request: web.Request) -> web.StreamResponse:
        """Return one's questions that are not answered yet; asked again with their request ids, they are waited for."""
        account, user = self._account or "", request[VISITOR].name
        items = await self._store.read(lambda tx: own.pending(tx, account, user))
        return json_response({"items": items, "next": None})

    async def stop(self, request: web.Request) -> web.StreamResponse:
        """Have the answer to ``{request_id}`` end where it is; 202, as another process may be writing it."""
        data = parse_json(await read_body(request))
        request_id = data.get("request_id") if isinstance(data, dict) else None
        if not is_request_id(request_id):
            return error_response(400, "request_id: expected the text that the question was asked with")
        event_key = event_key_of(request[VISITOR].name, str(request_id))
        if not self._waiters.stop(event_key):
            await self._store.run(lambda tx: stop_answer(tx, event_key))
        return json_response({"request_id": request_id}, status=202)

    async def agents(self, _request: web.Request) -> web.StreamResponse:
        """Return the agents that one may choose from; the first answers where none is chosen."""
        return json_response({"items": [{"name": name} for name in self._agents()], "next": None})

    # ---------------------------------------------------------------------------------------- streaming

    async def _stream(
        self, request: web.Request, question: Question, event_key: str, waiter: Waiter, pause: Pause | None
    ) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-store",
                "X-Accel-Buffering": "no",  # a proxy shall hand on each piece as it comes
            }
        )
        await response.prepare(request)
        if pause is not None:
            await _event(response, "done", _paused(question, pause))
            return response
        with_html = "html" in request.query
        pieces = asyncio.create_task(self._pieces(response, waiter, with_html=with_html))
        try:
            patience_s = self.patience_s + _GRACE_S
            answer = await self._waiters.answer(self._account or "", event_key, waiter, patience_s)
            waiter.texts.put_nowait(None)
            await pieces
            if answer is None:
                await _event(response, "done", _later(question))
            else:
                status, code = _status(answer)
                if status == 200:  # noqa: PLR2004  # the only one that is no error
                    await _event(response, "done", _body(answer, with_html=with_html))
                else:
                    await _event(response, "error", {"code": code, "message": _sentence(answer)})
        except ConnectionResetError:
            pass  # the reader has left; the answer goes on into the record
        finally:
            pieces.cancel()
        return response

    async def _pieces(self, response: web.StreamResponse, waiter: Waiter, *, with_html: bool) -> None:
        said, rendered_at, pause_s = "", 0.0, 0.0
        while True:
            try:
                async with asyncio.timeout(KEEPALIVE_S):
                    piece = await waiter.texts.get()
            except TimeoutError:
                await response.write(b": still there\n\n")
                continue
            if piece is None:
                return
            at, text = piece
            await _event(response, "delta", {"text": text, "at": at})
            if not with_html:
                continue
            said = text if at == 0 else said + text
            started = time.monotonic()
            if started - rendered_at >= pause_s:
                html = await asyncio.to_thread(render.__wrapped__, said)
                rendered_at = time.monotonic()
                pause_s = max(_HTML_PAUSE_S, _HTML_SHARE * (rendered_at - started))
                await _event(response, "html", {"html": html})


def read_files(value: Any) -> tuple[File, ...]:
    """Return the files of a question. Raises BadPayload."""
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > MAX_FILES:
        raise BadPayload(f"files: expected a list of at most {MAX_FILES}")
    files = []
    for item in value:
        name, data = (item.get("name"), item.get("data")) if isinstance(item, dict) else (None, None)
        if not isinstance(name, str) or not 0 < len(name) <= MAX_FILE_NAME or not name.isprintable():
            raise BadPayload(f"files: name: expected a text of 1 to {MAX_FILE_NAME} printable characters")
        if not isinstance(data, str) or not data:
            raise BadPayload("files: data: expected base64")
        try:
            head = b64decode(data, validate=True)[:16]
        except ValueError:
            raise BadPayload("files: data: expected base64") from None
        files.append(File("image" if is_image(head) else "file", name, data))
    return tuple(files)


def is_image(head: bytes) -> bool:
    """Say whether a file's first bytes are those of a picture that models take."""
    return head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8")) or (
        head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    )


def is_request_id(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_REQUEST_ID and value.isprintable()


def _later(question: Question) -> dict[str, Any]:
    """Return what is said while the answer is not ready: come again with the same request_id."""
    return {
        "conversation_id": question.conversation_id,
        "request_id": question.request_id,
        "status": "in progress",
    }


def _sentence(answer: Answer) -> str:
    if answer.end is End.ANSWERED:
        return "the answer is not kept (ai.conversation_persistence.enabled)"
    return answer.text or answer.reason


async def _event(response: web.StreamResponse, name: str, data: dict[str, Any]) -> None:
    await response.write(b"event: " + name.encode() + b"\ndata: " + orjson.dumps(data) + b"\n\n")


def _paused(question: Question, pause: Pause) -> dict[str, Any]:
    """Return that a question is kept, and will be answered when an operator lets the bot go on."""
    return {
        "conversation_id": question.conversation_id,
        "request_id": question.request_id,
        "status": "paused",
        "message": pause.say or "",
    }


def _body(answer: Answer, *, with_html: bool = False) -> dict[str, Any]:
    body = {
        "response": answer.text,
        "conversation_id": answer.conversation_id,
        "message_id": answer.message_id,
        "usage": {
            "input_tokens": answer.input_tokens,
            "output_tokens": answer.output_tokens,
            "total_tokens": answer.input_tokens + answer.output_tokens,
            "model": answer.model,
        },
    }
    if with_html:
        body["html"] = render(answer.text or "")
    return body


def _status(answer: Answer) -> tuple[int, str]:
    """Return the HTTP status and the code for how a question ended."""
    match answer.end:
        case End.ANSWERED:
            return (404, "not_kept") if answer.text is None else (200, "ok")
        case End.REFUSED if answer.reason.startswith("budget"):
            return 429, "budget_exceeded"
        case End.REFUSED if answer.reason == "too long":
            return 413, "too_long"
        case End.REFUSED:
            return 403, "refused"
        case End.IGNORED:
            return 404, "not_found"
        case End.EXPIRED:
            return 503, "expired"
    return 502, "model_failed"
