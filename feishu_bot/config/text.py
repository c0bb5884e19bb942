"""The configuration as text: the effective tree, the commented file, and the reference page."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import timedelta
from enum import Enum
from ipaddress import IPv4Network, IPv6Network
from typing import TYPE_CHECKING, Any

import orjson
from pydantic import SecretStr

from feishu_bot.config.schema import ANY, Shape, fields_of, hide_passwords, is_secret
from feishu_bot.config.settings import BotSettings, PlatformSettings
from feishu_bot.config.values import HIDDEN, Secrets, Settings, format_duration

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_COMMENT_COLUMN = 44
_LINE_LENGTH = 118
_PLAIN = re.compile(r"[A-Za-z0-9_./$][A-Za-z0-9_./${}:@*+-]*")
_NO_TEXT = re.compile(r"(?i)null|true|false|yes|no|on|off|[-+]?[\d_]*\.?[\d_]*(?:e[-+]?\d+)?|0x.*")
_ROOT = Shape("section", "", model=BotSettings)


# ------------------------------------------------------------------------------------------ single values


def _data(value: Any, shape: Shape, path: tuple[str, ...]) -> Any:
    """Return a value as plain data for JSON or YAML, with what is secret hidden."""
    if isinstance(value, Settings):
        below = fields_of(type(value))
        return {name: _data(getattr(value, name), below[name], (*path, name)) for name in below}
    if isinstance(value, Mapping):
        return {key: _data(item, shape.item or ANY, (*path, str(key))) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_data(item, shape.item or ANY, (*path, str(place))) for place, item in enumerate(value)]
    if isinstance(value, Secrets | SecretStr):
        return HIDDEN if value else None
    return HIDDEN if value not in {None, ""} and is_secret(path, shape) else _leaf(value)


def _leaf(value: Any) -> Any:
    result = value
    if isinstance(value, timedelta):
        result = format_duration(value)
    elif isinstance(value, Enum):
        result = value.value
    elif isinstance(value, IPv4Network | IPv6Network):
        result = str(value.network_address if value.prefixlen == value.max_prefixlen else value)
    elif isinstance(value, float) and value.is_integer():
        result = int(value)
    elif isinstance(value, str):
        result = hide_passwords(value)
    return result


def _inline(data: Any, *, in_flow: bool = False) -> str:
    """Return plain data as YAML on one line."""
    if isinstance(data, Mapping):
        pairs = (f"{_inline(key, in_flow=True)}: {_inline(item, in_flow=True)}" for key, item in data.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(data, list):
        return "[" + ", ".join(_inline(item, in_flow=True) for item in data) + "]"
    return _quoted(data, in_flow=in_flow) if isinstance(data, str) else orjson.dumps(data).decode()


def _quoted(text: str, *, in_flow: bool) -> str:
    """Return a text as YAML, in quotes where it could be read as something else."""
    plain = _PLAIN.fullmatch(text) and not _NO_TEXT.fullmatch(text) and not text.endswith(":")
    if plain and not (in_flow and ("{" in text or "}" in text)):
        return text
    return orjson.dumps(text.encode("utf-8", "backslashreplace").decode()).decode()


def _with_comment(line: str, comment: str, indent: str = "") -> list[str]:
    """Return a line with its comment beside it, or above where both do not fit."""
    if not comment:
        return [line]
    beside = f"{line:<{_COMMENT_COLUMN}}  # {comment}"
    return [beside] if len(beside) <= _LINE_LENGTH else [f"{indent}# {comment}", line]


# --------------------------------------------------------------------------------------- the effective tree


def render(settings: BotSettings, origins: Mapping[str, str]) -> str:
    """Return the tree as YAML-like text, one value a line, each with where it comes from."""
    data = _data(settings, _ROOT, ())
    return "\n".join(_render_lines(data, (), origins, "")) + "\n"


def _render_lines(data: Any, path: tuple[str, ...], origins: Mapping[str, str], indent: str) -> Iterator[str]:
    for key, value in data.items():
        place = (*path, str(key))
        name = _inline(key)
        if isinstance(value, dict) and value:
            yield f"{indent}{name}:"
            yield from _render_lines(value, place, origins, indent + "  ")
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            yield f"{indent}{name}:"
            for number, item in enumerate(value):
                lines = list(_render_lines(item, (*place, str(number)), origins, indent + "    "))
                yield f"{indent}  - {lines[0].strip() if lines else '{}'}"
                yield from lines[1:]
        else:
            origin = origins.get(".".join(place), "default")
            yield f"{f'{indent}{name}: {_inline(value)}':<{_COMMENT_COLUMN}}  # {origin}"


def to_json(
    settings: BotSettings, origins: Mapping[str, str], *, path: Path | None, warnings: tuple[str, ...]
) -> str:
    """Return the tree, its origins and the warnings as one JSON object, with secrets hidden."""
    document = {
        "path": str(path) if path else None,
        "settings": _data(settings, _ROOT, ()),
        "origins": dict(origins),
        "warnings": list(warnings),
    }
    return orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS).decode()


# ----------------------------------------------------------------------------------------- the commented file

_HEAD = """\
# The configuration. Every key has its default here; what is left out keeps it.
# ${NAME} and ${NAME:-default} are replaced from the environment or from a .env file beside this one.
# Each key can be overridden by a variable, e.g. FEISHU_BOT__SERVER__PORT=9000.
# Relative paths begin at this file's folder. A secret may be a list while an old and a new one are both accepted.
# "python bot.py check" shows what is in force, and every mistake with its line.
"""


def commented_config(platform_settings: Mapping[str, type[PlatformSettings]]) -> str:
    """Return a configuration file with every key, its default and what it means; it loads without mistakes."""
    lines = [_HEAD]
    defaults = BotSettings()
    for name, shape in fields_of(BotSettings).items():
        description = BotSettings.model_fields[name].description or ""
        if name == "platforms":
            lines += _with_comment(f"{name}:", description)
            for account in _accounts(platform_settings):
                lines += _account_lines(account, platform_settings[account])
        else:
            lines += _key_lines(name, getattr(defaults, name), shape, description, "")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _accounts(platform_settings: Mapping[str, type[PlatformSettings]]) -> list[str]:
    """Return the types, those first whose built-in account is enabled."""
    return sorted(
        platform_settings, key=lambda name: (not _builtin(name, platform_settings[name])["enabled"], name)
    )


def _builtin(name: str, model: type[PlatformSettings]) -> dict[str, Any]:
    return {"type": name, "enabled": model.model_fields["enabled"].default, **model.builtin}


def _account_lines(name: str, model: type[PlatformSettings]) -> list[str]:
    lines = [f"  {name}:"]
    values = _builtin(name, model)
    for key, shape in fields_of(model).items():
        field = model.model_fields[key]
        value = values.get(key, "" if field.is_required() else field.get_default(call_default_factory=True))
        data = value if key in values else _data(value, shape, ("platforms", name, key))
        lines += _with_comment(f"    {key}: {_inline(data)}", field.description or "", "    ")
    return lines


def _key_lines(name: str, value: Any, shape: Shape, description: str, indent: str) -> list[str]:
    if isinstance(value, Settings):
        lines = _with_comment(f"{indent}{name}:", description, indent)
        for key, below in fields_of(type(value)).items():
            text = type(value).model_fields[key].description or ""
            lines += _key_lines(key, getattr(value, key), below, text, indent + "  ")
        return lines
    if shape.kind == "list" and shape.item is not None and shape.item.model is not None:
        lines = _with_comment(f"{indent}{name}:", description, indent)
        for key, field in shape.item.model.model_fields.items():
            lines.append(f"{indent}  #   {key}: {field.description}")
        for item in value:
            data = {key: entry for key, entry in _data(item, shape.item, ()).items() if entry is not None}
            lines.append(f"{indent}  - {_inline(data)}")
        return lines
    return _with_comment(f"{indent}{name}: {_inline(_data(value, shape, (name,)))}", description, indent)


# ---------------------------------------------------------------------------------------- the reference page

_PAGE_HEAD = """\
# Configuration

This page is made from the code by `python -m feishu_bot.reference`; do not edit it.

`config.yaml` in the working directory, or the file given with `--config`. `${NAME}` and `${NAME:-default}` are
replaced from the environment after parsing (`$${` is a literal `${`); a `.env` beside the file is read. Unknown and
duplicate keys are errors. Relative paths begin at the file's folder. By precedence: command line, environment, `.env`,
file, default. Every key can be overridden by the variable named in its row; the value is read as YAML.
`python bot.py check` prints the effective tree and where each value came from; `python bot.py init` writes a
commented file.

These variables are honoured too, in this order: `CONVERSATION_DB_URL`, `DATABASE_PATH` (a path or `:memory:`),
`DB_BACKEND` with `DB_HOST`, `DB_PORT`, `DB_NAME`, `DB_USER`, `DB_PASSWORD`, and `CONVERSATION_DATA_DIR` set the
database; `ENABLE_DB_PERSISTENCE` sets `ai.conversation_persistence.enabled`. A `FEISHU_BOT__…` variable wins over them.
"""
_TABLE_HEAD = "| key | default | expected | meaning |\n|---|---|---|---|"


def configuration_page(platform_settings: Mapping[str, type[PlatformSettings]]) -> str:
    """Return ``docs/configuration.md``: every key with its default, what it takes and what it means."""
    parts = [_PAGE_HEAD]
    plain: list[str] = []
    for name, shape in fields_of(BotSettings).items():
        field = BotSettings.model_fields[name]
        if name == "platforms":
            parts.append(f"## platforms\n\n{_sentence(field.description)}\n")
            for account in _accounts(platform_settings):
                rows = _rows(
                    platform_settings[account],
                    ("platforms", account),
                    _builtin(account, platform_settings[account]),
                )
                parts.append("\n".join([f"### Accounts of type `{account}`\n", _TABLE_HEAD, *rows, ""]))
        elif shape.model is not None:
            rows = _rows(shape.model, (name,), field.default.__dict__)
            parts.append(
                "\n".join([f"## {name}\n", _sentence(field.description) + "\n", _TABLE_HEAD, *rows, ""])
            )
        elif shape.item is not None and shape.item.model is not None:
            default = _inline(_data(field.default, shape, (name,)))
            rows = _rows(shape.item.model, (name, "N"), {})
            head = [f"## {name}\n", f"{_sentence(field.description)} Default: `{default}`\n"]
            parts.append("\n".join([*head, _TABLE_HEAD, *rows, ""]))
        else:
            plain.append(
                _row((name,), _inline(_data(field.default, shape, (name,))), shape, field.description)
            )
    parts.append("\n".join(["## Others\n", _TABLE_HEAD, *plain]))
    return "\n".join(parts).rstrip() + "\n"


def _sentence(text: str | None) -> str:
    return (text or "")[:1].upper() + (text or "")[1:] + "."


def _rows(model: type[Settings], path: tuple[str, ...], values: Mapping[str, Any]) -> list[str]:
    """Return a row for each key; ``values`` stand before the class's own defaults."""
    rows: list[str] = []
    for key, shape in fields_of(model).items():
        field = model.model_fields[key]
        place = (*path, key)
        required = key not in values and field.is_required()
        value = values[key] if key in values else field.get_default(call_default_factory=True)
        if isinstance(value, Settings):
            rows += _rows(type(value), place, value.__dict__)
            continue
        variable = isinstance(value, str) and value.startswith("${")
        default = "" if required else _inline(value if variable else _data(value, shape, place))
        rows.append(_row(place, default, shape, field.description))
    return rows


def _row(path: tuple[str, ...], default: str, shape: Shape, description: str | None) -> str:
    shown = f"`{default}`" if default else "required"
    cells = ["`" + ".".join(path) + "`", shown, shape.expected, description or ""]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
