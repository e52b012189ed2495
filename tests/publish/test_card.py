"""Model cards: what stands in them, what does not, and that their code runs."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from coderl.callbacks import MergedCheckpoints, PostFit
from coderl.cli import main
from coderl.model.adapters import LoRA
from coderl.problems.prompts import CHAT_OPENING
from coderl.publish import card
from coderl.publish.artifacts import save_models
from coderl.publish.card import gather_facts, is_hub_id
from coderl.publish.export import save_adapter, save_merged
from tests.callbacks.test_callbacks import fit, rl
from tests.support import tiny

BASE = "codellama/CodeLlama-7b-Python-hf"
SCORES: dict[str, Any] = {
    "pass@1": 0.41234567,
    "pass@10": None,
    "interval": [0.35, 0.47],
    "n": 8,
    "problems": 500,
    "contaminated": [],
    "settings": {"temperature": 0.2},
}
CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"


def run_folder(folder: Path, **changes: Any) -> Path:
    """What a fit leaves, without weights."""
    policy: dict[str, Any] = {"model": BASE, "gguf_file": None, "quantization": "nf4"}
    policy["lora"] = {"class_path": "coderl.model.adapters.LoRA", "init_args": {"r": 64, "alpha": 16}}
    policy |= changes.pop("policy", {})
    config = {
        "seed_everything": 42,
        "model": {
            "class_path": "coderl.algorithms.GRPO",
            "init_args": {
                "policy": {"class_path": "coderl.model.policy.Policy", "init_args": policy},
                "learning_rate": 3e-6,
                "clip_high": None,
                "rewards": [{"class_path": "coderl.algorithms.rewards.ExecutionReward"}],
            },
        },
        "data": {"init_args": {"source": {"class_path": "coderl.problems.MBPP"}, "batch_size": 8}},
    }
    summary = {"method": "grpo", "steps": 100, "seconds": 3600.0, "before": SCORES | {"pass@1": 0.3}}
    summary |= {"tasks": {"mbpp": SCORES}, "verdict": ["Held-out pass@1 rose.", "pass@8 did not."]} | changes
    for version, text in enumerate(("old: true", yaml.safe_dump(config))):
        path = folder / f"logs/version_{version}/config.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    (folder / "summary.json").write_text(json.dumps(summary))
    adapter = folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"task_type": "CAUSAL_LM", "base_model_name_or_path": BASE})
    )
    (adapter / "policy.json").write_text('{"quantization": "nf4"}')
    ids = [*(f"mbpp/{i}" for i in range(374)), "mine/1"]
    (adapter / "training_problems.json").write_text(json.dumps({"ids": ids, "texts": []}))
    return folder


def written(folder: Path, run: Path | None = None, **options: Any) -> Any:
    """The card as the hub's client reads it."""
    card.write(folder, card.model_name(folder), run, **options)
    return ModelCard.load(folder / card.FILE)


# --- what stands in it


def test_a_card_lists_what_is_known(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "codellama-7b-python-mbpp-grpo-qlora")
    found = written(run / "adapter", run)
    head = found.data.to_dict()
    assert head | {"tags": set(head["tags"])} == {
        "base_model": BASE,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": {"coderl", "code", "grpo", "lora", "qlora"},
        "datasets": ["google-research-datasets/mbpp"],
        "model-index": head["model-index"],
    }
    (result,) = found.data.eval_results
    assert (result.metric_type, result.metric_value) == ("pass@1", 0.4123)
    assert (result.dataset_type, result.dataset_name) == (
        "google-research-datasets/mbpp",
        "MBPP (500 problems)",
    )
    assert found.data.model_name == run.name
    for part in (
        f"# {run.name}\n",
        f"[{BASE}](https://huggingface.co/{BASE})",
        "trained from a set of 375 problems (374 of MBPP, 1 of `mine`)",
        "100 optimizer steps.",  # it was resumed: the seconds are the last part's
        "| learning_rate | 3e-06 |",
        "| LoRA r | 64 |",
        "| rewards | ExecutionReward |",
        "| seed | 42 |",
        "\n\nHeld-out pass@1 rose. pass@8 did not.\n\n",
        "| MBPP, before training | 30.0 % | 35.0 to 47.0 % | – | 500 | 8 | 0.2 |",
        "| MBPP, after training | 41.2 % | 35.0 to 47.0 % | – | 500 | 8 | 0.2 |",
        "None of the problems measured (MBPP) was trained on here.",
        "run it in a sandbox",
        "transformers 5",
    ):
        assert part in found.text, part
    assert "clip_high" not in found.text and "None |" not in found.text and "null" not in found.text


def test_scores_on_problems_that_were_trained_on_are_marked_and_not_listed(tmp_path: Path) -> None:
    met = SCORES | {"contaminated": ["mbpp/601", "mbpp/602"]}
    run = run_folder(tmp_path / "run", tasks={"mbpp": met, "humaneval": SCORES})
    found = written(run / "adapter", run)
    assert "**NOT HELD OUT**: 2 of the 500 problems of MBPP were trained on." in found.text
    assert [result.dataset_name for result in found.data.eval_results] == ["HumanEval (500 problems)"]


def test_a_fit_in_one_part_says_how_long_it_took(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    shutil.rmtree(run / "logs/version_0")
    assert "100 optimizer steps, 3600 seconds in all." in written(run / "adapter", run).text


def test_settings_that_did_not_act_are_left_out(tmp_path: Path) -> None:
    lora = {"class_path": "coderl.model.adapters.LoRA", "init_args": {"r": 64, "alpha": 16, "dropout": 0.1}}
    run = run_folder(tmp_path / "run", policy={"lora": lora})
    assert "LoRA dropout" not in written(run / "adapter", run).text
    (path := run / "logs/version_1/config.yaml").write_text(
        path.read_text()
        .replace("quantization: nf4", "quantization: nf4\n        train_dropout: true")
        .replace("learning_rate: 3.0e-06", "learning_rate: 3.0e-06\n    max_new_tokens: 512")
    )
    text = written(run / "adapter", run).text
    assert "| LoRA dropout | 0.1 |" in text and "| max_new_tokens | 512 |" in text
    (run / "summary.json").write_text('{"method": "sft"}')
    assert "max_new_tokens | 512" not in written(run / "adapter", run).text


def test_a_merge_with_another_base_is_not_what_the_run_measured(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    for base, same in {BASE: True, "codellama/CodeLlama-7b-hf": False}.items():
        (tmp_path / "out").mkdir(exist_ok=True)
        card.write_merge_record(tmp_path / "out", base, "bfloat16", {"quantization": "nf4"}, {})
        found = written(tmp_path / "out", run)
        assert found.data.base_model == base and f"made from [{base}](" in found.text
        assert ("41.2 %" in found.text) is same and bool(found.data.eval_results) is same


@pytest.mark.parametrize("name", ['x"; print(1) #', "a\nb: ```", "a\\b", "naïve"])
def test_names_with_special_characters_stay_intact(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    written(tmp_path / name)
    line = next(line for line in code_of(tmp_path / name).splitlines() if line.startswith("name = "))
    shown: dict[str, str] = {}
    exec(line, shown)
    assert shown["name"] == name
    changed = card.with_hub_id((tmp_path / name / card.FILE).read_text(), "me/it")
    assert changed.count("me/it") == 1 and 'name = "me/it"  #' in changed


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    (tmp_path / "some/config.json").write_text("{}")
    found = written(tmp_path / "some")
    assert set(found.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    assert re.findall("^#+ .*", found.text, re.M) == ["# some", "## How to use it", "## How it was made"]
    assert "None" not in found.text


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"tasks": {"mbpp": null}, "before": null}'])
def test_damaged_files_are_left_out(tmp_path: Path, damage: str) -> None:
    run = run_folder(tmp_path / "run")
    (run / "summary.json").write_text(damage)
    (run / "logs/version_1/config.yaml").write_text(damage or "\t:")
    (run / "adapter/policy.json").write_text(damage)
    found = written(run / "adapter", run)
    assert "What was measured" not in found.text and found.data.eval_results is None


def test_what_was_measured_of_another_model_is_left_out(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    found = written(run / "adapter", run, measured=False)
    assert "What was measured" not in found.text and "| learning_rate |" in found.text


@pytest.mark.parametrize(
    "policy", [{"model": "/data/weights/CodeLlama"}, {"model": "/x", "gguf_file": "small.gguf"}]
)
def test_a_card_holds_no_paths_of_this_machine(tmp_path: Path, policy: dict[str, str]) -> None:
    run = run_folder(tmp_path / "run", policy=policy)
    found = written(run / "adapter", run)
    assert f"`{policy.get('gguf_file', 'CodeLlama')}`" in found.text
    assert "/data" not in str(found) and str(tmp_path) not in str(found) and "/x" not in found.text
    assert "base_model" not in found.data.to_dict()


def test_the_license_is_the_bases_where_its_card_says_so(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    run = run_folder(tmp_path / "run", policy={"model": str(base)})
    assert written(run / "adapter", run).data.license is None
    for text, wanted in {
        "---\nlicense: llama2\n---\n": "llama2",
        "no head": None,
        "---\n: [\n---\n": None,
    }.items():
        (base / "README.md").write_text(text)
        assert written(run / "adapter", run).data.license == wanted


@pytest.mark.parametrize(
    ("name", "known"),
    [(BASE, True), ("model", False), ("/a/b", False), ("a/b/c", False), ("./a", False), ("a b/c", False)],
)
def test_what_a_hub_id_looks_like(name: str, known: bool) -> None:
    assert is_hub_id(name) is known


@pytest.mark.parametrize(
    ("folder", "name", "run"),
    [
        ("x/run/adapter", "run", "x/run"),
        ("x/run-merged", "run-merged", "x/run"),
        ("x/run-merged/epoch-3", "run-merged-epoch-3", None),
        ("x/other", "other", None),
    ],
)
def test_names_and_runs_by_place(tmp_path: Path, folder: str, name: str, run: str | None) -> None:
    for made in ("x/run/logs", "x/logs", folder):
        (tmp_path / made).mkdir(parents=True, exist_ok=True)
    assert card.model_name(tmp_path / folder) == name
    assert card.run_of(tmp_path / folder) == (tmp_path / run if run else None)


def test_a_model_by_its_own_weights_says_what_was_measured_with_others(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    (tmp_path / "merged").mkdir()
    for quantization, said in {"none": True, "nf4": False}.items():
        held = {"quantization": quantization, "all_weights_trained": False}
        card.write_merge_record(tmp_path / "merged", BASE, "bfloat16", held, {"words": "near enough"})
        text = written(tmp_path / "merged", run).text
        assert ("Measured with the base in NF4" in text) is said
        assert ("dequantized from NF4" in text) is not said
        assert "The weights are in bfloat16." in text and "made from: near enough." in text


# --- its code


def code_of(folder: Path) -> str:
    found = re.search(r"```python\n(.*?\n)```\n", (folder / card.FILE).read_text(), re.S)
    assert found
    return found[1]


@pytest.mark.parametrize("kind", ["adapter", "merged"])
@pytest.mark.parametrize("family", ["llama", "chat", "plain", "t5"])
def test_the_code_runs(tmp_path: Path, family: str, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    template = CHAT if family == "chat" else None
    known = "t5" if family == "t5" else "llama"
    base = tiny.checkpoint(tmp_path / "base", known, chat_template=template, likely=(1, 201))
    policy = tiny.policy(
        base,
        quantization="none" if family == "plain" else "nf4",
        lora=LoRA(r=4, target_modules=tiny.LINEARS.get(known, ("q_proj", "v_proj"))),
        prompt_form="chat" if template else "completion",
    )
    tiny.stir(policy)
    run = run_folder(tmp_path / "run", policy={"model": str(base), "prompt_form": policy.prompt_form})
    shutil.rmtree(run / "adapter")
    save = save_adapter if kind == "adapter" else save_merged
    place = save(policy, tmp_path / ("run/adapter" if kind == "adapter" else "run-merged"), run=run)
    text = card.with_hub_id(code_of(place), str(place))
    assert str(place) in text and (CHAT_OPENING.strip() in text) is (family == "chat")
    assert ("BitsAndBytesConfig" in text) is (kind == "adapter" and family != "plain")
    compile(text, "card", "exec")
    torch.manual_seed(0)
    shown: dict[str, Any] = {}
    exec(text, shown)
    assert isinstance(shown["output"], torch.Tensor) and shown["output"].shape[0] == 1
    assert capsys.readouterr().out


@pytest.mark.slow
def test_the_code_runs_as_it_stands_beside_the_model(llama: Path, tmp_path: Path) -> None:
    policy = tiny.policy(llama)
    save_merged(policy, tmp_path / "mine-merged")
    done = subprocess.run(
        [sys.executable, "-c", code_of(tmp_path / "mine-merged")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# --- after a fit and a merge


def test_a_fit_ends_with_cards_of_what_it_measured(llama: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    fit(rl(llama), tmp_path / "run", MergedCheckpoints(), PostFit(), steps=4)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    for folder in ("run/adapter", "run-merged"):
        found: Any = ModelCard.load(tmp_path / folder / card.FILE)
        values = {result.metric_type: result.metric_value for result in found.data.eval_results}
        assert values["pass@1"] == round(summary["after"]["pass@1"], 4)
        assert "before training" in found.text and "4 optimizer steps" in found.text
    assert "tokens the logits are" in ModelCard.load(tmp_path / "run-merged" / card.FILE).text
    epoch = tmp_path / "run-merged/epoch-2"  # is there still
    assert (epoch / "model.safetensors").is_file()
    assert "What was measured" not in (epoch / card.FILE).read_text()


def test_a_summary_of_earlier_weights_goes_when_new_ones_are_saved(llama: Path, tmp_path: Path) -> None:
    """A resumed run may be killed between the two."""
    policy = tiny.policy(llama)
    tiny.stir(policy)
    run = run_folder(tmp_path / "run")
    assert save_models(policy, run, None, merge=False) == {"adapter": str(run / "adapter")}
    assert not (run / "summary.json").exists()


def test_the_card_of_coderl_merge_has_the_scores_of_the_run(llama: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    fit(rl(llama), tmp_path / "run", PostFit(merge=False), steps=1)
    asked = ["merge", "--adapter_model_id", str(tmp_path / "run"), "--output_dir", str(tmp_path / "out")]
    assert main([*asked, "--device", "cpu"]) == 0
    facts = gather_facts(tmp_path / "out", "out", tmp_path / "run", True)
    text = (tmp_path / "out" / card.FILE).read_text()
    assert facts.scores and "after training" in text and "1 optimizer steps" in text


def test_a_fit_without_memory_to_merge_ends_well_and_says_how_to_merge_later(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    left = SimpleNamespace(available=1000)
    monkeypatch.setattr("coderl.publish.export.psutil", SimpleNamespace(virtual_memory=lambda: left))
    torch.manual_seed(7)
    with caplog.at_level(logging.WARNING):
        fit(rl(llama), tmp_path / "run", MergedCheckpoints(), PostFit(), steps=2)
    lines = [record.getMessage() for record in caplog.records if "no merged model" in record.getMessage()]
    assert len(lines) == 2 and lines[0].startswith("no merged model of epoch 1: the merged model takes")
    again = f"coderl merge --adapter_model_id {tmp_path}/run --output_dir {tmp_path}/run-merged"
    assert lines[1].endswith(f"the adapter is saved, to merge it: {again}")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["after"] and "merged" not in summary["paths"] and not (tmp_path / "run-merged").exists()
    monkeypatch.undo()
    assert main([*again.split()[1:], "--device", "cpu"]) == 0
