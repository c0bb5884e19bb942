"""What the pages say, in Chinese and English. The bot's own sentences are in ``texts.py``."""

from __future__ import annotations

from typing import Final, Literal

Language = Literal["zh", "en"]

WORDS: Final[dict[str, tuple[str, str]]] = {
    # shared by all pages
    "title": ("Feishu Bot", "Feishu Bot"),
    "skip": ("跳到正文", "Skip to content"),
    "other_language": ("English", "中文"),
    "theme": ("主题", "Theme"),
    "theme_auto": ("跟随系统", "System"),
    "theme_light": ("浅色", "Light"),
    "theme_dark": ("深色", "Dark"),
    "chat": ("聊天", "Chat"),
    "console": ("控制台", "Console"),
    "account": ("账号", "Account"),
    "logout": ("退出登录", "Log out"),
    "cancel": ("取消", "Cancel"),
    "close": ("关闭", "Close"),
    "failed": ("操作失败，请重试。", "That did not work, please try again."),
    "offline": ("无法连接服务器。", "The server cannot be reached."),
    "needs_javascript": (
        "此页面需要启用 JavaScript；脚本可直接使用 POST /chat。",
        "This page needs JavaScript; scripts can use POST /chat.",
    ),
    # /login
    "login": ("登录", "Log in"),
    "login_lead": ("使用管理员为您创建的账号登录。", "Use the account that your administrator has made for you."),
    "name": ("用户名", "Name"),
    "password": ("密码", "Password"),
    "login_wrong": ("用户名或密码不正确。", "The name or the password is not right."),
    "login_later": ("尝试次数过多，请在 {minutes} 分钟后再试。", "Too many attempts; try again in {minutes} minutes."),
    # a page that is not shown
    "refused": ("无法访问", "Not for you"),
    "not_found": ("没有这个页面", "There is no such page"),
    "how_first": (
        "还没有账号。请先在服务器上创建一个；没有账号时，只能在服务器本机不经代理打开 http://127.0.0.1:<端口>/ 使用聊天。",
        "There is no account yet. Add one on the server; without any, the chat answers only on that machine itself, as http://127.0.0.1:<port>/ and without a proxy before it.",
    ),
    "only_role": ("您的账号没有访问此页面的权限。", "Your account may not see this page."),
    "to_chat": ("前往聊天", "To the chat"),
    # /account
    "account_of": ("{name} 的账号", "Account of {name}"),
    "role_user": ("用户", "user"),
    "role_viewer": ("只读", "viewer"),
    "role_admin": ("管理员", "administrator"),
    "sessions": ("登录会话", "Sessions"),
    "sessions_lead": ("已登录的浏览器。不认识的请立即结束。", "Browsers that are logged in. End those you do not know."),
    "this_session": ("当前", "this one"),
    "end_session": ("结束", "End"),
    "api_tokens": ("API 令牌", "API tokens"),
    "tokens_lead": (
        "供脚本使用：Authorization: Bearer 令牌。令牌只显示一次。",
        "For scripts: Authorization: Bearer TOKEN. A token is shown once.",
    ),
    "no_tokens": ("还没有令牌。", "There is no token yet."),
    "token_label": ("用途", "What it is for"),
    "make_token": ("新建令牌", "New token"),
    "revoke": ("撤销", "Revoke"),
    "token_shown": ("请立即复制，此后不再显示：", "Copy it now, it is not shown again:"),
    "copy": ("复制", "Copy"),
    "copied": ("已复制", "Copied"),
    "last_used": ("最近使用", "Last used"),
    "change_password": ("修改密码", "Change password"),
    "old_password": ("当前密码", "Current password"),
    "new_password": ("新密码（至少 8 个字符）", "New password (at least 8 characters)"),
    "password_changed": ("密码已修改，其他会话已结束。", "The password is changed; other sessions have ended."),
    "old_wrong": ("当前密码不正确。", "The current password is not right."),
    "password_bad": ("密码须为 8 到 1000 个字符。", "A password has 8 to 1000 characters."),
}  # fmt: skip


def words(language: Language) -> dict[str, str]:
    """Return all words of a language."""
    index = 0 if language == "zh" else 1
    return {key: both[index] for key, both in WORDS.items()}
