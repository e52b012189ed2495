"""``coderl execute``: a file of programs in, a file of verdicts out. Needs no model and no torch."""

from __future__ import annotations

from coderl.commands.execute.command import execute

__all__ = ["execute"]
