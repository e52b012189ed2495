"""What makes two evaluations hard to compare: different settings, contamination, missing verdicts."""

from __future__ import annotations

import json
import re
import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coderl.scores.comparison import Comparison

COMPARED = {"model", "adapter", "adapters", "base", "checkpoint", "method", "revision"}
"""Settings that say which model was evaluated. They are meant to differ."""
NOT_NOTED = object()


def caveats(comparison: Comparison, a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """One line for each thing that makes the two scores of a task hard to compare.

    Args:
        comparison: The comparison of the two.
        a: The task in the first results file.
        b: The task in the second.
    """
    lines = [f"{key} differs: {x} for A, {y} for B" for key, (x, y) in different_settings(a, b).items()]
    for name, side in (("A", a), ("B", b)):
        listed = side.get("contaminated")
        known = set(map(str, listed)) if isinstance(listed, list) else set()
        trained_on = [problem for problem in comparison.ids if problem in known]
        if trained_on:
            few = ", ".join(trained_on[:3]) + (", ..." if len(trained_on) > 3 else "")
            lines.append(
                f"{name} met {len(trained_on)} of the {comparison.problems} problems in training ({few})"
            )
        if errors := side.get("infra_errors"):
            lines.append(f"{name} has samples without a verdict, lost to infrastructure errors: {errors}")
    return lines + _missing_ks(comparison, a, b)


def common_ks(*sides: Mapping[str, Any]) -> list[int]:
    """1 and every k with a pass@k in all of them, ascending."""
    shared = set(sides[0]).intersection(*sides[1:]) if sides else set()
    found = (re.fullmatch(r"pass@([1-9]\d{0,5})", key) for key in shared)
    return sorted({1} | {int(match[1]) for match in found if match})


def different_settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The settings that differ although they should not, each with its value on both sides as text."""
    settings = [_settings(side) for side in (a, b)]
    found = {}
    for key in settings[0] | settings[1]:
        x, y = (_text(side.get(key, NOT_NOTED)) for side in settings)
        if x != y and key not in COMPARED:
            found[key] = _shortened(x), _shortened(y)
    return found


def _settings(task: Mapping[str, Any]) -> dict[str, Any]:
    settings = task.get("settings")
    return {"n": task.get("n", NOT_NOTED)} | (settings if isinstance(settings, dict) else {})


def _missing_ks(comparison: Comparison, a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    lines = []
    for k in common_ks(a, b):
        if k not in comparison.scores:
            lines.append(f"pass@{k} is missing: no problem has {k} judged samples on both sides")
        elif (used := comparison.scores[k].problems) < comparison.problems:
            short = comparison.problems - used
            lines.append(f"pass@{k} rests on {used} problems: {short} have fewer than {k} judged samples")
    return lines


def _text(value: Any) -> str:
    """A setting as text."""
    if value is NOT_NOTED:
        return "not noted"
    # Counts, such as of samples by grading, differ between any two runs: only the kinds matter.
    if isinstance(value, dict) and value and all(type(number) is int for number in value.values()):
        value = sorted(value)
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    if isinstance(value, float) and value.is_integer():  # 1.0 and 1 are the same setting
        value = int(value)
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _shortened(text: str) -> str:
    return textwrap.shorten(text, 60, placeholder="...")
