"""Throw-away database servers: PostgreSQL and MariaDB made with the programs that are installed, on a free port."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Literal

from feishu_bot.errors import StoreUnavailable
from feishu_bot.store.engine import open_engine, ping

START_TIMEOUT_S: Final = 60.0
_HALT_S: Final = 20.0

# A shell beside the server waits for the end of our pipe, however this process ends. Whoever means to start the
# server again keeps its folder.
_SCRIPT: Final = (
    '"$@" >>server.log 2>&1 & echo $! >pid; cat >/dev/null; kill -$STOP $! 2>/dev/null; wait $!; '
    '[ -e keep ] || rm -rf "$FOLDER"'
)


class Unavailable(Exception):
    """There is no server of this kind; the message says what was tried."""


class Cluster:
    """A database server in a temporary folder; it ends with this process at the latest.

    Nothing is flushed to the disk: what is committed survives the death of the server, not of the machine.
    """

    def __init__(self, preferred_user: str) -> None:
        """Make the folder. Both servers refuse to run as root, so root hands it to somebody else."""
        self.folder = Path(tempfile.mkdtemp(prefix="feishu-bot-test-"))
        self.user: str | None = None
        self.url = ""
        self._stop_with = ""
        self._command: tuple[str, ...] = ()
        self._process: subprocess.Popen[bytes] | None = None
        if os.geteuid() == 0:
            known = {entry.pw_name for entry in pwd.getpwall()}
            self.user = next((name for name in (preferred_user, "nobody") if name in known), None)
            if self.user is None:
                self.folder.rmdir()
                raise Unavailable("root cannot run a throw-away server, and there is no user nobody")
            shutil.chown(self.folder, self.user)

    def run(self, *command: str) -> None:
        """Run a command as the server's user. Raises Unavailable with its last line if it fails."""
        done = subprocess.run(  # noqa: S603  # programs found on this machine, arguments of ours
            command,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            **self._as_user(),
        )
        if done.returncode:
            lines = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
            self.stop()
            raise Unavailable(f"{Path(command[0]).name} failed: {lines[-1] if lines else 'no output'}")

    def start(self, *command: str, stop_with: str) -> None:
        """Start the server. ``stop_with``: the signal that ends it at once, e.g. ``QUIT``."""
        self._command, self._stop_with = command, stop_with
        self._launch()

    def _launch(self) -> None:
        self._process = subprocess.Popen(  # noqa: S603  # as above
            ["/bin/sh", "-c", _SCRIPT, "sh", *self._command],
            cwd=self.folder,
            env={
                "PATH": os.defpath,
                "STOP": self._stop_with,
                "FOLDER": str(self.folder),
                "LC_ALL": "C",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # an interrupt at the terminal is for whoever started us
            **self._as_user(),
        )

    def wait(self, url: str) -> None:
        """Wait until the server takes connections. Raises Unavailable when it has not for a minute."""
        self.url = url
        end = time.monotonic() + START_TIMEOUT_S
        engine = open_engine(url)
        try:
            while True:
                try:
                    ping(engine)
                except StoreUnavailable as error:
                    if time.monotonic() > end:
                        self.stop()
                        raise Unavailable(f"the throw-away server does not answer: {error}") from None
                    time.sleep(0.05)
                else:
                    return
        finally:
            engine.dispose()

    def restart(self, how: Literal["at once", "orderly"], *, away_s: float = 0.0) -> None:
        """End the server, wait and start it again on the same port; ``at once`` leaves it to recover.

        Raises Unavailable when it does not come back.
        """
        keep = self.folder / "keep"
        keep.touch()
        if how == "orderly":
            with suppress(ProcessLookupError, OSError, ValueError):
                os.kill(
                    int((self.folder / "pid").read_text()),
                    signal.SIGTERM if self._is_mariadb else signal.SIGINT,
                )
            self._until_gone()
        self._end()
        time.sleep(away_s)
        keep.unlink()
        self._launch()
        self.wait(self.url)

    @property
    def _is_mariadb(self) -> bool:
        return "mariadbd" in self._command[0]

    def _until_gone(self) -> None:
        end = time.monotonic() + _HALT_S
        with suppress(ProcessLookupError, OSError, ValueError):
            pid = int((self.folder / "pid").read_text())
            while time.monotonic() < end and not _is_zombie(pid):
                os.kill(pid, 0)
                time.sleep(0.02)

    def freeze(self, *, frozen: bool) -> None:
        """Stop all processes of the server where they are, as a disk that hangs does, or let them go on."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGSTOP if frozen else signal.SIGCONT)

    def _end(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()

    def stop(self) -> None:
        """End the server and remove its folder."""
        self.freeze(frozen=False)
        self._end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _as_user(self) -> dict[str, Any]:
        if self.user is None:
            return {}
        entry = pwd.getpwnam(self.user)
        return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def _is_zombie(pid: int) -> bool:
    with suppress(OSError):
        return (
            Path(f"/proc/{pid}/stat")
            .read_text(encoding="utf-8", errors="replace")
            .rpartition(")")[2]
            .split()[0]
            == "Z"
        )
    return False


def start_postgres(*options: str) -> Cluster:
    """Start PostgreSQL on a free port; ``url`` leads to an empty database. Raises Unavailable where it is not installed."""
    programs = _postgres_programs()
    cluster = Cluster("postgres")
    words = ("-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
    cluster.run(f"{programs}/initdb", "-D", f"{cluster.folder}/data", *words)
    _serve_postgres(cluster, programs, *options)
    return cluster


def start_standby(primary: Cluster) -> Cluster:
    """Start a standby that follows ``primary``. Raises Unavailable."""
    programs = _postgres_programs()
    cluster = Cluster("postgres")
    data, url = f"{cluster.folder}/data", f"{primary.url}?application_name=standby"
    words = ("--checkpoint=fast", "--no-sync", "--write-recovery-conf")
    cluster.run(f"{programs}/pg_basebackup", "-D", data, "-d", url, *words)
    _serve_postgres(cluster, programs)
    return cluster


def _postgres_programs() -> Path:
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent, Path(found).parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    programs = next((f for f in folders if (f / "initdb").exists() and (f / "postgres").exists()), None)
    if programs is None:
        raise Unavailable("there is no initdb")
    return programs


def _serve_postgres(cluster: Cluster, programs: Path, *options: str) -> None:
    port = free_port()
    settings = {
        "listen_addresses": "127.0.0.1",
        "port": port,
        "unix_socket_directories": "",
        "fsync": "off",
        "full_page_writes": "off",
    }
    words = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
    cluster.start(f"{programs}/postgres", "-D", f"{cluster.folder}/data", *words, *options, stop_with="QUIT")
    cluster.wait(f"postgresql://postgres@127.0.0.1:{port}/postgres")


def start_mariadb() -> Cluster:
    """Start MariaDB on a free port; ``url`` names no database. Raises Unavailable where it is not installed."""
    path = os.pathsep.join([os.defpath, "/usr/sbin", "/usr/local/sbin", "/usr/local/bin"])
    install = shutil.which("mariadb-install-db") or shutil.which("mariadb-install-db", path=path)
    server = shutil.which("mariadbd") or shutil.which("mariadbd", path=path)
    if install is None or server is None:
        raise Unavailable("there is no mariadbd with mariadb-install-db")
    cluster = Cluster("mysql")
    data = f"--datadir={cluster.folder / 'data'}"
    cluster.run(install, "--no-defaults", data, "--auth-root-authentication-method=normal", "--skip-test-db")
    port = free_port()
    cluster.start(
        server,
        "--no-defaults",
        data,
        f"--port={port}",
        "--bind-address=127.0.0.1",
        f"--socket={cluster.folder / 'sock'}",
        "--innodb-flush-log-at-trx-commit=2",
        "--innodb-flush-method=nosync",
        "--innodb-buffer-pool-size=64M",
        "--skip-log-bin",
        stop_with="KILL",
    )
    cluster.wait(f"mariadb://root@127.0.0.1:{port}/")
    return cluster


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
