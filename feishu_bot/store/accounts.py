"""Accounts of the browser's and scripts' doors: who there is, what stands for whom, and who tries too often.

A session or an API token is a secret that is kept as its hash only: whoever reads the database cannot come in.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import bindparam, delete, exists, insert, or_, select, update

from feishu_bot.store.engine import insert_ignore
from feishu_bot.store.schema import accounts, controls, login_attempts, tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from feishu_bot.store.work import Transaction

# "local" is who comes from this machine while there is no account: his conversations must be nobody's else.
NAME: Final = re.compile(r"(?![Ll][Oo][Cc][Aa][Ll]$)[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}")
SESSION, API = "session", "api"
SESSION_MS: Final = 30 * 24 * 3_600_000  # then one has to log in again
ATTEMPTS_MS: Final = 15 * 60_000  # how long wrong passwords are remembered
MAX_PER_ACCOUNT: Final = 10  # wrong passwords in that time, from wherever
MAX_PER_ADDRESS: Final = 30  # from one address (IPv6: one /64), whatever the account
_SEEN_MS: Final = 5 * 60_000  # how exact ``used_at`` is
_KEY: Final = ("key", "cookies")
_PLAIN: Final = "abcdefghjkmnpqrstuvwxyz23456789"

_t = tokens.c


class Role(StrEnum):
    """What an account may do: ``user`` talks to the bot, ``viewer`` also looks at the console, ``admin`` all."""

    USER = "user"
    VIEWER = "viewer"
    ADMIN = "admin"

    def may(self, wanted: Role) -> bool:
        """Say whether this role has the rights of that one."""
        ranks = tuple(Role)
        return ranks.index(self) >= ranks.index(wanted)


@dataclass(frozen=True, slots=True)
class Account:
    """Somebody who can log in."""

    name: str
    role: Role
    created_at: int


@dataclass(frozen=True, slots=True)
class Token:
    """A session or an API token, without its secret. All instants in ms."""

    id: int
    account: str
    kind: str
    label: str
    address: str
    created_at: int
    used_at: int
    expires_at: int | None


@dataclass(frozen=True, slots=True)
class Known:
    """Whom a secret stands for. ``stale``: it is time to note that it was used."""

    account: str
    role: Role
    token_id: int
    stale: bool


def check_name(name: str) -> str:
    """Return the name. Raises ValueError for one that no account can have."""
    if NAME.fullmatch(name) is None:
        raise ValueError(
            "a name has 1 to 64 letters, digits and . _ @ + -, begins with a letter or digit, and is not local"
        )
    return name


# ------------------------------------------------------------------------------------------------- accounts


def any_account(tx: Transaction) -> bool:
    """Say whether there is an account; while there is none, the local user may talk to the bot."""
    return bool(tx.connection.execute(select(exists(select(accounts.c.name)))).scalar_one())


def list_accounts(tx: Transaction) -> list[Account]:
    """Return all accounts by name."""
    rows = tx.connection.execute(
        select(accounts.c.name, accounts.c.role, accounts.c.created_at).order_by(accounts.c.name)
    )
    return [Account(row.name, Role(row.role), row.created_at) for row in rows]


def find_account(tx: Transaction, name: str) -> Account | None:
    """Return the account of this name."""
    row = tx.connection.execute(
        select(accounts.c.name, accounts.c.role, accounts.c.created_at).where(accounts.c.name == name)
    ).one_or_none()
    return None if row is None else Account(row.name, Role(row.role), row.created_at)


def password_of(tx: Transaction, name: str) -> str | None:
    """Return the hash of an account's password, or None where there is no such account."""
    found = tx.connection.execute(select(accounts.c.password).where(accounts.c.name == name))
    password: str | None = found.scalar_one_or_none()
    return password


def add_account(tx: Transaction, name: str, password: str, role: Role) -> bool:
    """Make an account with a hashed password; False where the name is taken."""
    row = {"name": name, "password": password, "role": role.value, "created_at": tx.now_ms}
    if find_account(tx, name) is not None:
        return False
    tx.connection.execute(insert_ignore(tx.kind, accounts, ("name",)), row)
    return password_of(tx, name) == password


def set_password(tx: Transaction, name: str, password: str, *, keep: int | None = None) -> bool:
    """Give an account another hashed password and end its sessions but ``keep``; False: there is no such account."""
    changed = tx.connection.execute(
        update(accounts).where(accounts.c.name == name).values(password=password)
    ).rowcount
    if changed:
        sessions = delete(tokens).where(_t.account == name, _t.kind == SESSION)
        tx.connection.execute(sessions if keep is None else sessions.where(_t.id != keep))
        forget_attempts(tx, name)
    return bool(changed)


def set_role(tx: Transaction, name: str, role: Role) -> bool:
    """Give an account another role, from its next request on; False: there is no such account."""
    known = find_account(tx, name) is not None
    tx.connection.execute(update(accounts).where(accounts.c.name == name).values(role=role.value))
    return known


def is_last_admin(tx: Transaction, name: str) -> bool:
    """Say whether nobody but this account administers. Who does stays so until the transaction ends."""
    found = tx.connection.execute(
        select(accounts.c.name)
        .where(accounts.c.role == Role.ADMIN.value)
        .order_by(accounts.c.name)  # in one order, so that two who ask wait for each other at most
        .with_for_update()
    )
    return list(found.scalars()) == [name]


def remove_account(tx: Transaction, name: str) -> bool:
    """Remove an account with all that stands for it; its conversations stay. False: there is no such account."""
    tx.connection.execute(delete(tokens).where(_t.account == name))
    return bool(tx.connection.execute(delete(accounts).where(accounts.c.name == name)).rowcount)


# ------------------------------------------------------------------------------------- sessions and tokens


def new_secret() -> str:
    """Return a secret that nobody guesses."""
    return secrets.token_urlsafe(32)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def new_password() -> str:
    """Return a password that nobody guesses and anybody can type: no letter of it looks like another."""
    return "-".join("".join(secrets.choice(_PLAIN) for _ in range(5)) for _ in range(4))


def add_token(
    tx: Transaction, account: str, kind: str, secret: str, *, label: str, address: str = ""
) -> int | None:
    """Let a secret stand for an account and return its id; None: there is no such account."""
    if find_account(tx, account) is None:
        return None
    tx.connection.execute(delete(tokens).where(_t.expires_at < tx.now_ms))
    row = {
        "account": account,
        "kind": kind,
        "hash": _hash(secret),
        "label": label[:255],
        "address": address[:64],
        "created_at": tx.now_ms,
        "used_at": tx.now_ms,
        "expires_at": tx.now_ms + SESSION_MS if kind == SESSION else None,
    }
    key = tx.connection.execute(insert(tokens), row).inserted_primary_key
    return None if key is None else int(key[0])


_KNOWN = (
    select(_t.id, _t.account, _t.used_at, accounts.c.role)
    .join(accounts, accounts.c.name == _t.account)
    .where(_t.hash == bindparam("in_hash"), _t.kind == bindparam("in_kind"))
    .where(or_(_t.expires_at.is_(None), _t.expires_at > bindparam("now")))
)


def who_has(tx: Transaction, kind: str, secret: str) -> Known | None:
    """Return whom a secret stands for."""
    values = {"in_hash": _hash(secret), "in_kind": kind, "now": tx.now_ms}
    row = tx.connection.execute(_KNOWN, values).one_or_none()
    if row is None:
        return None
    return Known(row.account, Role(row.role), row.id, stale=row.used_at < tx.now_ms - _SEEN_MS)


def note_use(tx: Transaction, token_id: int, address: str) -> None:
    """Note that a session or token was used now, and from where."""
    values = {"used_at": tx.now_ms, "address": address[:64]}
    tx.connection.execute(update(tokens).where(_t.id == token_id).values(values))


def list_tokens(tx: Transaction, account: str, kind: str) -> list[Token]:
    """Return an account's sessions or API tokens that hold, the one used last first."""
    rows = tx.connection.execute(
        select(*[column for column in tokens.c if column.name != "hash"])
        .where(_t.account == account, _t.kind == kind)
        .where(or_(_t.expires_at.is_(None), _t.expires_at > tx.now_ms))
        .order_by(_t.used_at.desc(), _t.id.desc())
    )
    return [Token(**row._mapping) for row in rows]  # noqa: SLF001  # the public name of it


def revoke(tx: Transaction, account: str, kind: str, token_id: int | None = None) -> int:
    """End one session or API token of an account, or all of the kind; return how many that were."""
    statement = delete(tokens).where(_t.account == account, _t.kind == kind)
    if token_id is not None:
        statement = statement.where(_t.id == token_id)
    return int(tx.connection.execute(statement).rowcount)


# ----------------------------------------------------------------------------------------- the cookies' key


def cookie_key(tx: Transaction) -> bytes | None:
    """Return the key that cookies are signed with, the same for every process; None: there is none yet."""
    found = select(controls.c.value).where(controls.c.kind == _KEY[0], controls.c.name == _KEY[1])
    value = tx.connection.execute(found).scalar_one_or_none()
    return None if value is None else bytes.fromhex(value)


def make_cookie_key(tx: Transaction) -> bytes:
    """Return the key that cookies are signed with; it is made where there is none. It is no part of backups."""
    kind, name = _KEY
    row: dict[str, Any] = {"kind": kind, "name": name, "value": secrets.token_hex(32), "at": tx.now_ms}
    tx.connection.execute(insert_ignore(tx.kind, controls, ("kind", "name")), row)
    key = cookie_key(tx)
    if key is None:
        raise LookupError("a key that was made is not there")
    return key


# ------------------------------------------------------------------------------------------ wrong passwords


def network_of(address: str) -> str:
    """Return what counts as one address: of IPv6 the /64, which one customer has."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return address[:64]
    if isinstance(parsed, IPv6Address):
        return str(parsed.ipv4_mapped or IPv6Address(int(parsed) >> 64 << 64))
    return str(parsed)


def take_attempt(tx: Transaction, account: str, address: str) -> int:
    """Count an attempt to log in before its password is looked at; return 0, or the ms until it may be made.

    Counting comes first, so that many at once do not slip through together. Nothing tells whether there is such an
    account.
    """
    tx.connection.execute(delete(login_attempts).where(login_attempts.c.until <= tx.now_ms))
    keys = (("account", account[:64], MAX_PER_ACCOUNT), ("address", network_of(address), MAX_PER_ADDRESS))
    for kind, name, _ in keys:  # in one order, so that two who do this wait for each other at most
        row = {"kind": kind, "name": name, "count": 0, "until": tx.now_ms + ATTEMPTS_MS}
        tx.connection.execute(insert_ignore(tx.kind, login_attempts, ("kind", "name")), row)
    wait_ms = 0
    for kind, name, most in keys:
        found = tx.connection.execute(
            select(login_attempts.c.count.label("made"), login_attempts.c.until)
            .where(login_attempts.c.kind == kind, login_attempts.c.name == name)
            .with_for_update()
        ).one()
        if found.made >= most:
            wait_ms = max(wait_ms, found.until - tx.now_ms)
    if not wait_ms:
        _add(tx, [(kind, name) for kind, name, _ in keys], 1)
    return wait_ms


def _add(tx: Transaction, keys: Sequence[tuple[str, str]], by: int) -> None:
    for kind, name in keys:
        tx.connection.execute(
            update(login_attempts)
            .where(login_attempts.c.kind == kind, login_attempts.c.name == name)
            .values(count=login_attempts.c.count + by)
        )


def forget_attempts(tx: Transaction, account: str, address: str | None = None) -> None:
    """Forget an account's wrong passwords; the right one was no wrong one of its address either."""
    named = login_attempts.c.kind == "account", login_attempts.c.name == account[:64]
    tx.connection.execute(delete(login_attempts).where(*named))
    if address is not None:
        _add(tx, [("address", network_of(address))], -1)
