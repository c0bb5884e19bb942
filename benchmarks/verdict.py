"""What a measured value says beside its floor and its goal."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def verdict(value: float, floor: float, goal: float) -> str:
    """Say which is reached; less is better."""
    return "goal reached" if value <= goal else "floor reached" if value <= floor else "ABOVE THE FLOOR"


def spread(values: Sequence[float]) -> str:
    """Say how far the runs lie apart, and what else the machine did: its load when they ended."""
    return f"spread {min(values):.3g}–{max(values):.3g}; load {os.getloadavg()[0]:.1f}"


def show(what: str, value: float, floor: float, goal: float, unit: str, *, raw: str = "") -> None:
    """Print one figure on a line, ``raw`` (the single measurements) behind it; less is better."""
    _line(what, f"{value:.4g} {unit}", (floor, goal), raw, verdict(value, floor, goal))


def show_at_least(what: str, value: float, floor: float, goal: float, unit: str, *, raw: str = "") -> None:
    """Print one figure on a line, as ``show``; more is better."""
    said = "goal reached" if value >= goal else "floor reached" if value >= floor else "BELOW THE FLOOR"
    _line(what, f"{value:.4g} {unit}", (floor, goal), raw, said)


def _line(what: str, value: str, bounds: tuple[float, float], raw: str, said: str) -> None:
    sys.stdout.write(
        f"{what}: {value.rstrip()} (floor {bounds[0]:g}, goal {bounds[1]:g}{'; ' + raw if raw else ''}): {said}\n"
    )
    sys.stdout.flush()
