"""The counting script counts what it says, on a package small enough to count by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.project.house import (
    circles,
    count,
    floors,
    imports_up,
    layers,
    module_graph,
    package_files,
    room_graph,
)

SOURCES = {
    "__init__.py": "from coderl.top import main",
    "errors.py": "# A comment.\nx = 1  # another\ny = 2  # noqa: E501\nz = 3  # type: ignore[misc]\n",
    "low/__init__.py": "from coderl.low.one import One",
    "low/one.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .two import Two\n",
    "low/two.py": "from coderl.low.one import One\nfrom .. import errors\n",
    "top/__init__.py": "def main():\n    from coderl.low import One\n    return _once(_twice()) + _twice()\n",
    "top/_helpers.py": "def _once():\n    return 1\n\n\ndef _twice():\n    return 2\n",
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name, text in SOURCES.items():
        path = tmp_path / "coderl" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_imports_are_counted_wherever_and_however_they_are_written(checkout: Path) -> None:
    graph = module_graph(package_files(checkout))
    assert graph == {
        "coderl": set(),
        "coderl.errors": set(),
        "coderl.low": {"coderl.low.one"},
        "coderl.low.one": {"coderl.low.two"},
        "coderl.low.two": {"coderl.low.one", "coderl.errors"},
        "coderl.top": {"coderl.low"},
        "coderl.top._helpers": set(),
    }
    assert circles(graph) == [["coderl.low.one", "coderl.low.two"]]
    assert floors(graph) == 4  # top, low, the circle, errors
    del graph["coderl"]
    assert room_graph(graph) == {"errors": set(), "low": {"errors"}, "top": {"low"}}


def test_an_import_up_is_one_from_a_lower_layer_of_the_checkout_s_own_list(checkout: Path) -> None:
    graph = module_graph(package_files(checkout))
    assert imports_up(graph, layers(checkout)) == []  # a checkout without such a list
    listed = checkout / "tests" / "test_layers.py"
    listed.parent.mkdir()
    listed.write_text('LAYERS = {0: ["errors", "top"], 1: ["low"]}')
    assert imports_up(graph, layers(checkout)) == ["coderl.top -> coderl.low"]


def test_every_figure_of_a_small_package_is_counted(checkout: Path) -> None:
    assert count(checkout) == {
        "Python files directly in coderl/": 2,
        "modules": 7,
        "rooms (packages directly in coderl/)": 2,
        "floors between rooms": 3,
        "floors between modules": 4,
        "import arrows between rooms": 2,
        "circles between rooms": 0,
        "circles between modules": 1,
        "imports up": 0,
        "lines": 20,
        "private helpers": 2,
        "used once, by name over the package": 1,
        "of these of six lines or fewer": 1,
        "used once, by name in their file": 0,
        "of those of six lines or fewer": 0,
        "comment lines, % of non-blank lines": 11.11,
        "comment lines that stand alone, %": 5.56,
    }
