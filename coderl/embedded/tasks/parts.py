"""Conditions, transformations and reductions that the pipelines are put together from."""

from __future__ import annotations

from coderl.embedded.tasks.base import Part

SMALL = (3, 4, 5, 6, 7)
LETTERS = tuple(repr(letter) for letter in "aeorst")

NO_FILTER = Part("all", "{noun}", "")

INT_FILTERS = (
    NO_FILTER,
    Part("even", "even {noun}", "{x} % 2 == 0", "even", ("{x} % 2 == 1", "{x} / 2 == 0")),
    Part("odd", "odd {noun}", "{x} % 2 == 1", "odd", ("{x} % 2 == 0", "{x} / 2 == 1")),
    Part("above", "{noun} greater than {k}", "{x} > {k}", "above", ("{x} >= {k}", "{x} < {k}"), SMALL),
    Part("below", "{noun} less than {k}", "{x} < {k}", "below", ("{x} <= {k}", "{x} > {k}"), SMALL),
    Part(
        "multiple",
        "{noun} divisible by {k}",
        "{x} % {k} == 0",
        "multiples",
        ("{x} % {k} != 0", "{x} / {k} == 0"),
        (3, 4, 5),
    ),
    Part("unequal", "{noun} not equal to {k}", "{x} != {k}", "other", ("{x} == {k}",), SMALL),
)
SIGN_FILTERS = (
    Part("positive", "positive {noun}", "{x} > 0", "positive", ("{x} >= 0", "{x} < 0")),
    Part("negative", "negative {noun}", "{x} < 0", "negative", ("{x} <= 0", "{x} > 0")),
)
WORD_FILTERS = (
    NO_FILTER,
    Part(
        "longer",
        "{noun} longer than {k}",
        "len({x}) > {k}",
        "long",
        ("len({x}) >= {k}", "len({x}) < {k}"),
        (3, 4),
    ),
    Part(
        "shorter",
        "{noun} shorter than {k}",
        "len({x}) < {k}",
        "short",
        ("len({x}) <= {k}", "len({x}) > {k}"),
        (4, 5),
    ),
    Part(
        "starts",
        "{noun} starting with {k}",
        "{x}[0] == {k}",
        "starting",
        ("{x}[1] == {k}", "{x}[-1] == {k}"),
        LETTERS,
    ),
    Part(
        "ends",
        "{noun} ending with {k}",
        "{x}[-1] == {k}",
        "ending",
        ("{x}[0] == {k}", "{x}[-1] != {k}"),
        LETTERS,
    ),
    Part(
        "contains", "{noun} containing {k}", "{k} in {x}", "with", ("{k} not in {x}", "{k} == {x}"), LETTERS
    ),
    Part(
        "capital", "capitalized {noun}", "{x}[0].isupper()", "capital", ("{x}[0].islower()", "{x}.isupper()")
    ),
    Part("numeric", "numeric {noun}", "{x}.isdigit()", "numeric", ("{x}.isalpha()", "not {x}.isdigit()")),
)
CHAR_FILTERS = (
    NO_FILTER,
    Part("vowel", "vowels", "{x} in 'aeiou'", "vowels", ("{x} not in 'aeiou'", "{x} in 'aeio'")),
    Part("digit", "digits", "{x}.isdigit()", "digits", ("not {x}.isdigit()", "{x}.isalpha()")),
    Part("letter", "letters", "{x}.isalpha()", "letters", ("{x}.isdigit()", "not {x}.isalpha()")),
    Part("upper", "upper case letters", "{x}.isupper()", "upper", ("{x}.islower()", "{x}.upper()")),
    Part("lower", "lower case letters", "{x}.islower()", "lower", ("{x}.isupper()", "{x}.lower()")),
    Part(
        "but",
        "{noun} other than {k}",
        "{x} != {k}",
        "without",
        ("{x} == {k}", "{x} not in {k} + 'a'"),
        LETTERS,
    ),
    Part("after", "{noun} greater than {k}", "{x} > {k}", "after", ("{x} >= {k}", "{x} < {k}"), LETTERS),
)
PAIR_FILTERS = (
    NO_FILTER,
    Part("rising", "{noun} with a < b", "a < b", "rising", ("a <= b", "a > b")),
    Part("falling", "{noun} with a > b", "a > b", "falling", ("a >= b", "a < b")),
    Part("equal", "{noun} with a == b", "a == b", "equal", ("a != b",)),
    Part("differ", "{noun} with a != b", "a != b", "different", ("a == b",)),
    Part(
        "evensum", "{noun} with even sum", "(a + b) % 2 == 0", "even", ("(a + b) % 2 == 1", "a + b % 2 == 0")
    ),
    Part("first", "{noun} with a > {k}", "a > {k}", "first", ("a >= {k}", "b > {k}"), SMALL),
    Part("second", "{noun} with b > {k}", "b > {k}", "second", ("b >= {k}", "a > {k}"), SMALL),
)

INT_MAPS = (
    Part("self", "the {items}", "{x}"),
    Part("square", "the squares of the {items}", "{x} * {x}", "squares", ("{x} * 2", "{x} + {x}")),
    Part("cube", "the cubes of the {items}", "{x} ** 3", "cubes", ("{x} * 3", "{x} ** 2")),
    Part("double", "the doubled {items}", "{x} * 2", "doubled", ("{x} ** 2", "{x} + 2")),
    Part("half", "half of the {items}", "{x} // 2", "half", ("{x} / 2", "{x} % 2")),
    Part("plus", "the {items} plus {k}", "{x} + {k}", "plus", ("{x} - {k}", "{x} + {more}"), SMALL),
    Part("minus", "the {items} minus {k}", "{x} - {k}", "minus", ("{x} + {k}", "{x} - {less}"), SMALL),
    Part("times", "the {items} times {k}", "{x} * {k}", "times", ("{x} + {k}", "{x} ** {k}"), SMALL),
    Part("mod", "the {items} modulo {k}", "{x} % {k}", "modulo", ("{x} // {k}", "{x} % {more}"), SMALL),
)
WORD_MAPS = (
    Part("self", "the {items}", "{x}"),
    Part("length", "the lengths of the {items}", "len({x})", "lengths", ("len({x}) - 1", "len({x}) + 1")),
    Part("upper", "the upper case {items}", "{x}.upper()", "upper", ("{x}.lower()", "{x}.title()")),
    Part("reverse", "the reversed {items}", "{x}[::-1]", "reversed", ("{x}[::1]", "{x}[:-1]")),
    Part("initial", "the first letters of the {items}", "{x}[0]", "initials", ("{x}[1]", "{x}[-1]")),
    Part("final", "the last letters of the {items}", "{x}[-1]", "last", ("{x}[0]", "{x}[1]")),
    Part("tail", "the {items} without first letter", "{x}[1:]", "tails", ("{x}[:1]", "{x}[:-1]")),
    Part("twice", "the repeated {items}", "{x} * 2", "repeated", ("{x}",)),
)
CHAR_MAPS = (
    Part("self", "the {items}", "{x}"),
    Part("upper", "the upper case {items}", "{x}.upper()", "upper", ("{x}.lower()",)),
    Part("lower", "the lower case {items}", "{x}.lower()", "lower", ("{x}.upper()",)),
    Part(
        "swap", "the {items} with case swapped", "{x}.swapcase()", "swapped", ("{x}.upper()", "{x}.lower()")
    ),
    Part("twice", "the repeated {items}", "{x} * 2", "repeated", ("{x}",)),
    Part("code", "the codes of the {items}", "ord({x})", "codes", ("chr({x})", "int({x})")),
)
PAIR_MAPS = (
    Part("sum", "the sums of the {items}", "a + b", "sums", ("a - b", "a * b")),
    Part("product", "the products of the {items}", "a * b", "products", ("a + b", "a ** b")),
    Part("difference", "the differences a - b of the {items}", "a - b", "differences", ("b - a", "a + b")),
    Part("greater", "the larger of the {items}", "max(a, b)", "larger", ("min(a, b)",)),
    Part("smaller", "the smaller of the {items}", "min(a, b)", "smaller", ("max(a, b)",)),
    Part("first", "the first of the {items}", "a", "firsts", ("b",)),
    Part("second", "the second of the {items}", "b", "seconds", ("a",)),
)
ROW_MAPS = (
    Part("sum", "the sums of the {items}", "sum({x})", "sums", ("max({x})", "len({x})")),
    Part("max", "the maxima of the {items}", "max({x})", "maxima", ("min({x})", "sum({x})")),
    Part("min", "the minima of the {items}", "min({x})", "minima", ("max({x})", "sum({x})")),
    Part("first", "the first entries of the {items}", "{x}[0]", "first", ("{x}[1]", "{x}[-1]")),
    Part("last", "the last entries of the {items}", "{x}[-1]", "last", ("{x}[0]", "{x}[1]")),
    Part("length", "the lengths of the {items}", "len({x})", "lengths", ("len({x}) - 1",)),
)
ROW_FILTERS = (
    NO_FILTER,
    Part(
        "long",
        "{noun} longer than {k}",
        "len({x}) > {k}",
        "long",
        ("len({x}) >= {k}", "len({x}) < {k}"),
        (2, 3),
    ),
    Part(
        "big",
        "{noun} with sum above {k}",
        "sum({x}) > {k}",
        "big",
        ("len({x}) > {k}", "sum({x}) < {k}"),
        (8, 9, 10),
    ),
    Part(
        "evensum",
        "{noun} with even sum",
        "sum({x}) % 2 == 0",
        "even",
        ("sum({x}) % 2 == 1", "len({x}) % 2 == 0"),
    ),
    Part(
        "starts",
        "{noun} starting with even entry",
        "{x}[0] % 2 == 0",
        "even",
        ("{x}[0] % 2 == 1", "{x}[1] % 2 == 0"),
    ),
)
