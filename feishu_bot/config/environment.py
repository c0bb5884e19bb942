"""What the process's environment and a ``.env`` file say about the configuration."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from urllib.parse import quote

from feishu_bot.config.document import (
    Mistakes,
    Node,
    Origin,
    Scalar,
    Section,
    Sequence,
    put,
    read_yaml,
)
from feishu_bot.config.schema import Shape, fields_of
from feishu_bot.config.settings import BotSettings
from feishu_bot.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

PREFIX = "FEISHU_BOT__"
PERSISTENCE = ("ai", "conversation_persistence")
DEFAULT_DATABASE = "conversations.db"

_ASSIGNMENT = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(.*)", re.DOTALL)
_DOUBLE_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"\s*(?:#.*)?', re.DOTALL)
_SINGLE_QUOTED = re.compile(r"'([^']*)'\s*(?:#.*)?")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}
_VARIABLE = re.compile(r"\$\$\{|\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}|\$\{")


@dataclass(frozen=True, slots=True)
class Layer:
    """One set of variables; ``source`` is ``environment`` or ``.env``."""

    source: str
    variables: Mapping[str, str]

    def origin(self, name: str) -> Origin:
        return Origin(f"{self.source} {name if name.isprintable() else ascii(name)}")


class Environment:
    """The variables by precedence: the process's own, then those of ``.env``."""

    def __init__(self, environ: Mapping[str, str], dotenv: Mapping[str, str]) -> None:
        self.layers = (Layer("environment", environ), Layer(".env", dotenv))

    def find(self, name: str) -> tuple[str, Origin] | None:
        """Return a variable's value and where it was set."""
        for layer in self.layers:
            if name in layer.variables:
                return layer.variables[name], layer.origin(name)
        return None


def read_dotenv(text: str, source: str, mistakes: Mistakes) -> dict[str, str]:
    """Read ``KEY=VALUE`` lines: ``export``, comments, 'literal' and "escaped" quotes; nothing is expanded."""
    variables: dict[str, str] = {}
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), 1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        match = _ASSIGNMENT.fullmatch(stripped)
        value = _dotenv_value(match[2]) if match else None
        if match is None or value is None:
            wrong = "cannot be read" if match is None else "a quote that does not end in this line"
            mistakes.add(Origin(source, number, 1), (), wrong, expected="KEY=VALUE")
            continue
        variables[match[1]] = value
    return variables


def _dotenv_value(text: str) -> str | None:
    if text.startswith('"'):
        match = _DOUBLE_QUOTED.fullmatch(text)
        return re.sub(r"\\(.)", lambda m: _ESCAPES.get(m[1], m[1]), match[1]) if match else None
    if text.startswith("'"):
        match = _SINGLE_QUOTED.fullmatch(text)
        return match[1] if match else None
    if text.startswith("#"):
        return ""
    return re.split(r"\s+#", text, maxsplit=1)[0].rstrip()


# ----------------------------------------------------------------------------------------- ${NAME} in values


def interpolate(
    node: Node,
    environment: Environment,
    mistakes: Mistakes,
    *,
    path: tuple[str, ...] = (),
    builtin: bool = False,
) -> Node:
    """Replace ``${NAME}`` and ``${NAME:-default}`` in every value; ``$${`` stands for ``${`` itself.

    It runs on the tree, after parsing: a variable's text can never become structure. With ``builtin`` a value
    that came from a variable says so as its origin, because it has no line of its own.
    """
    if isinstance(node, Section):
        items = {
            key: interpolate(item, environment, mistakes, path=(*path, key), builtin=builtin)
            for key, item in node.items.items()
        }
        return replace(node, items=items)
    if isinstance(node, Sequence):
        return replace(
            node,
            items=tuple(
                interpolate(item, environment, mistakes, path=(*path, str(place)), builtin=builtin)
                for place, item in enumerate(node.items)
            ),
        )
    return (
        _interpolate_scalar(node, environment, mistakes, path=path, builtin=builtin)
        if "${" in node.text
        else node
    )


def _interpolate_scalar(
    node: Scalar, environment: Environment, mistakes: Mistakes, *, path: tuple[str, ...], builtin: bool
) -> Scalar:
    origin = node.origin

    def fill(match: re.Match[str]) -> str:
        nonlocal origin
        if match[0] == "$${":
            return "${"
        name, default = match[1], match[2]
        if name is None:
            mistakes.add(
                node.origin,
                path,
                "a ${ that cannot be read",
                expected="${NAME} or ${NAME:-default}; $${ for a literal ${",
            )
            return ""
        found = environment.find(name)
        if found is not None and (found[0] or default is None):
            if builtin:
                origin = found[1]
            return found[0]
        if default is None:
            mistakes.add(
                node.origin,
                path,
                f"the environment variable {name} is not set",
                expected=f"it in the environment or in .env, or a default: ${{{name}:-default}}",
            )
            return ""
        return default

    text = _VARIABLE.sub(fill, node.text)
    return replace(node, origin=origin, text=text, shown=node.text)


# -------------------------------------------------------------------------------------------- overrides


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def _known_below(shape: Shape | None, node: Node | None) -> dict[str, Shape | None]:
    """Return what may stand below a place, with the shape of each where it is known."""
    known: dict[str, Shape | None] = {}
    if isinstance(node, Section):
        known = dict.fromkeys(node.items, shape.item if shape is not None and shape.kind == "map" else None)
    elif isinstance(node, Sequence):
        known = {str(place): shape.item if shape is not None else None for place in range(len(node.items))}
    if shape is not None and shape.kind == "section" and shape.model is not None:
        known |= fields_of(shape.model)
    return known


def override_path(name: str, root: Node) -> tuple[list[str], Shape | None]:
    """Find the path that ``SECTION__KEY`` means, without regard to case and with ``-`` and ``_`` alike.

    The shape is None inside an account, whose class is not known yet, and where there is no such key.
    """
    rest = name
    shape: Shape | None = Shape("section", "", model=BotSettings)
    node: Node | None = root
    path: list[str] = []
    while rest or not path:
        known = _known_below(shape, node)
        fitting = [key for key in known if (_plain(rest) + "__").startswith(_plain(key) + "__")]
        if fitting:
            key = max(fitting, key=lambda k: (len(k), _plain(k) == k))
            shape = known[key]
            rest = rest[len(key) + 2 :]
        else:
            head, _, rest = rest.partition("__")
            key = head.lower()
            shape = shape.item if shape is not None and shape.kind == "map" else None
        if path == ["platforms"]:
            shape = None
        path.append(key)
        if isinstance(node, Section):
            node = node.items.get(key)
        elif isinstance(node, Sequence) and key.isdecimal() and int(key) < len(node.items):
            node = node.items[int(key)]
        else:
            node = None
    return path, shape


def apply(root: Node, environment: Environment, mistakes: Mistakes) -> Node:
    """Lay the variables on the tree: ``.env`` first, the process's own last."""
    for layer in reversed(environment.layers):
        for place, seed in _seeds(layer, environment):
            root = put(root, place, seed)
        for name in sorted(layer.variables):
            if not name.upper().startswith(PREFIX):
                continue
            path, shape = override_path(name[len(PREFIX) :], root)
            text = Scalar(layer.origin(name), layer.variables[name], raw=True)
            value: Node = text
            if len(path) == 1 or path[:-1] == ["platforms"] or (shape is not None and not shape.is_leaf):
                value = parse_raw(text, path, mistakes)
            root = put(root, path, value)
    return root


def parse_raw(scalar: Scalar, path: Iterable[str], mistakes: Mistakes) -> Node:
    """Read a variable's text as YAML."""
    inner = Mistakes()
    node = read_yaml(scalar.text, scalar.origin.source, inner, marks=False)
    if inner.found:
        mistakes.add(
            scalar.origin, path, "its value is not YAML", expected="YAML; quote a text with signs in it"
        )
    return node or Scalar(scalar.origin, "")


# ------------------------------------------------------------------------ the seeds' own variable names


@dataclass(frozen=True, slots=True)
class Database:
    """The database that the environment names. ``origin`` says by which variable."""

    url: str
    origin: str
    pool_size: int | None = None
    max_overflow: int | None = None


def database_from(variables: Mapping[str, str]) -> Database | None:
    """Return the database that the variables name, or None.

    ``CONVERSATION_DB_URL``, then ``DATABASE_PATH`` (a path or ``:memory:``), then ``DB_BACKEND`` with
    ``DB_HOST``, ``DB_PORT``, ``DB_NAME``, ``DB_USER``, ``DB_PASSWORD``, ``DB_POOL_SIZE`` and
    ``DB_MAX_OVERFLOW``, then ``CONVERSATION_DATA_DIR``. The URL is ``mock`` for ``DB_BACKEND=mock``, and an
    unknown backend's name is handed back as it is: the caller decides what these are worth.
    """
    if url := variables.get("CONVERSATION_DB_URL"):
        return Database(url, "CONVERSATION_DB_URL")
    if path := variables.get("DATABASE_PATH"):
        return Database(f"sqlite:///{path}", "DATABASE_PATH")
    if backend := variables.get("DB_BACKEND"):
        return Database(
            _backend_url(backend.strip().lower(), variables),
            "DB_BACKEND",
            pool_size=_whole_number(variables.get("DB_POOL_SIZE")),
            max_overflow=_whole_number(variables.get("DB_MAX_OVERFLOW")),
        )
    if folder := variables.get("CONVERSATION_DATA_DIR"):
        return Database(f"sqlite:///{folder.rstrip('/') or '/'}/{DEFAULT_DATABASE}", "CONVERSATION_DATA_DIR")
    return None


def process_variables(dotenv: Path | None = None) -> dict[str, str]:
    """Return the process's environment variables, over those of a ``.env`` file if one is named and there."""
    below: dict[str, str] = {}
    if dotenv is not None and dotenv.is_file():
        mistakes = Mistakes()
        below = read_dotenv(dotenv.read_text(encoding="utf-8"), str(dotenv), mistakes)
        if mistakes.found:
            raise ConfigError(mistakes.lines())
    return {**below, **os.environ}


def _whole_number(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdecimal() else None


def _backend_url(backend: str, variables: Mapping[str, str]) -> str:
    name = variables.get("DB_NAME")
    if backend == "sqlite":
        return f"sqlite:///{name or 'data/' + DEFAULT_DATABASE}"
    if backend not in {"postgresql", "postgres", "mysql", "mariadb"}:
        return backend
    user, password = variables.get("DB_USER"), variables.get("DB_PASSWORD")
    login = quote(user, safe="") if user else ""
    if user and password:
        login += ":" + quote(password, safe="")
    host = variables.get("DB_HOST") or "localhost"
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    port = f":{variables['DB_PORT']}" if variables.get("DB_PORT") else ""
    return f"{backend}://{login}{'@' if login else ''}{host}{port}/{quote(name or 'feishu_bot', safe='')}"


def _seeds(layer: Layer, environment: Environment) -> list[tuple[list[str], Scalar]]:
    """Return what the seeds' variables of this layer set; details of ``DB_BACKEND`` may lie in either layer."""
    found: list[tuple[list[str], Scalar]] = []
    details = {
        name: value
        for below in reversed(environment.layers)
        for name, value in below.variables.items()
        if name.startswith("DB_") and name != "DB_BACKEND"
    }
    database = database_from({**layer.variables, **details})
    if database is not None:
        scalar = Scalar(layer.origin(database.origin), database.url, quoted=True)
        found.append(([*PERSISTENCE, "db_url"], scalar))
    if enabled := layer.variables.get("ENABLE_DB_PERSISTENCE", "").strip():
        found.append(([*PERSISTENCE, "enabled"], Scalar(layer.origin("ENABLE_DB_PERSISTENCE"), enabled)))
    return found
