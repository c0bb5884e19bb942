"""``/openapi.json``: the HTTP API described from its routes, their handlers' words and the shapes noted here."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiohttp import web

    from feishu_bot.store.accounts import Role

Schema = dict[str, Any]

PARAMETER: Final = re.compile(r"\{(\w+)(?::((?:[^{}]|\{[^{}]*\})*))?\}")
_PAGES: Final = frozenset(
    {"/", "/login", "/account", "/docs", "/static/{name:.+}", "/openapi.json"}
)  # for people


def _object(required: str = "", **properties: Schema) -> Schema:
    found: Schema = {"type": "object", "properties": properties}
    if required:
        found["required"] = required.split()
    return found


def _list(item: Schema) -> Schema:
    return _object("items next", items={"type": "array", "items": item}, next=_nullable(_INTEGER))


def _nullable(schema: Schema) -> Schema:
    return {**schema, "type": [schema["type"], "null"]}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


_TEXT: Final[Schema] = {"type": "string"}
_INTEGER: Final[Schema] = {"type": "integer"}
_INSTANT: Final[Schema] = {"type": "string", "format": "date-time"}


def _order(do: str, **fields: Schema) -> dict[str, Any]:
    """Return the shape of a form of the console; without ``sure=yes`` it is answered with a page that asks."""
    form = _object("do", do={**_TEXT, "description": do}, sure=_TEXT, csrf=_TEXT, order=_TEXT, **fields)
    return {"form": form, "answers": {200: {}, 303: None, 400: None, 404: None}}


SCHEMAS: Final[dict[str, Schema]] = {
    "Error": _object("error", error=_object("code message", code=_TEXT, message=_TEXT)),
    "Usage": _object(input_tokens=_INTEGER, output_tokens=_INTEGER, total_tokens=_INTEGER, model=_TEXT),
    "Answer": _object(
        "response conversation_id message_id usage",
        response=_TEXT,
        conversation_id=_nullable(_INTEGER),
        message_id=_nullable(_INTEGER),
        usage=_ref("Usage"),
    ),
    "Later": _object(conversation_id=_nullable(_INTEGER), request_id=_TEXT, status=_TEXT, message=_TEXT),
    "Conversation": _object(
        id=_INTEGER,
        title=_nullable(_TEXT),
        agent=_nullable(_TEXT),
        message_count=_INTEGER,
        total_tokens=_INTEGER,
        parent_id=_nullable(_INTEGER),
        created_at=_INSTANT,
        last_activity=_INSTANT,
    ),
    "Message": _object(
        id=_INTEGER,
        role={"type": "string", "enum": ["user", "assistant", "system", "tool"]},
        content=_TEXT,
        tokens=_INTEGER,
        model=_nullable(_TEXT),
        timestamp=_INSTANT,
        edited_at=_nullable(_INSTANT),
        html=_TEXT,
    ),
    "Hit": _object(
        message_id=_INTEGER,
        conversation_id=_INTEGER,
        title=_nullable(_TEXT),
        role=_TEXT,
        timestamp=_INSTANT,
        snippet={"type": "array", "items": _object(text=_TEXT, hit={"type": "boolean"})},
    ),
    "Token": _object(
        id=_INTEGER, label=_TEXT, told=_TEXT, address=_TEXT, created_at=_INSTANT, used_at=_INSTANT
    ),
}

_FILE: Final = _object("name data", name=_TEXT, data={"type": "string", "contentEncoding": "base64"})
_PAGING: Final = {"before": "the id the last page gave as next", "limit": "1 to 200, by default 50"}

#: What the words of a handler do not say: of each route its body, the parameters of its address, its answers.
SHAPES: Final[dict[str, dict[str, Any]]] = {
    "POST /chat": {
        "body": _object(
            message=_TEXT,
            conversation_id=_INTEGER,
            follows={"type": "string", "maxLength": 200},
            agent=_TEXT,
            request_id={"type": "string", "maxLength": 200},
            files={"type": "array", "maxItems": 4, "items": _FILE},
        ),
        "query": {"html": "also give the answer as safe HTML"},
        "answers": {
            200: _ref("Answer"),
            202: _ref("Later"),
            400: None,
            404: None,
            413: None,
            429: None,
            502: None,
            503: None,
        },
        "stream": "Accept: text/event-stream gives events: delta {text, at}, html {html}, done (the JSON), error",
    },
    "POST /chat/stop": {
        "body": _object("request_id", request_id=_TEXT),
        "answers": {202: _object(request_id=_TEXT)},
    },
    "GET /chat/pending": {
        "answers": {
            200: _list(
                _object(
                    request_id=_TEXT,
                    conversation_id=_nullable(_INTEGER),
                    follows=_nullable(_TEXT),
                    message=_TEXT,
                    agent=_nullable(_TEXT),
                    files={"type": "array", "items": _TEXT},
                )
            )
        }
    },
    "GET /agents": {"answers": {200: _list(_object(name=_TEXT))}},
    "POST /send": {
        "body": _object(
            "platform text",
            platform=_TEXT,
            chat_id=_TEXT,
            chat_type=_TEXT,
            user_key=_TEXT,
            text=_TEXT,
            request_id=_TEXT,
        ),
        "answers": {202: _object(request_id=_TEXT, parts=_INTEGER), 400: None, 503: None},
    },
    "GET /conversations": {"query": _PAGING, "answers": {200: _list(_ref("Conversation"))}},
    "GET /conversations/{id}": {"answers": {200: _ref("Conversation"), 404: None}},
    "PATCH /conversations/{id}": {
        "body": _object("title", title={"type": "string", "maxLength": 200}),
        "answers": {200: _ref("Conversation"), 400: None, 404: None},
    },
    "DELETE /conversations/{id}": {"answers": {204: None, 404: None}},
    "GET /conversations/{id}/messages": {
        "query": {
            **_PAGING,
            "before": "the id of a message: older ones",
            "after": "the id of a message: newer ones",
            "html": "also give each message as safe HTML",
        },
        "answers": {200: _list(_ref("Message")), 404: None},
    },
    "GET /conversations/{id}/export": {
        "query": {"format": "json, jsonl, csv or md"},
        "answers": {200: {}, 404: None},
    },
    "POST /conversations/{id}/clear": {"answers": {200: _ref("Conversation"), 404: None}},
    "POST /conversations/{id}/fork": {
        "body": _object("message_id", message_id=_INTEGER),
        "answers": {200: _ref("Conversation"), 404: None, 413: None},
    },
    "GET /search": {
        "query": {
            "q": 'words and "phrases", all of which occur',
            "limit": _PAGING["limit"],
            "offset": "hits to skip",
        },
        "answers": {200: _list(_ref("Hit")), 400: None},
    },
    "POST /login": {
        "body": _object("name password", name=_TEXT, password={"type": "string", "format": "password"}),
        "answers": {200: _object(name=_TEXT, role=_TEXT), 401: None, 429: None},
    },
    "POST /logout": {"answers": {204: None}},
    "GET /account/sessions": {"answers": {200: _list(_ref("Token"))}},
    "DELETE /account/sessions/{id}": {"answers": {204: None, 404: None}},
    "GET /account/tokens": {"answers": {200: _list(_ref("Token"))}},
    "POST /account/tokens": {
        "body": _object("label", label=_TEXT),
        "answers": {201: _object(id=_INTEGER, label=_TEXT, token=_TEXT)},
    },
    "DELETE /account/tokens/{id}": {"answers": {204: None, 404: None}},
    "POST /account/password": {
        "body": _object("old new", old=_TEXT, new=_TEXT),
        "answers": {204: None, 400: None, 403: None, 429: None},
    },
    "GET /admin/live": {
        "answers": {
            200: _object(
                "figures problems",
                figures=_object(
                    "waiting oldest outbox outbox_oldest dead processes",
                    waiting=_INTEGER,
                    oldest=_TEXT,
                    outbox=_INTEGER,
                    outbox_oldest=_TEXT,
                    dead=_INTEGER,
                    processes=_INTEGER,
                ),
                problems={"type": "array", "items": _TEXT},
            )
        }
    },
    "GET /admin/conversations/{id}/export": {
        "query": {"format": "json, jsonl, csv or md"},
        "answers": {200: {}, 404: None},
    },
    "POST /admin/dead": _order("retry, drop or retry_all", id=_TEXT, q=_TEXT),
    "POST /admin/conversations": _order("delete", id=_INTEGER),
    "POST /admin/budgets": _order("grant or reset", budget=_TEXT, key=_TEXT, unit=_TEXT, amount=_TEXT),
    "POST /admin/jobs": _order("run", job=_TEXT),
    "POST /admin/people": _order(
        "add, role, password, remove, sessions (ends all), session (ends one), token (makes one) or revoke; "
        "what is shown once stands in the page that answers 200",
        name=_TEXT,
        role={"type": "string", "enum": ["user", "viewer", "admin"]},
        label=_TEXT,
        id=_INTEGER,
    ),
    "POST /admin/platforms": _order("pause or resume", target=_TEXT, say=_TEXT),
}

_REASONS: Final = {
    200: "done",
    201: "made",
    202: "taken; it will be done",
    204: "done, nothing to say",
    303: "done; the page that says so",
    400: "the request cannot be understood",
    401: "nobody has logged in",
    403: "not allowed, or the header X-CSRFToken is missing",
    404: "there is no such thing, or it is somebody else's",
    413: "too large",
    429: "a budget is used up, or too many attempts were made",
    502: "the model failed",
    503: "the store cannot take it now; see Retry-After",
}


def document(routes: Sequence[web.RouteDef], *, base: str, version: str) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of these routes; pages for people are left out."""
    paths: dict[str, Any] = {}
    for route in routes:
        path = PARAMETER.sub(r"{\1}", route.path)
        console = route.path.startswith("/admin") and f"GET {path}" not in SHAPES
        if route.method == "GET" and (route.path in _PAGES or console):
            continue
        paths.setdefault(path, {})[route.method.lower()] = _operation(route, path)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Feishu Bot", "version": version},
        "servers": [{"url": base or "/"}],
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer"},
                "session": {"type": "apiKey", "in": "cookie", "name": "session"},
            },
        },
    }


def _operation(route: web.RouteDef, path: str) -> dict[str, Any]:
    shape = SHAPES.get(f"{route.method} {path}", {})
    words = (inspect.getdoc(route.handler) or "").replace("``", "`")  # Markdown, as the standard has it
    summary, _, more = words.partition("\n\n")
    role: Role | None = getattr(route.handler, "role", None)
    found: dict[str, Any] = {"summary": " ".join(summary.split()), "responses": {}}
    description = [" ".join(more.split()), shape.get("stream", "")]
    if role is not None:
        description.append(f"For accounts with the role {role.value}.")
        found["security"] = [{"token": []}, {"session": []}]
    found["description"] = "\n\n".join(filter(None, description))
    found["parameters"] = [
        {"name": name, "in": "path", "required": True, "schema": _INTEGER if "0-9" in pattern else _TEXT}
        for name, pattern in PARAMETER.findall(route.path)
    ] + [
        {"name": name, "in": "query", "description": words, "schema": _TEXT}
        for name, words in shape.get("query", {}).items()
    ]
    if "body" in shape:
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": shape["body"]}}}
    if "form" in shape:
        found["requestBody"] = {"content": {"application/x-www-form-urlencoded": {"schema": shape["form"]}}}
    answers: dict[int, Any] = dict(shape.get("answers", {200: {}}))
    if role is not None:
        answers = {401: None, 403: None} | answers
    for status, schema in sorted(answers.items()):
        answer: dict[str, Any] = {"description": _REASONS[status]}
        if status >= 400:  # noqa: PLR2004  # errors have one form
            schema = _ref("Error")  # noqa: PLW2901  # as above
        if schema:
            answer["content"] = {"application/json": {"schema": schema}}
        found["responses"][str(status)] = answer
    return found
