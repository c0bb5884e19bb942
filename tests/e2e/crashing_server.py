"""Runs the server and kills it, as a power cut would, the n-th time a step of a message's way is reached.

``crashing_server.py STEP N --config FILE``; STEP is one of received, recorded, acknowledged, claimed, begun,
answered, committed and sent. Only tests can set this: the program itself has no such switch.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading

from feishu_bot import log
from feishu_bot.app import App
from feishu_bot.config import load
from feishu_bot.reference import platform_settings

STEPS = ("received", "recorded", "acknowledged", "claimed", "begun", "answered", "committed", "sent")


class Crash:
    """Kills this process when ``step`` has been reached ``times`` times. Told from several threads."""

    def __init__(self, step: str, times: int) -> None:
        assert step in STEPS, step
        self._step = step
        self._left = times
        self._lock = threading.Lock()

    def __call__(self, step: str) -> None:
        if step != self._step:
            return
        with self._lock:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    step, times, option, file = sys.argv[1:]
    assert option == "--config", option
    loaded = load(file, platform_settings=platform_settings())
    logging = log.configure(loaded.settings.logging, secrets=loaded.secret_values())
    try:
        asyncio.run(App(loaded.settings, reached=Crash(step, int(times))).run())
    finally:
        logging.close()


if __name__ == "__main__":
    main()
