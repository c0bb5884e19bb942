"""The server's event loop: uvloop's where there is one."""

from __future__ import annotations

import asyncio
import sys

import pytest

from feishu_bot import event_loop


async def _loop() -> str:
    await asyncio.sleep(0)
    return type(asyncio.get_running_loop()).__module__


def test_uvloop_is_taken_where_it_is_installed():
    pytest.importorskip("uvloop")
    assert event_loop.run(_loop()).startswith("uvloop")


def test_without_uvloop_the_standard_library_s_is_taken(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert event_loop.run(_loop()).startswith("asyncio")


def test_what_the_program_ends_with_comes_out():
    async def end() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit, match="3"):
        event_loop.run(end())
