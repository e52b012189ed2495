"""The file of all samples, as fits write it."""

from __future__ import annotations

import errno
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from coderl.algorithms import PolicyGradient
from coderl.algorithms.rewards import ExecutionReward, Reward
from coderl.algorithms.step import Rollout
from coderl.callbacks import CompletionTable
from coderl.data import CodeDataModule
from coderl.files import read_json_lines
from coderl.runs.folder import RunFolder
from coderl.runs.samples import append_samples
from tests.algorithms.test_grpo_refill import LOST, NO_SIGNAL, WITH_SIGNAL, Drawing, Pool
from tests.callbacks.test_callbacks import fit, rl
from tests.support import tiny
from tests.support.fixed import rollout_of, run, stirred

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*Checkpoint directory .* exists"
)


def samples(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    return [row for _, row in read_json_lines(RunFolder(folder).samples(rank))]


class Seen(Callback):
    """Keeps the rollouts of each step."""

    def __init__(self) -> None:
        self.steps: list[list[Rollout]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, PolicyGradient) and pl_module.rollout is not None
        self.steps.append([pl_module.rollout, *pl_module.refilled])


class Half(Reward):
    weight = 0.5

    def __call__(self, samples: Any) -> list[float | None]:
        return [None if i == 1 else float(len(s.completion.text) % 3) for i, s in enumerate(samples)]


def test_every_sample_of_every_step_is_in_the_file(llama: Path, tmp_path: Path) -> None:
    module, seen = rl(llama), Seen()
    module.rewards = [ExecutionReward(), Half()]
    fit(module, tmp_path, CompletionTable(every_n_steps=2), seen, steps=3)
    rows = samples(tmp_path)
    sampled = [s for step in seen.steps for rollout in step for s in rollout.samples]
    assert [(row["problem"], row["text"]) for row in rows] == [
        (s.problem.id, s.completion.text) for s in sampled
    ]
    assert [row["length"] for row in rows] == [len(s.completion.ids) for s in sampled]
    assert [row["outcome"] for row in rows] == [s.execution.outcome for s in sampled]
    assert [row["rollout_step"] for row in rows] == [1] * 6 + [2] * 6 + [3] * 6
    assert [row["group"] for row in rows] == [0, 0, 0, 1, 1, 1] * 3 and {row["rank"] for row in rows} == {0}
    for row in rows:
        given = row["rewards"]
        unknown = given["Half"] is None
        assert row["reward"] == (
            None if unknown else pytest.approx(given["ExecutionReward"] + given["Half"] / 2)
        )
    assert sum(row["reward"] is None for row in rows) == 3


def test_the_advantage_is_that_of_the_update_0_where_left_out_and_null_where_unknown(
    llama: Path, tmp_path: Path
) -> None:
    """By hand: reward minus mean of the group; of a problem that another took the place of, 0."""
    rewards = [
        WITH_SIGNAL,
        NO_SIGNAL,
        [float("nan"), 1.0, 0.0],
        LOST,
        NO_SIGNAL,
        NO_SIGNAL,
        *[WITH_SIGNAL] * 4,
    ]
    module = Drawing(
        stirred(llama),
        group_size=3,
        refill_budget=2,
        max_new_tokens=9,
        temperature=1.5,
        kl_coefficient=0.0,
        scale="none",
    )
    module.given, module.gradients, module.logged, module.asked = [rollout_of(llama, rewards)], [], [], []
    trainer = tiny.trainer(
        default_root_dir=tmp_path, max_steps=1, max_epochs=-1, callbacks=[CompletionTable()]
    )
    trainer.fit(module, datamodule=CodeDataModule(Pool(), batch_size=4))
    rows = samples(tmp_path)
    assert [row["group"] for row in rows] == [i // 3 for i in range(len(rows))] and len(rows) > 12
    asked = [name for names in module.asked for name in names]
    assert [row["problem"] for row in rows] == [name for name in asked for _ in range(3)]
    for name in asked:
        group = [row for row in rows if row["problem"] == name]
        known = [row["reward"] for row in group if row["reward"] is not None]
        for row in group:
            by_hand = None if row["reward"] is None else pytest.approx(row["reward"] - fmean(known), abs=1e-6)
            assert row["advantage"] == by_hand
    assert Counter(row["advantage"] is None for row in rows)[True] == 3 * asked.count("tiny/3") + asked.count(
        "tiny/2"
    )


def test_samples_that_are_cut_off_and_masked_have_the_advantage_0(llama: Path) -> None:
    given = rollout_of(llama, [[1.0, 0.0, float("nan"), 0.0]])
    for i, one in enumerate(given.samples):
        object.__setattr__(one, "completion", replace(one.completion, finished=i != 1))
    trained = {}
    for how in ("keep", "mask"):
        module = run(llama, given, truncated=how, kl_coefficient=0.1, scale="none")
        trained[how] = module.rollout.advantages.flatten().tolist()
    assert trained["keep"] == pytest.approx([2 / 3, -1 / 3, float("nan"), -1 / 3], nan_ok=True)
    assert trained["mask"] == pytest.approx([2 / 3, 0.0, float("nan"), -1 / 3], nan_ok=True)


def test_a_resumed_fit_has_no_step_twice(llama: Path, tmp_path: Path) -> None:
    fit(rl(llama), tmp_path, CompletionTable(), steps=4)
    assert Counter(row["rollout_step"] for row in samples(tmp_path)) == dict.fromkeys((1, 2, 3, 4), 6)
    seen = Seen()
    fit(rl(llama), tmp_path, CompletionTable(), seen, steps=3, resume=tmp_path / "step=1.ckpt")
    rows = samples(tmp_path)
    assert [row["rollout_step"] for row in rows] == [1] * 6 + [2] * 6 + [3] * 6
    resumed = [s.completion.text for step in seen.steps for rollout in step for s in rollout.samples]
    assert [row["text"] for row in rows[6:]] == resumed


def test_a_resume_that_fails_before_its_first_step_has_dropped_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(rl(llama), tmp_path, CompletionTable(), steps=2)
    module = rl(llama)
    monkeypatch.setattr(module, "prepare", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(module, tmp_path, CompletionTable(), resume=tmp_path / "step=1.ckpt")
    assert {row["rollout_step"] for row in samples(tmp_path)} == {1, 2}


def test_a_full_disk_is_one_warning_and_the_fit_goes_on(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = iter([False, True, True, False])

    def append(path: Path, rows: Any) -> None:
        if next(full):
            raise OSError(errno.ENOSPC, "No space left on device")
        append_samples(path, rows)

    monkeypatch.setattr("coderl.callbacks.completions.append_samples", append)
    fit(rl(llama), tmp_path, CompletionTable(), steps=4)
    said = [
        record.getMessage() for record in caplog.records if "samples cannot be written" in record.getMessage()
    ]
    assert len(said) == 1 and "No space left on device" in said[0] and "\n" not in said[0]
    assert sorted({row["rollout_step"] for row in samples(tmp_path)}) == [1, 4]


def test_the_file_can_be_switched_off(llama: Path, tmp_path: Path) -> None:
    fit(rl(llama), tmp_path, CompletionTable(keep_all=False), steps=1)
    assert (tmp_path / "completions.jsonl").is_file() and not list(tmp_path.glob("samples*"))


def test_files_of_ranks_that_a_resumed_fit_does_not_have_lose_the_steps_too(
    llama: Path, tmp_path: Path
) -> None:
    fit(rl(llama), tmp_path, CompletionTable(), steps=2)
    folder = RunFolder(tmp_path)
    folder.samples(1).write_bytes(folder.samples(0).read_bytes())
    fit(rl(llama), tmp_path, CompletionTable(), resume=tmp_path / "step=1.ckpt")
    assert [row["rollout_step"] for row in samples(tmp_path, 1)] == [1] * 6
    assert [row["rollout_step"] for row in samples(tmp_path)] == [1] * 6 + [2] * 6
