"""Signs in chats that an answer is being made, kept while they are shown: whoever put one up may die before the end."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

import orjson
from sqlalchemy import bindparam, delete, select

from feishu_bot.model import make_key
from feishu_bot.store.engine import insert_set
from feishu_bot.store.leases import STALE_MS
from feishu_bot.store.schema import OPEN, controls, inbox, outbox, processes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from feishu_bot.store.work import Transaction

_KIND: Final = "sign"
_KEPT_MS: Final = 24 * 3600 * 1000  # what cannot be taken back for so long stays

_ALIVE = select(processes.c.owner).where(processes.c.heartbeat_at > bindparam("since"))
_ALL = select(controls.c.name, controls.c.value, controls.c.at).where(controls.c.kind == _KIND)
_REMOVE = delete(controls).where(
    controls.c.kind == _KIND, controls.c.name.in_(bindparam("names", expanding=True))
)
_OPEN = select(inbox.c.id).where(inbox.c.id == bindparam("id"), inbox.c.state == OPEN)
_PARTS = select(outbox.c.payload).where(outbox.c.source == bindparam("source"))


@dataclass(frozen=True, slots=True)
class Sign:
    """A sign on a message of an account; ``shown`` is what the platform takes it back by.

    ``inbox_id``: the sign is the answer to this message itself, as far as it is written. The part that finishes it
    takes it over, so it is taken back only where there is none.
    """

    account: str
    message_id: str
    shown: str
    inbox_id: int | None = None

    @property
    def name(self) -> str:
        return make_key(self.account, self.message_id, self.shown)


def note(tx: Transaction, sign: Sign, *, owner: str) -> None:
    """Keep a sign while it is shown. ``owner``: the process that takes it back, ``""``: any."""
    value = {**asdict(sign), "owner": owner}
    row = {"kind": _KIND, "name": sign.name, "value": orjson.dumps(value).decode(), "at": tx.now_ms}
    tx.connection.execute(insert_set(tx.kind, controls, ("kind", "name"), ("value", "at")), row)


def forget(tx: Transaction, signs: Sequence[Sign]) -> None:
    """Forget signs that are no longer shown."""
    tx.connection.execute(_REMOVE, {"names": [sign.name for sign in signs]})


def left_behind(tx: Transaction) -> tuple[list[Sign], list[Sign]]:
    """Return the signs whose process runs no more, and those that are too old to go on trying."""
    rows = tx.connection.execute(_ALL).all()
    if not rows:
        return [], []
    alive = set(tx.connection.execute(_ALIVE, {"since": tx.now_ms - STALE_MS}).scalars())
    orphans: list[Sign] = []
    lost: list[Sign] = []
    for row in rows:
        value = orjson.loads(row.value)
        sign = Sign(value["account"], value["message_id"], value["shown"], value.get("inbox_id"))
        is_alive = value["owner"] in alive
        if row.at < tx.now_ms - _KEPT_MS:
            lost.append(sign)
        elif sign.inbox_id is not None:
            state = _state_of_text(tx, sign, is_alive=is_alive)
            if state is not None:
                (lost if state else orphans).append(sign)
        elif not is_alive:
            orphans.append(sign)
    return orphans, lost


def _state_of_text(tx: Transaction, sign: Sign, *, is_alive: bool) -> bool | None:
    """Say whether somebody finishes an answer that is shown in part; None while it is being written."""
    if tx.connection.execute(_OPEN, {"id": sign.inbox_id}).first() is not None:
        return None if is_alive else False
    payloads = tx.connection.execute(_PARTS, {"source": f"in:{sign.inbox_id}"}).scalars().all()
    # What is not kept is not read: rather leave something than take an answer away.
    return any(sign.shown in payload or payload == "{}" for payload in payloads)
