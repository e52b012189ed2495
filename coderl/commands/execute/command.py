"""Streams rows through the sandbox into verdicts, and prints a summary."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter, deque
from itertools import chain
from typing import TYPE_CHECKING, get_args

from coderl.commands.execute.rows import FORMS, Row, count_lines, read_rows
from coderl.commands.execute.verdicts import Verdicts, check_output, earlier_verdicts
from coderl.errors import UserError
from coderl.files import STDIO, name_of
from coderl.sandbox import Program, Sandbox
from coderl.sandbox.program import GradingMode
from coderl.types import Execution, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator


def execute(
    input: str,
    output: str = STDIO,
    timeout: float = 3.0,
    workers: int | None = None,
    grading: GradingMode = "auto",
    memory_mb: int = 2048,
    file_mb: int = 64,
    resume: bool = False,
    allow_weak_isolation: bool = False,
) -> None:
    """Run programs against their tests in the sandbox, and write a verdict on each.

    A row of the input is a JSON object with id, code, and either tests (a list of asserts; optional: setup,
    run between code and tests) or test and entry_point (HumanEval's form; optional: prompt). Tests are taken
    apart so that reference passes, a right program, if the row has one. A row of the output has id, outcome,
    passed, total, seconds, grading, tier and message, and rows keep their order. Rows stream: a large file
    never sits in memory, and each verdict is on disk before the next is waited for. A run that is killed
    leaves whole lines; --resume goes on behind them, without it an output that exists is written over. Exit
    code 1: a row is not valid, or a program got no verdict (infra_error).

    Args:
        input: JSON-lines file of programs; gzipped if named .gz; - is standard input.
        output: JSON-lines file for the verdicts; gzipped if named .gz; - is standard output.
        timeout: Seconds of wall time for one program with all its tests.
        workers: Programs that run at a time; by default one for each usable core, 16 at most.
        grading: How verdicts are reached; auto takes the strongest that each row's tests allow.
        memory_mb: MiB of memory (address space) for one program.
        file_mb: MiB that the files of one program may take.
        resume: Keep the verdicts that the output holds and go on with the row after them.
        allow_weak_isolation: Run even where only resource limits protect this machine (tier C).

    Raises:
        UsageError: An argument is out of range, or output and input are one file.
        UserError: A file cannot be read or written, a row is not valid, the isolation is weak and that is not
            allowed, or a program got no verdict.
    """
    check_output(input, output, resume)
    with Sandbox(workers, timeout, grading, memory_mb, file_mb, allow_weak_isolation) as sandbox:
        rows = read_rows(input)
        # The first row is read and the sandbox is started before the output is opened: where one of them
        # fails, an earlier output stays as it was.
        first = next(rows, None)
        if first is None:
            raise UserError(f"{name_of(input)} holds no programs; {FORMS}")
        rows = chain([first], rows)
        tally = Tally()
        kept = tally.add_earlier(output, rows) if resume and os.path.exists(output) else 0
        sandbox.start()
        with Verdicts(output, kept) as verdicts:
            total = count_lines(input) if sys.stderr.isatty() else None
            _write_verdicts(rows, sandbox, verdicts, tally, total)
    tally.inline_reasons = sandbox.inline_reasons
    print(tally.summary(), file=sys.stderr if output == STDIO else sys.stdout)
    tally.require_verdicts()


def _write_verdicts(
    rows: Iterator[Row], sandbox: Sandbox, verdicts: Verdicts, tally: Tally, total: int | None
) -> None:
    """Run the rows' programs and write their verdicts. Errors and Ctrl-C say how many were written."""
    from tqdm.auto import tqdm

    tally.started = time.monotonic()
    bar = tqdm(
        desc="running programs", total=total, initial=tally.count, unit="program", leave=False, disable=None
    )
    try:
        with bar:
            for row, verdict in _executed(rows, sandbox):
                verdicts.write(row, verdict)
                tally.add(row, verdict)
                bar.update()
    except UserError as error:
        raise UserError(f"{error}; {_written(tally, verdicts.path)}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_written(tally, verdicts.path)) from None


def _executed(rows: Iterator[Row], sandbox: Sandbox) -> Iterator[tuple[Row, Execution]]:
    """Each row with its verdict, in the order of the rows."""
    in_flight: deque[Row] = deque()

    def programs() -> Iterator[Program]:
        for row in rows:
            in_flight.append(row)
            yield row.program

    try:
        for verdict in sandbox.stream(programs()):
            yield in_flight.popleft(), verdict
    except UserError as error:
        # Verdicts come in order and all before an error, so the oldest row without one is the row whose tests
        # the sandbox refused. There is none if the error was raised in reading the next row.
        raise UserError(f"{in_flight[0].where}: {error}" if in_flight else str(error)) from error


def _written(tally: Tally, output: str) -> str:
    """How many verdicts there are, and how to go on."""
    number = f"{tally.count} verdict{'' if tally.count == 1 else 's'}"
    if output == STDIO:
        return f"{number} written"
    way = "" if output.endswith(".gz") or not os.path.isfile(output) else ", --resume goes on from there"
    return f"{number} in {output}{way}"


class Tally:
    """Counts of the verdicts so far, for the summary."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.gradings: Counter[str] = Counter()
        self.inline_reasons: Counter[str] = Counter()
        self.tiers: set[str] = set()
        self.earlier = 0
        self.first_lost = ""
        self.started = time.monotonic()

    @property
    def count(self) -> int:
        """Verdicts, those of earlier runs included."""
        return self.outcomes.total()

    def add_earlier(self, path: str, rows: Iterator[Row]) -> int:
        """Count an earlier run's verdicts. Returns the bytes they fill; ``rows`` goes on behind them."""
        end = 0
        for verdict in earlier_verdicts(path, rows):
            self._count(verdict.outcome, verdict.grading, verdict.tier)
            end = verdict.end
        self.earlier = self.count
        return end

    def add(self, row: Row, verdict: Execution) -> None:
        """Count a verdict of this run."""
        self._count(verdict.outcome, verdict.grading, verdict.tier)
        if verdict.outcome == "infra_error" and not self.first_lost:
            self.first_lost = f"{row.where}: {verdict.message}"

    def _count(self, outcome: str, grading: str, tier: str) -> None:
        self.outcomes[outcome] += 1
        self.gradings[grading] += 1
        self.tiers.add(tier)

    def summary(self) -> str:
        """Count and share of each outcome, speed, gradings and tiers, as lines."""
        seconds = time.monotonic() - self.started
        ran = self.count - self.earlier
        lines = [f"{'outcome':<13} {'programs':>10} {'share':>8}"]
        for outcome in get_args(Outcome):
            if number := self.outcomes[outcome]:
                lines.append(f"{outcome:<13} {number:>10,} {number / self.count:>8.1%}")
        before = f" and {self.earlier:,} from before" if self.earlier else ""
        gradings = ", ".join(f"{name} {number:,}" for name, number in self.gradings.most_common())
        lines.append(f"{ran:,} programs in {seconds:.1f} s ({ran / seconds:.0f} a second){before}")
        lines.append(f"grading: {gradings}; tier: {', '.join(sorted(self.tiers))}")
        lines += [f"inline {number:,}: {reason}" for reason, number in self.inline_reasons.most_common(5)]
        return "\n".join(lines)

    def require_verdicts(self) -> None:
        """End with an error where the sandbox failed.

        Raises:
            UserError: A program got no verdict.
        """
        if lost := self.outcomes["infra_error"]:
            first = f", the first at {self.first_lost}" if self.first_lost else ""
            raise UserError(
                f"{lost} of {self.count} programs got no verdict (infra_error){first}; "
                "`coderl doctor` checks the sandbox"
            )
