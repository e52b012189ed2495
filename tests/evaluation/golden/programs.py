"""Odd programs that are to define ``add(a, b)``, and how the harness's verdicts on them compare with ours."""

from __future__ import annotations

ADD = "def add(a, b):\n    return a + b\n"

COUNTING = "seen = []\ndef add(a, b):\n    seen.append(a)\n    return a + b if len(seen) < N else 0\n"
DOWN = "def down(n):\n    return n and down(n - 1)\n"

AGREED = {
    # What the harness gives to be read, written to and called, which is not what Python gives.
    "getcwd": "import os\nos.getcwd()\n" + ADD,
    "environ": "import os\nos.environ['A'] = '1'\n" + ADD,
    "resource": "import resource\n" + ADD,
    "a folder of its own": "import tempfile\nwith tempfile.TemporaryDirectory():\n    pass\n" + ADD,
    "no kill": "import os\nassert os.kill is None\n" + ADD,
    "no Popen": "import subprocess\nassert subprocess.Popen is None\n" + ADD,
    "no rmtree": "import shutil\nassert shutil.rmtree is None\n" + ADD,
    "no help": "assert help is None\n" + ADD,
    "exit, caught": "try:\n    exit()\nexcept Exception:\n    pass\n" + ADD,
    "stdin read": "import sys\nsys.stdin.read()\n" + ADD,
    "stdin lines": "import sys\nfor line in sys.stdin:\n    pass\n" + ADD,
    "input, caught": "try:\n    input()\nexcept EOFError:\n    pass\n" + ADD,
    "stdout's file": "import sys\nsys.stdout.buffer.write(b'x')\n" + ADD,
    "prints a surrogate": "print('\\ud800')\n" + ADD,
    # Wrong, and empty in all the ways that there are.
    "wrong": "def add(a, b):\n    return a - b\n",
    "nothing at all": "",
    "blank": "\n\n  \n",
    "only a docstring": '"""Add."""\n',
    "only a comment": "# add",
    "deleted": ADD + "del add\n",
    "only annotated": "add: int\n",
    "defined twice, well": "def add(a, b):\n    return 0\n" + ADD,
    "defined twice, badly": ADD + "def add(a, b):\n    return 0\n",
    # StopCriteria that are no ends.
    "no newline at the end": ADD.rstrip(),
    "blanks at the end": ADD + "    ",
    "semicolon at the end": ADD + "x = 1;",
    "backslash in a comment at the end": ADD + "# \\",
    "open bracket": ADD + "x = (1,",
    "open call": "def add(a, b):\n    return max(a + b,",
    "open string": ADD + "x = 'abc",
    "open long string": ADD + '"""abc',
    "open f-string": ADD + "f'{a",
    "open if": ADD + "if True:",
    "open else": ADD + "if 0:\n    pass\nelse:",
    "open def": ADD + "def more():",
    "open class": ADD + "class A:",
    "open try": ADD + "try:\n    pass\n",
    "open for with a comment": ADD + "for x in y:\n    # nothing\n",
    "open decorator": ADD + "@staticmethod",
    "open lambda": ADD + "x = lambda:",
    "open assignment": ADD + "x =",
    "open not": ADD + "not",
    "open assert": ADD + "assert",
    "open return": "def add(a, b):\n    return",
    "one-line if": ADD + "if 1: x = 1",
    # Syntax.
    "no colon": "def add(a, b)\n    return a + b",
    "return outside": ADD + "return 1\n",
    "yield outside": ADD + "yield 1\n",
    "break outside": ADD + "break\n",
    "print statement": "print 'x'\n" + ADD,
    "tabs": "def add(a, b):\n\treturn a + b\n",
    "tabs and blanks": "def add(a, b):\n\tif a:\n        return a + b\n\treturn a + b\n",
    "Windows line ends": ADD.replace("\n", "\r\n"),
    "old Mac line ends": ADD.replace("\n", "\r"),
    "form feed": "\f" + ADD,
    "byte order mark": "\ufeff" + ADD,
    "null": ADD + "\0",
    "lone surrogate": ADD + "# \ud800",
    "nested too deep": "x = " + "-" * 5000 + "1\n" + ADD,
    "future import": "from __future__ import annotations\ndef add(a: X, b) -> Y:\n    return a + b\n",
    "future import after the docstring": '"""Add."""\nfrom __future__ import annotations\n' + ADD,
    "late future import": ADD + "from __future__ import annotations\n",
    "match": "def add(a, b):\n    match a:\n        case _:\n            return a + b\n",
    # What a linter would warn of is no error.
    "is with a literal": "def add(a, b):\n    if a is 1:\n        pass\n    return a + b\n",
    "bad escape": "def add(a, b):\n    '\\d'\n    return a + b\n",
    "warnings": "import warnings\nwarnings.warn('x', DeprecationWarning)\n" + ADD,
    # StopCriteria of the process.
    "sys.exit": ADD + "import sys\nsys.exit()\n",
    "sys.exit in the call": "import sys\ndef add(a, b):\n    sys.exit(0)\n",
    "exit": ADD + "exit()\n",
    "quit in the call": "def add(a, b):\n    quit()\n",
    "os._exit": ADD + "import os\nos._exit(0)\n",
    "raises when defined": ADD + "raise ValueError('x')\n",
    "interrupts": "def add(a, b):\n    raise KeyboardInterrupt\n",
    "raises what cannot be told": "class E(Exception):\n    def __str__(self):\n        raise ValueError\n"
    "raise E\n",
    # Input and output.
    "prints": "print('x' * 100_000)\ndef add(a, b):\n    print(a, b)\n    return a + b\n",
    "prints Unicode": "print('\u00e9\u4e2d')\n" + ADD,
    "writes to stderr": "import sys\nprint('x', file=sys.stderr)\nsys.stdout.flush()\n" + ADD,
    "drops stdout": "import sys\nsys.stdout = None\nprint('x')\n" + ADD,
    "logs": "import logging\nlogging.basicConfig()\nlogging.error('x')\n" + ADD,
    "input": ADD + "x = input()\n",
    "input in the call": "def add(a, b):\n    input('? ')\n    return a + b\n",
    # The namespace.
    "needs __main__": "if __name__ == '__main__':\n    add = lambda a, b: a + b\n",
    "is named builtins": "if __name__ == 'builtins':\n    add = lambda a, b: a + b\n",
    "has no file": "__file__\n" + ADD,
    "sets a global": "globals()['add'] = lambda a, b: a + b\n",
    "exec": "exec('def add(a, b): return a + b')\n",
    "shadows builtins": "len = range = list = None\n" + ADD,
    "changes builtins": "import builtins\nbuiltins.sum = None\n" + ADD,
    "defines check": "def check(candidate):\n    pass\ndef add(a, b):\n    return 0\n",
    "defines candidate": "candidate = METADATA = None\n" + ADD,
    "redefines AssertionError": "AssertionError = None\ndef add(a, b):\n    return 0\n",
    "replaces AssertionError": "import builtins\nbuiltins.AssertionError = Exception\n"
    "def add(a, b):\n    return 0\n",
    "tests itself": ADD + "import unittest\nunittest.main(exit=False)\nimport doctest\ndoctest.testmod()\n",
    # State between tests.
    "fails the third": COUNTING.replace("N", "3"),
    "fails the fourth": COUNTING.replace("N", "4"),
    "knows the tests": "answers = iter([3, 0, 4])\ndef add(a, b):\n    return next(answers)\n",
    # Shapes of answers.
    "class": "class Adder:\n    def __call__(self, a, b):\n        return a + b\nadd = Adder()\n",
    "generator": "def add(a, b):\n    yield a + b\n",
    "coroutine": "async def add(a, b):\n    return a + b\n",
    "float": "def add(a, b):\n    return float(a + b)\n",
    "true": "def add(a, b):\n    return True\n",
    "not a number": "def add(a, b):\n    return float('nan')\n",
    "none": "def add(a, b):\n    a + b\n",
    "other signature": "def add(*, a, b):\n    return a + b\n",
    "data class": "from dataclasses import dataclass\n@dataclass\nclass N:\n    v: int\n"
    "def add(a, b):\n    return N(a).v + b\n",
    "named tuple": "from typing import NamedTuple\nclass P(NamedTuple):\n    x: int\n    y: int\n"
    "def add(a, b):\n    return sum(P(a, b))\n",
    # Libraries.
    "numpy scalar": "import numpy as np\ndef add(a, b):\n    return np.add(a, b)\n",
    "numpy array of one": "import numpy as np\ndef add(a, b):\n    return np.array([a + b])\n",
    "numpy array of two": "import numpy as np\ndef add(a, b):\n    return np.array([a + b] * 2)\n",
    "asyncio": "import asyncio\nasync def inner(a, b):\n    await asyncio.sleep(0)\n    return a + b\n"
    "def add(a, b):\n    return asyncio.run(inner(a, b))\n",
    "thread pool": "from concurrent.futures import ThreadPoolExecutor\ndef add(a, b):\n"
    "    with ThreadPoolExecutor(2) as pool:\n        return pool.submit(lambda: a + b).result()\n",
    "processes": "import multiprocessing\ndef add(a, b):\n    with multiprocessing.Pool(1) as pool:\n"
    "        return sum(pool.map(abs, [a, b]))\n",
    "temporary file": "import tempfile\nwith tempfile.TemporaryFile('w+') as file:\n    file.write('x')\n"
    + ADD,
    "subprocess": "import subprocess\nsubprocess.run(['true'])\n" + ADD,
    "pickle": "import pickle\nclass A: pass\npickle.dumps(A())\n" + ADD,
    # Depth.
    "endless recursion": "def add(a, b):\n    return add(a, b)\n",
    "endless recursion, caught": DOWN + "try:\n    down(-1)\nexcept RecursionError:\n    pass\n" + ADD,
    "recursion of 900": DOWN + "def add(a, b):\n    return a + b + down(900)\n",
    "recursion of 50,000": DOWN + "import sys\nsys.setrecursionlimit(10**6)\n"
    "def add(a, b):\n    return a + b + down(50_000)\n",
    "equals everything": "class A:\n    def __eq__(self, other):\n        return True\n"
    "def add(a, b):\n    return A()\n",
}

ENDLESS = {
    "when defined": ADD + "while True:\n    pass\n",
    "in the call, and deaf": "def add(a, b):\n    while True:\n        try:\n            a += 1\n"
    "        except BaseException:\n            pass\n",
}

APART = {
    "packages other than numpy are out of sight: they may hold the answers": (
        True,
        {"another package": "import pytest\n" + ADD},
    ),
    "there is no network": (True, {"socket": "import socket\nsocket.socket()\n" + ADD}),
    "compiled with the tests by the harness, apart from them here: a last backslash joins the two": (
        True,
        {"backslash on a line of its own": ADD + "\\"},
    ),
}
"""By reason: whether the harness passes them (and we do not, or the other way round), and the programs."""
