"""configs/README.md lists every option with its default, and its recipes parse."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from coderl.algorithms import GRPO, PPO
from coderl.algorithms.advantages import AdvantageScale, Baseline
from coderl.algorithms.grpo import LEGAL_SCALES
from coderl.algorithms.losses import LossType
from coderl.algorithms.ppo import AdaptiveKL
from coderl.cli import main
from coderl.cli.config_files import config_names, configs_folder
from coderl.data import CodeDataModule, Curriculum
from coderl.evaluation import EvaluationSettings
from coderl.model.policy import Policy

pytestmark = pytest.mark.slow

TEXT = (configs_folder() / "README.md").read_text(encoding="utf-8")
PLUMBING = {"self", "policy", "rewards", "sandbox", "engine", "evaluation", "options"}
"""Arguments that are other objects, with options of their own."""
RECIPES = re.findall(r"^coderl .*$", TEXT, flags=re.MULTILINE)
CHOICES = {"loss_type": LossType, "baseline": Baseline, "scale": AdvantageScale}


def section(title: str) -> str:
    """What stands under a heading."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", TEXT, flags=re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def rows(title: str) -> list[list[str]]:
    """The cells of a section's tables, without their heads."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(row) for row in cells}) == 1, "a row has too many cells"
    rule = next(i for i, row in enumerate(cells) if set(row[0]) == {"-"})
    return cells[rule + 1 :]


def stated(title: str, algorithm: str = "") -> dict[str, Any]:
    """Options of a section with the default that stands there; rows without a key are further values."""
    found = {}
    for row in rows(title):
        if row[0]:
            own = re.search(rf"{algorithm} `(.+?)`", row[1]) if algorithm else None
            value = own or re.search("`(.+?)`", row[1])
            assert value, row
            found[row[0].strip("`")] = yaml.safe_load(value[1])
    return found


def defaults(cls: type, prefix: str) -> dict[str, Any]:
    """A class's arguments with the default that acts: the one nearest to the class."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if base.__module__.startswith("coderl.") and "__init__" in vars(base):
            for name, argument in inspect.signature(vars(base)["__init__"]).parameters.items():
                if name not in PLUMBING:
                    found.setdefault(f"{prefix}.{name}", argument.default)
    return found


@pytest.mark.parametrize(("algorithm", "other"), [(GRPO, PPO), (PPO, GRPO)])
def test_every_option_of_an_algorithm_is_listed_with_its_default(algorithm: type, other: type) -> None:
    name = algorithm.__name__
    common = stated("PPO and GRPO", name) | stated("Optimizer and limits", name)
    own = {key: value for key, value in stated(name).items() if key.count(".") == 1}
    assert common | own == defaults(algorithm, "model")
    assert common.keys() == defaults(algorithm, "model").keys() & defaults(other, "model").keys()


def test_nested_options_are_listed_too() -> None:
    nested = {key: value for key, value in stated("PPO").items() if key.count(".") == 2}
    assert nested == defaults(AdaptiveKL, "model.adaptive_kl")
    arguments = inspect.signature(CodeDataModule).parameters
    own = {f"data.{name}": arguments[name].default for name in ("curriculum", "allow_contamination")}
    assert stated("Data") == own | defaults(Curriculum, "data.curriculum")
    settings = defaults(EvaluationSettings, "model.evaluation")
    settings["model.evaluation.ks"] = list(settings["model.evaluation.ks"])
    assert stated("Evaluation") == settings


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_of_an_option_has_a_row(name: str) -> None:
    listed, key = [], ""
    for row in rows("GRPO"):
        key = row[0].strip("`") or key
        if key == f"model.{name}":
            listed.append(row[1].strip("`"))
    assert sorted(listed) == sorted(get_args(CHOICES[name]))
    assert listed[0] == defaults(GRPO, "model")[f"model.{name}"]


def test_the_table_of_legal_scales_is_that_of_the_code() -> None:
    table = section("What goes with what").partition("Where each estimator")[0]
    pairs = [re.findall("`(.+?)`", line) for line in table.splitlines() if line.startswith("| `")][1:]
    assert {baseline: tuple(scales) for baseline, *scales in pairs} == LEGAL_SCALES


@pytest.mark.parametrize("command", RECIPES)
def test_recipes_parse_and_combine_options_that_go_together(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*shlex.split(command)[1:], "--print_config"]) == 0, capsys.readouterr().err
    model = yaml.safe_load(capsys.readouterr().out)["model"]
    options = {key: value for key, value in model["init_args"].items() if key not in PLUMBING}
    if options.get("adaptive_kl"):
        options["adaptive_kl"] = AdaptiveKL(**options["adaptive_kl"]["init_args"])
    algorithm = {"coderl.GRPO": GRPO, "coderl.PPO": PPO}[model["class_path"]]
    algorithm(Policy("embedded"), **options)  # refuses what does not go together


def test_the_index_lists_every_config() -> None:
    listed = [name for row in rows("Configs and options") for name in re.findall("`(.+?)`", row[0])]
    assert sorted(listed) == [name for name in config_names() if not name.startswith("models/")]


def test_what_it_names_exists() -> None:
    source = "".join(p.read_text() for p in (Path(__file__).parents[2] / "coderl").rglob("*.py"))
    metrics = re.findall(r"`([a-z]+/[a-z_]+)`", TEXT)
    assert metrics and all(f'"{name}"' in source for name in metrics)
    assert all(Path(configs_folder(), name).is_file() for name in re.findall(r"`([\w-]+\.yaml)`", TEXT))
