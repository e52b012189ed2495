"""Answers to the tasks in this folder, with scores that were worked out by hand."""

from __future__ import annotations

DOUBLE = "def double(x):\n    return 2 * x"
EVENS = "def is_even(n):\n    return n % 2 == 0"
CHAIN = "def total(link):\n    return link.value + total(link.next) if link else 0"
ANSWERS = {
    "mbpp": (
        # Right, one test of two, right up to a stop word, no Python.
        [
            DOUBLE,
            "def double(x):\n    return x + 2",
            f"{DOUBLE}\nprint(double(",
            "def double(x)\n    return 2 * x",
        ],
        # Right, were the set-up code run. With a class of its own that comes too late: it is cut.
        [CHAIN, f"{CHAIN}\nclass Link:\n    pass", "", "import sys\nsys.exit(0)"],
        # Right thrice; two tests of three.
        [EVENS, f"{EVENS}\n", "is_even = lambda n: not n & 1", "def is_even(n):\n    return n in (2, 4)"],
    ),
    "humaneval": (
        [
            "\n    return x / 2",
            "\n    return x // 2",
            "\n    return x / 2\n\ndef half(x):\n    pass",
            "\n    half(x)",
        ],
        ["\n    return sum(map(is_letter, text))", "\n    return 2", "\n    return None", "\n    pass"],
    ),
}
"""Completions, in task order."""

SCORES = {
    # Right samples of 4: 2, 0, 3. pass@1 = (2/4 + 0/4 + 3/4) / 3. pass@2 = (1 - C(2,2)/C(4,2) + 0 + 1) / 3:
    # two draws cannot miss where only one of four is wrong. pass@4: one right one is enough. There is no
    # pass@5. First samples: right, wrong, right. Of 2, 1 and 3 tests, four times each and so 24, the samples
    # hold 2 + 1 + 2 + 0, none, and 3 + 3 + 3 + 2.
    "mbpp": ([2, 0, 3], {1: 5 / 12, 2: (5 / 6 + 0 + 1) / 3, 4: 2 / 3, 5: None}, 2 / 3, 2 / 3, 16 / 24),
    # Right: 2 and 1. pass@2 = (5/6 + 1 - C(3,2)/C(4,2)) / 2. A check is one test, whatever it asserts.
    "humaneval": ([2, 1], {1: 3 / 8, 2: (5 / 6 + 1 / 2) / 2, 4: 1.0, 5: None}, 1.0, 1.0, 3 / 8),
}
"""Right samples, pass@k, accuracy of the first sample, problems solved at all, tests passed."""

PLUS = {
    # Right; right on what HumanEval asks but not beyond; off by less than the 1e-6 that only the plus tests
    # forgive; wrong.
    "humanevalplus": (
        [
            ["\n    return x / 2", "\n    return abs(x) / 2", "\n    return x / 2 + 5e-7", "\n    return x"],
            # Right; small letters of English only; right on what was seen; too deep for 1000 letters.
            [
                "\n    return sum(map(is_letter, text))",
                "\n    return sum('a' <= c <= 'z' for c in text)",
                "\n    return 2 if text else 0",
                "\n    return letters(text[1:]) + is_letter(text[0]) if text else 0",
            ],
        ],
        [[True, False, True, False], [True, False, False, False]],
        [[True, True, False, False], [True, True, True, True]],
    ),
    # Right; without what occurs twice.
    "mbppplus": (
        [
            [
                "def shared(a, b):\n    return [x for x in a if x in b]",
                "def shared(a, b):\n    return sorted({*a} & {*b})",
            ],
            # 601's own test uses math, which only an answer can import: the row's test_imports are not run.
            [
                "import math\ndef area(r):\n    return math.pi * r * r",
                "def area(r):\n    return 3.141592653589793 * r * r",
            ],
        ],
        [[True, False], [True, True]],
        [[True, True], [True, False]],
    ),
}
"""Completions, and their verdicts by the plus tests and by the original ones."""
