"""A comparison as tables for the console."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from coderl.scores.comparison import counted
from coderl.scores.numbers import percent, points, points_between
from coderl.scores.results import comparison_stem

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from coderl.scores.comparison import Comparison

SHOWN = 20
"""How many ids of problems won, and of problems lost, are printed."""


def text(comparisons: Sequence[Comparison], file: Path | str | None = None) -> str:
    """The comparison as tables for the console.

    Args:
        comparisons: From :func:`coderl.scores.compare.compare`, at least one.
        file: The file with all ids. None: the name that :func:`coderl.scores.compare.save` gives it.
    """
    name_a, name_b = comparisons[0].name_a, comparisons[0].name_b
    file = file or f"{comparison_stem(name_a, name_b)}.json"
    lines = [f"A: {name_a}", f"B: {name_b}"]
    for comparison in comparisons:
        lines += ["", *_table(comparison), ""]
        for letter, ids in (("B", comparison.won), ("A", comparison.lost)):
            lines += _list_ids(f"{letter} does better on {len(ids)}", ids, file)
        lines.append(f"no difference on {comparison.tied}")
    if warnings := [line for comparison in comparisons for line in comparison.warnings]:
        lines += ["", "Warnings", *(f"  {line}" for line in warnings)]
    return "\n".join(lines)


def _table(comparison: Comparison) -> list[str]:
    title = f"{comparison.task}: {counted(comparison.problems, 'problem')} compared"
    lines = [f"{title}; {comparison.left_out}" if comparison.left_out else title]
    lines.append(f"{'':<9}{'A':>8}{'B':>8}{'B - A':>8}   95 % interval of B - A, points")
    for k, score in comparison.scores.items():
        row = f"{f'pass@{k}':<9}{percent(score.a):>8}{percent(score.b):>8}{points(score.difference):>8}"
        lines.append(f"{row}   {points_between(score.interval)}")
    return [*lines, f"{comparison.verdict} ({comparison.evidence})"]


def _list_ids(title: str, ids: Sequence[str], file: Path | str) -> list[str]:
    if not ids:
        return [title]
    rest = f" ... and {len(ids) - SHOWN} more, all in {file}" if len(ids) > SHOWN else ""
    line = f"{title}: {', '.join(ids[:SHOWN])}{rest}"
    return textwrap.wrap(line, 100, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)
