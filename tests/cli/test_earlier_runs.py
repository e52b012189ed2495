"""A run folder that coderl 0.1 wrote, before its modules moved: it resumes, evaluates, merges and reports.

``tests/support/earlier_run`` holds it: four GRPO steps of the embedded model with an adapter of rank 2.
Left out are the merged model (8 MB) and all checkpoints but the last; their folder is called ``ckpt`` there,
because git ignores ``checkpoints``.
"""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from coderl.cli import main
from coderl.model.loading import resolve

pytestmark = pytest.mark.slow

STORED = Path(__file__).parents[1] / "support" / "earlier_run"
NAME = Path("checkpoints/earlier")  # as in its config


@pytest.fixture
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run in its place below a fresh working folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(STORED, NAME)
    (NAME / "ckpt").rename(NAME / "checkpoints")
    adapter = NAME / "adapter/adapter_config.json"
    adapter.write_text(adapter.read_text().replace("@EMBEDDED@", resolve("embedded")))
    return NAME


def class_paths(settings: Any) -> list[str]:
    parts = (
        settings.values() if isinstance(settings, dict) else settings if isinstance(settings, list) else []
    )
    own = [settings["class_path"]] if isinstance(settings, dict) and "class_path" in settings else []
    return own + [path for part in parts for path in class_paths(part)]


def test_every_class_path_in_an_earlier_runs_config_resolves() -> None:
    found = class_paths(yaml.safe_load((STORED / "logs/version_0/config.yaml").read_text()))
    assert {"coderl.policy.Policy", "coderl.adapters.LoRA", "coderl.rewards.ExecutionReward"} <= set(found)
    for path in found:
        module, _, name = path.rpartition(".")
        assert isinstance(getattr(import_module(module), name), type), path


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # it was made in another folder
def test_an_earlier_run_resumes_with_its_own_config(
    earlier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its weights, its place in the data, its curriculum and its figures from before training."""
    before = json.loads((earlier / "summary.json").read_text())["before"]
    met = set(json.loads((earlier / "curriculum.json").read_text()))
    config, checkpoint = earlier / "logs/version_0/config.yaml", earlier / "checkpoints/last.ckpt"
    call = f"fit -c {config} --ckpt_path {checkpoint} --trainer.max_steps 5"
    assert main(call.split()) == 0, capsys.readouterr().err
    summary = json.loads((earlier / "summary.json").read_text())
    assert summary["steps"] == 5
    assert summary["before"] == before
    rows = (earlier / "logs/version_1/metrics.csv").read_text().splitlines()
    steps = [row.split(",")[rows[0].split(",").index("rollout_step")] for row in rows[1:]]
    assert [step for step in steps if step] == ["5.0"]
    assert met < set(json.loads((earlier / "curriculum.json").read_text()))  # problems met earlier stay known


def test_an_earlier_runs_adapter_evaluates_and_merges(
    earlier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problem = {"text": "Add one.", "test_list": ["assert f(1) == 2"], "task_id": 1}
    Path("own.jsonl").write_text(json.dumps(problem) + "\n")
    call = f"evaluate --model {earlier} --tasks own.jsonl --n_samples 2 --k 1 --max_length_generation 64"
    assert main([*call.split(), "--allow_weak_isolation"]) == 0, capsys.readouterr().err
    assert main(["merge", "--adapter_model_id", str(earlier), "--output_dir", "merged"]) == 0
    assert json.loads(Path("merged/merge.json").read_text())["base"] == "embedded"
    assert "trained with [GRPO]" in Path("merged/README.md").read_text()


def test_an_earlier_run_is_reported(earlier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(earlier)]) == 0
    assert "54.2 %" in capsys.readouterr().out
    page = (earlier / "report.html").read_text()
    assert "GRPO" in page and "Reward" in page
