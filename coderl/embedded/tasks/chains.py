"""Chains of two operations: on strings, on lists, and formulas over two numbers."""

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
class Chain:
    """Two groups of parts, the second applied to the result of the first.

    Attributes:
        topic: Topic of its tasks.
        key: Names it.
        kind: Kind of input.
        parameters: Parameter lists to choose from.
        start: Words for the input.
        inner: First operations; their code is over ``{p}``.
        outer: Second operations; their code is over ``{v}``.
    """

    topic: str
    key: str
    kind: str
    parameters: tuple[str, ...]
    start: str
    inner: tuple[Part, ...]
    outer: tuple[Part, ...]


CUTS = (
    Part(
        "first",
        "the first {k} {unit} of {what}",
        "{v}[:{k}]",
        "first",
        ("{v}[{k}:]", "{v}[:{less}]"),
        (2, 3, 4),
    ),
    Part(
        "last", "the last {k} {unit} of {what}", "{v}[-{k}:]", "last", ("{v}[:-{k}]", "{v}[{k}:]"), (2, 3, 4)
    ),
    Part(
        "drop",
        "{what} without the first {k} {unit}",
        "{v}[{k}:]",
        "drop",
        ("{v}[:{k}]", "{v}[{more}:]"),
        (2, 3),
    ),
    Part(
        "chop",
        "{what} without the last {k} {unit}",
        "{v}[:-{k}]",
        "chop",
        ("{v}[-{k}:]", "{v}[:{k}]"),
        (2, 3),
    ),
    Part("every", "every second of the {unit} of {what}", "{v}[::2]", "every", ("{v}[1::2]", "{v}[:2]")),
    Part("reverse", "the reverse of {what}", "{v}[::-1]", "reverse", ("{v}[::1]", "{v}[:-1]")),
    Part(
        "half",
        "the first half of {what}",
        "{v}[:len({v}) // 2]",
        "half",
        ("{v}[len({v}) // 2:]", "{v}[:len({v}) - 2]"),
    ),
    Part("twice", "{what} repeated twice", "({v} * 2)", "twice", ("({v} * 3)", "({v} + 2)")),
)
STRING_STEPS = (
    Part("upper", "the upper case of {what}", "{v}.upper()", "upper", ("{v}.lower()", "{v}.title()")),
    Part("lower", "the lower case of {what}", "{v}.lower()", "lower", ("{v}.upper()",)),
    Part("swap", "{what} with case swapped", "{v}.swapcase()", "swap", ("{v}.upper()", "{v}.lower()")),
    Part(
        "replace",
        "{what} with every {k} replaced by '-'",
        "{v}.replace({k}, '-')",
        "replace",
        ("{v}.replace('-', {k})", "{v}.replace({k}, '')"),
        ("'a'", "'e'", "'t'", "'s'"),
    ),
    Part(
        "remove",
        "{what} with every {k} removed",
        "{v}.replace({k}, '')",
        "remove",
        ("{v}.strip({k})", "{v}.replace({k}, ' ')"),
        ("'a'", "'e'", "'t'", "'s'"),
    ),
)
LIST_STEPS = (
    Part("sorted", "{what} sorted", "sorted({v})", "sorted", ("{v}.sort()", "sorted({v}, reverse=True)")),
    Part(
        "falling",
        "{what} sorted in descending order",
        "sorted({v}, reverse=True)",
        "descending",
        ("sorted({v})", "sorted({v})[::1]"),
    ),
)
LIST_ENDS = (
    Part("sum", "the sum of {what}", "sum({v})", "sum", ("len({v})", "max({v})")),
    Part("max", "the largest of {what}", "max({v})", "largest", ("min({v})", "sum({v})")),
    Part("min", "the smallest of {what}", "min({v})", "smallest", ("max({v})", "sum({v})")),
    Part("length", "the length of {what}", "len({v})", "length", ("len({v}) - 1", "len({v}) + 1")),
)
FORMULAS = (
    Part("sum", "the sum of {what}", "(a + b)", "sum", ("(a - b)", "(a * b)")),
    Part("product", "the product of {what}", "(a * b)", "product", ("(a + b)", "(a ** b)")),
    Part("difference", "the difference of {what}", "(a - b)", "difference", ("(b - a)", "(a + b)")),
    Part("larger", "the larger of {what}", "max(a, b)", "larger", ("min(a, b)",)),
    Part("smaller", "the smaller of {what}", "min(a, b)", "smaller", ("max(a, b)",)),
    Part(
        "squares",
        "the sum of squares of {what}",
        "(a * a + b * b)",
        "squares",
        ("(a * 2 + b * 2)", "(a * a - b * b)"),
    ),
    Part("mean", "the floored mean of {what}", "((a + b) // 2)", "mean", ("((a + b) / 2)", "(a + b // 2)")),
    Part(
        "concat",
        "the digits joined of {what}",
        "int(str(a) + str(b))",
        "joined",
        ("str(a) + str(b)", "int(a + b)"),
    ),
)
NUMBER_STEPS = (
    Part("square", "the square of {what}", "{v} ** 2", "square", ("{v} * 2", "{v} ** 3")),
    Part("cube", "the cube of {what}", "{v} ** 3", "cube", ("{v} * 3", "{v} ** 2")),
    Part("mod", "{what} modulo {k}", "{v} % {k}", "modulo", ("{v} // {k}", "{v} % {more}"), (3, 4, 5, 7)),
    Part("plus", "{what} plus {k}", "{v} + {k}", "plus", ("{v} - {k}", "{v} + {more}"), (3, 4, 5, 7)),
    Part("times", "{what} times {k}", "{v} * {k}", "times", ("{v} + {k}", "{v} ** {k}"), (3, 4, 5, 7)),
    Part(
        "quotient",
        "{what} divided by {k}, rounded down",
        "{v} // {k}",
        "quotient",
        ("{v} / {k}", "{v} % {k}"),
        (3, 4, 5),
    ),
    Part("absolute", "the absolute value of {what}", "abs({v})", "absolute", ("-{v}", "{v}")),
    Part("digits", "the number of digits of {what}", "len(str({v}))", "digits", ("len({v})", "str({v})")),
    Part("even", "whether {what} is even", "{v} % 2 == 0", "even", ("{v} % 2 == 1", "{v} % 2")),
    Part(
        "above", "whether {what} is above {k}", "{v} > {k}", "above", ("{v} < {k}", "{v} >= {k}"), (9, 12, 15)
    ),
    Part("binary", "{what} in binary", "bin({v})[2:]", "binary", ("bin({v})", "bin({v})[1:]")),
    Part(
        "text", "the reversed digits of {what}", "str({v})[::-1]", "reversed", ("str({v})[::1]", "str({v})")
    ),
)

CHAINS = (
    Chain("strings", "chain", "string", ("s", "text"), "a string", STRING_STEPS + CUTS, STRING_STEPS + CUTS),
    Chain(
        "lists", "chain", "ints", ("xs", "nums"), "a list", CUTS + LIST_STEPS, CUTS + LIST_STEPS + LIST_ENDS
    ),
    Chain("arithmetic", "formula", "two numbers", ("a, b",), "two numbers", FORMULAS, NUMBER_STEPS),
)


def chains() -> Iterator[Composition]:
    """Compositions of every chain."""
    for chain in CHAINS:
        for inner, outer in product(chain.inner, chain.outer):
            if inner.key != outer.key:
                key = f"{chain.topic}/{chain.key}/{inner.key}/{outer.key}"
                yield Composition(chain.topic, key, partial(_draw, chain, inner, outer, key))


def _draw(chain: Chain, inner: Part, outer: Part, key: str, rng: Random) -> Task:
    inner, outer = inner.drawn(rng), outer.drawn(rng)
    parameter = rng.choice(chain.parameters)
    name = join_name(rng, outer.name, inner.name)
    steps = rng.random() < 0.3 or outer.code.count("{v}") > 1

    def source(first: str = inner.code, second: str = outer.code) -> str:
        value = fill(first, v=parameter, p=parameter)
        if steps and value:
            held = chain.parameters[0] if "," not in parameter else "c"
            held = parameter if "," not in parameter else held
            return function(
                name, parameter, f"{held} = {_bare(value)}", f"return {_bare(fill(second, v=held))}"
            )
        return function(name, parameter, f"return {_bare(fill(second, v=value))}")

    wrong = [("value", source(second=code)) for code in outer.wrong]
    wrong += [("source", source(first=code)) for code in inner.wrong]
    if "," not in parameter:
        wrong += [("forgotten", function(name, parameter, f"return {fill(outer.code, v=parameter)}"))]
        wrong += [("order", source(first=outer.code, second=inner.code))]
    wrong += [printed(source())]
    unit = "characters" if chain.topic == "strings" else "numbers"
    text = fill(outer.text, what=fill(inner.text, what=chain.start, unit=unit), unit=unit)
    return Task(
        chain.topic, key, f"Write a function to find {text}.", name, chain.kind, source(), tuple(wrong)
    )


def _bare(value: str) -> str:
    whole = value.startswith("(") and value.endswith(")") and value.find(")") == len(value) - 1
    return value[1:-1] if whole else value
