"""Orders of operators, and what processes say of themselves."""

from __future__ import annotations

from feishu_bot.store import controls, leases
from feishu_bot.store.controls import ALL, MODELS, Pause, account_target
from feishu_bot.store.leases import Owner
from tests.stores import HOUR


async def test_a_pause_holds_its_account_until_it_is_resumed(store, clock):
    await store.run(lambda tx: controls.pause(tx, account_target("feishu"), say="Back soon.", by="web:ann"))
    orders = await store.read(controls.read_orders)
    assert orders.pause_of("feishu") == Pause("account:feishu", clock.now_ms, "Back soon.", "web:ann")
    assert orders.pause_of("qq") is None
    assert orders.models is None
    assert await store.run(lambda tx: controls.resume(tx, account_target("qq"))) == 0
    assert await store.run(lambda tx: controls.resume(tx, account_target("feishu"))) == 1
    assert await store.read(controls.read_orders) == controls.Orders()


async def test_an_account_named_all_or_models_is_an_account_like_any_other(store):
    await store.run(lambda tx: controls.pause(tx, account_target("all")))
    await store.run(lambda tx: controls.pause(tx, account_target("models")))
    orders = await store.read(controls.read_orders)
    assert orders.pause_of("feishu") is None
    assert orders.models is None
    await store.run(lambda tx: controls.pause(tx, ALL))
    await store.run(lambda tx: controls.pause(tx, MODELS))
    orders = await store.read(controls.read_orders)
    assert orders.pause_of("feishu") is not None
    assert orders.models is not None


async def test_a_pause_given_again_is_another_one(store, clock):
    await store.run(lambda tx: controls.pause(tx, ALL, say="one"))
    clock.now_ms += 1
    await store.run(lambda tx: controls.pause(tx, ALL, say="two"))
    (pause,) = (await store.read(controls.read_orders)).pauses
    assert (pause.say, pause.at) == ("two", clock.now_ms)


async def test_a_drain_means_single_processes_until_they_are_no_more(store):
    gone = str(Owner("here/boot/1", 1, "2"))
    await store.run(lambda tx: controls.drain(tx, [gone, str(store.owner)]))
    assert (await store.read(controls.read_orders)).drains == {gone, str(store.owner)}
    await store.run(lambda tx: controls.drain(tx, [str(store.owner)]))
    assert (await store.read(controls.read_orders)).drains == {str(store.owner)}
    assert await store.run(controls.resume) == 1


async def test_each_order_to_reload_has_a_higher_number_even_when_the_clock_goes_back(store, clock):
    first = await store.run(controls.order_reload)
    clock.now_ms -= HOUR
    second = await store.run(controls.order_reload)
    assert second > first
    assert (await store.read(controls.read_orders)).reload_at == second


async def test_only_servers_that_were_heard_of_lately_are_counted(store, clock):
    assert await store.read(controls.count_servers) == 0, "a command says nothing of itself"
    await store.run(lambda tx: controls.report(tx, str(store.owner), {"state": "serving"}))
    (server,) = await store.read(controls.read_servers)
    assert (server.owner, server.version, server.report) == (store.owner, "test", {"state": "serving"})
    assert await store.read(controls.count_servers) == 1
    clock.now_ms += controls.SILENT_MS
    assert await store.read(controls.count_servers) == 0
    await store.run(lambda tx: leases.renew(tx, str(store.owner), [], []))
    assert await store.read(controls.count_servers) == 1


async def test_a_turn_is_had_once_in_its_time_and_can_be_given_back(store, clock):
    async def claim() -> bool:
        return await store.run(lambda tx: controls.claim_turn(tx, "alert", "disk", HOUR))

    assert await claim()
    assert not await claim()
    clock.now_ms += HOUR - 1
    assert not await claim()
    clock.now_ms += 1
    assert await claim()
    await store.run(lambda tx: controls.give_turn_back(tx, "alert", "disk"))
    assert await claim()


async def test_a_warning_is_given_once(store, clock):
    async def first(*names: str) -> list[str]:
        return await store.run(lambda tx: controls.first_warnings(tx, names))

    assert await first("a", "b") == ["a", "b"]
    clock.now_ms += 30 * 24 * HOUR
    assert await first("b", "c") == ["c"]
