"""Commands for QQ groups of OneBot accounts: ``/poke /mute /unmute /kick /groupinfo``.

Enable it with ``plugins.enabled: [qq_group]``. ``/mute``, ``/unmute`` and ``/kick`` are for ``chat.admins`` alone;
the bot must be an administrator of the group. Whom they mean is mentioned, or named by QQ number; a mention of the
bot itself names nobody.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from feishu_bot.errors import DeliveryError
from feishu_bot.hooks import Command
from feishu_bot.model import ChatType

if TYPE_CHECKING:
    from collections.abc import Sequence

    from feishu_bot.hooks import Bot, Context

MINUTES = 10  # of /mute without a number
MAX_MINUTES = 30 * 24 * 60  # QQ's own limit
TEXTS = {
    "zh": {
        "poke": "戳一戳；不指明对象则戳您自己",
        "mute": "禁言，默认 10 分钟",
        "unmute": "解除禁言",
        "kick": "移出群聊",
        "groupinfo": "显示本群信息",
        "who": "请 @ 对方，或写出 QQ 号：{usage}",
        "minutes": "分钟数须为 1 到 {most} 的整数。",
        "groups": "此命令只能在群里使用。",
        "failed": "没有成功：{reason}",
        "poked": "已戳 {who}。",
        "muted": "已禁言 {who} {minutes} 分钟。",
        "unmuted": "已解除 {who} 的禁言。",
        "kicked": "已将 {who} 移出群聊。",
        "info": "{name}（{group}）：{count}/{most} 人",
    },
    "en": {
        "poke": "pokes somebody, or you",
        "mute": "silences a member, for 10 minutes by default",
        "unmute": "lets a member speak again",
        "kick": "removes a member from the group",
        "groupinfo": "tells about this group",
        "who": "Please mention whom you mean, or write the QQ number: {usage}",
        "minutes": "The minutes must be a whole number from 1 to {most}.",
        "groups": "This command works in groups only.",
        "failed": "It did not work: {reason}",
        "poked": "Poked {who}.",
        "muted": "{who} is silent for {minutes} minute(s).",
        "unmuted": "{who} may speak again.",
        "kicked": "{who} was removed from the group.",
        "info": "{name} ({group}): {count} of {most} members",
    },
}


async def commands(bot: Bot) -> Sequence[Command]:  # noqa: ARG001  # the signature is the hook's
    def command(name: str, run: object, alias: str, usage: str = "", *, admin_only: bool = False) -> Command:
        help_texts = {language: texts[name] for language, texts in TEXTS.items()}
        return Command(name, run, help_texts, aliases=(alias,), usage=usage, admin_only=admin_only)  # type: ignore[arg-type]

    return [
        command("poke", poke, "戳", "[@WHO]"),
        command("mute", mute, "禁言", "@WHO [MINUTES]", admin_only=True),
        command("unmute", unmute, "解除禁言", "@WHO", admin_only=True),
        command("kick", kick, "踢出", "@WHO", admin_only=True),
        command("groupinfo", groupinfo, "群信息"),
    ]


async def poke(context: Context, args: str) -> str:
    message = context.message
    who, _ = _meant(context, args)
    who = who or message.sender_id
    if message.chat_type is ChatType.GROUP:
        return await _do(context, "poked", "group_poke", who, group_id=int(message.chat_id))
    return await _do(context, "poked", "friend_poke", who)


async def mute(context: Context, args: str) -> str:
    who, rest = _meant(context, args)
    if who is None:
        return _say(context, "who", usage="/mute @WHO [MINUTES]")
    minutes = rest or str(MINUTES)
    if not (minutes.isascii() and minutes.isdecimal() and 1 <= int(minutes[:9]) <= MAX_MINUTES):
        return _say(context, "minutes", most=MAX_MINUTES)
    return await _in_group(context, "muted", "set_group_ban", who, duration=int(minutes) * 60)


async def unmute(context: Context, args: str) -> str:
    who, _ = _meant(context, args)
    if who is None:
        return _say(context, "who", usage="/unmute @WHO")
    return await _in_group(context, "unmuted", "set_group_ban", who, duration=0)


async def kick(context: Context, args: str) -> str:
    who, _ = _meant(context, args)
    if who is None:
        return _say(context, "who", usage="/kick @WHO")
    return await _in_group(context, "kicked", "set_group_kick", who, reject_add_request=False)


async def groupinfo(context: Context, args: str) -> str:  # noqa: ARG001  # the signature is a command's
    message = context.message
    if message.chat_type is not ChatType.GROUP:
        return _say(context, "groups")
    try:
        found = await context.bot.call(message, "get_group_info", group_id=int(message.chat_id))
    except (DeliveryError, ValueError) as error:
        return _say(context, "failed", reason=str(error))
    data = found if isinstance(found, dict) else {}
    return _say(
        context,
        "info",
        name=data.get("group_name", "?"),
        group=message.chat_id,
        count=data.get("member_count", "?"),
        most=data.get("max_member_count", "?"),
    )


def _meant(context: Context, args: str) -> tuple[str | None, str]:
    """Return the QQ number of whom a command means, and what else stands behind it.

    Mentions count before numbers: ``/mute @Ann 60`` silences Ann for an hour, not member 60.
    """
    words = [word for word in args.split() if not word.startswith("@")]
    people = [
        mention.id for mention in context.message.mentions if not mention.is_bot and mention.id.isdecimal()
    ]
    if people:
        return people[0], words[0] if words else ""
    if words and words[0].isascii() and words[0].isdecimal():
        return words[0], words[1] if len(words) > 1 else ""
    return None, words[0] if words else ""


async def _in_group(context: Context, done: str, action: str, who: str, **params: object) -> str:
    if context.message.chat_type is not ChatType.GROUP:
        return _say(context, "groups")
    group = int(context.message.chat_id) if context.message.chat_id.isdecimal() else 0
    return await _do(context, done, action, who, group_id=group, **params)


async def _do(context: Context, done: str, action: str, who: str, **params: object) -> str:
    try:
        await context.bot.call(context.message, action, user_id=int(who), **params)
    except (DeliveryError, ValueError) as error:
        return _say(context, "failed", reason=str(error))
    minutes = params.get("duration")
    return _say(context, done, who=who, minutes=minutes // 60 if isinstance(minutes, int) else 0)


def _say(context: Context, key: str, **values: object) -> str:
    return TEXTS[context.language][key].format(**values)
