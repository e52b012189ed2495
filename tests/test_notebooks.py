"""The notebooks run from top to bottom, on fewer steps and problems."""

from __future__ import annotations

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs coderl[notebook]")
nbclient = pytest.importorskip("nbclient", reason="needs coderl[notebook]")

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SMALLER = {"STEPS = 56": "STEPS = 2", "HELD_OUT = 110": "HELD_OUT = 3"}


def test_quickstart(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOKS / "quickstart.ipynb", as_version=4)
    settings = notebook.cells[1]
    for whole, part in SMALLER.items():
        assert whole in settings.source
        settings.source = settings.source.replace(whole, part)
    client = nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    assert "pass@1" in text and "samples pass" in text
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert (tmp_path / "checkpoints" / "notebook" / "summary.json").is_file()
