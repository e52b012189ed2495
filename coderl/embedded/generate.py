"""The seeded generator of problems: assigns compositions to splits, and draws problems from them.

A composition is a task whose literals, names and wording are still open. Each belongs to one of three splits:
``sft`` (supervised data for the tiny model), ``train`` (for reinforcement learning) and ``test`` (held out).
Compositions that compute the same function for some choice of literals get the same split: no split holds
another's task under a new name.

A share of the SFT solutions has a plausible mistake, as the code that real models are trained on does. This
leaves something for reinforcement learning to improve: see :func:`sft_examples`.
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
"""Largest number of compositions of one topic, so that no topic dominates."""
SHARES = {"test": 0.12, "train": 0.30, "sft": 0.58}
LITERAL_DRAWS = 8
"""Choices of literals that are tried when compositions are compared by what they compute."""
LONGEST_PROMPT = 230
"""Characters. Longer tasks are drawn again: short prompts keep the quickstart quick."""

Identity = tuple[str, ...] | str
"""What two tasks have in common if they are the same: results on fixed inputs, or the normalised source."""


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
    """From the key of each composition to its split: ``"sft"``, ``"train"`` or ``"test"``."""
    # Union-find: compositions that share an identity for some literals become one set, and sets are assigned
    # to splits as wholes.
    leader: dict[str, str] = {}
    owner: dict[Identity, str] = {}

    def find(key: str) -> str:
        while leader.setdefault(key, key) != key:
            key = leader[key]
        return key

    for composition in compositions():
        rng = Random(f"compare {composition.key}")
        for draw in range(LITERAL_DRAWS):
            task = composition.draw(rng)
            # Normalising a source takes half of the time: only half of the draws do it.
            for identity in _identities(task, source=draw < LITERAL_DRAWS // 2):
                leader[find(owner.setdefault(identity, composition.key))] = find(composition.key)
    return {c.key: _split_of(find(c.key)) for c in compositions()}


def _identities(task: Task, source: bool = True) -> list[Identity]:
    """Identities of a task: two tasks that share one are the same. The source's only if asked for."""
    results: Identity = signature(task.solution, task.name, task.kind)
    return [results, normalised(task.solution)] if source else [results]


def _split_of(key: str) -> str:
    # By a hash, not by a generator: a new composition then does not move the others to other splits.
    at = _hash("split", key) / 2**64
    for split, share in SHARES.items():
        if at < share:
            return split
        at -= share
    return "sft"


@cache
def by_topic(split: str) -> dict[str, tuple[Composition, ...]]:
    """The compositions of a split, by topic."""
    table: dict[str, list[Composition]] = defaultdict(list)
    for composition in compositions():
        if splits()[composition.key] == split:
            table[composition.topic].append(composition)
    return {topic: tuple(found) for topic, found in sorted(table.items())}


def mistaken(task: Task, tests: list[str]) -> list[tuple[str, str]]:
    """The mistakes of a task that its tests catch, as ``(kind, source)``."""
    return [(kind, code) for kind, code in task.buggy if code != task.solution and not passes(code, tests)]


def shipped_rows(seed: int, train: int = 308, test: int = 110) -> list[dict[str, Any]]:
    """The problems that ship, in MBPP's form, topics in equal parts and each composition once.

    Args:
        seed: Determines every choice.
        train: Intended number of training problems.
        test: Intended number of held-out problems.
    """
    rows: list[dict[str, Any]] = []
    seen: set[Identity] = set()
    for split, size in (("train", train), ("test", test)):
        topics = by_topic(split)
        for topic, found in topics.items():
            wanted = len(rows) + size // len(topics)
            for composition in found:
                row = _row(composition, Random(f"{seed} {composition.key}"), split, seen)
                if row is not None and len(rows) < wanted:
                    rows.append({"task_id": len(rows) + 1, **row, "topic": topic})
    return rows


def _row(composition: Composition, rng: Random, split: str, seen: set[Identity]) -> dict[str, Any] | None:
    for _ in range(8):
        task = composition.draw(rng)
        tests = asserts(task, rng, [code for _, code in task.buggy], candidates=32)
        identities = set(_identities(task))
        # With one expected value only, a function that always returns it would pass.
        varied = len({test.rpartition(" == ")[2] for test in tests}) > 1
        if _short(task, tests) and varied and not identities & seen:
            seen |= identities
            return {
                "text": task.text,
                "code": task.solution,
                "test_list": tests,
                "test_setup_code": "",
                "split": split,
                "kind": task.kind,
            }
    return None


def _short(task: Task, tests: list[str]) -> bool:
    return len(tests) == 3 and len(task.text) + len(tests[0]) < LONGEST_PROMPT


def sft_examples(seed: int, size: int, bug_rate: float) -> list[Problem]:
    """Problems with solutions for supervised training, from compositions that neither shipped split uses.

    Topics have equal shares; literals, names, wordings and inputs vary.

    Args:
        seed: Determines every choice.
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
    solution = _draw_mistake(task, rng) if buggy else task.solution
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


def _draw_mistake(task: Task, rng: Random) -> str:
    # The kind first: kinds with many variants are not drawn more often.
    by_kind: dict[str, list[str]] = defaultdict(list)
    for kind, code in task.buggy:
        by_kind[kind].append(code)
    return rng.choice(by_kind[rng.choice(sorted(by_kind))])
