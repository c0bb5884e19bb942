"""What a measured value says beside its floor and its goal."""

from __future__ import annotations

import sys


def verdict(value: float, floor: float, goal: float) -> str:
    """Say which is reached; less is better."""
    return "goal reached" if value <= goal else "floor reached" if value <= floor else "ABOVE THE FLOOR"


def show(what: str, value: float, floor: float, goal: float, unit: str, *, raw: str = "") -> None:
    """Print one figure on a line, ``raw`` (the single measurements) behind it."""
    sys.stdout.write(
        f"{what}: {value:.4g} {unit}".rstrip()
        + f" (floor {floor:g}, goal {goal:g}{'; ' + raw if raw else ''}): {verdict(value, floor, goal)}\n"
    )
    sys.stdout.flush()
