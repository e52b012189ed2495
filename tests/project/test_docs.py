"""What the documents name exists, and the walks through the code leave nothing out."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from tests.project.test_layers import ROOMS

ROOT = Path(__file__).parents[2]
ARCHITECTURE = ROOT / "docs/architecture.md"
PAGES = [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md"), ROOT / "configs/README.md"]


def section(title: str) -> str:
    text = ARCHITECTURE.read_text(encoding="utf-8")
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def resolves(dotted: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    try:
        import_module(dotted)
    except ModuleNotFoundError:
        module, _, name = dotted.rpartition(".")
        return bool(module) and resolves(module) and hasattr(import_module(module), name)
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_paths_and_dotted_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text) if "://" not in link]
    assert not [link for link in links if not (page.parent / link).exists()]
    paths = re.findall(r"`((?:coderl|tests|configs|docs|notebooks)/[\w./-]+)`", text)
    assert not [path for path in paths if not (ROOT / path).exists()]
    names = re.findall(r"`(coderl(?:\.\w+)+)`", text) if page.name != "CHANGELOG.md" else []
    assert not [name for name in names if not resolves(name)]


def test_the_architecture_has_every_package() -> None:
    packages = {name for name in ROOMS if (ROOT / "coderl" / name).is_dir()}
    assert set(re.findall(r"^\| `coderl/(\w+)/` \|", section("Packages"), flags=re.MULTILINE)) == packages


@pytest.mark.parametrize("title", ["One training step", "One verdict"])
def test_a_walk_names_each_file_once(title: str) -> None:
    files = re.findall(r"\]\(\.\./(\S+\.py)\)", section(title))
    assert len(files) > 9 and len(files) == len(set(files))


def test_every_decision_is_listed() -> None:
    folder = ROOT / "docs/decisions"
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", (folder / "README.md").read_text(encoding="utf-8")))
    assert listed == {page.name for page in folder.glob("*.md")} - {"README.md"}


def test_the_workflow_runs_what_ci_runs() -> None:
    (job,) = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"].values()
    assert {"run": ".ci/run"} in job["steps"]
    assert "make test" in (ROOT / ".ci/run").read_text()
