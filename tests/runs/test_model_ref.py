"""What ``--model`` may name, and what results then call it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from coderl.runs.folder import RunFolder, run_name
from coderl.runs.model_ref import find_model


@pytest.mark.parametrize("dataset", ["mbpp", "my-problems"])
def test_models_of_a_run_are_called_by_its_model_and_method(tmp_path: Path, dataset: str) -> None:
    run = RunFolder(tmp_path / run_name("embedded", dataset, "grpo"))
    run.adapter.mkdir(parents=True)
    (run.adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "o/base"}')
    run.merged_epoch(2).mkdir(parents=True)
    found = [find_model(str(folder)) for folder in (run.path, run.adapter, run.merged, run.merged_epoch(2))]
    assert [ref.label for ref in found] == ["embedded", "embedded", "embedded", "embedded-epoch-2"]
    assert {ref.method for ref in found} == {"grpo"}


def test_a_model_is_found_without_torch() -> None:
    code = (
        "import sys, coderl.runs.model_ref; print({'torch', 'lightning', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
