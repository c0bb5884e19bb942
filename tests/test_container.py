"""The container image and the compose file, as far as they can be proved without a container engine."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions in order: name and arguments."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines)]


def last(name: str) -> str:
    return [rest for found, rest in instructions() if found == name][-1]


def copies() -> list[tuple[list[str], str]]:
    """Return sources and destination of each COPY from the build context."""
    found = [
        rest.split() for name, rest in instructions() if name == "COPY" and not rest.startswith("--from")
    ]
    return [(words[:-1], words[-1]) for words in found]


def is_sent(name: str) -> bool:
    """Tell if a file is in the build context: the last line of .dockerignore that fits decides."""
    sent = True
    path = Path(name)
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!").removeprefix("**/")
        candidates = [path, *path.parents][:-1]
        if any(fnmatch.fnmatch(c.name if "**/" in line else str(c), pattern) for c in candidates):
            sent = line.startswith("!")
    return sent


def test_the_build_context_has_what_the_image_copies():
    wanted = sorted(source for sources, _ in copies() for source in sources)
    assert [source for source in wanted if not is_sent(source)] == []
    assert [source for source in wanted if not (ROOT / source).exists()] == []


@pytest.mark.parametrize(
    "name",
    [
        ".env",
        "plugins/.env",
        "data/conversations.db",
        ".git/config",
        "tests/conftest.py",
        "feishu_bot/__pycache__/x.pyc",
    ],
)
def test_no_secret_and_no_data_is_in_the_build_context(name):
    assert not is_sent(name)


def test_the_command_runs_with_nothing_but_what_the_image_copies(tmp_path):
    for sources, destination in copies():
        for source in sources:
            target = tmp_path / destination / (source if destination.endswith("/") else "")
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(ROOT / source, target)
    command = [*json.loads(last("ENTRYPOINT")), json.loads(last("CMD"))[0], "--help"]
    assert command[0] == "python"
    done = subprocess.run(
        [sys.executable, *command[1:]],
        cwd=tmp_path,
        env={},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for option in json.loads(last("CMD"))[1:]:
        assert not option.startswith("--") or option in done.stdout


def test_the_image_runs_without_rights_and_keeps_its_data_in_a_volume():
    assert last("USER") == "bot"
    assert last("VOLUME") == "/app/data"
    assert last("WORKDIR") == "/app"
    assert "--require-hashes -r requirements.lock" in " ".join(
        rest for name, rest in instructions() if name == "RUN"
    )


@pytest.fixture
def health_check():
    """The health check's command for a server on another port."""
    exposed = last("EXPOSE")
    command = json.loads(last("HEALTHCHECK").partition("CMD ")[2])
    assert exposed in command[-1]
    assert json.loads(last("CMD"))[-1] == exposed

    def run(port: int) -> int:
        arguments = [argument.replace(exposed, str(port)) for argument in command[1:]]
        environment = {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
        return subprocess.run(
            [sys.executable, *arguments], env=environment, capture_output=True, check=False
        ).returncode

    return run


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_health_check_asks_healthz_and_minds_no_proxy(health_check, status, healthy):
    asked = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert (health_check(server.server_port) == 0) is healthy
        thread.join()
    assert asked == ["/healthz"]


def test_the_health_check_fails_where_nobody_listens(health_check):
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        port = server.server_port
    assert health_check(port) != 0


def test_compose_starts_one_service_and_postgres_only_when_asked():
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    assert {name for name, service in services.items() if "profiles" not in service} == {"bot"}
    assert services["postgres"]["profiles"] == ["postgres"]
    bot = services["bot"]
    assert [port for port in bot["ports"] if not port.startswith("127.0.0.1:")] == []
    assert f"data:{last('VOLUME')}" in bot["volumes"]
    assert int(bot["stop_grace_period"].removesuffix("s")) > 20 + 5  # what SIGTERM may take
    mounted = [volume.split(":")[0] for volume in bot["volumes"] if volume.startswith("./")]
    assert [path for path in mounted if not (ROOT / path).exists()] == []


def test_the_start_script_of_the_project_is_executable():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
