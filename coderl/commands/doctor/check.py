"""The result of one check of ``coderl doctor``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check.

    Attributes:
        name: What was checked.
        status: ``ok``; ``warn`` where something is missing that training can do without; ``fail`` where
            training cannot run, or not safely.
        detail: What was found, in one line.
        fix: What to do about it; empty where it is ok.
        data: The same as values, for ``--json``.
    """

    name: str
    status: Status
    detail: str
    fix: str = ""
    data: dict[str, Any] = field(default_factory=dict)
