"""The command line, from a checkout: ``python bot.py --help``."""

from feishu_bot.cli import main

if __name__ == "__main__":
    main()
