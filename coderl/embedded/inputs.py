"""Random inputs by kind: arguments for asserts, and a fixed battery on which functions are compared."""

from __future__ import annotations

from functools import cache
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

NOUNS = """
red apple tree sun moon star sea rose note test sort area east iron stone letter data ace river road
ant core set stats ocean trees acorn tart oats rat tea
"""
WORDS = NOUNS.split()


def _ints(rng: Random) -> list[int]:
    return [rng.randint(-9, 12) for _ in range(rng.randint(4, 6))]


def _word(rng: Random) -> str:
    if rng.random() < 0.15:
        return str(rng.randint(1, 99))
    word = rng.choice(WORDS)
    return word.title() if rng.random() < 0.25 else word


def _text(rng: Random) -> str:
    return " ".join(_word(rng) for _ in range(rng.randint(3, 4)))


def _string(rng: Random) -> str:
    letters = list(rng.choice(WORDS) + rng.choice(WORDS)[:2])
    letters[rng.randrange(len(letters))] = rng.choice("ABEST")
    letters.insert(rng.randrange(len(letters)), str(rng.randint(0, 9)))
    return "".join(letters)


def _pairs(rng: Random) -> list[tuple[int, int]]:
    pairs = [(rng.randint(0, 9), rng.randint(0, 9)) for _ in range(rng.randint(3, 4))]
    return [(a, a) if rng.random() < 0.2 else (a, b) for a, b in pairs]


def _joined(separator: str) -> Callable[[Random], tuple[Any, ...]]:
    return lambda rng: (separator.join(str(rng.randint(0, 15)) for _ in range(rng.randint(4, 5))),)


# Short values, and few of them: asserts stay short, and so do prompts.
KINDS: dict[str, Callable[[Random], tuple[Any, ...]]] = {
    "ints": lambda rng: (_ints(rng),),
    "two lists": lambda rng: ([abs(x) for x in _ints(rng)], [abs(x) for x in _ints(rng)]),
    "two numbers": lambda rng: (rng.randint(1, 20), rng.randint(1, 20)),
    "number": lambda rng: (rng.randint(100, 99999),),
    "count": lambda rng: (rng.randint(5, 14),),
    "text": lambda rng: (_text(rng),),
    "string": lambda rng: (_string(rng),),
    "words": lambda rng: (_text(rng).split(),),
    "pairs": lambda rng: (_pairs(rng),),
    "dict": lambda rng: ({word: rng.randint(-5, 12) for word in rng.sample(WORDS, rng.randint(3, 4))},),
    "matrix": lambda rng: ([[rng.randint(0, 9) for _ in range(rng.randint(2, 4))] for _ in range(3)],),
    "joined ','": _joined(","),
    "joined '-'": _joined("-"),
    "joined ';'": _joined(";"),
}


def draw(kind: str, rng: Random) -> tuple[Any, ...]:
    """Random arguments of the given kind, a key of :data:`KINDS`."""
    return KINDS[kind](rng)


@cache
def battery(kind: str, size: int = 24) -> tuple[tuple[Any, ...], ...]:
    """Fixed inputs of a kind: functions that agree on all of them count as the same task."""
    rng = Random(f"battery of {kind}")
    return tuple(draw(kind, rng) for _ in range(size))
