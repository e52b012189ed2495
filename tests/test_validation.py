"""Validation drives what is kept and when a fit ends; benchmarks are measured after it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers import CSVLogger

from coderl.adapters import LoRA
from coderl.algorithms import GRPO
from coderl.callbacks import BestCheckpoint, PostFit
from coderl.data import CodeDataModule, ProblemSource
from coderl.errors import UsageError, UserError
from coderl.evaluation import EvaluationSettings
from coderl.policy import Policy
from coderl.rollout import RolloutEngine, Sampling
from coderl.sandbox import Sandbox
from coderl.types import Completion, Problem
from tests import tiny

RIGHT = [1, 3, 2, 0]
"""How many of the four validation samples of a problem pass, by the number of updates that went before."""


class Pupil(RolloutEngine):
    """Learns, and forgets again: of four samples as many are right as :data:`RIGHT` says."""

    def __init__(self) -> None:
        self.updates = 0
        self.asked: list[list[str]] = []

    def bind(self, policy: Policy) -> None:
        self.policy = policy

    def sync(self) -> None:
        self.updates += 1

    def generate(
        self, problems: Sequence[Problem], n: int, sampling: Sampling, *, progress: str | None = None
    ) -> list[Completion]:
        self.asked.append([problem.id for problem in problems])
        right = RIGHT[min(self.updates, len(RIGHT) - 1)]
        return [self._answer(i, p, j < right) for i, p in enumerate(problems) for j in range(n)]

    def _answer(self, index: int, problem: Problem, right: bool) -> Completion:
        text = problem.solution if right else "def f(x):\n    return None"
        prompt, ids = self.policy.encode(problem), tuple(self.policy.tokenizer(text)["input_ids"])
        return Completion(index, tuple(prompt), ids, tuple(-1.0 for _ in ids), text, True)


class Tiny(ProblemSource):
    name = "tiny"
    single_split = True

    def load(self, split: str) -> list[Problem]:
        return tiny.problems({"train": 4, "validation": 3, "test": 2}[split])


def rl(llama: Path, engine: RolloutEngine, **options: Any) -> GRPO:
    return GRPO(
        Policy(str(llama), quantization="none", lora=LoRA(r=4, alpha=8)),
        sandbox=Sandbox(workers=1, timeout=10.0, allow_weak_isolation=True),
        engine=engine,
        group_size=4,
        max_new_tokens=8,
        learning_rate=1e-2,
        evaluation=EvaluationSettings(n=4, ks=(1, 4), temperature=0.5),
        **options,
    )


def fit(module: GRPO, folder: Path, *callbacks: Callback, **options: Any) -> Any:
    settings: dict[str, Any] = {"max_epochs": 3, "limit_val_batches": 1.0} | options
    trainer = tiny.trainer(
        default_root_dir=folder,
        logger=CSVLogger(folder, "logs"),
        log_every_n_steps=1,
        enable_checkpointing=True,
        callbacks=list(callbacks),
        **settings,
    )
    trainer.fit(module, datamodule=CodeDataModule(Tiny(), batch_size=4))
    return trainer


def adapter(module: GRPO) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.policy.trainable().items()}


class Weights(Callback):
    """The weights at each validation, and what it measured."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, dict[str, torch.Tensor]]] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.seen.append((float(trainer.callback_metrics["val/pass@1"]), adapter(pl_module)))


def test_the_fit_ends_with_the_weights_that_validated_best(llama: Path, tmp_path: Path) -> None:
    module, weights = rl(llama, Pupil()), Weights()
    fit(module, tmp_path, weights, BestCheckpoint(), PostFit(merge=False))
    assert [score for score, _ in weights.seen] == [0.75, 0.5, 0.0]
    best, last = weights.seen[0][1], weights.seen[-1][1]
    kept = adapter(module)
    assert all(torch.equal(kept[name], best[name]) for name in best)
    assert any(not torch.equal(kept[name], last[name]) for name in best)
    saved = Policy(str(llama), quantization="none", adapter=str(tmp_path / "adapter"))
    saved.load(torch.device("cpu"))
    assert all(torch.equal(saved.trainable()[name], best[name]) for name in best)


def test_validation_ends_a_fit_early(llama: Path, tmp_path: Path) -> None:
    stopping = EarlyStopping("val/pass@1", mode="max", patience=1)
    trainer = fit(rl(llama, Pupil()), tmp_path, stopping, max_epochs=9)
    assert trainer.global_step == 2
    assert stopping.best_score == 0.75


def test_validation_is_one_evaluation_of_the_whole_split(llama: Path, tmp_path: Path) -> None:
    """Batches of two give the figures of all, each problem asked once."""
    engine = Pupil()
    module = rl(llama, engine)
    trainer = tiny.trainer(default_root_dir=tmp_path)
    (found,) = trainer.validate(module, datamodule=CodeDataModule(Tiny(), batch_size=2))
    assert sorted(name for batch in engine.asked for name in batch) == ["tiny/0", "tiny/1", "tiny/2"]
    alone = module.evaluate(tiny.problems(3))
    rates = {"accuracy": alone.accuracy, "success_rate": alone.success_rate}
    rates |= {"test_pass_rate": alone.test_pass_rate} | alone.scores()
    assert found == {f"val/{name}": pytest.approx(value) for name, value in rates.items()}
    (tested,) = trainer.test(module, datamodule=CodeDataModule(Tiny(), batch_size=2))
    assert tested["test/pass@1"] == pytest.approx(alone.pass_at_k[1])


def test_the_best_of_nothing_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="BestCheckpoint: nothing is validated"):
        fit(rl(llama, Pupil()), tmp_path, BestCheckpoint(), limit_val_batches=0)


def rows(path: Path, count: int) -> Path:
    """Problems in MBPP form that the tiny source has not."""
    text = "Write a function that adds {} to the double of its argument and says so."
    lines = [
        {"task_id": i, "text": text.format(i), "test_list": [f"assert f(1) == {2 + i}"], "code": "x"}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_benchmarks_are_measured_after_the_fit(llama: Path, tmp_path: Path) -> None:
    bench = rows(tmp_path / "Bench.jsonl", 2)
    fit(rl(llama, Pupil()), tmp_path / "run", PostFit(tasks=(str(bench),), merge=False), max_epochs=1)
    (path,) = (tmp_path / "run").glob("evaluation_results_*.json")
    body = json.loads(path.read_text())
    assert body.keys() == {"tiny", "bench", "config"}
    assert body["bench"]["ids"] == ["Bench/0", "Bench/1"]
    assert body["bench"]["contaminated"] == []
    assert body["tiny"]["contaminated"] == ["tiny/0", "tiny/1"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["tasks"].keys() == {"tiny", "bench"}
    assert summary["after"] == summary["tasks"]["tiny"]
    metrics = (tmp_path / "run" / "logs" / "version_0" / "metrics.csv").read_text()
    assert "final_eval/bench_pass@1" in metrics
    trained = json.loads((tmp_path / "run" / "adapter" / "training_problems.json").read_text())
    assert trained["ids"] == [f"tiny/{i}" for i in range(4)]


def test_a_benchmark_that_is_trained_on_is_refused(llama: Path, tmp_path: Path) -> None:
    class Copied(Tiny):
        single_split = False

        def load(self, split: str) -> list[Problem]:
            return super().load(split) if split == "train" else []

    copy = tmp_path / "copy.jsonl"
    lines = [{"text": p.prompt.split("\n")[1], "test_list": list(p.tests)} for p in tiny.problems(4)]
    copy.write_text("".join(json.dumps(line) + "\n" for line in lines))
    trainer = tiny.trainer(
        default_root_dir=tmp_path, max_steps=1, callbacks=[PostFit(tasks=(str(copy),))], limit_val_batches=0
    )
    with pytest.raises(UserError, match="training problems are in the benchmark copy"):
        trainer.fit(rl(llama, Pupil()), datamodule=CodeDataModule(Copied()))
