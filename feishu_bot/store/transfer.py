"""Conversations out of a database and into one: what the library and the commands use."""

from feishu_bot.store.exports import Exported, export_all, export_conversation, iter_messages, write_all
from feishu_bot.store.imports import Imported, import_all, import_conversation

__all__ = [
    "Exported",
    "Imported",
    "export_all",
    "export_conversation",
    "import_all",
    "import_conversation",
    "iter_messages",
    "write_all",
]
