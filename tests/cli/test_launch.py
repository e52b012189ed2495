"""Runs of two processes, started by each launcher that the README names: Lightning, torchrun, SLURM."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from coderl.cli import main

# Each start imports torch twice, on whatever cores are left.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
BIN = Path(sys.executable).parent
RANKS = ("--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp")
SHORT = (
    *("-c", "quickstart.yaml", "--data.limit_test", "2", "--data.batch_size", "2", "--model.group_size", "3"),
    *("--model.warmup_steps", "0", "--model.evaluation.n", "1", "--model.evaluation.ks", "[1]"),
)
LAUNCHERS = (
    "SLURM",
    "RANK",
    "LOCAL_",
    "WORLD_SIZE",
    "MASTER_",
    "NODE_RANK",
    "TORCHELASTIC",
    "PL_GLOBAL_SEED",
)
MISHAPS = """
import os, signal

from lightning.pytorch.callbacks import Callback

from coderl.errors import UserError


class CtrlC(Callback):
    # A terminal sends it to the whole process group.
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_rank == 0 and batch_idx == 1:
            os.killpg(0, signal.SIGINT)


class Failing(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_rank == 1:
            raise UserError("the second process has no luck")
"""


@dataclass(frozen=True)
class Ended:
    """Exit codes and output of the processes that were started."""

    folder: Path
    codes: list[int]
    out: str
    err: str

    def json(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / name).read_text())
        return found


def lightning(args: list[str]) -> list[tuple[list[str], dict[str, str]]]:
    """One process, which starts the other."""
    return [([str(BIN / "coderl"), *args], {})]


def torchrun(args: list[str]) -> list[tuple[list[str], dict[str, str]]]:
    """torchrun, which starts both."""
    return [
        ([str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", "-m", "coderl", *args], {}),
    ]


def slurm(args: list[str]) -> list[tuple[list[str], dict[str, str]]]:
    """Both processes, with the variables that ``srun`` sets for each."""
    job = {
        "SLURM_JOB_ID": str(70000 + free_port() - 15000),  # Lightning's port is 15000 + its last four digits
        "SLURM_JOB_NAME": "coderl",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NNODES": "1",
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_NODEID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
    }
    return [
        ([str(BIN / "coderl"), *args], job | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)})
        for rank in range(2)
    ]


def free_port() -> int:
    """A port from 15000 to 24999 that nobody listens on."""
    for port in range(15000 + os.getpid() % 9000, 25000):
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")


def launched(launcher: Callable[[list[str]], Any], folder: Path, *args: str, limit: float = 180.0) -> Ended:
    """Run a short fit in ``folder`` to its end, which leaves no process behind.

    Args:
        launcher: How to start it.
        folder: The run folder; its parent is where it is started.
        args: Further arguments.
        limit: Seconds after which it counts as hung.
    """
    root = folder.parent
    root.mkdir(parents=True, exist_ok=True)
    (root / "mishaps.py").write_text(MISHAPS)
    plain = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHERS)}
    before = set(psutil.Process().children(recursive=True))
    processes = []
    for i, (command, extra) in enumerate(
        launcher(["fit", *SHORT, *RANKS, "--trainer.default_root_dir", str(folder), *args])
    ):
        with (root / f"out-{i}").open("w") as out, (root / f"err-{i}").open("w") as err:
            processes.append(
                subprocess.Popen(
                    command, stdout=out, stderr=err, env=plain | extra, cwd=root, start_new_session=True
                )
            )
    try:
        codes = [process.wait(timeout=limit) for process in processes]
        left = [child for child in psutil.Process().children(recursive=True) if child not in before]
        _, alive = psutil.wait_procs(left, timeout=15)  # lanes end when they hear no more from their trainer
        assert not alive, alive
    finally:
        for child in set(psutil.Process().children(recursive=True)) - before:
            child.kill()
    said = {kind: "".join(p.read_text() for p in sorted(root.glob(f"{kind}-*"))) for kind in ("out", "err")}
    return Ended(folder, codes, said["out"], said["err"])


@pytest.fixture(scope="module", autouse=True)
def orphans() -> Iterator[None]:
    """Make processes that lost their parent this one's children, so that none is overlooked."""
    set_subreaper = 36
    libc = ctypes.CDLL(None)
    assert libc.prctl(set_subreaper, 1, 0, 0, 0) == 0
    yield
    libc.prctl(set_subreaper, 0, 0, 0, 0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """The same fit of one step, started in each way."""
    return {
        launcher.__name__: launched(
            launcher, tmp_path_factory.mktemp(launcher.__name__) / "run", "--trainer.max_steps", "1"
        )
        for launcher in (lightning, torchrun, slurm)
    }


def test_each_launcher_ends_with_exit_code_0_and_prints_once(runs: dict[str, Ended]) -> None:
    for way, run in runs.items():
        assert set(run.codes) == {0}, (way, run.err[-4000:])
        assert "Starting with 2 processes" in run.err, way
        assert run.out.count("GRPO ended after 1 step and") == 1, way
        assert run.out.count("held-out pass@1 before training") == 1, way
        assert (run.out + run.err).count("Automatic evaluation completed") == 1, way
        assert "Traceback" not in run.err and "Warning" not in run.err, (way, run.err[-4000:])


def test_each_launcher_writes_one_run_folder(runs: dict[str, Ended]) -> None:
    kept = {}
    for way, run in runs.items():
        files = [path for path in run.folder.parent.rglob("*") if path.is_file()]
        inside = sorted(str(path.relative_to(run.folder.parent)) for path in files)
        kept[way] = sorted("_".join(name.split("_2")[:1]) for name in inside if name.startswith("run"))
        for path in run.json("summary.json")["paths"].values():
            assert Path(path).exists(), (way, path)
        results = [path.name for path in files if path.name.startswith("evaluation_results")]
        assert len([name for name in results if "_before_" not in name]) == 1, (way, results)
        assert [path.name for path in run.folder.glob("logs/*")] == ["version_0"], way
        assert (run.folder / "completions.jsonl").read_text().count("\n") == 6, way  # no row twice
    assert kept["lightning"] == kept["torchrun"] == kept["slurm"]


def test_each_launcher_takes_the_same_step(runs: dict[str, Ended]) -> None:
    weights = {way: load_file(run.folder / "adapter/adapter_model.safetensors") for way, run in runs.items()}
    learned = [name for name, value in weights["lightning"].items() if "lora_B" in name and value.any()]
    assert learned  # it began at 0
    for way, found in weights.items():
        assert found.keys() == weights["lightning"].keys(), way
        assert all(torch.equal(value, weights["lightning"][name]) for name, value in found.items()), way
    for key in ("method", "model", "steps", "before", "after"):
        assert len({json.dumps(run.json("summary.json")[key]) for run in runs.values()}) == 1, key


def test_ctrl_c_ends_all_processes_with_a_checkpoint(tmp_path: Path) -> None:
    ended = launched(lightning, tmp_path / "run", "--trainer.callbacks+", "mishaps.CtrlC")
    assert ended.codes == [1], ended.err[-4000:]
    assert "go on with: coderl fit --config" in ended.err and "Traceback" not in ended.err
    saved = torch.load(ended.folder / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 2  # the step that had begun was let end
    assert not (ended.folder / "summary.json").exists()


def test_a_process_that_fails_ends_the_others(tmp_path: Path) -> None:
    ended = launched(slurm, tmp_path / "run", "--trainer.callbacks+", "mishaps.Failing")
    first, second = ended.codes
    assert second == 1 and first != 0, ended.err[-4000:]
    assert "coderl: error: the second process has no luck\n" in ended.err
    assert first != -signal.SIGKILL and not (ended.folder / "summary.json").exists()


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        ({"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2"}, "torchrun"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "srun"),
    ],
)
def test_a_launcher_with_more_processes_than_devices_is_refused(
    environment: dict[str, str],
    launcher: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The shipped configs say ``devices: 1``, which is easily forgotten."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "run"
    assert main(["fit", *SHORT, "--trainer.max_steps", "1", "--trainer.default_root_dir", str(folder)]) == 2
    assert f"error: {launcher} started 2 processes and the trainer takes 1, " in capsys.readouterr().err
    assert not (folder / "adapter").exists()
