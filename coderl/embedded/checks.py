"""Runs generated functions: to make asserts, to find mistakes, and to compare two functions.

Sources run in this process, without a sandbox: the generator's own only, never a model's samples.
"""

from __future__ import annotations

import ast
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from coderl.embedded.inputs import battery, draw

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from random import Random

    from coderl.embedded.tasks.base import Task

FAILED = object()
"""Result of a call that raised; equal only to itself."""


def load(source: str, name: str) -> Callable[..., Any]:
    """The function ``name`` that ``source`` defines; its ``print`` does nothing."""
    space: dict[str, Any] = {"print": lambda *_: None}
    exec(compile(source, "<generated>", "exec"), space)  # the generator's own source
    function: Callable[..., Any] = space[name]
    return function


def call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """The result of a call, or :data:`FAILED`."""
    try:
        return function(*deepcopy(arguments))  # a wrong function may change its arguments
    except Exception:
        return FAILED


def signature(source: str, name: str, kind: str) -> tuple[str, ...]:
    """The results of a function on fixed inputs of its kind. Equal signatures mean the same task."""
    # Results as text: unlike the values, all texts can be hashed, and True and 1 differ.
    function = load(source, name)
    results = (call(lambda *a: repr(function(*a)), arguments) for arguments in battery(kind))
    return (kind, *("raised" if result is FAILED else result for result in results))


def normalised(source: str) -> str:
    """The source with every name that it defines numbered in order of appearance, ``v0``, ``v1`` ..."""
    tree = ast.parse(source)
    own = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    own |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    own |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    numbers: dict[str, str] = {}
    for node in ast.walk(tree):
        for field in ("id", "arg", "name"):
            name = getattr(node, field, None)
            if name in own:
                setattr(node, field, numbers.setdefault(name, f"v{len(numbers)}"))
    return ast.unparse(tree)


def asserts(task: Task, rng: Random, mistakes: Sequence[str], candidates: int = 16) -> list[str]:
    """Up to three assert lines for a task, chosen among random inputs to catch as many mistakes as possible.

    Expected values come from running the solution. The shortest line is first, because prompts show it.

    Args:
        task: The task, with its solution.
        rng: Draws the inputs.
        mistakes: Sources with mistakes that the asserts should catch.
        candidates: Number of inputs to choose from.
    """
    right = load(task.solution, task.name)
    drawn = [draw(task.kind, rng) for _ in range(candidates)]
    cases = [(a, r) for a in drawn if (r := call(right, a)) is not FAILED]
    cases = list({repr(case): case for case in cases}.values())
    wrong = [load(source, task.name) for source in mistakes]
    kills = [{i for i, f in enumerate(wrong) if call(f, a) != r} for a, r in cases]
    # Greedy set cover: each further case is the one that catches most of the mistakes that are left.
    chosen: list[int] = []
    for _ in range(min(3, len(cases))):
        left = set(range(len(wrong))).difference(*(kills[i] for i in chosen))
        seen = {repr(cases[i][1]) for i in chosen}
        rest = [i for i in range(len(cases)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: _preference(cases[i], kills[i] & left, seen)))
    lines = [f"assert {task.name}({', '.join(map(repr, a))}) == {r!r}" for a, r in (cases[i] for i in chosen)]
    return sorted(lines, key=len)


def _preference(case: tuple[Any, Any], killed: set[int], seen: set[str]) -> tuple[bool, int, bool, int]:
    """Sort key of a case: first a result that is not empty, then mistakes caught, a new result, brevity."""
    arguments, result = case
    # 0, "" and [] are what many wrong functions return as well; False is as good a result as True.
    informative = bool(result) or isinstance(result, bool)
    return (informative, len(killed), repr(result) not in seen, -len(repr(arguments)))


def passes(source: str, tests: Sequence[str]) -> bool:
    """Whether all asserts hold for a source."""
    space: dict[str, Any] = {"print": lambda *_: None}
    try:
        exec(compile("\n".join([source, *tests]), "<generated>", "exec"), space)  # the generator's own source
    except Exception:
        return False
    return True
