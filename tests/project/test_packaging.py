"""The wheel: complete, and finding its own configs from any folder."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from coderl import __version__

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout, built without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, text=True)
    (found,) = folder.glob("*.whl")
    return found


def names(folder: str, pattern: str) -> set[str]:
    """Files of the checkout, as a wheel names them."""
    base = ROOT / folder
    inside = "coderl/configs" if folder == "configs" else folder
    return {f"{inside}/{path.relative_to(base).as_posix()}" for path in base.rglob(pattern) if path.is_file()}


def test_the_wheel_holds_code_configs_and_data(wheel: Path) -> None:
    content = set(zipfile.ZipFile(wheel).namelist())
    expected = names("coderl", "*.py") | names("configs", "*.yaml")
    expected |= {
        name for pattern in ("*.jsonl*", "*.json", "*.safetensors") for name in names("coderl", pattern)
    }
    assert len(expected) > 20
    assert expected <= content
    assert "coderl/py.typed" in content
    assert f"coderl-{__version__}.dist-info/licenses/LICENSE" in content
    assert not [name for name in content if "__pycache__" in name or name.startswith("tests")]


def test_a_bare_config_name_resolves_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """As installed: unpacked where no ``configs`` folder lies beside the package."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    configs = sorted(
        path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.yaml")
    )
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "from coderl.cli.config_files import config_names, find_config\n"
        "print(*config_names()); print(*map(find_config, config_names()))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    listed, found = (line.split() for line in done.stdout.splitlines())
    assert listed == configs
    assert found == [str(tmp_path / "site/coderl/configs" / name) for name in configs]


def test_every_dependency_is_pinned_without_a_local_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(text for texts in project["optional-dependencies"].values() for text in texts),
    ]
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pinned = {plain(line.partition("==")[0]) for line in pins}
    assert {plain(text) for text in wanted} - {"coderl"} <= pinned
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in pins)


def test_every_bound_has_its_reason() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    block = text[text.index("dependencies = [") : text.index("]\n\n[project.optional")]
    assert all("#" in line for line in block.splitlines()[1:] if line.strip())


def plain(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    assert found
    return re.sub(r"[-_.]+", "-", found[0]).lower()
