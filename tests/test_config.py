from __future__ import annotations

from datetime import timedelta
from ipaddress import ip_network
from pathlib import Path
from typing import ClassVar

import orjson
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import Field, SecretStr

from feishu_bot.config import (
    AISettings,
    BotSettings,
    BudgetSettings,
    ChatSettings,
    HttpUrl,
    PlatformSettings,
    Secrets,
    check_cron,
    commented_config,
    configuration_page,
    database_from,
    format_duration,
    load,
    parse_duration,
)
from feishu_bot.errors import ConfigError
from feishu_bot.model import Scope
from feishu_bot.reference import pages, platform_settings

ROOT = Path(__file__).parent.parent


class PageSettings(PlatformSettings):
    enabled: bool = True


class AppSettings(PlatformSettings):
    builtin: ClassVar = {"app_id": "${APP_ID:-}", "app_secret": "${APP_SECRET:-}"}

    app_id: str = ""
    app_secret: Secrets = Secrets()
    pin: SecretStr | None = None
    token_url: HttpUrl = "https://host/token"
    self_ids: tuple[str, ...] = Field((), description="more")

    def missing(self):
        keys = [] if self.app_id else ["app_id"]
        return keys if self.app_secret or self.insecure else [*keys, "app_secret"]


TYPES = {"page": PageSettings, "app": AppSettings}


@pytest.fixture
def read(tmp_path):
    def _read(text=None, environ=None, *, dotenv=None, overrides=None):
        path = None
        if text is not None:
            path = "config.yaml"
            data = text.encode() if isinstance(text, str) else text
            (tmp_path / path).write_bytes(data)
        if dotenv is not None:
            (tmp_path / ".env").write_text(dotenv)
        return load(
            path, platform_settings=TYPES, environ=environ or {}, overrides=overrides, folder=tmp_path
        )

    return _read


@pytest.fixture
def mistakes(read):
    def _mistakes(*args, **kwargs):
        with pytest.raises(ConfigError) as caught:
            read(*args, **kwargs)
        assert all("\n" not in line and "Traceback" not in line for line in caught.value.mistakes)
        return caught.value.mistakes

    return _mistakes


# -------------------------------------------------------------------------------------------- the tree


def test_the_defaults_are_those_that_are_promised():
    tree = BotSettings()
    assert (tree.server.host, tree.server.port, tree.server.max_body_bytes) == ("127.0.0.1", 8080, 1048576)
    assert (tree.server.max_waiting, tree.server.max_waiting_age_s, tree.server.min_free_mb) == (
        10000,
        300,
        200,
    )
    assert ip_network("::1/128") in tree.server.private_networks
    assert (tree.chat.language, tree.chat.command_prefix, tree.chat.scope) == ("zh", "/", Scope.USER_IN_CHAT)
    assert (tree.chat.max_message_length, tree.chat.max_input_tokens) == (4000, 4000)
    assert tree.chat.answer_within == timedelta(hours=6)
    assert (tree.access.default, tree.access.outsiders) == ("allow", "ignore")
    assert (tree.ai.enabled, tree.ai.model, tree.ai.max_output_tokens, tree.ai.timeout_s) == (
        True,
        "echo",
        1024,
        60,
    )
    store = tree.ai.conversation_persistence
    assert (store.db_url, store.cleanup_days) == ("sqlite:///data/conversations.db", 30)
    assert (store.max_history_turns, store.max_history_tokens, store.auto_migrate) == (20, 8000, True)
    assert tree.budgets == (
        BudgetSettings(name="daily-user", scope="user", window="day", limit_tokens=100000),
    )
    assert tree.budget_margin == 1.15
    assert (tree.schedule.timezone, tree.schedule.cleanup.cron) == ("Asia/Shanghai", "0 3 * * *")
    assert (tree.plugins.directory, tree.plugins.enabled) == ("plugins", ("hello",))
    assert (tree.logging.level, tree.logging.format) == ("INFO", "console")


def test_a_tree_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        ChatSettings().language = "en"


@pytest.mark.parametrize("text", ["90s", "30m", "6h", "2d", "1s"])
def test_a_duration_is_written_as_it_is_read(text):
    assert format_duration(parse_duration(text)) in {text, "90s"}


@pytest.mark.parametrize("text", ["", "6", "6 hours", "-1h", "0s", "1.5h", "999999999d", "٣h", 6, None])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match=r"duration|long"):
        parse_duration(text)


@pytest.mark.parametrize(
    "line", ["0 3 * * *", "*/5 0-6/2 1,15 jan-mar MON-fri", "59 23 31 12 7", "0 0 * * 0", "0 0 * * 5-7"]
)
def test_a_crontab_line_is_taken(line):
    assert check_cron(line) == line


@pytest.mark.parametrize(
    "line",
    ["", "* * * *", "* * * * * *", "60 * * * *", "* 24 * * *", "* * 0 * *", "* * * 13 *", "* * * * 8", "*/0 * * * *",
     "5/2 * * * *", "5-1 * * * *", "a * * * *", "1, * * * *", "-1 * * * *", "@daily", "* * * * funday"],
)  # fmt: skip
def test_what_is_no_crontab_line_is_refused(line):
    with pytest.raises(ValueError, match="field"):
        check_cron(line)


def test_secrets_are_hidden_in_every_form_of_a_tree():
    ai = AISettings(api_key=["old-sekret", "new-sekret"])
    assert ai.api_key.values() == ("old-sekret", "new-sekret")
    assert ai.api_key.current == "old-sekret"
    for text in (repr(ai), str(ai), ai.model_dump_json(), str(ai.model_dump()), f"{ai.api_key}"):
        assert "sekret" not in text


@pytest.mark.parametrize("value", [None, "", [], [""]])
def test_no_secret_is_false(value):
    assert not AISettings(api_key=value).api_key
    assert not AISettings(api_key=value).api_key.current


def test_a_library_user_who_passes_a_wrong_value_does_not_see_his_secret():
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is what is looked at
        AISettings(api_key={"sekret": 1}, timeout_s="sekret")
    assert "sekret" not in str(caught.value)


# ------------------------------------------------------------------------------------------ the sources


def test_without_a_file_the_defaults_run_and_say_so(read):
    loaded = read()
    assert loaded.path is None
    assert "no config.yaml" in loaded.warnings[0]
    assert loaded.settings.platforms["page"].enabled
    assert not loaded.settings.platforms["app"].enabled


def test_a_file_that_was_asked_for_must_exist(tmp_path):
    with pytest.raises(ConfigError, match=r"other\.yaml: cannot be read: no such file"):
        load("other.yaml", platform_settings=TYPES, environ={}, folder=tmp_path)


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "---\n", "null\n", "\ufeffchat:\n", "chat: {}\nplatforms:\n"]
)
def test_an_empty_file_means_the_defaults(read, text):
    assert read(text).settings.chat == ChatSettings()


def test_each_source_wins_over_the_one_below(read):
    file = "server: {port: 1}\n"
    name = "FEISHU_BOT__SERVER__PORT"
    assert read(file).settings.server.port == 1
    assert read(file, dotenv=f"{name}=2").settings.server.port == 2
    assert read(file, {name: "3"}).settings.server.port == 3
    loaded = read(file, {name: "3"}, overrides={"server.port": 0, "server.host": None})
    assert loaded.settings.server.port == 0
    assert loaded.settings.server.host == "127.0.0.1"


def test_every_value_tells_where_it_comes_from(read):
    loaded = read(
        "server:\n  port: 1\nplatforms:\n  app:\n    self_ids: [a]\n",
        {"FEISHU_BOT__CHAT__LANGUAGE": "en", "APP_ID": "cli"},
        dotenv="FEISHU_BOT__CHAT__SCOPE=chat\nAPP_SECRET=x",
        overrides={"server.host": "::1"},
    )
    assert loaded.origin("server.port") == "config.yaml:2"
    assert loaded.origin("server.host") == "command line"
    assert loaded.origin("chat.language") == "environment FEISHU_BOT__CHAT__LANGUAGE"
    assert loaded.origin("chat.scope") == ".env FEISHU_BOT__CHAT__SCOPE"
    assert loaded.origin("platforms.app.self_ids") == "config.yaml:5"
    assert loaded.origin("platforms.app.app_id") == "environment APP_ID"
    assert loaded.origin("platforms.app.app_secret") == ".env APP_SECRET"
    assert loaded.origin("chat.admins") == "default"


def test_variables_in_values_are_replaced(read):
    text = "server: {port: '${PORT:-81}', host: \"${HOST}\"}\nai: {system_prompt: 'a $${X} ${A:-}${A:-b}!'}\n"
    settings = read(text, {"HOST": "h", "A": ""}).settings
    assert (settings.server.port, settings.server.host) == (81, "h")
    assert settings.ai.system_prompt == "a ${X} b!"


@pytest.mark.parametrize(
    "value", ["x\nserver: {port: 1}", "}, port: 1, {", "[1, 2]", "a: b", "&a *a !!x", "# no", "'"]
)
def test_a_variable_never_becomes_structure(read, value):
    settings = read("server: {host: '${X}'}\nai:\n  system_prompt: ${X}\n", {"X": value}).settings
    assert settings.server.host == settings.ai.system_prompt == value
    assert settings.server.port == 8080


def test_a_variable_that_is_not_set_is_a_mistake_with_its_line(mistakes):
    assert mistakes("chat:\n  admins:\n    - ${WHO}\n")[0].startswith(
        "config.yaml:3:7: chat.admins.0: the environment variable WHO is not set; expected"
    )
    assert "a ${ that cannot be read" in mistakes("ai: {system_prompt: 'hello ${a b}'}")[0]


def test_a_dotenv_file_is_read_as_shells_do(read):
    dotenv = '# comment\nexport A=one # two\nB=\'x # ${y}\'\nC="l\\n\\"q\\"" # c\nD=\n E = e#f \nF=#'
    text = "chat: {admins: ['${A}', '${B}', \"${C}\", '${E}', 'd${D}', 'f${F}']}"
    assert read(text, dotenv=dotenv).settings.chat.admins == ("one", "x # ${y}", 'l\n"q"', "e#f", "d", "f")


def test_a_line_of_dotenv_that_cannot_be_read_is_told_without_its_text(mistakes):
    lines = mistakes("{}", dotenv="A=1\nsekret\nB='sekret\n")
    assert lines == [
        ".env:2:1: cannot be read; expected KEY=VALUE",
        ".env:3:1: a quote that does not end in this line; expected KEY=VALUE",
    ]


def test_overrides_find_keys_without_regard_to_case_and_dashes(read):
    file = "platforms:\n  my-bot: {type: app}\n  a__b: {type: page}\nbudgets: [{name: a, limit_tokens: 1}]\n"
    settings = read(
        file,
        {
            "FEISHU_BOT__PLATFORMS__MY_BOT__TENANT": "t1",
            "feishu_bot__platforms__a__b__tenant": "t2",
            "FEISHU_BOT__PLATFORMS__NEW__TYPE": "page",
            "FEISHU_BOT__BUDGETS__0__LIMIT_TOKENS": "7",
            "FEISHU_BOT__AI__CONVERSATION_PERSISTENCE__CLEANUP_DAYS": "0",
            "FEISHU_BOT__CHAT": "{language: en, admins: [a]}",
            "FEISHU_BOT__CHAT__ADMINS": "[b, c]",
            "FEISHU_BOT__PLUGINS__SETTINGS__HELLO__GREETING": "5",
        },
    ).settings
    assert settings.platforms["my-bot"].tenant == "t1"
    assert settings.platforms["a__b"].tenant == "t2"
    assert settings.platforms["new"].type == "page"
    assert settings.budgets[0].limit_tokens == 7
    assert settings.ai.conversation_persistence.cleanup_days == 0
    assert (settings.chat.language, settings.chat.admins) == ("en", ("b", "c"))
    assert settings.plugins.settings == {"hello": {"greeting": 5}}


@pytest.mark.parametrize(
    "secret", ["012345", "a: b #c", "@abc%", "{x", "!x", "*x", "- x", "1e3", "x'y", "tab\tx"]
)
def test_a_secret_is_taken_from_a_variable_as_it_is(read, secret):
    name = "FEISHU_BOT__PLATFORMS__APP__APP_SECRET"
    assert read("{}", {name: secret}).settings.platforms["app"].app_secret.values() == (secret,)
    assert read("{}", {name: "[a, 012]"}).settings.platforms["app"].app_secret.values() == ("a", "012")
    assert read("{}", {"APP_SECRET": secret}).settings.platforms["app"].app_secret.values() == (secret,)


def test_a_text_keeps_its_digits_and_words(read):
    text = "platforms: {app: {app_id: 0123, app_secret: [no, 1e5], self_ids: [10001, 0x1F]}}\nserver: {host: 0777}"
    account = read(text).settings.platforms["app"]
    assert account.app_id == "0123"
    assert account.app_secret.values() == ("no", "1e5")
    assert account.self_ids == ("10001", "0x1F")


def test_a_plugins_own_settings_keep_their_types(read):
    text = (
        "plugins: {settings: {p: {a: 1, b: 1.5, c: yes, d: null, e: '1', f: [x, -2], g: 1:30, h: {}, i: +x}}}"
    )
    assert read(text).settings.plugins.settings["p"] == {
        "a": 1, "b": 1.5, "c": True, "d": None, "e": "1", "f": ["x", -2], "g": "1:30", "h": {}, "i": "+x"
    }  # fmt: skip


def test_anchors_and_merge_keys_work(read):
    text = "platforms:\n  one: &base {type: app, tenant: t}\n  two: {<<: *base, app_id: x}\n"
    accounts = read(text).settings.platforms
    assert (accounts["two"].type, accounts["two"].tenant, accounts["two"].app_id) == ("app", "t", "x")


def test_relative_paths_begin_at_the_files_folder(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.yaml").write_text(
        "platforms: {app: {network: {ca_file: ca.pem}}}\nnetwork: {ca_file: /x}"
    )
    loaded = load("deep/c.yaml", platform_settings=TYPES, environ={}, folder=tmp_path)
    settings, folder = loaded.settings, tmp_path / "deep"
    assert settings.ai.conversation_persistence.db_url == f"sqlite:///{folder}/data/conversations.db"
    assert settings.plugins.directory == f"{folder}/plugins"
    assert settings.network.ca_file == "/x"
    assert settings.platforms["app"].network.ca_file == f"{folder}/ca.pem"


# ------------------------------------------------------------------------------- the database's variables

DATABASE_VARIABLES = [
    ("FEISHU_BOT__AI__CONVERSATION_PERSISTENCE__DB_URL", "sqlite:////a", "sqlite:////a"),
    ("CONVERSATION_DB_URL", "postgresql://u:p@h/b", "postgresql://u:p@h/b"),
    ("DATABASE_PATH", "/c", "sqlite:////c"),
    ("DB_BACKEND", "postgresql", "postgresql://me:p%40s%2Fs@db:5433/bot"),
    ("CONVERSATION_DATA_DIR", "/e", "sqlite:////e/conversations.db"),
]
DETAILS = {"DB_HOST": "db", "DB_PORT": "5433", "DB_NAME": "bot", "DB_USER": "me", "DB_PASSWORD": "p@s/s"}


@pytest.mark.parametrize("count", range(1, 6))
def test_the_databases_variables_win_in_their_order_over_the_file(read, count):
    chosen = DATABASE_VARIABLES[-count:]
    environ = {name: value for name, value, _ in chosen} | DETAILS
    loaded = read("ai: {conversation_persistence: {db_url: 'sqlite:////file'}}", environ)
    assert loaded.settings.ai.conversation_persistence.db_url == chosen[0][2]
    assert loaded.origin("ai.conversation_persistence.db_url") == f"environment {chosen[0][0]}"


def test_details_of_a_backend_are_read_only_with_it(read):
    assert read("{}", DETAILS).origin("ai.conversation_persistence.db_url") == "default"


def test_a_password_of_the_backend_may_lie_in_dotenv(read):
    settings = read(
        "{}", {"DB_BACKEND": "mariadb", "DB_USER": "u"}, dotenv="DB_PASSWORD=x\nDB_NAME=n"
    ).settings
    assert settings.ai.conversation_persistence.db_url == "mariadb://u:x@localhost/n"


def test_memory_is_taken_with_a_warning(read):
    loaded = read("{}", {"DATABASE_PATH": ":memory:"})
    assert loaded.settings.ai.conversation_persistence.db_url == "sqlite:///:memory:"
    assert "in memory" in loaded.warnings[0]


@pytest.mark.parametrize("backend", ["mock", "oracle"])
def test_a_backend_that_is_none_for_a_server_is_refused(mistakes, backend):
    line = mistakes("{}", {"DB_BACKEND": backend})[0]
    assert line.startswith(
        "environment DB_BACKEND: ai.conversation_persistence.db_url: not the URL of a database"
    )


def test_persistence_is_switched_by_the_seeds_variable(read):
    assert (
        read("{}", {"ENABLE_DB_PERSISTENCE": "false"}).settings.ai.conversation_persistence.enabled is False
    )
    assert read("{}", {"ENABLE_DB_PERSISTENCE": ""}).settings.ai.conversation_persistence.enabled is True


def test_pool_sizes_are_handed_to_who_asks():
    found = database_from({"DB_BACKEND": "mock", "DB_POOL_SIZE": "5", "DB_MAX_OVERFLOW": "x"})
    assert (found.url, found.pool_size, found.max_overflow) == ("mock", 5, None)
    assert database_from({}) is None


# ---------------------------------------------------------------------------------------------- mistakes


def test_all_mistakes_are_told_at_once_with_line_key_value_and_expectation(mistakes):
    text = """\
server:
  port: eighty
  prot: 3
  port: 99
chat:
  scope: user_in_chatt
  answer_within: 6 hours
budgets:
  - {name: b, limit_tokens: -1}
  - {window: day}
schedule: {timezone: Asia/Shangai}
platforms:
  Feishu: {}
  my: {type: ap}
plugins: [a]
"""
    lines = mistakes(text, {"FEISHU_BOT__SERVR__HOST": "x", "FEISHU_BOT__SERVER__MAX_WAITING": "many"})
    assert lines == [
        "config.yaml:2:3: server.port: not a whole number (got 'eighty'); expected a whole number from 0 to 65535",
        "config.yaml:3:3: server.prot: unknown key; did you mean port?",
        "config.yaml:4:3: server.port: duplicate key, first in line 2",
        (
            "config.yaml:6:3: chat.scope: not one of the choices (got 'user_in_chatt'); expected one of user, "
            "user_in_chat, chat, thread; did you mean user_in_chat?"
        ),
        (
            "config.yaml:7:3: chat.answer_within: not a duration with its unit (got '6 hours'); expected a duration such "
            "as 90s, 30m, 6h or 2d, or null"
        ),
        "config.yaml:9:15: budgets.0.limit_tokens: too small (got '-1'); expected a whole number of at least 1, or null",
        "config.yaml:10:5: budgets.1.name: missing; expected a short name",
        (
            "config.yaml:11:12: schedule.timezone: not a time zone (got 'Asia/Shangai'); expected a time zone such as "
            "Asia/Shanghai or UTC"
        ),
        (
            "config.yaml:13:3: platforms.Feishu: not a name for an account; expected a-z, 0-9, _ and -, at most 32 "
            "characters"
        ),
        (
            "config.yaml:14:8: platforms.my.type: not a platform that is known (got 'ap'); expected one of app, page; did "
            "you mean app?"
        ),
        "config.yaml:15:1: plugins: the wrong kind of value (got a list); expected a section (lines of key: value)",
        "environment FEISHU_BOT__SERVR__HOST: servr: unknown key; did you mean server?",
        (
            "environment FEISHU_BOT__SERVER__MAX_WAITING: server.max_waiting: not a whole number (got 'many'); expected a "
            "whole number of at least 1"
        ),
    ]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("server: {port: 65536}", "too large (got '65536')"),
        ("server: {port: true}", "not a whole number (got 'true')"),
        ("server: {port: 1.5}", "not a whole number"),
        ("server: {port: null}", "not a whole number"),
        ("budget_margin: nan", "not a finite number"),
        ("chat: {command_prefix: ''}", "expected 1 to 8 characters"),
        ("chat: {enable_private: 3}", "expected true or false"),
        ("chat: {admins: x}", "expected a list; each: a text that is not empty"),
        ("server: {private_networks: [10.0.0.0/99]}", "server.private_networks.0: not an address or network"),
        ("network: {proxy: ftp://x}", "not an http(s) URL"),
        ("budgets: [{name: a, limit_tokens: 1}, {name: a, limit_tokens: 2}]", "two budgets have one name"),
        (
            "budgets: [{name: a, limit_tokens: 1, scope: room}]",
            "expected one of user, chat, platform, tenant",
        ),
        ("budgets: [{name: a}]", "limits nothing: set limit_tokens, limit_cost_usd or limit_requests"),
        ("budgets: [{name: a, limit_requests: 1, degrade_to: echo}]", "goes with on_exceeded: degrade"),
        ("budgets: [{name: a, limit_requests: 1, on_exceeded: degrade}]", "degrade_to goes with"),
        ("budgets: [{name: a, limit_requests: 1, warn_at: 80}]", "expected a number above 0 to 1"),
        ("schedule: {cleanup: {cron: '0 25 * * *'}}", "the hour field is not within 0-23"),
        ("platforms: {app: [x]}", "expected a section"),
        ("platforms: [x]", "expected a section"),
        ("platforms: {app: {type: [x]}}", "not a platform that is known"),
        ("platforms: {app: {network: {proxi: x}}}", "did you mean proxy?"),
        ("logging: {level: loud}", "not one of the choices"),
    ],
)
def test_a_wrong_value_is_told_in_words(mistakes, text, part):
    lines = mistakes(text)
    assert len(lines) == 1
    assert part in lines[0]
    assert lines[0].startswith("config.yaml:1:")


def test_the_level_of_the_log_may_be_written_small(read):
    assert read("logging: {level: debug}").settings.logging.level == "DEBUG"


HOSTILE = {
    "a list": (b"- a\n", "a list or text at the top"),
    "a text": (b"hello", "a list or text at the top"),
    "a tab": (b"server:\n\tport: 1\n", "config.yaml:2:1: not YAML: a tab"),
    "binary": (bytes(range(256)), "not UTF-8"),
    "a control character": (b"a: \x00\n", "config.yaml:1:4: a control character"),
    "not UTF-8": (b"chat:\n  x: \xff\n", "config.yaml:2:1: not UTF-8"),
    "UTF-16": ("chat: {}".encode("utf-16"), "not UTF-8"),
    "a huge file": (b"#" * 1_048_577, "larger than"),
    "a bomb": (
        b"a: &a [x,x,x,x,x,x,x,x,x]\n"
        + b"".join(b"%c: &%c [%s]\n" % (c + 1, c + 1, b",".join([b"*%c" % c] * 9)) for c in range(97, 105)),
        "more than 20000 values",
    ),
    "an alias in itself": (b"a: &a [*a]\n", "an alias without its anchor"),
    "deep nesting": (b"a: " + b"[" * 5000, "nested more than"),
    "deep blocks": (b"\n".join(b" " * n + b"a:" for n in range(200)), "nested more than"),
    "two documents": (b"chat: {}\n---\nchat: {}\n", "a second document"),
    "an object": (b"ai: {system_prompt: !!python/name:os.system x}\n", "tags are not taken"),
    "an unknown alias": (b"chat: *nothing\n", "an alias without its anchor"),
    "a list as key": (b"[a, b]: c\n", "cannot be a key"),
    "an unclosed quote": (b"chat: 'x\n", "not YAML"),
    "an unclosed list": (b"chat: [x\n", "not YAML"),
    "a long key": (b"k" * 900 + b": 1\n", "unknown key"),
    "a long number": (b"server: {port: " + b"9" * 6000 + b"}\n", "too large (got '999"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_gives_one_clear_line(mistakes, name):
    data, part = HOSTILE[name]
    lines = mistakes(data)
    assert len(lines) == 1
    assert part in lines[0]
    assert len(lines[0]) < 300


def test_a_hundred_mistakes_are_enough(mistakes):
    lines = mistakes("\n".join(f"key{n}: 1" for n in range(5000)))
    assert len(lines) == 101
    assert lines[-1] == "and 4900 more"


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ConfigError, match="not a regular file"):
        load(str(tmp_path), platform_settings=TYPES, environ={})


# ------------------------------------------------------------------------------------------- accounts


def test_an_enabled_account_without_its_secret_is_a_mistake(mistakes, read):
    lines = mistakes("platforms:\n  app: {enabled: true}\n")
    assert lines == [
        "config.yaml:2:3: platforms.app: app_id is missing; expected it, because the account is enabled",
        (
            "config.yaml:2:3: platforms.app: app_secret is missing; expected it, because the account is enabled, or "
            "insecure: true to take events without proof of who sent them"
        ),
    ]
    loaded = read("platforms:\n  app: {enabled: true, app_id: x, insecure: true}\n")
    assert loaded.warnings == (
        "platforms.app: insecure: true: events are taken from anybody, without a signature",
    )


def test_an_account_of_another_name_takes_nothing_from_the_built_in_one(read):
    accounts = read("platforms: {two: {type: app}, app: {type: page}}", {"APP_ID": "x"}).settings.platforms
    assert accounts["two"].app_id == ""
    assert isinstance(accounts["app"], PageSettings)


# --------------------------------------------------------------------------------------------- secrecy

SECRET = "s3cr3t-Value/x"
LEAKS = [
    "platforms: {app: {app_secret: {SECRET: 1}}}",
    "platforms: {app: {app_secrt: SECRET}}",
    "platforms: {app: {pin: [SECRET]}}",
    "platforms: {app: SECRET}",
    "platforms:\n  app:\n    app_secret:SECRET\n",
    "platforms:\n  app: {app_secret:SECRET}\n",
    "server:\n  port: 80\n    app_secret:SECRET\n",
    "server:\n  port: 80\n   password=SECRET\n",
    "server: {port: '${S}'}",
    "ai: {conversation_persistence: {db_url: 'oracle://u:SECRET@h/x'}}",
    "ai: {conversation_persistence: {db_url: 'postgresql://u:SECRET@h:port/x'}}",
    "ai: {base_url: 'ftp://u:SECRET@h'}",
    "ai: {api_key: !SECRET x}",
    "ai: {api_key: *SECRET }",
    "ai: {api_key: &SECRET }",
    "ai: {api_key: 'SECRET }",
    'ai: {api_key: "\\SECRET" }',
    "ai: {api_key: @SECRET }",
    "ai: {api_key: %SECRET }",
    "ai: {api_key: SECRET: SECRET }",
    "ai:\n  api_key: SECRET\n x: 1\n",
    "ai: {api_key: a, api_key: SECRET}",
]


@pytest.mark.parametrize("text", LEAKS)
def test_no_mistake_shows_a_secret(mistakes, text):
    assert SECRET not in "\n".join(mistakes(text.replace("SECRET", SECRET), {"S": SECRET}))


@pytest.mark.parametrize(
    "name", ["PLATFORMS__APP__APP_SECRT", "PLATFORMS__APP__PIN__X", "AI__API_KEY__X", "PLATFORMS__APP"]
)
def test_no_mistake_shows_a_variable_of_the_environment(mistakes, name):
    assert SECRET not in "\n".join(mistakes("{}", {"FEISHU_BOT__" + name: SECRET}))


def test_the_effective_tree_hides_secrets_and_shows_the_rest(read):
    text = f"""\
platforms: {{app: {{app_id: cli_a, app_secret: [{SECRET}, b], pin: "{SECRET}", token_url: "https://h/token"}}}}
ai: {{api_key: {SECRET}, conversation_persistence: {{db_url: "postgresql://u:{SECRET.replace("/", "%2F")}@h/x"}}}}
network: {{proxy: "http://me:{SECRET.replace("/", "%2F")}@proxy:3128"}}
plugins: {{settings: {{p: {{api_token: {SECRET}, tokens: [{SECRET}], pin: 4}}}}}}
"""
    loaded = read(text)
    for shown in (loaded.render(), loaded.to_json(), repr(loaded), repr(loaded.settings)):
        assert SECRET not in shown
        assert SECRET.replace("/", "%2F") not in shown
    lines = {line.split(":")[0].strip(): line for line in loaded.render().splitlines()}
    assert "cli_a" in lines["app_id"]
    assert "config.yaml:1" in lines["app_id"]
    assert "postgresql://u:***@h/x" in lines["db_url"]
    assert "https://h/token" in lines["token_url"]
    assert "max_history_tokens: 8000" in lines["max_history_tokens"]
    document = orjson.loads(loaded.to_json())
    assert document["settings"]["platforms"]["app"]["app_secret"] == "***"
    assert document["origins"]["ai.api_key"] == "config.yaml:2"
    assert {SECRET, "b", SECRET.replace("/", "%2F")} <= loaded.secret_values()


def told(read, *args):
    try:
        read(*args)
    except ConfigError as error:
        return error.mistakes or [""]
    return []


YAML_SIGNS = st.text(st.sampled_from("ab:{}[]&*!|>'\"%@`#-?, \n\t$0~<.\\é\x00"), max_size=60)
KEYS = ["server", "port", "chat", "ai", "platforms", "app", "budgets", "name", "plugins", "settings", "<<"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(KEYS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=YAML_SIGNS | st.binary(max_size=40) | VALUES.map(repr))
def test_any_text_is_a_configuration_or_a_list_of_mistakes(read, text):
    assert all(line and "\n" not in line for line in told(read, text))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(
        ["SERVER__PORT", "CHAT", "PLATFORMS", "PLATFORMS__APP", "BUDGETS__0", "", "__", "AI__X__Y"]
    ),
    value=st.text(max_size=30) | YAML_SIGNS,
)
def test_any_variable_is_taken_or_a_mistake(read, name, value):
    environ = {"FEISHU_BOT__" + name: value, "DB_BACKEND": value, "DB_PORT": value}
    assert all(line and "\n" not in line for line in told(read, "{}", environ))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    noise=YAML_SIGNS, place=st.sampled_from(["app_secret", "pin", "app_id: x, app_secret"]), tail=YAML_SIGNS
)
@example(noise=",", place="app_secret", tail="}")
def test_no_noise_around_a_secret_makes_a_mistake_show_it(read, noise, place, tail):
    text = f"platforms:\n  app: {{{place}: {noise}{SECRET}{tail}\n"
    assert SECRET not in "\n".join(told(read, text))


# ---------------------------------------------------------------------------------------- made from the tree


@pytest.mark.parametrize("path", ["config.yaml", "docs/configuration.md"])
def test_what_is_made_from_the_code_is_up_to_date(path):
    assert (ROOT / path).read_text(encoding="utf-8") == pages()[path], "run python -m feishu_bot.reference"


def test_the_commented_file_loads_and_means_the_defaults(read, tmp_path):
    loaded = read(commented_config(TYPES))
    assert loaded.settings == read("{}").settings
    assert not [warning for warning in loaded.warnings if "config.yaml" not in warning]


def test_the_products_own_file_loads_without_mistakes_or_warnings(tmp_path):
    (tmp_path / "config.yaml").write_bytes((ROOT / "config.yaml").read_bytes())
    loaded = load(platform_settings=platform_settings(), environ={}, folder=tmp_path)
    assert loaded.path == tmp_path / "config.yaml"
    assert loaded.warnings == ()


def test_every_setting_is_described():
    def fields(model, path=""):
        for name, field in model.model_fields.items():
            yield path + name, field.description
            if isinstance(field.default, PlatformSettings | ChatSettings.__base__):
                yield from fields(type(field.default), f"{path}{name}.")

    models = [BotSettings, BudgetSettings, *platform_settings().values()]
    assert [name for model in models for name, description in fields(model) if not description] == []


def test_the_reference_names_every_key_of_an_account():
    page = configuration_page(TYPES)
    assert "`platforms.app.app_secret`" in page
    assert "`ai.conversation_persistence.db_url`" in page


# ---------------------------------------------------------------------------------------------- providers


def test_the_keys_of_providers_are_taken_from_their_own_variables(read):
    loaded = read(
        "ai: {providers: {deepseek: {base_url: http://127.0.0.1:9}, acme: {api_key: own}}}",
        {"DEEPSEEK_API_KEY": "sk-d", "OPENAI_API_KEY": "sk-o", "GEMINI_API_KEY": ""},
    )
    providers = loaded.settings.ai.providers
    assert {name: own.api_key.current for name, own in providers.items()} == {
        "openai": "sk-o",
        "deepseek": "sk-d",
        "acme": "own",
    }
    assert providers["deepseek"].base_url == "http://127.0.0.1:9"
    assert {"sk-d", "sk-o", "own"} <= loaded.secret_values()
    assert "sk-" not in loaded.render()


def test_a_key_in_the_file_wins_over_the_providers_variable(read):
    text = "ai: {providers: {openai: {api_key: file}}}"
    assert (
        read(text, {"OPENAI_API_KEY": "variable"}).settings.ai.providers["openai"].api_key.current == "file"
    )
