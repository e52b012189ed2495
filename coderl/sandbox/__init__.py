"""Runs model-written programs against their tests, in jailed processes that hold nothing worth stealing.

``Sandbox(...).run([Program(code, tests)])`` gives an :class:`~coderl.types.Execution` for each program. The
answer is the proof: the process that holds the candidate runs the tests and never sees what their values
should be; the comparison is made here, on plain data. :mod:`coderl.sandbox.pool` describes the way of one
verdict through the modules of this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coderl.sandbox.pool import Sandbox
    from coderl.sandbox.program import Program, ProgramRunner

__all__ = ["Program", "ProgramRunner", "Sandbox", "default_sandbox"]


def default_sandbox() -> ProgramRunner:
    """Where programs run if nobody says otherwise."""
    from coderl.sandbox.pool import Sandbox

    return Sandbox()


def __getattr__(name: str) -> object:
    """Load on demand: a program costs little to import, and the sandbox much more."""
    if name == "Sandbox":
        from coderl.sandbox.pool import Sandbox

        return Sandbox
    if name in ("Program", "ProgramRunner"):
        from coderl.sandbox import program

        return getattr(program, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
