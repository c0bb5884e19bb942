"""The description of the API, and the calls that docs/api.md shows."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil

import pytest

from tests.e2e.bots import ROOT, configuration
from tests.e2e.browsers import Browser, add_accounts


def examples():
    """Return the commands of the page with the JSON that each is said to print, if any."""
    page = (ROOT / "docs/api.md").read_text()
    found = []
    for kind, text in re.findall(r"```(\w+)\n(.*?)```", page, re.DOTALL):
        if kind == "sh":
            found.append([text, None])
        elif kind == "json":
            found[-1][1] = json.loads(text)
    return found


def same_shape(shown, real, where="answer"):
    """Compare names and types; of lists the first item."""
    assert type(shown) is type(real) or None in (shown, real), f"{where}: {shown!r}, {real!r}"
    if isinstance(shown, dict):
        assert shown.keys() == real.keys(), where
        for name in shown:
            same_shape(shown[name], real[name], f"{where}.{name}")
    elif isinstance(shown, list):
        assert bool(shown) == bool(real), where
        for one, other in zip(shown[:1], real[:1], strict=True):
            same_shape(one, other, where)


async def test_every_call_of_the_page_does_what_the_page_says(bots, sqlite_url):
    if shutil.which("curl") is None:
        pytest.skip("no curl")
    bot = await bots.start(configuration(sqlite_url))
    tokens = await add_accounts(sqlite_url, ann="user")
    environment = {**os.environ, "URL": bot.url, "TOKEN": tokens["ann"], "NO_PROXY": "127.0.0.1"}
    checked = 0
    for command, shown in examples():
        process = await asyncio.create_subprocess_exec(
            "bash", "-euc", command, stdout=asyncio.subprocess.PIPE, env=environment, cwd=bots.folder
        )
        out, _ = await process.communicate()
        assert process.returncode == 0, command
        if shown is not None:
            same_shape(shown, json.loads(out), command)
            checked += 1
        elif "event-stream" in command:
            assert b"event: delta" in out
            assert b"event: done" in out
    assert checked >= 9
    assert bot.complaints() == []


async def test_the_description_holds_every_call_and_what_it_gives(bots, sqlite_url):
    bot = await bots.start(configuration(sqlite_url))
    async with Browser(bot) as browser:
        _, document = await browser.ask("GET", "/openapi.json")
        assert document["openapi"].startswith("3.1")
        promised = {
            "/webhook/{account}", "/ws/{account}", "/healthz", "/readyz", "/metrics", "/chat", "/conversations",
            "/conversations/{id}", "/conversations/{id}/messages", "/conversations/{id}/clear",
            "/conversations/{id}/fork", "/send", "/login", "/search", "/agents",
        }  # fmt: skip
        assert promised <= document["paths"].keys()
        names = document["components"]["schemas"]
        for path, methods in document["paths"].items():
            for method, about in methods.items():
                assert about["summary"], f"{method} {path}"
                assert any(status.startswith("2") for status in about["responses"]), path
                named = {p["name"] for p in about["parameters"] if p["in"] == "path"}
                assert named == set(re.findall(r"\{(\w+)\}", path))
        for name in re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)):
            assert name in names
        await browser.ask("POST", "/chat", {"message": "hi"})
        for path, name in (("/conversations", "Conversation"), ("/conversations/1/messages?html", "Message")):
            _, page = await browser.ask("GET", path)
            assert page["items"][0].keys() == names[name]["properties"].keys(), "as the code gives it"
        _, answer = await browser.ask("POST", "/chat", {"message": "hi"})
        assert answer.keys() == names["Answer"]["properties"].keys()
        assert (await browser.ask("GET", "/docs"))[0] == 200
