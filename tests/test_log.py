from __future__ import annotations

import asyncio
import io
import logging
import re

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feishu_bot.config import LogSettings
from feishu_bot.log import SecretFilter, Seldom, bind, configure

log = logging.getLogger("feishu_bot.example")

_GLOBALS = ("logThreads", "logProcesses", "logMultiprocessing", "raiseExceptions")


@pytest.fixture
def start():
    root = logging.getLogger()
    before = root.level, {name: getattr(logging, name) for name in _GLOBALS}
    opened = []

    def _start(*, form="json", level="INFO", secrets=()):
        stream = io.StringIO()
        opened.append(configure(LogSettings(level=level, format=form), secrets=secrets, stream=stream))
        return stream

    yield _start
    for logging_ in opened:
        logging_.close()
    root.setLevel(before[0])
    for name, value in before[1].items():
        setattr(logging, name, value)
    for name in ("aiohttp.access", "alembic", "apscheduler"):
        logging.getLogger(name).setLevel(logging.NOTSET)


def entries(stream):
    return [orjson.loads(line) for line in stream.getvalue().splitlines()]


def test_a_json_line_has_time_level_logger_event_and_fields(start):
    stream = start()
    log.info("message ended", extra={"end": "answered", "ms": 12, "parts": [1, 2], "level": "own"})
    entry = entries(stream)[0]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry.pop("time"))
    assert entry == {
        "level": "info",
        "logger": "feishu_bot.example",
        "event": "message ended",
        "end": "answered",
        "ms": 12,
        "parts": [1, 2],
        "level_": "own",
    }


def test_a_console_line_shows_fields_as_key_and_value(start):
    stream = start(form="console")
    log.warning(
        "queue deep", extra={"account": "feishu", "waiting": 3, "note": 'a "b" c', "none": None, "blank": ""}
    )
    line = stream.getvalue()
    assert re.match(r"\d{4}-\d\d-\d\dT[\d:.]+Z WARNING queue deep account=feishu waiting=3 ", line)
    assert line.endswith('note="a \\"b\\" c" none=None blank="" [feishu_bot.example]\n')


@pytest.mark.parametrize("form", ["console", "json"])
def test_one_record_is_one_line_whatever_stands_in_it(start, form):
    stream = start(form=form)
    log.info("first\nsecond\r\x1b[31m\u2028", extra={"id": "a\nINFO faked\x85"})
    assert stream.getvalue().count("\n") == 1
    assert "\x1b" not in stream.getvalue()


def test_bound_fields_are_in_every_record_within_and_in_none_after(start):
    stream = start()
    with bind(account="feishu", lane="user:a"):
        with bind(inbox=7, lane="user:b"):
            log.info("inner", extra={"inbox": 8})
        log.info("outer")
    log.info("after")
    inner, outer, after = entries(stream)
    assert (inner["account"], inner["lane"], inner["inbox"]) == ("feishu", "user:b", 8)
    assert (outer["lane"], "inbox" in outer) == ("user:a", False)
    assert "account" not in after


async def test_bound_fields_follow_a_task_and_not_its_neighbour(start):
    stream = start()
    turn = asyncio.Barrier(2)

    async def work(inbox):
        with bind(inbox=inbox):
            await turn.wait()
            await asyncio.create_task(said(inbox))

    async def said(inbox):
        log.info("said", extra={"expected": inbox})

    await asyncio.gather(work(1), work(2))
    assert {(entry["inbox"], entry["expected"]) for entry in entries(stream)} == {(1, 1), (2, 2)}


SECRET = 's3cr"et\\/ü'


@pytest.mark.parametrize("form", ["console", "json"])
def test_known_secrets_are_hidden_in_every_part_of_a_record(start, form):
    stream = start(form=form, secrets=[SECRET, "p@ss/w"])
    log.info("told %s", SECRET, extra={"text": f"a{SECRET}b", "deep": {"x": [SECRET, (SECRET,)], SECRET: 1}})
    log.info("shown %r at postgresql://u:p%%40ss%%2Fw@h/x", SECRET, extra={"thing": ValueError(SECRET)})
    cause = KeyError(SECRET)
    error = RuntimeError(f"at {SECRET}")
    error.__cause__ = cause
    log.error("failed", exc_info=error)
    log.info(SECRET, stack_info=True)
    text = stream.getvalue()
    for form_of_it in (SECRET, repr(SECRET)[1:-1], orjson.dumps(SECRET).decode()[1:-1], "p%40ss%2Fw"):
        assert form_of_it not in text
    assert "s3cr" not in text
    assert text.count("***") >= 10
    assert "RuntimeError" in text


def test_secrets_can_be_added_while_it_runs(start):
    stream = io.StringIO()
    start()
    logging_ = configure(LogSettings(format="json"), stream=stream)
    logging_.hide(["renewed"])
    log.info("renewed token")
    logging_.close()
    assert entries(stream)[0]["event"] == "*** token"


def test_the_longest_secret_is_hidden_whole():
    assert SecretFilter(["abc", "abcdef"]).hide("abcdefg abc ab") == "***g *** ab"


def test_a_level_that_is_off_writes_nothing_and_formats_nothing(start):
    class Costly:
        def __str__(self):
            raise AssertionError("formatted")

    stream = start(level="WARNING")
    log.info("off %s", Costly())
    log.debug("off", extra={"x": Costly()})
    assert stream.getvalue() == ""


def test_libraries_are_quiet_below_warnings_unless_debugging(start):
    stream = start()
    logging.getLogger("apscheduler.scheduler").info("added job")
    assert stream.getvalue() == ""
    stream = start(level="DEBUG")
    logging.getLogger("apscheduler.scheduler").info("added job")
    assert "added job" in stream.getvalue()


def test_configured_again_it_replaces_itself(start):
    first, second = start(), start(form="console")
    log.info("once")
    assert first.getvalue() == ""
    assert second.getvalue().count("once") == 1


@pytest.mark.parametrize("value", [2**70, "\ud800", {1: {2: 3}}, object(), float("nan"), b"\xff", {"a"}])
@pytest.mark.parametrize("form", ["console", "json"])
def test_no_value_breaks_a_line(start, form, value):
    stream = start(form=form)
    log.info("odd", extra={"value": value})
    assert "odd" in stream.getvalue()


def test_arguments_that_do_not_fit_are_no_error(start):
    stream = start()
    log.info("%d and %d", "x", 1)
    assert entries(stream)[0]["event"] == "%d and %d"


def test_importing_it_configures_nothing():
    assert logging.getLogger("feishu_bot").handlers == []
    assert logging.getLogger("feishu_bot").level == logging.NOTSET


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    secret=st.text(st.characters(exclude_categories=["Cs"]), min_size=4, max_size=12).filter(
        lambda text: not set(text) & set("*=[]")
    ),
    form=st.sampled_from(["console", "json"]),
)
def test_no_secret_reaches_the_text_that_is_logged(start, secret, form):
    stream = start(form=form, secrets=[secret])
    log.info("#%s#", secret, extra={"zz": f"#{secret}#", "yy": {"q": [secret]}, "xx": repr(secret)})
    text = stream.getvalue().rstrip("\n").split(" ", 1)[-1].replace("[feishu_bot.example]", "")
    if form == "json":
        entry = orjson.loads(stream.getvalue())
        assert (entry["event"], entry["zz"], entry["yy"]) == ("#***#", "#***#", {"q": ["***"]})
        assert secret not in entry["xx"]
    else:
        assert "#***# " in text
        assert "zz=#***#" in text


def test_what_anybody_can_cause_is_written_a_bounded_number_of_times_a_minute(caplog):
    now = [0.0]
    seldom = Seldom(logging.getLogger("door"), most=3, clock=lambda: now[0])
    for number in range(10):
        seldom.warning("refused", {"number": number})
    now[0] = 59.9
    seldom.warning("refused", {"number": 10})
    now[0] = 60.0
    for number in (11, 12):
        seldom.warning("refused", {"number": number})
    assert [r.number for r in caplog.records] == [0, 1, 2, 11, 12]
    assert [getattr(r, "left_out", None) for r in caplog.records] == [None, None, None, 8, None]


def test_the_last_lines_are_remembered_as_they_were_written_also_over_a_reload(start):
    stream = start(secrets=["hunter22"])
    log.info("first %s", "hunter22")
    again = configure(LogSettings(format="console"), secrets=["hunter22"], stream=io.StringIO())
    try:
        log.warning("second %s", "x" * 5000)
        newest, oldest = again.lines.last(0)
    finally:
        again.close()
    assert oldest[1:] == ("info", stream.getvalue().rstrip("\n"))
    assert "hunter22" not in oldest[2]
    assert newest[1] == "warning"
    assert len(newest[2]) == 2000
    assert again.lines.last(newest[0] + 1) == []
    for n in range(3000):
        again.lines.add(logging.makeLogRecord({"created": n}), "line")
    assert len(again.lines.last(0)) == 2000
