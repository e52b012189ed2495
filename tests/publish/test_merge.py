"""``coderl merge``, called as on the command line: what it writes, how it verifies it, what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from coderl.cli import main
from coderl.errors import UserError
from coderl.model.adapters import LoRA
from coderl.model.architectures import auto_class
from coderl.model.policy import Policy
from coderl.problems.contamination import TrainingRecord
from coderl.publish import card
from coderl.publish.export import save_adapter, save_merged
from coderl.types import ComputeDtype
from tests.evaluation.test_sampling import largest
from tests.support import tiny

pytestmark = pytest.mark.slow

OUT = Path("out/mine")
ADAPTER = Path("run/adapter")
HALVES = ("float32", "float16", "bfloat16")


def adapter(folder: Path, base: Path, scale: float = 0.05, family: str = "llama", **options: Any) -> Path:
    """An adapter that was trained, so to speak, on the base."""
    targets = tiny.LINEARS.get(family, ("q_proj", "v_proj", "down_proj"))
    policy = tiny.policy(base, lora=LoRA(r=4, target_modules=targets), **{"quantization": "nf4"} | options)
    tiny.stir(policy, scale)
    return save_adapter(policy, folder, TrainingRecord.of(tiny.problems()))


@pytest.fixture(scope="module")
def trained(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an adapter on the tiny Llama in NF4."""
    return adapter(tmp_path_factory.mktemp("run") / "run/adapter", llama).parent


@pytest.fixture(scope="module")
def weak(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that does less than the rounding of its base, and its merged model in bfloat16 beside it."""
    made = adapter(tmp_path_factory.mktemp("weak") / "adapter", llama, scale=0.003)
    assert merge("--dtype", "bfloat16", adapter=made, output=made.with_name("merged")) == 0
    return made


@pytest.fixture(autouse=True)
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with that run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "run")
    return tmp_path


def merge(*args: str | Path, adapter: Path | str = ADAPTER, output: Path | str = OUT) -> int:
    given = ["--adapter_model_id", adapter, "--output_dir", output, "--device", "cpu", *args]
    return main(["merge", *map(str, given)])


def error_of(capsys: pytest.CaptureFixture[str], *args: str | Path, code: int = 1, **places: Any) -> str:
    """Merge, demand the exit code and one line that says what is wrong, and give it."""
    capsys.readouterr()
    assert merge(*args, **places) == code
    out, err = capsys.readouterr()
    line = str(err.splitlines()[-1])
    assert out == "" and line.startswith("coderl: error: ") and err.count("coderl: error: ") == 1
    return line


def nothing_left() -> bool:
    """Whether there is neither a model nor a part of one."""
    return not Path("out").exists() or not list(Path("out").iterdir())


def noted(folder: Path = OUT) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / card.MERGE_FILE).read_text())
    return found


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 10, 200, 300]])}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[2, 17, 18, 19]])
    found: torch.Tensor = model.eval()(**inputs).logits
    return found


# --- what it makes


@pytest.mark.parametrize("family", ["llama", "tied", "qwen2", "starcoder2", "t5"])
def test_the_merged_model_is_the_policy_that_was_trained(tmp_path: Path, family: str) -> None:
    tied: dict[str, Any] = {"tie_word_embeddings": True} if family == "tied" else {}
    family = "llama" if tied else family
    base = tiny.checkpoint(tmp_path / "base", family, **tied)
    made = adapter(tmp_path / "adapter", base, family=family)
    assert merge(adapter=made) == 0
    kind = auto_class(AutoConfig.from_pretrained(base))
    # What peft and transformers make of base and adapter, with nothing of ours.
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    loaded = kind.from_pretrained(base, quantization_config=nf4, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(loaded.dequantize(), made)
    merged = kind.from_pretrained(OUT, dtype="auto")
    assert merged.dtype == torch.float32 and not hasattr(merged, "peft_config")
    torch.testing.assert_close(logits(merged), logits(theirs), atol=1e-4, rtol=1e-4)
    with theirs.disable_adapter():
        assert not torch.allclose(logits(merged), logits(theirs), atol=0.1), "the adapter does something"
    assert AutoTokenizer.from_pretrained(OUT)("def f(x):") == AutoTokenizer.from_pretrained(base)("def f(x):")
    assert TrainingRecord.load(OUT) == TrainingRecord.of(tiny.problems())


def test_with_weights_original_the_adapter_is_added_to_the_bases_own_weights(llama: Path) -> None:
    assert merge("--weights", "original") == 0
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, ADAPTER).merge_and_unload()
    merged = AutoModelForCausalLM.from_pretrained(OUT, dtype="auto").state_dict()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(merged[name], value, atol=1e-6, rtol=1e-6)
    assert noted()["quantization"] == "none"


def test_an_adapter_trained_on_plain_weights_is_merged_into_them(llama: Path, tmp_path: Path) -> None:
    plain = adapter(tmp_path / "plain", llama, quantization="none")
    assert merge(adapter=plain) == 0 and noted()["quantization"] == "none"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_merged_model_has_the_precision_of_its_bases_checkpoint_or_the_one_asked_for(
    tmp_path: Path, llama: Path, dtype: str
) -> None:
    wanted = getattr(torch, dtype)
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=wanted)
    base.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "half")
    assert merge("--base_model", tmp_path / "half") == 0
    assert {value.dtype for value in load_file(OUT / "model.safetensors").values()} == {wanted}
    assert noted()["dtype"] == dtype and noted()["verified"]["precision"] == dtype
    assert merge("--base_model", tmp_path / "half", "--dtype", "float32") == 0
    assert {value.dtype for value in load_file(OUT / "model.safetensors").values()} == {torch.float32}


def test_the_sum_of_base_and_adapter_is_rounded_once(llama: Path, tmp_path: Path) -> None:
    """Where a policy computes in bfloat16 too: what an adapter adds is mostly smaller than its steps."""
    AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path)
    weak = str(adapter(tmp_path / "weak", tmp_path, 0.005))
    computing: tuple[ComputeDtype, ...] = ("bfloat16", "float32")
    merged, exact = (
        tiny.policy(tmp_path, quantization="nf4", compute_dtype=compute, adapter=weak).merged(
            getattr(torch, compute)
        )
        for compute in computing
    )
    for (name, got), wanted in zip(merged.named_parameters(), exact.parameters(), strict=True):
        assert torch.equal(got, wanted.to(torch.bfloat16)), name


def test_the_merged_weights_are_made_in_the_cpus_memory(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny.policy(llama)
    monkeypatch.setattr(Policy, "device", torch.device("meta"))  # stands for a GPU
    assert policy.dense_copy().device.type == "meta"
    assert policy.merged().device.type == "cpu"


def test_a_run_is_merged_by_its_folder(folder: Path) -> None:
    assert merge(adapter="run") == 0
    assert noted()["base"] not in ("", None) and str(folder) not in (OUT / card.FILE).read_text()


def test_an_earlier_merged_model_is_replaced_and_models_of_epochs_stay() -> None:
    assert merge() == 0
    shutil.copytree(OUT, OUT / "epoch-1")
    (OUT / "model.safetensors").write_bytes(b"old")
    assert merge() == 0
    assert (OUT / "model.safetensors").stat().st_size > 1000
    assert (OUT / "epoch-1/model.safetensors").stat().st_size > 1000
    assert [path.name for path in OUT.parent.iterdir()] == [OUT.name]


def test_the_base_is_quantized_as_it_was_in_training(llama: Path, tmp_path: Path) -> None:
    """Its weights are cast to what the policy computes in before they are."""
    half = adapter(tmp_path / "half", llama, compute_dtype="bfloat16")
    assert merge(adapter=half) == 0
    policy = tiny.policy(llama, adapter=str(half), quantization="nf4", compute_dtype="bfloat16")
    merged = load_file(OUT / "model.safetensors")
    for name, value in policy.merged(torch.float32).named_parameters():
        assert torch.equal(merged[name], value), name


# --- verification

Mutant = Callable[[Policy, Any], None]


@torch.no_grad()
def added(policy: Policy, merged: Any, times: float, only: str = "") -> None:
    """Add the adapter again, or take it away."""
    for name, module in policy.base.named_modules():
        if hasattr(module, "get_delta_weight") and only in name:
            merged.get_submodule(name).weight.add_(times * module.get_delta_weight("default").float())


@torch.no_grad()
def mistaken_head(policy: Policy, merged: Any) -> None:
    merged.get_output_embeddings().weight.normal_(std=0.2)


@torch.no_grad()
def mistaken_row(policy: Policy, merged: Any) -> None:
    merged.get_output_embeddings().weight[300] += 1.0


@torch.no_grad()
def swapped(policy: Policy, merged: Any) -> None:
    one, other = (merged.model.layers[i].mlp.up_proj.weight for i in (0, 1))
    kept = one.clone()
    one.copy_(other)
    other.copy_(kept)


@torch.no_grad()
def not_finite(policy: Policy, merged: Any) -> None:
    merged.model.layers[0].mlp.up_proj.weight[3, 4] = torch.nan


MUTANTS: dict[str, Mutant] = {
    "missing": lambda policy, merged: added(policy, merged, -1.0),
    "twice": lambda policy, merged: added(policy, merged, 1.0),
    "half": lambda policy, merged: added(policy, merged, -0.5),
    "negated": lambda policy, merged: added(policy, merged, -2.0),
    "layer": lambda policy, merged: added(policy, merged, -1.0, only="layers.1.mlp.down_proj"),
    "head": mistaken_head,
    "row": mistaken_row,
    "swapped": swapped,
    "nan": not_finite,
}


@pytest.fixture
def mutate(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Lets merging go wrong from then on."""

    def set_up(name: str) -> None:
        right = Policy.merged

        def wrong(self: Policy, dtype: torch.dtype, *args: Any) -> Any:
            merged: Any = right(self, torch.float32, *args)
            MUTANTS[name](self, merged)
            return merged.to(dtype)  # rounded once, as a right one is

        monkeypatch.setattr(Policy, "merged", wrong)

    return set_up


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", list(MUTANTS))
def test_a_wrong_merge_is_found_and_nothing_is_left(
    mutate: Callable[[str], None], capsys: pytest.CaptureFixture[str], name: str, dtype: str
) -> None:
    mutate(name)
    line = error_of(capsys, "--dtype", dtype)
    assert "the merged model is not base and adapter: on " in line and "nats a token" in line
    assert nothing_left()


def test_a_wrong_merge_leaves_the_earlier_model(mutate: Callable[[str], None]) -> None:
    assert merge() == 0
    before = {path.name: path.read_bytes() for path in OUT.iterdir()}
    mutate("missing")
    assert merge() == 1
    assert {path.name: path.read_bytes() for path in OUT.iterdir()} == before


@pytest.mark.parametrize("name", ["missing", "twice"])
def test_a_wrong_merge_of_a_weak_adapter_is_found(
    llama: Path, tmp_path: Path, mutate: Callable[[str], None], name: str
) -> None:
    weak = adapter(tmp_path / "weak", llama, scale=0.004)
    assert merge(adapter=weak) == 0
    assert noted()["verified"]["effect"] < 1e-2
    mutate(name)
    assert merge(adapter=weak) == 1


@pytest.mark.parametrize("name", ["missing", "half", "twice", "layer", "negated"])
def test_a_wrong_merge_of_an_adapter_below_the_rounding_of_its_base_is_found(
    weak: Path, mutate: Callable[[str], None], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Divergence is quadratic: the logits cannot tell half of such an adapter from the whole."""
    found = noted(weak.with_name("merged"))["verified"]
    assert 1e-3 < found["effect"] < 5e-3 and found["told"] == found["adapted"] == 6
    assert 0.9 < found["share"][0] <= found["share"][1] < 1.1
    mutate(name)
    line = error_of(capsys, "--dtype", "bfloat16", adapter=weak)
    assert "of what the adapter adds" in line and nothing_left()


def test_layers_whose_change_is_rounded_away_are_counted_and_not_judged(llama: Path, tmp_path: Path) -> None:
    """On bfloat16's own grid a change below half a step is gone."""
    AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "half")
    faint = adapter(tmp_path / "faint", tmp_path / "half", scale=1e-5, quantization="none")
    assert merge(adapter=faint) == 0
    found = noted()["verified"]
    assert (found["told"], found["adapted"], found["share"]) == (0, 6, None)
    assert "in 6 of 6 layers what the adapter adds is below the rounding of bfloat16" in found["words"]
    assert merge("--dtype", "float32", adapter=faint) == 0
    assert noted()["verified"]["told"] == 6


@pytest.mark.parametrize(
    ("family", "compute", "kept"),
    [
        *(("llama", compute, kept) for compute in HALVES for kept in HALVES),
        *((family, dtype, dtype) for family in ("tied", "t5") for dtype in HALVES),
    ],
)
def test_correct_merges_are_far_inside_the_tolerance(
    tmp_path: Path, family: str, compute: ComputeDtype, kept: str
) -> None:
    tied: dict[str, Any] = {"tie_word_embeddings": True} if family == "tied" else {}
    family = "llama" if tied else family
    base = tiny.checkpoint(tmp_path / "base", family, **tied)
    targets = tiny.LINEARS.get(family, ("q_proj", "v_proj", "down_proj"))
    policy = tiny.policy(
        base, quantization="nf4", compute_dtype=compute, lora=LoRA(r=4, target_modules=targets)
    )
    tiny.stir(policy)
    save_merged(policy, tmp_path / "merged", dtype=getattr(torch, kept))
    found = noted(tmp_path / "merged")["verified"]
    assert found["kl"] < found["allowed"] / 3 and found["logit"] < found["allowed_logit"] / 3
    assert found["tokens"] > 150 and found["effect"] > 3 * found["allowed"]


def test_weights_that_all_trained_keep_their_precision(llama: Path, tmp_path: Path) -> None:
    whole = tiny.policy(llama, lora=None)
    save_merged(whole, tmp_path / "merged")
    found = noted(tmp_path / "merged")
    assert (found["dtype"], found["verified"]["effect"]) == ("float32", None)
    assert found["verified"]["kl"] == 0


# --- what it refuses


def broken(name: str) -> Path:
    """An adapter that cannot be merged, in one of many ways."""
    folder = Path(shutil.copytree("run/adapter", "bad"))
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = folder / "adapter_model.safetensors"
    if name == "weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif name == "missing weights":
        weights.unlink()
    elif name == "another base's":
        kept = load_file(weights)
        save_file({key: torch.cat([value] * 2, dim=-1) for key, value in kept.items()}, weights)
    elif name == "another layout":
        kept = load_file(weights)
        save_file({key.replace("q_proj", "c_attn"): value for key, value in kept.items()}, weights)
    elif name == "json":
        (folder / "adapter_config.json").write_text('{"peft_type":')
    elif name == "list":
        (folder / "adapter_config.json").write_text("[]")
    elif name == "problems":
        (folder / "training_problems.json").write_text("{")
    else:
        config |= json.loads(name)
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("weights", "could not be loaded"),
        ("missing weights", "could not be loaded"),
        ("another base's", "size mismatch"),
        ("another layout", "does not fit its base"),
        ("json", "adapter_config.json"),
        ("list", "adapter_config.json"),
        ("problems", "training_problems.json"),
        ('{"base_model_name_or_path": "/gone/model"}', "give it as --base_model BASE --adapter_model_id bad"),
        ('{"base_model_name_or_path": "./gone"}', "give it as --base_model BASE --adapter_model_id bad"),
        ('{"base_model_name_or_path": "~/gone"}', "give it as --base_model BASE --adapter_model_id bad"),
        ('{"base_model_name_or_path": null}', "names no base model"),
        ('{"use_dora": true}', "LoRA with use_dora"),
        ('{"modules_to_save": ["lm_head"]}', "LoRA with modules_to_save"),
        ('{"bias": "all"}', "LoRA with bias all"),
        ('{"peft_type": "IA3"}', "a IA3 adapter"),
        ('{"peft_type": null}', "adapter_config.json has no peft_type"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused(
    capsys: pytest.CaptureFixture[str], kind: str, part: str
) -> None:
    assert part in error_of(capsys, adapter=broken(kind)) and nothing_left()


@pytest.mark.parametrize(
    ("args", "places", "code", "part"),
    [
        ([], {"output": ""}, 2, "give --adapter_model_id DIR"),
        ([], {"adapter": "./nowhere"}, 1, "there is no folder ./nowhere"),
        ([], {"adapter": "run/logs/adapter"}, 1, "there is no folder run/logs/adapter"),
        (
            [],
            {"adapter": "run/adaptor"},
            1,
            "run/adaptor is no folder here, and cannot be fetched from the hub",
        ),
        ([], {"adapter": "file"}, 1, "no adapter_config.json in file"),
        ([], {"adapter": "."}, 1, "no adapter_config.json in ."),
        ([], {"output": "file"}, 1, "is a file: name a folder"),
        ([], {"output": "file/below"}, 1, "nothing can be written to"),
        ([], {"output": "run"}, 1, "not empty and holds no merged model"),
        ([], {"output": "run/adapter"}, 1, "not empty and holds no merged model"),
        ([], {"output": "run/adapter/merged"}, 1, "are in one place"),
        ([], {"output": "/sys/merged"}, 1, "/sys"),
        (["--hub_model_id", "me/it"], {}, 2, "add --push_to_hub"),
        (["--push_to_hub", "--hub_model_id", "me/it/too"], {}, 2, "'me/it/too' is no hub id"),
        (["--gguf_file", "x.gguf"], {}, 2, "--gguf_file is a file in the folder --base_model"),
        (["--base_model", "./nowhere"], {}, 1, "model folder ./nowhere does not exist"),
        (["--base_model", "file"], {}, 1, "file is a file: give --base_model its folder"),
        (["--device", "tpu"], {}, 2, "no device 'tpu'"),
        (["--dtype", "int8"], {}, 2, "dtype: expected one of 'auto'"),
        (["--weights", "mine"], {}, 2, "weights"),
    ],
)
def test_calls_that_cannot_work_are_refused_and_change_nothing(
    capsys: pytest.CaptureFixture[str], args: list[str], places: dict[str, str], code: int, part: str
) -> None:
    Path("file").write_text("mine")
    assert part in error_of(capsys, *args, code=code, **places)
    assert nothing_left() and Path("file").read_text() == "mine"
    assert not list(Path("run").rglob(".*"))


def test_nothing_else_than_a_merged_model_is_replaced(
    llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in llama.iterdir())
    assert "nothing in it is overwritten" in error_of(capsys, output=llama)
    assert sorted(path.name for path in llama.iterdir()) == before


def test_a_merged_model_that_is_the_base_is_not_replaced_by_what_is_made_from_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert merge() == 0
    second = adapter(tmp_path / "second", OUT)
    assert "are in one place" in error_of(capsys, adapter=second)
    assert merge(adapter=second, output="out/second") == 0


def test_an_adapter_of_plain_weights_has_no_nf4_to_go_back_to(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = adapter(tmp_path / "plain", llama, quantization="none")
    line = error_of(capsys, "--weights", "dequantized", adapter=plain, code=2)
    assert "give --weights original" in line


@pytest.mark.parametrize("lacking", ["disk", "memory"])
def test_a_lack_of_disk_or_memory_is_found_before_the_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    left = SimpleNamespace(free=1000, available=1000)
    asked = {
        "disk": "coderl.publish.export.shutil.disk_usage",
        "memory": "coderl.publish.export.psutil.virtual_memory",
    }
    monkeypatch.setattr(asked[lacking], lambda *_: left)
    monkeypatch.setattr(Policy, "merged", None)
    line = error_of(capsys)
    assert "the merged model takes 0.8 MB in float32" in line and "0.0 MB" in line and nothing_left()


def test_a_disk_that_gets_full_during_the_merge_leaves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    with largest(200_000):
        assert merge() == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{OUT.name} could not be written" in line and nothing_left()


def test_a_disk_that_is_full_at_the_tokenizer_leaves_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise Exception("No space left on device (os error 28)")  # as the writer of tokenizers does

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    assert "could not be written: No space left on device" in error_of(capsys) and nothing_left()


def test_a_replaced_model_loses_its_own_files_and_keeps_the_users() -> None:
    assert merge() == 0
    for name in ("model-F16.gguf", "notes.txt", ".git/config", "epoch-1/x"):
        (OUT / name).parent.mkdir(exist_ok=True)
        (OUT / name).write_text("mine")
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "chat_template.jinja"):
        (OUT / name).write_text("of an earlier model")
    before = {path.name for path in OUT.iterdir()}
    assert merge() == 0
    left = before - {path.name for path in OUT.iterdir()}
    assert left == {"model-00001-of-00002.safetensors", "model.safetensors.index.json", "chat_template.jinja"}
    assert (OUT / ".git/config").read_text() == (OUT / "epoch-1/x").read_text() == "mine"


def test_a_merged_model_has_the_rights_that_the_umask_gives() -> None:
    old = os.umask(0o022)
    try:
        assert merge() == 0
    finally:
        os.umask(old)
    assert OUT.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in OUT.iterdir()} == {0o644}


def test_a_layer_that_shares_its_weights_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sum would have to be in one place and not in the other."""
    base = tiny.checkpoint(tmp_path / "base", tie_word_embeddings=True)
    with pytest.raises(UserError, match="lm_head shares its weights"):
        tiny.policy(base, lora=LoRA(r=4, target_modules=("q_proj", "lm_head")))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft says as much
        given = get_peft_model(plain, LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM"))
        given.save_pretrained(str(tmp_path / "foreign"))
    assert "shares its weights" in error_of(capsys, adapter=tmp_path / "foreign") and nothing_left()
    free = tiny.checkpoint(tmp_path / "free")
    assert tiny.policy(free, lora=LoRA(r=4, target_modules=("lm_head",))).net is not None


@pytest.mark.parametrize("moment", ["coderl.publish.export.Probe.check", "coderl.publish.export.card.write"])
def test_ctrl_c_leaves_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(moment, stop)
    assert merge() == 1 and nothing_left()
    assert capsys.readouterr().err.splitlines()[-1] == "coderl: interrupted"


def test_a_mount_point_cannot_be_replaced(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    OUT.mkdir(parents=True)
    monkeypatch.setattr(Path, "is_mount", lambda self: self.name == OUT.name)
    assert "name a folder in it" in error_of(capsys)
