"""From a file, the environment and the command line to settings: all mistakes at once, each with its place."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import SecretStr, ValidationError

from feishu_bot.config import text as texts
from feishu_bot.config.document import (
    Mistakes,
    Node,
    Origin,
    Scalar,
    Section,
    Sequence,
    from_python,
    look_up,
    merge,
    nearest,
    put,
    read_yaml,
    show_key,
    show_path,
)
from feishu_bot.config.environment import Environment, apply, interpolate, parse_raw, read_dotenv
from feishu_bot.config.providers import PROVIDERS
from feishu_bot.config.schema import ANY, Shape, fields_of, hide_passwords, is_secret, passwords_in, shape_of
from feishu_bot.config.settings import BotSettings, PlatformSettings
from feishu_bot.config.values import ACCOUNT_NAME, Marker, Secrets, Settings
from feishu_bot.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

MAX_FILE_BYTES = 1024 * 1024
DEFAULT_FILE = "config.yaml"

_DEFAULT = Origin("default")
_MAX_SHOWN = 60  # characters of a wrong value in a message
_GLUED_SECRET = re.compile(r"(?i)(?:secret|token|password|passwd|key)\w*\s*[:=](?!\*\*\*)")
_ROOT = Shape("section", "a section (lines of key: value)", model=BotSettings)
_S = TypeVar("_S", bound=Settings)
_WRONG = {
    "missing": "missing",
    "int_parsing": "not a whole number",
    "int_parsing_size": "too large",
    "int_from_float": "not a whole number",
    "int_type": "not a whole number",
    "float_parsing": "not a number",
    "float_type": "not a number",
    "finite_number": "not a finite number",
    "bool_parsing": "neither true nor false",
    "bool_type": "neither true nor false",
    "greater_than": "too small",
    "greater_than_equal": "too small",
    "less_than": "too large",
    "less_than_equal": "too large",
    "literal_error": "not one of the choices",
    "enum": "not one of the choices",
    "string_type": "not a text",
    "string_unicode": "not UTF-8",
    "string_pattern_mismatch": "not of the right form",
    "string_too_short": "too short",
    "string_too_long": "too long",
}


@dataclass(frozen=True)
class Loaded:
    """A configuration that was read without mistakes.

    ``path`` is None when there was no file. ``folder`` is where relative paths begin. ``origins`` tells for each
    key path that was set where (``file:line``, ``environment NAME``, ``.env NAME``, ``command line``); what it
    does not hold is a default.
    """

    settings: BotSettings
    path: Path | None
    folder: Path
    origins: Mapping[str, str] = field(repr=False)
    warnings: tuple[str, ...]

    def origin(self, path: str) -> str:
        """Return where the value at a dotted key path comes from."""
        return self.origins.get(path, "default")

    def render(self) -> str:
        """Return the effective tree with secrets hidden and where each value came from."""
        return texts.render(self.settings, self.origins)

    def to_json(self) -> str:
        """Return the same as one JSON object: path, settings, origins, warnings."""
        return texts.to_json(self.settings, self.origins, path=self.path, warnings=self.warnings)

    def secret_values(self) -> frozenset[str]:
        """Return every secret value of the tree, for the log's filter."""
        return secret_values(self.settings)


def secret_values(settings: BotSettings) -> frozenset[str]:
    """Return every secret value of a tree of settings."""
    return frozenset(_secret_values(settings, ()))


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    platform_settings: Mapping[str, type[PlatformSettings]],
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    folder: str | os.PathLike[str] | None = None,
    unpriced: Callable[[BotSettings], Iterable[tuple[tuple[str, ...], str]]] = lambda _settings: (),
) -> Loaded:
    """Read the configuration; ConfigError holds one line per mistake.

    Args:
        path: the file; None takes ``config.yaml`` in ``folder`` if there is one, else the defaults.
        platform_settings: the settings class of every platform type.
        environ: the variables; None reads those of the process.
        overrides: dotted key path -> value from the command line; None values are passed over.
        folder: the working directory; None is the process's.
        unpriced: tells which models a limit on costs cannot count, with their key paths.
    """
    working = Path(folder) if folder is not None else Path.cwd()
    file = working / (path if path is not None else DEFAULT_FILE)
    name = str(path) if path is not None else DEFAULT_FILE
    present = path is not None or file.exists()
    mistakes = Mistakes()
    root = _read_file(file, name, mistakes) if present else Section(Origin(name), {})
    variables = os.environ if environ is None else environ
    environment = Environment(variables, _read_env_file(file.parent, name, mistakes))
    if root is None:
        raise ConfigError(mistakes.lines())
    builder = _Builder(platform_settings, environment, mistakes)
    whole = builder.lay_over(root, overrides or {})
    settings = builder.settings(whole)
    if settings is not None:
        _check_together(settings, whole, mistakes)
        for place, model in unpriced(settings):
            node = look_up(whole, list(place))
            mistakes.add(
                node.origin if node is not None else _DEFAULT,
                place,
                "a budget limits costs, and this model has no known price",
                got=repr(model),
                expected="a price in ai.prices",
            )
    if mistakes.found or settings is None:
        raise ConfigError(mistakes.lines())
    base = file.parent.absolute()
    settings = _anchor(settings, base)
    warnings = list(_warnings(settings))
    if not present:
        warnings.insert(0, f"no {DEFAULT_FILE} in {base}: the defaults are used")
    return Loaded(
        settings=settings,
        path=file if present else None,
        folder=base,
        origins=builder.origins,
        warnings=tuple(warnings),
    )


def _read_file(file: Path, name: str, mistakes: Mistakes) -> Section | None:
    """Return the file's tree; None when it cannot be read, which is noted."""
    text = _read_text(file, name, mistakes)
    if text is None:
        return None
    root = read_yaml(text, name, mistakes)
    if isinstance(root, Section):
        return root
    if root is None or (isinstance(root, Scalar) and root.is_null):
        return None if mistakes.found else Section(Origin(name), {})
    mistakes.add(root.origin, (), "a list or text at the top", expected="lines of key: value")
    return None


def _read_env_file(folder: Path, name: str, mistakes: Mistakes) -> dict[str, str]:
    file = folder / ".env"
    if not file.is_file():
        return {}
    shown = str(Path(name).parent / ".env")
    text = _read_text(file, shown, mistakes)
    return read_dotenv(text, shown, mistakes) if text is not None else {}


def _read_text(file: Path, name: str, mistakes: Mistakes) -> str | None:
    origin = Origin(name)
    try:
        if file.exists() and not file.is_file():
            mistakes.add(origin, (), "not a regular file")
            return None
        with file.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a path"
        mistakes.add(origin, (), f"cannot be read: {reason.lower()}")
        return None
    if len(data) > MAX_FILE_BYTES:
        mistakes.add(origin, (), f"larger than {MAX_FILE_BYTES} bytes; no configuration is")
        return None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        mistakes.add(Origin(name, line, 1), (), "not UTF-8")
        return None


# ---------------------------------------------------------------------------------------------- building


class _Builder:
    """Turns a tree of texts into settings, noting mistakes and where each value came from."""

    def __init__(
        self,
        platform_settings: Mapping[str, type[PlatformSettings]],
        environment: Environment,
        mistakes: Mistakes,
    ) -> None:
        self.types = platform_settings
        self.environment = environment
        self.mistakes = mistakes
        self.origins: dict[str, str] = {}
        self.broken: set[tuple[str, ...]] = set()

    def lay_over(self, file: Node, overrides: Mapping[str, Any]) -> Node:
        """Return the tree of all sources by precedence: defaults, file, ``.env``, environment, command line."""
        root = self.with_builtin_accounts(interpolate(file, self.environment, self.mistakes))
        root = self.with_provider_keys(root)
        root = apply(root, self.environment, self.mistakes)
        for dotted, value in overrides.items():
            if value is not None:
                root = put(root, dotted.split("."), from_python(value, Origin("command line")))
        return root

    def with_builtin_accounts(self, root: Node) -> Node:
        """Lay the accounts that the file names on the built-in ones, which bear their type's name."""
        named = look_up(root, ["platforms"])
        if isinstance(named, Scalar) and named.is_null:
            named = Section(named.origin, {})
        if named is not None and not isinstance(named, Section):
            return root
        accounts = dict(named.items) if named is not None else {}
        for name, model in self.types.items():
            values = {"enabled": model.model_fields["enabled"].default, **model.builtin}
            base = from_python(values, _DEFAULT)
            base = interpolate(base, self.environment, self.mistakes, path=("platforms", name), builtin=True)
            own = accounts.get(name)
            declared = own.items.get("type") if isinstance(own, Section) else None
            if own is None or (isinstance(own, Scalar) and own.is_null):
                accounts[name] = base
            elif not isinstance(declared, Scalar) or declared.text == name:
                accounts[name] = merge(base, own)
        members = dict(root.items) if isinstance(root, Section) else {}
        members["platforms"] = Section(named.origin if named is not None else _DEFAULT, accounts)
        return Section(root.origin, members)

    def with_provider_keys(self, root: Node) -> Node:
        """Lay the keys that are in the providers' own variables below the tree."""
        keys: dict[str, Any] = {}
        for name, provider in PROVIDERS.items():
            if provider.variable:
                node = from_python({"api_key": f"${{{provider.variable}:-}}"}, _DEFAULT)
                path = ("ai", "providers", name)
                node = interpolate(node, self.environment, self.mistakes, path=path, builtin=True)
                key = look_up(node, ["api_key"])
                if isinstance(key, Scalar) and key.text:
                    keys[name] = node
        if not keys or not isinstance(root, Section):
            return root
        named = look_up(root, ["ai", "providers"])
        if named is not None and not isinstance(named, Section):
            return root
        base = Section(_DEFAULT, keys)
        return put(root, ["ai", "providers"], base if named is None else merge(base, named))

    def settings(self, root: Node) -> BotSettings | None:
        """Validate everything; None when there was a mistake."""
        platforms = look_up(root, ["platforms"])
        without = root
        if isinstance(root, Section) and isinstance(platforms, Section):
            without = Section(root.origin, {k: v for k, v in root.items.items() if k != "platforms"})
        accounts = {}
        if isinstance(platforms, Section):
            for name, node in platforms.items.items():
                account = self.account(name, node)
                if account is not None:
                    accounts[name] = account
        values = self.build(without, _ROOT, ())
        values["platforms"] = accounts
        settings = self.validate(BotSettings, values, root, ())
        return settings if isinstance(settings, BotSettings) else None

    def account(self, name: str, node: Node) -> PlatformSettings | None:
        """Validate one account by its platform's own class."""
        path = ("platforms", name)
        if not ACCOUNT_NAME.fullmatch(name):
            self.mistakes.add(
                node.origin,
                path,
                "not a name for an account",
                expected="a-z, 0-9, _ and -, at most 32 characters",
            )
            return None
        if isinstance(node, Scalar) and node.is_null:
            node = Section(node.origin, {})
        if not isinstance(node, Section):
            self.wrong_kind(node, shape_of(PlatformSettings), path)
            return None
        declared = node.items.get("type", Scalar(node.origin, name))
        model = self.types.get(declared.text) if isinstance(declared, Scalar) else None
        if model is None:
            word = declared.text if isinstance(declared, Scalar) else ""
            self.mistakes.add(
                declared.origin,
                (*path, "type"),
                "not a platform that is known",
                got=repr(show_key(word)),
                expected="one of " + ", ".join(sorted(self.types)),
                meant=nearest(word, self.types),
            )
            return None
        values = self.build(node, shape_of(model), path)
        values["type"] = declared.text if isinstance(declared, Scalar) else name
        account = self.validate(model, values, node, path)
        if not isinstance(account, PlatformSettings):
            return None
        if account.enabled:
            self.note_missing(account, node, path)
        return account

    def note_missing(self, account: PlatformSettings, node: Node, path: tuple[str, ...]) -> None:
        unsigned = account.model_copy(update={"insecure": True}).missing()
        for key in account.missing():
            expected = "it, because the account is enabled"
            if key not in unsigned:
                expected += ", or insecure: true to take events without proof of who sent them"
            self.mistakes.add(node.origin, path, f"{key} is missing", expected=expected)

    def build(self, node: Node, shape: Shape, path: tuple[str, ...]) -> Any:
        """Return plain data for pydantic; where the kind is wrong a mistake is noted and None returned."""
        if isinstance(node, Scalar) and node.raw and not (shape.is_leaf and not shape.secret):
            node = self.settle(node, shape, path)
        if path:
            self.origins[show_path(path)] = str(node.origin)
        if shape.kind == "any":
            return self.build_any(node, path)
        if shape.kind in {"section", "map", "list"} and isinstance(node, Scalar) and node.is_null:
            if shape.optional:
                return None
            node = Sequence(node.origin, ()) if shape.kind == "list" else Section(node.origin, {})
        value: Any = None
        if shape.kind == "section" and isinstance(node, Section):
            value = self.build_section(node, shape, path)
        elif shape.kind == "map" and isinstance(node, Section):
            value = {
                key: self.build(item, shape.item or ANY, (*path, key)) for key, item in node.items.items()
            }
        elif isinstance(node, Sequence) and (shape.kind == "list" or shape.secret):
            item_shape = shape.item or replace(shape, optional=False)
            value = [self.build(item, item_shape, (*path, str(n))) for n, item in enumerate(node.items)]
        elif isinstance(node, Scalar) and shape.is_leaf:
            value = self.build_leaf(node, shape)
        else:
            self.wrong_kind(node, shape, path)
        return value

    def settle(self, scalar: Scalar, shape: Shape, path: tuple[str, ...]) -> Node:
        """Read a variable's text as YAML, but take it as it is where it is a secret and no list."""
        if not shape.secret:
            return parse_raw(scalar, path, self.mistakes)
        node = read_yaml(scalar.text, scalar.origin.source, Mistakes(), marks=False)
        is_list = isinstance(node, Sequence) and scalar.text.lstrip().startswith("[")
        if node is not None and (is_list or (isinstance(node, Scalar) and node.quoted)):
            return node
        return Scalar(scalar.origin, scalar.text)

    def build_section(self, node: Section, shape: Shape, path: tuple[str, ...]) -> dict[str, Any]:
        shapes = fields_of(shape.model) if shape.model is not None else {}
        values = {}
        for key, item in node.items.items():
            if key in shapes:
                values[key] = self.build(item, shapes[key], (*path, key))
            else:
                meant = None if self.mistakes.is_full else nearest(key, shapes)
                # What has no value and is like no key may be a value itself, even a secret: {secret: , x} has two keys.
                shown = key if meant or not isinstance(item, Scalar) or item.text.strip() else "…"
                self.mistakes.add(item.origin, (*path, shown), "unknown key", meant=meant)
        return values

    def build_leaf(self, node: Scalar, shape: Shape) -> str | None:
        """Return the text, which pydantic reads as what it should be, or None where null is allowed."""
        text, quoted = node.text, node.quoted
        if node.raw:
            inner = read_yaml(text, "", Mistakes(), marks=False)
            if isinstance(inner, Scalar) and inner.quoted:
                text, quoted = inner.text, True
            else:
                text = text.strip()
        null = not quoted and text in {"", "~", "null", "Null", "NULL"}
        return None if null and shape.optional else text

    def build_any(self, node: Node, path: tuple[str, ...]) -> Any:
        """Return what YAML means by a value that only its reader knows the type of."""
        if isinstance(node, Section):
            return {key: self.build(item, ANY, (*path, key)) for key, item in node.items.items()}
        if isinstance(node, Sequence):
            return [self.build(item, ANY, (*path, str(n))) for n, item in enumerate(node.items)]
        return _resolve(node)

    def wrong_kind(self, node: Node, shape: Shape, path: tuple[str, ...]) -> None:
        kinds = {Scalar: "a text", Sequence: "a list", Section: "a section"}
        self.broken.add(path)
        self.mistakes.add(
            node.origin, path, "the wrong kind of value", got=kinds[type(node)], expected=shape.expected
        )

    # ------------------------------------------------------------------------------------ pydantic's errors

    def validate(
        self, model: type[Settings], values: dict[str, Any], node: Node, prefix: tuple[str, ...]
    ) -> Settings | None:
        try:
            return model.model_validate(values)
        except ValidationError as error:
            for mistake in error.errors(include_url=False, include_input=False):
                self.explain(model, mistake, node, prefix)
            return None

    def explain(self, model: type[Settings], mistake: Any, root: Node, prefix: tuple[str, ...]) -> None:
        """Note pydantic's error at the place where the value was written."""
        relative, shape = _locate(model, mistake["loc"])
        path = (*prefix, *relative)
        if any(path[: len(broken)] == broken for broken in self.broken):
            return
        node = look_up(root, relative)
        parent: tuple[str, ...] = relative
        while node is None and parent:
            parent = parent[:-1]
            node = look_up(root, parent)
        cause = mistake.get("ctx", {}).get("error")
        wrong = _WRONG.get(mistake["type"], "not valid")
        if isinstance(cause, ValueError) and not (
            isinstance(node, Scalar) and node.text and node.text in str(cause)
        ):
            wrong = " ".join(str(cause).split())
        got = meant = None
        if isinstance(node, Scalar) and parent == relative:
            got = self.show(node, shape, path)
            meant = nearest(node.text, shape.choices) if shape.choices else None
        expected = None if shape.kind == "list" and node is not None else shape.expected
        self.mistakes.add(
            node.origin if node is not None else root.origin,
            path,
            wrong,
            got=got,
            expected=expected,
            meant=meant,
        )

    def show(self, node: Scalar, shape: Shape, path: tuple[str, ...]) -> str:
        """Return a wrong value as a message may show it."""
        if is_secret(path, shape):
            return "a hidden value"
        text = hide_passwords(node.shown if node.shown is not None else node.text)
        if _GLUED_SECRET.search(text):
            return "a hidden value"
        return repr(text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…")


def _locate(model: type[Settings], loc: tuple[int | str, ...]) -> tuple[tuple[str, ...], Shape]:
    """Return the key path of pydantic's ``loc`` (which may end in names of its own), and what is expected there."""
    shape = Shape("section", "a section (lines of key: value)", model=model)
    path: list[str] = []
    for part in loc:
        below: Shape | None = None
        if shape.kind == "section" and shape.model is not None:
            below = fields_of(shape.model).get(str(part))
        elif shape.kind in {"map", "list"}:
            below = shape.item
        if below is None:
            break
        path.append(str(part))
        shape = below
    return tuple(path), shape


_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_MAX_DIGITS = 30


def _resolve(node: Scalar) -> Any:
    text = node.text
    if node.quoted:
        return text
    if node.is_null:
        return None
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if (
        len(text) <= _MAX_DIGITS
        and text.isascii()
        and text[-1].isdigit()
        and (text[0].isdigit() or text[0] in "+-.")
    ):
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
    return text


# --------------------------------------------------------------------------------------- the finished tree


def _anchor(settings: _S, base: Path) -> _S:
    """Return the settings with relative paths made absolute."""
    changed: dict[str, Any] = {}
    for name, shape in fields_of(type(settings)).items():
        value = getattr(settings, name)
        if isinstance(value, Settings):
            changed[name] = _anchor(value, base)
        elif shape.kind == "map" and shape.item is not None and shape.item.kind == "section":
            changed[name] = {key: _anchor(item, base) for key, item in value.items()}
        elif shape.marker is Marker.FILE and value is not None:
            changed[name] = str(base / value)
        elif shape.marker is Marker.DATABASE and value is not None:
            changed[name] = absolute_database(value, base)
    return settings.model_copy(update=changed)


def absolute_database(url: str, base: Path) -> str:
    """Return a database's URL with the path of an SQLite file made absolute; others are returned as they are."""
    head, slashes, rest = url.partition(":///")
    file, mark, query = rest.partition("?")
    if (
        not slashes
        or head.partition("+")[0] != "sqlite"
        or file in {"", ":memory:"}
        or file.startswith("file:")
    ):
        return url
    return f"{head}:///{base / file}{mark}{query}"


def _check_together(settings: BotSettings, root: Node, mistakes: Mistakes) -> None:
    """Note what is right by itself and cannot work together."""
    workers = look_up(root, ["server", "workers"])
    if settings.server.workers > 1 and _is_in_memory(settings):
        mistakes.add(
            workers.origin if workers is not None else root.origin,
            ("server", "workers"),
            "several processes cannot share a database in memory",
            got=str(settings.server.workers),
            expected="1, or a database in a file or on a server (ai.conversation_persistence.db_url)",
        )
    for number, alert in enumerate(settings.alerts):
        node = look_up(root, ["alerts", str(number)]) or root
        if "/" in alert.to:
            continue
        account = settings.platforms.get(alert.to)
        if account is None or not account.enabled:
            mistakes.add(
                node.origin,
                ("alerts", str(number), "to"),
                "no account that is enabled",
                got=repr(alert.to),
                meant=nearest(alert.to, [name for name, own in settings.platforms.items() if own.enabled]),
            )
        elif alert.chat is None:
            mistakes.add(node.origin, ("alerts", str(number), "chat"), "missing", expected="the chat's id")


def _is_in_memory(settings: BotSettings) -> bool:
    url = settings.ai.conversation_persistence.db_url
    return url.startswith("sqlite") and (":memory:" in url or url.endswith("://"))


def _warnings(settings: BotSettings) -> Iterator[str]:
    if _is_in_memory(settings):
        yield "the database is in memory: everything is lost when the process ends"
    elif settings.server.workers > 1 and settings.ai.conversation_persistence.db_url.startswith("sqlite"):
        yield "server.workers: SQLite takes processes of one machine only; several need PostgreSQL or MariaDB"
    for name, account in settings.platforms.items():
        if account.enabled:
            for warning in account.warnings():
                yield f"platforms.{name}: {warning}"


def _secret_values(value: Any, path: tuple[str, ...], shape: Shape = _ROOT) -> Iterator[str]:
    if isinstance(value, Secrets):
        yield from value.values()
    elif isinstance(value, SecretStr):
        yield value.get_secret_value()
    elif isinstance(value, str):
        if shape.marker in {Marker.URL, Marker.DATABASE}:
            yield from passwords_in(value)
        elif value and is_secret(path, shape):
            yield value
    else:
        for name, item, below in _children(value, shape):
            yield from _secret_values(item, (*path, name), below)


def _children(value: Any, shape: Shape) -> Iterator[tuple[str, Any, Shape]]:
    if isinstance(value, Settings):
        for name, below in fields_of(type(value)).items():
            yield name, getattr(value, name), below
    elif isinstance(value, dict):
        for name, item in value.items():
            yield str(name), item, shape.item or ANY
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield str(place), item, shape.item or ANY
