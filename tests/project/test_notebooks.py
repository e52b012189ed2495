"""The notebooks run from top to bottom, on fewer steps and problems."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from coderl.cli import main

pytestmark = pytest.mark.slow

nbformat = pytest.importorskip("nbformat", reason="needs coderl[notebook]")
nbclient = pytest.importorskip("nbclient", reason="needs coderl[notebook]")

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
FIT = "fit -c quickstart.yaml "
SMALL = {FIT: f"{FIT}--data.batch_size 2 "}
"""What every notebook's fit is given besides."""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One kernel for all notebooks: it takes seconds to start and to import torch."""
    folder = {"metadata": {"path": str(tmp_path_factory.mktemp("kernel"))}}
    client = nbclient.NotebookClient(nbformat.v4.new_notebook(), timeout=240, resources=folder)
    with client.setup_kernel():
        yield client


def executed(kernel: Any, name: str, smaller: dict[str, str], folder: Path) -> Any:
    """The notebook after a run in ``folder`` with no name defined, parts of its code replaced."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    for whole, part in (smaller | SMALL).items():
        cell = next(cell for cell in notebook.cells if cell.cell_type == "code" and whole in cell.source)
        cell.source = cell.source.replace(whole, part)
    begin = nbformat.v4.new_code_cell(f"%reset -f\n%cd -q {folder}")
    kernel.nb = nbformat.v4.new_notebook(cells=[begin, *notebook.cells])
    kernel.reset_execution_trackers()
    for index, cell in enumerate(kernel.nb.cells):
        kernel.execute_cell(cell, index)
    return kernel.nb


def outputs(notebook: Any) -> tuple[str, int]:
    """What the cells printed, and how many pictures they drew."""
    found = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = sum("image/png" in output.get("data", {}) for output in found)
    return "".join(output.get("text", "") for output in found), pictures


def test_quickstart(kernel: Any, tmp_path: Path) -> None:
    smaller = {"STEPS = 56": "STEPS = 2", "HELD_OUT = 110": "HELD_OUT = 3"}
    text, pictures = outputs(executed(kernel, "quickstart.ipynb", smaller, tmp_path))
    assert "pass@1" in text and "samples pass" in text
    assert pictures
    assert (tmp_path / "checkpoints" / "notebook" / "summary.json").is_file()


def test_reading_a_run(kernel: Any, tmp_path: Path) -> None:
    """It trains where there is no run yet, and reads the one that is there."""
    smaller = {"STEPS = 40": "STEPS = 2", "HELD_OUT = 110": "HELD_OUT = 5"}
    text, pictures = outputs(executed(kernel, "reading_a_run.ipynb", smaller, tmp_path))
    assert "Held-out pass@1" in text and "of a problem's programs differ" in text and "# step 1, best" in text
    assert pictures == 5
    summary = tmp_path / "checkpoints/reading/summary.json"
    ended = summary.read_bytes()
    executed(kernel, "reading_a_run.ipynb", smaller, tmp_path)
    assert summary.read_bytes() == ended and summary.with_name("report.html").is_file()


def test_custom_reward(
    kernel: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The classes are short, both of them act, and the command for the shell takes them too."""
    smaller = {"STEPS = 40": "STEPS = 2", "HELD_OUT = 40": "HELD_OUT = 1"}
    notebook = executed(kernel, "custom_reward.ipynb", smaller, tmp_path)
    text, pictures = outputs(notebook)
    assert pictures and "paid: held-out pass@1" in text and "# measured" in text
    parts = re.split(r"^class ", (tmp_path / "readable.py").read_text(), flags=re.MULTILINE)[1:]
    assert len(parts) == 2 and all(len(part.strip().splitlines()) <= 20 for part in parts)
    paid = (tmp_path / "checkpoints/custom/paid/logs/version_0/metrics.csv").read_text()
    assert "reward/SpelledOut" in paid.splitlines()[0] and "reward/ExecutionReward" in paid.splitlines()[0]
    command = re.search(r"```bash\n(.*?)\n```", notebook.cells[-1].source)
    assert command
    monkeypatch.chdir(tmp_path)
    try:
        assert main([*shlex.split(command[1])[1:], "--print_config"]) == 0
    finally:
        sys.modules.pop("readable", None)
    config = yaml.safe_load(capsys.readouterr().out)
    rewards = config["model"]["init_args"]["rewards"]
    assert [reward["class_path"].rpartition(".")[2] for reward in rewards] == [
        "ExecutionReward",
        "SpelledOut",
    ]
    assert [reward["init_args"]["weight"] for reward in rewards] == [1.0, 0.5]
    assert config["trainer"]["callbacks"][-1]["class_path"] == "readable.EachReward"
