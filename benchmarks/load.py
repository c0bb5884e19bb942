"""Prepared requests, sent as fast as the other side answers them, over kept-alive connections.

Run as a program it reads a file of requests (4 bytes of length before each) and prints one JSON line: how many were
answered 200, how long it took, and the latencies' 50th, 99th and 100th percentile in milliseconds. With ``--repeat``
what was not answered 200, or was broken off, is sent again after a moment, as platforms do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import struct
import sys
import time
from pathlib import Path

_SIZE = struct.Struct(">I")
_REPEAT_S = 0.2


def write_requests(path: Path, host: str, target: str, bodies: list[tuple[dict[str, str], bytes]]) -> None:
    """Write requests, each whole as it travels."""
    with path.open("wb") as stream:
        for headers, body in bodies:
            lines = [f"POST {target} HTTP/1.1", f"Host: {host}", f"Content-Length: {len(body)}"]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            raw = "\r\n".join(lines).encode() + b"\r\n\r\n" + body
            stream.write(_SIZE.pack(len(raw)) + raw)


def _read_requests(path: Path) -> list[bytes]:
    data = path.read_bytes()
    requests, position = [], 0
    while position < len(data):
        (length,) = _SIZE.unpack_from(data, position)
        position += _SIZE.size
        requests.append(data[position : position + length])
        position += length
    return requests


class _Connection:
    """One kept-alive connection, made anew when it breaks."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, request: bytes) -> bool:
        """Return whether the answer was 200. Raises OSError or EOFError when the connection breaks."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._address)
        reader, writer = self._streams
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        lower = head.lower()
        length = int(lower.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
        if length:
            await reader.readexactly(length)
        if b"connection: close" in lower:
            self.close()
        return head.startswith(b"HTTP/1.1 200")

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def _send(
    host: str, port: int, requests: list[bytes], connections: int, rate: float | None, *, repeat: bool
) -> dict[str, float]:
    latencies: list[float] = []
    answered = repeated = 0
    queue = iter(enumerate(requests))
    began_at, start = time.time(), time.perf_counter()

    async def connection() -> None:
        nonlocal answered, repeated
        line = _Connection(host, port)
        for number, request in queue:
            if rate is not None:  # offered load: each request has its instant, whatever became of the others
                await asyncio.sleep(max(0.0, start + number / rate - time.perf_counter()))
            began = time.perf_counter()
            while True:
                try:
                    taken = await line.post(request)
                except (OSError, EOFError):
                    if not repeat:
                        raise
                    line.close()
                    taken = False
                if taken or not repeat:
                    break
                repeated += 1
                await asyncio.sleep(_REPEAT_S)
            latencies.append(time.perf_counter() - began)
            answered += taken
        line.close()

    await asyncio.gather(*(connection() for _ in range(connections)))
    seconds = time.perf_counter() - start
    latencies.sort()
    count = len(latencies)
    return {
        "answered": answered,
        "repeated": repeated,
        "began_at": began_at,
        "seconds": seconds,
        "p50_ms": latencies[count // 2] * 1000,
        "p99_ms": latencies[min(count - 1, count * 99 // 100)] * 1000,
        "max_ms": latencies[-1] * 1000,
    }


def main() -> None:
    """Send the requests of a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--rate", type=float, default=None, help="requests per second; default: closed loop")
    parser.add_argument("--repeat", action="store_true", help="send again what was not answered 200")
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    requests = _read_requests(arguments.file)
    result = asyncio.run(
        _send(
            arguments.host,
            arguments.port,
            requests,
            arguments.connections,
            arguments.rate,
            repeat=arguments.repeat,
        )
    )
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
