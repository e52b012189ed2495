"""Each family with a preset, as its repository on the hub is: trained, merged and evaluated by command.

One GRPO and one PPO step through the command line in NF4. See tests/families.py for what is real here, and
tests/test_family_tokenizers.py for the tokenizers.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

from coderl.cli import main
from coderl.model.adapters import LoRA
from coderl.model.architectures import auto_class
from coderl.model.policy import Policy
from coderl.types import Problem
from tests.support import families
from tests.support.families import FAMILIES

pytestmark = pytest.mark.slow

RANK, ALPHA = 8, 32
SHORT = (
    "--trainer.max_steps 1 --trainer.accelerator cpu --trainer.logger true --data.batch_size 4 "
    "--data.source Embedded --data.limit_test 1 --model.max_new_tokens 8 --model.group_size 4 "
    "--model.evaluation.n 2 --model.evaluation.max_length_generation 80 --model.sandbox.workers 1 "
    # So much that one step shows, and evaluates otherwise than the base.
    f"--model.learning_rate 0.02 --model.policy.lora.r {RANK} --model.policy.lora.alpha {ALPHA}"
)
PROMPT = '"""\nReturn  twice 12 ( x ) .\nassert f(1) == [1,    22]\n"""\n'


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("repositories")
    return {name: families.checkpoint(parent, name) for name in FAMILIES}


def policy_of(folder: Path, **options: Any) -> Policy:
    made = Policy(str(folder), **({"quantization": "none", "lora": None} | options))
    made.load(torch.device("cpu"), for_training=False)
    return made


# --- a step of training


class Run(NamedTuple):
    """A finished fit."""

    family: str
    method: str
    base: Path
    root: Path
    log: str

    @property
    def merged(self) -> Path:
        return self.root.with_name(f"{self.root.name}-merged")

    def metrics(self) -> dict[str, float]:
        """Of its one step."""
        (path,) = self.root.rglob("metrics.csv")
        with path.open(newline="") as file:
            row = next(row for row in csv.DictReader(file) if row["policy/ratio"])
        return {key: float(value) for key, value in row.items() if value}


def model_in(folder: Path) -> Any:
    """The model in plain transformers."""
    config = AutoConfig.from_pretrained(folder)
    return auto_class(config).from_pretrained(folder, dtype=torch.float32).eval()


def linear_layers(model: nn.Module) -> set[str]:
    """Of the blocks: all but the head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return {
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    }


@pytest.fixture(
    scope="module", params=[f"{name} {method}" for name in FAMILIES for method in ("grpo", "ppo")]
)
def done(
    request: pytest.FixtureRequest,
    repositories: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Run]:
    name, method = request.param.split()
    base = repositories[name]
    root = tmp_path_factory.mktemp("runs") / f"{base.name.lower()}-embedded-{method}-qlora"
    args = f"fit -c {method}.yaml --model.policy.model {base} {SHORT} --trainer.default_root_dir {root}"
    if method == "ppo":
        args += " --model.inner_epochs 1"
    log = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(log):
        patch.setenv("HF_ALLOW_CODE_EVAL", "1")
        patch.chdir(root.parent)
        code = main(args.split())
        assert code == 0, log.getvalue()
        yield Run(name, method, base, root, log.getvalue())


def test_a_step_trains_an_adapter_on_every_linear_layer_of_the_blocks(done: Run) -> None:
    assert f"preset {done.family} (by the model's name)" in done.log
    adapter = load_file(done.root / "adapter" / "adapter_model.safetensors")
    expected = linear_layers(model_in(done.base))
    assert {name.rpartition(".")[2] for name in expected} == set(FAMILIES[done.family].linears)
    weights = {name.removeprefix("base_model.model."): weight for name, weight in adapter.items()}
    assert weights.keys() == {f"{name}.lora_{side}.weight" for name in expected for side in "AB"}
    assert not {name for name, weight in weights.items() if not weight.any()}  # B starts at zero


def test_a_step_starts_from_the_policy_that_sampled(done: Run) -> None:
    metrics = done.metrics()
    assert metrics["policy/ratio"] == pytest.approx(1, abs=1e-5)
    assert abs(metrics["mismatch_kl"]) < 1e-3
    assert metrics["policy/kl"] == pytest.approx(0, abs=1e-6)
    assert done.method == "ppo" or metrics["groups/no_signal"] < 1  # it had something to learn from


def test_the_summary_names_the_files_that_exist(done: Run) -> None:
    summary = json.loads((done.root / "summary.json").read_text())
    assert (summary["method"], summary["model"], summary["steps"]) == (done.method, str(done.base), 1)
    assert summary["before"]["problems"] == summary["after"]["problems"] == 1
    assert summary["after"]["infra_errors"] == 0
    assert {"adapter", "merged", "metrics"} <= summary["paths"].keys()
    assert all(Path(path).exists() for path in summary["paths"].values())


def in_nf4(weight: Tensor) -> Tensor:
    """What a 4-bit layer made of a weight computes with."""
    packed, state = bitsandbytes.functional.quantize_4bit(weight.float(), quant_type="nf4")
    dense: Tensor = bitsandbytes.functional.dequantize_4bit(packed, state)
    return dense


def test_the_merged_weights_are_the_base_plus_the_adapter(done: Run) -> None:
    """In the precision of the base's checkpoint."""
    base, merged = model_in(done.base).state_dict(), model_in(done.merged).state_dict()
    stored = getattr(torch, FAMILIES[done.family].config["torch_dtype"])
    unit = torch.finfo(stored).eps
    adapter = load_file(done.root / "adapter" / "adapter_model.safetensors")
    layers = {f"{name}.weight" for name in linear_layers(model_in(done.base))}
    assert base.keys() == merged.keys()
    for name, weight in base.items():
        if name in layers:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            change = ALPHA / RANK * adapter[f"{stem}.lora_B.weight"] @ adapter[f"{stem}.lora_A.weight"]
            held = weight if stem.rpartition(".")[2] in FAMILIES[done.family].plain else in_nf4(weight)
            torch.testing.assert_close(merged[name], held + change, atol=1e-5, rtol=unit)
            assert float((merged[name] - held).norm()) > 0.5 * float(change.norm()) > 0
        else:
            assert torch.equal(merged[name], weight), name


@pytest.fixture(scope="module")
def exact(done: Run) -> Path:
    """The merged model again, by command and without rounding its weights."""
    output = done.root.with_name(f"{done.root.name}-exact")
    args = f"merge --adapter_model_id {done.root} --output_dir {output} --dtype float32 --device cpu"
    assert main(args.split()) == 0
    return output


ONE_METHOD = pytest.mark.parametrize("done", [f"{name} grpo" for name in FAMILIES], indirect=True)
"""What a run leaves is of one form for both."""


@ONE_METHOD
@torch.no_grad()
def test_merged_models_in_transformers_compute_the_logits_of_base_and_adapter(done: Run, exact: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(exact)
    inputs = dict(tokenizer(PROMPT, return_tensors="pt"))
    inputs.pop("token_type_ids", None)
    policy = policy_of(done.base, quantization="nf4", adapter=str(done.root / "adapter"), lora=LoRA())
    assert inputs["input_ids"][0].tolist() == policy.encode(Problem(id="p", prompt=PROMPT))
    if policy.base.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[0, 1, 20, 21]])
    net = policy.net.eval()
    logits = net(**inputs).logits
    torch.testing.assert_close(model_in(exact)(**inputs).logits, logits, atol=1e-3, rtol=1e-4)
    with net.disable_adapter():
        effect = float((net(**inputs).logits - logits).std())
    rounding = float((model_in(done.merged)(**inputs).logits - logits).std())
    assert rounding < 0.05 * effect


def evaluated(model: Path, output: str) -> tuple[dict[str, Any], list[list[str]]]:
    """The scores of a small evaluation, and the programs."""
    args = f"evaluate --model {model} --tasks own.jsonl --n_samples 4 --k 1 --max_length_generation 64"
    args += f" --temperature 1 --top_p 1 --workers 1 --output {output}"
    assert main(args.split()) == 0
    (path,) = Path(output).glob("evaluation_results_*.json")
    (programs,) = Path(output).glob("generations_*.json")
    return json.loads(path.read_text())["own"], json.loads(programs.read_text())


@ONE_METHOD
def test_adapter_and_merged_model_have_the_same_scores(done: Run, exact: Path, tmp_path: Path) -> None:
    rows = [
        {
            "task_id": i,
            "prompt": f"def f():\n    return {i}\n# {'one ' * i}{i}",
            "test": f"def check(candidate):\n    assert candidate() == {i}\n",
            "entry_point": "f",
        }
        for i in range(3)
    ]
    Path("own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    score, programs = evaluated(done.root, str(tmp_path / "adapter"))
    again, same = evaluated(exact, str(tmp_path / "merged"))
    assert (again["pass@1"], again["correct"], same) == (score["pass@1"], score["correct"], programs)
    assert score["counted"] == [4, 4, 4]
    assert len({program for row in programs for program in row}) > 4
