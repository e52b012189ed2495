"""``coderl doctor``: what this machine has, found by using it, and what would fix what is missing."""

from __future__ import annotations

from coderl.commands.doctor.command import doctor

__all__ = ["doctor"]
