"""Running model-written programs against their tests, in processes that nothing trusted lives in.

``Sandbox(...).run([Program(code, tests)])`` gives an :class:`~coderl.types.Execution` for each program. The
answer is the proof: the process that holds the candidate is told which expressions to evaluate and never what
their values should be; the comparison is made here, on plain data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coderl.sandbox.checks.plan import Program
    from coderl.sandbox.pool import Sandbox

__all__ = ["Program", "Sandbox"]


def __getattr__(name: str) -> object:
    """Load on demand: a lane's interpreter, which pays for all it holds at each fork, needs neither."""
    if name == "Sandbox":
        from coderl.sandbox.pool import Sandbox

        return Sandbox
    if name == "Program":
        from coderl.sandbox.checks.plan import Program

        return Program
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
