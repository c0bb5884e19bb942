"""How far our count of a prompt is from what a model reports, where its own encoding is not at hand."""

from __future__ import annotations

from typing import Final

from feishu_bot.ai.tokens import is_exact

MOST: Final = 2.0  # whatever is reported, a reservation is not widened further than this
_ENOUGH: Final = 50  # tokens of a prompt from which something can be learnt; below, framing is all there is
_UP: Final = 0.5  # how much of a difference is taken over: quickly towards more,
_DOWN: Final = 0.02  # slowly back

# Where o200k_base counts too few by more than ``budget_margin`` covers: Mistral's prompts are 1.18 times as long
# (English, Chinese and code). Claude's encoding is not published; its start is a guess, corrected by what it reports.
_STARTS: Final = (("mistral", 1.05), ("mixtral", 1.05), ("codestral", 1.05), ("claude", 1.15))


class Drift:
    """One for all calls of a process. ``margin`` is the factor on what is counted by another model's encoding."""

    def __init__(self, margin: float) -> None:
        self._margin = margin
        self._learnt: dict[str, float] = {}

    def factor(self, model: str) -> float:
        """Return by how much a counted prompt is widened when it is reserved; 1 where the count is the model's own."""
        if is_exact(model):
            return 1.0
        return self._margin * self._of(model)

    def learn(self, model: str, *, counted: int, reported: int) -> None:
        """Take over how long a prompt was by the model's own count; never below ours, never above ``MOST``."""
        if is_exact(model) or counted < _ENOUGH:
            return
        known, seen = self._of(model), reported / counted
        learnt = known + (seen - known) * (_UP if seen > known else _DOWN)
        self._learnt[model] = min(MOST, max(1.0, learnt))

    def _of(self, model: str) -> float:
        known = self._learnt.get(model)
        if known is None:
            name = model.lower()
            known = next((start for family, start in _STARTS if family in name), 1.0)
        return known
