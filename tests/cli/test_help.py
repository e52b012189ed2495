"""Every argument that a command line or a config can set has its help, as jsonargparse reads it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from docstring_parser import DocstringStyle, ParseError, parse
from jsonargparse._parameter_resolvers import get_signature_parameters

import coderl.algorithms
import coderl.callbacks
import coderl.data
import coderl.model
import coderl.problems
import coderl.rollout
from coderl.algorithms import rewards
from coderl.algorithms.ppo import AdaptiveKL
from coderl.cli import main
from coderl.evaluation import TASKS, EvaluationSettings
from coderl.sandbox import Sandbox
from tests.project.house import package_files

ROOT = Path(__file__).parents[2]
PACKAGES = (
    coderl.algorithms,
    coderl.callbacks,
    coderl.data,
    coderl.model,
    coderl.problems,
    coderl.rollout,
)
EXPORTED = {getattr(package, name) for package in PACKAGES for name in package.__all__}
OTHERS = {AdaptiveKL, EvaluationSettings, Sandbox} | {
    cls for cls in vars(rewards).values() if isinstance(cls, type) and issubclass(cls, rewards.Reward)
}
CLASSES = sorted({cls for cls in EXPORTED | OTHERS if isinstance(cls, type)}, key=lambda cls: cls.__name__)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_argument_of_a_class_has_help(cls: type) -> None:
    without = [p.name for p in get_signature_parameters(cls, "__init__") if not (p.doc or "").strip()]
    assert not without


def test_docstrings_parse() -> None:
    # One line that is indented wrongly, and jsonargparse drops the help of the whole class.
    bad = []
    for module, path in package_files(ROOT).items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                try:
                    parse(text, DocstringStyle.GOOGLE)
                except ParseError as error:
                    bad.append(f"{module}, {node.name}: {error}")
    assert not bad


def test_help_of_evaluate_lists_the_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split()).replace("- ", "-")  # lines break after hyphens
    assert f"{', '.join(TASKS)}; or paths of .jsonl" in said
    assert "by default the task's (3, 10, 20)" in said
