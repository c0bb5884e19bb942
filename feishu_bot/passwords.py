"""Passwords as argon2id hashes. Slow on purpose (RFC 9106, the low-memory profile): never on the event loop."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from argon2 import PasswordHasher

MIN_LENGTH: Final = 8  # characters
MAX_LENGTH: Final = 1000

# Of no password anybody knows: who names an account that is not there waits as long as who names one that is.
NOBODYS: Final = (
    "$argon2id$v=19$m=65536,t=3,p=4$bJ6zIHb4umIOY7ez26JH/A$KNK9hm0g0dywPpmVDghO+uKmEjCdzSB7cI8CbopxbVg"
)


@cache
def _hasher() -> PasswordHasher:
    from argon2 import PasswordHasher  # noqa: PLC0415  # a bot without accounts never needs it

    return PasswordHasher()


def hash_password(password: str) -> str:
    """Return the hash to store, with its salt and parameters. Raises ValueError for a password that will not do."""
    if not MIN_LENGTH <= len(password) <= MAX_LENGTH:
        raise ValueError(f"a password has {MIN_LENGTH} to {MAX_LENGTH} characters")
    return _hasher().hash(password.encode("utf-8", "surrogatepass"))


def is_right(stored: str | None, password: str) -> bool:
    """Say whether this is the password; None: there is no such account, which takes as long to find out."""
    if len(password) > MAX_LENGTH:
        return False
    from argon2.exceptions import InvalidHashError, VerificationError  # noqa: PLC0415  # as above

    try:
        _hasher().verify(stored or NOBODYS, password.encode("utf-8", "surrogatepass"))
    except (VerificationError, InvalidHashError):
        return False
    return stored is not None
