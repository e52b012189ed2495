"""What tasks there are, by topic."""

from __future__ import annotations

from functools import cache

from coderl.embedded.tasks.base import Composition, Part, Task
from coderl.embedded.tasks.chains import chains
from coderl.embedded.tasks.recursion import recursions
from coderl.embedded.tasks.sorting import sortings
from coderl.embedded.tasks.topics import walking

__all__ = ["Composition", "Part", "Task", "catalogue"]


@cache
def catalogue() -> tuple[Composition, ...]:
    """Every composition the generator knows, in a fixed order."""
    return (*walking(), *recursions(), *sortings(), *chains())
