"""Runs the checks one after the other, and prints each as soon as it is done."""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from itertools import chain
from typing import TYPE_CHECKING, Any

from coderl.errors import UsageError, UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coderl.commands.doctor.check import Check

MARKS = {"ok": "ok", "warn": "warn", "fail": "FAIL"}
COLOURS = {"ok": "32", "warn": "33", "fail": "31"}
WIDTH = 24
"""Width of the column of names, in characters."""


def doctor(json: bool = False, plan: str | None = None, gpu_memory: float | None = None) -> None:
    """Check that training can run on this machine, and safely, by trying each thing it needs.

    The sandbox runs a good program, a wrong one and hostile ones; bitsandbytes packs and unpacks numbers on
    the CPU and on the GPU; the hub is asked for an answer (not where HF_HUB_OFFLINE=1). Run it in the folder
    that you train from: that is where space is looked for. It takes about ten seconds. Exit code 1: training
    could not run, or not safely (a line marked FAIL).

    Args:
        json: Print one JSON document instead of the table, and nothing else, on standard output.
        plan: Check nothing: say what `coderl fit -c CONFIG` would take of this machine's memory, by part, and
            how much it would compute at a time. Options of the fit may follow in the same word:
            --plan "grpo.yaml --model.max_new_tokens 256".
        gpu_memory: With --plan: for a GPU of so many GB (24, 80) in place of this machine.

    Raises:
        UserError: A check failed, or what is planned does not fit.
        UsageError: --gpu_memory without --plan, or not above 0.
    """
    if gpu_memory is not None and (plan is None or not gpu_memory > 0):
        raise UsageError(
            "--gpu_memory is the GB of a GPU to plan for: give it with --plan CONFIG, such as 24"
        )
    if plan is not None:
        from coderl.commands.doctor.plan import show

        show(plan, gpu_memory, json)
        return
    found = []
    for check in checks():
        found.append(check)
        if not json:
            print(line(check, colour=sys.stdout.isatty()), flush=True)
    if json:
        print(document(found))
    if failed := [check.name for check in found if check.status == "fail"]:
        raise UserError(f"training cannot run safely here, see: {', '.join(failed)}")


def checks() -> Iterator[Check]:
    """Every check, the quick ones first."""
    # Not at the top: `python -m coderl.commands.doctor.accelerator` imports this package first, and would
    # load the module twice.
    from coderl.commands.doctor import accelerator, isolation, machine, services

    return chain(machine.checks(), isolation.checks(), accelerator.checks(), services.checks())


def line(check: Check, colour: bool = False) -> str:
    """A check as a line of the table, with a second line below it where there is something to fix."""
    mark = f"{MARKS[check.status]:<5}"
    if colour:
        mark = f"\033[{COLOURS[check.status]}m{mark}\033[0m"
    head = f"{mark} {check.name:<{WIDTH}} {check.detail}"
    if not check.fix or check.status == "ok":
        return head
    return head + "\n" + textwrap.indent(f"-> {check.fix}", " " * (WIDTH + 7))


def document(found: list[Check]) -> str:
    """All checks as one JSON document."""
    import json

    counts = {status: sum(check.status == status for check in found) for status in MARKS}
    tier = next((check.data["tier"] for check in found if "tier" in check.data), None)
    values: dict[str, Any] = {"ok": not counts["fail"], "tier": tier, "counts": counts}
    return json.dumps(values | {"checks": [dataclasses.asdict(check) for check in found]}, indent=2)
