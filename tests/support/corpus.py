"""The hostile and the honest programs, a row per property, in ``hostile.jsonl`` and ``honest.jsonl``.

Fields of a row:

- ``name``: unique; what the program does.
- ``code``: its source. In hostile rows ``@SECRET@`` and its like stand for what `canaries` puts up.
- ``tests``, ``setup``: MBPP form. A hostile row without tests of its own is asked for :data:`SQUARES`.
- ``test``, ``entry_point``, ``helpers``: HumanEval form, instead of ``tests``.
- ``requires``: a module without which the row says nothing.

and of hostile rows alone:

- ``outcomes``: the verdicts it may get in sealed and rpc grading. Rows that try to read or reach something
  are written so that success solves the task: ``passed`` means that the attack worked.
- ``before``: a program that runs before it in the same lane.
- ``as_check``: its tests are also run as a ``check``, as :data:`SQUARES` are.
- ``needs``: the weakest tier, ``A`` or ``B``, that stops it; ``C`` if absent.
- ``inline_hole``: why inline grading, whose tests run beside the candidate, cannot stop it.
"""

from __future__ import annotations

import importlib.util
import json
import textwrap
import zoneinfo
from pathlib import Path
from typing import Any

from coderl.sandbox import Program

Row = dict[str, Any]

SQUARES = ("assert f(2) == 4", "assert f(3) == 9", "assert f(10) == 100")
GOOD = Program("def f(x): return x * x", SQUARES)


def read(name: str) -> list[Row]:
    """The rows of one file."""
    lines = Path(__file__).parents[1].joinpath("sandbox", name).read_text(encoding="ascii").splitlines()
    return [json.loads(line) for line in lines]


HOSTILE, HONEST = read("hostile.jsonl"), read("honest.jsonl")


def stopped(row: Row, tier: str) -> bool:
    """Whether a tier is strong enough for a hostile row."""
    weakest: str = row.get("needs", "C")
    return tier <= weakest


def runs_here(row: Row) -> bool:
    """Whether what a row requires is there."""
    needed: str = row.get("requires", "sys")
    if needed == "zoneinfo":
        return bool(zoneinfo.available_timezones())
    return importlib.util.find_spec(needed) is not None


def program(row: Row, code: str = "") -> Program:
    """A row as it stands, or with other code."""
    fields = {key: row[key] for key in ("setup", "test", "entry_point", "helpers") if key in row}
    tests = () if "test" in row else tuple(row.get("tests", SQUARES))
    return Program(code or row["code"], tests, **fields)


def as_check(row: Row) -> Program | None:
    """The tests of a row as a ``check(candidate)`` with a loop, which only rpc and inline grading can carry.

    None where they call more than ``f``, or where the row has a check already.
    """
    tests = row.get("tests", SQUARES)
    if "test" in row or "setup" in row or not all(line.startswith("assert f(") for line in tests):
        return None
    body = textwrap.indent("\n".join(tests), " " * 8)
    test = f"def check(candidate):\n    f = candidate\n    for _ in range(1):\n{body}\n"
    return Program(row["code"], test=test, entry_point="f")
