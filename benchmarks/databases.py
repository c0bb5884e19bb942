"""Databases of a benchmark's own, on a PostgreSQL server of this machine."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import psycopg
from sqlalchemy import make_url

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

USERS = ("postgres", "root")  # of a server that trusts this machine
_LOCAL = "postgresql://{user}@127.0.0.1:5432/{name}"


def local_url(name: str) -> str | None:
    """Return the URL of a database on this machine's server, which need not be there yet; None without a server."""
    urls = (_LOCAL.format(user=user, name=name) for user in USERS)
    return next((url for url in urls if answers(url)), None)


@contextmanager
def local_postgresql(name: str) -> Iterator[str | None]:
    """Yield the URL of an empty database, gone afterwards; None without a server."""
    db_url = local_url(name)
    if db_url is None:
        yield None
        return
    _drop(db_url)
    create_database(db_url)
    try:
        yield db_url
    finally:
        _drop(db_url)


def _drop(db_url: str) -> None:
    name = make_url(db_url).database
    with server(db_url) as connection:
        connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'.encode())


@contextmanager
def empty(db_url: str, folder: Path) -> Iterator[str]:
    """Yield the URL of an empty database of the same kind, on the same disk, gone afterwards."""
    url = make_url(db_url)
    if url.get_backend_name() == "sqlite":
        yield f"sqlite:///{folder / 'empty.db'}"
        return
    name = f"{url.database}_empty"
    empty_url = url.set(database=name).render_as_string(hide_password=False)
    with server(db_url) as connection:
        connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'.encode())
    create_database(empty_url)
    try:
        yield empty_url
    finally:
        with server(db_url) as connection:
            connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'.encode())


def create_database(db_url: str) -> None:
    """Make the database that the URL names where there is none."""
    name = make_url(db_url).database
    with server(db_url) as connection:
        if connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone() is None:
            connection.execute(f"CREATE DATABASE \"{name}\" TEMPLATE template0 ENCODING 'UTF8'".encode())


@contextmanager
def server(db_url: str) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    url = make_url(db_url).set(drivername="postgresql", database="postgres")
    with psycopg.connect(
        url.render_as_string(hide_password=False), autocommit=True, connect_timeout=3
    ) as connection:
        yield connection


def answers(db_url: str) -> bool:
    try:
        with server(db_url):
            return True
    except psycopg.Error:
        return False
