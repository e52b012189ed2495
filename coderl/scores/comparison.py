"""Two evaluations of the same problems, side by side: what differs, and whether it is more than chance.

Problems are paired by id. The same problems on both sides cancel out how hard each of them is, so a paired
difference is told from chance with far fewer problems than two scores taken by themselves.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from coderl.errors import UsageError, UserError
from coderl.scores.caveats import common_ks, warnings
from coderl.scores.plot import picture, write_whole
from coderl.scores.statistics import bootstrap_interval, pass_at_k, sign_test
from coderl.scores.table import counted, stem, text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Comparison", "Score", "compare", "compare_task", "picture", "read_results", "save", "text"]

SIGNIFICANCE = 0.05
Count = tuple[int, int]  # of a problem's samples, how many pass and how many were judged


@dataclass(frozen=True)
class Score:
    """pass@k of both over the same problems.

    Attributes:
        a: Mean over problems, 0 to 1.
        b: Likewise.
        interval_a: Bootstrap interval over problems, 95 %.
        interval_b: Likewise.
        interval: That of the paired difference ``b - a``.
        problems: On how many it rests: both sides have ``k`` judged samples of them.
    """

    a: float
    b: float
    interval_a: tuple[float, float]
    interval_b: tuple[float, float]
    interval: tuple[float, float]
    problems: int

    @property
    def difference(self) -> float:
        """``b - a``."""
        return self.b - self.a


@dataclass(frozen=True)
class Comparison:
    """One task, evaluated twice.

    Attributes:
        task: Name, such as ``"mbpp"``.
        name_a: What the first file is called, without its folder and ending.
        name_b: Likewise.
        ids: The problems compared, sorted.
        a: For each of them, how many samples pass and how many were judged in the first file.
        b: Likewise in the second.
        scores: From k to pass@k of both; pass@1 always, and other k that both files have.
        won: Problems of which a larger share of samples passes on side B.
        lost: Problems of which a larger share passes on side A.
        only_a: Problems that the other file does not have.
        only_b: Likewise.
        unjudged: Problems in both files of which one side has no judged sample. They are left out.
        warnings: Lines on what makes the two hard to compare.
    """

    task: str
    name_a: str
    name_b: str
    ids: tuple[str, ...]
    a: tuple[Count, ...]
    b: tuple[Count, ...]
    scores: dict[int, Score]
    won: tuple[str, ...]
    lost: tuple[str, ...]
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()
    unjudged: tuple[str, ...] = ()
    warnings: list[str] = field(default_factory=list)

    @property
    def problems(self) -> int:
        """How many are compared."""
        return len(self.ids)

    @property
    def tied(self) -> int:
        """Problems of which the same share of samples passes on both sides."""
        return self.problems - len(self.won) - len(self.lost)

    @property
    def shares(self) -> list[tuple[float, float]]:
        """For each problem the share of samples that pass on side A and on side B."""
        return [_shares(*pair) for pair in zip(self.a, self.b, strict=True)]

    @property
    def rate_a(self) -> float:
        """Mean pass@1, 0 to 1."""
        return self.scores[1].a

    @property
    def rate_b(self) -> float:
        """Mean pass@1, 0 to 1."""
        return self.scores[1].b

    @property
    def difference(self) -> float:
        """``rate_b - rate_a``."""
        return self.scores[1].difference

    @property
    def interval(self) -> tuple[float, float]:
        """Paired bootstrap interval of the difference, 95 %."""
        return self.scores[1].interval

    @property
    def p_value(self) -> float:
        """Of the exact two-sided test of the problems won against those lost."""
        return sign_test(len(self.won), len(self.lost))

    @property
    def test(self) -> str:
        """What the test is called: with one sample of each problem it is McNemar's."""
        return "McNemar exact" if {m for _, m in self.a + self.b} == {1} else "sign test"

    @property
    def better(self) -> str:
        """``"A"`` or ``"B"`` where the interval excludes 0, else nothing."""
        low, high = self.interval
        return "B" if low > 0 else "A" if high < 0 else ""

    @property
    def verdict(self) -> str:
        """What the interval and the test say together, in plain words."""
        sure = self.p_value < SIGNIFICANCE
        if self.better and sure:
            return f"{self.better} is better: the interval excludes 0"
        if self.better:
            return (
                f"{self.better} may be better: the interval excludes 0, but wins and losses could be chance"
            )
        if not self.won and not self.lost:
            return "no difference: every problem comes out alike"
        nothing = f"no difference that {counted(self.problems, 'problem')} could show"
        if not sure:
            return nothing
        side = "B" if len(self.won) > len(self.lost) else "A"
        return f"{nothing} in the mean, though {side} does better on more of them"

    @property
    def evidence(self) -> str:
        """The test and its p-value, such as ``"sign test, p = 0.031"``."""
        return f"{self.test}, p = {self.p_value:.2g}"

    @property
    def left_out(self) -> str:
        """How many problems are not compared and why, such as ``"left out: 3 only in A"``, or nothing."""
        reasons = {"only in A": self.only_a, "only in B": self.only_b, "without a verdict": self.unjudged}
        named = [f"{len(ids)} {reason}" for reason, ids in reasons.items() if ids]
        return f"left out: {', '.join(named)}" if named else ""

    def to_json(self) -> dict[str, Any]:
        """Everything, for ``json.dump``."""
        names = (
            "problems",
            "tied",
            "rate_a",
            "rate_b",
            "difference",
            "interval",
            "p_value",
            "test",
            "verdict",
        )
        return {name: getattr(self, name) for name in names} | asdict(self)


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """The tasks of a results file, by name.

    Raises:
        UserError: It cannot be read, is no results file, or lacks the counts per problem.
    """
    fix = "give an evaluation_results_*.json of `coderl evaluate`"
    try:
        body = json.loads(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {fix}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: malformed JSON ({error}); {fix}") from error
    tasks = {k: v for k, v in body.items() if k != "config"} if isinstance(body, dict) else {}
    if not tasks or not all(map(_is_task, tasks.values())):
        raise UserError(f"{path}: is no results file; {fix}")
    for name, task in tasks.items():
        if fault := _fault(task):
            raise UserError(
                f"{path}: {name} {fault}; evaluate again with `coderl evaluate`, which notes them"
            )
    return tasks


def _is_task(value: Any) -> bool:
    return isinstance(value, dict) and ("ids" in value or any(key.startswith("pass@") for key in value))


def _fault(task: Mapping[str, Any]) -> str:
    """What keeps a task from being compared, or nothing."""
    if missing := [key for key in ("ids", "correct", "counted") if key not in task]:
        return f"has no counts per problem ({', '.join(missing)} missing): an older file, or another tool's"
    columns = [task[key] for key in ("ids", "correct", "counted")]
    if not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return "has ids, correct and counted that are not lists of one length"
    for name, c, m in zip(*columns, strict=True):
        if not (isinstance(name, str) and type(c) is int and type(m) is int and 0 <= c <= m):
            return f"has {c!r} correct of {m!r} samples of problem {name!r}, which are no counts"
    twice = [name for name, times in Counter(columns[0]).items() if times > 1]
    return f"has problem {twice[0]!r} twice" if twice else ""


def compare(a: Path, b: Path) -> list[Comparison]:
    """Compare the tasks that both results files have, B with A.

    Raises:
        UsageError: Both are one file.
        UserError: A file cannot be used, or they have nothing in common.
    """
    a, b = a.expanduser(), b.expanduser()
    first, second = read_results(a), read_results(b)
    if a.samefile(b):
        raise UsageError(f"{a} and {b} are one file; give two results files")
    shared = [task for task in first if task in second]
    if not shared:
        have = f"{a} has {', '.join(first)} and {b} has {', '.join(second)}"
        raise UserError(f"no task in common: {have}; evaluate one task with both")
    skipped = [f"{task}: only {a} has it" for task in first if task not in second]
    skipped += [f"{task}: only {b} has it" for task in second if task not in first]
    made, names = [], _names(a, b)
    for task in shared:
        try:
            made.append(compare_task(task, first[task], second[task], names))
        except UserError as error:
            if task == shared[-1] and not made:
                raise
            skipped.append(str(error))
    made[0].warnings.extend(f"{reason}; not compared" for reason in skipped)
    return made


def compare_task(
    task: str, a: Mapping[str, Any], b: Mapping[str, Any], names: tuple[str, str] = ("A", "B")
) -> Comparison:
    """Compare two results of one task, each as :func:`read_results` gives it.

    Raises:
        UserError: No problem has a judged sample on both sides.
    """
    first, second = _counts(a), _counts(b)
    if empty := [name for name, side in zip(names, (first, second), strict=True) if not side]:
        raise UserError(f"{task}: {empty[0]} holds no problems")
    both = sorted(first.keys() & second.keys(), key=_natural)
    if not both:
        raise UserError(f"{task}: {names[0]} and {names[1]} have no problem in common")
    # Without samples (n is 0) a problem is not solved; samples without a verdict say nothing.
    silent = {name for name in both if not first[name][1] and a.get("n") != 0}
    silent |= {name for name in both if not second[name][1] and b.get("n") != 0}
    pairs = {name: (first[name], second[name]) for name in both if name not in silent}
    if not pairs:
        raise UserError(f"{task}: no problem was judged on both sides")
    shares = {name: _shares(*pair) for name, pair in pairs.items()}
    comparison = Comparison(
        task,
        *names,
        ids=tuple(pairs),
        a=tuple(x for x, _ in pairs.values()),
        b=tuple(y for _, y in pairs.values()),
        scores={k: score for k in common_ks(a, b) if (score := _score(list(pairs.values()), k))},
        won=tuple(name for name, (x, y) in shares.items() if y > x),
        lost=tuple(name for name, (x, y) in shares.items() if y < x),
        only_a=tuple(sorted(first.keys() - second.keys(), key=_natural)),
        only_b=tuple(sorted(second.keys() - first.keys(), key=_natural)),
        unjudged=tuple(name for name in both if name in silent),
    )
    comparison.warnings.extend(f"{task}: {line}" for line in warnings(comparison, a, b))
    return comparison


def _counts(task: Mapping[str, Any]) -> dict[str, Count]:
    pairs = zip(task["correct"], task["counted"], strict=True)
    return dict(zip(task["ids"], pairs, strict=True))


def _shares(a: Count, b: Count) -> tuple[float, float]:
    return pass_at_k(a[1], a[0], 1), pass_at_k(b[1], b[0], 1)


def _score(pairs: Sequence[tuple[Count, Count]], k: int) -> Score | None:
    """pass@k of both over the problems of which both sides have ``k`` judged samples, if there are any."""
    told = [(a, b) for a, b in pairs if all(m >= k or m == 0 for _, m in (a, b))]
    if not told:
        return None
    x, y = ([pass_at_k(m, c, k) for c, m in side] for side in zip(*told, strict=True))
    differences = [after - before for before, after in zip(x, y, strict=True)]
    both = bootstrap_interval(differences)
    return Score(fmean(x), fmean(y), bootstrap_interval(x), bootstrap_interval(y), both, problems=len(told))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts ``mbpp/2`` before ``mbpp/11``."""
    return [(int(part), part) if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _names(a: Path, b: Path) -> tuple[str, str]:
    """What the files are called, with as many of their folders as it takes to tell them apart."""
    # A file's name may hold bytes that are no text, which nobody can print.
    a, b = (Path(str(path.absolute()).encode(errors="replace").decode()) for path in (a, b))
    short = [path.stem.removeprefix("evaluation_results_") for path in (a, b)]
    if short[0] != short[1]:
        return short[0], short[1]
    x, y = a.parts, b.parts
    depth = next(depth for depth in count(1) if x[-depth:] != y[-depth:])
    return "/".join(x[-depth:]), "/".join(y[-depth:])


def save(comparisons: Sequence[Comparison], folder: Path) -> list[Path]:
    """Write everything as ``comparison_{A}_vs_{B}.json`` and draw it as a PNG of that name.

    Raises:
        UserError: The folder cannot be written to.
    """
    files = [folder / f"{stem(comparisons)}.{ending}" for ending in ("json", "png")]
    body = {"a": comparisons[0].name_a, "b": comparisons[0].name_b}
    whole = body | {"tasks": {comparison.task: comparison.to_json() for comparison in comparisons}}
    write_whole(files[0], (json.dumps(whole, indent=2) + "\n").encode())
    picture(comparisons, files[1])
    return files
