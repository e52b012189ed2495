"""What makes two evaluations hard to compare: unlike settings, contamination, missing verdicts."""

from __future__ import annotations

import json
import re
import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coderl.scores.comparison import Comparison

WHO = {"model", "adapter", "adapters", "base", "checkpoint", "method", "revision"}  # meant to differ
NOT_NOTED = object()


def warnings(comparison: Comparison, a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Lines on what stands between the scores of a task and their comparison.

    Args:
        comparison: Of the two.
        a: The task in the first results file.
        b: The task in the second.
    """
    lines = _unlike_settings(a, b)
    for name, side in (("A", a), ("B", b)):
        listed = side.get("contaminated")
        known = set(map(str, listed)) if isinstance(listed, list) else set()
        met = [problem for problem in comparison.ids if problem in known]
        if met:
            few = ", ".join(met[:3]) + (", ..." if len(met) > 3 else "")
            lines.append(f"{name} met {len(met)} of the {comparison.problems} problems in training ({few})")
        if errors := side.get("infra_errors"):
            lines.append(f"{name} has samples without a verdict, lost to infrastructure errors: {errors}")
    return lines + _missing_ks(comparison, a, b)


def common_ks(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[int]:
    """The k of which both have a pass@k, and 1, ascending."""
    found = (re.fullmatch(r"pass@([1-9]\d{0,5})", key) for key in a.keys() & b.keys())
    return sorted({1} | {int(match[1]) for match in found if match})


def _unlike_settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    notes = [_settings(side) for side in (a, b)]
    lines = []
    for key in notes[0] | notes[1]:
        x, y = (_plain(note.get(key, NOT_NOTED)) for note in notes)
        if x != y and key not in WHO:
            lines.append(f"{key} differs: {_short(x)} for A, {_short(y)} for B")
    return lines


def _settings(task: Mapping[str, Any]) -> dict[str, Any]:
    settings = task.get("settings")
    return {"n": task.get("n", NOT_NOTED)} | (settings if isinstance(settings, dict) else {})


def _missing_ks(comparison: Comparison, a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    lines = []
    for k in common_ks(a, b):
        if k not in comparison.scores:
            lines.append(f"pass@{k} is missing: no problem has {k} judged samples on both sides")
        elif (told := comparison.scores[k].problems) < comparison.problems:
            short = comparison.problems - told
            lines.append(f"pass@{k} rests on {told} problems: {short} have fewer than {k} judged samples")
    return lines


def _plain(value: Any) -> str:
    """A setting in words. Of counts, such as those of grading, the kinds alone."""
    if value is NOT_NOTED:
        return "not noted"
    if isinstance(value, dict) and value and all(type(number) is int for number in value.values()):
        value = sorted(value)
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _short(words: str) -> str:
    return textwrap.shorten(words, 60, placeholder="...")
