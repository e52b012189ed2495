"""Sorting by a key, and taking something from the sorted result."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING

from coderl.embedded.tasks.base import Composition, Part, Task, fill, function, join_name, printed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random


@dataclass(frozen=True, slots=True)
class Sorted:
    """What is sorted: words for it, the kind of input, the expression, and the keys it can go by."""

    key: str
    noun: str
    kind: str
    parameters: tuple[str, ...]
    code: str
    keys: tuple[Part, ...]


NATURAL = Part("value", "", "")
LENGTH = Part("length", " by length", "len", "length", ("max", "str"))
INITIAL = Part(
    "initial", " by first letter", "lambda x: x[0]", "first", ("lambda x: x[1]", "lambda x: x[-1]")
)
FINAL = Part("final", " by last letter", "lambda x: x[-1]", "last", ("lambda x: x[0]", "lambda x: x[1]"))
FOLDED = Part("folded", " ignoring case", "str.lower", "nocase", ("str.upper()", "len"))
BACKWARDS = Part(
    "backwards", " by their reversal", "lambda x: x[::-1]", "reversal", ("lambda x: x[::1]", "reversed")
)
ABSOLUTE = Part("absolute", " by absolute value", "abs", "abs", ("-abs", "max"))
REMAINDER = Part(
    "mod",
    " by remainder modulo {k}",
    "lambda x: x % {k}",
    "remainder",
    ("lambda x: x // {k}", "lambda x: x % {more}"),
    (3, 4, 5),
)
DISTANCE = Part(
    "distance",
    " by distance from {k}",
    "lambda x: abs(x - {k})",
    "distance",
    ("lambda x: x - {k}", "lambda x: abs(x + {k})"),
    (3, 4, 5),
)
SECOND = Part(
    "second", " by second element", "lambda p: p[1]", "second", ("lambda p: p[0]", "lambda p: p[2]")
)
TOTAL = Part(
    "total", " by sum", "lambda p: p[0] + p[1]", "sum", ("lambda p: p[0] * p[1]", "lambda p: p[0] - p[1]")
)
TIMES = Part("times", " by product", "lambda p: p[0] * p[1]", "product", ("lambda p: p[0] + p[1]", "sum"))
ROW_SUM = Part("sum", " by sum", "sum", "sum", ("max", "len"))
ROW_MAX = Part("max", " by maximum", "max", "max", ("min", "sum"))

SORTED = (
    Sorted(
        "numbers",
        "the numbers in a list",
        "ints",
        ("xs", "nums"),
        "{p}",
        (NATURAL, ABSOLUTE, REMAINDER, DISTANCE),
    ),
    Sorted(
        "words",
        "the words in a text",
        "text",
        ("s", "text"),
        "{p}.split()",
        (NATURAL, LENGTH, INITIAL, FINAL, FOLDED, BACKWARDS),
    ),
    Sorted("list of words", "the words in a list", "words", ("words", "ws"), "{p}", (LENGTH, FINAL, FOLDED)),
    Sorted("pairs", "the pairs in a list", "pairs", ("pairs", "ps"), "{p}", (NATURAL, SECOND, TOTAL, TIMES)),
    Sorted("items", "the items of a dictionary", "dict", ("d",), "{p}.items()", (NATURAL, SECOND)),
    Sorted("keys", "the keys of a dictionary", "dict", ("d",), "{p}", (NATURAL, LENGTH, FINAL)),
    Sorted(
        "rows", "the rows of a matrix", "matrix", ("rows", "m"), "{p}", (NATURAL, ROW_SUM, ROW_MAX, LENGTH)
    ),
)
TAKES = (
    Part("all", "sort {what}", ""),
    Part(
        "first", "sort {what} and return the first {k}", "[:{k}]", "first", ("[{k}:]", "[:{k} - 1]"), (2, 3)
    ),
    Part("last", "sort {what} and return the last {k}", "[-{k}:]", "last", ("[:-{k}]", "[:{k}]"), (2, 3)),
    Part("middle", "sort {what} and drop both ends", "[1:-1]", "middle", ("[1:]", "[:-1]")),
    Part("second", "sort {what} and return the second", "[1]", "second", ("[2]", "[0]")),
    Part("end", "sort {what} and return the last one", "[-1]", "end", ("[0]", "[1]")),
    Part("every", "sort {what} and return every second", "[::2]", "every", ("[1::2]", "[:2]")),
)


def sortings() -> Iterator[Composition]:
    """Compositions of the topic."""
    for what in SORTED:
        for by, take, down in product(what.keys, TAKES, (False, True)):
            key = f"sorting/{what.key}/{by.key}/{take.key}/{'down' if down else 'up'}"
            yield Composition("sorting", key, partial(_draw, what, by, take, down, key))


def _draw(what: Sorted, by: Part, take: Part, down: bool, key: str, rng: Random) -> Task:
    by, take = by.drawn(rng), take.drawn(rng)
    parameter = rng.choice(what.parameters)
    name = join_name(rng, "sort", take.name, by.name, "descending" if down else "")
    items = fill(what.code, p=parameter)

    def source(
        by_code: str = by.code, reverse: bool = down, taken: str = take.code, call: str = "sorted"
    ) -> str:
        extra = (f", key={by_code}" if by_code else "") + (", reverse=True" if reverse else "")
        return function(name, parameter, f"return {call}({items}{extra}){taken}")

    wrong = [("value", source(by_code=code)) for code in by.wrong]
    wrong += [("source", source(taken=code)) for code in take.wrong]
    wrong += [("order", source(reverse=not down))]
    if by.code:
        wrong += [("forgotten", source(by_code=""))]
    wrong += [printed(source())]
    words = f"{what.noun}{by.text}{' in descending order' if down else ''}"
    return Task(
        "sorting",
        key,
        f"Write a function to {fill(take.text, what=words)}.",
        name,
        what.kind,
        source(),
        tuple(wrong),
    )
