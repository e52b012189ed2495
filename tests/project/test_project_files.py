"""CONTRIBUTING, docs/architecture.md and CITATION say what is so."""

from __future__ import annotations

import inspect
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from coderl import __version__
from coderl.algorithms import PolicyGradient
from coderl.algorithms.rewards import Reward
from coderl.cli import main
from coderl.cli.entry import TOOLS
from coderl.problems import ProblemSource
from coderl.rollout import RolloutEngine
from tests.project.test_layers import LAYER

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ADDING = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").partition("## Adding to it")[2]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BLOCKS = re.findall(r"```bash\n(.*?)```", GUIDE, flags=re.DOTALL)
COMMANDS = [line.removeprefix(".venv/bin/") for text in BLOCKS for line in text.splitlines() if line]
PATHS = set(re.findall(r"\]\(([\w./-]+)\)", GUIDE)) | set(re.findall(r"`(\w[\w./-]*(?:/|\.\w+))`", GUIDE))
EXTENDED = [PolicyGradient, ProblemSource, Reward, RolloutEngine]


def test_the_citation_is_of_this_version_licence_and_authors() -> None:
    assert CITATION["cff-version"] == "1.2.0" and CITATION["type"] == "software"
    assert {"message", "title", "abstract", "authors"} <= CITATION.keys()
    assert CITATION["version"] == __version__
    assert CITATION["title"] == PROJECT["name"]
    assert CITATION["license"] == PROJECT["license"]
    assert CITATION["authors"] == PROJECT["authors"]
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_path_in_the_guide_exists() -> None:
    assert len(PATHS) > 20
    missing = {path for path in PATHS if not (ROOT / path).exists()} - {"mbpp.jsonl"}
    assert not missing


def test_modules_stand_in_the_layer_that_the_guide_says() -> None:
    rows = dict(re.findall(r"^\| (\d) \| (.*) \|$", GUIDE, flags=re.MULTILINE))
    assert set(rows) == {str(layer) for layer in LAYER.values()}
    for layer, words in rows.items():
        for module in re.findall(r"`coderl/(\w+)(?:/|\.py)`", words):
            assert LAYER[module] == int(layer), module


@pytest.mark.parametrize("extended", EXTENDED, ids=lambda cls: cls.__name__)
def test_a_class_to_extend_has_the_abstract_methods_that_its_row_names(extended: type) -> None:
    (row,) = re.findall(rf"subclass `{extended.__name__}`(.*?) \|", ADDING)
    named = {name.partition("(")[0] for name in re.findall(r"`(.*?)`", row)}
    assert named in (extended.__abstractmethods__, set())  # type: ignore[attr-defined]
    assert inspect.isabstract(extended)


def test_a_row_finds_its_names_where_it_says() -> None:
    rows = re.findall(r"`(\w+)` (?:in|of \S+ in) \[.*?\]\(\.\./([\w./-]+)\)", ADDING)
    assert {name for name, _ in rows} >= {
        "CHECKS",
        "Grading",
        "Kind",
        "Reward",
        "RunFolder",
        "TASKS",
        "TOOLS",
    }
    for name, path in rows:
        assert re.search(rf"^(class |def )?{name}\b", (ROOT / path).read_text(), flags=re.MULTILINE), name


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_can_be_given(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    program, *args = shlex.split(command)
    if program == "make":
        done = subprocess.run(["make", *args, "--dry-run"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif program == "coderl":
        assert args[0] in TOOLS and main([args[0], "--help"]) == 0
        said = capsys.readouterr().out
        assert all(flag in said for flag in args if flag.startswith("--"))
    elif args[:2] == ["-m", "pytest"]:
        assert (ROOT / args[2]).is_file()
    else:
        assert program == "python" and (ROOT / args[0]).is_file()
        subprocess.run([sys.executable, args[0], "--help"], cwd=ROOT, check=True, capture_output=True)


def test_the_fast_tests_cover_every_package() -> None:
    fast = [
        path
        for path in (ROOT / "tests").glob("*/test_*.py")
        if not re.search(r"^pytestmark = .*mark\.slow", path.read_text(), flags=re.MULTILINE)
    ]
    packages = {path.parent.name for path in (ROOT / "coderl").glob("*/__init__.py")}
    assert packages - {path.parent.name for path in fast} == {"earlier"}  # aliases: tests/cli has their tests
