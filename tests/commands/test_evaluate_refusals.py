"""Calls of ``coderl evaluate`` that cannot work: each ends in one line that says how to fix it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from coderl.cli import main
from tests.commands.test_evaluate import error_of
from tests.support import tiny

ROW = {"text": "Add.", "test_list": ["assert f(1) == 1"]}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with a task and what else gets in the way, on whatever isolation this machine has."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    for name in ("empty", "broken", "o"):
        Path(name).mkdir()
    for name, count in {"five": 5, "o/five": 1, "config": 1, "mbpp": 1, "empty": 0}.items():
        Path(f"{name}.jsonl").write_text((json.dumps(ROW) + "\n") * count)
    Path("w.gguf").touch()
    Path("broken/adapter_config.json").write_text("[]")


@pytest.mark.parametrize(
    ("args", "code", "part"),
    [
        ([], 2, "nothing to evaluate: give --model"),
        (["--model", "m", "--compare", "a", "b"], 2, "--model and --compare do not go together"),
        (["--compare", "a"], 2, "expected 2 arguments"),
        (["--compare", "a", "b"], 1, "a: cannot be read"),
        (["--model", "m", "--temprature", "1"], 2, "did you mean --temperature?"),
        (["--model", "m", "--n_samples", "0"], 2, "n_samples is 0"),
        (["--model", "m", "--k", "0"], 2, "k is 0"),
        (["--model", "m", "--k", "1,,5"], 2, "--k is '1,,5'"),
        (["--model", "m", "--k", ""], 2, "--k is ''"),
        (["--model", "m", "--temperature", "-1"], 2, "temperature is -1.0"),
        (["--model", "m", "--top_p", "0"], 2, "top_p 0.0"),
        (["--model", "m", "--limit", "0"], 2, "--limit is 0"),
        (["--model", "m", "--batch_size", "-1"], 2, "--batch_size is -1"),
        (["--model", "m", "--timeout", "0"], 2, "timeout is 0"),
        (["--model", "m", "--workers", "0"], 2, "workers is 0"),
        (["--model", "m", "--max_length_generation", "0"], 2, "max_length_generation is 0"),
        (["--model", "m", "--tasks", " , "], 2, "no task"),
        (["--model", "m", "--tasks", "mbp"], 2, "did you mean mbpp"),
        (["--model", "m", "--tasks", "five.jsonl,o/five.jsonl"], 2, "two results would be called 'five'"),
        (["--model", "m", "--tasks", "config.jsonl"], 2, "two results would be called 'config'"),
        (["--model", "m", "--tasks", "absent.jsonl"], 1, "no file absent.jsonl"),
        (["--model", "m", "--tasks", "empty.jsonl"], 1, "there are no problems"),
        (["--model", "./m"], 1, "model folder ./m does not exist"),
        (["--model", "empty"], 1, "empty has no config.json"),
        (["--model", "w.gguf"], 1, "w.gguf is a file: give --model its folder and --gguf_file w.gguf"),
        (["--model", "m", "--adapter", "empty"], 1, "no adapter_config.json in empty"),
        (["--model", "broken"], 1, "broken/adapter_config.json: is damaged"),
        (["--model", "MODEL", "--device", "gpu"], 2, "no device 'gpu'"),
        (["--model", "MODEL", "--device", "mps"], 2, "--device mps is not supported"),
        (["--model", "MODEL", "--output", "five.jsonl"], 1, "--output five.jsonl cannot be written to"),
        (["--model", "MODEL", "--output", "/proc/x"], 1, "--output /proc/x cannot be written to"),
        (["--load_generations_path", "absent.json"], 1, "absent.json: cannot be read"),
        (["--load_generations_path", "empty"], 1, "empty: cannot be read (Is a directory)"),
        (["--load_generations_path", "good.json", "--tasks", "mbpp.jsonl,five.jsonl"], 2, "scores one task"),
    ],
)
def test_a_wrong_call_is_refused_in_one_line(
    llama: Path, capsys: pytest.CaptureFixture[str], args: list[str], code: int, part: str
) -> None:
    given = [str(llama) if arg == "MODEL" else arg for arg in args]
    tasks = [] if "--tasks" in given else ["--tasks", "five.jsonl"]
    assert part in error_of(capsys, *given, *tasks, code=code)
    assert Path("five.jsonl").read_text().count("\n") == 5


def test_sequences_longer_than_the_model_reads_are_refused_where_they_are_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = GPT2Config(vocab_size=1024, n_embd=8, n_layer=1, n_head=1, n_positions=40)
    GPT2LMHeadModel(config).save_pretrained("old")
    AutoTokenizer.from_pretrained(tiny.TOKENIZER).save_pretrained("old")
    common = ["--model", "old", "--tasks", "five.jsonl", "--n_samples", "1", "--workers", "1"]
    said = error_of(capsys, *common, "--max_length_generation", "41", code=2)
    assert "old reads 40 tokens at most, not 41 tokens: give --max_length_generation 40 or less" in said
    assert main(["evaluate", *common]) == 0  # as many as it reads


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("nul", "malformed JSON"),
        ("[" * 100_000, "malformed JSON"),
        ("\udcff", "malformed JSON"),
        ('{"a": 1}', "holds a JSON dict"),
        ('["a", "b", "c", "d", "e"]', "entry 0 is not a list of programs"),
        ("[[1], [], [], [], []]", "entry 0 is not a list of programs"),
        ("[[], [], [], [], []]", "has no programs for a problem"),
        ('[["a"], ["b"], ["a", "b"], [], []]', "between 1 and 2 programs"),
        ('[["a"], ["b"]]', "answers 2 problems, five has 5: .*--limit 2 scores the first 2"),
        (json.dumps([["a"]] * 6), "answers 6 problems, five has 5: .* made for$"),
    ],
)
def test_generations_that_do_not_fit_the_task_are_refused_in_one_line(
    text: str, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("g.json").write_text(text, errors="surrogateescape")
    said = error_of(capsys, "--load_generations_path", "g.json", "--tasks", "five.jsonl", "--workers", "1")
    assert re.search(part, said)


def test_a_missing_gpu_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, llama: Path
) -> None:
    common = ("--model", str(llama), "--tasks", "five.jsonl")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "there is no GPU" in error_of(capsys, *common, "--device", "cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert "there are 2 GPUs" in error_of(capsys, *common, "--device", "cuda:2")
