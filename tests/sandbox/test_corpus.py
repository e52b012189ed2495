"""Every hostile program fails, every honest one passes, in every grading; from outside, nothing has moved."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from coderl.sandbox import Program, Sandbox
from coderl.sandbox.probe import probe
from coderl.types import Execution
from tests.support.canaries import Canaries, canaries
from tests.support.corpus import GOOD, HONEST, HOSTILE, Row, as_check, program, runs_here, stopped

pytestmark = pytest.mark.slow

TIER = probe().tier
CHOSEN = [row for row in HOSTILE if stopped(row, TIER) and runs_here(row)]
LONE = [row for row in CHOSEN if "before" not in row]
Case = tuple[Row, Program]


@pytest.fixture(scope="module")
def birds() -> Iterator[Canaries]:
    with canaries() as birds:
        yield birds


@pytest.fixture(autouse=True)
def undisturbed(birds: Canaries) -> Iterator[None]:
    yield
    assert birds.disturbed() == {}


def pool(grading: Any = "auto", timeout: float = 1.0, memory_mb: int = 256, workers: int = 6) -> Sandbox:
    return Sandbox(workers, timeout, grading, memory_mb, allow_weak_isolation=True)


def judged(sandbox: Sandbox, cases: Sequence[Case]) -> list[Execution]:
    """The verdicts, after each of which an honest program must pass."""
    results = sandbox.run([each for _, program in cases for each in (program, GOOD)])
    controls = [(row["name"], control) for (row, _), control in zip(cases, results[1::2], strict=True)]
    assert [(name, control) for name, control in controls if control.outcome != "passed"] == []
    assert all(result.message.isascii() and len(result.message) <= 200 for result in results)
    return results[::2]


def refuse(cases: Sequence[Case], results: Sequence[Execution]) -> None:
    """None has passed, all tests least of all, and each verdict is one that the row allows."""
    verdicts = [(row, result) for (row, _), result in zip(cases, results, strict=True)]
    wrong = [
        f"{row['name']} ({result.grading}): {result.outcome}, {result.message}"
        for row, result in verdicts
        if result.outcome not in row["outcomes"] or 0 < result.total == result.passed
    ]
    assert not wrong, "\n".join(wrong)


def filled(rows: Sequence[Row], birds: Canaries) -> list[Row]:
    return [row | {key: birds.fill(row[key]) for key in ("code", "before") if key in row} for row in rows]


def test_the_modules_that_hostile_programs_attack_are_there() -> None:
    """Otherwise a row that patches the runner would fail for want of it, and prove nothing."""
    attacked = set(re.findall(r"inside\.\w+", " ".join(row["code"] for row in HOSTILE))) | {"inside.runner"}
    assert {"inside.codec", "inside.rpc", "inside.wire"} <= attacked
    finds = f"import sys\n{GOOD.code}\nassert set({sorted(attacked)}) <= set(sys.modules)"
    with pool(workers=1) as sandbox:
        assert [run.outcome for run in sandbox.run([replace(GOOD, code=finds)])] == ["passed"]
    named = [row["name"] for row in HOSTILE if re.search(r"coderl\.|import coderl", row["code"])]
    assert named == [], "a lane knows no package of that name"


def test_hostile_programs_fail(birds: Canaries) -> None:
    rows = filled(LONE, birds)
    cases = [(row, program(row)) for row in rows]
    twice = [row for row in rows if "tests" not in row or "as_check" in row]
    cases += [(row, check) for row in twice if (check := as_check(row))]
    with pool() as sandbox:
        results = judged(sandbox, cases)
    # What no text of the tests could seal is believed, as where tests run beside the program.
    believed = [
        result.grading in ("partly", "inline") and "inline_hole" in row
        for (row, _), result in zip(cases, results, strict=True)
    ]
    refuse(
        [case for case, one in zip(cases, believed, strict=True) if not one],
        [r for r, one in zip(results, believed, strict=True) if not one],
    )
    assert sum(believed) <= 8
    assert sum(result.grading == "sealed" for result in results) > 0.9 * len(results)


def test_hostile_programs_fail_in_inline_grading(birds: Canaries) -> None:
    rows = [row for row in LONE if row["outcomes"] != ["timeout"]]  # the clock is the same in each grading
    cases = [(row, program(row)) for row in filled(rows, birds)]
    with pool("inline") as sandbox:
        results = judged(sandbox, cases)
    wrong = [
        f"{row['name']}: {result.outcome}, {result.message}"
        for (row, _), result in zip(cases, results, strict=True)
        if result.outcome == "infra_error" or (result.outcome == "passed" and "inline_hole" not in row)
    ]
    assert not wrong, "\n".join(wrong)


def test_runs_find_nothing_of_those_before(birds: Canaries) -> None:
    rows = filled([row for row in CHOSEN if "before" in row], birds)
    with pool(workers=1) as sandbox:
        first = sandbox.run(
            [each for row in rows for each in (program(row, row["before"]), program(row), GOOD)]
        )
    refuse([(row, program(row)) for row in rows], first[1::3])
    assert {result.outcome for result in first[2::3]} == {"passed"}


@pytest.mark.parametrize("grading", ["auto", "inline"])
def test_honest_programs_pass(grading: str) -> None:
    rows = [row for row in HONEST if runs_here(row)]
    cases = [(row, program(row)) for row in rows]
    if grading == "auto":
        cases += [(row, check) for row in rows if (check := as_check(row))]
    with pool(grading, timeout=20.0, memory_mb=1024, workers=2) as sandbox:
        results = sandbox.run([program for _, program in cases])
    wrong = [
        f"{row['name']} ({result.grading}): {result.outcome}, {result.message}"
        for (row, _), result in zip(cases, results, strict=True)
        if result.outcome != "passed" or result.passed != result.total
    ]
    assert not wrong, "\n".join(wrong)


def test_the_corpora_are_as_described() -> None:
    for rows, least in ((HOSTILE, 110), (HONEST, 60)):
        names = [row["name"] for row in rows]
        assert len(set(names)) == len(names) >= least
    assert all(row["outcomes"] and not {"passed", "infra_error"} & set(row["outcomes"]) for row in HOSTILE)
    assert TIER != "A" or {row["name"] for row in HOSTILE if runs_here(row)} == {
        row["name"] for row in CHOSEN
    }
