"""``coderl check``: looks at files of problems as training does, without training."""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, get_args

from coderl.errors import UsageError, UserError
from coderl.files import read_json_lines
from coderl.problems.prompts import right_program, to_program
from coderl.problems.rows import FORMS, problem_from_row
from coderl.problems.sources import jsonl_stem
from coderl.review import Finding, Strength, look, measure
from coderl.review.strength import change
from coderl.sandbox import Sandbox
from coderl.sandbox.checks.base import safe
from coderl.types import Grading, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

AT_A_TIME = 128
"""Problems whose solutions, or changed solutions, are run at a time."""


@dataclass(frozen=True, slots=True)
class Row:
    """What is known of a row.

    Attributes:
        where: Its ``file:line``.
        id: Its problem's id; empty where the row is none.
        fault: Why it cannot be used; empty where it can.
        grading: How programs are graded; None where that is not known.
        reason: Why in no stronger way.
        finding: The look at its problem; None where the row is none.
        strength: What its tests catch; None where that was not asked for.
    """

    where: str
    id: str = ""
    fault: str = ""
    grading: Grading | None = None
    reason: str = ""
    finding: Finding | None = None
    strength: Strength | None = None


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
    marked FAULT are what training leaves out. With --mutants the tests are tried as well: on solutions that
    were changed in one place each, and on trivial programs, such as one that returns None. Rows marked weak
    let a trivial program through, or most of the changes. Not every change makes a program wrong: look at the
    one that is shown. Exit code 1: a row cannot be used.

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
    parts = [_problems(file) for file in files]
    for file, part in zip(files, parts, strict=True):
        if not part:
            raise UserError(f"{file} holds no problems; {FORMS}")
    given = list(chain.from_iterable(parts))
    widths = max(len(one.where) for one in given), max(len(one.id) for one in given)
    rows: list[Row] = []
    with Sandbox(workers, timeout, "auto", memory_mb, file_mb, allow_weak_isolation) as sandbox:
        sandbox.start()
        bar = tqdm(total=len(given), desc="looking at problems", unit="row", leave=False, disable=None)
        with bar:
            for at in range(0, len(given), AT_A_TIME):
                found = _looked_at(given[at : at + AT_A_TIME], sandbox, mutants, chat, seed)
                rows += found
                for row in found if not json else ():
                    tqdm.write("\n".join(lines(row, mutants, widths)), file=sys.stdout)
                bar.update(len(found))
    if json:
        print(document(rows))
    else:
        print("\n".join(summary(rows, mutants, time.monotonic() - started)))
    if faulty := sum(bool(row.fault) for row in rows):
        raise UserError(f"{faulty} of {len(rows)} rows cannot be used: training leaves them out")


def _problems(file: str) -> list[Problem | Row]:
    """The problems of a file in order, and in the place of each row that is none, what is wrong with it."""
    found: list[Problem | Row] = []
    places: dict[str, str] = {}
    for where, fields in read_json_lines(file, FORMS):
        try:
            problem = problem_from_row(fields, where, source=jsonl_stem(file), split="train")
        except UserError as error:
            found.append(Row(where, fault=str(error).removeprefix(f"{where}: ")))
            continue
        if (earlier := places.setdefault(problem.id, where)) != where:
            twice = f"its task_id was used in {earlier}: give each row its own"
            found.append(Row(where, problem.id, fault=twice))
            continue
        found.append(problem)
    return found


def _looked_at(
    given: Sequence[Problem | Row], sandbox: Sandbox, mutants: int, chat: bool, seed: int
) -> list[Row]:
    problems = [one for one in given if isinstance(one, Problem)]
    findings = look(problems, sandbox, "chat" if chat else "completion")
    strengths: Iterator[Strength | None] = iter(
        measure(findings, sandbox, mutants, seed) if mutants else [None] * len(findings)
    )
    rows = (_row(found, next(strengths), sandbox) for found in findings)
    return [next(rows) if isinstance(one, Problem) else one for one in given]


def _row(found: Finding, strength: Strength | None, sandbox: Sandbox) -> Row:
    problem = found.problem
    grading, reason = None, ""
    if not found.fault or found.solution:
        right = right_program(problem.prompt, problem.solution)
        grading, reason = sandbox.way(to_program(problem, right))
    return Row(found.where, problem.id, found.fault, grading, reason, found, strength)


def lines(row: Row, mutants: int, widths: tuple[int, int]) -> list[str]:
    """A row as lines: its state, and below it what there is to say about it.

    Args:
        row: The row.
        mutants: How many changes of a solution were asked for.
        widths: Characters of the columns of places and of ids.
    """
    verdict = row.finding.solution if row.finding else None
    strength = row.strength
    notes = [row.fault] if row.fault else []
    if row.reason:
        notes.append(f"graded {row.grading}, not {row.reason}")
    if row.finding and not row.fault and not verdict:
        notes.append("it has no solution to try" + (", nor changes of it" if mutants else ""))
    if strength and row.finding and strength.survivors:
        problem = row.finding.problem
        shown = change(right_program(problem.prompt, problem.solution), strength.survivors[0])
        notes.append(f"{strength.caught} of {strength.total} changes are caught, not: {safe(shown)}")
    if strength and strength.trivial:
        notes.append(f"passes as well: {safe(', '.join(strength.trivial))}")
    state = "FAULT" if row.fault else "weak" if strength and strength.weak else "ok"
    taken = f"{verdict.outcome:<13}  {verdict.seconds:.3f} s" if verdict else "-"
    place, name = row.where.ljust(widths[0]), row.id.ljust(widths[1])
    head = f"{state:<5}  {place}  {name}  {row.grading or '-':<6}  {taken}"
    return [head, *(f"       -> {note}" for note in notes)]


def summary(rows: Sequence[Row], mutants: int, seconds: float) -> list[str]:
    """What was found in all rows, as lines."""
    usable = sum(not row.fault for row in rows)
    gradings = Counter(row.grading for row in rows if row.grading)
    graded = ", ".join(f"{gradings[way]:,} {way}" for way in get_args(Grading) if gradings[way])
    verdicts = [row.finding.solution for row in rows if row.finding and row.finding.solution]
    passed = sum(verdict.outcome == "passed" for verdict in verdicts)
    found = [
        f"{len(rows):,} rows in {seconds:.1f} s, {usable:,} can be used; graded: {graded or 'none'}",
        f"solutions: {passed:,} pass, {len(verdicts) - passed:,} do not; "
        f"{len(rows) - len(verdicts):,} rows have none to run",
    ]
    strengths = [row.strength for row in rows if row.strength]
    if mutants and strengths:
        caught, total = sum(one.caught for one in strengths), sum(one.total for one in strengths)
        through = sum(bool(one.survivors) for one in strengths)
        trivial = Counter(
            label
            if label in ("pass", "return None", "return the argument")
            else "return the first expected value"
            for one in strengths
            for label in one.trivial
        )
        share = f" ({caught / total:.1%})" if total else ""
        weak = sum(one.weak for one in strengths)
        found.append(
            f"changes: {caught:,} of {total:,} caught{share}; "
            f"{through:,} rows let one through, {weak:,} are weak"
        )
        named = ", ".join(f"{label} in {number:,}" for label, number in trivial.most_common())
        found.append(f"trivial programs that pass: {named or 'none'}")
    return found


def document(rows: Sequence[Row]) -> str:
    """All rows as one JSON document."""
    import json

    def fields(row: Row) -> dict[str, Any]:
        verdict, strength = row.finding.solution if row.finding else None, row.strength
        return {
            "where": row.where,
            "id": row.id,
            "fault": row.fault,
            "grading": row.grading,
            "reason": row.reason,
            "outcome": verdict and verdict.outcome,
            "seconds": verdict and round(verdict.seconds, 6),
            "message": verdict and verdict.message,
            "changes": strength
            and {"caught": strength.caught, "total": strength.total, "survivors": strength.survivors},
            "trivial": strength and strength.trivial,
        }

    gradings = Counter(row.grading for row in rows if row.grading)
    usable = sum(not row.fault for row in rows)
    values = {"rows": len(rows), "usable": usable, "gradings": dict(gradings)}
    return json.dumps(values | {"found": [fields(row) for row in rows]}, indent=2)
