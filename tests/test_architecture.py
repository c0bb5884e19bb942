"""The shape of the package, read from its sources: who imports whom, how long things are, who catches what."""

from __future__ import annotations

import ast
import re
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
PACKAGE = "feishu_bot"

# Imports go down only. A layer's names are modules or packages below feishu_bot; a name may import all layers
# before its own, and names of its own layer only where the layer says so.
APART, TOGETHER = False, True
LAYERS: list[tuple[frozenset[str], bool]] = [
    (frozenset({"errors", "model"}), TOGETHER),
    (frozenset({"config", "log", "network"}), TOGETHER),
    (
        frozenset(
            {"access", "arguments", "deadlines", "live", "pace", "passwords", "split", "texts", "turns"}
        )
        | {"retention", "windows"},
        TOGETHER,
    ),  # plain rules, no I/O
    (frozenset({"store", "platforms", "ai", "hooks"}), APART),
    (frozenset({"state", "agent_commands", "commands", "orders", "plugins"}), APART),
    (
        frozenset({"attachments", "conversation_commands", "groups", "indicator", "intake", "pipeline"})
        | {
            "budget_commands",
            "budgets",
            "chats",
            "parts",
            "planner",
            "plugin_bot",
            "push",
            "said",
            "summing",
            "toolbox",
        },
        TOGETHER,
    ),
    (
        frozenset({"worker", "delivery", "closing", "schedule", "backups", "waiters", "gate", "metrics"})
        | {"alerts", "controls", "peers"},
        TOGETHER,
    ),
    (frozenset({"web"}), TOGETHER),
    (
        frozenset(
            {
                "app",
                "cli",
                "event_loop",
                "operation",
                "reference",
                "reload",
                "supervisor",
                "terminal",
                "__main__",
            }
        ),
        TOGETHER,
    ),
    (frozenset({"testing"}), TOGETHER),  # ships with the product, is no part of the server
    (frozenset({"chaos"}), TOGETHER),  # nor is this: it starts servers and puts them on trial
]

# What the layers do not allow, and is meant. Names are prefixes: "store" is all of store.
EXCEPTIONS = {
    ("ai.conversation_store", "store"),  # the synchronous face of the store
    ("hooks", "ai.chat_model"),  # plugins see what a model is asked
    ("cli", "testing"),  # doctor posts events as the platforms sign them
    ("cli", "chaos"),  # selftest
}

# One library, one place.
LIBRARIES: dict[str, set[str]] = {
    "sqlalchemy": {"store", "ai.conversation_store", "state", "chaos"},  # the last reads by SQL of its own
    "alembic": {"store"},
    "psycopg": {"store"},
    "pymysql": {"store"},
    "sqlite3": {"store"},
    "aiohttp.web": {"web", "testing"},
    "apscheduler": {"schedule"},
    "yaml": {"config"},
    "os.environ": {"config"},
    "os.getenv": {"config"},
    "click": {"cli"},
    "tiktoken": {"ai"},
    "httptools": {"platforms.http_pool"},
    "argon2": {"passwords"},
    "markdown_it": {"web"},
    "nh3": {"web"},
    "jinja2": {"web"},
}

# The only functions that may catch everything, each logging with the stack: the web error middleware, a worker's
# lane loop, the delivery loop, a plugin call, a scheduled job. (module, function) -> which of these it is.
EDGES: dict[tuple[str, str], str] = {
    ("web.errors", "error_middleware"): "the web error middleware",
    ("worker", "Worker._run"): "a worker's lane loop",
    ("worker", "Worker._begin"): "a worker's lane loop, where a message cannot even be begun",
    ("delivery", "Delivery._run"): "the delivery loop",
    ("delivery", "Delivery._send"): "the delivery loop, around one platform's own code",
    ("plugins", "Plugins._call"): "a plugin call",
    ("ai.mcp_servers", "_Server._run"): "the connection to a tool server, a program of somebody else's",
    ("schedule", "Schedule._work"): "a scheduled job",
}

# Functions that do not swallow what they catch but hand it to somebody who waits for it. They need not log.
MESSENGERS: dict[tuple[str, str], str] = {
    ("store.writer", "Writer._process"): "the error of a job is raised where the job was handed in",
    ("ai.vendors", "VendorModel.stream"): "the error of a provider's library is raised as a model's failure",
    ("plugins", "_load_into"): "the error of an import is raised where the plugin was asked for",
}

MAX_FILE_LINES = 650
MAX_FUNCTION_LINES = 80
LISTS_ONLY = ("store.migrations.versions",)  # a migration lists tables and is never read as a story
NAMELESS = {"utils", "util", "helpers", "helper", "common", "core", "misc", "base_utils"}
UNFINISHED = re.compile(r"\b(TO" r"DO|FIX" r"ME)\b")
REGISTRY = re.compile(
    r"https?://[^/\s\"'<>)]*(pypi|pythonhosted|npmjs|yarnpkg|rubygems|crates\.io|proxy\.golang|maven|docker\.io"
    r"|mirrors?\.)[^\s\"'<>)]*",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Import:
    """``target`` is a dotted name as far as it is known: ``aiohttp.web.Request``, ``feishu_bot.errors.BotError``."""

    target: str
    line: int
    runs: bool  # false: for the type checker only


@dataclass(frozen=True)
class Module:
    """One source file; ``name`` is below the package: ``store.engine``, and empty for the package itself."""

    name: str
    source: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @cached_property
    def unit(self) -> str:
        return self.name.split(".")[0]

    @cached_property
    def imports(self) -> list[Import]:
        checked = {
            id(node)
            for block in ast.walk(self.tree)
            if isinstance(block, ast.If)
            and ast.unparse(block.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}
            for statement in block.body
            for node in ast.walk(statement)
        }
        found = []
        for node in ast.walk(self.tree):
            runs = id(node) not in checked
            if isinstance(node, ast.Import):
                found += [Import(alias.name, node.lineno, runs) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{self.name}:{node.lineno}: imports are absolute"
                found += [Import(f"{node.module}.{alias.name}", node.lineno, runs) for alias in node.names]
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                found.append(Import(f"{node.value.id}.{node.attr}", node.lineno, runs))
        return found

    def functions(self) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        """Yield every function with its qualified name."""
        yield from _functions(self.tree, "")


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(node):
        name = prefix
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{prefix}{child.name}."
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield name[:-1], child
        yield from _functions(child, name)


def read_package() -> list[Module]:
    modules = []
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules.append(Module(name, path.read_text()))
    return modules


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    return [path for name in listed.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


@pytest.fixture(scope="module")
def package() -> list[Module]:
    return read_package()


def _is_in(name: str, prefixes: set[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def _internal(
    modules: list[Module], module: Module, *, type_only: bool = True
) -> Iterator[tuple[str, Import]]:
    """Yield the modules of the package that ``module`` imports."""
    names = {other.name for other in modules}
    for found in module.imports:
        if found.target.split(".")[0] != PACKAGE or not (found.runs or type_only):
            continue
        name = found.target.removeprefix(PACKAGE).removeprefix(".")
        while name and name not in names:  # the last parts are names inside the module
            name = name.rpartition(".")[0]
        if name and name != module.name:
            yield name, found


def wrong_ways(modules: list[Module]) -> list[str]:
    """Return every import that does not go down."""
    level = {name: number for number, (names, _) in enumerate(LAYERS) for name in names}
    wrong: list[str] = []
    for module in modules:
        if not module.name:  # feishu_bot itself only names what is public
            continue
        if module.unit not in level:
            wrong.append(f"{module.name}: LAYERS has no place for {module.unit!r}")
            continue
        for name, found in _internal(modules, module):
            unit = name.split(".")[0]
            allowed = (
                unit == module.unit
                or level.get(unit, len(LAYERS)) < level[module.unit]
                or (level.get(unit) == level[module.unit] and LAYERS[level[unit]][1])
                or any(_is_in(module.name, {a}) and _is_in(name, {b}) for a, b in EXCEPTIONS)
            )
            if not allowed:
                wrong.append(f"{module.name}:{found.line} imports {name}")
    return sorted(set(wrong))


def cycles(modules: list[Module]) -> list[str]:
    """Return the imports at run time that lead back to where they started."""
    graph = {m.name: {name for name, _ in _internal(modules, m, type_only=False)} for m in modules}
    done: set[str] = set()
    found: list[str] = []

    def visit(name: str, way: list[str]) -> None:
        if name in way:
            found.append(" -> ".join([*way[way.index(name) :], name]))
        elif name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, [*way, name])
            done.add(name)

    for name in graph:
        visit(name, [])
    return found


def misplaced_libraries(modules: list[Module]) -> list[str]:
    """Return every use of a library outside its place."""
    wrong = []
    for module in modules:
        for found in module.imports:
            target = re.sub(r"^aiohttp\.web_\w+", "aiohttp.web", found.target)
            for library, places in LIBRARIES.items():
                if _is_in(target, {library}) and not _is_in(module.name, places):
                    wrong.append(f"{module.name}:{found.line} uses {library}, which is for {sorted(places)}")
    return sorted(set(wrong))


def broad_handlers(
    modules: list[Module], edges: dict[tuple[str, str], str], messengers: dict[tuple[str, str], str]
) -> list[str]:
    """Return every place that catches everything and goes on; one that ends in a bare ``raise`` does not."""
    wrong = []
    seen = set()
    named = edges | messengers
    names = {module.name for module in modules}
    for module in modules:
        owner = {
            id(node): name
            for name, function in module.functions()  # the innermost function comes last
            for node in ast.walk(function)
        }
        for node in ast.walk(module.tree):
            if not _catches_all(node):
                continue
            place = (module.name, owner.get(id(node), ""))
            seen.add(place)
            if place not in named:
                wrong.append(f"{module.name}:{node.lineno} in {place[1] or 'the module'} catches everything")
            elif place in edges and ".exception(" not in ast.unparse(node):
                wrong.append(f"{module.name}:{node.lineno} in {place[1]} does not log with the stack")
    wrong += [
        f"{module}.{function} catches nothing any more"
        for module, function in named.keys() - seen
        if module in names
    ]
    return wrong


def _catches_all(node: ast.AST) -> bool:
    if isinstance(node, ast.ExceptHandler):
        names = (
            {"BaseException"}
            if node.type is None
            else {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
        )
        last = node.body[-1]
        again = isinstance(last, ast.Raise) and last.exc is None
        return bool(names & {"Exception", "BaseException"}) and not again
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
        return any(ast.unparse(argument) in {"Exception", "BaseException"} for argument in node.args)
    return False


def too_long(sizes: list[tuple[int, str]], limit: int) -> str:
    """Return an empty text, or the offenders and what comes nearest to them."""
    sizes = sorted(sizes, reverse=True)
    if not sizes or sizes[0][0] <= limit:
        return ""
    return f"more than {limit} lines:\n" + "\n".join(f"{lines:6} {name}" for lines, name in sizes[:8])


# ------------------------------------------------------------------------------------------- the package


def none(found: list[str]) -> None:
    assert not found, "\n" + "\n".join(found)


def test_imports_go_down_only(package):
    none(wrong_ways(package))


def test_no_import_leads_back_to_where_it_started(package):
    none(cycles(package))


def test_each_library_is_used_in_one_place(package):
    none(misplaced_libraries(package))


def test_only_the_named_edges_catch_everything(package):
    none(broad_handlers(package, EDGES, MESSENGERS))


def test_no_file_is_too_long_to_read(package):
    assert not too_long([(len(m.source.splitlines()), m.name) for m in package], MAX_FILE_LINES)


def test_no_function_is_too_long_to_read(package):
    sizes = [
        ((function.end_lineno or 0) - function.lineno + 1, f"{module.name}.{name}")
        for module in package
        if not module.name.startswith(LISTS_ONLY)
        for name, function in module.functions()
    ]
    assert not too_long(sizes, MAX_FUNCTION_LINES)


def test_every_module_is_named_after_what_it_holds(package):
    assert [m.name for m in package if NAMELESS & set(m.name.split("."))] == []


def test_no_module_rebinds_a_global_name(package):
    assert [
        f"{m.name}:{n.lineno}" for m in package for n in ast.walk(m.tree) if isinstance(n, ast.Global)
    ] == []


def test_nothing_is_left_for_later():
    marked = []
    for path in tracked_files():
        if path.suffix in {".py", ".md", ".js", ".html", ".css", ".yaml", ".toml", ""}:
            lines = path.read_text(errors="replace").splitlines()
            marked += [
                f"{path.relative_to(ROOT)}:{n}" for n, line in enumerate(lines, 1) if UNFINISHED.search(line)
            ]
    none(marked)


def test_no_file_names_a_package_registry():
    named = []
    for path in tracked_files():
        content = path.read_bytes()
        if b"\0" not in content and (found := REGISTRY.search(content.decode(errors="replace"))):
            named.append(f"{path.relative_to(ROOT)}: {found[0]}")
    none(named)


# -------------------------------------------------------------------------------- the rules, on small sources


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("model", "from feishu_bot.config import Settings"),
        ("store.queue", "import feishu_bot.platforms.qq"),
        ("web.chat", "from feishu_bot.app import App"),
        ("commands", "def late():\n    from feishu_bot.plugins import Plugin"),
        ("worker", "if TYPE_CHECKING:\n    from feishu_bot.testing.model import Scripted"),
        ("novelty", "import os"),
    ],
)
def test_an_import_upwards_or_sideways_is_found(importer, source):
    others = [
        Module(n, "") for n in ("config", "platforms.qq", "app", "plugins", "testing.model", "store.engine")
    ]
    assert len(wrong_ways([*others, Module(importer, source)])) == 1


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        (
            "pipeline",
            "from feishu_bot.store.engine import open_engine\nfrom feishu_bot.plugins import Plugin",
        ),
        ("ai.conversation_store", "from feishu_bot.store import engine"),
        ("cli", "from feishu_bot.app import App\nfrom feishu_bot import __version__"),
        ("platforms.qq", "from feishu_bot.platforms.base import Platform"),
    ],
)
def test_an_import_downwards_is_right(importer, source):
    others = [Module(n, "") for n in ("", "app", "plugins", "platforms.base", "store.engine", "store")]
    assert wrong_ways([*others, Module(importer, source)]) == []


def test_a_cycle_is_found_unless_it_is_for_the_type_checker_only():
    back = "from feishu_bot.log import bind"
    one, two = Module("config", "import feishu_bot.log"), Module("log", "from feishu_bot import config")
    assert cycles([one, two]) == ["config -> log -> config"]
    assert (
        cycles(
            [
                Module("log", "from feishu_bot import config"),
                Module("config", f"if TYPE_CHECKING:\n    {back}"),
            ]
        )
        == []
    )


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pipeline", "from sqlalchemy import select"),
        ("platforms.qq", "from aiohttp import web"),
        ("platforms.qq", "import aiohttp\nrequest: aiohttp.web.Request"),
        ("log", "import os\nlevel = os.environ['LEVEL']"),
        ("web.server", "from os import getenv"),
    ],
)
def test_a_library_outside_its_place_is_found(module, source):
    assert len(misplaced_libraries([Module(module, source)])) == 1


def test_a_library_in_its_place_is_right():
    source = "from aiohttp import web\nimport os.path"
    assert (
        misplaced_libraries(
            [Module("web.server", source), Module("log", "from aiohttp import ClientSession")]
        )
        == []
    )


@pytest.mark.parametrize(
    "source",
    [
        "try:\n    x()\nexcept Exception:\n    pass",
        "try:\n    x()\nexcept:\n    pass",
        "try:\n    x()\nexcept (ValueError, BaseException) as e:\n    y(e)",
        "with contextlib.suppress(Exception):\n    x()",
    ],
)
def test_catching_everything_is_found(source):
    assert len(broad_handlers([Module("log", source)], {}, {})) == 1


def test_catching_everything_is_right_when_it_is_raised_again_or_at_a_named_edge_that_logs():
    again = "try:\n    x()\nexcept BaseException:\n    y()\n    raise"
    named = "class Loop:\n    def run(self):\n        try:\n            x()\n        except Exception:\n            {}"
    edges = {("worker", "Loop.run"): "lane loop"}
    logs = Module("worker", named.format("logger.exception('lane failed')"))
    silent = Module("worker", named.format("caller.set_exception(error)"))
    assert broad_handlers([Module("log", again), logs], edges, {}) == []
    assert broad_handlers([silent], {}, edges) == []
    assert len(broad_handlers([silent], edges, {})) == 1
    assert len(broad_handlers([Module("worker", "")], edges, {})) == 1


def test_a_registry_is_found_by_its_host_only():
    assert REGISTRY.search("see https:" + "//pypi.org/project/x")
    assert not REGISTRY.search("see https://docs.python.org/3/ and PyPI")
