"""The seeded generator: which compositions belong to which split, and problems drawn from them.

Compositions, not texts, are assigned to the three splits: ``sft`` (supervised data for the tiny model),
``train`` (for reinforcement learning) and ``test`` (held out). Compositions that compute the same function
for some choice of literals get the same split: no split has another's task under a new name.

A share of the SFT solutions has a plausible mistake, as the code that real models learn from does. So there
is something left for reinforcement learning to improve: see :func:`sft_examples`.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from functools import cache
from random import Random
from typing import TYPE_CHECKING, Any

from coderl.embedded.checks import asserts, normalised, passes, signature
from coderl.embedded.tasks import catalogue
from coderl.problems.prompts import MBPP_STOP, mbpp_prompt
from coderl.types import Problem

if TYPE_CHECKING:
    from coderl.embedded.tasks import Composition, Task

PER_TOPIC = 320
"""Most compositions of one topic that are used, so that no topic dominates."""
SHARES = {"test": 0.12, "train": 0.30, "sft": 0.58}
LITERAL_DRAWS = 8
"""How many choices of literals are tried when compositions are compared by what they compute."""
LONGEST_PROMPT = 230
"""Characters. Longer tasks are drawn again: short prompts keep the quickstart quick."""


What = tuple[str, ...] | str
"""An identity of a task: its results on fixed inputs, or its source without its own names."""


def _hash(*words: object) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, words)).encode()).digest()[:8], "big")


@cache
def compositions() -> tuple[Composition, ...]:
    """The compositions in use, at most :data:`PER_TOPIC` of each topic, chosen by a hash of their keys."""
    by_topic: dict[str, list[Composition]] = defaultdict(list)
    for composition in sorted(catalogue(), key=lambda c: _hash("use", c.key)):
        by_topic[composition.topic].append(composition)
    return tuple(c for topic in sorted(by_topic) for c in by_topic[topic][:PER_TOPIC])


@cache
def splits() -> dict[str, str]:
    """Composition key to ``"sft"``, ``"train"`` or ``"test"``."""
    leader: dict[str, str] = {}
    owner: dict[What, str] = {}

    def find(key: str) -> str:
        while leader.setdefault(key, key) != key:
            key = leader[key]
        return key

    for composition in compositions():
        rng = Random(f"compare {composition.key}")
        for draw in range(LITERAL_DRAWS):
            task = composition.draw(rng)
            for what in _same(task, text=draw < LITERAL_DRAWS // 2):
                leader[find(owner.setdefault(what, composition.key))] = find(composition.key)
    return {c.key: _share(find(c.key)) for c in compositions()}


def _same(task: Task, text: bool = True) -> list[What]:
    """Identities of a task: two tasks that share one are the same. Without ``text`` in half the time."""
    results: What = signature(task.solution, task.name, task.kind)
    return [results, normalised(task.solution)] if text else [results]


def _share(key: str) -> str:
    at = _hash("split", key) / 2**64
    for split, share in SHARES.items():
        if at < share:
            return split
        at -= share
    return "sft"


@cache
def by_topic(split: str) -> dict[str, tuple[Composition, ...]]:
    """The compositions of a split by topic."""
    table: dict[str, list[Composition]] = defaultdict(list)
    for composition in compositions():
        if splits()[composition.key] == split:
            table[composition.topic].append(composition)
    return {topic: tuple(found) for topic, found in sorted(table.items())}


def mistaken(task: Task, tests: list[str]) -> list[tuple[str, str]]:
    """The mistakes of a task that its tests catch."""
    return [(kind, code) for kind, code in task.buggy if code != task.solution and not passes(code, tests)]


def shipped_rows(seed: int, train: int = 308, test: int = 110) -> list[dict[str, Any]]:
    """The problems that ship, in MBPP's form, topics in equal parts and each composition once.

    Args:
        seed: Fixes every choice.
        train: Number of training problems aimed at.
        test: Number of held-out problems aimed at.
    """
    rows: list[dict[str, Any]] = []
    seen: set[What] = set()
    for split, size in (("train", train), ("test", test)):
        topics = by_topic(split)
        for topic, found in topics.items():
            wanted = len(rows) + size // len(topics)
            for composition in found:
                row = _row(composition, Random(f"{seed} {composition.key}"), split, seen)
                if row is not None and len(rows) < wanted:
                    rows.append({"task_id": len(rows) + 1, **row, "topic": topic})
    return rows


def _row(composition: Composition, rng: Random, split: str, seen: set[What]) -> dict[str, Any] | None:
    for _ in range(8):
        task = composition.draw(rng)
        tests = asserts(task, rng, [code for _, code in task.buggy], candidates=32)
        same = set(_same(task))
        if _short(task, tests) and _varied(tests) and not same & seen:
            seen |= same
            return {
                "text": task.text,
                "code": task.solution,
                "test_list": tests,
                "test_setup_code": "",
                "split": split,
                "kind": task.kind,
            }
    return None


def _varied(tests: list[str]) -> bool:
    """Whether a function that always returns the same value must fail."""
    return len({test.rpartition(" == ")[2] for test in tests}) > 1


def _short(task: Task, tests: list[str]) -> bool:
    return len(tests) == 3 and len(task.text) + len(tests[0]) < LONGEST_PROMPT


def sft_examples(seed: int, size: int, bug_rate: float) -> list[Problem]:
    """Problems with solutions for supervised learning, from compositions that neither shipped split uses.

    Topics come in equal parts; literals, names, wordings and inputs vary.

    Args:
        seed: Fixes every choice.
        size: Number of problems.
        bug_rate: Share of the solutions, in [0, 1], that carry a plausible mistake: off by one, a wrong
            operator, method, order or reduction, a forgotten condition, a return too early, a print where a
            return belongs. Each of them fails at least one of its problem's tests.
    """
    rng = Random(f"sft {seed}")
    topics = list(by_topic("sft").values())
    found: list[Problem] = []
    while len(found) < size:
        task = rng.choice(rng.choice(topics)).draw(rng)
        problem = _example(task, rng, rng.random() < bug_rate, len(found))
        if problem is not None:
            found.append(problem)
    return found


def _example(task: Task, rng: Random, buggy: bool, number: int) -> Problem | None:
    solution = _mistake(task, rng) if buggy else task.solution
    tests = asserts(task, rng, [solution] if buggy else [], candidates=6)
    if not _short(task, tests) or (buggy and passes(solution, tests)):
        return None
    return Problem(
        id=f"sft/{number}",
        prompt=mbpp_prompt(task.text, tests[0]),
        instruction=task.text,
        tests=tuple(tests),
        solution=solution,
        stop=MBPP_STOP,
    )


def _mistake(task: Task, rng: Random) -> str:
    by_kind: dict[str, list[str]] = defaultdict(list)
    for kind, code in task.buggy:
        by_kind[kind].append(code)
    return rng.choice(by_kind[rng.choice(sorted(by_kind))])
