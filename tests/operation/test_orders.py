"""Orders of an operator: pause, resume, drain, reload, send, as he types them beside running servers."""

from __future__ import annotations

import os
import signal

import orjson
import pytest

from feishu_bot.store import controls, schema
from feishu_bot.store.engine import capabilities, database_now_ms, open_engine
from feishu_bot.store.leases import Owner
from feishu_bot.store.work import Transaction
from feishu_bot.testing.model import Behaviour
from tests.e2e.bots import configuration, merged, until
from tests.operation.operator import pids

BUDGET = {"name": "daily", "limit_tokens": 1000}
ADMIN = {"chat": {"admins": ["feishu:ou_boss"]}}


async def paused(bot, workers: int, pauses: str) -> None:
    """Return when every worker knows which pauses are in force now."""

    def known() -> bool:
        last = {line["worker"]: line["pauses"] for line in bot.lines("pauses changed")}
        return len(last) == workers and set(last.values()) == {pauses}

    await until(known, f"{workers} workers to hear of {pauses}")


async def test_a_pause_keeps_messages_on_every_process_tells_each_chat_once_and_resume_answers_them_in_order(
    operator, people, feishu, db_url, record
):
    bot = await operator.workers(configuration(db_url, feishu=feishu), 2)
    code, text = await operator.types("pause", "--say", "Back at noon.")
    assert (code, text) == (0, "paused: all; `resume` goes on\n")
    await paused(bot, 2, "all")
    for n in range(4):
        await people.say(bot, f"ann {n}")
        await people.say(bot, f"bob {n}", user="bob")
    await people.replies(2)
    (pause,) = (await operator.status())["pauses"]
    assert (pause["target"], pause["say"], pause["by"]) == ("all", "Back at noon.", "command line")
    assert feishu.texts("oc_ann") == feishu.texts("oc_bob") == ["Back at noon."]
    assert [row.state for row in record.inbox()] == ["open"] * 8
    async with people.http.get(f"{bot.url}/readyz") as response:
        assert (await response.json())["degraded"] == ["paused: all"]
    assert await operator.types("resume") == (0, "going on\n")
    await people.replies(10)
    await record.settled()
    assert feishu.texts("oc_ann") == ["Back at noon.", *[f"ann {n}" for n in range(4)]]
    assert feishu.texts("oc_bob") == ["Back at noon.", *[f"bob {n}" for n in range(4)]]
    assert await operator.types("resume") == (0, "nothing was paused\n")
    assert [row.attempts for row in record.inbox()] == [1] * 8, "waiting is no attempt"


async def test_a_pause_of_one_account_or_of_the_models_leaves_the_rest_at_work(
    operator, people, feishu, sqlite_url
):
    bot = await operator.workers(configuration(sqlite_url, feishu=feishu), 2)
    assert (await operator.types("pause", "web"))[0] == 0
    await paused(bot, 2, "account:web")
    await people.say(bot, "not mine")
    assert await people.replies(1) == ["not mine"]
    assert (await operator.types("resume", "web"))[1] == "going on\n"
    assert (await operator.types("pause", "--models", "--say", "Thinking is off."))[0] == 0
    await paused(bot, 2, "models")
    await people.say(bot, "/usage", user="bob")
    assert "0 message" in (await people.replies(1, "oc_bob"))[0], "commands need no model"
    await people.say(bot, "a question")
    assert (await people.replies(2, "oc_ann"))[-1] == "Thinking is off."
    await operator.types("resume", "--models")
    assert (await people.replies(3, "oc_ann"))[-1] == "a question"


async def test_a_paused_account_sends_no_answer_but_what_its_operator_says(
    operator, people, feishu, db_url, record
):
    bot = await operator.workers(configuration(db_url, feishu=feishu), 2)
    feishu.down = True
    for text in ("one", "two"):
        await people.say(bot, text)
    await record.ended(2)
    await until(lambda: bot.lines("reply postponed"), "a failed attempt")
    assert (await operator.types("pause", "feishu"))[0] == 0
    await paused(bot, 2, "account:feishu")
    feishu.down = False
    await until(lambda: record.outbox()[0].last_error == "paused", "the answer to be held")
    await operator.types("send", "--platform", "feishu", "--chat", "oc_team", "We are on it.")
    assert await people.replies(1) == ["We are on it."]
    assert [row.state for row in record.outbox(kind="answer")] == ["pending", "pending"]
    assert (await operator.types("resume", "feishu"))[1] == "going on\n"
    assert (await people.replies(3))[1:] == ["one", "two"]
    await record.settled()
    assert feishu.texts("oc_ann") == ["one", "two"]
    assert bot.complaints() == []


async def test_an_unknown_account_is_not_paused_and_the_nearest_is_named(operator, feishu, sqlite_url):
    await operator.workers(configuration(sqlite_url, feishu=feishu), 2)
    code, text = await operator.types("pause", "feichu")
    assert code == 2
    assert "no account 'feichu'; did you mean feishu?" in text


async def test_an_admin_pauses_and_resumes_from_a_chat_and_his_own_question_does_not_stand_in_the_way(
    operator, people, feishu, sqlite_url, sqlite_record
):
    bot = await operator.workers(merged(configuration(sqlite_url, feishu=feishu), ADMIN), 2)
    await people.say(bot, "/pause")
    assert await people.replies(1) == ["Only administrators may use this command."]
    await people.say(bot, "/pause feishu Closed for today.", user="boss")
    await people.replies(1, "oc_boss")
    await paused(bot, 2, "account:feishu")
    await people.say(bot, "a question of mine", user="boss")
    await people.say(bot, "anybody?")
    await people.replies(2, "oc_boss")
    await people.say(bot, "/resume", user="boss")
    await people.replies(4, "oc_boss")
    paused_, told, *last = feishu.texts("oc_boss")
    assert paused_ == "Paused: feishu. Messages are kept and answered after /resume."
    assert told == "Closed for today."
    assert sorted(last) == ["Answering again.", "a question of mine"]
    assert (await people.replies(3, "oc_ann"))[-1] == "anybody?"
    await sqlite_record.settled()


async def test_a_browser_is_told_at_once_that_its_question_waits(
    operator, people, feishu, sqlite_url, sqlite_record
):
    bot = await operator.workers(configuration(sqlite_url, feishu=feishu), 2)
    await operator.types("pause", "web", "--say", "One moment.")
    await paused(bot, 2, "account:web")
    question = {"message": "hello", "request_id": "r1"}
    async with people.http.post(f"{bot.url}/chat", json=question) as response:
        assert response.status == 202
        body = await response.json()
    assert body == {"conversation_id": None, "request_id": "r1", "status": "paused", "message": "One moment."}
    stream = {"Accept": "text/event-stream"}
    async with people.http.post(f"{bot.url}/chat", json={"message": "again"}, headers=stream) as response:
        assert '"status":"paused"' in await response.text()
    await operator.types("resume")
    async with people.http.post(f"{bot.url}/chat", json=question) as response:
        assert (await response.json())["response"] == "hello", "the repeat gets the first one's answer"


# ---------------------------------------------------------------------------------------------------- drain


async def test_drained_processes_finish_what_waits_refuse_what_comes_and_go_on_when_resumed(
    operator, people, model, feishu, db_url, record
):
    bot = await operator.workers(configuration(db_url, feishu=feishu, model=model), 2)
    model.script(*[Behaviour("slow", delay_s=0.5)] * 2)
    await people.say(bot, "first")
    await people.say(bot, "second")
    code, text = await operator.types("drain")
    assert (code, text) == (
        0,
        "draining 2 process(es)\ndrained: nothing is at work; the processes can be stopped\n",
    )
    assert feishu.texts() == ["echo: first", "echo: second"]
    assert await people.post(bot, people.event("too late")) == 503
    assert {p["state"] for p in (await operator.status())["processes"]} == {"drained"}
    await operator.types("resume")
    await until(lambda: len(bot.lines("serving again")) == 2, "both to go on")
    await people.say(bot, "welcome back")
    assert (await people.replies(3))[-1] == "echo: welcome back"
    assert [row.state for row in record.inbox()] == ["answered"] * 3


async def test_the_worker_that_replaces_a_drained_one_is_drained_too_until_it_is_resumed(
    operator, people, feishu, sqlite_url
):
    bot = await operator.workers(configuration(sqlite_url, feishu=feishu), 2)
    assert (await operator.types("drain"))[0] == 0
    before = pids(bot)
    for pid in before.values():
        os.kill(pid, signal.SIGKILL)
    await until(lambda: len(bot.lines("ready")) == 4, "the workers that replace them")
    assert not set(before.values()) & set(pids(bot).values())
    assert [await people.post(bot, people.event("too early")) for _ in range(4)] == [503] * 4
    assert {p["state"] for p in (await operator.status())["processes"]} == {"drained"}
    await operator.types("resume")
    await until(lambda: len(bot.lines("serving again")) == 2, "both to go on")
    await people.say(bot, "welcome back")
    assert await people.replies(1) == ["welcome back"]


async def test_what_waits_at_a_drained_process_is_done_by_the_others(
    operator, bots, people, model, feishu, db_url, record
):
    config = configuration(db_url, feishu=feishu, model=model)
    leaving, staying = await bots.start(config), await bots.start(config)
    engine = open_engine(db_url)
    with engine.begin() as connection:
        tx = Transaction(connection, capabilities(engine).kind, database_now_ms(connection))
        owners = {p.owner.pid: p.owner for p in controls.read_servers(tx)}
        controls.drain(tx, [str(owners[leaving.pid])])
    engine.dispose()
    await until(lambda: leaving.lines("draining"), "the order")
    event = people.event("to the one that leaves")
    assert await people.post(leaving, event) == 503
    assert await people.post(staying, event) == 200, "the platform goes elsewhere"
    assert await people.replies(1) == ["echo: to the one that leaves"]
    await until(lambda: staying.lines("message ended"), "its end")
    assert leaving.lines("message ended") == []
    states = {p["pid"]: p["state"] for p in (await operator.status())["processes"]}
    assert states == {leaving.pid: "drained", staying.pid: "serving"}
    assert await leaving.stop() == 0
    await bots.start(config)
    assert {p["state"] for p in (await operator.status())["processes"]} == {"serving"}


async def test_a_drain_without_a_server_says_so(operator, bots, sqlite_url):
    bots.write(configuration(sqlite_url))
    code, text = await operator.types("drain", config=bots.folder / "config-0.yaml")
    assert (code, text) == (1, "error: no server process has been heard of there lately\n")


# --------------------------------------------------------------------------------------------------- reload


async def test_a_reload_applies_what_can_hold_at_once_and_names_what_needs_a_restart(
    operator, people, feishu, sqlite_url
):
    config = configuration(sqlite_url, feishu=feishu)
    bot = await operator.workers(config, 2)
    await people.say(bot, "/nothing")
    assert (await people.replies(1))[0].startswith("Unknown command")
    changed = merged(config, {"server": {"workers": 3, "max_waiting": 7}, "chat": {"language": "zh"}})
    changed = merged(changed, {"access": {"deny": ["feishu:ou_bob"]}, "schedule": {"timezone": "UTC"}})
    operator.config.write_bytes(orjson.dumps(changed))
    code, text = await operator.types("reload")
    assert code == 0
    for line in text.splitlines():
        assert line.endswith(
            "in force: server.max_waiting, chat.language, access.deny; "
            "needs a restart: server.workers, schedule.timezone"
        )
    assert len(text.splitlines()) == 2
    await people.say(bot, "/nothing")
    assert (await people.replies(2))[1].startswith("未知命令")
    await people.say(bot, "let me in", user="bob")
    assert await people.replies(1, "oc_bob") == ["抱歉，您没有使用本机器人的权限。如需使用，请联系管理员。"]
    assert (await operator.types("reload"))[1].count("needs a restart") == 2, "said again until it is done"


async def test_a_bad_configuration_is_refused_with_its_line_and_the_old_one_kept(
    operator, people, feishu, sqlite_url
):
    bot = await operator.workers(configuration(sqlite_url, feishu=feishu), 2)
    operator.config.write_text("chat:\n  langage: zh\n")
    code, text = await operator.types("reload")
    assert code == 2
    assert "config-0.yaml:2:3: chat.langage: unknown key; did you mean language?" in text
    bot.signal(signal.SIGHUP)
    await until(lambda: bot.lines("configuration refused"), "the refusal")
    assert "chat.langage: unknown key" in bot.lines("configuration refused")[0]["reason"]
    await people.say(bot, "/nothing")
    assert (await people.replies(1))[0].startswith("Unknown command")


async def test_sighup_is_reload_with_one_process_and_with_several_and_for_the_model_too(
    operator, bots, people, model, feishu, sqlite_url
):
    config = configuration(sqlite_url, feishu=feishu, model=model)
    bot = await bots.start(config)
    operator.config.write_bytes(orjson.dumps(merged(config, {"ai": {"system_prompt": "You are brief."}})))
    bot.signal(signal.SIGHUP)
    await until(lambda: bot.lines("configuration reloaded"), "the reload")
    assert bot.lines("configuration reloaded")[0]["applied"] == "ai.system_prompt"
    await people.say(bot, "hello")
    await people.replies(1)
    assert model.requests[-1].body["messages"][0]["content"] == "You are brief."
    await bot.stop()
    several = await operator.workers(config, 2)
    several_config = merged(config, {"server": {"workers": 2}, "budgets": [BUDGET]})
    operator.config.write_bytes(orjson.dumps(several_config))
    several.signal(signal.SIGHUP)
    await until(lambda: len(several.lines("configuration reloaded")) == 2, "both workers")
    assert {line["applied"] for line in several.lines("configuration reloaded")} == {"budgets"}


# ----------------------------------------------------------------------------------------------------- send


async def test_an_operators_words_go_through_the_outbox_to_a_chat_or_a_person(
    operator, people, feishu, db_url, record
):
    bot = await operator.workers(configuration(db_url, feishu=feishu), 2)
    code, text = await operator.types("send", "--platform", "feishu", "--chat", "oc_team", "Hello all.")
    assert (code, text) == (0, "in the outbox: 1 part(s)\n")
    assert await people.replies(1, "oc_team") == ["Hello all."]
    person = (
        "send",
        "--platform",
        "feishu",
        "--user",
        "feishu:private:ou_ann",
        "--request-id",
        "r1",
        "Hello Ann.",
    )
    for _ in range(2):
        assert (await operator.types(*person))[0] == 0
    assert await people.replies(1, "ou_ann") == ["Hello Ann."]
    await record.settled()
    assert [row.state for row in record.outbox()] == ["sent", "sent"]
    assert bot.complaints() == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--platform", "feishu", "x"), "one of --chat and --user"),
        (("--platform", "web", "--chat", "c", "x"), "'web' is no account that is enabled and can send"),
        (("--platform", "feishu", "--user", "qq:ou_1", "x"), "qq:ou_1 is nobody of feishu"),
        (("--platform", "feishu", "--chat", "c", " "), "expected a text that is not empty"),
    ],
)
async def test_a_message_that_cannot_be_sent_is_wrong_use(operator, bots, feishu, sqlite_url, words, says):
    bots.write(configuration(sqlite_url, feishu=feishu))
    code, text = await operator.types("send", *words, config=bots.folder / "config-0.yaml")
    assert code == 2
    assert says in text


async def test_a_message_sent_while_no_server_runs_goes_out_when_one_does(
    operator, bots, people, feishu, sqlite_url
):
    config = configuration(sqlite_url, feishu=feishu)
    bots.write(config)
    words = ("send", "--platform", "feishu", "--chat", "oc_team", "Good morning.")
    code, text = await operator.types(*words, config=bots.folder / "config-0.yaml")
    assert code == 0
    assert "no server is running" in text
    await bots.start(config)
    assert await people.replies(1) == ["Good morning."]


async def test_post_send_takes_the_local_users_message_once_by_its_request_id(
    operator, people, feishu, sqlite_url, sqlite_record
):
    bot = await operator.workers(configuration(sqlite_url, feishu=feishu), 2)
    order = {"platform": "feishu", "chat_id": "oc_team", "text": "Deployed.", "request_id": "build-7"}
    for _ in range(2):
        async with people.http.post(f"{bot.url}/send", json=order) as response:
            assert response.status == 202
            assert await response.json() == {"request_id": "build-7", "parts": 1}
    assert await people.replies(1) == ["Deployed."]
    await sqlite_record.settled()
    assert sqlite_record.count(schema.outbox) == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"platform": "nobody"}, "platform: expected the name of an account"),
        ({"platform": "web"}, "platform: expected the name of an account"),
        ({"text": " "}, "text: expected a text that is not empty"),
        ({"text": None}, "text: missing"),
        ({"user_key": "ou_1"}, "expected one of chat_id and user_key"),
        ({"chat_id": None, "user_key": "feishu:group:ou_1"}, "is no key of a private chat"),
        ({"chat_type": "crowd"}, "chat_type: expected group, channel or private"),
        ({"txt": "x"}, "txt: unknown"),
        ({"request_id": "x" * 201}, "request_id: expected a text of 1 to 200 characters"),
    ],
)
async def test_post_send_says_what_is_wrong_and_sends_nothing(
    bots, people, feishu, sqlite_url, sqlite_record, change, says
):
    bot = await bots.start(configuration(sqlite_url, feishu=feishu))
    order = {"platform": "feishu", "chat_id": "oc_team", "text": "x", **change}
    async with people.http.post(f"{bot.url}/send", json=order) as response:
        assert response.status == 400
        assert says in (await response.json())["error"]["message"]
    assert sqlite_record.outbox() == []


@pytest.mark.parametrize(
    "headers", [{"X-Forwarded-For": "1.2.3.4"}, {"Origin": "https://evil.example"}, {"Host": "evil"}]
)
async def test_post_send_is_the_local_users_alone(bots, people, feishu, sqlite_url, sqlite_record, headers):
    bot = await bots.start(configuration(sqlite_url, feishu=feishu))
    order = {"platform": "feishu", "chat_id": "oc_team", "text": "x"}
    async with people.http.post(f"{bot.url}/send", json=order, headers=headers) as response:
        assert response.status == 403
    assert sqlite_record.outbox() == []


# --------------------------------------------------------------------------------------------------- status


async def test_status_shows_each_process_what_waits_and_the_last_errors(
    operator, people, model, feishu, sqlite_url
):
    bot = await operator.workers(configuration(sqlite_url, feishu=feishu, model=model), 2)
    model.script(Behaviour("status", status=401))
    await people.say(bot, "hello")
    await people.replies(1)

    assert (await operator.types("reload"))[0] == 0  # each process answers with its report
    found = await operator.status()
    errors = [error for p in found["processes"] for error in p["errors"]]
    assert [(error["event"], error["reason"]) for error in errors] == [("model call failed", "refused")]
    assert {p["worker"] for p in found["processes"]} == {0, 1}
    assert (found["waiting"], found["outbox"], found["dead_messages"]) == (0, 0, 1)
    host = Owner.current().host.partition("/")[0]
    assert {p["host"] for p in found["processes"]} == {host}
    code, text = await operator.types("status")
    assert code == 0
    assert text.startswith("waiting 0 (oldest -)")
    assert text.count("serving") == 2
