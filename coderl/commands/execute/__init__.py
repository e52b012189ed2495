"""``coderl execute``: runs a file of programs in the sandbox and writes a file of verdicts.

``rows`` reads the input, ``verdicts`` writes the output and resumes it, ``command`` streams the one into the
other. No model and no torch: how a program is run and graded is :mod:`coderl.sandbox`'s.
"""

from __future__ import annotations

from coderl.commands.execute.command import execute

__all__ = ["execute"]
