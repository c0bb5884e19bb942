"""CardKit of the fake Feishu: cards that are made, sent once, written into while they stream, and finished.

Source: open.feishu.cn, "CardKit": numbers of updates rise, a card that is finished takes none of the streaming kind.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import orjson

if TYPE_CHECKING:
    from collections.abc import Callable

CARDS_PATH: Final = "/open-apis/cardkit/v1/cards"
_CARD: Final = re.compile(CARDS_PATH + r"(?:/([^/]+)(/elements/([^/]+)/content|/settings)?)?")
_TAKEN: Final = 300317
_FINISHED: Final = 300309


@dataclass(slots=True)
class FakeCard:
    """A card. ``texts`` holds what it has shown, oldest first; ``message_id`` is empty until it was sent."""

    id: str
    texts: list[str]
    streaming: bool
    number: int = 0
    message_id: str = ""
    elements: frozenset[str] = field(default_factory=frozenset)


class FakeCards:
    """All cards. ``changed`` is told of one whose text is to be seen; ``granted`` False refuses to make any."""

    def __init__(self, changed: Callable[[FakeCard], None]) -> None:
        self.granted = True
        self.all: dict[str, FakeCard] = {}
        self._changed = changed

    def answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
        """Return status and answer of a call of CardKit, None for any other."""
        match = _CARD.fullmatch(path)
        if match is None:
            return None
        if method == "POST" and match[1] is None:
            return self._make(body)
        card = self.all.get(match[1] or "")
        if card is None:
            return 400, _refusal(200740, "card not found")
        if body.get("sequence", 0) <= card.number:
            return 400, _refusal(_TAKEN, "sequence is not increasing")
        return self._change(card, method, match, body)

    def _make(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if not self.granted:
            return 400, _refusal(99991672, "Access denied. cardkit:card:write")
        card = FakeCard(f"card_{len(self.all) + 1}", [], streaming=False)
        if body.get("type") != "card_json" or not _lay_out(card, body.get("data")):
            return 400, _refusal(300301, "the card is not valid")
        self.all[card.id] = card
        return 200, {"code": 0, "msg": "success", "data": {"card_id": card.id}}

    def _change(
        self, card: FakeCard, method: str, match: re.Match[str], body: dict[str, Any]
    ) -> tuple[int, dict[str, Any]]:
        if method == "PUT" and match[3] is not None:
            if not card.streaming:
                return 400, _refusal(_FINISHED, "streaming mode is closed")
            if (
                match[3] not in card.elements
                or not isinstance(body.get("content"), str)
                or not body["content"]
            ):
                return 400, _refusal(300313, "element or content is not valid")
            card.texts.append(body["content"])
        elif method == "PATCH" and match[2] == "/settings":
            card.streaming = bool(orjson.loads(body["settings"])["config"]["streaming_mode"])
        elif method == "PUT" and match[2] is None:
            if not _lay_out(card, body["card"]["data"]):
                return 400, _refusal(300301, "the card is not valid")
        else:
            return 404, _refusal(404, "not found")
        card.number = body["sequence"]
        self._changed(card)
        return 200, {"code": 0, "msg": "success", "data": {}}


def _lay_out(card: FakeCard, data: object) -> bool:
    try:
        layout = orjson.loads(data if isinstance(data, str) else "")
        elements = layout["body"]["elements"]
        card.streaming = layout["config"].get("streaming_mode") is True
        card.elements = frozenset(e["element_id"] for e in elements if e["tag"] == "markdown")
        card.texts.append(elements[0]["content"])
    except (ValueError, KeyError, TypeError, IndexError):
        return False
    return layout.get("schema") == "2.0" and bool(card.elements)


def _refusal(code: int, msg: str) -> dict[str, Any]:
    return {"code": code, "msg": msg, "data": {}}
