"""What a server looks like that is in use: people, conversations, use, letters that were given up. Also for pictures."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import orjson
from sqlalchemy import insert, update

from feishu_bot.model import ChatType, InboundMessage
from feishu_bot.store import conversations, schema, threads
from feishu_bot.store.work import NewMessage
from tests.stores import opened

if TYPE_CHECKING:
    from collections.abc import Sequence

    from playwright.async_api import Page

    from tests.e2e.bots import Record

PICTURES = os.environ.get("PICTURES")  # a folder for a picture of each page, to look at them and for docs/

# In pictures, the folders of the tests are those of a server.
_NO_FOLDERS: Final = """() => {
    const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) {
        const told = walk.currentNode.data.replace(/\\/\\w+\\/pytest-\\S*\\//g, "/srv/bot/");
        if (told !== walk.currentNode.data) walk.currentNode.data = told;
    }
}"""

# What Ann has talked about; the first is the one that is shown.
TALKS: Final = {
    "en": ("Sort a list of orders", "Release notes for 2.4", "Trip to Hangzhou in spring", "Why is the sky blue?",
           "A letter to the landlord", "SQL: customers without orders", "Names for a grey cat", "Regular expression for dates",
           "Dinner for six, no nuts", "Explain TCP slow start", "Translate the menu", "Cron every second Monday"),
    "zh": ("按金额排序订单", "2.4 版发布说明", "春天去杭州", "天空为什么是蓝色的？", "写给房东的信", "SQL：没有下单的客户", "给灰猫取名字",
           "匹配日期的正则表达式", "六人晚餐，不含坚果", "解释 TCP 慢启动", "翻译菜单", "每隔一周的星期一"),
}  # fmt: skip
QUESTION: Final = {
    "en": "How do I sort a list of orders by amount, the largest first?",
    "zh": "怎样把订单按金额从大到小排序？",
}
_CODE: Final = "```python\norders.sort(key=lambda order: order.amount, reverse=True)\n```"
ANSWER: Final = {
    "en": f"Use `sort` with a **key** and `reverse=True`:\n\n{_CODE}\n\n"
    "1. `key` says *what* is compared, here the amount.\n2. Equal amounts keep their order.\n\n"
    "| call | changes the list | returns |\n|---|---|---|\n| `orders.sort()` | yes | nothing |\n"
    "| `sorted(orders)` | no | a new list |",
    "zh": f"用 `sort`，给出 **key** 并设 `reverse=True`：\n\n{_CODE}\n\n"
    "1. `key` 指定*按什么*比较，这里是金额。\n2. 金额相同的订单保持原来的顺序。\n\n"
    "| 调用 | 改变原列表 | 返回 |\n|---|---|---|\n| `orders.sort()` | 是 | 无 |\n| `sorted(orders)` | 否 | 新列表 |",
}

# Somebody's conversations on other platforms: whose key, person, chat, title, what was said.
_ELSEWHERE: Final = (
    ("feishu:group:ou_84aad35d084aa403", "oc_5ad11d72b830411d", "Minutes of the stand-up",
     ("@bot sum up the stand-up", "Three points: the release is on Thursday, the test server moves, Li is away.")),
    ("feishu:private:ou_c1d8f2b3a96e", "oc_a0553eda9014c201", "报销流程是什么？", ("报销流程是什么？", "在飞书审批里选择“费用报销”，附上发票即可。")),
    ("qq:group:7C1E24B9A4F0", "9C2D1B7E", "今晚打什么副本", ("今晚打什么副本", "人数够的话推荐先打新的团队副本。")),
    ("qq:private:5F02A6D1", None, "数学作业第三题", ("数学作业第三题怎么做", "先移项，再两边同时除以 3。")),
    ("onebot:group:10086", "771230", "Server rules", ("what are the rules of this server?", "Be kind, no spam.")),
)  # fmt: skip
_LOST: Final = (
    ("web", "Are you there?", "unavailable: 503 from the model's server, five times"),
    ("web", "Translate this page into English, please.", "timeout: no answer within 60 s"),
    ("web", "帮我总结一下昨天的会议", "rate_limited: 429, try again in 20 s"),
)
_UNSENT: Final = (
    ("feishu", "refused", "230002: the bot is not in this group"),
    ("qq", "expired", "the reply window has closed"),
)


async def settled(page: Page) -> None:
    """Return when nothing on the page is on its way from one look to another."""
    await page.wait_for_function(
        "() => !document.getAnimations().some((one) => one instanceof CSSTransition)"
    )


async def picture(page: Page, name: str, *, whole: bool = False) -> None:
    """Keep what the window shows, or the ``whole`` page, where pictures are wanted."""
    if PICTURES:
        await settled(page)
        await page.evaluate(_NO_FOLDERS)
        await page.screenshot(path=f"{PICTURES}/{name}.png", full_page=whole)  # Playwright makes the folder


def add_letters(record: Record) -> None:
    """Messages and replies that were given up. The first three are messages of the chat page."""
    now_ms = record.now_ms()
    for n, (account, text, reason) in enumerate(_LOST, start=1):
        message = InboundMessage(account, f"lost{n}", chat_type=ChatType.PRIVATE, sender_id="ann", text=text)
        row = {"account": account, "event_key": f"lost{n}", "lane_key": f"web:private:ann{n}", "payload": message.to_json(),
               "state": "dead", "reason": reason, "attempts": 5,
               "received_at": now_ms - n * 3_660_000, "ended_at": now_ms - n * 3_600_000}  # fmt: skip
        record.execute(insert(schema.inbox).values(**row))
    for n, (account, state, reason) in enumerate(_UNSENT, start=1):
        payload = {"chat_id": "oc_5ad11d72b830411d", "text": "The answer that nobody could be told."}
        row = {"source": f"in:{900 + n}", "kind": "answer", "part": 0, "lane_key": f"{account}:chat", "account": account,
               "payload": orjson.dumps(payload).decode(), "state": state, "attempts": n, "last_error": reason,
               "created_at": now_ms - n * 7_300_000, "ended_at": now_ms - n * 7_200_000}  # fmt: skip
        record.execute(insert(schema.outbox).values(**row))


def add_use(record: Record) -> None:
    """Three months of use by several people, less of it at weekends, and more from month to month."""
    now = datetime.now(UTC)
    kinds = (("feishu", "gpt-4o", 9, 12), ("qq", "deepseek-chat", 6, 1), ("web", "qwen-plus", 3, 2))
    for day in range(90):
        at = now - timedelta(days=day)
        quiet = 0.35 if at.weekday() >= 5 else 1.0
        for n, (platform, model, share, price) in enumerate(kinds):
            count = int(share * quiet * (130 - day + 7 * ((day * 5 + n * 3) % 7)) / 5)
            row = {"inbox_id": 10_000 + day * 10 + n, "attempt": 1, "call": 1, "platform": platform, "model": model,
                   "user_id": f"{platform}:{('ou_84aad35d', '7C1E24B9', 'ann')[n]}{day % 4 or ''}",
                   "input_tokens": count * 410, "output_tokens": count * 120, "cost_micro_usd": count * 530 * price // 3,
                   "outcome": "ok", "at": at - timedelta(minutes=n)}  # fmt: skip
            record.execute(insert(schema.usage).values(**row))
            row = {"day": at.date().isoformat(), "account": platform, "end": "answered", "shard": 99}
            record.execute(insert(schema.totals).values(**row, count=count))


def add_records(record: Record) -> None:
    """What administrators have done, and what ran by the clock."""
    now, now_ms, hour = datetime.now(UTC), record.now_ms(), 3_600_000
    for n, (who, action, target, after) in enumerate(
        (("web:ada", "account.add", "web:vic", {"role": "viewer"}),
         ("web:ada", "pause", "account:feishu", {"say": "Back at noon."}),
         ("web:ada", "resume", "account:feishu", None),
         ("feishu:ou_84aad35d084aa403", "budget.grant", "qq:7C1E24B9A4F0", {"granted_tokens": 50_000}),
         ("web:ada", "dead.retry", "in-17", None))
    ):  # fmt: skip
        row = {"at": now - timedelta(hours=50 - 9 * n), "actor": who, "action": action, "target": target,
               "after": None if after is None else orjson.dumps(after).decode()}  # fmt: skip
        record.execute(insert(schema.audit).values(**row))
    for days in range(4):
        for job, minute, error in (
            ("cleanup", 0, None),
            ("backup", 30, "no space left" if days == 2 else None),
        ):
            at = now_ms - now_ms % (24 * hour) - days * 24 * hour - 5 * hour + minute * 60_000
            row = {"job": job, "fire_time": at + 7, "node": "host-1/4711", "started_at": at,
                   "finished_at": at + 2300 + 90 * minute, "error": error}  # fmt: skip
            record.execute(insert(schema.job_runs).values(**row))


def settle_accounts(record: Record) -> None:
    """Accounts and tokens that are there for a while."""
    for days, table in ((40, schema.accounts), (12, schema.tokens)):
        record.execute(update(table).values(created_at=record.now_ms() - days * 86_400_000))


def add_budgets(record: Record) -> None:
    """Beside what was used of a budget already: that of others."""
    (known, *_) = record.rows(schema.budget_windows)
    for key, used, granted in (("feishu:ou_84aad35d084aa403", 81_250, 0), ("qq:7C1E24B9A4F0", 104_300, 50_000), ("feishu:ou_c1d8f2b3a96e", 23_870, 0)):  # fmt: skip
        row = known._asdict() | {"key": key, "used": used, "granted": granted}
        row |= {"used_micro_usd": used * 9, "used_requests": used // 530}
        record.execute(insert(schema.budget_windows).values(**row))


def _talk(text: Sequence[str]) -> list[NewMessage]:
    return [
        NewMessage(
            ("user", "assistant")[n % 2],
            words,
            3 + len(words) // 4,
            metadata_json='{"model": "gpt-4o"}' if n % 2 else None,
        )
        for n, words in enumerate(text)
    ]


async def add_talks(url: str, record: Record, name: str, language: str) -> int:
    """Conversations of an account of the chat page; returns the id of the one that is shown."""
    made: list[int] = []

    def make(tx: Any) -> None:
        for title in reversed(TALKS[language]):
            row = threads.create(tx, f"web:private:{name}", None, user_id=f"web:{name}")
            said = (QUESTION[language], ANSWER[language]) if title == TALKS[language][0] else (title, "…")
            conversations.append(tx, row["id"], _talk(said))
            threads.rename(tx, row["id"], title)
            made.append(row["id"])

    async with opened(url) as store:
        await store.run(make)
    for n, number in enumerate(reversed(made)):
        _used(record, number, n * 7 + 1)
    return made[-1]


async def add_others(url: str, record: Record) -> None:
    """Conversations on other platforms."""
    made: list[int] = []

    def make(tx: Any) -> None:
        for key, chat, title, said in _ELSEWHERE:
            platform, _, sender = key.split(":")
            row = threads.create(tx, key, None, chat_id=chat, user_id=f"{platform}:{sender}")
            conversations.append(tx, row["id"], _talk(said))
            threads.rename(tx, row["id"], title)
            made.append(row["id"])

    async with opened(url) as store:
        await store.run(make)
    for n, number in enumerate(made):
        _used(record, number, n * 3 + 2)


def _used(record: Record, number: int, hours_ago: int) -> None:
    at = datetime.now(UTC) - timedelta(hours=hours_ago)
    for table, own, instant in (
        (schema.conversations, schema.conversations.c.id, "last_activity"),
        (schema.messages, schema.messages.c.conversation_id, "timestamp"),
    ):
        record.execute(update(table).where(own == number).values({instant: at}))
