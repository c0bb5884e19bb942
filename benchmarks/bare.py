"""What the server is measured against: an aiohttp handler that parses the same body and answers at once."""

from __future__ import annotations

import sys

import orjson
from aiohttp import web


async def handle(request: web.Request) -> web.Response:
    """Parse and answer."""
    orjson.loads(await request.read())
    return web.Response(body=b"{}", content_type="application/json")


def main() -> None:
    """Serve on the port given as the first argument."""
    application = web.Application()
    application.router.add_post("/webhook/feishu", handle)
    web.run_app(application, host="127.0.0.1", port=int(sys.argv[1]), access_log=None, print=None)


if __name__ == "__main__":
    main()
