"""``coderl check``: looks at files of problems as training does, without training."""

from __future__ import annotations

import json as jsons
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

from coderl.errors import UsageError, UserError
from coderl.files import name_of, read_json_lines
from coderl.problems.prompts import right_program, to_program
from coderl.problems.rows import FORMS, problem_from_row
from coderl.problems.sources import jsonl_stem
from coderl.report.programs import visible
from coderl.review import Finding, Strength, look, measure
from coderl.review.strength import change, kind_of
from coderl.sandbox import Sandbox
from coderl.types import Execution, Grading, Problem

if TYPE_CHECKING:
    from collections.abc import Sequence

AT_A_TIME = 128
"""Rows that are printed together: a batch costs the time of its slowest program."""
_WIDEST = 60
"""Characters of the columns of places and ids, at most."""


@dataclass(frozen=True, slots=True)
class Row:
    """What is known of a row.

    Attributes:
        where: Its ``file:line``.
        id: Its problem's id; empty where it holds none.
        fault: Why it cannot be used; empty where it can.
        problem: Its problem; None where it holds none, or one with the id of an earlier row.
        grading: How programs are graded; None where that is not known.
        reason: Why in no stronger way.
        verdict: That on its solution; None where that was not run.
        strength: What its tests catch; None where that was not asked for.
    """

    where: str
    id: str = ""
    fault: str = ""
    problem: Problem | None = None
    grading: Grading | None = None
    reason: str = ""
    verdict: Execution | None = None
    strength: Strength | None = None

    @property
    def state(self) -> str:
        """In a word: ``ok``, ``weak`` or ``FAULT``."""
        return "FAULT" if self.fault else "weak" if self.strength and self.strength.weak else "ok"


def check(
    files: list[str],
    mutants: int = 0,
    chat: bool = False,
    json: bool = False,
    timeout: float = 3.0,
    workers: int | None = None,
    memory_mb: int = 2048,
    file_mb: int = 64,
    seed: int = 0,
    allow_weak_isolation: bool = False,
) -> None:
    """Look at problems before they are trained on: can their tests be graded, do their own solutions pass?

    A line for each row says how programs are graded, whether its solution (code, canonical_solution) passes,
    and how long that takes. Below it stands what to mend, or why there is no stronger way to grade it. Rows
    marked FAULT cannot be used: training leaves them out, or refuses the file where a row holds no problem.
    With --mutants the tests are tried as well: on solutions that were changed in one place each, and on
    trivial programs, such as one that returns None. Rows marked weak let a trivial program through, or most
    of the changes. Not every change makes a program wrong: look at the one that is shown. Exit code 1: a row
    cannot be used.

    Args:
        files: JSON-lines files of problems, as for JSONLProblems; gzipped if named .gz.
        mutants: Changed solutions to try on each problem's tests; short solutions have fewer.
        chat: Problems are asked in chat form, so that prompts need not be Python.
        json: Print one JSON document instead of lines, and nothing else, on standard output.
        timeout: Seconds of wall time for one program with all its tests.
        workers: Programs that run at a time; by default one for each usable core, 16 at most.
        memory_mb: MiB of memory (address space) for one program.
        file_mb: MiB that the files of one program may take.
        seed: Which changes are tried, where there are more.
        allow_weak_isolation: Run even where only resource limits protect this machine (tier C).

    Raises:
        UsageError: An argument is out of range.
        UserError: A file cannot be read or is empty, the isolation is weak and that is not allowed, or a row
            cannot be used.
    """
    if mutants < 0:
        raise UsageError(f"--mutants is {mutants}; it counts changed solutions: give 0 or more")
    from tqdm.auto import tqdm

    started = time.monotonic()
    rows = [row for file in files for row in _read(file)]
    widths = [
        min(_WIDEST, max(len(text) for text in column)) for column in zip(*map(_names, rows), strict=True)
    ]
    with Sandbox(workers, timeout, "auto", memory_mb, file_mb, allow_weak_isolation) as sandbox:
        sandbox.start()
        bar = tqdm(total=len(rows), desc="looking at problems", unit="row", leave=False, disable=None)
        size = max(1, AT_A_TIME // (mutants + 1))
        with bar:
            for at in range(0, len(rows), size):
                part = slice(at, at + size)
                rows[part] = _looked_at(rows[part], sandbox, mutants, chat, seed)
                for row in rows[part] if not json else ():
                    tqdm.write("\n".join(lines(row, widths)), file=sys.stdout)
                bar.update(len(rows[part]))
    totals = Totals(rows, time.monotonic() - started)
    print(document(rows, totals) if json else "\n".join(totals.lines()))
    if faulty := len(rows) - totals.usable:
        refused = sum(row.problem is None for row in rows)
        ways = [f"leaves {faulty - refused} out"] * (faulty > refused)
        ways += [f"refuses files with the other {refused}" if ways else "refuses such files"] * (refused > 0)
        raise UserError(f"{faulty} of {len(rows)} rows cannot be used: training {' and '.join(ways)}")


def _read(file: str) -> list[Row]:
    """The rows of a file in order, not yet looked at."""
    rows: list[Row] = []
    places: dict[str, str] = {}
    for where, fields in read_json_lines(file, FORMS):
        try:
            problem = problem_from_row(fields, where, source=jsonl_stem(file), split="train")
        except UserError as error:
            rows.append(Row(where, fault=str(error).removeprefix(f"{where}: ")))
            continue
        if (earlier := places.setdefault(problem.id, where)) != where:
            twice = f"its task_id was used in {earlier}: give each row its own"
            rows.append(Row(where, problem.id, twice))
        else:
            rows.append(Row(where, problem.id, problem=problem))
    if not rows:
        raise UserError(f"{name_of(file)} holds no problems; {FORMS}")
    return rows


def _looked_at(rows: Sequence[Row], sandbox: Sandbox, mutants: int, chat: bool, seed: int) -> list[Row]:
    """The rows with what is found of their problems."""
    places = [at for at, row in enumerate(rows) if row.problem]
    findings = look([row.problem for row in rows if row.problem], sandbox, "chat" if chat else "completion")
    strengths: Sequence[Strength | None] = [None] * len(findings)
    if mutants:
        strengths = measure(findings, sandbox, mutants, seed)
    found = list(rows)
    for at, finding, strength in zip(places, findings, strengths, strict=True):
        way = _way(finding, sandbox)
        found[at] = replace(rows[at], fault=finding.fault, verdict=finding.solution, strength=strength, **way)
    return found


def _way(finding: Finding, sandbox: Sandbox) -> dict[str, Any]:
    """How programs are graded, and why in no stronger way, unless the text is at fault."""
    if finding.fault and not finding.solution:
        return {}
    problem = finding.problem
    grading, reason = sandbox.way(to_program(problem, right_program(problem.prompt, problem.solution)))
    return {"grading": grading, "reason": reason}


def _names(row: Row) -> tuple[str, str]:
    return visible(row.where).replace("\n", "\\n"), visible(row.id).replace("\n", "\\n")


def lines(row: Row, widths: Sequence[int]) -> list[str]:
    """A row as lines: its state, and below it what there is to say about it.

    Args:
        row: The row.
        widths: Characters of the columns of places and of ids.
    """
    notes = [row.fault] if row.fault else []
    if row.reason:
        notes.append(f"graded {row.grading}; no stronger way will do ({row.reason})")
    if row.problem and not row.fault and not row.verdict:
        notes.append("it has no solution to try")
    if row.problem and row.strength and row.strength.survivors:
        right = right_program(row.problem.prompt, row.problem.solution)
        shown = visible(change(right, row.strength.survivors[0]))
        notes.append(f"{row.strength.caught} of {row.strength.total} changes are caught, not: {shown}")
    if row.strength and row.strength.trivial:
        notes.append(f"passes as well: {visible(', '.join(row.strength.trivial))}")
    taken = f"{row.verdict.outcome:<13}  {row.verdict.seconds:.3f} s" if row.verdict else "-"
    place, name = (text.ljust(width) for text, width in zip(_names(row), widths, strict=True))
    head = f"{row.state:<5}  {place}  {name}  {row.grading or '-':<6}  {taken}"
    return [head, *(f"       -> {note}" for note in notes)]


class Totals:
    """Counts over all rows.

    Args:
        rows: All rows, looked at.
        seconds: How long that took.
    """

    def __init__(self, rows: Sequence[Row], seconds: float) -> None:
        self.rows, self.seconds = len(rows), seconds
        self.usable = sum(not row.fault for row in rows)
        self.gradings = Counter(row.grading for row in rows if row.grading)
        self.outcomes = Counter(row.verdict.outcome for row in rows if row.verdict)
        strengths = [row.strength for row in rows if row.strength]
        self.caught, self.changes = sum(s.caught for s in strengths), sum(s.total for s in strengths)
        self.letting_through = sum(bool(s.survivors) for s in strengths)
        self.weak = sum(s.weak for s in strengths)
        self.trivial = Counter(kind_of(label) for s in strengths for label in s.trivial)
        self.tried = bool(strengths)

    def lines(self) -> list[str]:
        """As lines."""
        ways = [f"{self.gradings[way]:,} {way}" for way in get_args(Grading) if self.gradings[way]]
        ran, passed = self.outcomes.total(), self.outcomes["passed"]
        found = [
            f"{self.rows:,} rows in {self.seconds:.1f} s, {self.usable:,} can be used; "
            f"graded: {', '.join(ways) or 'none'}",
            f"solutions: {passed:,} pass, {ran - passed:,} do not; {self.rows - ran:,} rows had none to run",
        ]
        if self.tried:
            share = f" ({self.caught / self.changes:.1%})" if self.changes else ""
            found.append(
                f"changes: {self.caught:,} of {self.changes:,} caught{share}; "
                f"{self.letting_through:,} rows let one through, {self.weak:,} are weak"
            )
            named = ", ".join(f"{kind} in {number:,}" for kind, number in self.trivial.most_common())
            found.append(f"trivial programs that pass: {named or 'none'}")
        return found


def document(rows: Sequence[Row], totals: Totals) -> str:
    """All rows as one JSON document."""
    found = [
        {
            "where": row.where,
            "id": row.id,
            "state": row.state,
            "fault": row.fault,
            "grading": row.grading,
            "reason": row.reason,
            "outcome": row.verdict and row.verdict.outcome,
            "seconds": row.verdict and round(row.verdict.seconds, 6),
            "message": row.verdict and row.verdict.message,
            "changes": row.strength
            and {name: getattr(row.strength, name) for name in ("caught", "total", "survivors")},
            "trivial": row.strength and row.strength.trivial,
        }
        for row in rows
    ]
    return jsons.dumps(vars(totals) | {"found": found}, indent=2)
