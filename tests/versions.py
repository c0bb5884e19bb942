"""A second version of the schema, made up in a temporary folder."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from feishu_bot.store.migrations import SCRIPTS
from feishu_bot.store.schema import HEAD

if TYPE_CHECKING:
    from pathlib import Path

NEXT = "next"
ADDS = """
    if "mood" not in {column["name"] for column in sa.inspect(op.get_bind()).get_columns("conversations")}:
        op.add_column("conversations", sa.Column("mood", sa.String(20), server_default="calm"))
"""


def released(folder: Path) -> Path:
    """Make a folder with the released migrations."""
    (folder / "versions").mkdir(parents=True)
    for file in (*SCRIPTS.glob("env.py"), *SCRIPTS.glob("*.mako"), *SCRIPTS.glob("versions/*.py")):
        shutil.copyfile(file, folder / file.relative_to(SCRIPTS))
    if not list(folder.glob("versions/*.py")):
        (folder / "versions" / "first.py").write_text(
            "from alembic import op\nfrom feishu_bot.store.schema import metadata\n\n"
            f"revision, down_revision = {HEAD!r}, None\n\n\n"
            "def upgrade():\n    metadata.create_all(op.get_bind())\n"
        )
    return folder


def write_next(scripts: Path, *steps: str) -> None:
    """Add the version ``NEXT``, made of these steps."""
    source = (
        f"import sqlalchemy as sa\nfrom alembic import op\n\nrevision, down_revision = {NEXT!r}, {HEAD!r}\n"
    )
    (scripts / "versions" / "next.py").write_text(f"{source}\ndef upgrade():{''.join(steps)}")
