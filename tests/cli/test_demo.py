"""``demo`` as it is run: lines go in, and what people in the chats would see comes out."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import asynccontextmanager
from pathlib import Path

from feishu_bot.testing.model import FakeModelServer

ROOT = Path(__file__).parent.parent.parent
PATIENCE_S = 60.0  # after which a test gives up what it waits for; nothing is measured with it


@asynccontextmanager
async def demo(folder: Path, *arguments: str):
    """Run the command with ``folder`` for its scratch files and as its working directory."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(ROOT / "bot.py"),
        "demo",
        *arguments,
        cwd=folder,
        env={**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(ROOT)},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def talk(folder: Path, text: str, *arguments: str) -> tuple[int, list[str], str]:
    """Return exit code, lines and errors after all of ``text`` was typed."""
    async with demo(folder, *arguments) as process:
        out, err = await process.communicate(text.encode())
        return process.returncode, out.decode().splitlines(), err.decode()


async def test_what_is_said_in_each_chat_is_answered_there_and_nothing_is_left_behind(tmp_path):
    text = ":all hello\n:2 to the group\n:3\nto me\n:4 /nosuch\n:7 x\n"
    code, lines, err = await talk(tmp_path, text, "--language", "en")
    assert (code, err) == (0, "")
    for title in ("Feishu group", "QQ group", "QQ private", "OneBot group"):
        assert lines.count(f"[{title}] bot: hello") == 1
    assert lines.count("[QQ group] bot: to the group") == 1
    assert lines.count("[QQ private] bot: to me") == 1
    assert any(line.startswith("[OneBot group] bot: Unknown command: /nosuch") for line in lines)
    assert "there is no chat 7" in lines
    assert list(tmp_path.iterdir()) == []


async def test_one_platform_alone_and_chinese_where_nothing_else_is_said(tmp_path):
    code, lines, err = await talk(tmp_path, ":all 你好\n:q\nnobody hears this\n", "--platform", "qq")
    assert (code, err) == (0, "")
    answers = sorted(line for line in lines if "机器人: " in line)
    assert answers == ["[QQ 私聊] 机器人: 你好", "[QQ 群] 机器人: 你好"]
    assert lines[-1] == "演示结束，什么都没有保留。"


async def test_ctrl_c_ends_it_at_once_and_in_order(tmp_path):
    async with demo(tmp_path, "--platform", "onebot", "--language", "en", "--verbose") as process:
        process.stdin.write(b"hello\n")
        while b"bot: hello" not in (line := await process.stdout.readline()):
            assert line
        process.send_signal(signal.SIGINT)
        out, err = await process.communicate()
        assert process.returncode == 0
        assert out.decode().splitlines()[-1] == "The demonstration ends; nothing of it is kept."
        assert "Traceback" not in err.decode()
        assert "stopped" in err.decode(), "the server's log, as asked for"
        assert list(tmp_path.iterdir()) == []


async def test_the_model_of_a_configuration_answers_and_its_accounts_and_database_are_left_alone(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    async with FakeModelServer(answer="on {}".format) as model:
        (folder / "ours.yaml").write_text(
            f"chat: {{language: en}}\nai: {{model: 'openai:gpt-4o', base_url: '{model.base_url}', api_key: sk-x,"
            " conversation_persistence: {db_url: 'sqlite:///ours.db'}}\n"
            "platforms: {feishu: {enabled: true, app_id: real, app_secret: real, encrypt_key: real,"
            " base_url: 'http://127.0.0.1:9'}}\n"
        )
        code, lines, err = await talk(folder, "hello\n", "--config", "ours.yaml", "--platform", "feishu")
        assert (code, err) == (0, "")
        assert "[Feishu group] bot: on hello" in lines
    assert [p.name for p in folder.iterdir()] == ["ours.yaml"]


async def test_its_help_names_the_platforms_and_a_strange_one_is_refused(tmp_path):
    code, lines, err = await talk(tmp_path, "", "--help")
    assert (code, err) == (0, "")
    assert "[feishu|qq|onebot|all]" in "\n".join(lines)
    code, _, err = await talk(tmp_path, "", "--platform", "icq")
    assert code == 2
    assert "icq" in err
