"""The walking topics: which sources there are, and which parts go with each."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from coderl.embedded.tasks import parts
from coderl.embedded.tasks import reductions as to
from coderl.embedded.tasks.base import Part
from coderl.embedded.tasks.pipeline import Source, compositions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coderl.embedded.tasks.base import Composition

LISTS, X, NAMES = ("xs", "nums", "numbers"), ("x", "n", "num"), ("s", "text")

FIXED = (
    Source("lists", "list", "ints", LISTS, "{p}", X[:1], "numbers", "in a list"),
    Source(
        "lists",
        "firsts",
        "ints",
        LISTS,
        "{p}[:{k}]",
        X[:1],
        "numbers",
        "in the first {k} of a list",
        "first",
        ("{p}[{k}:]", "{p}[:{k} - 1]"),
        (3, 4),
    ),
    Source(
        "lists",
        "skip",
        "ints",
        LISTS,
        "{p}[{k}:]",
        X[:1],
        "numbers",
        "after the first {k} of a list",
        "rest",
        ("{p}[:{k}]", "{p}[{k} + 1:]"),
        (1, 2),
    ),
    Source(
        "lists",
        "second",
        "ints",
        LISTS,
        "{p}[::2]",
        X[:1],
        "numbers",
        "at even positions of a list",
        "positions",
        ("{p}[1::2]", "{p}[:2]"),
    ),
    Source(
        "digits",
        "digits",
        "number",
        ("n",),
        "map(int, str({p}))",
        ("d",),
        "digits",
        "of a number",
        "digits",
        ("str({p})", "{p}"),
    ),
    Source(
        "arithmetic",
        "range",
        "count",
        ("n",),
        "range(1, {p} + 1)",
        ("i",),
        "numbers",
        "from 1 to n",
        "range",
        ("range(1, {p})", "range({p})"),
    ),
    Source(
        "arithmetic",
        "below",
        "count",
        ("n",),
        "range({p})",
        ("i",),
        "numbers",
        "from 0 to n - 1",
        "until",
        ("range(1, {p} + 1)", "range({p} - 1)"),
    ),
    Source(
        "text parsing",
        "commas",
        "joined ','",
        NAMES,
        "map(int, {p}.split(','))",
        X[:1],
        "numbers",
        "in a comma separated string",
        "parse",
        ("{p}.split(',')", "map(int, {p})"),
    ),
    Source(
        "text parsing",
        "dashes",
        "joined '-'",
        NAMES,
        "map(int, {p}.split('-'))",
        X[:1],
        "numbers",
        "in a dash separated string",
        "parse",
        ("{p}.split('-')", "map(int, {p})"),
    ),
    Source(
        "dictionaries",
        "values",
        "dict",
        ("d",),
        "{p}.values()",
        ("v",),
        "values",
        "of a dictionary",
        "values",
        ("{p}", "{p}.keys()"),
    ),
)
SETS = (
    Source(
        "sets",
        "common",
        "two lists",
        ("a, b",),
        "set(a) & set(b)",
        ("x",),
        "numbers",
        "common to two lists",
        "common",
        ("set(a) | set(b)", "a & b"),
    ),
    Source(
        "sets",
        "union",
        "two lists",
        ("a, b",),
        "set(a) | set(b)",
        ("x",),
        "numbers",
        "in either of two lists",
        "union",
        ("set(a) & set(b)", "a + b"),
    ),
    Source(
        "sets",
        "minus",
        "two lists",
        ("a, b",),
        "set(a) - set(b)",
        ("x",),
        "numbers",
        "in the first of two lists only",
        "only",
        ("set(b) - set(a)", "a - b"),
    ),
    Source(
        "sets",
        "one",
        "two lists",
        ("a, b",),
        "set(a) ^ set(b)",
        ("x",),
        "numbers",
        "in one of two lists only",
        "exclusive",
        ("set(a) | set(b)", "set(a) & set(b)"),
    ),
    Source(
        "sets",
        "set",
        "ints",
        LISTS,
        "set({p})",
        ("x",),
        "numbers",
        "in the set of a list",
        "unique",
        ("{p}", "list({p})"),
    ),
)
PAIRS = (
    Source(
        "tuples",
        "pairs",
        "pairs",
        ("pairs", "ps"),
        "{p}",
        ("a, b",),
        "pairs (a, b)",
        "in a list",
        "pairs",
        ("{p}[1:]",),
    ),
    Source(
        "tuples",
        "zip",
        "two lists",
        ("xs, ys",),
        "zip(xs, ys)",
        ("a, b",),
        "pairs (a, b)",
        "from two lists",
        "zip",
        ("zip(ys, xs)", "(xs, ys)"),
    ),
    Source(
        "tuples",
        "adjacent",
        "ints",
        LISTS[:2],
        "zip({p}, {p}[1:])",
        ("a, b",),
        "neighbours a, b",
        "in a list",
        "adjacent",
        ("zip({p}, {p})", "zip({p}[1:], {p})"),
    ),
)
TEXT = Source(
    "text parsing",
    "words",
    "text",
    NAMES,
    "{p}.split()",
    ("w",),
    "words",
    "in a text",
    "words",
    ("{p}", "{p}.split(',')"),
)
KEYS = Source(
    "dictionaries",
    "keys",
    "dict",
    ("d",),
    "{p}",
    ("k",),
    "keys",
    "of a dictionary",
    "keys",
    ("{p}.values()", "{p}.items()"),
)
STRING = Source(
    "strings",
    "string",
    "string",
    NAMES,
    "{p}",
    ("c",),
    "characters",
    "of a string",
    "string",
    ("{p}[1:]", "{p}.split()"),
)
MATRIX = Source(
    "matrices",
    "rows",
    "matrix",
    ("rows", "m"),
    "{p}",
    ("row",),
    "rows",
    "of a matrix",
    "rows",
    ("{p}[0]", "{p}[1:]"),
)
ENTRIES = Source(
    "dictionaries",
    "items",
    "dict",
    ("d",),
    "{p}.items()",
    ("k, v",),
    "entries",
    "of a dictionary",
    "entries",
    ("{p}", "{p}.values()"),
)

KEY_MAPS = (
    Part("keys", "the keys of the {items}", "k", "keys", ("v",)),
    Part("lengths", "the key lengths of the {items}", "len(k)", "lengths", ("len(v)", "len(k) - 1")),
    Part("upper", "the upper case keys of the {items}", "k.upper()", "upper", ("k.lower()", "v.upper()")),
    Part("initial", "the first key letters of the {items}", "k[0]", "initials", ("k[1]", "k[-1]")),
)
VALUE_FILTERS = tuple(
    Part(
        p.key,
        p.text.replace("{noun}", "{noun} with value")
        .replace("even {noun} with", "{noun} with even")
        .replace("odd {noun} with", "{noun} with odd")
        .replace("positive {noun} with", "{noun} with positive")
        .replace("negative {noun} with", "{noun} with negative"),
        p.code.replace("{x}", "v"),
        p.name,
        (*(w.replace("{x}", "v") for w in p.wrong[:1]), p.code.replace("{x}", "k")),
        p.draws,
    )
    for p in (*parts.INT_FILTERS[1:], *parts.SIGN_FILTERS)
)


def walking() -> Iterator[Composition]:
    """Compositions of every walking topic."""
    for source in FIXED:
        signed = source.kind in {"ints", "dict"}
        filters = parts.INT_FILTERS + (parts.SIGN_FILTERS if signed else ())
        yield from compositions(source, filters, parts.INT_MAPS, to.NUMBERS)
    for source in SETS:
        yield from compositions(source, parts.INT_FILTERS, parts.INT_MAPS, to.UNORDERED)
    for source in PAIRS:
        yield from compositions(source, parts.PAIR_FILTERS, parts.PAIR_MAPS, to.NUMBERS)
    lengths, words = parts.WORD_MAPS[1:2], parts.WORD_MAPS[:1] + parts.WORD_MAPS[2:]
    for source in (TEXT, KEYS):
        yield from compositions(source, parts.WORD_FILTERS, lengths, to.NUMBERS)
        yield from compositions(source, parts.WORD_FILTERS, words, to.WORDS)
    yield from compositions(
        STRING, parts.CHAR_FILTERS, parts.CHAR_MAPS[-1:], (to.SUM, to.LARGEST, to.SMALLEST, to.LISTED)
    )
    yield from compositions(STRING, parts.CHAR_FILTERS, parts.CHAR_MAPS[:-1], to.CHARACTERS)
    for source in (*FIXED[:3], SETS[-1]):
        keyed = replace(source, topic="dictionaries")
        yield from compositions(
            keyed, (*parts.INT_FILTERS, *parts.SIGN_FILTERS), parts.INT_MAPS, (to.MAPPED,)
        )
    yield from compositions(
        replace(TEXT, topic="dictionaries"), parts.WORD_FILTERS, parts.WORD_MAPS, (to.MAPPED,)
    )
    yield from compositions(MATRIX, parts.ROW_FILTERS, parts.ROW_MAPS, to.NUMBERS)
    yield from compositions(ENTRIES, VALUE_FILTERS, KEY_MAPS[1:2], to.NUMBERS)
    yield from compositions(ENTRIES, VALUE_FILTERS, KEY_MAPS[:1] + KEY_MAPS[2:], to.WORDS)
