"""Charts as shapes to draw: columns of days, each stacked of what is told apart. A template makes SVG of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

WIDTH: Final = 720
HEIGHT: Final = 220
COLOURS: Final = 8  # those of the style sheet; then they begin anew
_LEFT: Final = 64
_TOP: Final = 12
_BOTTOM: Final = 28
_LINES: Final = 4
_DATES: Final = 7  # days that are named below the columns
_GAP: Final = 0.25  # of a column


@dataclass(frozen=True, slots=True)
class Shape:
    """A piece of a column. ``label`` is what it says when one points at it."""

    x: float
    y: float
    width: float
    height: float
    colour: int
    label: str


@dataclass(frozen=True, slots=True)
class Mark:
    """A word beside the chart: of a line across it (``at`` is y), or of a day below it (``at`` is x)."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Chart:
    """Everything a template draws; ``rows`` are the same numbers as a table: a day, then a number for each name."""

    names: Sequence[str]
    totals: Sequence[str]
    shapes: Sequence[Shape]
    lines: Sequence[Mark]
    dates: Sequence[Mark]
    rows: Sequence[tuple[str, Sequence[str]]]
    total: str


def stacked(
    days: Sequence[str],
    values: Mapping[tuple[str, str], float],
    told: Callable[[float], str],
    *,
    like: Sequence[str] = (),
) -> Chart:
    """Return a chart of ``values`` by day and name, the largest at the bottom; ``told`` writes a number.

    ``like``: the names of another chart beside it; they keep their order and so their colours.
    """
    sums: dict[str, float] = {}
    for (day, name), value in values.items():
        if day in days:
            sums[name] = sums.get(name, 0) + value
    known = [name for name in like if name in sums]
    names = known + sorted(sums.keys() - set(known), key=lambda name: (-sums[name], name))
    top = _round_up(max((sum(values.get((day, n), 0) for n in names) for day in days), default=0))
    inner, step = HEIGHT - _TOP - _BOTTOM, (WIDTH - _LEFT) / max(1, len(days))
    shapes = []
    for place, day in enumerate(days):
        y = float(HEIGHT - _BOTTOM)
        for number, name in enumerate(names):
            value = values.get((day, name), 0)
            if value <= 0:
                continue
            height = value / top * inner
            y -= height
            x = _LEFT + (place + _GAP / 2) * step
            label = f"{day} · {name}: {told(value)}"
            shapes.append(
                Shape(
                    round(x, 1),
                    round(y, 1),
                    round(step * (1 - _GAP), 1),
                    round(height, 1),
                    number % COLOURS,
                    label,
                )
            )
    every = -(-len(days) // _DATES)
    return Chart(
        names,
        [told(sums[name]) for name in names],
        shapes,
        [
            Mark(round(HEIGHT - _BOTTOM - inner * n / _LINES, 1), told(top * n / _LINES))
            for n in range(_LINES + 1)
        ],
        [Mark(round(_LEFT + (n + 0.5) * step, 1), days[n][5:]) for n in range(0, len(days), max(1, every))],
        [(day, [told(values.get((day, name), 0)) for name in names]) for day in reversed(days)],
        told(sum(sums.values())),
    )


def _round_up(value: float) -> float:
    """Return the next number a quarter of which is written short; 1 for nothing."""
    if value <= 0:
        return 1.0
    size = 1e-6
    while True:
        for first in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8):
            if value <= first * size:
                return float(first * size)
        size *= 10
