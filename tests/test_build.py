"""The lock files and the Makefile: what is pinned, and that it is installed once."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PIN = re.compile(r"([a-z0-9-]+)==([0-9][0-9a-z.+]*)( ; [^\\]+)? \\")
HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}( \\)?")


def pins(name: str) -> dict[str, str]:
    found = (PIN.fullmatch(line) for line in (ROOT / name).read_text().splitlines())
    return {match[1]: match[2] for match in found if match}


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-dev.lock"])
def test_a_lock_file_holds_names_versions_and_hashes_only(name):
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not PIN.fullmatch(line) and not HASH.fullmatch(line)] == []
    assert "/" not in "".join(line for line in (ROOT / name).read_text().splitlines() if line.startswith("#"))


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-dev.lock"])
def test_a_lock_file_pins_every_dependency_within_its_bounds(name):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + (project["optional-dependencies"]["dev"] if "dev" in name else [])
    locked = pins(name)
    for requirement in map(Requirement, wanted):
        version = locked.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not pinned: make lock"
        assert requirement.specifier.contains(version), f"{requirement} is pinned at {version}: make lock"


def test_the_lock_file_for_development_holds_all_of_the_other():
    assert pins("requirements.lock").items() <= pins("requirements-dev.lock").items()


FAKE_PYTHON = """#!/bin/sh
# Stands for an interpreter: tells a version, makes an environment that consists of itself, notes what it is asked.
echo "$*" >> "$CALLS"
case "$*" in
  *version_info\\[*) echo {version} ;;
  *"version_info <"*) exit {too_old} ;;
  *"import ensurepip"*) exit {no_venv} ;;
  "-m venv --clear"*) rm -rf .venv; mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
esac
"""


class Checkout:
    """A folder with the Makefile, lock files and an interpreter that only notes what it is asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = folder.parent / "calls"
        folder.mkdir()
        shutil.copy(ROOT / "Makefile", folder)
        (folder / "requirements.lock").write_text("one")
        (folder / "requirements-dev.lock").write_text("one, two")

    def make(self, *arguments: str, version: str = "3.12", too_old: int = 0, no_venv: int = 0):
        python = self.folder.parent / "python of a test"
        python.write_text(FAKE_PYTHON.format(version=version, too_old=too_old, no_venv=no_venv))
        python.chmod(0o755)
        self.calls.write_text("")
        environment = {"PATH": os.environ["PATH"], "CALLS": str(self.calls)}
        return subprocess.run(
            ["make", *arguments, f"PYTHON={python}"],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def installs(self) -> list[str]:
        return re.findall(r"pip .* install .* -r (\S+)", self.calls.read_text())


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    return Checkout(tmp_path / "a folder with blanks")


def test_run_installs_what_is_pinned_once_and_starts_the_server(checkout):
    assert checkout.make("run", "ARGS=--port 9000").returncode == 0
    assert checkout.installs() == ["requirements.lock"]
    assert "bot.py run --config config.yaml --port 9000\n" in checkout.calls.read_text()
    assert checkout.make("run").returncode == 0
    assert checkout.calls.read_text() == "bot.py run --config config.yaml\n"


def test_a_changed_lock_file_is_installed_again(checkout):
    checkout.make("test")
    assert checkout.installs() == ["requirements-dev.lock"]
    checkout.make("run")
    assert checkout.installs() == []  # the tools' file holds all of the other
    (checkout.folder / "requirements.lock").write_text("one, newer")
    checkout.make("run")
    assert checkout.installs() == ["requirements.lock"]
    checkout.make("test")
    assert checkout.installs() == ["requirements-dev.lock"]  # what it had pinned is no longer there


def test_an_environment_whose_interpreter_is_gone_is_made_anew(checkout):
    checkout.make("run")
    python = checkout.folder / ".venv/bin/python"
    python.unlink()
    python.symlink_to("/nonexistent/python3")
    checkout.make("run")
    assert checkout.installs() == ["requirements.lock"]


def test_a_python_that_is_too_old_is_named_and_nothing_is_made(checkout):
    done = checkout.make("run", version="3.9", too_old=1)
    assert done.returncode == 2
    assert "error: Python 3.11 or later with venv is needed;" in done.stderr
    assert "is 3.9;" in done.stderr
    assert not (checkout.folder / ".venv").exists()


def test_a_python_without_venv_is_told_what_to_install(checkout):
    done = checkout.make("run", no_venv=1)
    assert done.returncode == 2
    assert "python3.12-venv" in done.stderr


def test_make_alone_lists_every_target(checkout):
    listed = re.findall(r"^  make (\S+) +\S", checkout.make().stdout, re.MULTILINE)
    assert {"run", "test", "check", "format", "bench", "lock", "clean"} <= set(listed)


def test_tests_and_arguments_reach_pytest(checkout):
    checkout.make("test", "TESTS=tests/store tests/ai", "ARGS=-x")
    assert "-m pytest -n 0 --dist worksteal tests/store tests/ai -x\n" in checkout.calls.read_text()
