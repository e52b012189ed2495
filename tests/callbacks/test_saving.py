"""What a checkpoint of the last whole step brings back, and what happens where it cannot be written."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.callbacks import Callback
from torchdata.stateful_dataloader import StatefulDataLoader

from coderl.callbacks import Checkpoint
from coderl.callbacks.last_step import LastStep
from coderl.runs.checkpoint_files import CheckpointFiles, damage_of
from tests.support import tiny

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*Checkpoint directory .* exists",
    "ignore:.*set_vital",
    "ignore:.*no pre-optimization state was saved",
)
STEPS = 4


class Counts(LightningModule):
    """Trains a number; ``breaks`` are called with the step's batch index, and may raise."""

    def __init__(self, breaks: Callable[[str, int], None] = lambda where, step: None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(1, 1)
        self.breaks = breaks
        self.validated: list[int] = []
        self.automatic_optimization = False

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        self.breaks("before", batch_idx)
        self.manual_backward(self.layer(batch).square().mean())
        optimizer.step()
        self.breaks("after", batch_idx)
        optimizer.zero_grad()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.validated.append(self.trainer.global_step)
        self.breaks("validation", self.trainer.global_step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)

    def loader(self) -> Any:
        return StatefulDataLoader(torch.arange(1.0, STEPS + 1)[:, None])


def fit(
    module: Counts, folder: Path, *callbacks: Callback, again: bool = False, epochs: int = 2, **options: Any
) -> Trainer:
    trainer = tiny.trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        enable_checkpointing=True,
        num_sanity_val_steps=0,
        callbacks=[*callbacks, Checkpoint(dirpath=folder, save_last=True, every_n_train_steps=3)],
        **options,
    )
    loaders = {"train_dataloaders": module.loader(), "val_dataloaders": module.loader()}
    trainer.fit(module, **loaders, ckpt_path=folder / "last.ckpt" if again else None, weights_only=True)
    return trainer


def fails(where: str, at: int) -> Callable[[str, int], None]:
    def breaks(here: str, step: int) -> None:
        if (here, step) == (where, at):
            raise ZeroDivisionError

    return breaks


def test_a_validation_that_was_cut_off_is_made_when_the_run_is_resumed(tmp_path: Path) -> None:
    whole = Counts()
    fit(whole, tmp_path / "whole")
    folder = tmp_path / "part"
    with pytest.raises(ZeroDivisionError):
        fit(Counts(fails("validation", STEPS)), folder)
    rest = Counts()
    fit(rest, folder, again=True)
    assert rest.validated == whole.validated == [4] * STEPS + [8] * STEPS
    assert torch.equal(rest.layer.weight, whole.layer.weight)
    # It is not made twice where it had ended.
    more = Counts()
    fit(more, folder, again=True, epochs=3)
    assert more.validated == [12] * STEPS


class Seen(Callback):
    """What a run shows of each step and validation; stops it after a step or in the validation there."""

    def __init__(self, stop: tuple[str, int] | None = None) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.stop = stop

    def note(self, trainer: Trainer, what: str, *more: float) -> None:
        logged = trainer.fit_loop.epoch_loop._batches_that_stepped
        self.seen.append((what, trainer.global_step, trainer.current_epoch, logged, *more))

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self.stop == ("step", trainer.global_step):
            raise ZeroDivisionError

    def on_train_batch_end(self, trainer: Trainer, module: Any, _: Any, batch: Any, __: int) -> None:
        module.log("weight", module.layer.weight.item())
        self.note(trainer, "step", float(batch), module.layer.weight.item())

    def on_train_epoch_end(self, trainer: Trainer, module: Any) -> None:
        weight = float(trainer.callback_metrics["weight"])
        self.seen.append(("epoch end", trainer.global_step, trainer.current_epoch, weight))

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.stop == ("validated", trainer.global_step):
            raise ZeroDivisionError

    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        self.note(trainer, "validated", len(module.validated))
        module.validated = []


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"val_check_interval": 2},
        {"check_val_every_n_epoch": None, "val_check_interval": 3},
        {"check_val_every_n_epoch": 2},
        {"limit_val_batches": 0},
        {"limit_val_batches": 2, "limit_train_batches": 3},
        {"max_steps": 10},
        {"max_steps": 10, "val_check_interval": 2},
    ],
    ids=str,
)
def test_a_run_that_is_stopped_again_and_again_shows_what_a_whole_one_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any]
) -> None:
    """All of it: problems, weights, validations, epochs, and the numbers under which metrics are logged."""
    fit(Counts(), tmp_path / "whole", whole := Seen(), epochs=4, **options)
    end = whole.seen[-1][1]
    after = [("step", step) for step in range(1, end)]
    within = [(what, step) for what, step, *_ in whole.seen if what == "validated" and step < end]
    for name, stops in {"after": after, "within": within, "now and then": after[1::5]}.items():
        folder = tmp_path / name
        got: list[tuple[Any, ...]] = []
        for number, stop in enumerate([*stops, None]):
            part = Seen(stop)
            with suppress(ZeroDivisionError):
                fit(Counts(), folder, part, again=number > 0, epochs=4, **options)
            got += part.seen
        assert got == whole.seen, f"stopped at {stops}"
        assert sorted(path.name for path in folder.glob("last*")) == ["last.ckpt"]
        assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == whole.seen[-1][1]


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("where", ["before", "after"])
def test_without_room_for_a_copy_the_live_weights_serve_until_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copies: bool, where: str
) -> None:
    monkeypatch.setattr(LastStep, "_can_copy", lambda *_: copies)
    with pytest.raises(ZeroDivisionError):
        fit(Counts(fails(where, 1)), tmp_path)
    last = tmp_path / "last.ckpt"
    assert last.exists() == (copies or where == "before")
    if last.exists():
        whole = fit(Counts(), tmp_path / "whole")
        fit(rest := Counts(), tmp_path, again=True)
        assert whole.model is not None
        assert torch.equal(rest.layer.weight, whole.model.layer.weight)  # type: ignore[union-attr, arg-type]


def test_a_full_disk_is_a_warning_and_the_next_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write, full = CheckpointFiles.save_checkpoint, {3, 6}

    def save(self: CheckpointFiles, state: dict[str, Any], path: Any, options: Any = None) -> None:
        if state["global_step"] in full:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(self, state, path, options)

    monkeypatch.setattr(CheckpointFiles, "save_checkpoint", save)
    with caplog.at_level(logging.WARNING):
        fit(Counts(), tmp_path, epochs=3)
    said = [r.message for r in caplog.records if "no checkpoint of step" in r.message]
    assert len(said) == 4 and all(
        "No space left on device" in line and str(tmp_path) in line for line in said
    )
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["epoch=2-step=12.ckpt", "last.ckpt"]
    assert damage_of(tmp_path / "last.ckpt") is None


def test_an_error_of_a_callback_loses_the_step_that_it_was_raised_in(tmp_path: Path) -> None:
    class Fails(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(Counts(), tmp_path, Fails())
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2
    fit(rest := Counts(), tmp_path, again=True)
    fit(whole := Counts(), tmp_path / "whole")
    assert torch.equal(rest.layer.weight, whole.layer.weight)


def test_last_ckpt_is_written_where_another_file_holds_the_step_already(tmp_path: Path) -> None:
    class Best(Checkpoint):
        """Writes a file of its own after each validation."""

    best = Best(dirpath=tmp_path / "best", filename="best", every_n_epochs=1, save_on_train_epoch_end=False)

    class Fails(Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(Counts(), tmp_path, best, Fails())
    for name in ("best/best.ckpt", "last.ckpt"):
        assert torch.load(tmp_path / name, weights_only=True)["global_step"] == STEPS


def test_last_ckpt_has_what_callbacks_behind_it_have_counted(tmp_path: Path) -> None:
    class Behind(Checkpoint):
        counted = 0

        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            super().on_validation_end(trainer, pl_module)
            self.counted += 1

        def state_dict(self) -> dict[str, Any]:
            return super().state_dict() | {"counted": self.counted}

    first = Checkpoint(tmp_path / "run", save_last=True, every_n_epochs=1)
    with pytest.raises(ZeroDivisionError):
        fit(Counts(), tmp_path, Seen(("step", STEPS)), first, Behind(tmp_path / "behind"))
    states = torch.load(tmp_path / "run/last.ckpt", weights_only=True)["callbacks"]
    assert [state["counted"] for state in states.values() if "counted" in state] == [1]


def test_checkpoints_are_written_to_remote_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsspec's folder in memory stands for a bucket."""
    monkeypatch.chdir(tmp_path)
    remote = Checkpoint(dirpath="memory://bucket/run", save_last=True, every_n_train_steps=2)
    fit(Counts(), tmp_path / "here", remote)
    found = get_filesystem("memory://bucket").ls("/bucket/run", detail=False)
    assert sorted(found) == ["/bucket/run/epoch=1-step=8.ckpt", "/bucket/run/last.ckpt"]
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    # Both have the end of the fit.
    assert torch.load(tmp_path / "here/last.ckpt", weights_only=True)["global_step"] == 2 * STEPS


def test_last_ckpt_may_be_a_link(tmp_path: Path) -> None:
    linked = Checkpoint(dirpath=tmp_path / "linked", save_last="link", every_n_train_steps=2)

    class Looks(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 5:
                last = tmp_path / "linked/last.ckpt"
                assert last.is_symlink() and torch.load(last, weights_only=True)["global_step"] == 4

    fit(Counts(), tmp_path, Looks(), linked)
    assert torch.load(tmp_path / "linked/last.ckpt", weights_only=True)["global_step"] == 2 * STEPS
