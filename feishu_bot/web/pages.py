"""HTML pages: rendered here, in the visitor's language and theme; styles and scripts are files of their own."""

from __future__ import annotations

import gzip
import hashlib
import re
from functools import cached_property
from http.cookies import CookieError
from mimetypes import guess_type
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

from feishu_bot.web.words import Language, words

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aiohttp.typedefs import Handler, Middleware
    from jinja2 import Environment

    from feishu_bot.web.accounts import Visitor

_HERE: Final = Path(__file__).parent
_THEMES: Final = ("light", "dark")
_WORTH_PACKING: Final = 500  # bytes
_TOLD: Final = frozenset({400, 404, 500, 503})
_FOR_EVER: Final = "public, max-age=31536000, immutable"
_IMPORT: Final = re.compile(rb'(\bfrom "\./[\w-]+\.js)"')


class Pages:
    """Renders templates; every page knows ``t`` (its words), ``base``, ``language``, ``theme`` and ``visitor``.

    ``static(name)`` is the address of a file in a page.
    """

    def __init__(self, base: str, default_language: Callable[[], Language], static: Static) -> None:
        self._base = base
        self._static = static
        self._default = default_language
        self._words: dict[Language, dict[str, str]] = {"zh": words("zh"), "en": words("en")}

    @cached_property
    def _environment(self) -> Environment:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined  # noqa: PLC0415  # when a page is opened

        made = Environment(
            loader=FileSystemLoader(_HERE / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        made.globals["static"] = lambda name: f"{self._base}/static/{name}?v={self._static.version}"
        return made

    def render(
        self,
        request: web.Request,
        template: str,
        *,
        visitor: Visitor | None = None,
        status: int = 200,
        **values: Any,
    ) -> web.Response:
        """Return a page."""
        language = self.language(request)
        theme = _cookie(request, "theme")
        html = self._environment.get_template(template).render(
            t=self._words[language],
            base=self._base,
            language=language,
            theme=theme if theme in _THEMES else "auto",
            visitor=visitor,
            **values,
        )
        response = packed(request, html.encode(), "text/html; charset=utf-8")
        response.headers["Cache-Control"] = "no-store"
        response.headers["Vary"] = "Accept-Encoding, Accept-Language, Cookie"
        response.set_status(status)
        return response

    def language(self, request: web.Request) -> Language:
        """Return the language a visitor has chosen, else the first of his browser's that we have."""
        chosen = _cookie(request, "lang")
        if chosen == "zh":
            return "zh"
        if chosen == "en":
            return "en"
        for part in request.headers.get("Accept-Language", "").split(","):
            tag = part.strip().lower()
            if tag.startswith("zh"):
                return "zh"
            if tag.startswith("en"):
                return "en"
        return self._default()

    async def refused(self, request: web.Request, reason: str) -> web.StreamResponse:
        """Return the page that says why another one is not shown; ``reason`` is the key of a sentence."""
        return self.render(request, "refused.html", status=403, reason=reason)


def page_errors(pages: Pages) -> Middleware:
    """Return a middleware that tells people in a page of their language what programs are told in JSON."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await handler(request)
        if response.status not in _TOLD or request.method != "GET":
            return response
        if response.prepared or "text/html" not in request.headers.get("Accept", ""):
            return response
        told = pages.render(request, "error.html", status=response.status, about=str(response.status))
        if "Retry-After" in response.headers:
            told.headers["Retry-After"] = response.headers["Retry-After"]
        return told

    return middleware


def _cookie(request: web.Request, name: str) -> str | None:
    try:
        return request.cookies.get(name)
    except CookieError:
        return None


def packed(request: web.Request, body: bytes, content_type: str) -> web.Response:
    """Return a response, compressed where that is worth it and the browser takes it."""
    headers = {"Content-Type": content_type}
    if len(body) >= _WORTH_PACKING and "gzip" in request.headers.get("Accept-Encoding", ""):
        headers["Content-Encoding"] = "gzip"
        body = gzip.compress(body, 6)
    return web.Response(body=body, headers=headers)


class Static:
    """The files of ``static/``, read once and known by their whole names: no path leads out of there.

    Pages and modules name them with ``version``, which stands for what is in all of them: a browser asks for such an
    address once, and no more until another version is named.
    """

    def __init__(self) -> None:
        folder = _HERE / "static"
        bodies = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        whole = hashlib.sha256(b"".join(name.encode() + body for name, body in bodies.items()))
        self.version = whole.hexdigest()[:12]
        self._files: Mapping[str, tuple[bytes, bytes, str, str]] = {
            name: _file(name, self._named(name, body)) for name, body in bodies.items()
        }

    def _named(self, name: str, body: bytes) -> bytes:
        """Return a module that names the others as pages do: one under two addresses would be run twice."""
        if not name.endswith(".js"):
            return body
        return _IMPORT.sub(rb'\1?v=%s"' % self.version.encode(), body)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Return a file, or that the browser has it already."""
        file = self._files.get(request.match_info["name"])
        if file is None:
            raise web.HTTPNotFound
        plain, small, content_type, tag = file
        is_this = request.query.get("v") == self.version  # another process may serve another version
        headers = {
            "ETag": tag,
            "Cache-Control": _FOR_EVER if is_this else "no-cache",
            "Vary": "Accept-Encoding",
        }
        if request.headers.get("If-None-Match") == tag:
            return web.Response(status=304, headers=headers)
        headers["Content-Type"] = content_type
        if small and "gzip" in request.headers.get("Accept-Encoding", ""):
            headers["Content-Encoding"] = "gzip"
            return web.Response(body=small, headers=headers)
        return web.Response(body=plain, headers=headers)


def _file(name: str, body: bytes) -> tuple[bytes, bytes, str, str]:
    kind = "text/javascript" if name.endswith(".js") else guess_type(name)[0] or "application/octet-stream"
    if kind.startswith("text/"):
        kind += "; charset=utf-8"
    small = gzip.compress(body, 9) if len(body) >= _WORTH_PACKING else b""
    return body, small, kind, f'"{hashlib.sha256(body).hexdigest()[:16]}"'
