"""The chat commands that show and change conversations: each within the chat it is typed in."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from feishu_bot.commands import RETRY
from feishu_bot.groups import is_shared
from feishu_bot.hooks import Command, Reply
from feishu_bot.model import ChatType, make_key, scope_key, spans_chats
from feishu_bot.store import conversations, threads
from feishu_bot.store.changes import last_message
from feishu_bot.store.history import speaker_of
from feishu_bot.store.search import search_messages
from feishu_bot.texts import help_of, one_line, say

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from feishu_bot.config.settings import ChatSettings
    from feishu_bot.hooks import Context
    from feishu_bot.store.store import Store
    from feishu_bot.store.work import StoredRow

LISTED: Final = 10  # conversations of /threads, hits of /search
MAX_TITLE: Final = 100  # characters
MAX_FORKED: Final = 5000  # messages that one command copies: no other message is stored meanwhile
MAX_EXPORTED: Final = 12_000  # characters of /export; more is for `bot.py export` and the page
_SHOWN: Final = 60  # characters of a title or a hit


class ConversationCommands:
    """``/threads /switch /rename /fork /undo /retry /search /export /stats /whoami``.

    ``tenant`` returns the tenant of an account; ``chat`` the settings as they are now.
    """

    def __init__(self, store: Store, tenant: Callable[[str], str], chat: Callable[[], ChatSettings]) -> None:
        self._store = store
        self._tenant = tenant
        self._chat = chat

    def commands(self) -> Sequence[Command]:
        """Return them, in the order of ``/help``."""
        return (
            Command("threads", self._threads, help_of("threads"), aliases=("对话列表",)),
            Command("switch", self._switch, help_of("switch"), aliases=("切换",), usage="ID"),
            Command("rename", self._rename, help_of("rename"), aliases=("改名",), usage="TITLE"),
            Command("fork", self._fork, help_of("fork"), aliases=("分叉",), usage="[N]"),
            Command("undo", self._undo, help_of("undo"), aliases=("撤销",)),
            Command(RETRY, self._retry, help_of(RETRY), aliases=("重试",)),
            Command("search", self._search, help_of("search"), aliases=("搜索",), usage="TEXT"),
            Command("export", self._export, help_of("export"), aliases=("导出",)),
            Command("stats", self._stats, help_of("stats"), aliases=("统计",)),
            Command("whoami", self._whoami, help_of("whoami"), aliases=("我是谁",)),
        )

    # ------------------------------------------------------------------------------------ which is current

    async def _threads(self, context: Context, args: str) -> Reply:
        language = context.language
        refused = self._refused(context, "threads", args) or self._elsewhere(context)
        if refused:
            return Reply(refused)
        rows = await self._list(context)
        if not rows:
            return Reply(say(language, "history_empty"))
        current = context.conversation.id if context.conversation else None
        lines = [say(language, "threads_title", prefix=self._prefix)]
        lines += [self._line(context, row, is_current=row["id"] == current) for row in rows]
        return Reply("\n".join(lines))

    def _line(self, context: Context, row: StoredRow, *, is_current: bool) -> str:
        language = context.language
        return say(
            language,
            "threads_line",
            id=row["id"],
            title=_titled(row, language),
            count=row["message_count"],
            at=context.bot.local_time(_milliseconds(row["last_activity"])),
            mark=say(language, "threads_current") if is_current else "",
        )

    async def _switch(self, context: Context, args: str) -> Reply:
        language = context.language
        refused = self._spanning(context) or self._elsewhere(context)
        if refused:
            return Reply(refused)
        wanted = args.lstrip("#")
        if not (wanted.isdecimal() and wanted.isascii() and len(wanted) <= 16):  # noqa: PLR2004  # below 2^53
            return Reply(say(language, "switch_usage", prefix=self._prefix))
        if context.conversation is not None and context.conversation.id == int(wanted):
            return Reply(say(language, "switch_same"))
        rows = await self._list(context, only=int(wanted))
        if not rows:
            return Reply(say(language, "switch_unknown", id=wanted, prefix=self._prefix))
        title = _titled(rows[0], language)
        return Reply(say(language, "switched", title=title), change="switch", detail=int(wanted))

    async def _rename(self, context: Context, args: str) -> Reply:
        language = context.language
        title = " ".join(args.split())
        if not title or len(title) > MAX_TITLE:
            return Reply(say(language, "rename_usage", prefix=self._prefix, most=MAX_TITLE))
        if context.conversation is None:
            return Reply(say(language, "history_empty"))
        return Reply(say(language, "renamed", title=title), change="rename", detail=title)

    async def _fork(self, context: Context, args: str) -> Reply:
        language = context.language
        refused = self._spanning(context) or self._elsewhere(context)
        if refused:
            return Reply(refused)
        if args and not (args.isdecimal() and args.isascii() and 1 <= len(args) <= 2):  # noqa: PLR2004
            return Reply(say(language, "fork_usage", prefix=self._prefix))
        if context.conversation is None or not context.history:
            return Reply(say(language, "history_empty"))
        if context.conversation.message_count > MAX_FORKED:
            return Reply(say(language, "fork_too_long", most=MAX_FORKED))
        left = int(args or 0)
        starts = [message.seq for message in context.history if message.role == "user"]
        if left > len(starts):
            return Reply(say(language, "fork_fewer", turns=len(starts)))
        upto = starts[-left] - 1 if left else context.history[-1].seq
        cid = context.conversation.id
        if await self._store.read(lambda tx: last_message(tx, cid, upto=upto)) is None:
            return Reply(say(language, "fork_nothing", prefix=self._prefix))
        return Reply(say(language, "forked", turns=left), change="fork", detail=upto)

    # --------------------------------------------------------------------------------------- the last turn

    async def _undo(self, context: Context, args: str) -> Reply:
        language = context.language
        refused = self._refused(context, "undo", args)
        if refused:
            return Reply(refused)
        last = next((said for said in reversed(context.history) if said.role == "user"), None)
        if last is None:
            return Reply(say(language, "history_empty"))
        return Reply(
            say(language, "undone", text=one_line(last.content, _SHOWN)), change="cut", detail=last.seq - 1
        )

    async def _retry(self, context: Context, args: str) -> Reply:
        """Tell why there is nothing to answer anew: where there is, this message became the question."""
        return Reply(self._refused(context, RETRY, args) or say(context.language, "history_empty"))

    # -------------------------------------------------------------------------------------- what is stored

    async def _search(self, context: Context, args: str) -> Reply:
        language = context.language
        refused = self._spanning(context)
        if refused:
            return Reply(refused)
        if not args:
            return Reply(say(language, "search_usage", prefix=self._prefix))
        owner, tenant = self._owner(context), self._tenant(context.message.account)
        hits = await self._store.read(
            lambda tx: search_messages(
                tx.connection, tx.kind, args, owner=owner, tenant_id=tenant, limit=LISTED
            )
        )
        if not hits:
            return Reply(say(language, "search_nothing", text=one_line(args, _SHOWN)))
        lines = [say(language, "search_title", text=one_line(args, _SHOWN))]
        for hit in hits:
            at = context.bot.local_time(_milliseconds(datetime.fromisoformat(hit["timestamp"])))
            who = say(language, "said_by_user" if hit["role"] == "user" else "said_by_bot")
            lines.append(
                say(language, "search_line", id=hit["conversation_id"], at=at, who=who, text=hit["snippet"])
            )
        return Reply("\n".join(lines))

    async def _export(self, context: Context, args: str) -> Reply:
        language = context.language
        refused = self._nothing(context, "export", args)
        if refused or context.conversation is None:
            return Reply(refused)
        cid = context.conversation.id
        rows = await self._store.read(lambda tx: conversations.page_back(tx, cid))
        said: list[str] = []
        room = MAX_EXPORTED
        for row in rows:
            if row["role"] not in {"user", "assistant"} or row["recalled_at"] is not None:
                continue
            who = say(language, "said_by_user" if row["role"] == "user" else "said_by_bot")
            if row["role"] == "user":
                who = speaker_of(row["metadata_json"]) or who
            block = f"**{who}** {context.bot.local_time(_milliseconds(row['timestamp']))}\n\n{row['content']}"
            room -= len(block)
            if room < 0:
                break
            said.append(block)
        if not said:
            return Reply(say(language, "history_empty"))
        title = context.conversation.title or say(language, "untitled")
        left_out = context.conversation.message_count > len(said)
        note = [say(language, "export_newest", count=len(said))] if left_out else []
        return Reply("\n\n".join([f"# {title}", *note, *reversed(said)]))

    async def _stats(self, context: Context, args: str) -> Reply:
        language = context.language
        refused = self._nothing(context, "stats", args)
        if refused or context.conversation is None:
            return Reply(refused)
        cid = context.conversation.id
        row = await self._store.read(lambda tx: conversations.get(tx, cid))
        return Reply(
            say(
                language,
                "stats",
                title=_titled(row, language),
                count=row["message_count"],
                tokens=row["total_tokens"],
                since=context.bot.local_time(_milliseconds(row["created_at"])),
                last=context.bot.local_time(_milliseconds(row["last_activity"])),
            )
        )

    async def _whoami(self, context: Context, args: str) -> Reply:
        language, message = context.language, context.message
        if args:
            return Reply(say(language, "command_no_arguments", command=f"{self._prefix}whoami"))
        return Reply(
            say(
                language,
                "whoami",
                name=message.sender_name or message.sender_id,
                person=message.person,
                user_key=message.user_key,
                chat=message.chat_id or "–",
                role=say(language, "role_admin" if context.is_admin else "role_user"),
            )
        )

    # ------------------------------------------------------------------------------------------ what is own

    @property
    def _prefix(self) -> str:
        return self._chat().command_prefix

    def _refused(self, context: Context, name: str, args: str) -> str:
        """Return why a command without arguments cannot be obeyed here; empty where it can."""
        if args:
            return say(context.language, "command_no_arguments", command=self._prefix + name)
        return self._spanning(context)

    def _nothing(self, context: Context, name: str, args: str) -> str:
        """Return why a command without arguments has nothing to show here; empty where there is a conversation."""
        empty = "" if context.conversation else say(context.language, "history_empty")
        return self._refused(context, name, args) or empty

    def _spanning(self, context: Context) -> str:
        """Refuse in a group what holds words of other groups."""
        if spans_chats(context.message, context.scope):
            return say(context.language, "history_spans")
        return ""

    def _elsewhere(self, context: Context) -> str:
        """Refuse at a door that names its conversations itself."""
        return say(context.language, "threads_on_page") if context.message.conversation else ""

    def _owner(self, context: Context) -> tuple[str, str | None]:
        """Return the user key, and in a group the chat, whose conversations belong to where this is typed."""
        message = context.message
        if is_shared(message, context.scope):
            return make_key(message.account, "chat", message.chat_id), message.chat_id
        is_private = message.chat_type is ChatType.PRIVATE
        return message.user_key, None if is_private else message.chat_id

    async def _list(self, context: Context, *, only: int | None = None) -> list[StoredRow]:
        lane = scope_key(context.message, context.scope)
        owner, tenant = self._owner(context), self._tenant(context.message.account)
        return await self._store.read(
            lambda tx: threads.of_chat(tx, lane, owner, tenant_id=tenant, limit=LISTED, only=only)
        )


def _milliseconds(instant: datetime) -> int:
    return int((instant if instant.tzinfo else instant.replace(tzinfo=UTC)).timestamp() * 1000)


def _titled(row: StoredRow, language: str) -> str:
    return one_line(row["title"] or say(language, "untitled"), _SHOWN)
