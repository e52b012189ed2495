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
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signals_of_schedulers_save_the_step_and_say_how_to_resume(
    config: str, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    options = ("--model.interrupt_at", "1", "--model.interrupt_by", str(int(number)), *INTERRUPTIBLE)
    assert main(["fit", "-c", config, *options]) == 1
    assert torch.load(RUN / "checkpoints/last.ckpt")["global_step"] == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("coderl: interrupted; go on with: coderl fit --config ")
    assert any(f"{number.name} again stops at once" in line for line in said)
    assert signal.getsignal(number) is before


def test_nohup_stays_in_force(config: str) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        options = ("--model.interrupt_at", "1", "--model.interrupt_by", str(int(signal.SIGHUP)))
        assert main(["fit", "-c", config, *options, *INTERRUPTIBLE]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert torch.load(RUN / "checkpoints/last.ckpt")["global_step"] == 4


def test_slurm_requeues_a_job_which_then_goes_on(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = Path("tools").absolute()
    tools.mkdir()
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tools}/called\n')
    (tools / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    job = {"SLURM_JOB_ID": "42", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    job |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS_PER_NODE": "1"}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    options = ("--model.interrupt_by", str(int(signal.SIGUSR1)), *INTERRUPTIBLE)
    assert main(["fit", "-c", config, "--model.interrupt_at", "1", *options]) == 1
    assert (tools / "called").read_text() == "requeue 42\n"
    requeued, last = (torch.load(path) for path in (RUN / "hpc_ckpt_1.ckpt", RUN / "checkpoints/last.ckpt"))
    assert requeued["global_step"] == last["global_step"] == 2
    assert requeued["loops"] == last["loops"] and requeued["to_follow"] == last["to_follow"]
    (RUN / "hpc_ckpt_1.ckpt").write_bytes(b"PK")  # last.ckpt stands in for it
    # The same command again is refused to anybody but SLURM.
    assert main(["fit", "-c", config, *options]) == 1
    assert "is not empty" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    cli = run(["fit", "-c", config, *options])
    assert cli is not None and cli.trainer.global_step == 4
    assert len(cli.model.steps) == 2


def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fit("--data.size", "4", "--checkpoint.every_n_train_steps", "3")
    last = RUN / "checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[:-100])
    cli = fit("--data.size", "4", "--ckpt_path", str(last))
    said = capsys.readouterr().err
    assert "last.ckpt is damaged" in said and "going on from" in said and "step 3\n" in said
    assert cli.trainer.global_step == 4 and len(cli.model.steps) == 1
    assert torch.load(last)["global_step"] == 4
    assert error_of(capsys, "test", "-c", config, "--ckpt_path", str(RUN / "config.yaml"), code=1)


def test_what_a_resumed_run_changes_is_said_in_one_line_each(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fit("--model.group_size", "4", "--data.size", "4")
    again = ("--ckpt_path", "last", "--data.size", "4", "--trainer.max_epochs", "2")
    capsys.readouterr()
    fit("--model.group_size", "5", "--checkpoint.every_n_train_steps", "2", *again)
    lines = [line for line in capsys.readouterr().out.splitlines() if "in the checkpoint" in line]
    assert lines == [
        "coderl: checkpoint.every_n_train_steps: 25 in the checkpoint, 2 from here on",
        "coderl: model.group_size: 4 in the checkpoint, 5 from here on",
        "coderl: trainer.max_epochs: 1 in the checkpoint, 2 from here on",
    ]
    assert main(["test", "-c", config, "--model.group_size", "6", "--ckpt_path", "last"]) == 0
    assert "in the checkpoint" not in capsys.readouterr().out


def test_a_checkpoint_folder_of_ones_own_has_the_last_step_too(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--checkpoint.dirpath", "elsewhere", "--model.interrupt_at", "1", *INTERRUPTIBLE)
    assert main(["fit", "-c", config, *options]) == 1
    path = Path("elsewhere/last.ckpt").absolute()
    assert f"--ckpt_path {path}" in capsys.readouterr().err
    assert torch.load(path)["global_step"] == 2 and not list(RUN.rglob("*.ckpt"))
    cli = fit(*options, "--ckpt_path", "last", "--checkpoint.every_n_train_steps", "1")
    assert len(cli.model.steps) == 2 and cli.trainer.global_step == 4
    assert sorted(one.name for one in path.parent.iterdir() if "last" in one.name) == ["last.ckpt"]


def test_last_is_never_the_start(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Without last.ckpt, such as in another folder by mistake, no run is trained over from its start."""
    line = error_of(capsys, "fit", "-c", config, "--ckpt_path", "last", code=1)
    assert "no checkpoint" in line and "last.ckpt" in line
    fit("--data.size", "4", "--checkpoint.every_n_train_steps", "3")
    (RUN / "checkpoints/last.ckpt").unlink()
    capsys.readouterr()
    cli = fit("--data.size", "4", "--ckpt_path", "last")
    assert cli.trainer.global_step == 4 and len(cli.model.steps) == 1
    assert "no checkpoint" in (said := capsys.readouterr().err) and "step 3\n" in said
    (RUN / "checkpoints/last.ckpt").unlink()
    assert "last.ckpt" in error_of(capsys, "test", "-c", config, "--ckpt_path", "last", code=1)


def test_an_error_in_a_fit_says_how_to_go_on(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = fakes.Tiny.training_step

    def broken(self: fakes.Tiny, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if batch_idx == 2:
            raise UserError("the reward failed")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(fakes.Tiny, "training_step", broken)
    assert main(["fit", "-c", config, "--data.size", "4"]) == 1
    *_, way, error = capsys.readouterr().err.splitlines()
    assert error == "coderl: error: the reward failed"
    assert way.startswith("coderl: step 2 is saved; go on with: coderl fit --config ")
    assert torch.load(RUN / "checkpoints/last.ckpt")["global_step"] == 2


def test_a_disk_that_is_full_while_metrics_are_written_ends_the_fit_in_two_lines_with_its_step_saved(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = ExperimentWriter.save

    def full(self: ExperimentWriter) -> None:
        if any(row.get("step") == 2 for row in self.metrics):
            raise OSError(errno.ENOSPC, "No space left on device", self.metrics_file_path)
        save(self)

    monkeypatch.setattr(ExperimentWriter, "save", full)
    logs = ("--trainer.logger", "CSVLogger")
    assert main(["fit", "-c", config, "--data.size", "4", *logs]) == 1
    *_, way, error = capsys.readouterr().err.splitlines()
    assert way.startswith("coderl: step 3 is saved; go on with: coderl fit --config ")
    assert error.startswith("coderl: error: the disk is full at ") and "metrics.csv: make room" in error
    assert torch.load(RUN / "checkpoints/last.ckpt")["global_step"] == 3


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
