"""Counts of how a checkout of coderl is laid out: ``python -m tests.project.house [FOLDER]`` prints them.

Plain standard library, and nothing of coderl is imported into this process, so that one script counts any
checkout: an old one beside a new one. The checkout's own ``.venv`` starts its commands, where it has one.
"""

from __future__ import annotations

import ast
import io
import json
import os
import re
import subprocess
import sys
import time
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[2]
STARTS = ("--help", "report --help", "evaluate --compare before.json after.json")
"""Commands that people wait for: they should start fast, and load no torch."""
SCORED = {"n": 2, "problems": 1, "settings": {}, "ids": ["mbpp/11"], "counted": [2]}

Graph = dict[str, set[str]]


def package_files(root: Path) -> dict[str, Path]:
    """All modules of coderl below a checkout, by dotted name; a package is the module of its ``__init__``."""
    files = {}
    for path in sorted((root / "coderl").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imported(path: Path, module: str) -> Iterator[str]:
    """Dotted names that a file imports, wherever in it, relative ones made absolute."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{start}.{alias.name}" for alias in node.names)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_graph(files: Mapping[str, Path]) -> Graph:
    """The modules that each module imports, in functions and for types alone as well.

    ``coderl/__init__.py`` shows names of all floors and loads none: it imports nothing here.
    """
    graph: Graph = {}
    for module, path in files.items():
        found: set[str] = set()
        for name in imported(path, module) if module != "coderl" else ():
            while name and name not in files:
                name = name.rpartition(".")[0]
            found.add(name)
        graph[module] = found - {"", "coderl", module}
    return graph


def room(module: str) -> str:
    """The package or single module directly in coderl that a module belongs to."""
    return [*module.split("."), "__init__"][1]


def room_graph(graph: Graph) -> Graph:
    rooms: Graph = {}
    for module, below in graph.items():
        rooms.setdefault(room(module), set()).update(room(other) for other in below)
    return {name: below - {name} for name, below in rooms.items()}


def circles(graph: Graph) -> list[list[str]]:
    """Groups of nodes that reach each other (strongly connected components of two or more)."""
    reach = {node: reachable(graph, node) for node in graph}
    groups = {
        frozenset(other for other in reach[node] if node in reach[other]) for node in graph
    }  # empty for a node that does not reach itself
    return sorted(sorted(group) for group in groups if len(group) > 1)


def reachable(graph: Graph, start: str) -> set[str]:
    seen: set[str] = set()
    open_nodes = list(graph[start])
    while open_nodes:
        node = open_nodes.pop()
        if node not in seen:
            seen.add(node)
            open_nodes.extend(graph[node])
    return seen


def floors(graph: Graph) -> int:
    """Nodes on the longest chain of imports, each circle counted as one node."""
    owner = {node: group[0] for group in circles(graph) for node in group}
    below: Graph = {}
    for node, others in graph.items():
        here = owner.get(node, node)
        below.setdefault(here, set()).update(owner.get(other, other) for other in others)

    @cache
    def height(node: str) -> int:
        return 1 + max((height(other) for other in below[node] if other != node), default=0)

    return max(map(height, below), default=0)


def comment_lines(path: Path) -> tuple[int, int]:
    """Lines that are or end in a ``#`` comment, and how many of these hold nothing else.

    Comments for linters and type checkers (``noqa``, ``type: ignore``) do not count, nor do docstrings.
    """
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    found = [
        token
        for token in tokens
        if token.type == tokenize.COMMENT and not re.match(r"#\s*(noqa|type: *ignore)", token.string)
    ]
    return len(found), sum(token.line.lstrip().startswith("#") for token in found)


class Names:
    """Private functions and methods of a file, with their lines, and how often each name is used in it."""

    def __init__(self, path: Path) -> None:
        self.helpers: list[tuple[str, int]] = []
        self.uses: Counter[str] = Counter()
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                if re.match(r"_(?!_)", node.name):
                    self.helpers.append((node.name, (node.end_lineno or node.lineno) - node.lineno + 1))
            elif isinstance(node, ast.Name):
                self.uses[node.id] += 1
            elif isinstance(node, ast.Attribute):
                self.uses[node.attr] += 1


def private_helpers(paths: Iterable[Path]) -> dict[str, int]:
    """Functions and methods whose names begin with one underscore, and those that are used once.

    Uses are counted by name. Over the package, a name that two files share counts as used by both; in its own
    file, each is counted alone.
    """
    files = [Names(path) for path in paths]
    everywhere = sum((names.uses for names in files), Counter[str]())
    once = [length for names in files for name, length in names.helpers if everywhere[name] == 1]
    once_in_file = [length for names in files for name, length in names.helpers if names.uses[name] == 1]
    return {
        "private helpers": sum(len(names.helpers) for names in files),
        "used once, by name over the package": len(once),
        "of these of six lines or fewer": sum(length <= 6 for length in once),
        "used once, by name in their file": len(once_in_file),
        "of those of six lines or fewer": sum(length <= 6 for length in once_in_file),
    }


def layers(root: Path) -> dict[str, int]:
    """The layer of each room, by ``LAYERS`` in the checkout's own tests; empty without such a list."""
    for place in ("tests/project/test_layers.py", "tests/test_layers.py"):
        if (root / place).is_file():
            for node in tree(root / place).body:
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LAYERS":
                    listed = ast.literal_eval(node.value)
                    return {name: layer for layer, names in listed.items() for name in names}
    return {}


def imports_up(graph: Graph, layer: Mapping[str, int]) -> list[str]:
    """Imports of a module in a higher layer, as ``from -> to``."""
    return [
        f"{module} -> {other}"
        for module, below in graph.items()
        for other in sorted(below)
        if layer.get(room(other), 0) > layer.get(room(module), 0)
    ]


def python(root: Path, code: str, *args: str, folder: Path | None = None) -> str:
    """What a program prints that the checkout's own interpreter runs, from the checkout's own code."""
    own = root / ".venv" / "bin" / "python"
    done = subprocess.run(
        [str(own) if own.exists() else sys.executable, "-c", code, *args],
        cwd=folder or root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() if done.returncode == 0 else f"failed: {done.stderr.strip()[-200:]}"


COMMAND = """
import contextlib, io, sys
from coderl.cli import main
with contextlib.redirect_stdout(io.StringIO()):
    code = main(sys.argv[1:])
print("torch" in sys.modules if not code else f"exit code {code}")
"""


def timed(root: Path, code: str, *args: str, folder: Path | None = None) -> tuple[float, str]:
    """Seconds of the fastest of three starts (the first may compile the modules), and what it printed."""
    times, output = [], ""
    for _ in range(3):
        start = time.perf_counter()
        output = python(root, code, *args, folder=folder)
        times.append(time.perf_counter() - start)
    return round(min(times), 2), output


def count(root: Path) -> dict[str, object]:
    """Everything that can be counted without running the checkout."""
    files = package_files(root)
    graph = module_graph(files)
    rooms = room_graph({module: below for module, below in graph.items() if module != "coderl"})
    texts = [path.read_text(encoding="utf-8") for path in files.values()]
    filled = sum(bool(line.strip()) for text in texts for line in text.splitlines())
    comments, alone = (sum(counts) for counts in zip(*map(comment_lines, files.values()), strict=True))
    return {
        "Python files directly in coderl/": len(list((root / "coderl").glob("*.py"))),
        "modules": len(files),
        "rooms (packages directly in coderl/)": len(list((root / "coderl").glob("*/__init__.py"))),
        "floors between rooms": floors(rooms),
        "floors between modules": floors(graph),
        "import arrows between rooms": sum(map(len, rooms.values())),
        "circles between rooms": len(circles(rooms)),
        "circles between modules": len(circles(graph)),
        "imports up": len(imports_up(graph, layers(root))),
        "lines": sum(len(text.splitlines()) for text in texts),
        **private_helpers(files.values()),
        "comment lines, % of non-blank lines": round(100 * comments / filled, 2),
        "comment lines that stand alone, %": round(100 * alone / filled, 2),
    }


def starts(root: Path) -> dict[str, object]:
    """What commands cost before they do anything, as this machine runs them."""
    found: dict[str, object] = {
        "seconds of an empty Python program": timed(root, "")[0],
        "seconds of import coderl": timed(root, "import coderl")[0],
    }
    with TemporaryDirectory() as name:
        folder = Path(name)
        for score, file in enumerate(("before.json", "after.json")):
            scores = {"mbpp": SCORED | {"pass@1": float(score), "correct": [2 * score]}}
            (folder / file).write_text(json.dumps(scores))
        for command in STARTS:
            short = "coderl " + command.partition(" before")[0]
            found[f"seconds of {short}"], found[f"torch loaded by {short}"] = timed(
                root, COMMAND, *command.split(), folder=folder
            )
    return found


def main(args: list[str]) -> None:
    root = Path(args[0]).resolve() if args else ROOT
    for name, value in (count(root) | starts(root)).items():
        print(f"{name:<52} {value}")
    graph = module_graph(package_files(root))
    for circle in circles(graph):
        print("circle:", ", ".join(circle))
    for arrow in imports_up(graph, layers(root)):
        print("up:", arrow)


if __name__ == "__main__":
    main(sys.argv[1:])
