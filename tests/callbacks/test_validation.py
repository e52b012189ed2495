"""Validation decides which weights are kept and when a fit ends; benchmarks are measured after the fit."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from coderl.algorithms import GRPO, SFT
from coderl.callbacks import BestCheckpoint, Checkpoint, PostFit
from coderl.data import CodeDataModule
from coderl.errors import UsageError, UserError
from coderl.evaluation import EvaluationSettings
from coderl.model.adapters import LoRA
from coderl.model.policy import Policy
from coderl.problems import JSONLProblems, ProblemSource
from coderl.problems.contamination import TrainingRecord
from coderl.publish.export import save_adapter
from coderl.rollout import GenerateEngine, RolloutEngine, Sampling
from coderl.sandbox import Sandbox
from coderl.types import Completion, Problem
from tests.support import tiny

pytestmark = pytest.mark.slow

RIGHT = [1, 3, 2, 0]
"""How many of the four validation samples of a problem pass, by the number of updates that went before."""


class Pupil(RolloutEngine):
    """Gives as many right answers of four as :data:`RIGHT` says: first more with each update, then fewer."""

    samples_from_copy = True

    def __init__(self) -> None:
        self.updates = 0
        self.asked: list[list[str]] = []
        self.calls: list[str] = []

    def bind(self, policy: Policy) -> None:
        self.calls.append("bind")
        self.policy = policy

    def close(self) -> None:
        self.calls.append("close")

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


def fit(
    module: GRPO | SFT, folder: Path, *callbacks: Callback, resume: Path | None = None, **options: Any
) -> Any:
    settings: dict[str, Any] = {"max_epochs": 3, "limit_val_batches": 1.0} | options
    trainer = tiny.trainer(
        default_root_dir=folder,
        logger=CSVLogger(folder, "logs"),
        log_every_n_steps=1,
        enable_checkpointing=True,
        callbacks=list(callbacks),
        **settings,
    )
    data = CodeDataModule(Tiny(), batch_size=4)
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
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


def test_a_validation_that_was_cut_off_after_the_last_step_is_made_when_the_fit_is_finished(
    llama: Path, tmp_path: Path
) -> None:
    class CutOff(Callback):
        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            if not trainer.sanity_checking:
                raise ZeroDivisionError

    def made(resume: Path | None, *callbacks: Callback) -> None:
        others = (BestCheckpoint(), PostFit(merge=False), Checkpoint(best.parent, save_last=True))
        fit(rl(llama, Pupil()), tmp_path, *callbacks, *others, resume=resume, max_epochs=1)

    best = tmp_path / "checkpoints/best.ckpt"
    with pytest.raises(ZeroDivisionError):
        made(None, CutOff())
    assert not best.exists()
    made(best.with_name("last.ckpt"), weights := Weights())
    assert len(weights.seen) == 1 and (tmp_path / "summary.json").exists()
    saved = torch.load(best, weights_only=True)
    assert saved["global_step"] == 1 and saved["optimizer_states"][0]["state"]
    assert not saved["to_follow"]["validation"]


def test_a_fit_that_stopped_early_is_finished_before_it_is_trained_on(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(resume: Path | None) -> Any:
        stopping = EarlyStopping("val/pass@1", mode="max", patience=1)
        others = (stopping, PostFit(merge=False), Checkpoint(last.parent, save_last=True))
        return fit(rl(llama, Pupil()), tmp_path, *others, resume=resume, max_epochs=9)

    last, summary = tmp_path / "checkpoints/last.ckpt", tmp_path / "summary.json"
    with monkeypatch.context() as patch:
        patch.setattr(PostFit, "_summarize", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            made(None)
    assert not summary.exists() and torch.load(last, weights_only=True)["global_step"] == 2
    made(last)
    assert json.loads(summary.read_text())["steps"] == 2
    made(last)
    assert json.loads(summary.read_text())["steps"] > 2


def test_an_engine_is_bound_once_in_a_fit_and_closed_after_it(llama: Path, tmp_path: Path) -> None:
    engine = Pupil()
    module = rl(llama, engine)
    fit(module, tmp_path, PostFit(merge=False))
    assert engine.calls == ["bind", "close"]
    module.evaluate(tiny.problems(1))
    assert engine.calls == ["bind", "close", "bind"]


def test_validation_is_one_evaluation_of_the_whole_split(llama: Path, tmp_path: Path) -> None:
    """In batches of two it gives the scores of the whole split, and samples each problem once."""
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


def test_best_checkpoint_is_refused_without_validation(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="BestCheckpoint: nothing is validated"):
        fit(rl(llama, Pupil()), tmp_path, BestCheckpoint(), limit_val_batches=0)


def rows(path: Path, count: int) -> Path:
    """A file of problems in MBPP form that are not in the tiny source."""
    text = "Write a function that adds {} to the double of its argument and says so."
    lines = [
        {
            "task_id": i,
            "text": text.format(i),
            "test_list": [f"assert f(1) == {2 + i}"],
            "code": f"def f(x): return 2 * x + {i}",
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_benchmarks_are_measured_after_the_fit(llama: Path, tmp_path: Path) -> None:
    bench = rows(tmp_path / "Bench.jsonl", 2)
    fit(rl(llama, Pupil()), tmp_path / "run", PostFit(tasks=(str(bench),), merge=False), max_epochs=1)
    (path,) = (tmp_path / "run").glob("evaluation_results_*_grpo_*.json")
    body = json.loads(path.read_text())
    assert body.keys() == {"tiny", "bench", "config"}
    assert body["tiny"]["settings"]["merged_copy"] is body["bench"]["settings"]["merged_copy"] is True
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


def test_the_final_evaluation_is_of_the_best_weights(llama: Path, tmp_path: Path) -> None:
    """Also where rollouts decode from a copy. All scores are equal: the first weights count as best."""
    torch.manual_seed(4)  # from some starts, three steps do not change what is answered greedily
    module = rl(llama, GenerateEngine(merged_copy=True))
    module.evaluation = EvaluationSettings(n=1, ks=(1,), temperature=0.0)
    module.learning_rate = 0.3
    kept: list[list[list[str]]] = []

    class Programs(Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            if not trainer.sanity_checking:
                kept.append(pl_module.evaluate(tiny.problems(2)).generations)

    fit(module, tmp_path, Programs(), BestCheckpoint(), PostFit(merge=False))
    assert kept[0] != kept[-1]
    (path,) = (tmp_path).glob("generations_*_grpo_*_tiny.json")
    assert json.loads(path.read_text()) == kept[0]


def test_validating_on_training_problems_is_reported(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = tiny.policy(llama)
    folder = save_adapter(policy, tmp_path / "adapter", TrainingRecord.of(tiny.problems(3)[1:]))
    module = rl(llama, Pupil())
    module.policy = Policy(str(llama), quantization="none", adapter=str(folder))
    tiny.trainer(default_root_dir=tmp_path).validate(module, datamodule=CodeDataModule(Tiny()))
    assert "val: NOT HELD OUT: 2 of 3 problems were in the training data" in caplog.text


def test_loaded_weights_are_the_ones_sampled_from(llama: Path, tmp_path: Path) -> None:
    """By Lightning's ways of loading, after the engine has made its copy of the weights."""
    module = rl(llama, GenerateEngine(merged_copy=True))
    module.evaluation = EvaluationSettings(n=1, ks=(1,), temperature=0.0)
    module.learning_rate = 0.3
    trainer = fit(module, tmp_path, BestCheckpoint())
    last = module.evaluate(tiny.problems(2)).generations
    best = trainer.checkpoint_callback.best_model_path
    trainer.test(module, datamodule=CodeDataModule(Tiny()), ckpt_path=best, weights_only=True, verbose=False)
    loaded = module.evaluate(tiny.problems(2)).generations
    assert loaded != last
    saved = torch.load(best, weights_only=True)["state_dict"]
    fresh = rl(llama, GenerateEngine(merged_copy=False))
    fresh.evaluation = module.evaluation
    fresh.policy.load(torch.device("cpu"))
    fresh.load_state_dict(saved, strict=False)
    assert loaded == fresh.evaluate(tiny.problems(2)).generations


def test_a_split_has_a_benchmarks_name_only_if_it_is_that_benchmark(llama: Path, tmp_path: Path) -> None:
    """A score on some of its problems must not look like one on all; with a limit both are so limited."""
    bench = rows(tmp_path / "Bench.jsonl", 3)

    def measured(folder: str, limit: int | None = None, without: str = "-") -> dict[str, list[str]]:
        module = rl(llama, Pupil())
        callback = PostFit(tasks=(str(bench),), merge=False)
        data = CodeDataModule(JSONLProblems(str(bench), test=str(bench)), allow_contamination=True)
        data.limits["test"] = limit
        data.keep(lambda problem: not problem.id.endswith(without))
        module.sandbox.timeout = 3.0
        trainer = tiny.trainer(
            default_root_dir=tmp_path / folder, max_steps=1, limit_val_batches=0, callbacks=[callback]
        )
        trainer.fit(module, datamodule=data)
        (path,) = (tmp_path / folder).glob("evaluation_results_*_grpo_*.json")
        body = json.loads(path.read_text())
        return {name: task["ids"] for name, task in body.items() if name != "config"}

    every = [f"Bench/{i}" for i in range(3)]
    assert measured("whole") == {"bench": every}
    assert measured("part", without="2") == {"bench_test": every[:2], "bench": every}
    assert measured("limited", limit=2) == {"bench": every[:2]}


def test_benchmarks_are_refused_where_nothing_is_evaluated(llama: Path, tmp_path: Path) -> None:
    bench = rows(tmp_path / "bench.jsonl", 1)
    tuned = SFT(Policy(str(llama), quantization="none", lora=LoRA(r=4)))
    twice = PostFit(tasks=(str(bench), str(rows(tmp_path / "Bench.jsonl", 2))))
    cases: list[tuple[Any, PostFit, str]] = [
        (tuned, PostFit(tasks=(str(bench),)), "SFT samples nothing"),
        (rl(llama, Pupil()), PostFit(evaluate=False, tasks=(str(bench),)), "evaluate is false"),
        (rl(llama, Pupil()), twice, "two of the tasks have one name"),
    ]
    for module, callback, why in cases:
        with pytest.raises(UsageError, match=why):
            fit(module, tmp_path / "run", callback)


def test_best_checkpoint_of_sft_must_monitor_the_loss(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="SFT validates val/loss, not val/pass@1"):
        fit(SFT(Policy(str(llama), quantization="none", lora=LoRA(r=4))), tmp_path, BestCheckpoint())


def test_a_moved_run_folder_keeps_its_best_checkpoint(llama: Path, tmp_path: Path) -> None:
    module = rl(llama, Pupil())
    last = ModelCheckpoint(tmp_path / "run" / "checkpoints", filename="last", save_on_train_epoch_end=True)
    fit(module, tmp_path / "run", BestCheckpoint(), last, max_epochs=2)
    (tmp_path / "run").rename(tmp_path / "moved")
    callback, again = BestCheckpoint(), rl(llama, Pupil())
    folder = tmp_path / "moved" / "checkpoints"
    last = ModelCheckpoint(folder, filename="last", save_on_train_epoch_end=True)
    trainer = tiny.trainer(
        default_root_dir=folder.parent, max_epochs=3, callbacks=[callback, last], enable_checkpointing=True
    )
    data = CodeDataModule(Tiny(), batch_size=4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The dirpath has changed")  # so says the other checkpoint
        trainer.fit(again, datamodule=data, ckpt_path=folder / "last.ckpt", weights_only=True)
    assert callback.best_model_path == str(tmp_path / "moved" / "checkpoints" / "best.ckpt")
    assert callback.best_model_score == 0.75


def test_a_fit_killed_while_evaluating_keeps_the_answers_it_has(llama: Path, tmp_path: Path) -> None:
    class Dies(Pupil):
        batch_size = 4

        def generate(self, problems: Sequence[Problem], n: int, sampling: Sampling, **_: Any) -> Any:
            if len(self.asked) == 1:
                raise KeyboardInterrupt
            return super().generate(problems, n, sampling)

    def start(engine: Pupil, model: Path = llama) -> list[list[str]]:
        engine.batch_size = 4  # a problem a group
        torch.manual_seed(0)  # as seed_everything does: the fresh adapter is the same
        fit(rl(model, engine), tmp_path, PostFit(merge=False), limit_val_batches=0, max_epochs=1)
        return engine.asked

    dies = Dies()
    with pytest.raises(SystemExit):
        start(dies)
    (kept,) = tmp_path.glob(".tiny_before_*.jsonl")
    other = tiny.checkpoint(tmp_path / "other", "qwen2")
    assert start(Pupil(), other)[0] == dies.asked[0]  # another model's answers are no use
    assert kept.exists()
    assert dies.asked[0] not in start(Pupil())[:1]
    assert not kept.exists()


def test_a_fit_killed_in_the_second_task_keeps_the_first_ones_answers(llama: Path, tmp_path: Path) -> None:
    bench, folder = rows(tmp_path / "Bench.jsonl", 2), tmp_path / "run"

    class Dies(Pupil):
        def generate(self, problems: Sequence[Problem], n: int, sampling: Sampling, **_: Any) -> Any:
            if problems[0].id.startswith("Bench"):
                raise KeyboardInterrupt
            return super().generate(problems, n, sampling)

    def start(engine: Pupil, resume: Path | None = None) -> list[list[str]]:
        last = ModelCheckpoint(folder, filename="last", save_on_train_epoch_end=True)
        callbacks = (PostFit(tasks=(str(bench),), merge=False), last)
        options: dict[str, Any] = {"limit_val_batches": 0, "max_epochs": 1}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Checkpoint directory")  # it exists when the fit is resumed
            fit(rl(llama, engine), folder, *callbacks, resume=resume, **options)
        return engine.asked

    with pytest.raises(SystemExit):
        start(Dies())
    assert len(list(folder.glob(".tiny_after_*.jsonl"))) == 1
    assert start(Pupil(), folder / "last.ckpt") == [["Bench/0", "Bench/1"]]
    assert not list(folder.glob(".*.jsonl"))
    (path,) = folder.glob("evaluation_results_*_grpo_*.json")
    assert json.loads(path.read_text()).keys() == {"tiny", "bench", "config"}
