"""Callbacks in a real Trainer: what they write, when they end a fit, and that training stays the same."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from coderl.algorithms import GRPO, PolicyGradient
from coderl.callbacks import (
    Checkpoint,
    CompletionTable,
    MergedCheckpoints,
    PostFit,
    RewardStopping,
    SaveOnInterrupt,
)
from coderl.callbacks.completions import _table
from coderl.data import CodeDataModule
from coderl.errors import UsageError, UserError
from coderl.evaluation import EvaluationSettings
from coderl.model.adapters import LoRA
from coderl.model.policy import Policy
from coderl.problems import ProblemSource
from coderl.rollout import RolloutEngine, Sampling
from coderl.runs.folder import RunFolder, short_name
from coderl.sandbox import Sandbox
from coderl.scores import Evaluation
from coderl.scores.compare import compare
from coderl.types import Completion, Problem
from tests.support import tiny

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*Checkpoint directory .* exists"
)


class Scripted(LightningModule):
    """Logs the given metrics, one step each; in step ``interrupt`` Ctrl-C is pressed."""

    def __init__(self, steps: list[dict[str, float]], interrupt: int = -1, presses: int = 1) -> None:
        super().__init__()
        self.steps, self.interrupt, self.presses = steps, interrupt, presses
        self.layer = torch.nn.Linear(1, 1)
        self.done: list[int] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if batch_idx == self.interrupt:
            for _ in range(self.presses):
                os.kill(os.getpid(), signal.SIGINT)
        self.log_dict(self.steps[batch_idx])
        self.done.append(batch_idx)
        loss: torch.Tensor = self.layer(batch).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def play(folder: Path, module: Scripted, *callbacks: Callback, **options: Any) -> list[int]:
    """Fit one epoch; returns the batches whose step was completed."""
    trainer = tiny.trainer(default_root_dir=folder, max_epochs=1, callbacks=list(callbacks), **options)
    trainer.fit(module, DataLoader(torch.ones(len(module.steps), 1)))  # type: ignore[arg-type]
    return module.done


def rewards(*values: float, kl: float = 0.0) -> list[dict[str, float]]:
    return [{"reward/mean": value, "policy/kl": kl} for value in values]


@pytest.mark.parametrize(
    ("values", "options", "steps"),
    [
        (list(range(20)), {"window": 1, "patience": 2}, 20),  # it rises to the end
        ([1] * 20, {"window": 1, "patience": 3}, 14),  # the line is whole at the twelfth, two more
        (list(range(20, 0, -1)), {"window": 1, "patience": 3}, 14),
        ([0, 4] * 15, {"window": 2, "patience": 3}, 26),  # the means 2, 2, 2 ...
        (list(range(20)), {"window": 1, "patience": 3, "min_delta": 10.5}, 20),  # 11 in twelve points
        (list(range(20)), {"window": 1, "patience": 3, "min_delta": 11.5}, 14),
        ([0] * 20, {"window": 1, "patience": None}, 20),
        ([1] * 11 + [math.nan] * 3 + [1] * 6, {"window": 1, "patience": 3}, 17),  # unknown is not worse
    ],
)
def test_the_fit_ends_when_the_reward_has_stopped_rising(
    tmp_path: Path, values: list[float], options: dict[str, Any], steps: int
) -> None:
    assert play(tmp_path, Scripted(rewards(*values)), RewardStopping(**options)) == list(range(steps))


def test_the_fit_ends_at_once_when_the_kl_divergence_is_over_its_limit(tmp_path: Path) -> None:
    script = rewards(1, 2, 3) + rewards(4, 5, kl=0.6) + rewards(6)
    assert play(tmp_path, Scripted(script), RewardStopping(max_kl=0.5)) == [0, 1, 2, 3]
    assert play(tmp_path, Scripted(script), RewardStopping(max_kl=0.7)) == [0, 1, 2, 3, 4, 5]


def test_early_stopping_counts_on_after_a_resume() -> None:
    values = [float(step * 7 % 5) for step in range(30)]
    options: dict[str, Any] = {"window": 2, "patience": 3}
    whole = RewardStopping(**options)
    reasons = [whole._update(value) for value in values]
    assert any(reasons)
    for cut in range(len(values)):
        first, second = RewardStopping(**options), RewardStopping(**options)
        begun = [first._update(value) for value in values[:cut]]
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert begun + [second._update(value) for value in values[cut:]] == reasons


def test_the_error_for_an_unknown_metric_lists_the_logged_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no metric 'reward/best'; there are .*reward/mean"):
        play(tmp_path, Scripted(rewards(1)), RewardStopping(monitor="reward/best"))


@pytest.fixture
def handler() -> Iterator[Any]:
    """A user's own handler of SIGINT, which the fit must restore."""

    def mine(number: int, frame: object) -> None:
        raise AssertionError("the signal was not taken over")

    before = signal.signal(signal.SIGINT, mine)
    yield mine
    signal.signal(signal.SIGINT, before)


def test_the_first_interrupt_finishes_the_step_then_saves_and_stops(
    tmp_path: Path, handler: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    module, callback = Scripted(rewards(*range(6)), interrupt=2), SaveOnInterrupt()
    with pytest.raises(SystemExit):
        play(tmp_path, module, callback)
    assert module.done == [0, 1, 2]
    assert signal.getsignal(signal.SIGINT) is handler
    assert "finishing this step" in capsys.readouterr().err
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in saved["state_dict"].items())
    assert play(tmp_path, Scripted(rewards(1, 2)), callback) == [0, 1]  # once again, as in a notebook


def test_the_second_interrupt_stops_at_once(tmp_path: Path, handler: Any) -> None:
    module = Scripted(rewards(*range(6)), interrupt=2, presses=2)
    with pytest.raises(SystemExit):
        play(tmp_path, module, SaveOnInterrupt())
    assert module.done == [0, 1]
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    assert signal.getsignal(signal.SIGINT) is handler


class Pressing(CSVLogger):
    """Ctrl-C is pressed while it writes the second step's metrics: between two steps."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        super().log_metrics(metrics, step)
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("steps", [6, 2])
def test_an_interrupt_between_steps_saves_after_the_next_step_or_at_the_end(
    tmp_path: Path, handler: Any, steps: int
) -> None:
    logger = Pressing(tmp_path, "logs")
    options = {"logger": logger, "log_every_n_steps": 1, "enable_checkpointing": True}
    module = Scripted(rewards(*range(steps)))
    with pytest.raises(SystemExit):
        play(tmp_path, module, SaveOnInterrupt(), last_of(tmp_path / "checkpoints"), **options)
    assert module.done == [0, 1, 2][:steps]
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == min(steps, 3)


class Witness(Callback):
    """Records which steps and epochs it saw end; its state holds the steps."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.epochs = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps.append(len(self.steps))

    def on_train_epoch_end(self, *_: Any) -> None:
        self.epochs += 1

    def state_dict(self) -> dict[str, Any]:
        return {"steps": list(self.steps)}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("step", [0, 2, 5])
def test_all_callbacks_see_the_interrupted_step_in_whatever_order_they_are_listed(
    tmp_path: Path, handler: Any, first: bool, step: int
) -> None:
    witness, interrupt = Witness(), SaveOnInterrupt()
    with pytest.raises(SystemExit):
        play(
            tmp_path,
            Scripted(rewards(*range(6)), interrupt=step),
            *([interrupt, witness] if first else [witness, interrupt]),
        )
    seen = list(range(step + 1))
    assert witness.steps == seen
    assert witness.epochs == (step == 5)  # its last step ends the epoch
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert saved["callbacks"]["Witness"] == {"steps": seen}


class Validated(Scripted):
    """Validates after each epoch."""

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        raise AssertionError("it went on to validate")

    def val_dataloader(self) -> DataLoader[torch.Tensor]:
        return DataLoader(torch.ones(1, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Scripted, Validated])
@pytest.mark.parametrize("step", [0, 2, 5])
def test_the_interrupted_step_has_its_metrics_logged(
    tmp_path: Path, handler: Any, kind: type[Scripted], step: int
) -> None:
    logger = CSVLogger(tmp_path, "logs")
    options = {"logger": logger, "log_every_n_steps": 1, "num_sanity_val_steps": 0}
    with pytest.raises(SystemExit):
        play(tmp_path, kind(rewards(*range(6)), interrupt=step), SaveOnInterrupt(), **options)
    with Path(logger.log_dir, "metrics.csv").open() as file:
        assert [float(row["reward/mean"]) for row in csv.DictReader(file)] == list(range(step + 1))
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == step + 1


def test_a_fit_without_interrupt_restores_the_signal_handler(tmp_path: Path, handler: Any) -> None:
    play(tmp_path, Scripted(rewards(1, 2)), SaveOnInterrupt())
    assert signal.getsignal(signal.SIGINT) is handler


class Pupil(RolloutEngine):
    """Answers one way before the first update, another way from then on; the last of a group is wrong."""

    def __init__(self, before: str = "solution", after: str = "solution") -> None:
        self.before, self.after, self.updates = before, after, 0

    def bind(self, policy: Policy) -> None:
        self.policy = policy

    def sync(self) -> None:
        self.updates += 1

    def generate(
        self,
        problems: Sequence[Problem],
        n: int,
        sampling: Sampling,
        *,
        seed: int | None = None,
        ready: Any = None,
    ) -> list[Completion]:
        kind = self.after if self.updates else self.before
        return [self._answer(i, p, kind, j == n - 1) for i, p in enumerate(problems) for j in range(n)]

    def _answer(self, index: int, problem: Problem, kind: str, last: bool) -> Completion:
        text = problem.solution if kind == "solution" and not last else "def f(x):\n    return None"
        prompt, ids = self.policy.encode(problem), tuple(self.policy.tokenizer(text)["input_ids"])
        return Completion(index, tuple(prompt), ids, tuple(-1.0 for _ in ids), text, True)


class Tiny(ProblemSource):
    name = "tiny"

    def load(self, split: str) -> list[Problem]:
        return {"train": tiny.problems(4), "validation": [], "test": tiny.problems(7)[4:]}[split]


def rl(llama: Path, engine: RolloutEngine | None = None, timeout: float = 10.0) -> GRPO:
    return GRPO(
        Policy(str(llama), quantization="none", lora=LoRA(r=4, alpha=8)),
        sandbox=Sandbox(workers=1, timeout=timeout, allow_weak_isolation=True),
        engine=engine or Pupil(),
        group_size=3,
        max_new_tokens=8,
        learning_rate=1e-2,
        evaluation=EvaluationSettings(n=4, ks=(2, 4, 9), temperature=0.5),
    )


def fit(
    module: GRPO,
    folder: Path,
    *callbacks: Callback,
    steps: int = 2,
    resume: Path | None = None,
    **options: Any,
) -> None:
    trainer = tiny.trainer(
        default_root_dir=folder,
        max_steps=steps,
        logger=CSVLogger(folder, "logs"),
        log_every_n_steps=1,
        limit_val_batches=0,
        enable_checkpointing=True,
        callbacks=[*callbacks, ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)],
        **options,
    )
    trainer.fit(module, datamodule=CodeDataModule(Tiny(), batch_size=2), ckpt_path=resume, weights_only=True)


def test_the_table_shows_the_best_and_the_worst(llama: Path, tmp_path: Path) -> None:
    fit(rl(llama), tmp_path, CompletionTable(every_n_steps=2, rows=4), steps=3)
    rows = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert [row["rollout_step"] for row in rows] == [1] * 5 + [3] * 5
    for entry in (rows[:5], rows[5:]):
        assert [row["shown"] for row in entry] == ["first", "worst", "worst", "best", "best"]
        assert [row["outcome"] for row in entry] == ["passed", "failed", "failed", "passed", "passed"]
        right = pytest.approx(1.1)
        assert [row["reward"] for row in entry] == [right, 0.0, 0.0, right, right]
    assert all(row["prompt"] in row["program"] and "def f(x)" in row["program"] for row in rows)
    assert {row["problem"] for row in rows} <= {p.id for p in tiny.problems(4)}


def test_the_table_leaves_out_samples_without_a_verdict(llama: Path, tmp_path: Path) -> None:
    module = rl(llama)
    fit(module, tmp_path, steps=1)
    assert module.rollout is not None
    module.rollout.rewards = torch.tensor([[math.nan, 0.5, 0.0], [math.nan, math.nan, 1.0]])
    assert [row[5] for row in _table(module.rollout, 1, 2)] == [0.5, 0.0, 1.0]
    module.rollout.rewards = torch.full((2, 3), math.nan)
    assert _table(module.rollout, 1, 2) == []


def test_the_merged_model_of_each_epoch_loads_in_plain_transformers(llama: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    fit(rl(llama), tmp_path / "run", MergedCheckpoints(every_n_epochs=2), steps=5)  # two batches an epoch
    assert [path.name for path in (tmp_path / "run-merged").iterdir()] == ["epoch-2"]
    folder = tmp_path / "run-merged/epoch-2"
    ids = AutoTokenizer.from_pretrained(folder)("def f(x):", return_tensors="pt")["input_ids"]
    torch.manual_seed(7)
    same = rl(llama)
    fit(same, tmp_path / "same", steps=4)  # up to the end of the second epoch
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
        torch.testing.assert_close(logits, same.policy.net(ids).logits, atol=1e-4, rtol=1e-4)
        with same.policy.reference():
            assert not torch.allclose(logits, same.policy.net(ids).logits, atol=1e-2)


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def test_the_summary_holds_the_scores_before_and_after_the_fit(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    fit(rl(llama, Pupil(before="wrong")), folder, PostFit(next_command="coderl evaluate"), steps=2)
    found, said = summary(folder), capsys.readouterr().out
    assert found["before"]["pass@1"] == 0.0
    assert found["after"]["pass@1"] == pytest.approx(0.75)  # the last of four fails
    assert found["after"]["pass@2"] == 1.0 and found["after"]["pass@9"] is None
    assert (found["method"], found["steps"], found["model"]) == ("grpo", 2, str(llama))
    assert 0 < found["seconds"] < 300
    first, second = found["verdict"]
    assert first in said and second in said
    assert first == (  # three problems are few
        "Held-out pass@1 shows no clear change (+75.0 points on every problem, too few to tell): 0.0 % "
        "before, 75.0 % after, on 3 problems of tiny, 4 samples each, temperature 0.5."
    )
    assert second.startswith("pass@4 shows no clear change (+100.0 points")
    assert found["gain"]["pass@1"]["difference"] == pytest.approx(0.75)
    assert "Next: coderl evaluate" in said and all(path in said for path in found["paths"].values())
    assert set(found["paths"]) == {"adapter", "merged", "metrics", "before", "evaluation"}
    assert all(Path(path).exists() for path in found["paths"].values())
    assert "final_eval/tiny_pass@1" in Path(found["paths"]["metrics"]).read_text()
    saved = json.loads(Path(found["paths"]["evaluation"]).read_text())["tiny"]
    for key in ("pass@1", "pass@2", "pass@4", "n", "problems", "interval", "outcomes", "settings"):
        assert saved[key] == found["after"][key], key


def test_the_summary_says_so_when_pass_at_1_has_not_changed(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(rl(llama), tmp_path / "run", PostFit(merge=False), steps=1)
    found = summary(tmp_path / "run")
    assert found["before"]["pass@1"] == found["after"]["pass@1"] == pytest.approx(0.75)
    assert "Held-out pass@1 did not change: 75.0 % before and after" in capsys.readouterr().out
    assert "merged" not in found["paths"] and not (tmp_path / "run-merged").exists()


def test_a_resumed_run_does_not_take_what_it_resumes_from_for_untrained(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fit(rl(llama), folder, PostFit(merge=False, evaluate=False), steps=1)
    assert summary(folder)["verdict"] == [] and summary(folder)["gain"] is None
    fit(rl(llama), folder, PostFit(merge=False), steps=2, resume=folder / "step=1.ckpt")
    found = summary(folder)
    assert found["before"] is None and not list(folder.glob("*_before_*"))
    (said,) = found["verdict"]
    assert said.startswith("Held-out pass@1 after training is 75.0 %")


def test_a_resumed_run_keeps_its_scores_from_before_training(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    fit(rl(llama, Pupil(before="wrong")), folder, PostFit(merge=False), steps=1)
    first = summary(folder)
    fit(rl(llama), folder, PostFit(merge=False), steps=2, resume=folder / "step=1.ckpt")
    second = summary(folder)
    assert second["before"] == first["before"] and second["steps"] == 2
    assert (first["resumed_at"], second["resumed_at"]) == (0, 1)
    assert "GRPO ended after 2 steps; resumed after 1, it took" in capsys.readouterr().out
    assert second["before"]["pass@1"] == 0.0 < second["after"]["pass@1"]
    assert second["paths"]["before"] == first["paths"]["before"]


def test_the_results_files_before_and_after_can_be_compared(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fit(rl(llama, Pupil(before="wrong")), folder, PostFit(merge=False), steps=1)
    found = summary(folder)
    before, after = (Path(found["paths"][key]) for key in ("before", "evaluation"))
    assert before.name.startswith(f"evaluation_results_{short_name(str(llama))}_before_")
    (comparison,) = compare(before, after)
    for rate, interval, when in (
        (comparison.rate_a, comparison.scores[1].interval_a, "before"),
        (comparison.rate_b, comparison.scores[1].interval_b, "after"),
    ):
        assert rate == pytest.approx(found[when]["pass@1"])
        assert interval == pytest.approx(found[when]["interval"])
    assert len(comparison.won) == 3 and not any("differs" in line for line in comparison.warnings)
    programs = json.loads(next(folder.glob("generations_*_before_*_tiny.json")).read_text())
    assert all("return None" in program for samples in programs for program in samples)
    assert list(folder.glob("references_*_before_*_tiny.json"))


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # Lightning's, of its own checkpoints
def test_a_resumed_run_that_was_moved_finds_its_results_from_before(llama: Path, tmp_path: Path) -> None:
    fit(rl(llama), tmp_path / "run", PostFit(merge=False), steps=1)
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    fit(rl(llama), moved, PostFit(merge=False), steps=2, resume=moved / "step=1.ckpt")
    before = Path(summary(moved)["paths"]["before"])
    assert before.parent == moved and before.is_file()
    before.unlink()
    fit(rl(llama), moved, PostFit(merge=False), steps=3, resume=moved / "step=2.ckpt")
    assert "before" not in summary(moved)["paths"] and summary(moved)["before"]
    assert "more than chance cannot be told" in summary(moved)["verdict"][-1]


def test_a_run_killed_before_its_first_step_can_be_started_again(llama: Path, tmp_path: Path) -> None:
    class Dies(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            raise Killed

    folder = tmp_path / "run"
    with pytest.raises(Killed):
        fit(rl(llama), folder, PostFit(merge=False), Dies(), steps=1)
    assert list(folder.glob("evaluation_results_*_before_*.json"))
    for log in folder.glob("logs/version_*/hparams.yaml"):
        log.unlink()  # CoderlCLI writes config.yaml instead
    RunFolder(folder).require_fresh()
    fit(rl(llama), folder, PostFit(merge=False), steps=1)
    assert Path(summary(folder)["paths"]["before"]).is_file()
    with pytest.raises(UserError, match="is not empty"):
        RunFolder(folder).require_fresh()


class Killed(Exception):
    pass


def dying_postfit(**options: Any) -> PostFit:
    """A PostFit that dies while it evaluates the trained policy."""
    made = PostFit(**options)
    evaluate = made._evaluate

    def die(module: PolicyGradient, when: str, *rest: Any) -> dict[str, Evaluation]:
        if when == "after":
            raise Killed
        return evaluate(module, when, *rest)

    made._evaluate = die  # type: ignore[method-assign, assignment]
    return made


class Untrained(Pupil):
    """Fails if the policy is trained."""

    def sync(self) -> None:
        raise AssertionError("it trained on")


def last_of(folder: Path) -> Checkpoint:
    """Writes every 25 steps: in these short fits only at the end."""
    return Checkpoint(dirpath=folder, save_last=True, every_n_train_steps=25)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limits", "flags"),
    [
        ({"steps": 3}, "--trainer.max_steps N"),
        ({"steps": -1, "max_epochs": 1}, "--trainer.max_epochs N"),
        ({"steps": 2, "max_epochs": 1}, "--trainer.max_steps N --trainer.max_epochs N"),
    ],
)
def test_a_fit_killed_after_its_last_step_is_evaluated_and_summarized_on_resuming(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], limits: dict[str, Any], flags: str
) -> None:
    folder = tmp_path / "run"
    torch.manual_seed(7)
    with pytest.raises(Killed):
        fit(rl(llama, Pupil(before="wrong")), folder, dying_postfit(), last_of(folder), **limits)
    trained = (folder / "adapter/adapter_model.safetensors").read_bytes()
    assert not (folder / "summary.json").exists()
    shutil.rmtree(folder / "adapter")
    shutil.rmtree(tmp_path / "run-merged")
    capsys.readouterr()
    torch.manual_seed(8)
    fit(rl(llama, Untrained()), folder, PostFit(), last_of(folder), resume=folder / "last.ckpt", **limits)
    said, found = capsys.readouterr().out, summary(folder)
    assert said.count("training was already complete") == 1
    assert f"to train on, resume with a higher {flags}\n" in said
    assert found["steps"] == (3 if limits["steps"] == 3 else 2)
    assert found["before"]["pass@1"] == 0.0 and found["after"]["pass@1"] == pytest.approx(0.75)
    assert set(found["paths"]) == {"adapter", "merged", "metrics", "before", "evaluation"}
    assert all(Path(path).exists() for path in found["paths"].values())
    assert (folder / "adapter/adapter_model.safetensors").read_bytes() == trained
    assert "final_eval/tiny_pass@1" in Path(found["paths"]["metrics"]).read_text()


def test_a_summarized_fit_is_evaluated_again_only_after_further_steps(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    fit(rl(llama), folder, PostFit(merge=False), last_of(folder), steps=1)
    first = (folder / "summary.json").read_bytes()
    capsys.readouterr()
    fit(
        rl(llama, Untrained()), folder, dying_postfit(), last_of(folder), steps=1, resume=folder / "last.ckpt"
    )
    assert (folder / "summary.json").read_bytes() == first
    said = capsys.readouterr().out
    assert "training was already complete" in said and "GRPO ended" not in said
    with pytest.raises(Killed):
        fit(
            rl(llama),
            folder,
            dying_postfit(merge=False),
            last_of(folder),
            steps=2,
            resume=folder / "last.ckpt",
        )
    assert "already complete" not in capsys.readouterr().out
    fit(
        rl(llama, Untrained()),
        folder,
        PostFit(merge=False),
        last_of(folder),
        steps=2,
        resume=folder / "last.ckpt",
    )
    assert summary(folder)["steps"] == 2  # the summary in the folder was that of the first step


class Pressed(Pupil):
    """Presses Ctrl-C during the second step's rollout."""

    def generate(self, *args: Any, **options: Any) -> list[Completion]:
        if self.updates == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return super().generate(*args, **options)


@pytest.mark.parametrize("limits", [{"steps": 2}, {"steps": -1, "max_epochs": 1}])
@pytest.mark.parametrize("reverse", [True, False])
def test_after_an_interrupt_in_the_last_step_the_resumed_run_evaluates(
    llama: Path, tmp_path: Path, handler: Any, reverse: bool, limits: dict[str, Any]
) -> None:
    folder = tmp_path / "run"
    callbacks = [SaveOnInterrupt(), PostFit(merge=False), last_of(folder / "checkpoints")]
    with pytest.raises(SystemExit):
        fit(rl(llama, Pressed()), folder, *(callbacks[::-1] if reverse else callbacks), **limits)
    assert not (folder / "adapter").exists() and not (folder / "summary.json").exists()
    fit(rl(llama, Untrained()), folder, *callbacks, resume=folder / "checkpoints/last.ckpt", **limits)
    assert summary(folder)["steps"] == 2


def test_evaluating_does_not_change_training(llama: Path, tmp_path: Path) -> None:
    from coderl.rollout import GenerateEngine

    weights = []
    for name, callbacks in (("with", [PostFit(merge=False)]), ("without", [])):
        torch.manual_seed(7)
        module = rl(llama, GenerateEngine())
        fit(module, tmp_path / name, *callbacks, steps=2)
        weights.append(module.policy.trainable())
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])


def test_max_kl_is_refused_where_no_divergence_is_measured(llama: Path) -> None:
    module = GRPO(Policy(str(llama)), kl_coefficient=0.0)
    with pytest.raises(UsageError, match="kl_coefficient"):
        RewardStopping(max_kl=0.5).on_train_start(Trainer(logger=False), module)
