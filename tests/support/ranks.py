"""One rank of a fit under DDP: ``python -m tests.support.ranks FOLDER``, under torchrun's variables.

One pair of processes runs every case in turn. Forks of a test process that has used torch may hang.
"""

from __future__ import annotations

import faulthandler
import math
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from coderl.algorithms import GRPO, SFT, PolicyGradient
from coderl.algorithms.ppo import AdaptiveKL
from coderl.algorithms.step import Rollout
from coderl.callbacks import CompletionTable
from coderl.data import CodeDataModule, Curriculum
from coderl.errors import UserError
from coderl.evaluation import Evaluation, EvaluationSettings
from coderl.problems import ProblemSource
from coderl.rollout import GenerateEngine
from coderl.sandbox import Sandbox
from coderl.types import Execution, Problem
from tests.algorithms import test_resume
from tests.algorithms.test_resume_ppo import refilled
from tests.support import tiny
from tests.support.fixed import Fixed, FixedGRPO, FixedPPO, rollout_of, stirred

TWO: dict[str, Any] = {"strategy": "ddp", "devices": 2}
LIMIT = 100
"""Seconds after which a rank that waits in vain says where, and dies."""
NAN = math.nan
MIXED = [[1.0, 0.0, 0.0, 1.0], [0.0, -0.2, 0.0, 0.0]]
OTHER = [[0.0, NAN, 1.1, 0.0], [1.0, 1.1, 1.0, NAN]]
NO_SIGNAL = [[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, NAN, 1.0]]
LOST = [[NAN] * 4] * 2
Case = tuple[str, str, list[Any], list[Any], dict[str, Any]]
CASES: list[Case] = [
    ("grpo", "GRPO", [MIXED, OTHER], [OTHER, MIXED], {"loss_type": "grpo"}),
    ("dapo", "GRPO", [MIXED, OTHER], [NO_SIGNAL, OTHER], {"loss_type": "dapo", "entropy_coefficient": 0.01}),
    ("dr_grpo", "GRPO", [MIXED, LOST], [OTHER, MIXED], {"loss_type": "dr_grpo", "scale": "none"}),
    ("gspo", "GRPO", [MIXED, OTHER], [OTHER, LOST], {"loss_type": "gspo", "truncated": "mask"}),
    ("cispo", "GRPO", [MIXED, LOST], [OTHER, MIXED], {"loss_type": "cispo", "top_entropy": 0.2}),
    # Without divergence a rank makes no backward at all where its rewards are equal.
    (
        "a rank without signal",
        "GRPO",
        [NO_SIGNAL, MIXED],
        [MIXED, NO_SIGNAL],
        {"loss_type": "dapo", "kl_coefficient": 0.0},
    ),
    ("batch", "GRPO", [MIXED, NO_SIGNAL], [OTHER, LOST], {"baseline": "reinforce++", "scale": "batch"}),
    ("k1", "GRPO", [MIXED, OTHER], [LOST, LOST], {"baseline": "rloo", "kl": "k1", "scale": "none"}),
    ("ppo", "PPO", [MIXED, OTHER], [OTHER, MIXED], {}),
    ("no kl", "PPO", [MIXED, LOST], [LOST, MIXED], {"kl_coefficient": 0.0, "bootstrap_truncated": True}),
    (
        "adapter",
        "PPO",
        [MIXED, OTHER],
        [NO_SIGNAL, LOST],
        {"critic_adapter": True, "adaptive_kl": AdaptiveKL(1e-3, 100)},
    ),
    ("warm-up", "PPO", [MIXED, LOST], [OTHER, MIXED], {"critic_warmup": 1, "critic_adapter": True}),
    ("shared", "PPO", [MIXED, OTHER], [LOST, MIXED], {"critic_warmup": 1, "truncated": "mask"}),
    ("adaptive", "PPO", [MIXED, LOST], [OTHER, LOST], {"adaptive_kl": AdaptiveKL(1e-3, 100)}),
    ("stop", "PPO", [MIXED, OTHER], [LOST, OTHER], {"target_kl": 1e-7, "inner_epochs": 3}),
]
"""Name, algorithm, rewards of each step's rollout on the first rank and on the second, settings."""


class OnRanks(Fixed):
    """Takes its own rank's rollouts; one process alone takes those of both. Keeps what came of them."""

    halves: tuple[list[Rollout], list[Rollout]]
    passes: int
    metrics: list[dict[str, float]]

    def collect(self, problems: Sequence[Any]) -> Rollout:
        step = len(self.logged)
        if self.trainer.world_size > 1:
            return self.halves[self.trainer.global_rank][step]
        one, two = (half[step] for half in self.halves)
        return Rollout([*one.samples, *two.samples], torch.cat([one.rewards, two.rewards]))

    def configure_model(self) -> None:
        torch.manual_seed(6)  # a critic's adapter starts alike in every process
        super().configure_model()

    def configure_optimizers(self) -> Any:
        made: Any = super().configure_optimizers()
        for group in made["optimizer"].param_groups:
            group["eps"] = 1e-3  # Adam's own lets rounding decide where gradients are next to nothing
        return made

    def _accumulate_gradients(self, step: Any) -> Any:
        self.passes += 1
        return super()._accumulate_gradients(step)

    def report(self, rollout: Rollout) -> None:
        super().report(rollout)
        self.metrics.append({})
        PolicyGradient.report(self, rollout)

    def log_dict(self, dictionary: Any, *_: Any, **__: Any) -> None:
        timed = ("seconds/", "speed/")
        self.metrics[-1] |= {k: float(v) for k, v in dictionary.items() if not k.startswith(timed)}

    def left(self) -> dict[str, Any]:
        """What a rank leaves."""
        return {
            "weights": {name: p.detach().clone() for name, p in self.policy.trainable().items()},
            "kl_coefficient": self.kl_coefficient,
            "kl_old": [step["policy/kl_old"] for step in self.logged],
            "norm": [step["grad_norm"] for step in self.logged],
            "passes": self.passes,
            "metrics": self.metrics,
        }


class RanksGRPO(OnRanks, FixedGRPO):
    pass


class RanksPPO(OnRanks, FixedPPO):
    pass


def outcome(llama: Path, case: Case, halves: Any, **ranks: Any) -> dict[str, Any]:
    """What a case leaves on this rank, or in one process without others."""
    settings: dict[str, Any] = {
        "group_size": 4,
        "max_new_tokens": 9,
        "temperature": 1.5,
        "kl_coefficient": 0.1,
        "learning_rate": 1e-2,
        "inner_epochs": 2,
        "micro_batch_size": 3,
    } | case[4]
    module = (RanksGRPO if case[1] == "GRPO" else RanksPPO)(policy=stirred(llama), **settings)
    module.halves, module.passes, module.metrics = halves, 0, []
    module.given, module.gradients, module.logged = [], [], []
    loader: Any = DataLoader(tiny.problems(4), batch_size=2, collate_fn=list)  # type: ignore[arg-type]
    steps = settings["inner_epochs"] * len(halves[0])
    tiny.trainer(max_steps=steps, max_epochs=-1, **ranks).fit(module, loader)
    return module.left()


def tuned(llama: Path, batch_size: int, **ranks: Any) -> dict[str, Any]:
    """Weights and held-out loss after an epoch of SFT on solutions of very different lengths."""
    module = SFT(stirred(llama), learning_rate=1e-2, micro_batch_size=1, schedule="constant_with_warmup")
    problems = tiny.problems(4)
    rows = [replace(p, solution=p.solution * (3 * i + 1)) for i, p in enumerate(problems)]
    loader: Any = DataLoader(rows, batch_size, collate_fn=list)  # type: ignore[arg-type]
    trainer = tiny.trainer(max_steps=2, max_epochs=-1, num_sanity_val_steps=0, **ranks)
    trainer.fit(module, loader, loader)
    loss = float(trainer.callback_metrics["val/loss"])
    return {"weights": {n: p.detach() for n, p in module.policy.trainable().items()}, "loss": loss}


def sampled(llama: Path, folder: Path) -> dict[str, Any]:
    """Traces of an unbroken fit that samples and draws by a curriculum, and of one killed and resumed."""
    rank = os.environ["LOCAL_RANK"]
    drawn: list[str] = []

    def fit(part: str, **options: Any) -> list[dict[str, Any]]:
        made = refilled(llama, drawn)
        there = folder / f"{part}-{rank}"
        return test_resume.fit(made, there, curriculum=Curriculum(), **TWO, **options)

    whole = fit("whole", seed=1)
    first = fit("part", seed=1, kill_after=2)
    rest = fit("part", seed=999, resume=folder / "part-0" / "2.ckpt")
    return {"whole": whole, "pieces": [*first, *rest], "drawn": drawn}


class Five(ProblemSource):
    """Five problems to validate on, which two ranks cannot share evenly."""

    name = "tiny"

    def load(self, split: str) -> list[Problem]:
        return tiny.problems(5)


def validated(llama: Path, **ranks: Any) -> dict[str, Any]:
    """What validation logs, and the programs that it ran."""
    settings = EvaluationSettings(n=2, ks=(1, 2), temperature=1.0)
    sandbox = Sandbox(workers=1, allow_weak_isolation=True)
    engine = GenerateEngine(batch_size=2)
    module = GRPO(stirred(llama), sandbox=sandbox, engine=engine, max_new_tokens=9, evaluation=settings)
    seen, measure = [], module.evaluate

    def noted(*args: Any) -> Evaluation:
        seen.append(measure(*args))
        return seen[-1]

    module.evaluate = noted  # type: ignore[method-assign, assignment]
    trainer = tiny.trainer(**ranks)
    (figures,) = trainer.validate(module, datamodule=CodeDataModule(Five(), batch_size=1))
    return {"figures": figures, "programs": seen[0].generations, "ids": seen[0].ids}


def without_reward(llama: Path, folder: Path) -> str:
    """How a fit ends in which one rank has a reward in the first step, and none later; it keeps samples."""
    rank = int(os.environ["LOCAL_RANK"])
    module = RanksGRPO(stirred(llama), group_size=4, max_new_tokens=9, temperature=1.5, kl_coefficient=0.1)
    some, lost = rollout_of(llama, MIXED), rollout_of(llama, LOST)
    lost.samples[0] = replace(lost.samples[0], execution=Execution("infra_error", message=f"of rank {rank}"))
    steps = [some if rank else lost, lost, lost, lost, lost]
    module.halves, module.passes, module.metrics = (steps, steps), 0, []
    module.given, module.gradients, module.logged = [], [], []
    loader: Any = DataLoader(tiny.problems(8), batch_size=2, collate_fn=list)  # type: ignore[arg-type]
    options: dict[str, Any] = {"default_root_dir": folder / "kept", "callbacks": [CompletionTable()]}
    trainer = tiny.trainer(max_steps=5, max_epochs=-1, **options, **TWO)
    try:
        trainer.fit(module, loader)
    except UserError as error:
        return f"after {len(module.logged)}: {error}"
    return "it went on"


def both(folder: Path) -> None:
    """Run this file as two processes.

    Raises:
        AssertionError: If one fails; what it printed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    logs = [folder / f"log-{rank}" for rank in range(2)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.ranks", str(folder)],
                env=os.environ | common | {"LOCAL_RANK": str(rank)},
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=Path(__file__).parents[2],
            )
        processes.append(process)
    try:
        codes = [process.wait(timeout=LIMIT + 30) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], "\n".join(log.read_text()[-4000:] for log in logs)


def main(folder: Path) -> None:
    """Run every case on the rollouts in the folder, and leave what came of them there."""
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    llama = folder / "llama"
    halves = torch.load(folder / "halves.pt", weights_only=False)
    left: dict[str, Any] = {case[0]: outcome(llama, case, halves[case[0]], **TWO) for case in CASES}
    left["sft"] = tuned(llama, 2, **TWO)
    left["validated"] = validated(llama, **TWO)
    left["sampled"] = sampled(llama, folder)
    left["without reward"] = without_reward(llama, folder)
    torch.save(left, folder / f"rank-{os.environ['LOCAL_RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
