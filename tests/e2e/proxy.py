"""A TCP proxy between a server and its database, that can be cut."""

from __future__ import annotations

from sqlalchemy.engine import make_url

from feishu_bot.testing import proxy


class Proxy(proxy.Proxy):
    """Stands before a database server; ``url`` leads through it. ``up`` False refuses what comes."""

    def __init__(self, db_url: str, *, up: bool = True) -> None:
        self._url = make_url(db_url)
        default = 5432 if self._url.drivername.startswith("postgres") else 3306
        super().__init__(self._url.host or "127.0.0.1", self._url.port or default, up=up)

    @property
    def url(self) -> str:
        return self._url.set(host="127.0.0.1", port=self.port).render_as_string(hide_password=False)

    def lead_to(self, db_url: str) -> None:
        """Lead new connections to another server."""
        self._url = make_url(db_url)
        self.target = (self._url.host or "127.0.0.1", self._url.port or self.target[1])
