from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress

import aiohttp
import pytest

from feishu_bot.errors import StoreError
from feishu_bot.model import InboundMessage
from feishu_bot.platforms.base import PlatformContext
from feishu_bot.testing.onebot import FakeOneBot, heartbeat_event, message_event
from feishu_bot.web.sockets import Backlog
from tests.platforms.onebots import TOKEN, VECTORS, Record, doors, onebot, part, until

LONG = 60.0


async def refused(connecting) -> int:
    with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
        await connecting
    return caught.value.status


# ---------------------------------------------------------------------------------------------- who may come in


@pytest.mark.parametrize("case", VECTORS["auth_cases"], ids=lambda case: case["name"])
async def test_every_recorded_handshake_ends_as_it_should(case):
    platform = onebot(access_token=case["configured_token"], insecure=not case["configured_token"])
    async with doors(platform) as server, FakeOneBot() as fake:
        query = "&".join(f"{k}={v}" for k, v in case["query"].items())
        connecting = fake.connect(f"{server.ws}?{query}", headers=case["headers"])
        expected = case["expect"].split(",")[0].split()
        if expected[0] == "reject":
            assert await refused(connecting) == int(expected[1])
            return
        link = await connecting
        await link.push(message_event("hello", message_id=7))
        await link.push(heartbeat_event())
        role = case["headers"].get("X-Client-Role", "Universal")
        await until(lambda: [p.caller.role.value for p in platform._peers] == [role.lower()])
        assert bool(platform._peers.for_calls("10001")) == (role != "Event")
        if role != "API":
            await until(lambda: server.record.texts == ["hello"])


@pytest.mark.parametrize(
    ("authorization", "query", "status"),
    [
        (None, f"?access_token={TOKEN}", 101),
        ("Bearer ", f"?access_token={TOKEN}", 101),
        ("Bearer", f"?access_token={TOKEN}", 101),
        (None, "?access_token=wrong", 403),
        (None, "?access_token=", 401),
        (None, "", 401),
        ("Bearer ", "", 401),
        (f"Bearer {TOKEN}", "?access_token=wrong", 101),
        ("Bearer \u00e9\u00e9", "", 403),
        (TOKEN, "", 401),
        ("bearer old", "", 101),
    ],
)
async def test_a_token_is_taken_from_the_header_and_else_from_the_address(authorization, query, status):
    headers = {"X-Self-ID": "10001"} | ({} if authorization is None else {"Authorization": authorization})
    async with doors(onebot(access_token=[TOKEN, "old"])) as server, FakeOneBot() as fake:
        connecting = fake.connect(server.ws + query, headers=headers)
        if status == 101:
            await connecting
        else:
            assert await refused(connecting) == status


async def test_a_strange_role_or_a_bot_of_somebody_else_is_refused():
    async with doors(onebot(self_ids=["10001"])) as server, FakeOneBot() as fake:
        good = {"X-Self-ID": "10001", "Authorization": f"Bearer {TOKEN}"}
        assert await refused(fake.connect(server.ws, headers={**good, "X-Client-Role": "Boss"})) == 400
        assert await refused(fake.connect(server.ws, headers={**good, "X-Self-ID": "../.."})) == 400
        assert await refused(fake.connect(server.ws, headers={**good, "X-Self-ID": "10009"})) == 403


async def test_a_door_without_a_token_or_an_account_is_not_there():
    async with doors(onebot(access_token="")) as server, FakeOneBot() as fake:
        assert await refused(fake.connect(server.ws)) == 404
        assert await refused(fake.connect(server.ws.replace("/ws/onebot", "/ws/nobody"))) == 404


async def test_a_request_that_wants_no_web_socket_is_refused():
    async with doors(onebot()) as server, aiohttp.ClientSession() as session:
        headers = {"X-Self-ID": "10001", "Authorization": f"Bearer {TOKEN}"}
        async with session.get(server.ws, headers=headers) as response:
            assert response.status == 400


async def test_while_the_store_takes_nothing_clients_are_told_to_come_again():
    async with doors(onebot()) as server, FakeOneBot(access_token=TOKEN) as fake:
        server.gate.reason = "the database is away"
        assert await refused(fake.connect(server.ws)) == 503
        server.gate.reason = None
        await fake.connect(server.ws)


# --------------------------------------------------------------------------------------------- one socket each


async def test_of_two_sockets_of_one_bot_and_role_the_newer_wins():
    async with doors(onebot()) as server, FakeOneBot(access_token=TOKEN) as fake:
        first = await fake.connect(server.ws)
        second = await fake.connect(server.ws)
        await until(first.closed.is_set)
        assert first.close_code == 1000
        await second.push(message_event("hello", message_id=7))
        await until(lambda: server.record.texts == ["hello"])
        assert not second.closed.is_set()
        await server.platform.send(part())
        assert fake.texts() == ["hello"]
        assert len(second.answers) == 1


async def test_sockets_of_different_roles_and_bots_stand_beside_each_other():
    platform = onebot(self_ids=["10001", "10002"])
    async with (
        doors(platform) as server,
        FakeOneBot(access_token=TOKEN) as one,
        FakeOneBot(access_token=TOKEN, self_id=10002) as two,
    ):
        events = await one.connect(server.ws, role="Event")
        calls = await one.connect(server.ws, role="API")
        other = await two.connect(server.ws)
        await until(lambda: len(list(platform._peers)) == 3)
        await events.push(message_event("hello", message_id=7))
        await until(lambda: server.record.texts == ["hello"])
        await platform.send(part())
        assert len(calls.answers) == 1
        assert not any(link.closed.is_set() for link in (events, calls, other))


async def test_a_storm_of_connections_leaves_one_that_works_and_loses_no_event_of_it():
    async with doors(onebot()) as server, FakeOneBot(access_token=TOKEN) as fake:
        links = await asyncio.gather(*(fake.connect(server.ws) for _ in range(40)))
        await until(lambda: sum(not link.closed.is_set() for link in links) == 1)
        (left,) = (link for link in links if not link.closed.is_set())
        for n in range(20):
            await left.push(message_event(f"text {n}", message_id=n))
        await until(lambda: server.record.texts == [f"text {n}" for n in range(20)])
        await server.platform.send(part())
        assert len(list(server.platform._peers)) == 1


async def test_the_platform_is_told_that_it_can_send_by_sockets_that_take_calls():
    told = []
    platform = onebot(context=PlatformContext(connected=told.append))
    async with doors(platform) as server, FakeOneBot(access_token=TOKEN) as fake:
        await fake.connect(server.ws, role="Event")
        await fake.connect(server.ws, role="API")
        await until(lambda: len(list(platform._peers)) == 2)
        assert told == ["onebot"]


async def test_a_half_open_connection_is_found_by_its_silence():
    async with doors(onebot(), heartbeat_s=0.1) as server, FakeOneBot(access_token=TOKEN) as fake:
        link = await fake.connect(server.ws)
        await until(lambda: server.platform.problems() == [])
        link.freeze()
        await link.push(heartbeat_event())  # wakes the reader, so that it stops
        await until(lambda: server.platform.problems() != [])


async def test_a_bot_whose_old_connection_is_half_open_comes_back_at_once():
    async with doors(onebot(), heartbeat_s=LONG) as server, FakeOneBot(access_token=TOKEN) as fake:
        link = await fake.connect(server.ws)
        link.freeze()
        new = await fake.connect(server.ws)
        await new.push(message_event("hello", message_id=7))
        await until(lambda: server.record.texts == ["hello"])
        await server.platform.send(part())
        assert len(new.answers) == 1


# ------------------------------------------------------------------------------------------------------- frames


async def test_frames_that_are_no_event_of_this_bot_change_nothing():
    async with doors(onebot()) as server, FakeOneBot(access_token=TOKEN) as fake:
        link = await fake.connect(server.ws)
        strange = [
            b"",
            b"nonsense",
            b"[]",
            b"1",
            b"{}",
            b'{"post_type": 1}',
            b'{"post_type": ["message"]}',
            b"[" * 5000,
        ]
        for frame in strange:
            await link.push(frame)
        await link.push(message_event("not mine", message_id=1, self_id=10009))
        await link.socket.send_bytes(b"\xff\xfe")
        await link.push(message_event("mine", message_id=2))
        await until(lambda: server.record.texts == ["mine"])


async def test_an_event_on_a_socket_for_calls_is_none():
    async with doors(onebot()) as server, FakeOneBot(access_token=TOKEN) as fake:
        calls = await fake.connect(server.ws, role="API")
        await calls.push(message_event("forged", message_id=1))
        events = await fake.connect(server.ws, role="Event")
        await events.push(message_event("real", message_id=2))
        await until(lambda: server.record.texts == ["real"])


async def test_a_large_event_is_taken_and_one_that_is_too_large_closes_the_socket():
    async with doors(onebot(), max_frame=10_000_000) as server, FakeOneBot(access_token=TOKEN) as fake:
        link = await fake.connect(server.ws)
        image = {"type": "image", "data": {"file": "base64://" + "A" * 4_000_000}}
        words = {"type": "text", "data": {"text": "look"}}
        await link.push(message_event([words, image], message_id=1))
        await until(lambda: server.record.texts == ["look"])
        assert len(server.record.messages[0].to_json()) < 1000
        with suppress(ConnectionError):  # it may be cut while it is still being sent
            await link.push(message_event([words, image, image], message_id=2))
        await until(link.closed.is_set)
        assert link.close_code in {1009, 1006}
        assert server.record.texts == ["look"]


# ------------------------------------------------------------------------------------------------------- record


async def test_events_wait_while_the_database_is_away_and_are_recorded_in_their_order():
    async with doors(onebot()) as server, FakeOneBot(access_token=TOKEN) as fake:
        link = await fake.connect(server.ws)
        server.record.away = True
        for n in range(10):
            await link.push(message_event(f"text {n}", message_id=n))
        await until(lambda: server.record.calls)
        server.record.away = False
        await until(lambda: server.record.texts == [f"text {n}" for n in range(10)])


async def test_an_event_that_comes_by_both_ways_is_recorded_once():
    async with (
        doors(onebot()) as server,
        FakeOneBot(access_token=TOKEN, secret="secret-of-the-tests") as fake,
    ):
        link = await fake.connect(server.ws)
        event = await fake.say("hello")
        await until(lambda: server.record.texts == ["hello"])
        assert (await fake.post(server.webhook, event))[0] == 204
        await link.push(event)
        await until(lambda: server.record.repeats == 2)
        assert server.record.texts == ["hello"]


async def test_when_too_much_waits_the_socket_is_closed_and_what_was_read_is_recorded_later():
    async with (
        doors(onebot(), max_unrecorded=5, patience_s=0.05) as server,
        FakeOneBot(access_token=TOKEN) as fake,
    ):
        link = await fake.connect(server.ws)
        server.record.away = True
        for n in range(5):
            await link.push(message_event(f"text {n}", message_id=n))
        await until(link.closed.is_set)
        assert link.close_code == 1013
        assert await refused(fake.connect(server.ws)) == 503
        server.record.away = False
        await until(lambda: server.record.texts == [f"text {n}" for n in range(5)])
        await fake.connect(server.ws)


async def test_a_socket_is_not_read_while_there_is_no_room():
    async with (
        doors(onebot(), max_unrecorded=5, patience_s=LONG) as server,
        FakeOneBot(access_token=TOKEN) as fake,
    ):
        link = await fake.connect(server.ws)
        server.record.away = True
        for n in range(100):
            await link.push(message_event(f"text {n}", message_id=n))
        backlog = await until(lambda: server.sockets._backlogs.get("onebot"))
        await until(lambda: server.record.calls)
        assert len(backlog) <= 6
        server.record.away = False
        await until(lambda: server.record.texts == [f"text {n}" for n in range(100)])


async def test_what_was_read_is_recorded_before_the_server_has_stopped():
    async with FakeOneBot(access_token=TOKEN) as fake:
        async with doors(onebot()) as server:
            link = await fake.connect(server.ws)
            server.record.away = True
            await link.push(message_event("last words", message_id=1))
            await until(lambda: server.record.calls)
            server.gate.draining = True
            server.record.away = False
        await until(link.closed.is_set)
        assert link.close_code == 1001
        assert server.record.texts == ["last words"]


def messages(*texts: str) -> list[InboundMessage]:
    return [InboundMessage("onebot", f"m:{t}", text=t, sender_id=t[0]) for t in texts]


async def test_an_event_that_the_database_refuses_keeps_no_other_out(caplog):
    record = Record(refused=frozenset({"b1"}))
    backlog = Backlog(record.record, lambda: None, pause_s=0.0)
    backlog.add(messages("a1", "b1", "b2", "c1"))
    await until(lambda: record.texts == ["a1", "c1"])
    for n in range(2, 5):
        backlog.add(messages(f"a{n}"))
        await until(lambda n=n: f"a{n}" in record.texts)
    await until(lambda: "b2" in record.texts)
    assert [r.key for r in caplog.records if r.message == "event lost"] == ["m:b1"]
    await backlog.close(1.0)


async def test_an_event_that_waiting_does_not_help_is_lost_alone_and_at_once(caplog):
    record = Record()

    async def sometimes(events):
        if any(event.text == "large" for event in events):
            raise StoreError("too large")
        return await record.record(events)

    backlog = Backlog(sometimes, lambda: None, pause_s=600.0)
    backlog.add(messages("a1", "large", "b1"))
    await until(lambda: record.texts == ["a1", "b1"])
    backlog.add(messages("large"))
    await until(lambda: len(backlog) == 0)
    lost = [(r.key, r.reason) for r in caplog.records if r.message == "event lost"]
    assert lost == [("m:large", "too large")] * 2
    await backlog.close(1.0)


async def test_events_that_cannot_be_recorded_at_the_end_are_counted_as_lost(caplog):
    record = Record(away=True)
    backlog = Backlog(record.record, lambda: None, pause_s=0.0)
    backlog.add(messages("a1", "a2"))
    await backlog.close(0.01)
    assert [r.events for r in caplog.records if r.message == "events lost"] == [2]


async def test_a_fault_of_the_program_is_told_and_does_not_end_the_backlog(caplog):
    record, broken = Record(), True

    async def sometimes(events):
        if broken:
            raise TypeError("a fault")
        return await record.record(events)

    backlog = Backlog(sometimes, lambda: None)
    backlog.add(messages("a1"))
    await until(lambda: any(r.message == "events lost" for r in caplog.records))
    broken = False
    backlog.add(messages("a2"))
    await until(lambda: record.texts == ["a2"])
    await backlog.close(1.0)


async def test_many_events_are_recorded_by_few_transactions():
    record = Record()
    backlog = Backlog(record.record, lambda: None)
    start = time.perf_counter()
    for n in range(1000):
        backlog.add(messages(f"a{n}"))
    await backlog.close(LONG)
    assert time.perf_counter() - start < LONG
    assert len(record.messages) == 1000
    assert record.calls <= 10


async def test_a_socket_that_breaks_while_its_pings_are_answered_is_no_fault_of_the_server(caplog):
    async with doors(onebot()) as server, FakeOneBot(access_token=TOKEN) as fake:
        link = await fake.connect(server.ws)
        await until(lambda: list(server.platform._peers))
        for _ in range(2000):
            await link.socket.ping(b"x" * 100)
        link.drop()
        await until(lambda: not list(server.platform._peers))
        await fake.connect(server.ws)
    assert [r.message for r in caplog.records if r.levelno >= logging.ERROR] == []
