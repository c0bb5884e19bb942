"""What the library's page shows, run."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "library.md"
POSTGRESQL = "postgresql://user:pass@localhost/dbname"


def blocks():
    """Return the Python blocks of the page, each with its line, as ``(line, code)``."""
    text = PAGE.read_text()
    return [
        (text.count("\n", 0, found.start(1)), found[1])
        for found in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the page opens several managers and closes few
async def test_every_block_of_the_page_runs(tmp_path, monkeypatch, postgresql_url, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for line, block in blocks():
        code = "\n" * line + block.replace(POSTGRESQL, postgresql_url)
        compiled = compile(code, str(PAGE), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        result = eval(compiled, names)
        if inspect.isawaitable(result):
            await result
    names["scheduler"].shutdown()
    names["manager"].close()
    names["repo"].close()
    printed = capsys.readouterr().out
    assert "Found conversation: 1" in printed
    assert "Conversation not found: 999999" in printed
    assert names["check_token_budget"]
    assert list((tmp_path / "backups").rglob("feishu_group_user123.json"))
    assert [message.content for message in names["history"]] == ["Plan a trip to Tokyo"]


def test_the_page_shows_every_public_method():
    from feishu_bot.ai.conversation_store import PersistentConversationManager  # noqa: PLC0415  # read, not run

    page = PAGE.read_text()
    public = [name for name in vars(PersistentConversationManager) if not name.startswith("_")]
    assert [name for name in public if name not in page] == []
