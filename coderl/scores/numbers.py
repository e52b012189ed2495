"""How scores are written: per cent, points and intervals, rounded alike in texts, tables and figures."""

from __future__ import annotations

import math
from typing import Any

UNKNOWN = "–"
NO_WIDTH = 1e-9  # differences of shares that are equal but for rounding


def rounded(share: float) -> float:
    """A share or a difference of shares as it is printed: to a tenth of a per cent.

    It is rounded before it is multiplied by 100, so that 0.0125 is 1.3 % as well as 0.013.
    """
    return round(share, 3)


def percent(share: Any) -> str:
    """A share in per cent, such as ``78.8 %``; a dash where it is not known."""
    return f"{_tenths(share)} %" if _is_known(share) else UNKNOWN


def points(share: float) -> str:
    """A difference of shares in percentage points with its sign, such as ``+2.8``; never ``-0.0``."""
    return f"{100 * rounded(share):+z.1f}"


def between(ends: Any) -> str:
    """An interval of shares, such as ``70.4 to 79.0 %``; a dash where :func:`is_interval` says no."""
    return f"{_tenths(ends[0])} to {_tenths(ends[1])} %" if is_interval(ends) else UNKNOWN


def points_between(ends: Any) -> str:
    """An interval of a difference in points, such as ``-2.0 to +4.4``; a dash without one."""
    return f"{points(ends[0])} to {points(ends[1])}" if is_interval(ends) else UNKNOWN


def is_interval(ends: Any) -> bool:
    """Whether these are the ends of an interval of some width.

    A bootstrap interval has no width where all problems have one value, as a single problem has, or none
    solved. That says nothing of other problems, and "0.0 to 0.0 %" would claim that they are known.
    """
    known = isinstance(ends, list | tuple) and len(ends) == 2 and all(map(_is_known, ends))
    return known and ends[1] - ends[0] > NO_WIDTH


def _tenths(share: float) -> str:
    return f"{100 * rounded(share):z.1f}"


def _is_known(share: Any) -> bool:
    return isinstance(share, int | float) and math.isfinite(share)
