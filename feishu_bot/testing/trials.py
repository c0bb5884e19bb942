"""What an account's doors are tried with: events as its platform sends them, and as somebody else would.

The events are of kinds that nobody answers. A platform without trials of its own is tried with an unsigned request.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import orjson

from feishu_bot.platforms.feishu import FeishuSettings
from feishu_bot.platforms.onebot import OneBotSettings
from feishu_bot.platforms.onebot_event import digest_key
from feishu_bot.platforms.qq import QQSettings
from feishu_bot.testing import feishu, onebot, qq

if TYPE_CHECKING:
    from collections.abc import Mapping

    from feishu_bot.config import PlatformSettings

CHALLENGE: Final = "doctor-challenge"
_PLAIN_TOKEN: Final = "DoctorChallenge"  # noqa: S105  # echoed, no secret
_STALE_S: Final = 7 * 86400


@dataclass(frozen=True, slots=True)
class Trial:
    """One request and what has to come of it. ``echo`` stands in the answer's body."""

    what: str
    body: bytes
    headers: Mapping[str, str]
    expect: int
    echo: str = ""
    path: str = ""
    method: str = "POST"


@dataclass(frozen=True, slots=True)
class Trials:
    """The requests in their order. ``event_key``: under which the event that came twice is recorded once.

    ``left_out``: what cannot be tried without doing harm, with the reason.
    """

    trials: tuple[Trial, ...] = ()
    event_key: str | None = None
    left_out: tuple[tuple[str, str], ...] = ()


@dataclass(slots=True)
class _List:
    """Trials being written down."""

    path: str
    found: list[Trial] = field(default_factory=list)

    def add(self, what: str, request: tuple[Mapping[str, str], bytes], expect: int, **more: Any) -> None:
        headers, body = request
        self.found.append(Trial(what, body, headers, expect, **{"path": self.path, **more}))


def trials_of(own: PlatformSettings, account: str, *, now: float, key: str) -> Trials:
    """Return what an enabled account is tried with. ``key``: an id that no event has had; ``now``: Unix seconds."""
    tries = _List(f"/webhook/{account}")
    match own:
        case FeishuSettings():
            return _feishu(own, tries, now, f"doctor_{key}")
        case QQSettings():
            return _qq(own, tries, f"DOCTOR_CHECK:{key}")
        case OneBotSettings():
            return _onebot(own, tries, account, now, key)
    if own.insecure:
        return Trials()
    tries.add("unsigned", ({"Content-Type": "application/json"}, b"{}"), 401)
    return Trials(tuple(tries.found))


def _feishu(own: FeishuSettings, tries: _List, now: float, key: str) -> Trials:
    token, secret = own.verification_token.current, own.encrypt_key.current
    event = feishu.make_event({"note": "doctor"}, event_type="doctor.check", event_id=key, token=token)
    plain = orjson.dumps(event)
    if not secret:
        wrong = orjson.dumps({**event, "header": {**event["header"], "token": "wrong"}})
        tries.add("with the token", ({}, plain), 200)
        tries.add("repeated", ({}, plain), 200)
        tries.add("with a wrong token", ({}, wrong), 403 if token else 200)
        return Trials(tuple(tries.found), f"ev:{key}")
    headers, body = feishu.sign_and_encrypt(event, encrypt_key=secret)
    unsigned = {name: value for name, value in headers.items() if not name.startswith("X-Lark")}
    challenge = feishu.challenge_event(token=token, challenge=CHALLENGE)
    old = {**event, "header": {**event["header"], "event_id": key + "_stale"}}
    stale = feishu.sign_and_encrypt(old, encrypt_key=secret, timestamp=int(now) - _STALE_S)
    tries.add("signed and encrypted", (headers, body), 200)
    tries.add("repeated", (headers, body), 200)
    tries.add("unsigned", (unsigned, body), 401)
    tries.add("tampered", (headers, body[:-10] + b"AAAAAAAA" + body[-2:]), 401)
    tries.add("not encrypted", (feishu.sign(plain, encrypt_key=secret), plain), 400)
    tries.add("challenge", feishu.sign_and_encrypt(challenge, encrypt_key=secret), 200, echo=CHALLENGE)
    tries.add("stale by a week", stale, 200 if own.max_event_age_s is None else 401)
    return Trials(tuple(tries.found), f"ev:{key}")


def _qq(own: QQSettings, tries: _List, key: str) -> Trials:
    secret = own.app_secret.current
    if not secret:
        return Trials()
    event = qq.make_event({"note": "doctor"}, event_type="DOCTOR_CHECK", event_id=key)
    headers, body = qq.signed_event(event, secret=secret)
    check = orjson.dumps(qq.validation_event(plain_token=_PLAIN_TOKEN))
    tries.add("signed", (headers, body), 200)
    tries.add("repeated", (headers, body), 200)
    if not own.insecure:
        tries.add("unsigned", (_unsigned(headers, "X-Signature"), body), 401)
        # Whoever could have such a check signed could forge events.
        tries.add("unsigned check of the address", ({}, check), 403)
    tries.add("tampered", (headers, body.replace(b"doctor", b"DOCTOR")), 401)
    tries.add("check of the address", qq.signed_event(check, secret=secret), 200, echo=_PLAIN_TOKEN)
    return Trials(tuple(tries.found), f"ev:{key}")


def _onebot(own: OneBotSettings, tries: _List, account: str, now: float, key: str) -> Trials:
    secret, token = own.secret.current, own.access_token.current
    if not (secret or token):
        return Trials()
    bot = own.self_ids[0] if own.self_ids else str(onebot.SELF_ID)
    number = int(bot) if bot.isascii() and bot.isdigit() else 0
    event = {
        "time": int(now),
        "self_id": number,
        "post_type": "doctor",
        "doctor_type": "check",
        "note": key,
    }
    body = orjson.dumps(event)
    headers = onebot.sign(body, secret, self_id=number)
    event_key = None
    if secret:
        tries.add("unsigned", (_unsigned(headers, "x-signature"), body), 401)
        tries.add("tampered", (headers, body.replace(b"doctor", b"DOCTOR")), 403)
        if own.self_ids:
            old = orjson.dumps({**event, "time": int(now) - _STALE_S})
            tries.add("signed", (headers, body), 204)
            tries.add("repeated", (headers, body), 204)
            tries.add("of another bot than it says", ({**headers, "x-self-id": bot + "9"}, body), 400)
            aged = 204 if own.max_event_age_s is None else 401
            tries.add("stale by a week", (onebot.sign(old, secret, self_id=number), old), aged)
            event_key = digest_key("n", event)
    if token:
        # Without the upgrade to a WebSocket: with it, the bot's own client would be replaced.
        door = {"path": f"/ws/{account}", "method": "GET"}
        who = {"X-Self-ID": bot, "X-Client-Role": "Universal"}
        tries.add("WebSocket without a token", (who, b""), 401, **door)
        tries.add(
            "WebSocket with a wrong token", ({**who, "Authorization": "Bearer wrong"}, b""), 403, **door
        )
        if own.self_ids:
            good = {"Authorization": f"Bearer {token}"}
            tries.add(
                "WebSocket of a strange bot", ({**who, "X-Self-ID": bot + "9", **good}, b""), 403, **door
            )
            tries.add("WebSocket with the token, no upgrade", ({**who, **good}, b""), 400, **door)
    reason = (
        "self_ids is empty, so the first bot that is seen stays the only one, and it must not be the doctor's"
    )
    left_out = () if own.self_ids else (("signed", reason),)
    return Trials(tuple(tries.found), event_key, left_out)


def _unsigned(headers: Mapping[str, str], proof: str) -> dict[str, str]:
    return {name: value for name, value in headers.items() if not name.startswith(proof)}
