"""Signs that an answer is being made, as the record keeps them."""

from __future__ import annotations

from feishu_bot.store import signs
from feishu_bot.store.leases import STALE_MS
from feishu_bot.store.signs import Sign
from tests.stores import HOUR

GONE = "elsewhere/boot/1|7|9"


async def put_up(store, sign, owner):
    await store.run(lambda tx: signs.note(tx, sign, owner=owner))


async def test_a_sign_is_its_own_processs_until_that_is_no_more(store, clock):
    ours, theirs = Sign("feishu", "om_1", "r1"), Sign("feishu", "om_1", "r2")
    await put_up(store, ours, str(store.owner))
    await put_up(store, theirs, GONE)
    assert await store.read(signs.left_behind) == ([theirs], [])
    await store.run(lambda tx: signs.forget(tx, [theirs]))
    assert await store.read(signs.left_behind) == ([], [])
    clock.now_ms += STALE_MS + 1  # we have said nothing for so long
    assert await store.read(signs.left_behind) == ([ours], [])


async def test_a_sign_given_away_is_anybodys_and_after_a_day_nobodys(store, clock):
    sign = Sign("feishu", "om:%" + "x" * 300, "r1")
    await put_up(store, sign, str(store.owner))
    await put_up(store, sign, "")
    assert await store.read(signs.left_behind) == ([sign], [])
    clock.now_ms += 24 * HOUR + 1
    assert await store.read(signs.left_behind) == ([], [sign])
    for _ in range(2):
        await store.run(lambda tx: signs.forget(tx, [sign]))
    assert await store.read(signs.left_behind) == ([], [])
