"""300 people at once, and a model that answers after a second: how late the last is acknowledged, and whether all are answered.

The fake model and the fake platform are processes of their own; the platform folds nothing here, so that its count of
accepted replies is the count of answers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Final
from urllib.request import Request, urlopen

from benchmarks.durable_echo import echo_server, make_bodies, wait_until_answered
from benchmarks.load import write_requests
from benchmarks.processes import free_port, get_json, process, run_load
from benchmarks.verdict import show, spread

FLOOR, GOAL = 500.0, 200.0  # ms, 99th percentile of the acknowledgements
PEOPLE: Final = 300
MODEL_S: Final = 1.0


def script_model(port: int, times: int, **behaviour: object) -> None:
    """Tell a fake model how it answers the next requests."""
    order = json.dumps({**behaviour, "times": times}).encode()
    with urlopen(Request(f"http://127.0.0.1:{port}/_script", data=order), timeout=10) as response:
        response.read()


def one_run(folder: Path, salt: str) -> tuple[float, float, int]:
    """Return the acknowledgements' p99 in ms, the seconds until all were answered, and how many were lost or doubled."""
    model = free_port()
    file = folder / "requests"
    write_requests(file, "127.0.0.1", "/webhook/feishu", make_bodies(PEOPLE, salt))
    ai = f', model: gpt-4o, api_key: sk-fake, base_url: "http://127.0.0.1:{model}/v1"'
    with (
        process(["-m", "feishu_bot.testing.model", "--port", str(model)], model, folder / "model.log"),
        echo_server(folder, f"sqlite:///{folder / 'bot.db'}", ai=ai, more="budgets: []\n") as (
            _,
            port,
            platform,
        ),
    ):
        script_model(model, PEOPLE, delay_s=MODEL_S)
        start = time.perf_counter()
        sent = run_load(file, port, connections=PEOPLE)
        if sent["answered"] != PEOPLE:
            raise RuntimeError(f"{PEOPLE - sent['answered']:.0f} of {PEOPLE} messages were not accepted")
        wait_until_answered(platform, PEOPLE)
        seconds = time.perf_counter() - start
        asked = get_json(f"http://127.0.0.1:{model}/_requests?limit=1")["count"]
        accepted = get_json(f"http://127.0.0.1:{platform}/_visible")["accepted"]
    return sent["p99_ms"], seconds, abs(asked - PEOPLE) + abs(accepted - PEOPLE)


def main(argv: list[str] | None = None) -> None:
    """Run the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args(argv)
    rows = []
    for number in range(arguments.runs):
        with tempfile.TemporaryDirectory() as name:
            rows.append(one_run(Path(name), f"c{number}"))
        sys.stdout.write(
            f"  run {number + 1}: acknowledged p99 {rows[-1][0]:.0f} ms  all answered after {rows[-1][1]:.2f} s  "
            f"lost or doubled {rows[-1][2]}\n"
        )
        sys.stdout.flush()
    late = [row[0] for row in rows]
    show(
        f"acknowledgement p99, {PEOPLE} people at once, model after {MODEL_S:g} s",
        statistics.median(late),
        FLOOR,
        GOAL,
        "ms",
        raw=f"{spread(late)}; answered after {statistics.median(row[1] for row in rows):.2f} s; "
        f"lost or doubled {sum(row[2] for row in rows)}",
    )


if __name__ == "__main__":
    main()
