"""One SQLite file, one machine: a second one is refused, by its start and before it by ``check``."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import insert

from feishu_bot.store import schema
from feishu_bot.store.machines import network_problem, problem_of
from tests.e2e.bots import configuration

ADVICE = "several machines need PostgreSQL or MariaDB"


@pytest.fixture
def elsewhere(sqlite_record):
    """A server on another machine that has just been heard of."""
    now, host = sqlite_record.now_ms(), "node-b/boot-b/1"
    row = {"owner": f"{host}|1|1", "host": host, "pid": 1, "version": "1"}
    sqlite_record.execute(insert(schema.processes).values(started_at=now, heartbeat_at=now, **row))
    return sqlite_record


async def test_a_second_machine_is_refused_at_its_start_and_by_check(
    bots, operator, feishu, sqlite_url, elsewhere
):
    bot = bots.launch(configuration(sqlite_url, feishu=feishu))
    assert await bot.ended() == 1
    assert f"in use by another machine (node-b); {ADVICE}" in bot.lines()[-1]["text"]
    code, text = await operator.types("check")
    assert code == 2
    assert f"db_url: another machine (node-b) uses this SQLite file; {ADVICE}" in text
    elsewhere.execute(schema.processes.delete())
    assert (await operator.types("check"))[0] == 0
    await bots.start(configuration(sqlite_url, feishu=feishu))


def test_a_database_that_does_not_exist_is_not_made_by_looking_at_it(tmp_path):
    assert problem_of(f"sqlite:///{tmp_path}/folder/none.db") is None
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_database_is_left_to_the_start(tmp_path):
    (tmp_path / "no.db").write_bytes(b"this is no database" * 100)
    assert problem_of(f"sqlite:///{tmp_path}/no.db") is None


MOUNTS = r"""overlay / overlay rw 0 0
server:/export /srv nfs4 rw 0 0
/dev/sda1 /srv/local ext4 rw 0 0
//nas/with\040blank /mnt/with\040blank cifs rw 0 0
"""


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("/data/bot.db", None),
        ("/srv/bot/bot.db", "nfs4"),
        ("/srv/local/bot.db", None),
        ("/mnt/with blank/bot.db", "cifs"),
    ],
)
def test_a_file_on_a_file_system_of_the_network_is_told(file, kind):
    found = network_problem(Path(file), MOUNTS)
    if kind is None:
        assert found is None
    else:
        assert found is not None
        assert f"({kind})" in found
        assert found.endswith(ADVICE)
