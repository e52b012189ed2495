from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import LightningModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from coderl.cli import main
from coderl.data import CodeDataModule
from coderl.data.sampler import EpochSampler
from coderl.errors import UsageError, UserError
from coderl.problems import ProblemSource
from coderl.types import Problem
from tests.support import tiny


class Numbered(ProblemSource):
    """Problems ``train/0``, ``train/1`` ...; no validation split unless asked for."""

    name = "numbered"

    def __init__(self, train: int, validation: int = 0, test: int = 3) -> None:
        self.counts = {"train": train, "validation": validation, "test": test}

    def load(self, split: str) -> list[Problem]:
        return [Problem(f"{split}/{i}", prompt=str(i), split=split) for i in range(self.counts[split])]


def data(count: int, batch_size: int = 3, seed: int = 42) -> CodeDataModule:
    return CodeDataModule(Numbered(count), batch_size=batch_size, seed=seed)


def epochs(loader: Any, count: int) -> list[list[list[str]]]:
    return [[[p.id for p in batch] for batch in loader] for _ in range(count)]


# --- order


def test_an_epoch_serves_each_problem_once_in_lists_the_last_one_short() -> None:
    (batches,) = epochs(data(10).train_dataloader(), 1)
    assert [len(batch) for batch in batches] == [3, 3, 3, 1]
    assert sorted(itertools.chain(*batches)) == sorted(f"train/{i}" for i in range(10))


def test_order_differs_per_epoch_and_is_determined_by_the_seed() -> None:
    first, second, third = epochs(data(20).train_dataloader(), 3)
    assert first != second != third != first
    torch.manual_seed(1)  # the global generator has no say
    assert epochs(data(20).train_dataloader(), 3) == [first, second, third]
    assert epochs(data(20, seed=1).train_dataloader(), 1) != [first]


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 9), batch=st.integers(1, 4), steps=st.integers(0, 20))
def test_a_new_loader_continues_from_the_state_of_the_old_one(count: int, batch: int, steps: int) -> None:
    def stream(loader: Any) -> Any:
        while True:
            for problems in loader:
                yield [p.id for p in problems]

    old = data(count, batch).train_dataloader()
    batches = stream(old)
    for _ in range(steps):
        next(batches)
    new = data(count, batch).train_dataloader()
    new.load_state_dict(old.state_dict())
    expected = list(itertools.islice(batches, 12))
    assert list(itertools.islice(stream(new), 12)) == expected


def test_after_a_pass_left_early_comes_the_next_epoch() -> None:
    loader, whole = data(9).train_dataloader(), epochs(data(9).train_dataloader(), 2)
    next(iter(loader))
    assert epochs(loader, 1) == [whole[1]]


@settings(deadline=None, max_examples=80)
@given(
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12)),
    seeds=st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)),
    worlds=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    stops=st.tuples(st.integers(0, 11), st.integers(0, 11)),
)
def test_with_other_data_seeds_or_ranks_an_epoch_goes_on_with_what_it_has_not_had(
    sizes: tuple[int, ...], seeds: tuple[int, ...], worlds: tuple[int, ...], stops: tuple[int, ...]
) -> None:
    """A run that is resumed twice, each time with other settings."""
    had: set[int] = set()
    epoch, state = 0, None
    for part, (size, seed, world) in enumerate(zip(sizes, seeds, worlds, strict=True)):
        ranks = [EpochSampler(Numbered(size).load("train"), seed, rank, world) for rank in range(world)]
        for sampler in ranks:
            if state is not None:
                sampler.load_state_dict(state)
        if ranks[0].epoch != epoch:
            had, epoch = set(), ranks[0].epoch
        new = set(range(size)) - had
        stop = min(stops[part], ranks[0].left() - 1) if part < 2 else ranks[0].left()
        got = {index for sampler in ranks for index in itertools.islice(sampler, stop)}
        assert got <= new
        if part == 2:
            assert got == new
        had |= got
        state = ranks[0].state_dict()
        assert all(sampler.state_dict() == state for sampler in ranks)


@given(count=st.integers(1, 30), world=st.integers(1, 5), epoch=st.integers(0, 3))
def test_ranks_get_equal_shares_of_an_epoch(count: int, world: int, epoch: int) -> None:
    problems = Numbered(count).load("train")
    parts = []
    for rank in range(world):
        sampler = EpochSampler(problems, seed=0, rank=rank, world_size=world)
        sampler.set_epoch(epoch)
        parts.append(list(sampler))
        assert len(parts[-1]) == len(sampler)
    assert set(itertools.chain(*parts)) == set(range(count))
    assert sum(map(len, parts)) < count + world


# --- splits, limits, filters


def test_limits_take_the_first_problems_of_each_split() -> None:
    module = CodeDataModule(Numbered(9, 9, 9), limit_train=2, limit_validation=3, limit_test=4)
    assert {s: len(module.problems(s)) for s in ("train", "validation", "test")} == {
        "train": 2, "validation": 3, "test": 4,
    }  # fmt: skip
    assert [p.id for p in module.problems("train")] == ["train/0", "train/1"]
    assert [len(b) for b in module.test_dataloader()] == [4]


def test_keep_filters_every_split_read_or_not_and_counts_the_train_split() -> None:
    module = CodeDataModule(Numbered(9, 0, 5))
    assert len(module.problems("train")) == 9
    assert module.keep(lambda p: p.prompt not in {"1", "7"}) == 2
    assert module.keep(lambda p: p.prompt != "2") == 1
    assert [p.prompt for p in module.problems("test")] == ["0", "3", "4"]
    assert len(module.problems("train")) == 6
    assert sorted(p.prompt for b in module.train_dataloader() for p in b) == ["0", "3", "4", "5", "6", "8"]


def test_the_number_of_problems_left_out_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    module = CodeDataModule(Numbered(9, 0, 5))
    module.keep(lambda p: p.prompt not in {"1", "7"}, "too long")
    module.problems("test")
    assert caplog.messages == [
        "2 of 9 train problems left out: too long",
        "1 of 5 test problems left out: too long",
    ]


def test_keep_refuses_to_leave_no_training_problem() -> None:
    module = CodeDataModule(Numbered(9, 0, 3))
    with pytest.raises(UserError, match="none of the 9 train problems is left: too long"):
        module.keep(lambda _: False, "too long")
    module.keep(lambda p: p.split == "train", "no solution")
    with pytest.raises(UserError, match="test split is empty, all were left out: no solution"):
        module.problems("test")


def test_empty_splits_and_counts_below_1_are_errors() -> None:
    with pytest.raises(UserError, match=r"numbered: the validation split is empty; .*Numbered"):
        CodeDataModule(Numbered(1)).problems("validation")
    assert CodeDataModule(Numbered(1)).val_dataloader() == []
    with pytest.raises(UserError, match="the train split is empty"):
        CodeDataModule(Numbered(0)).train_dataloader()
    with pytest.raises(UsageError, match="batch_size is 0"):
        CodeDataModule(Numbered(1), batch_size=0)
    with pytest.raises(UsageError, match="limit_test is 0"):
        CodeDataModule(Numbered(1), limit_test=0)
    with pytest.raises(UsageError, match="no split 'dev'"):
        CodeDataModule(Numbered(1)).problems("dev")


def test_bad_data_is_reported_before_any_weights_load() -> None:
    class Broken(Numbered):
        def load(self, split: str) -> list[Problem]:
            if split == "test":
                raise UserError("line 3 is malformed")
            return super().load(split)

    class Loads(Recorder):
        def configure_model(self) -> None:
            raise AssertionError("weights were loaded")

    trainer = tiny.trainer(max_epochs=1)
    with pytest.raises(UserError, match="line 3 is malformed"):
        trainer.fit(Loads(), datamodule=CodeDataModule(Broken(2)))


# --- Lightning


class Recorder(LightningModule):
    """A module with manual optimization, like the algorithms, that records the ids of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, list[str]]] = []

    def training_step(self, batch: list[Problem], batch_idx: int) -> None:
        self.seen.append((self.current_epoch, [p.id for p in batch]))
        optimizer = self.optimizers()
        self.manual_backward(self.weight.sum())
        optimizer.step()  # type: ignore[union-attr]

    def validation_step(self, batch: list[Problem], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Killed(Exception):
    pass


class Kill(Callback):
    """Raises :class:`Killed` at the start of step ``step``, in place of a killed process."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if len(module.seen) == self.step:
            raise Killed


def fit(
    folder: Path, *callbacks: Callback, resume: Path | None = None, **options: Any
) -> list[tuple[int, list[str]]]:
    module = Recorder()
    trainer = tiny.trainer(
        default_root_dir=folder,
        max_epochs=3,
        callbacks=list(callbacks),
        enable_checkpointing=bool(callbacks),
        num_sanity_val_steps=0,
        **options,
    )
    source = Numbered(7, validation=2)
    with contextlib.suppress(Killed):
        trainer.fit(
            module, datamodule=CodeDataModule(source, batch_size=2), ckpt_path=resume, weights_only=True
        )
    return module.seen


# Lightning's own advice, and its use of what torch deprecates.
quiet = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*Checkpoint directory",
    "ignore:.*LeafSpec",
    "ignore:.*ModelCheckpoint with manual optimization",
)


@quiet
@pytest.mark.parametrize("step", range(1, 12))
def test_a_killed_run_resumes_with_the_next_batch(tmp_path: Path, step: int) -> None:
    whole = fit(tmp_path)
    assert [epoch for epoch, _ in whole] == [0] * 4 + [1] * 4 + [2] * 4
    every: dict[str, Any] = {"every_n_train_steps": 1, "save_on_exception": False}
    begun = fit(tmp_path, ModelCheckpoint(tmp_path, "at", **every), Kill(step))
    assert begun == whole[:step]
    rest = fit(tmp_path, ModelCheckpoint(tmp_path, "on", **every), resume=tmp_path / "at.ckpt")
    assert begun + rest == whole


@quiet
@pytest.mark.parametrize("option", [{"limit_train_batches": 3}, {"limit_val_batches": 0}])
def test_a_run_resumed_from_an_epochs_end_begins_the_next(tmp_path: Path, option: dict[str, Any]) -> None:
    whole = fit(tmp_path, **option)
    per_epoch = len(whole) // 3
    every: dict[str, Any] = {"every_n_epochs": 1, "save_on_train_epoch_end": True, "save_on_exception": False}
    begun = fit(tmp_path, ModelCheckpoint(tmp_path, "end", **every), Kill(per_epoch + 1), **option)
    assert begun == whole[: per_epoch + 1]
    rest = fit(tmp_path, ModelCheckpoint(tmp_path, "on", **every), resume=tmp_path / "end.ckpt", **option)
    assert begun[:per_epoch] + rest == whole


def test_validating_a_source_without_a_validation_split_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny.checkpoint(tmp_path / "model")
    assert main(["validate", "-c", "quickstart.yaml", "--model.policy.model", str(model)]) == 1
    assert "the validation split is empty" in capfd.readouterr().err
