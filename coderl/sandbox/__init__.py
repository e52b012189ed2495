"""Running model-written programs against their tests, in processes that nothing trusted lives in.

``Sandbox(...).run([Program(code, tests)])`` gives an :class:`~coderl.types.Execution` for each program. The
answer is the proof: the process that holds the candidate is told which expressions to evaluate and never what
their values should be; the comparison is made here, on plain data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coderl.sandbox.program import Program, ProgramRunner

if TYPE_CHECKING:
    from coderl.sandbox.pool import Sandbox

__all__ = ["Program", "ProgramRunner", "Sandbox", "default_sandbox"]


def default_sandbox() -> ProgramRunner:
    """Where programs run if nobody says otherwise."""
    from coderl.sandbox.pool import Sandbox

    return Sandbox()


def __getattr__(name: str) -> object:
    """Load on demand: what only names programs and their runner needs no pool."""
    if name == "Sandbox":
        from coderl.sandbox.pool import Sandbox

        return Sandbox
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
