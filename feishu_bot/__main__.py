"""The command line, where the package is installed: ``python -m feishu_bot --help``."""

from feishu_bot.cli import main

if __name__ == "__main__":
    main()
