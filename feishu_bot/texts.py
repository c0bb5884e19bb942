"""The bot's own sentences, in Chinese and English."""

from __future__ import annotations

from typing import Final

TEXTS: Final[dict[str, dict[str, str]]] = {
    "zh": {
        "error": "抱歉，处理您的消息时出现了问题，请稍后重试。",
        "too_long": "您的消息有 {tokens} 个 token，超过了上限 {limit}。请缩短后再发。",
        "cannot_read": "抱歉，我目前只能阅读文字消息。请用文字告诉我您的问题；发送 {prefix}help 查看可用命令。",
        "bare_mention": "我在。请在 @ 我之后写下您的问题；发送 {prefix}help 查看可用命令。",
        "no_access": "抱歉，您没有使用本机器人的权限。如需使用，请联系管理员。",
        "budget": "您的额度已不足：预算「{budget}」已用 {used}，上限 {limit} 个 token。{ends}命令仍可使用。",
        "budget_ends": "额度将于 {at} 恢复。",
        "expired": "服务曾中断，有 {count} 条较早的消息未能回复。如仍需要，请重新发送。",
        "unknown_command": "未知命令：{command}。{nearest}发送 {prefix}help 查看可用命令。",
        "nearest": "您是想输入 {command} 吗？",
        "admins_only": "此命令仅限管理员使用。",
        "ai_off": "当前未启用模型，只能使用命令。发送 {prefix}help 查看可用命令。",
        "command_failed": "执行命令 {command} 时出现了问题，请稍后重试。",
    },
    "en": {
        "error": "Sorry, something went wrong with your message. Please try again later.",
        "too_long": "Your message has {tokens} tokens; the limit is {limit}. Please send a shorter one.",
        "cannot_read": "Sorry, I can only read text. Please write your question; {prefix}help lists what I can do.",
        "bare_mention": "I am here. Please write your question after the mention; {prefix}help lists what I can do.",
        "no_access": "Sorry, you may not use this bot. Please ask its administrator.",
        "budget": "Not enough of your budget is left: “{budget}” has used {used} of {limit} tokens. {ends}"
        "Commands keep working.",
        "budget_ends": "It is renewed at {at}. ",
        "expired": "The service was interrupted; {count} older message(s) were not answered. "
        "Please send them again if you still need an answer.",
        "unknown_command": "Unknown command: {command}. {nearest}{prefix}help lists all commands.",
        "nearest": "Did you mean {command}? ",
        "admins_only": "Only administrators may use this command.",
        "ai_off": "No model is enabled; only commands work. {prefix}help lists them.",
        "command_failed": "Something went wrong while running {command}. Please try again later.",
    },
}


def say(language: str, key: str, **values: object) -> str:
    """Return a sentence with its values filled in."""
    return TEXTS[language][key].format(**values)
