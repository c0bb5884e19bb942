"""The console's pages. All that they show is read on reader threads; nothing here changes anything."""

from __future__ import annotations

import os
import re
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import orjson
from aiohttp import web

from feishu_bot.config import render as render_settings
from feishu_bot.errors import BadPayload
from feishu_bot.log import HIDDEN, RECENT_LINES
from feishu_bot.model import InboundMessage
from feishu_bot.store import audit as audit_rows
from feishu_bot.store import console, conversations, own
from feishu_bot.store.conversations import iso_of
from feishu_bot.store.ledger import usage_days_by
from feishu_bot.store.search import search_messages
from feishu_bot.web.admin import PER_PAGE, ago, filtered, listing, page_of
from feishu_bot.web.charts import stacked
from feishu_bot.web.conversations import MARKS, MAX_SKIPPED, marked, send_export
from feishu_bot.web.errors import json_response

if TYPE_CHECKING:
    from feishu_bot.store.work import Transaction
    from feishu_bot.web.admin import Desk

SPANS: Final = (7, 30, 90)  # days
BY: Final = ("platform", "model", "user")
LEVELS: Final = ("debug", "info", "warning", "error", "critical")
_HOUR_S: Final = 3600
_DAY_MS: Final = 86_400_000
_FRESH_S: Final = 2.0  # for as long, whoever looks sees the same figures
_MAX_PAYLOAD: Final = 100_000  # characters that are shown
_SECRET_NAME: Final = re.compile(
    r"secret|token|passw|authorization|api_?key|cookie|signature|credential", re.IGNORECASE
)


class Views:
    """Every method answers one GET."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._status: tuple[float, dict[str, Any]] | None = None

    # -------------------------------------------------------------------------------------------- overview

    async def _now(self, *, fresh: bool = False) -> dict[str, Any]:
        """Return the state of all, read at most every two seconds however many look, unless it must be ``fresh``."""
        if fresh or self._status is None or time.monotonic() - self._status[0] > _FRESH_S:
            self._status = (time.monotonic(), await self._desk.store.read(console.status))
        return self._status[1] | {"problems": self._desk.inside.problems()}

    async def overview(self, request: web.Request) -> web.StreamResponse:
        """Show what waits, what is wrong, the processes, and what was used over time."""
        days, by = request.query.get("days", str(SPANS[0])), request.query.get("by", BY[0])
        if days not in map(str, SPANS) or by not in BY:
            raise BadPayload("expected days (7, 30, 90) and by (platform, model, user)")
        span, desk = int(days), self._desk
        zone = desk.inside.settings().schedule.zone
        today = datetime.fromtimestamp(desk.store.now_ms() / 1000, UTC)
        first = (today.astimezone(zone) - timedelta(days=span - 1)).replace(
            hour=0, minute=0, second=0, microsecond=0
        )
        utc_days = _days(today - timedelta(days=span - 1), span)

        def read(tx: Transaction) -> tuple[Any, Any]:
            return console.ended_by_day(tx, utc_days[0]), usage_days_by(tx, by, zone, since=first)

        ended, used = await desk.store.read(read)
        gone = desk.words(request)["forgotten"]
        tokens = {(day, name or gone): sums["total_tokens"] for (day, name), sums in used.items()}
        cost = {(day, name or gone): sums["cost_usd"] or 0.0 for (day, name), sums in used.items()}
        own_days = _days(first, span)
        by_tokens = stacked(own_days, tokens, _count)
        charts = [
            ("messages_chart", stacked(utc_days, ended, _count)),
            ("tokens_chart", by_tokens),
            ("cost_chart", stacked(own_days, cost, _dollars, like=by_tokens.names)),
        ]
        now = await self._now()
        return desk.render(request, "overview", now=now, charts=charts, days=span, by=by, spans=SPANS, bys=BY)

    async def live(self, _request: web.Request) -> web.StreamResponse:
        """Return the figures of the overview that change by themselves."""
        now = await self._now()
        figures = {
            "waiting": now["waiting"],
            "oldest": ago(now["oldest_ms"]),
            "outbox": now["outbox"],
            "outbox_oldest": ago(now["outbox_oldest_ms"]),
            "dead": now["dead_messages"] + now["dead_parts"],
            "processes": len(now["processes"]),
        }
        problems = [self._desk.secrets().hide(problem) for problem in now["problems"]]
        response = json_response({"figures": figures, "problems": problems})
        response.headers["Cache-Control"] = "no-store"
        return response

    # ---------------------------------------------------------------------------------------- dead letters

    async def dead(self, request: web.Request) -> web.StreamResponse:
        """Show what was given up."""
        page, number = page_of(request)
        rows = await self._desk.store.read(lambda tx: console.dead_letters(tx, page))
        hide = self._desk.secrets().hide
        return self._desk.render(request, "dead", hide=hide, **listing(rows, page, number))

    async def letter(self, request: web.Request) -> web.StreamResponse:
        """Show one of them with what it holds."""
        name = request.match_info["letter"]
        letter = await self._desk.store.read(lambda tx: console.dead_letter(tx, name))
        if letter is None:
            raise web.HTTPNotFound
        secrets = self._desk.secrets()
        said = _said(letter.id, letter.text)
        return self._desk.render(
            request,
            "dead",
            template="letter",
            letter=letter,
            reason=secrets.hide(letter.reason),
            said=None if said is None else secrets.hide(said),
            payload=secrets.hide(_readable(letter.text))[:_MAX_PAYLOAD],
        )

    # --------------------------------------------------------------------------------------- conversations

    async def conversations(self, request: web.Request) -> web.StreamResponse:
        """Show everybody's conversations, or the messages in which words occur."""
        page, number = page_of(request)
        where = request.query.get("in", "messages")
        hits: list[dict[str, Any]] | None = None
        rows: list[Any] = []
        if page.text and where == "messages":
            skip = min(page.offset, MAX_SKIPPED)
            hits = await self._desk.store.read(
                lambda tx: search_messages(
                    tx.connection, tx.kind, page.text, limit=page.limit, offset=skip, marks=MARKS
                )
            )
            hits = [
                hit | {"pieces": marked(hit["snippet"]), "at": datetime.fromisoformat(hit["timestamp"])}
                for hit in hits
            ]
        else:
            rows = await self._desk.store.read(lambda tx: console.list_conversations(tx, page))
        shown = listing(rows if hits is None else hits, page, number)
        return self._desk.render(request, "conversations", where=where, found=hits is not None, **shown)

    async def conversation(self, request: web.Request) -> web.StreamResponse:
        """Show a conversation's messages: the newest, those before one, after one, or up to one that was found."""
        conversation_id = int(request.match_info["id"])
        before, after, at = (_message(request, name) for name in ("before", "after", "at"))
        if at is not None:
            before = at + 1

        def read(tx: Transaction) -> tuple[Any, Any]:
            row = conversations.get(tx, conversation_id)
            found = own.list_messages(tx, conversation_id, before=before, after=after, limit=PER_PAGE + 1)
            return row, found

        row, found = await self._desk.store.read(read)
        more = len(found) > PER_PAGE
        found = found[-PER_PAGE:] if after is not None else found[:PER_PAGE]
        shown = [
            {"id": m["id"], "role": m["role"], "content": m["content"], "who": m["sender_id"], "at": _at(m)}
            for m in reversed(found)
        ]
        earlier = shown[0]["id"] if shown and (more or after is not None) else None
        later = shown[-1]["id"] if shown and (before is not None or (after is not None and more)) else None
        return self._desk.render(
            request,
            "conversations",
            template="conversation",
            row=row,
            messages=shown,
            earlier=earlier,
            later=later,
        )

    async def export(self, request: web.Request) -> web.StreamResponse:
        """Return a conversation as a file."""
        return await send_export(request, self._desk.store, int(request.match_info["id"]))

    # ----------------------------------------------------------------------------------- budgets and jobs

    async def budgets(self, request: web.Request) -> web.StreamResponse:
        """Show what is used of the budgets in their windows now."""
        page, number = page_of(request)
        budgets, now = self._desk.inside.budgets(), self._desk.store.now_ms()
        windows = [(name, budgets.charge(b, "", now).window_start) for name, b in budgets.by_name.items()]
        found = await self._desk.store.read(lambda tx: console.budget_rows(tx, windows, page))
        rows = [
            _budget_row(budgets.charge(budgets.by_name[w[0]], w[1], now), balance) for w, balance in found
        ]
        names = list(budgets.by_name)
        return self._desk.render(request, "budgets", names=names, **listing(rows, page, number))

    async def jobs(self, request: web.Request) -> web.StreamResponse:
        """Show the jobs with their last and next runs, and all runs."""
        page, number = page_of(request)
        schedule = self._desk.inside.schedule
        last, fires = await schedule.last_runs(), schedule.next_fires()
        runs = await self._desk.store.read(lambda tx: console.list_runs(tx, page))
        jobs = [(job, last.get(job.name), fires.get(job.name)) for job in schedule.jobs]
        jobs = filtered(jobs, page.text, lambda row: row[0].name)
        hide = self._desk.secrets().hide
        return self._desk.render(request, "jobs", jobs=jobs, hide=hide, **listing(runs, page, number))

    # ------------------------------------------------------------------------------------------- platforms

    async def platforms(self, request: web.Request) -> web.StreamResponse:
        """Show each account's health, what is paused, and the last errors."""
        page, _ = page_of(request)
        desk = self._desk
        since = desk.store.now_ms() - _DAY_MS
        failed = await desk.store.read(lambda tx: console.failed_since(tx, since))
        now, secrets = await self._now(fresh=True), desk.secrets()
        paused = {pause["target"]: pause for pause in now["pauses"]}
        rows = [
            {
                "name": name,
                "type": settings.type,
                "enabled": settings.enabled,
                "problems": [secrets.hide(p) for p in own_.problems()] if own_ is not None else [],
                "paused": f"account:{name}" in paused,
                "failed": failed.get(name),
            }
            for name, settings in sorted(desk.inside.settings().platforms.items())
            for own_ in (desk.inside.platforms.get(name),)
        ]
        errors = [
            {"pid": process["pid"]} | {key: secrets.hide(str(value)) for key, value in error.items()}
            for process in now["processes"]
            for error in process["errors"]
        ]
        rows = filtered(rows, page.text, lambda row: f"{row['name']} {row['type']}")
        return desk.render(
            request, "platforms", rows=rows, q=page.text, paused=paused, errors=errors, hide=secrets.hide
        )

    # -------------------------------------------------------------------------------- configuration and log

    async def config(self, request: web.Request) -> web.StreamResponse:
        """Show the configuration in force, secrets hidden, with where each value came from."""
        page, _ = page_of(request)
        inside = self._desk.inside
        text = self._desk.secrets().hide(render_settings(inside.settings(), inside.origins()))
        lines = filtered(text.splitlines(), page.text, str)
        return self._desk.render(request, "config", text="\n".join(lines), q=page.text)

    async def logs(self, request: web.Request) -> web.StreamResponse:
        """Show what this process has logged in the last hour."""
        page, number = page_of(request)
        level = request.query.get("level", "")
        if level not in {"", *LEVELS}:
            raise BadPayload(f"level: expected one of {', '.join(LEVELS)}")
        kept = self._desk.inside.lines
        lines = [] if kept is None else kept.last(time.time() - _HOUR_S)
        lines = [(at, lvl, _told(text)) for at, lvl, text in lines if not level or lvl == level]
        hide = self._desk.secrets().hide
        found = [(lvl, hide(text)) for _, lvl, text in filtered(lines, page.text, lambda line: str(line[2]))]
        return self._desk.render(
            request,
            "logs",
            kept=kept is not None,
            pid=os.getpid(),
            host=self._desk.store.owner.host.partition("/")[0],
            most=RECENT_LINES,
            level=level,
            levels=LEVELS,
            **listing(found[page.offset : page.offset + page.limit], page, number),
        )

    # ----------------------------------------------------------------------------------------------- audit

    async def audit(self, request: web.Request) -> web.StreamResponse:
        """Show who has changed what."""
        page, number = page_of(request)
        rows = await self._desk.store.read(
            lambda tx: audit_rows.entries(tx, text=page.text, offset=page.offset, limit=page.limit)
        )
        hide = self._desk.secrets().hide
        return self._desk.render(request, "audit", hide=hide, **listing(rows, page, number))


def _days(first: datetime, count: int) -> list[str]:
    return [(first.date() + timedelta(days=n)).isoformat() for n in range(count)]


def _count(number: float) -> str:
    for unit, size in (("M", 1_000_000), ("k", 10_000)):
        if number >= size:
            shown = number / (1000 if unit == "k" else size)
            return f"{shown:.1f}".removesuffix(".0") + unit
    return f"{number:.2f}".rstrip("0").rstrip(".")


def _dollars(number: float) -> str:
    return f"{number:.2f}" if number >= 1 or not number else f"{number:.4f}"


def _told(line: str) -> str:
    """Return a line of the log as people read it, also where it is written for programs."""
    try:
        known = orjson.loads(line)
        head = f"{known.pop('time')} {known.pop('level').upper():<7} {known.pop('event')}"
        logger, stack = known.pop("logger", ""), known.pop("exception", "")
    except (ValueError, TypeError, KeyError, AttributeError):
        return line
    fields = "".join(f" {key}={value}" for key, value in known.items())
    return f"{head}{fields} [{logger}]" + (f"\n{stack}" if stack else "")


def _message(request: web.Request, name: str) -> int | None:
    text = request.query.get(name)
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,15}", text, re.ASCII):
        raise BadPayload(f"{name}: expected a message's id")
    return int(text)


def _at(message: Any) -> datetime:
    return datetime.fromisoformat(iso_of(message["timestamp"]))


def _said(letter: str, payload: str) -> str | None:
    """Return the words of a message, where the payload still has them."""
    if not letter.startswith("in-"):
        return None
    try:
        return InboundMessage.from_json(payload).text or None
    except (ValueError, TypeError, KeyError):
        return None


def _readable(payload: str) -> str:
    """Return JSON on lines of its own, with what is called like a secret hidden; what is no JSON as it is."""
    try:
        data = orjson.loads(payload)
    except ValueError:
        return payload
    return orjson.dumps(_without_secrets(data), option=orjson.OPT_INDENT_2).decode()


def _without_secrets(data: Any) -> Any:
    if isinstance(data, dict):
        return {
            key: HIDDEN if isinstance(value, str) and _SECRET_NAME.search(key) else _without_secrets(value)
            for key, value in data.items()
        }
    if isinstance(data, list):
        return [_without_secrets(item) for item in data]
    return data


def _budget_row(charge: Any, balance: Any) -> dict[str, Any]:
    return {
        "budget": charge.budget,
        "key": charge.key,
        "ends_ms": charge.ends_ms,
        "limits": [
            {
                "unit": unit,
                "used": _amount(unit, balance.used[place]),
                "reserved": _amount(unit, balance.reserved[place]),
                "granted": _amount(unit, balance.granted[place]),
                "limit": _amount(unit, limit),
                "share": min(1.0, balance.used[place] / limit) if limit else 1.0,
            }
            for unit, place, limit in charge.limits(balance.granted)
        ],
    }


def _amount(unit: str, number: int) -> str:
    return f"{number / 1_000_000:.4f}" if unit == "cost" else f"{number:,}"
