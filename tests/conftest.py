from __future__ import annotations

import collections
import os
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from tests.databases import KINDS, Databases, Unavailable, folder_for_files
from tests.isolation import NetworkGuard, clean_environment, database_hosts, keep_bytecode

if TYPE_CHECKING:
    from collections.abc import Iterator

GUARD = pytest.StashKey[NetworkGuard]()
MISSING = pytest.StashKey[collections.Counter[str]]()
LONGEST = ("tests/chaos/", "tests/operation/")


settings.register_profile("suite", deadline=None)  # a busy machine is no mistake
settings.load_profile("suite")


def pytest_configure(config: pytest.Config) -> None:
    clean_environment()
    keep_bytecode()
    config.stash[MISSING] = collections.Counter()
    config.stash[GUARD] = NetworkGuard(database_hosts())
    config.stash[GUARD].install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # What takes longest comes first: at the end one process would run it while the others have nothing to do.
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config):
    yield  # the last lines are ours
    for reason, count in config.stash[MISSING].items():
        terminalreporter.write_line(f"NOT TESTED: {count} cases without {reason}", yellow=True, bold=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # one of several processes: its starter prints the last lines
        session.config.workeroutput["missing"] = dict(session.config.stash[MISSING])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[MISSING].update(getattr(node, "workeroutput", {}).get("missing", {}))


@pytest.fixture(scope="session")
def databases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Databases]:
    """All database servers; tests take one of the URLs below."""
    found = Databases(folder_for_files(tmp_path_factory.mktemp("databases")))
    yield found
    found.close()


@pytest.fixture(params=KINDS)
def db_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a database of this test's own, with the schema and no rows, on each kind of server."""
    yield from _database(request, request.param)


@pytest.fixture(params=KINDS)
def blank_db_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """As ``db_url``, but without any table."""
    yield from _database(request, request.param, blank=True)


@pytest.fixture
def sqlite_url(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from _database(request, "sqlite")


@pytest.fixture
def postgresql_url(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from _database(request, "postgresql")


@pytest.fixture
def mariadb_url(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from _database(request, "mariadb")


def _database(request: pytest.FixtureRequest, kind: str, *, blank: bool = False) -> Iterator[str]:
    databases: Databases = request.getfixturevalue("databases")
    try:
        databases.server(kind)
    except Unavailable as error:
        if os.environ.get("REQUIRE_SERVICES", "0") not in {"", "0"}:
            pytest.fail(f"REQUIRE_SERVICES is set, and there is no {kind}: {error}", pytrace=False)
        request.config.stash[MISSING][f"{kind} ({error})"] += 1
        pytest.skip(f"no {kind}: {error}")
    with databases.database(kind, blank=blank) as url:
        yield url


@pytest.fixture(autouse=True)
def _own_machine_only(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that wanted to reach another host, also where its code went on without."""
    refused = request.config.stash[GUARD].refused
    yield
    wanted, refused[:] = list(refused), []
    assert not wanted, f"tests use no network beyond loopback, but this one wanted {wanted}"


@pytest.fixture
def refused_hosts(request: pytest.FixtureRequest) -> list[str]:
    """The hosts that the running test was kept from; a test of the guard itself empties it."""
    return request.config.stash[GUARD].refused
