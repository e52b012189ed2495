"""A comparison in words: the tables for the console, and the name of the files that hold it."""

from __future__ import annotations

import hashlib
import re
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from coderl.scores.comparison import Comparison

SHOWN = 20  # ids of problems won or lost


def counted(number: int, noun: str) -> str:
    """``1 problem``, ``2 problems``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def points(share: float) -> str:
    """A difference of shares in percentage points with its sign, such as ``+2.8``; never ``-0.0``."""
    return f"{100 * share:+z.1f}"


def text(comparisons: Sequence[Comparison], file: Path | str | None = None) -> str:
    """The comparison as tables for the console.

    Args:
        comparisons: Of :func:`compare`, at least one.
        file: Where all ids stand. None: the name that :func:`save` gives it.
    """
    file = file or f"{stem(comparisons)}.json"
    lines = [f"A: {comparisons[0].name_a}", f"B: {comparisons[0].name_b}"]
    for comparison in comparisons:
        lines += ["", *_table(comparison), ""]
        for letter, ids in (("B", comparison.won), ("A", comparison.lost)):
            lines += _listed(f"{letter} does better on {len(ids)}", ids, file)
        lines.append(f"alike on {comparison.tied}")
    if warnings := [line for comparison in comparisons for line in comparison.warnings]:
        lines += ["", "Warnings", *(f"  {line}" for line in warnings)]
    return "\n".join(lines)


def _table(comparison: Comparison) -> list[str]:
    title = f"{comparison.task}: {counted(comparison.problems, 'problem')} compared"
    lines = [f"{title}; {comparison.left_out}" if comparison.left_out else title]
    lines.append(f"{'':<9}{'A':>8}{'B':>8}{'B - A':>8}   95% interval of B - A, points")
    for k, score in comparison.scores.items():
        low, high = (points(end) for end in score.interval)
        row = f"{f'pass@{k}':<9}{score.a:>8.1%}{score.b:>8.1%}{points(score.difference):>8}   {low} to {high}"
        lines.append(row)
    return [*lines, f"{comparison.verdict} ({comparison.evidence})"]


def _listed(title: str, ids: Sequence[str], file: Path | str) -> list[str]:
    if not ids:
        return [title]
    rest = f" ... and {len(ids) - SHOWN} more, all in {file}" if len(ids) > SHOWN else ""
    words = f"{title}: {', '.join(ids[:SHOWN])}{rest}"
    return textwrap.wrap(words, 100, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)


def stem(comparisons: Sequence[Comparison]) -> str:
    """The file name of a comparison, without its ending."""
    a, b = (_filed(name) for name in (comparisons[0].name_a, comparisons[0].name_b))
    return f"comparison_{a}_vs_{b}"


def _filed(name: str) -> str:
    """A name for use in a file's: not too long for a file system, and still a different one for each."""
    plain = re.sub(r"[^\w.-]+", "-", name).encode()
    if len(plain) <= 100:
        return plain.decode()
    return f"{plain[:80].decode(errors='ignore')}-{hashlib.sha256(plain).hexdigest()[:8]}"
