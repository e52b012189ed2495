"""``main`` and ``run`` with a fake model and fake data: nothing here needs weights."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from coderl import __version__
from coderl.callbacks import CompletionTable
from coderl.cli import main, run
from coderl.cli.entry import COMMANDS, TOOLS
from coderl.cli.trainer import CoderlCLI
from coderl.errors import UsageError, UserError
from tests.support import fakes

FAKES: dict[str, Any] = {
    "model": {
        "class_path": "tests.support.fakes.Tiny",
        "init_args": {"policy": {"class_path": "tests.support.fakes.Policy"}},
    },
    "data": {"class_path": "tests.support.fakes.TinyData"},
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    },
}
RUN = Path("checkpoints/tiny-model-tinydata-tiny-qlora")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A config file in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(fakes.__file__).parents[2]))
    Path("fakes.yaml").write_text(yaml.safe_dump(FAKES))
    return "fakes.yaml"


def fit(*args: str) -> CoderlCLI:
    cli = run(["fit", "--config", "fakes.yaml", *args])
    assert cli is not None
    return cli


def error_of(capsys: pytest.CaptureFixture[str], *args: str, code: int) -> str:
    """Run, demand the exit code and one single line on stderr, and return the line."""
    assert main(list(args)) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if "Seed set to" not in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("coderl: error: ")
    return lines[0]


def test_help_lists_the_commands_within_half_a_second() -> None:
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        help_call = [sys.executable, "-m", "coderl", "--help"]
        shown = subprocess.run(help_call, capture_output=True, text=True, check=True)
        best = min(best, time.perf_counter() - start)
        assert all(f"\n  {name} " in shown.stdout for name in COMMANDS)
        assert not shown.stderr
    assert best < 0.5


def test_help_lists_the_commands_that_the_parser_has() -> None:
    assert COMMANDS.keys() - TOOLS.keys() == CoderlCLI.subcommands().keys()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"coderl {__version__}\n"


def test_fit_help_describes_the_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--help"]) == 0
    assert "--trainer.max_epochs" in capsys.readouterr().out
    assert main(["fit", "--model.help", "tests.support.fakes.Tiny"]) == 0
    assert "Completions per problem." in capsys.readouterr().out


def test_flags_win_over_configs_and_configs_over_the_environment(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODERL_FIT__TRAINER__MAX_STEPS", "3")
    monkeypatch.setenv("CODERL_FIT__TRAINER__MAX_EPOCHS", "7")
    Path("more.yaml").write_text("model: {init_args: {group_size: 4}}")
    assert main(["fit", "-c", config, "-c", "more.yaml", "--data.size", "5", "--print_config"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["trainer"]["max_steps"] == 3
    assert shown["trainer"]["max_epochs"] == FAKES["trainer"]["max_epochs"]
    assert shown["model"]["init_args"]["group_size"] == 4
    assert shown["data"]["init_args"]["size"] == 5
    assert shown["seed_everything"] == 42
    assert not Path("checkpoints").exists()


@pytest.mark.slow
def test_shell_completion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print_completion", "shtab-bash"]) == 0
    assert "--trainer.max_epochs" in capsys.readouterr().out


def test_a_run_writes_its_folder_and_is_never_overwritten(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "-c", config]) == 0
    written = {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()}
    assert RUN / "config.yaml" in written
    assert RUN / "checkpoints/last.ckpt" in written
    capsys.readouterr()
    line = error_of(capsys, "fit", "-c", config, code=1)
    assert "--trainer.default_root_dir" in line
    assert "--ckpt_path" in line
    assert {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()} == written


def test_run_takes_a_dict(config: str) -> None:
    cli = run({"subcommand": "fit", "fit": FAKES})
    assert cli is not None
    assert cli.trainer.global_step == 2


def test_of_several_coderl_callbacks_of_a_class_the_last_is_used(config: str) -> None:
    entries = "{class_path: CompletionTable, init_args: {rows: %d}}, {class_path: ModelSummary}"
    Path("under.yaml").write_text(f"trainer.callbacks: [{entries % 4}]")
    Path("over.yaml").write_text(f"trainer.callbacks+: [{entries % 2}]")
    cli = fit("-c", "under.yaml", "-c", "over.yaml")
    kinds = [type(callback).__name__ for callback in cli.trainer.callbacks]  # type: ignore[attr-defined]
    assert (kinds.count("CompletionTable"), kinds.count("ModelSummary")) == (1, 2)
    [table] = [c for c in cli.trainer.callbacks if isinstance(c, CompletionTable)]  # type: ignore[attr-defined]
    assert table.rows == 2


def test_flags_win_over_the_hyper_parameters_of_a_resumed_checkpoint(config: str) -> None:
    fit("--model.group_size", "4")
    checkpoint = RUN / "checkpoints/last.ckpt"
    assert torch.load(checkpoint)["hyper_parameters"]["group_size"] == 4
    cli = fit("--ckpt_path", str(checkpoint), "--model.group_size", "99", "--trainer.max_epochs", "2")
    assert cli.model.group_size == 99
    assert cli.trainer.global_step == 4
    first, second = (yaml.safe_load((RUN / name).read_text()) for name in ("config.yaml", "config-2.yaml"))
    assert first["model"]["init_args"]["group_size"] == 4
    assert second["model"]["init_args"]["group_size"] == 99


def test_the_saved_config_repeats_the_run(config: str) -> None:
    fit("--model.group_size", "4", "--seed_everything", "7")
    saved = yaml.safe_load((RUN / "config.yaml").read_text())
    assert saved["seed_everything"] == 7
    again = run(["fit", "-c", str(RUN / "config.yaml"), "--trainer.default_root_dir", "again"])
    assert again is not None
    assert again.model.group_size == 4


INTERRUPTIBLE = ("--trainer.callbacks+", "SaveOnInterrupt", "--data.size", "4")


def test_an_interrupted_fit_says_how_to_resume(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    assert main(["fit", "-c", config, "--model.interrupt_at", "1", *INTERRUPTIBLE]) == 1
    assert torch.load(RUN / "checkpoints/last.ckpt")["global_step"] < 4
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("coderl: interrupted; go on with: coderl fit --config ")
    assert signal.getsignal(signal.SIGINT) is before
    command = line.partition("go on with: coderl ")[2].split()
    cli = run([*command, "--model.interrupt_at", "null"])
    assert cli is not None
    assert cli.trainer.global_step == 4


def test_an_interrupt_before_the_first_checkpoint_says_so(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "-c", config, "--model.interrupt_at", "0"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "coderl: interrupted; no checkpoint was written yet"


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ([], ["no command"]),
        (["fti"], ["unknown command 'fti'", "fit?"]),
        (["fit", "-c", "absent.yaml"], ["absent.yaml"]),
        (["fit"], ["no data and model given", "--config quickstart.yaml"]),
        (
            ["fit", "--model", "tests.support.fakes.Tiny", "--model.policy", "tests.support.fakes.Policy"],
            ["no data given"],
        ),
        (["fit", "-c", "fakes.yaml", "--foo", "1"], ["--foo"]),
        (["fit", "-c", "fakes.yaml", "--trainer.max_epoch", "1"], ["did you mean --trainer.max_epochs?"]),
        (["fit", "-c", "fakes.yaml", "--trainer.max_epochs", "x"], ["trainer.max_epochs", "int", "'x'"]),
        (["fit", "-c", "fakes.yaml", "--trainer.gradient_clip_val", "x"], ["int or float"]),
        (["fit", "-c", "fakes.yaml", "--model.group_siz", "1"], ["model", "did you mean group_size?"]),
        (["fit", "-c", "fakes.yaml", "--model.group_size", "x"], ["model.group_size", "int", "'x'"]),
        (["fit", "-c", "fakes.yaml", "--model.policy.modl", "x"], ["model.policy", "did you mean model?"]),
        (["fit", "-c", "fakes.yaml", "--model", "Nope"], ["model", "no class 'Nope'"]),
        (["fit", "-c", "fakes.yaml", "--trainer.callbacks+", "ModelChekpoint"], ["mean ModelCheckpoint?"]),
        (["fit", "-c", "fakes.yaml", "--trainer.callbacks+", "OnExceptionCheckpoint"], ["needs dirpath"]),
        (["fit", "-c", "fakes.yaml", "-c", "trainer: {max_epoch: 1}"], ["did you mean trainer.max_epochs?"]),
        (["fit", "-c", "fakes.yaml", "-c", "modle: {class_path: X}"], ["modle", "did you mean model?"]),
        (["fit", "-c", "fakes.yaml", "-c", "model: ["], ["--config: ", "line 2"]),
        (["fit", "-c", "broken.yaml"], ["broken.yaml: ", "line 3"]),
        (["fit", "-c", "list.yaml"], ["list.yaml: ", "- a"]),
        (["fit", "-c", "fakes.yaml", "--config"], ["--config", "expected one argument"]),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(
    config: str, capsys: pytest.CaptureFixture[str], args: list[str], parts: list[str]
) -> None:
    Path("broken.yaml").write_text("model:\n  class_path: [\n")
    Path("list.yaml").write_text("- a")
    line = error_of(capsys, *args, code=2)
    assert all(part in line for part in parts), line
    assert not Path("checkpoints").exists()


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["--ckpt_path", "absent.ckpt"], "no checkpoint absent.ckpt"),
        (["--ckpt_path", "fakes.yaml"], "damaged or no checkpoint"),
        (["--trainer.accelerator", "cuda"], "MPS|CUDA|accelerator"),
        (["--trainer.default_root_dir", "fakes.yaml"], "is a file"),
        (["--model.fail", "true"], "the weights are missing"),
    ],
)
def test_an_unusable_file_or_value_is_one_line_and_exit_code_1(
    config: str, capsys: pytest.CaptureFixture[str], args: list[str], part: str
) -> None:
    if args[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    line = error_of(capsys, "fit", "-c", config, *args, code=1)
    assert any(alternative in line for alternative in part.split("|")), line


def test_run_raises_errors(config: str) -> None:
    with pytest.raises(UsageError, match="unknown command"):
        run(["fti"])
    with pytest.raises(UserError, match="no checkpoint"):
        fit("--ckpt_path", "absent.ckpt")


def test_a_bug_keeps_its_traceback(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(fakes.Tiny, "training_step", broken)
    with pytest.raises(ZeroDivisionError):
        main(["fit", "-c", config])


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_and_no_process(config: str) -> None:
    """A real SIGINT to a real process group, as a terminal sends it."""
    args = ["--model.pause", "0.05", *INTERRUPTIBLE, "--data.size", "10000"]
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "coderl", "fit", "-c", config, *args],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    started = time.monotonic()
    while not Path("stepped").exists() and time.monotonic() - started < 60:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert "go on with: coderl fit" in err
    assert list(RUN.rglob("*.ckpt"))
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "run/metrics.csv")

    monkeypatch.setattr("coderl.cli.entry.run", full)
    assert main(["fit"]) == 1
    assert capsys.readouterr().err.startswith("coderl: error: the disk is full at run/metrics.csv: make room")
