"""``POST /chat``: the browser's and scripts' door. The same pipeline, the same record as every platform."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from uuid import NAMESPACE_URL, uuid4, uuid5

import orjson
from aiohttp import web

from feishu_bot.errors import BadPayload
from feishu_bot.model import End, InboundMessage, person_key
from feishu_bot.platforms.base import parse_json
from feishu_bot.store.answers import Answer, event_key_of, own_conversation
from feishu_bot.store.work import Recorded
from feishu_bot.web.accounts import VISITOR
from feishu_bot.web.errors import error_response, json_response, unavailable
from feishu_bot.web.webhooks import read_body

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from feishu_bot.gate import Gate
    from feishu_bot.intake import Intake
    from feishu_bot.store.controls import Pause
    from feishu_bot.store.store import Store
    from feishu_bot.waiters import Waiter, Waiters

MAX_REQUEST_ID: Final = 200  # characters
MAX_ID: Final = 2**53  # ids are numbers that JavaScript can hold
KEEPALIVE_S: Final = 15.0  # between two lines of a quiet event stream
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
        agents: Callable[[], Collection[str]],
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
        """Answer ``{message, conversation_id?, agent?, request_id?}`` with JSON, or with an event stream."""
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
        return self._respond(question, answer)

    async def _understand(self, data: Any, user: str) -> Question | None:
        """Return the question, or None for a conversation that is not this user's. Raises BadPayload."""
        if not isinstance(data, dict):
            raise BadPayload("expected a JSON object with a message")
        text = data.get("message")
        if not isinstance(text, str) or not text.strip():
            raise BadPayload("message: expected a text that is not empty")
        request_id = data.get("request_id")
        if request_id is not None and not _is_request_id(request_id):
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
        public_id = str(uuid4()) if request_id is None else str(uuid5(NAMESPACE_URL, f"{user}\n{request_id}"))
        if conversation_id is not None:
            person = person_key(self._account or "", user)
            own = await self._store.read(lambda tx: own_conversation(tx, conversation_id, person))
            if own is None:
                return None
            public_id = own.public_id
        return Question(user, text, request_id or str(uuid4()), conversation_id, public_id, agent)

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
        )
        (result,) = await self._intake.record([message])
        return result, self._pause_of(message) if result is Recorded.NEW else None

    def _respond(self, question: Question, answer: Answer | None) -> web.Response:
        if answer is None:
            return json_response(_later(question), status=202)
        status, code = _status(answer)
        if status != 200:  # noqa: PLR2004  # the only one that is no error
            return error_response(status, _sentence(answer), code=code)
        return json_response(_body(answer))

    # ---------------------------------------------------------------------------------------- streaming

    async def _stream(
        self, request: web.Request, question: Question, event_key: str, waiter: Waiter, pause: Pause | None
    ) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-store"}
        )
        await response.prepare(request)
        if pause is not None:
            await _event(response, "done", _paused(question, pause))
            return response
        pieces = asyncio.create_task(self._pieces(response, waiter))
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
                    await _event(response, "done", _body(answer))
                else:
                    await _event(response, "error", {"code": code, "message": _sentence(answer)})
        except ConnectionResetError:
            pass  # the reader has left; the answer goes on into the record
        finally:
            pieces.cancel()
        return response

    @staticmethod
    async def _pieces(response: web.StreamResponse, waiter: Waiter) -> None:
        while True:
            try:
                async with asyncio.timeout(KEEPALIVE_S):
                    text = await waiter.texts.get()
            except TimeoutError:
                await response.write(b": still there\n\n")
                continue
            if text is None:
                return
            await _event(response, "delta", {"text": text})


def _is_request_id(value: object) -> bool:
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


def _body(answer: Answer) -> dict[str, Any]:
    return {
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
