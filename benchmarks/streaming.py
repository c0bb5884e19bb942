"""Answers of 300 chunks from a fake model, per second of one processor: our client beside the plain HTTP client.

The plain one is aiohttp alone: it reads the lines, decodes each chunk's JSON and joins the words. Ours does that and
keeps what a durable answer needs: errors told apart, what the provider counted, why it ended, thoughts kept out.
Both ask the same fake, by turns; what is counted is this process's processor time, not the fake's.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import aiohttp
import orjson

from benchmarks.crowd import script_model
from benchmarks.processes import free_port, process
from benchmarks.verdict import spread
from feishu_bot.ai.chat_model import ChatMessage, ChatRequest, TextDelta
from feishu_bot.ai.openai_compatible import OpenAICompatible

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

CHUNKS: Final = 300
AT_ONCE: Final = 20
TEXT: Final = "".join(f"{n:03d} words. " for n in range(CHUNKS))
MODEL, QUESTION = "gpt-4o", "tell me"


async def per_second(ask: Callable[[], Awaitable[str]], count: int) -> tuple[float, float]:
    """Return answers for each second of processor time, and of the clock."""
    waiting = iter(range(count))

    async def one_after_the_other() -> None:
        for _ in waiting:
            text = await ask()
            assert text == TEXT, text[:100]

    used, start = time.process_time(), time.perf_counter()
    await asyncio.gather(*(one_after_the_other() for _ in range(AT_ONCE)))
    return count / (time.process_time() - used), count / (time.perf_counter() - start)


async def ours(base_url: str, count: int) -> tuple[float, float]:
    """Measure our client."""
    model = OpenAICompatible(base_url, "sk-fake")
    request = ChatRequest(MODEL, (ChatMessage("user", QUESTION),), max_output_tokens=4000)

    async def ask() -> str:
        return "".join([event.text async for event in model.stream(request) if isinstance(event, TextDelta)])

    try:
        return await per_second(ask, count)
    finally:
        await model.close()


async def plain(base_url: str, count: int) -> tuple[float, float]:
    """Measure aiohttp alone."""
    body = orjson.dumps(
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": QUESTION}],
            "stream": True,
            "max_tokens": 4000,
            "stream_options": {"include_usage": True},
        }
    )
    async with aiohttp.ClientSession(headers={"Content-Type": "application/json"}) as session:

        async def ask() -> str:
            pieces = []
            async with session.post(f"{base_url}/chat/completions", data=body) as response:
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        choices = orjson.loads(line[6:])["choices"]
                        pieces.append(choices[0]["delta"].get("content", "") if choices else "")
            return "".join(pieces)

        return await per_second(ask, count)


def main(argv: list[str] | None = None) -> None:
    """Run the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--answers", type=int, default=300)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args(argv)
    rows = []
    port = free_port()
    with (
        tempfile.TemporaryDirectory() as name,
        process(["-m", "feishu_bot.testing.model", "--port", str(port)], port, Path(name) / "model.log"),
    ):
        script_model(port, 2 * arguments.runs * arguments.answers, text=TEXT, chunks=CHUNKS)
        base_url = f"http://127.0.0.1:{port}/v1"
        for number in range(arguments.runs):
            own = asyncio.run(ours(base_url, arguments.answers))
            bare = asyncio.run(plain(base_url, arguments.answers))
            rows.append((own[0], bare[0]))
            sys.stdout.write(
                f"  run {number + 1}: ours {own[0]:.0f}, plain {bare[0]:.0f} answers per processor second "
                f"({own[1]:.0f}/s and {bare[1]:.0f}/s by the clock, with the fake on the same machine)\n"
            )
            sys.stdout.flush()
    ratios = [own / bare for own, bare in rows]
    sys.stdout.write(
        f"{CHUNKS}-chunk answers per second per core: {statistics.median(row[0] for row in rows):.0f}, plain HTTP client "
        f"{statistics.median(row[1] for row in rows):.0f}, ratio {statistics.median(ratios):.2f} ({spread(ratios)}); "
        "no floor\n"
    )


if __name__ == "__main__":
    main()
