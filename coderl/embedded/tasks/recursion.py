"""Recursive functions over numbers, lists, strings and digits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING

from coderl.embedded.tasks.base import Composition, Part, Task, fill, function, join_name, printed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random

TERMS = (
    Part("self", "{items}", "{x}"),
    Part("square", "the squares of {items}", "{x} * {x}", "squares", ("{x} * 2", "{x}")),
    Part("cube", "the cubes of {items}", "{x} ** 3", "cubes", ("{x} * 3", "{x} ** 2")),
    Part("plus", "{items} plus {k}", "({x} + {k})", "plus", ("({x} - {k})", "({x} + {more})"), (1, 2, 3)),
    Part("times", "{items} times {k}", "{x} * {k}", "times", ("{x} + {k}", "{x}"), (3, 4, 5)),
    Part("mod", "{items} modulo {k}", "{x} % {k}", "modulo", ("{x} // {k}", "{x}"), (3, 4, 5)),
)
LETTER_TERMS = (
    Part("self", "the string", "s[0]", "", ("s[-1]", "s[1]")),
    Part("twice", "the repeated letters of a string", "s[0] * 2", "repeated", ("s[0]", "s[-1] * 2")),
    Part("upper", "the upper case string", "s[0].upper()", "upper", ("s[0].lower()", "s[0]")),
    Part("swap", "the case swapped string", "s[0].swapcase()", "swapped", ("s[0].upper()", "s[0]")),
    Part("dash", "the string with dashes", "s[0] + '-'", "dashes", ("'-'", "'-' + s[0] + '-'")),
    Part("stars", "the string with stars", "s[0] + '*'", "stars", ("'*'", "'*' + s[0] + '*'")),
)


@dataclass(frozen=True, slots=True)
class Walk:
    """How a recursion goes down: stop test, item and what remains.

    Attributes:
        key: Names it.
        kind: Kind of input.
        parameter: Parameter name.
        stop: Condition that ends the recursion, and plausible mistakes in it.
        item: Expression for the item at hand.
        rest: What the recursive call is given.
        rests: Plausible mistakes in ``rest``.
        text: Words for the items.
        name: Word for function names.
    """

    key: str
    kind: str
    parameter: str
    stop: tuple[str, ...]
    item: str
    rest: str
    rests: tuple[str, ...]
    text: str
    name: str


@dataclass(frozen=True, slots=True)
class Recursion:
    """A recursive function with every choice made."""

    name: str
    walk: Walk
    stop: str
    base: str
    term: str
    operator: str
    rest: str
    flipped: bool = False

    def render(self) -> str:
        """Its source."""
        call = f"{self.name}({self.rest})"
        value = (
            f"{call} {self.operator} {self.term}" if self.flipped else f"{self.term} {self.operator} {call}"
        )
        lines = (f"if {self.stop}:", f"    return {self.base}", f"return {value}")
        return function(self.name, self.walk.parameter, *lines)


WALKS = (
    Walk(
        "down",
        "count",
        "n",
        ("n <= 0", "n == 1", "n < 0"),
        "n",
        "n - 1",
        ("n - 2", "n"),
        "the numbers from n to 1",
        "",
    ),
    Walk(
        "by two",
        "count",
        "n",
        ("n <= 0", "n == 1", "n < 0"),
        "n",
        "n - 2",
        ("n - 1", "n + 2"),
        "n, n - 2, n - 4 and so on",
        "two",
    ),
    Walk(
        "by three",
        "count",
        "n",
        ("n <= 0", "n == 1", "n < 0"),
        "n",
        "n - 3",
        ("n - 1", "n + 3"),
        "n, n - 3, n - 6 and so on",
        "three",
    ),
    Walk(
        "halving",
        "count",
        "n",
        ("n <= 0", "n == 1", "n < 0"),
        "n",
        "n // 2",
        ("n - 2", "n % 2"),
        "n, n // 2, n // 4 and so on",
        "half",
    ),
    Walk(
        "list",
        "ints",
        "xs",
        ("not xs", "len(xs) == 1", "xs"),
        "xs[0]",
        "xs[1:]",
        ("xs[:-1]", "xs[2:]"),
        "the numbers in a list",
        "list",
    ),
    Walk(
        "alternate",
        "ints",
        "xs",
        ("not xs", "len(xs) == 1", "xs"),
        "xs[0]",
        "xs[2:]",
        ("xs[1:]", "xs[:2]"),
        "every second number in a list",
        "second",
    ),
    Walk(
        "digits",
        "number",
        "n",
        ("n == 0", "n < 10", "n > 0"),
        "n % 10",
        "n // 10",
        ("n / 10", "n % 10"),
        "the digits of a number",
        "digits",
    ),
)
STRINGS = (
    Walk("string", "string", "s", ("not s", "len(s) == 1", "s"), "", "s[1:]", ("s[:-1]", "s[2:]"), "", ""),
    Walk(
        "every second",
        "string",
        "s",
        ("not s", "len(s) == 1", "s"),
        "",
        "s[2:]",
        ("s[1:]", "s[:2]"),
        "taking every second letter",
        "second",
    ),
)
OPERATORS = (
    ("sum", "find the sum of", "0", "+", "1", "*"),
    ("product", "find the product of", "1", "*", "0", "+"),
)


def recursions() -> Iterator[Composition]:
    """Compositions of the topic."""
    for walk, term, operator in product(WALKS, TERMS, OPERATORS):
        key = f"recursion/{walk.key}/{term.key}/{operator[0]}"
        yield Composition("recursion", key, partial(_number, walk, term, operator, key))
    for walk, term, flipped in product(STRINGS, LETTER_TERMS, (False, True)):
        key = f"recursion/{walk.key}/{term.key}/{'reversed' if flipped else 'straight'}"
        yield Composition("recursion", key, partial(_string, walk, term, flipped, key))


def _number(walk: Walk, term: Part, operator: tuple[str, ...], key: str, rng: Random) -> Task:
    word, text, base, sign, other_base, other_sign = operator
    term = term.drawn(rng)
    name = join_name(rng, word, term.name, walk.name)
    value = fill(term.code, x=walk.item)
    right = Recursion(name, walk, walk.stop[0], base, value, sign, walk.rest)
    if sign == "*" and "%" in value:
        right = replace(right, term=f"({value})")
    wrong = [("value", replace(right, term=fill(code, x=walk.item)).render()) for code in term.wrong]
    wrong += [("reduction", replace(right, operator=other_sign).render())]
    wrong += [("first value", replace(right, base=other_base).render())]
    request = f"Write a recursive function to {text} {fill(term.text, items=walk.text)}."
    return _task(request, right, wrong, key)


def _string(walk: Walk, term: Part, flipped: bool, key: str, rng: Random) -> Task:
    name = join_name(rng, "reverse" if flipped else "build", term.name, walk.name)
    right = Recursion(name, walk, walk.stop[0], "''", term.code, "+", walk.rest, flipped)
    wrong = [("value", replace(right, term=code).render()) for code in term.wrong]
    wrong += [("order", replace(right, flipped=not flipped).render())]
    wrong += [("first value", replace(right, base="s").render())]
    words = f"Write a recursive function to {'reverse' if flipped else 'build'} {term.text} {walk.text}"
    return _task(f"{words.strip()}.", right, wrong, key)


def _task(text: str, right: Recursion, wrong: list[tuple[str, str]], key: str) -> Task:
    wrong += [("condition", replace(right, stop=stop).render()) for stop in right.walk.stop[1:]]
    wrong += [("source", replace(right, rest=rest).render()) for rest in right.walk.rests]
    wrong += [printed(right.render())]
    return Task("recursion", key, text, right.name, right.walk.kind, right.render(), tuple(wrong))
