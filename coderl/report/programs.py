"""Programs of the policy before and after training, for the same problem side by side."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coderl.errors import UserError
from coderl.files import read_json
from coderl.runs.reading import FIX, holds
from coderl.scores.results import programs_path

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from coderl.runs.reading import Run

LONGEST, WIDEST = 120, 400  # lines of a program, characters of a line


@dataclass(frozen=True)
class Answers:
    """The samples of a problem.

    Attributes:
        programs: All of them, whole; empty where they were not saved.
        correct: How many pass.
        counted: How many have a verdict.
        first: Whether the first one passes; None where that is not known.
    """

    programs: list[str]
    correct: int
    counted: int
    first: bool | None

    @property
    def share(self) -> float:
        """Share of the samples with a verdict that pass."""
        return self.correct / self.counted if self.counted else 0.0

    @property
    def shown(self) -> str:
        """The first program, the one with a known verdict."""
        return self.programs[0] if self.programs else ""


@dataclass(frozen=True)
class Change:
    """What training changed on one problem.

    Attributes:
        id: The problem's.
        before: Its answers before training.
        after: Its answers after training.
    """

    id: str
    before: Answers
    after: Answers

    @property
    def gain(self) -> float:
        """Difference in the share of samples that pass, -1 to 1."""
        return self.after.share - self.before.share

    def diff(self) -> str:
        """The first program before and after, by line: ``-`` is gone, ``+`` is new, ``?`` says where."""
        old, new = (printable(side.shown).split("\n") for side in (self.before, self.after))
        return "\n".join(line.rstrip("\n") for line in difflib.ndiff(old, new))

    def rows(self) -> list[tuple[str | None, str | None, bool]]:
        """The same as pairs of lines, and whether they differ; None where one side has no line."""
        return _aligned(*(printable(side.shown).split("\n") for side in (self.before, self.after)))


def changes(run: Run, task: str | None = None) -> list[Change]:
    """Every problem that was evaluated before and after training, the largest gain first.

    Args:
        run: A run with results from before and after training; without, nothing is returned.
        task: Name of the task; by default the first.

    Raises:
        UserError: A file of programs is damaged.
    """
    found = next((each for each in run.comparisons if task in (None, each.task)), None)
    if found is None or run.before is None or run.after is None:
        return []
    before = _answers(run.folder, run.before, found.task, run.tasks_before[found.task])
    after = _answers(run.folder, run.after, found.task, run.tasks[found.task])
    made = [Change(name, before[name], after[name]) for name in found.ids]
    # Only the first program is shown: of equal gains, problems where it shows the gain come first.
    return sorted(made, key=lambda change: (-change.gain, -_shown_gain(change)))


def _shown_gain(change: Change) -> int:
    return int(change.after.first or False) - int(change.before.first or False)


def won(found: Iterable[Change], most: int | None = None) -> list[Change]:
    """Changes with a larger share of passing samples after training, the largest gain first."""
    return sorted((each for each in found if each.gain > 0), key=_order)[:most]


def lost(found: Iterable[Change], most: int | None = None) -> list[Change]:
    """Changes with a smaller share of passing samples after training, the largest loss first."""
    return sorted((each for each in found if each.gain < 0), key=_order)[:most]


def _order(change: Change) -> tuple[bool, float]:
    """Sort key: problems whose shown programs changed in the same direction first, then by size."""
    return (_shown_gain(change) * change.gain <= 0, -abs(change.gain))


def _answers(folder: Path, results: Path, task: str, scores: dict[str, Any]) -> dict[str, Answers]:
    file = programs_path(results, task)
    programs = read_json(file, FIX, list) if holds(folder, file) else [[] for _ in scores["ids"]]
    whole = all(isinstance(row, list) and all(isinstance(each, str) for each in row) for row in programs)
    if not whole or len(programs) != len(scores["ids"]):
        raise UserError(f"{file}: is damaged (not a list of programs for each of the problems); {FIX}")
    first = scores.get("first")
    known = first if isinstance(first, list) and len(first) == len(programs) else [None] * len(programs)
    known = [passes if isinstance(passes, bool) else None for passes in known]
    columns = zip(scores["ids"], programs, scores["correct"], scores["counted"], known, strict=True)
    return {name: Answers(row, correct, counted, passes) for name, row, correct, counted, passes in columns}


def printable(text: str) -> str:
    """Text of a model, cut to a length and with :func:`visible` characters only."""
    lines = text.expandtabs(4).rstrip("\n").split("\n")
    cut = [
        line if len(line) <= WIDEST else f"{line[:WIDEST]} ... {len(line) - WIDEST} more" for line in lines
    ]
    if len(cut) > LONGEST:
        cut[LONGEST:] = [f"... {len(lines) - LONGEST} more lines"]
    return visible("\n".join(cut))


def visible(text: str) -> str:
    """Text with control characters, lone surrogates and marks of writing direction as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else _spelled(c) for c in text)


def _spelled(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _aligned(old: list[str], new: list[str]) -> list[tuple[str | None, str | None, bool]]:
    rows: list[tuple[str | None, str | None, bool]] = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        for i in range(max(b - a, d - c)):
            left = old[a + i] if a + i < b else None
            right = new[c + i] if c + i < d else None
            rows.append((left, right, kind != "equal"))
    return rows
