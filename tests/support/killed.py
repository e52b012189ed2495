"""Kills fits at random points and resumes them: ``python -m tests.support.killed MODEL FOLDER SEED``.

With ``faults`` in place of a seed, one of two ranks fails in the middle of a step, or cannot write.

Every fit runs in processes of its own, forked from this one, which has imported all that they need and has
not used torch. The trace of a fit that was killed and resumed must be that of one that was not, bit for bit.
Prints a line for each kill.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from coderl.algorithms import GRPO, PPO, PolicyGradient, distributed, rng
from coderl.algorithms.ppo import AdaptiveKL
from coderl.algorithms.rewards import Sample
from coderl.callbacks import Checkpoint, PostFit
from coderl.data import CodeDataModule
from coderl.evaluation import EvaluationSettings
from coderl.model.adapters import LoRA
from coderl.model.policy import Policy
from coderl.problems import ProblemSource
from coderl.runs.checkpoint_files import CheckpointFiles, damage_of
from coderl.runs.folder import RunFolder
from coderl.sandbox import Sandbox
from coderl.types import Problem
from tests.algorithms.test_resume import EvenTokens
from tests.support import tiny

CASES = [("GRPO", 1, 3), ("PPO", 1, 3), ("GRPO", 2, 2), ("PPO", 2, 2)]
"""Algorithm, ranks, kills."""
LIMIT = 90
"""Seconds that one fit may take."""


class Numbers(ProblemSource):
    name = "numbers"

    def load(self, split: str) -> list[Problem]:
        return {"train": tiny.problems(5), "validation": [], "test": tiny.problems(7)[5:]}[split]


class Trace(Callback):
    """Appends a digest of what each step sampled and left to a file, at once."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, PolicyGradient) and pl_module.rollout is not None
        digest = hashlib.sha256(repr([s.completion.ids for s in pl_module.rollout.samples]).encode())
        digest.update(repr(pl_module.rollout.rewards.tolist()).encode())
        optimizer: Any = pl_module.optimizers()
        moments = [v for state in optimizer.state_dict()["state"].values() for v in state.values()]
        for tensor in [*pl_module.policy.trainable().values(), *moments]:
            digest.update(tensor.detach().numpy().tobytes())
        line = json.dumps([trainer.global_step, digest.hexdigest(), pl_module.kl_coefficient]) + "\n"
        path = RunFolder.of(trainer).path / f"trace-{trainer.global_rank}.jsonl"
        # One write: a killed process leaves whole lines.
        with path.open("ab", buffering=0) as file:
            file.write(line.encode())


class Faulty(EvenTokens):
    """Fails on the second rank, in the second step: raises, hangs, or has its process killed."""

    def __init__(self, fault: str) -> None:
        self.fault, self.calls = fault, 0

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        # The first call is the trial before the fit.
        if any(sample.completion.ids for sample in samples) and os.environ.get("RANK") == "1":
            self.calls += 1
            if self.calls == FAULTY_CALL and self.fault == "raises":
                raise ZeroDivisionError("by design")
            if self.calls == FAULTY_CALL and self.fault == "hangs":
                time.sleep(LIMIT)
            if self.calls == FAULTY_CALL and self.fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(samples)


def full_at_first(
    self: CheckpointFiles, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
) -> None:
    """In place of the method: the disk is full during the first two steps."""
    if checkpoint["global_step"] <= 4:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
    WRITE(self, checkpoint, path, storage_options)


WRITE = CheckpointFiles.save_checkpoint

FAULTY_CALL = 3
"""The trial, the first step, the second."""


def fit(model: Path, folder: Path, algorithm: str, ranks: int, fault: str = "") -> None:
    """A fit, or the rest of one."""
    distributed.PATIENCE = 3.0
    if fault == "full disk":
        CheckpointFiles.save_checkpoint = full_at_first  # type: ignore[method-assign]
    options: dict[str, Any] = {"adaptive_kl": AdaptiveKL(1e-3, 100)} if algorithm == "PPO" else {}
    made = {"GRPO": GRPO, "PPO": PPO}[algorithm](
        Policy(str(model), quantization="none", lora=LoRA(r=4, alpha=8)),
        rewards=[Faulty(fault)],
        sandbox=Sandbox(workers=1, allow_weak_isolation=True),
        group_size=2,
        inner_epochs=2,
        max_new_tokens=6,
        learning_rate=1e-2,
        kl_coefficient=0.05,
        evaluation=EvaluationSettings(n=2, ks=(1,), temperature=1.0),
        **options,
    )
    saved = RunFolder(folder).last_checkpoint
    rng.seed_all("whatever it is" if not saved.exists() else str(time.time()))
    trainer = tiny.trainer(
        max_epochs=2,
        enable_checkpointing=True,
        limit_val_batches=0,
        callbacks=[
            Trace(),
            PostFit(merge=False),
            Checkpoint(dirpath=saved.parent, save_last=True, every_n_train_steps=2),
            # What ranks ask each other here depends on which files each of them believes to be written.
            *([Checkpoint(folder, "{step}", monitor="reward/mean", every_n_train_steps=2)] if fault else []),
        ],
        default_root_dir=folder,
        **({"strategy": "ddp", "devices": ranks} if ranks > 1 else {}),
    )
    data = CodeDataModule(Numbers(), batch_size=2)
    trainer.fit(made, data, ckpt_path=saved if saved.exists() else None, weights_only=True)


def start(model: Path, folder: Path, algorithm: str, ranks: int, fault: str = "") -> list[int]:
    """The processes of a fit, one for each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(ranks):
        if pid := os.fork():
            pids.append(pid)
            continue
        try:
            os.setpgid(0, 0)
            log = os.open(folder / f"log-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if ranks > 1:
                numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
                os.environ |= {k: str(v) for k, v in numbers.items()}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_RANK": "0"}
                os.environ |= {"TORCHELASTIC_RUN_ID": "killed"}
            fit(model, folder, algorithm, ranks, fault)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pids


def wait(pids: list[int], folder: Path, step: float = math.inf, delay: float = 0.0) -> bool:
    """Wait for the end, or kill all so many seconds after a step. Returns whether they ended well."""
    end, left = time.monotonic() + LIMIT, list(pids)
    killed_at, failed = math.inf, False
    while left and time.monotonic() < min(end, killed_at) and not failed:
        for pid in list(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                left.remove(pid)
                failed |= status != 0
        if killed_at == math.inf and len(trace(folder, 0)) >= step:
            killed_at = time.monotonic() + delay
        time.sleep(0.01)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if failed or time.monotonic() >= end:
        print((folder / "log-0").read_text()[-3000:])
        raise SystemExit(f"a fit failed or took too long, see {folder}")
    return not left


def trace(folder: Path, rank: int) -> dict[int, list[Any]]:
    """What each step left; a step that was made twice must have left the same."""
    found: dict[int, list[Any]] = {}
    path = folder / f"trace-{rank}.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        step, *left = json.loads(line)
        assert found.setdefault(step, left) == left, f"step {step} of rank {rank} was made in two ways"
    return found


def faults(model: Path, root: Path) -> None:
    """One of two ranks fails: the other one ends soon, names it, and has saved the step before."""
    for fault in ("raises", "killed", "hangs"):
        folder = root / fault
        folder.mkdir()
        began = time.monotonic()
        first, second = start(model, folder, "GRPO", 2, fault)
        _, status = os.waitpid(first, 0)
        seconds = time.monotonic() - began
        os.kill(second, signal.SIGKILL)  # where it hangs, as its launcher would; else it is gone already
        os.waitpid(second, 0)
        said = (folder / "log-0").read_text()
        assert status and "rank 1" in said, said[-3000:]
        saved = torch.load(RunFolder(folder).last_checkpoint, weights_only=True)
        assert saved["global_step"] == 2 and seconds < LIMIT / 2
        print(f"{fault}: {seconds:.1f} s, {said.strip().splitlines()[-1]}", flush=True)
    folder = root / "full"
    folder.mkdir()
    assert wait(start(model, folder, "GRPO", 2, "full disk"), folder)
    assert (folder / "log-0").read_text().count("no checkpoint of step") == 6
    assert torch.load(RunFolder(folder).last_checkpoint, weights_only=True)["global_step"] == 8
    print(f"full disk: {len(trace(folder, 1))} steps", flush=True)


def main() -> None:
    if sys.argv[3] == "faults":
        faults(Path(sys.argv[1]), Path(sys.argv[2]))
        return
    model, root, seed = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    draw = random.Random(seed)
    for algorithm, ranks, kills in CASES:
        whole, killed = (root / f"{algorithm}-{ranks}-{kind}" for kind in ("whole", "killed"))
        whole.mkdir()
        killed.mkdir()
        began = time.monotonic()
        wait(start(model, whole, algorithm, ranks), whole)
        seconds, steps = time.monotonic() - began, len(trace(whole, 0))
        for _ in range(kills):
            # After any step that is still to come, the last one's evaluation included; before the first, too.
            step, delay = draw.randint(len(trace(killed, 0)), steps), draw.uniform(0, seconds / steps)
            ended = wait(start(model, killed, algorithm, ranks), killed, step, delay)
            saved = RunFolder(killed).last_checkpoint
            assert not saved.exists() or not damage_of(saved), f"{saved} is damaged"
            print(f"{algorithm}, {ranks} ranks: killed {delay:.2f} s after step {step}, ended: {ended}")
        wait(start(model, killed, algorithm, ranks), killed)
        for rank in range(ranks):
            expected = trace(whole, rank)
            assert trace(killed, rank) == expected and len(expected) == steps, f"{algorithm}, rank {rank}"
        assert (killed / "summary.json").exists()
        print(f"{algorithm}, {ranks} ranks: the same, {seconds:.1f} s undisturbed", flush=True)


if __name__ == "__main__":
    main()
