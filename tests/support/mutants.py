"""Canned answers, right and wrong, made from a problem's own solution: the same ones every time.

None of them runs for ever but the one that is said to: a constant is changed only where no ``while`` and no
call of the function by itself could wait for it.
"""

from __future__ import annotations

import ast
import re

PROSE = "The function goes over the numbers and keeps the largest; it's easy (see above), isn't it?\n"
RIGHT = ("right", "chatty", "twice", "guarded")
"""The answers that solve the problem."""


def answers(code: str, function: str) -> dict[str, str]:
    """Whole programs by what is done to the right one; those of :data:`RIGHT` pass.

    Args:
        code: A program that passes.
        function: Name of the function that its tests call.
    """
    lines = code.rstrip("\n").split("\n")
    again = f"\n\ndef {function}(*args, **named):\n    "
    return {
        "right": code,
        "chatty": f"{code}\n\nprint('done', {function})\nprint('x' * 10_000)\n",
        "twice": f"{code}{again}raise NotImplementedError\n\n{code}\n",
        "guarded": f"{code}\n\nif __name__ == '__main__':\n    {function}()\n",
        "constant": bumped(code, function),
        "boxed": f"{code}\n\n_kept = {function}\n{again}return [_kept(*args, **named)]\n",
        "raises": f"{code}{again}raise ValueError(args)\n",
        "silent": f"{code}{again}pass\n",
        "recursive": f"{code}{again}return {function}(*args)\n",
        "renamed": re.sub(rf"\b{re.escape(function)}\b", f"{function}_2", code),
        "unknown name": f"{code}\n\nresult = no_such_name(1)\n",
        "no such module": f"import no_such_module\n{code}\n",
        "exits": f"{code}\n\nimport sys\nsys.exit()\n",
        "short": "\n".join(lines[:-1]) + "\n" + lines[-1][: len(lines[-1]) // 2] + "(",
        "prose": PROSE * 3,
    }


def endless(code: str) -> str:
    """A program that defines the right function and never comes to an end."""
    return f"{code}\n\nwhile True:\n    pass\n"


def bumped(code: str, function: str) -> str:
    """The program with its first number one higher, or another answer where that might never end."""
    tree = ast.parse(code)
    calls = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    loops = any(isinstance(node, ast.While) for node in ast.walk(tree))
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    numbers = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and type(node.value) is int]
    if loops or calls & defined or not numbers:
        return f"{code}\n\n{function} = lambda *args: 0\n"
    numbers[0].value = int(str(numbers[0].value)) + 1
    return ast.unparse(tree) + "\n"


def function_of(code: str, tests: str) -> str:
    """Name of the function that tests call: the last one that a program defines and they name."""
    named = set(re.findall(r"\w+", tests))
    found = [
        node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef) and node.name in named
    ]
    if not found:
        raise ValueError("the tests call nothing that the program defines")
    return found[-1]
