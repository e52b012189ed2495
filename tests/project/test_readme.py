"""What the README says to type works."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from coderl.cli import main

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
STARTED = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines() if " fit -c " in line]
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines() if line.strip()]
ROW = next(text for kind, text in BLOCKS if kind == "json")
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
PROGRAM = json.dumps({"id": 1, "code": "def f(x): return x", "tests": ["assert f(1) == 1"]})
SCORED = {"pass@1": 0.5, "n": 2, "problems": 1, "settings": {}, "ids": ["mbpp/11"], "counted": [2]}
CODELLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
RUN = "checkpoints/embedded-embedded-grpo-qlora"
LESS = "--trainer.max_steps 1 --data.limit_test 1 --data.batch_size 1"
SMALL = f"{LESS} --model.group_size 2 --model.evaluation.n 2"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with quickstart's run in it, on less."""
    folder = tmp_path_factory.mktemp("finished")
    where = ["--trainer.default_root_dir", str(folder / RUN)]
    assert main(["fit", "-c", "quickstart.yaml", *where, *SMALL.split()]) == 0
    return folder


def test_the_readme_has_make_and_coderl_commands() -> None:
    assert {command.split()[0] for command in COMMANDS} == {"make", "coderl"}


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_the_readmes_make_targets_exist(command: str) -> None:
    subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("coderl")])
def test_the_readmes_coderl_commands_run(
    command: str,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Commands on the embedded model run, on less; those on large models are parsed."""
    monkeypatch.chdir(tmp_path)
    if RUN in command:
        shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "problems.jsonl").write_text(ROW)
    (tmp_path / "held_out.jsonl").write_text(ROW.replace("double", "halve"))
    (tmp_path / "programs.jsonl").write_text(PROGRAM)
    (tmp_path / "generations.json").write_text('[["def f(): pass", "def g(): pass"]]')
    for name, correct in (("before", 0), ("after", 1)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"mbpp": SCORED | {"correct": [correct]}}))
    large = "codellama" in command or (command.split()[1] == "fit" and "quickstart" not in command)
    small = SMALL if "fit -c quickstart" in command else "--print_config" if large else ""
    if "load_generations" in command and "CODERL_DATA_DIR" not in os.environ:
        pytest.skip("scores MBPP: CODERL_DATA_DIR names no folder that holds mbpp.jsonl")
    words = shlex.split(command)[1:] + shlex.split(small)
    if "--plan" in words:  # the config.json, which a user has from the hub
        (tmp_path / "codellama").mkdir()
        (tmp_path / "codellama/config.json").write_text(json.dumps(CODELLAMA))
        words[words.index("--plan") + 1] += " --model.policy.model ./codellama"
    assert main(words) == 0, capfd.readouterr().err


@pytest.mark.parametrize("line", STARTED)
def test_the_readmes_launcher_commands_parse(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = re.sub(r"\$\(.*\)", "", line.partition("coderl ")[2]).replace("$run", "run")
    assert main([*shlex.split(command), "--print_config"]) == 0, capfd.readouterr().err


MEMORY = re.findall(r"^\| \d+ GB \| .+? \| `(.+?)` \|", README, flags=re.MULTILINE)


@pytest.mark.parametrize("flags", MEMORY)
def test_the_flags_of_the_memory_table_parse(
    flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(MEMORY) == 9
    assert main(["fit", "-c", "grpo.yaml", *shlex.split(flags), "--print_config"]) == 0, (
        capfd.readouterr().err
    )


def test_the_sandbox_in_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(next(text for text in PYTHON if "Sandbox" in text), "README.md", "exec"), {})
    assert "outcome='passed'" in capsys.readouterr().out


def test_the_example_in_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = next(text for text in PYTHON if "from-python" in text)
    less = "".join(f', "{word}"' for word in SMALL.split())
    head, found, rest = source.partition('"checkpoints/from-python"')
    assert found
    exec(compile(head + found + less + rest, "README.md", "exec"), {})
    assert (tmp_path / "checkpoints" / "from-python" / "summary.json").is_file()


def test_every_path_in_the_readme_exists() -> None:
    for path in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`([\w-]+\.yaml)`", README):
        assert (ROOT / "configs" / name).is_file(), name
