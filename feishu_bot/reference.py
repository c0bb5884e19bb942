"""Write what is made from the code: ``config.yaml`` and ``docs/configuration.md``.

``python -m feishu_bot.reference [FOLDER]``, from the top of the source tree.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from feishu_bot.config import commented_config, configuration_page
from feishu_bot.platforms.base import platform_types

if TYPE_CHECKING:
    from feishu_bot.config import PlatformSettings


def platform_settings() -> dict[str, type[PlatformSettings]]:
    """Return the settings class of every platform type of this package."""
    return {name: platform.settings_type for name, platform in sorted(platform_types().items())}


def pages() -> dict[str, str]:
    """Return the files, by their path in the source tree."""
    known = platform_settings()
    return {"config.yaml": commented_config(known), "docs/configuration.md": configuration_page(known)}


def main(arguments: list[str]) -> None:
    folder = Path(arguments[0] if arguments else ".")
    for path, text in pages().items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
