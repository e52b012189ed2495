"""The reductions that pipelines end in, and the groups of them that go with each kind of value."""

from __future__ import annotations

from coderl.embedded.tasks.pipeline import Reduction

SUM = Reduction(
    "sum",
    ("find the sum of {items}", "add up {items}"),
    "sum({gen})",
    "sum",
    ("len({seq})", "max({gen})"),
    ("total", "0", "{r} += {m}", "1"),
)
PRODUCT = Reduction(
    "product",
    ("find the product of {items}", "multiply {items}"),
    "",
    "product",
    (),
    ("result", "1", "{r} *= {m}", "0"),
)
LARGEST = Reduction(
    "max",
    ("find the largest of {items}", "find the maximum of {items}"),
    "max({gen})",
    "largest",
    ("min({gen})", "sum({gen})"),
)
SMALLEST = Reduction(
    "min",
    ("find the smallest of {items}", "find the minimum of {items}"),
    "min({gen})",
    "smallest",
    ("max({gen})", "sum({gen})"),
)
COUNT = Reduction(
    "count",
    ("count {items}", "find the number of {items}"),
    "len({list})",
    "count",
    ("sum({gen})", "len({list}) - 1"),
    ("count", "0", "{r} += 1", "1"),
)
LISTED = Reduction(
    "list",
    ("list {items}", "return a list of {items}"),
    "{list}",
    "list",
    ("set({list})",),
    ("result", "[]", "{r}.append({m})", ""),
)
SORTED = Reduction(
    "sorted",
    ("sort {items}", "return a sorted list of {items}"),
    "sorted({gen})",
    "sort",
    ("{list}.sort()", "sorted({seq}, reverse=True)"),
)
FALLING = Reduction(
    "falling",
    ("sort {items} in descending order",),
    "sorted({seq}, reverse=True)",
    "descending",
    ("sorted({seq})", "sorted({seq}).reverse()"),
)
DISTINCT = Reduction(
    "distinct",
    ("count the distinct values of {items}",),
    "len(set({gen}))",
    "distinct",
    ("set({gen})", "len({list})"),
)
FIRST = Reduction("first", ("find the first of {items}",), "{list}[0]", "first", ("{list}[1]", "{list}[-1]"))
LAST = Reduction("last", ("find the last of {items}",), "{list}[-1]", "last", ("{list}[0]", "{list}[1]"))
SPACED = Reduction(
    "spaced", ("join {items} with spaces",), "' '.join({gen})", "join", ("''.join({gen})", "{seq}.join(' ')")
)
DASHED = Reduction(
    "dashed", ("join {items} with dashes",), "'-'.join({gen})", "join", ("''.join({gen})", "{seq}.join('-')")
)
JOINED = Reduction(
    "joined",
    ("join {items}", "return a string of {items}"),
    "''.join({gen})",
    "join",
    ("' '.join({gen})", "{seq}.join('')"),
    ("result", "''", "{r} += {m}", "' '"),
)
LONGEST = Reduction(
    "longest",
    ("find the longest of {items}",),
    "max({seq}, key=len)",
    "longest",
    ("max({gen})", "min({seq}, key=len)"),
)
MAPPED = Reduction(
    "dict", ("make a dictionary of {items}",), "{{pairs}}", "map", (), ("result", "{}", "{r}[{x}] = {m}", "")
)

NUMBERS = (SUM, PRODUCT, LARGEST, SMALLEST, COUNT, LISTED, SORTED, FALLING, DISTINCT, FIRST, LAST)
UNORDERED = (SUM, PRODUCT, LARGEST, SMALLEST, COUNT, SORTED, FALLING)
WORDS = (LISTED, COUNT, SORTED, SPACED, DASHED, LONGEST, FIRST, LAST)
CHARACTERS = (JOINED, LISTED, COUNT, SORTED, DISTINCT, DASHED, FIRST, LAST)
