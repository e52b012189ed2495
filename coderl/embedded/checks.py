"""Running generated sources: asserts, mistakes, and whether two functions compute the same.

Only sources made by the generator are run here, in this process. Sampled code never is.
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
    """The function that ``source`` defines, with ``print`` silenced."""
    space: dict[str, Any] = {"print": lambda *_: None}
    exec(compile(source, "<generated>", "exec"), space)  # our own source, see above
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
    function = load(source, name)
    results = (call(lambda *a: repr(function(*a)), arguments) for arguments in battery(kind))
    return (kind, *("raised" if result is FAILED else result for result in results))


def normalised(source: str) -> str:
    """The source with every name that it defines replaced by a number, in order of appearance."""
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
    """Three assert lines for a task, chosen among random inputs so that few mistakes survive them.

    Expected values come from running the solution. The first one, which prompts show, is a short one.
    """
    right = load(task.solution, task.name)
    drawn = [draw(task.kind, rng) for _ in range(candidates)]
    cases = [(a, r) for a in drawn if (r := call(right, a)) is not FAILED]
    cases = list({repr(case): case for case in cases}.values())
    wrong = [load(source, task.name) for source in mistakes]
    kills = [{i for i, f in enumerate(wrong) if call(f, a) != r} for a, r in cases]
    chosen: list[int] = []
    for _ in range(min(3, len(cases))):
        left = set(range(len(wrong))).difference(*(kills[i] for i in chosen))
        seen = {repr(cases[i][1]) for i in chosen}
        rest = [i for i in range(len(cases)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: _worth(cases[i], kills[i] & left, seen)))
    lines = [f"assert {task.name}({', '.join(map(repr, a))}) == {r!r}" for a, r in (cases[i] for i in chosen)]
    return sorted(lines, key=len)


def _worth(case: tuple[Any, Any], killed: set[int], seen: set[str]) -> tuple[bool, int, bool, int]:
    arguments, result = case
    telling = bool(result) or isinstance(result, bool)
    return (telling, len(killed), repr(result) not in seen, -len(repr(arguments)))


def passes(source: str, tests: Sequence[str]) -> bool:
    """Whether all asserts hold."""
    space: dict[str, Any] = {"print": lambda *_: None}
    try:
        exec(compile("\n".join([source, *tests]), "<generated>", "exec"), space)  # our own source
    except Exception:
        return False
    return True
