"""Circuit breakers: a model that keeps failing is left alone for a while, where another one can be asked instead."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from feishu_bot.errors import ModelError

log = logging.getLogger(__name__)

FAILURES_IN_A_ROW: Final = 5  # so many, and the circuit opens
PAUSE_S: Final = 30.0  # then one call tries; the others do not wait for it
# What speaks against the server, not against the question or the key.
_COUNTED: Final = frozenset({"unavailable", "timeout", "rate_limited", "nonsense"})


@dataclass(slots=True)
class _Circuit:
    failures: int = 0
    closed_at: float = 0.0  # when the next call may try; as long as fewer have failed it says nothing
    reason: str = ""


class Circuits:
    """One circuit per model, in this process. ``clock`` counts seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._circuits: dict[str, _Circuit] = {}

    def permits(self, model: str) -> bool:
        """Say whether the model may be asked. After the pause one caller is told so, and is to try."""
        circuit = self._circuits.get(model)
        if circuit is None or circuit.failures < FAILURES_IN_A_ROW:
            return True
        now = self._clock()
        if now < circuit.closed_at:
            return False
        circuit.closed_at = now + PAUSE_S
        return True

    def succeeded(self, model: str) -> None:
        """Take note of an answer, which closes the circuit."""
        circuit = self._circuits.pop(model, None)
        if circuit is not None and circuit.failures >= FAILURES_IN_A_ROW:
            log.info("model answers again", extra={"model": model})

    def failed(self, model: str, error: ModelError) -> None:
        """Take note of a failure; one that says nothing of the server is passed over."""
        if error.kind not in _COUNTED:
            return
        circuit = self._circuits.setdefault(model, _Circuit())
        circuit.failures += 1
        circuit.reason = error.kind  # its words may hold the question's
        if circuit.failures >= FAILURES_IN_A_ROW:
            circuit.closed_at = self._clock() + PAUSE_S
            if circuit.failures == FAILURES_IN_A_ROW:
                log.warning(
                    "model circuit opened",
                    extra={"model": model, "failures": circuit.failures, "seconds": PAUSE_S},
                )

    def states(self) -> dict[str, bool]:
        """Return for each model that has failed lately whether its circuit is open."""
        return {model: c.failures >= FAILURES_IN_A_ROW for model, c in list(self._circuits.items())}

    def problems(self) -> list[str]:
        """Return one line for every circuit that is open."""
        return [
            f"model {model}: {circuit.failures} failures in a row, the last: {circuit.reason}"
            for model, circuit in list(self._circuits.items())
            if circuit.failures >= FAILURES_IN_A_ROW
        ]
