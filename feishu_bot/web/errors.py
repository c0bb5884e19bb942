"""How errors look from outside: JSON with a code and a sentence, never a traceback."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import http_exceptions, web

from feishu_bot.errors import (
    BadPayload,
    ConversationNotFound,
    MessageNotFound,
    StoreError,
    StoreUnavailable,
    TooLarge,
)
from feishu_bot.log import Seldom

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiohttp.typedefs import Handler

log = logging.getLogger(__name__)

RETRY_AFTER_S = 5  # what a platform or client is asked to wait when the store cannot take it

_CODES = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "too_large",
    429: "budget_exceeded",
    502: "model_failed",
    503: "unavailable",
}


def json_response(
    data: object, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    """Return JSON, serialised once."""
    return web.Response(
        body=orjson.dumps(data), status=status, content_type="application/json", headers=headers
    )


def error_response(
    status: int, message: str, *, code: str | None = None, headers: Mapping[str, str] | None = None
) -> web.Response:
    """Return ``{"error": {"code", "message"}}``."""
    body = {"error": {"code": code or _CODES.get(status, "error"), "message": message}}
    return json_response(body, status=status, headers=headers)


def unavailable() -> web.Response:
    """Return 503 with Retry-After: nothing was stored, the sender shall come again."""
    return error_response(
        503, "the store cannot take it now; try again", headers={"Retry-After": str(RETRY_AFTER_S)}
    )


class HttpLog(logging.LoggerAdapter[logging.Logger]):
    """What aiohttp logs to: a request that is hardly HTTP is one line, without a stack and what was sent."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__(logger, {})
        self._refused = Seldom(log)

    def exception(self, msg: object, *args: object, exc_info: Any = True, **keywords: Any) -> None:
        if isinstance(exc_info, http_exceptions.HttpProcessingError):
            reason, peer = type(exc_info).__name__, args[0] if args else None
            self._refused.warning(
                "request refused", {"status": exc_info.code, "reason": reason, "peer": str(peer)}
            )
        elif not isinstance(exc_info, web.RequestPayloadError):  # told already, by whoever read the body
            super().exception(msg, *args, exc_info=exc_info, **keywords)


@web.middleware
async def error_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn whatever a handler raises into an answer. One of the five edges that may catch everything."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.status < 400:  # noqa: PLR2004  # redirects pass
            raise
        headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
        return error_response(error.status, error.reason, headers=headers)
    except BadPayload as error:
        return error_response(400, error.reason)
    except ConversationNotFound:
        return error_response(404, "no such conversation")
    except MessageNotFound:
        return error_response(404, "no such message")
    except StoreUnavailable as error:
        log.warning("store unavailable", extra={"path": request.path, "reason": str(error)})
        return unavailable()
    except StoreError as error:  # it never will take this: larger than what a database allows, and the like
        log.error("refused by the store", extra={"path": request.path, "reason": str(error)})  # noqa: TRY400  # no fault of ours
        status = 413 if isinstance(error, TooLarge) else 500
        return error_response(status, "the store refuses it", code="refused_by_store")
    except ConnectionResetError:
        raise  # the peer has left; there is nobody to answer
    except Exception:
        log.exception("request failed", extra={"method": request.method, "path": request.path})
        return error_response(500, "internal error", code="internal")
