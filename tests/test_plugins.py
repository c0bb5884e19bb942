from __future__ import annotations

import asyncio
import logging
import re
import sys
from pathlib import Path

import pytest

from feishu_bot.ai.chat_model import ToolCall, ToolSpec
from feishu_bot.commands import BuiltinCommands
from feishu_bot.config.settings import ChatSettings, PluginSettings
from feishu_bot.hooks import Reply
from feishu_bot.plugins import FAILURES_IN_A_ROW, SWITCHED_OFF_S, Plugins, TimeLimits
from feishu_bot.toolbox import MAX_AT_ONCE, MAX_RESULT_CHARS, Toolbox
from tests.chat import PlainBot, context

ROOT = Path(__file__).parent.parent
SOON = TimeLimits(on_message=0.02)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def load(tmp_path):
    """Write plugins and start them; stopped at the end."""
    started = []

    async def start(sources, *, enabled=None, settings=None, builtin=None, **options):
        for name, source in sources.items():
            path = tmp_path / name if "." in name or "/" in name else tmp_path / f"{name}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(source)
        part = PluginSettings(
            directory=str(tmp_path), enabled=tuple(enabled or sources), settings=settings or {}
        )
        plugins = Plugins(part, builtin=builtin, **options)
        await plugins.start(lambda name: PlainBot(settings=part.settings.get(name, {})))
        started.append(plugins)
        return plugins

    yield start
    for plugins in started:
        await plugins.stop()


def messages(caplog):
    return [record.message for record in caplog.records]


# ------------------------------------------------------------------------------------------------- loading


async def test_a_file_a_package_an_object_and_a_class_are_plugins(load):
    answer = "async def on_message({0}context): return {1!r} if context.message.text == {1!r} else None"
    plugins = await load(
        {
            "file": answer.format("", "file"),
            "package/__init__.py": "from .inside import on_message",
            "package/inside.py": answer.format("", "package"),
            "object": f"class A:\n  {answer.format('self, ', 'object')}\nplugin = A()",
            "class": f"class A:\n  {answer.format('self, ', 'class')}\nplugin = A",
        },
        enabled=["file", "package", "object", "class"],
    )
    for name in ("file", "package", "object", "class"):
        assert await plugins.on_message(context(name)) == (name, name)
    assert plugins.problems() == []


async def test_loading_neither_changes_the_path_nor_takes_a_public_module_name(load):
    before = list(sys.path)
    await load({"json": "async def on_message(context): return 'mine'"})
    assert sys.path == before
    assert "dumps" in dir(sys.modules["json"])


async def test_a_plugin_of_an_installed_package_is_found_by_its_entry_point(load, tmp_path, monkeypatch):
    site = tmp_path / "site"
    (site / "far-1.0.dist-info").mkdir(parents=True)
    (site / "far-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: far\nVersion: 1.0\n")
    (site / "far-1.0.dist-info" / "entry_points.txt").write_text("[feishu_bot.plugins]\nfar = far_away:Far\n")
    (site / "far_away.py").write_text("class Far:\n  async def on_message(self, context): return 'far'")
    monkeypatch.syspath_prepend(str(site))
    plugins = await load({}, enabled=["far"])
    assert await plugins.on_message(context()) == ("far", "far")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("syntax error", "SyntaxError"),
        ("import no_such_module_anywhere", "ModuleNotFoundError"),
        ("1 / 0", "ZeroDivisionError"),
        ("raise SystemExit(3)", "ended the program when imported"),
        ("x = 1", "has no hook"),
        ("async def on_mesage(context): ...", "did you mean on_message"),
        ("def on_message(context): return 'x'", "write 'async def on_message'"),
        ("async def on_message(context): yield 'x'", "write 'async def on_message'"),
        ("async def on_message(): ...", r"on_message does not take \(context\)"),
        ("async def on_answer(context): ...", r"on_answer does not take \(context, answer\)"),
        ("on_message = 'hello'", "on_message is no function"),
        ("async def startup(bot): raise ValueError('not so')", "startup: ValueError: not so"),
        ("async def startup(bot): raise SystemExit", "startup: tried to end the program"),
        ("class P:\n  def __init__(self): raise OSError('no')\nplugin = P", "OSError: no"),
    ],
)
async def test_a_plugin_that_cannot_be_used_is_reported_and_the_others_work(load, caplog, source, reason):
    plugins = await load({"bad": source, "good": "async def on_message(context): return 'still here'"})
    (problem,) = plugins.problems()
    assert problem.startswith("bad: ")
    assert re.search(reason, problem)
    (record,) = (r for r in caplog.records if r.message == "plugin failed")
    assert record.plugin == "bad"
    assert record.exc_info
    assert await plugins.on_message(context()) == ("still here", "good")


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "..", "a.b", "a/b", "", "x" * 65, "a\0b", "missing", "builtin"]
)
async def test_a_name_leads_nowhere_but_to_the_folder(load, tmp_path, name):
    folder = tmp_path / "plugins"
    folder.mkdir()
    (tmp_path / "outside.py").write_text("raise AssertionError('imported')")
    plugins = Plugins(PluginSettings.model_construct(directory=str(folder), enabled=(name,), settings={}))
    await plugins.start(lambda _name: PlainBot())
    (problem,) = plugins.problems()
    assert "AssertionError" not in problem


async def test_a_plugin_that_is_not_there_is_one_line_that_says_where_it_was_looked_for(tmp_path, caplog):
    plugins = Plugins(
        PluginSettings.model_construct(directory=str(tmp_path), enabled=("hello",), settings={})
    )
    await plugins.start(lambda _name: PlainBot())
    (record,) = (r for r in caplog.records if r.levelname == "ERROR")
    assert (record.message, record.plugin, record.exc_info) == ("plugin missing", "hello", None)
    for words in (
        f"{tmp_path}/hello.py",
        f"{tmp_path}/hello/__init__.py",
        "plugins.directory",
        "plugins.enabled",
    ):
        assert words in record.reason
    assert plugins.problems() == [f"hello: {record.reason}"]


async def test_a_function_that_looks_like_a_hook_is_pointed_out(load):
    plugins = await load({"p": "async def on_message(c): ...\nasync def on_anser(c, a): ..."})
    assert plugins.problems() == ["p: on_anser is no hook; did you mean on_answer?"]


async def test_a_plugin_that_hangs_when_imported_holds_up_nothing(load):
    source = "import threading\nthreading.Event().wait(30)\nasync def on_message(context): return 'late'"
    plugins = await load({"bad": source}, limits=TimeLimits(load=0.02))
    assert plugins.problems() == ["bad: took longer than 0.02 s"]
    assert await plugins.on_message(context()) is None


async def test_a_plugin_named_twice_is_asked_once(load):
    source = "async def on_answer(context, answer): return answer + '!'"
    assert await (await load({"p": source}, enabled=["p", "p"])).on_answer(context(), "a") == "a!"


# --------------------------------------------------------------------------------------------------- hooks


async def test_the_first_answer_wins_in_the_order_enabled(load):
    source = "async def on_message(context): return {!r}"
    sources = {
        "a": source.format(None),
        "b": source.format("  "),
        "c": source.format("C"),
        "d": source.format("D"),
    }
    assert await (await load(sources)).on_message(context()) == ("C", "c")
    assert await (await load(sources, enabled=["d", "c"])).on_message(context()) == ("D", "d")
    assert await (await load(sources, enabled=["a", "b"])).on_message(context()) is None


async def test_an_answer_goes_from_plugin_to_plugin(load):
    source = "async def on_answer(context, answer): return {}"
    plugins = await load(
        {
            "a": source.format("answer + 'a'"),
            "keeps": source.format("None"),
            "blank": source.format("' '"),
            "fails": source.format("1 / 0"),
            "b": source.format("answer + 'b'"),
        }
    )
    assert await plugins.on_answer(context(), "->") == "->ab"


async def test_every_plugin_hears_of_an_event(load):
    source = "async def on_event(context): return context.message.extra['heard'].append(__name__) or True"
    plugins = await load({"a": source, "fails": "async def on_event(context): 1 / 0", "b": source})
    told = context()
    told.message.extra["heard"] = []
    await plugins.on_event(told)
    assert len(told.message.extra["heard"]) == 2


async def test_events_are_wanted_only_where_a_plugin_hears_of_them(load):
    assert (await load({"p": "async def on_event(context): ..."})).wants_events
    assert not (await load({"q": "async def on_message(context): ..."})).wants_events


async def test_each_plugin_sees_its_own_settings_and_the_language(load):
    source = "async def on_answer(context, answer): return answer + context.bot.settings['x'] + context.bot.language"
    plugins = await load({"a": source, "b": source}, settings={"a": {"x": "1"}, "b": {"x": "2"}})
    assert await plugins.on_answer(context(), "") == "1en2en"


async def test_plugins_start_in_order_and_stop_the_last_first(load, tmp_path):
    source = (
        "from pathlib import Path\n"
        "async def note(what):\n    with Path(__file__).with_name('log').open('a') as f: f.write(what)\n"
        "async def startup(bot): await note('+{0}')\n"
        "async def shutdown(bot): await note('-{0}')\n"
    )
    plugins = await load({n: source.format(n) for n in "abc"} | {"bad": "async def shutdown(bot): 1 / 0"})
    await plugins.stop()
    await plugins.stop()
    assert (tmp_path / "log").read_text() == "+a+b+c-c-b-a"


# ------------------------------------------------------------------------------------------------ failures

HANGS = "import asyncio\nasync def on_message(context):\n    await asyncio.Event().wait()"
STUBBORN = """
import asyncio
async def on_message(context):
    for _ in range(3):
        try:
            await asyncio.sleep(0.2)
        except asyncio.CancelledError:
            pass
    return "late"
"""
FAILING = {
    "raises": "async def on_message(context): raise RuntimeError",
    "hangs": HANGS,
    "does not let itself be cancelled": STUBBORN,
    "cancels itself": "import asyncio\nasync def on_message(context):\n  asyncio.current_task().cancel()\n  await asyncio.sleep(0)",
    "ends the program": "async def on_message(context): raise SystemExit",
    "returns nonsense": "async def on_message(context): return 7",
}


@pytest.mark.parametrize("source", FAILING.values(), ids=FAILING)
async def test_a_hook_that_fails_stops_no_message(load, caplog, source):
    plugins = await load(
        {"bad": source, "good": "async def on_message(context): return 'answer'"},
        limits=SOON,
    )
    assert await plugins.on_message(context()) == ("answer", "good")
    (record,) = (r for r in caplog.records if r.message == "plugin failed")
    assert (record.plugin, record.hook) == ("bad", "on_message")
    assert record.exc_info


async def test_the_report_of_a_hook_that_hangs_says_where(load, caplog):
    plugins = await load({"bad": HANGS}, limits=SOON)
    await plugins.on_message(context())
    (record,) = (r for r in caplog.records if r.message == "plugin hangs")
    assert "bad.py:3 in on_message" in record.where[0]
    assert record.where[-1].endswith("in wait")


async def test_a_caller_that_is_cancelled_ends_the_hook(load):
    source = (
        "import asyncio\nended = asyncio.Event()\n"
        "async def on_message(context):\n"
        "  context.message.extra['began'].set()\n"
        "  try:\n    await asyncio.Event().wait()\n"
        "  finally:\n    context.message.extra['ended'].set()\n"
    )
    plugins = await load({"p": source})
    told = context()
    told.message.extra.update(began=asyncio.Event(), ended=asyncio.Event())
    task = asyncio.create_task(plugins.on_message(told))
    await told.message.extra["began"].wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await told.message.extra["ended"].wait()


COUNTS = """
calls = 0
async def on_message(context):
    global calls
    calls += 1
    if context.message.text == "fail":
        raise ValueError(f"call {calls}")
    return str(calls)
async def on_answer(context, answer):
    return answer + "!"
"""


async def test_a_hook_that_keeps_failing_is_not_called_for_a_while(load, caplog):
    clock = Clock()
    plugins = await load({"p": COUNTS}, clock=clock)
    for _ in range(FAILURES_IN_A_ROW + 3):
        await plugins.on_message(context("fail"))
    assert messages(caplog).count("plugin failed") == FAILURES_IN_A_ROW
    assert "plugin hook switched off" in messages(caplog)
    assert plugins.problems() == [
        "p: on_message is switched off for 60 s after 5 failures in a row: ValueError: call 5"
    ]
    assert await plugins.on_answer(context(), "other hooks") == "other hooks!"
    clock.now += SWITCHED_OFF_S - 1
    assert await plugins.on_message(context()) is None
    clock.now += 1
    assert await plugins.on_message(context()) == ("6", "p")
    assert plugins.problems() == []


async def test_one_call_tries_a_hook_again_while_the_others_pass_it_by(load):
    clock = Clock()
    plugins = await load({"p": HANGS}, clock=clock, limits=SOON)
    for _ in range(FAILURES_IN_A_ROW):
        await plugins.on_message(context())
    clock.now += SWITCHED_OFF_S
    trying = asyncio.create_task(plugins.on_message(context()))
    await asyncio.sleep(0)
    passing = asyncio.create_task(plugins.on_message(context()))
    done, _ = await asyncio.wait({trying, passing}, return_when=asyncio.FIRST_COMPLETED)
    assert done == {passing}
    await trying
    assert "6 failures in a row" in plugins.problems()[0]


async def test_failures_count_only_in_a_row(load):
    plugins = await load({"p": COUNTS})
    for text in ["fail"] * 4 + ["well"] + ["fail"] * 4:
        await plugins.on_message(context(text))
    assert await plugins.on_message(context()) == ("10", "p")


# ------------------------------------------------------------------------------------------------ commands

PING = """
from feishu_bot.hooks import Command, Reply
async def ping(context, args):
    return f"pong {args} {context.bot.settings.get('x')}"
async def gone(context, args):
    return Reply("gone", change="archive")
async def fails(context, args):
    raise ValueError(args)
async def hangs(context, args):
    import asyncio
    await asyncio.Event().wait()
def blocks(context, args):
    return "x"
async def nonsense(context, args):
    return 7
async def commands(bot):
    return [Command(f.__name__, f) for f in (ping, gone, fails, hangs, blocks, nonsense)]
"""


async def run(plugins, name, args=""):
    (command,) = (c for c in plugins.commands() if c.name == name)
    return await plugins.run_command(command, context(), args)


async def test_the_built_in_commands_come_first(load):
    plugins = await load({"p": PING}, builtin=BuiltinCommands(ChatSettings()))
    names = [c.name for c in plugins.commands()]
    assert names[:6] == ["help", "new", "clear", "history", "usage", "ping"]
    assert (await run(plugins, "new")).text


async def test_a_command_answers_with_a_text_or_a_reply_and_its_plugins_settings(load):
    plugins = await load({"p": PING}, settings={"p": {"x": 5}})
    assert await run(plugins, "ping", "a B") == Reply("pong a B 5")
    assert await run(plugins, "gone") == Reply("gone", change="archive")


@pytest.mark.parametrize("name", ["fails", "hangs", "blocks", "nonsense"])
async def test_a_command_that_fails_is_reported(load, caplog, name):
    plugins = await load({"p": PING}, limits=TimeLimits(command=0.02))
    assert await run(plugins, name) is None
    (record,) = (r for r in caplog.records if r.message == "plugin failed")
    assert (record.plugin, record.hook) == ("p", f"command {name}")


async def test_a_command_that_keeps_failing_leaves_the_plugins_others_alone(load):
    plugins = await load({"p": PING})
    for _ in range(FAILURES_IN_A_ROW + 1):
        assert await run(plugins, "fails") is None
    assert await run(plugins, "ping") is not None
    assert "command fails is switched off" in plugins.problems()[0]


@pytest.mark.parametrize("named", ["'help', c", "'HELP', c", "'x', c, {}, ('帮助',)"])
async def test_a_plugin_cannot_take_the_place_of_another_command(load, named):
    source = (
        "from feishu_bot.hooks import Command\n"
        "async def c(context, args): return 'mine'\n"
        f"async def commands(bot): return [Command({named}), Command('other', c)]"
    )
    plugins = await load({"p": source}, builtin=BuiltinCommands(ChatSettings()))
    assert [c.name for c in plugins.commands()][5:] == ["other"]
    (problem,) = plugins.problems()
    assert problem.startswith("p: the command")
    assert problem.endswith("is left out: builtin has it already")
    assert (await run(plugins, "help")).text != "mine"


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        ("'roll'", "instead of list"),
        ("['roll']", "instead of a Command"),
        ("[Command('a b', None)]", "cannot be"),
    ],
)
async def test_a_list_of_commands_that_is_none_is_reported(load, returned, reason):
    source = f"from feishu_bot.hooks import Command\nasync def commands(bot): return {returned}"
    plugins = await load({"p": source})
    assert plugins.commands() == []
    assert reason in plugins.problems()[0]


# ---------------------------------------------------------------------------------------------------- tools

SHOP = """
from __future__ import annotations
from typing import TYPE_CHECKING, Literal
from feishu_bot.hooks import Tool, ToolError
if TYPE_CHECKING:
    from feishu_bot.hooks import Context

async def price(context: Context, article: str, count: int = 1, unit: Literal["eur", "cny"] = "eur"):
    "Tells a price."
    if article == "gold":
        raise ToolError("Gold is not for sale.")
    return {"for": context.message.sender_name, "price": 3 * count, "unit": unit, "greeting": context.bot.settings.get("hi")}

async def free(context, **anything):
    return anything

async def breaks(context):
    raise OSError("the password is hunter2")

async def tools(bot):
    return [Tool(price), Tool(free, "free-form", "Takes anything.", {"type": "object"}), Tool(breaks)]
"""


def call(name, arguments=""):
    return ToolCall("c1", name, arguments)


async def test_a_tool_is_told_to_the_model_by_its_annotations_and_docstring(load):
    plugins = await load({"shop": SHOP})
    price, free, breaks = plugins.tools()
    assert price == ToolSpec(
        "price",
        "Tells a price.",
        {
            "type": "object",
            "properties": {
                "article": {"type": "string"},
                "count": {"type": "integer", "default": 1},
                "unit": {"type": "string", "enum": ["eur", "cny"], "default": "eur"},
            },
            "required": ["article"],
            "additionalProperties": False,
        },
    )
    assert free == ToolSpec("free-form", "Takes anything.", {"type": "object"})
    assert breaks.parameters["properties"] == {}
    assert plugins.problems() == []


async def test_a_tool_gets_the_context_and_what_the_model_sends(load):
    plugins = await load({"shop": SHOP}, settings={"shop": {"hi": "hello"}})
    said = await plugins.run_tool(context(), call("price", '{"article": "tea", "count": 2}'))
    assert said == '{"for":"Ann","price":6,"unit":"eur","greeting":"hello"}'
    assert await plugins.run_tool(context(), call("free-form", '{"a": [1]}')) == '{"a":[1]}'
    assert await plugins.run_tool(context(), call("free-form")) == "{}"


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("price", "{}", "article: Field required"),
        ("price", '{"article": "tea", "count": "many"}', "count: Input should be a valid integer"),
        ("price", '{"article": "tea", "colour": "red"}', "colour: Extra inputs are not permitted"),
        ("price", "{", "Invalid JSON"),
        ("free-form", "{", "the arguments are not JSON"),
        ("free-form", "[]", "the arguments are no JSON object"),
        ("price", '{"article": "gold"}', "Gold is not for sale."),
    ],
)
async def test_what_is_wrong_with_a_call_is_told_to_the_model_and_is_no_failure(
    load, caplog, name, arguments, words
):
    plugins = await load({"shop": SHOP})
    assert words in await plugins.run_tool(context(), call(name, arguments))
    assert "plugin failed" not in messages(caplog)


async def test_a_tool_that_fails_is_reported_and_the_model_told_no_more_than_that(load, caplog):
    plugins = await load({"shop": SHOP})
    assert await plugins.run_tool(context(), call("breaks")) == "The tool has failed."
    assert "plugin failed" in messages(caplog)
    for _ in range(FAILURES_IN_A_ROW):
        said = await plugins.run_tool(context(), call("breaks"))
    assert said == "The tool does not work at the moment."
    assert "tool breaks is switched off" in plugins.problems()[0]
    assert '"price":3' in await plugins.run_tool(context(), call("price", '{"article": "tea"}'))


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        ("[print]", "tools: builtin_function_or_method instead of a Tool"),
        ("[Tool(a), Tool(a)]", "the tool 'a' is left out: bad has it already"),
        ("[Tool(b)]", "the tool 'b' is left out: takes *args or **kwargs: give its parameters"),
        ("[Tool(c)]", "the tool 'c' is left out: an annotation cannot be looked up"),
        ("[Tool(d)]", "the tool 'd' is left out: does not take (context, …)"),
        ("[Tool(e)]", "the tool 'e' is left out: no JSON schema can be made of its parameters"),
        ("[Tool(a, 'two words')]", "'two words' cannot be a tool"),
        ("None", "tools: returned NoneType instead of list or tuple"),
    ],
)
async def test_a_tool_that_cannot_be_called_is_left_out_and_reported(load, returned, reason):
    source = f"""
from feishu_bot.hooks import Tool
async def a(context): return ""
async def b(context, **more): return ""
async def c(context, x: "Nowhere"): return ""
async def d(): return ""
class Odd: pass
async def e(context, x: Odd): return ""
async def tools(bot): return {returned}
"""
    plugins = await load({"bad": source})
    assert reason in "\n".join(plugins.problems())
    assert [spec.name for spec in plugins.tools()] in ([], ["a"])


async def test_only_what_was_offered_is_run_and_much_is_cut(load):
    source = """
from feishu_bot.hooks import Tool
async def much(context): return "x" * 30_000
async def none(context): return ""
async def tools(bot): return [Tool(much), Tool(none)]
"""
    box = Toolbox((await load({"p": source}),))
    (offered,) = box.choose(("mu*",))
    calls = [call("much"), call("none"), call("nowhere")]
    much, none, nowhere = await box.run(context(), (offered,), calls)
    assert much == "x" * MAX_RESULT_CHARS + "\n[cut: 10000 characters more]"
    assert none == "There is no tool 'none'. There are: much."
    assert nowhere == "There is no tool 'nowhere'. There are: much."
    assert await box.run(context(), box.choose(("none",)), [call("none")]) == ["(nothing)"]
    answers = await box.run(context(), box.choose(("*",)), [call("none")] * (MAX_AT_ONCE + 1))
    assert answers[-1] == f"Not run: at most {MAX_AT_ONCE} tools are run at once."


async def test_tools_are_chosen_by_patterns_and_stay_the_same_object(load):
    box = Toolbox((await load({"shop": SHOP}),))
    assert [spec.name for spec in box.choose(("*",))] == ["breaks", "free-form", "price"]
    assert [spec.name for spec in box.choose(("p*", "breaks"))] == ["breaks", "price"]
    assert box.choose(()) == ()
    assert box.choose(("p*",)) is box.choose(("p*",))


# ------------------------------------------------------------------------------------------- hello and docs


async def hello(settings=None, language="en"):
    part = PluginSettings(directory=str(ROOT / "plugins"), settings={"hello": settings or {}})
    plugins = Plugins(part)
    await plugins.start(lambda name: PlainBot(language, part.settings.get(name, {})))
    assert plugins.problems() == []
    return plugins


async def test_the_example_plugin_greets_and_changes_no_answer():
    plugins = await hello()
    assert await run(plugins, "hello") == Reply("Hello, Ann!")
    assert await run(plugins, "hello", "{x}") == Reply("Hello, {x}!")
    assert await plugins.on_answer(context(), "as it is") == "as it is"
    assert await plugins.on_message(context("hello")) is None


async def test_the_example_plugin_speaks_chinese_and_takes_its_greeting_from_the_settings():
    assert await run(await hello(language="zh"), "hello") == Reply("你好，Ann！")
    plugins = await hello({"greeting": "Welcome, {name} {}!"})
    assert await run(plugins, "hello") == Reply("Welcome, Ann {}!")


def documented():
    text = (ROOT / "docs" / "plugins.md").read_text()
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("source", documented()[:-1], ids=lambda s: re.search(r"(?:def|class) (\w+)", s)[1])
async def test_every_example_of_the_documentation_works_as_a_plugin(load, caplog, source):
    caplog.set_level(logging.WARNING)
    plugins = await load({"example": source})
    assert plugins.problems() == []
    for command in plugins.commands():
        assert await plugins.run_command(command, context(), "") is not None
    for text in ("opening hours?", "hash x", "else"):
        await plugins.on_message(context(text))
    await plugins.on_answer(context(), "answer")
    await plugins.on_event(context())
    assert caplog.records == []


async def test_the_documented_test_of_a_plugin_works(load):
    names: dict = {}
    exec(documented()[-1], names)

    async def on_message(context):
        return context.message.text + context.bot.language

    assert await names["answer_of"](on_message, "text-") == "text-en"


def test_the_documentation_names_every_hook_and_its_time():
    text = (ROOT / "docs" / "plugins.md").read_text()
    limits = TimeLimits()
    for hook in ("startup", "commands", "tools", "jobs", "on_message", "on_answer", "on_event", "shutdown"):
        assert re.search(rf"^\| `{hook}\(.*\| {getattr(limits, hook):g} s \|$", text, re.MULTILINE), hook
