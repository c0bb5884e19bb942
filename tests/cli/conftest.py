from __future__ import annotations

import io
import sys

import pytest
import yaml

from feishu_bot.cli import main


@pytest.fixture
def typed(tmp_path, monkeypatch, capsysbinary):
    """Run a command on a database in this process; returns exit code, stdout and stderr."""

    def run(url: str, *arguments: object, stdin: str = "") -> tuple[int, str, str]:
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump({"ai": {"conversation_persistence": {"db_url": url}}}))
        monkeypatch.setattr(sys, "argv", ["bot.py", *map(str, arguments), "--config", str(config)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = 0
        try:
            main()
        except SystemExit as leaving:
            code = leaving.code
        out, err = capsysbinary.readouterr()
        return code, out.decode(), err.decode()

    return run
