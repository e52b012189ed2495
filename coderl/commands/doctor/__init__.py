"""``coderl doctor``: checks that training can run on this machine, by trying each thing that it needs.

``machine``, ``isolation``, ``accelerator`` and ``services`` each yield checks, and ``command`` prints them. A
check changes nothing: it says what is missing and how to fix it.
"""

from __future__ import annotations

from coderl.commands.doctor.command import doctor

__all__ = ["doctor"]
