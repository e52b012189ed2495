"""The data module: batches of problems as text, shuffled for training, resumable in mid-epoch."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

from lightning import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from coderl.data.sampler import EpochSampler
from coderl.data.sources import SPLITS, ProblemSource
from coderl.errors import UsageError, UserError
from coderl.types import Problem

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

Loader = DataLoader[Problem]

log = logging.getLogger(__name__)


class CodeDataModule(LightningDataModule):
    """Serves the problems of a source in batches of text: a batch is a list of problems.

    Training batches are shuffled, another order each epoch, all of them settled by ``seed``. The loader's
    place is saved in Lightning's checkpoints, so that a resumed run meets the problems it would have met. The
    last batch of an epoch may be smaller. Validation and test keep the source's order.

    Args:
        source: Where the problems come from: MBPP, HumanEval, JSONLProblems, Embedded or one's own class.
        batch_size: Problems per step and process (each is sampled several times; samples do not count here).
        seed: Seed of the training order.
        limit_train: Use only the first so many training problems. None: all.
        limit_validation: Use only the first so many validation problems. None: all.
        limit_test: Use only the first so many test problems. None: all.
    """

    def __init__(
        self,
        source: ProblemSource,
        batch_size: int = 12,
        seed: int = 42,
        limit_train: int | None = None,
        limit_validation: int | None = None,
        limit_test: int | None = None,
    ) -> None:
        super().__init__()
        self.source = source
        self.batch_size = batch_size
        self.seed = seed
        self.limits = {"train": limit_train, "validation": limit_validation, "test": limit_test}
        counts = {"batch_size": batch_size} | {f"limit_{split}": n for split, n in self.limits.items()}
        for option, count in counts.items():
            if count is not None and count < 1:
                raise UsageError(f"data.{option} is {count}; it counts problems: give 1 or more")
        self._loaded: dict[str, list[Problem]] = {}
        self._predicates: list[tuple[Callable[[Problem], bool], str]] = []

    def problems(self, split: str) -> list[Problem]:
        """The problems of a split, limited and filtered.

        Raises:
            UserError: There are none, or the source cannot be read.
        """
        problems = self._split(split)
        if not problems:
            why = f"; {self.source.hint(split)}"
            if self.source.load(split):
                why = f", all were left out: {'; '.join(reason for _, reason in self._predicates)}"
            raise UserError(f"{self.source.name}: the {split} split is empty{why}")
        return problems

    def keep(self, predicate: Callable[[Problem], bool], reason: str = "unsuitable") -> int:
        """Leave out the problems for which ``predicate`` is false, in every split, and say how many.

        Splits not read yet are filtered when they are.

        Args:
            predicate: What stays.
            reason: Why the others do not, for the log.

        Returns:
            How many training problems it left out.

        Raises:
            UserError: No training problem is left.
        """
        before = len(self.problems("train"))
        for split, problems in self._loaded.items():
            self._loaded[split] = self._filtered(split, problems, predicate, reason)
        self._predicates.append((predicate, reason))
        return before - len(self._loaded["train"])

    def prepare_data(self) -> None:
        """Read every split: bad files are told before any weights load, and one rank downloads for all."""
        for split in SPLITS:
            self._split(split)

    def train_dataloader(self) -> StatefulDataLoader[Problem]:
        """Shuffled batches. Its ``state_dict`` continues anywhere, epoch boundaries included."""
        problems = self.problems("train")
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = EpochSampler(problems, self.seed, rank, world_size)
        with warnings.catch_warnings():
            # torchdata 0.11 calls a function that torch 2.13 deprecates.
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
            return StatefulDataLoader(problems, self.batch_size, sampler=sampler, collate_fn=list)

    def val_dataloader(self) -> Loader | list[Loader]:
        """Batches in order. A fit does without where the source has no validation problems.

        Raises:
            UserError: There are none, and `coderl validate` asks for them.
        """
        asked = self.trainer is not None and self.trainer.state.fn == TrainerFn.VALIDATING
        return self._plain("validation") if asked or self._split("validation") else []

    def test_dataloader(self) -> Loader:
        """Batches in order."""
        return self._plain("test")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leaves the batch alone: it is text, and Lightning cannot rebuild frozen dataclasses."""
        return batch

    def _plain(self, split: str) -> Loader:
        return DataLoader(self.problems(split), self.batch_size, collate_fn=list)  # type: ignore[arg-type]

    def _split(self, split: str) -> list[Problem]:
        if split not in SPLITS:
            raise UsageError(f"no split '{split}'; there are {', '.join(SPLITS)}")
        if split not in self._loaded:
            problems = self.source.load(split)[: self.limits[split]]
            for predicate, reason in self._predicates:
                problems = self._filtered(split, problems, predicate, reason)
            self._loaded[split] = problems
        return self._loaded[split]

    def _filtered(
        self, split: str, problems: list[Problem], predicate: Callable[[Problem], bool], reason: str
    ) -> list[Problem]:
        kept = [problem for problem in problems if predicate(problem)]
        if split == "train" and problems and not kept:
            raise UserError(
                f"{self.source.name}: none of the {len(problems)} {split} problems is left: {reason}; "
                "raise the limit, or choose another source"
            )
        if len(kept) < len(problems):
            left_out = len(problems) - len(kept)
            log.warning("%d of %d %s problems left out: %s", left_out, len(problems), split, reason)
        return kept
