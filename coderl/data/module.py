"""A LightningDataModule that serves problems as text, shuffled for training and resumable in mid-epoch."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from coderl.data.curriculum import Curriculum, CurriculumSampler, PassHistory, weighted_sample
from coderl.data.loops import BATCHES, begin_next_epoch
from coderl.data.sampler import EpochSampler
from coderl.errors import UsageError, UserError
from coderl.problems.contamination import TrainingRecord, as_published, describe, overlaps
from coderl.problems.sources import SPLITS, ProblemSource
from coderl.runs.folder import RunFolder
from coderl.types import Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

Loader = DataLoader[Problem]

log = logging.getLogger(__name__)


class CodeDataModule(LightningDataModule):
    """Serves the problems of a source in batches; a batch is a list of problems.

    Training problems are shuffled, in another order each epoch, which ``seed`` determines; with a curriculum
    they are sampled (:class:`~coderl.data.CurriculumSampler`). The loader's position is saved in Lightning's
    checkpoints, so that a resumed run gets the same batches as one that was not stopped. The last batch of an
    epoch may be smaller. Validation and test keep the source's order.

    Args:
        source: Where the problems come from: MBPP, HumanEval, JSONLProblems, Embedded or your own class.
        batch_size: Problems per step and process (each is sampled several times; samples do not count here).
        seed: Seed of the training order.
        limit_train: Use only the first so many training problems. None: all.
        limit_validation: Use only the first so many validation problems. None: all.
        limit_test: Use only the first so many test problems, of benchmarks after the fit too. None: all.
        curriculum: Prefer training problems some of whose samples pass. None: each problem once an epoch.
        allow_contamination: Train on problems of the test split, or of a benchmark that is evaluated
            afterwards. The results files then say so.
    """

    def __init__(
        self,
        source: ProblemSource,
        batch_size: int = 12,
        seed: int = 42,
        limit_train: int | None = None,
        limit_validation: int | None = None,
        limit_test: int | None = None,
        curriculum: Curriculum | None = None,
        allow_contamination: bool = False,
    ) -> None:
        super().__init__()
        self.source = source
        self.batch_size = batch_size
        self.seed = seed
        self.curriculum = curriculum
        self.allow_contamination = allow_contamination
        self.limits = {"train": limit_train, "validation": limit_validation, "test": limit_test}
        counts = {"batch_size": batch_size} | {f"limit_{split}": n for split, n in self.limits.items()}
        for option, count in counts.items():
            if count is not None and count < 1:
                raise UsageError(f"data.{option} is {count}; it counts problems: give 1 or more")
        self._loaded: dict[str, list[Problem]] = {}
        self._predicates: list[tuple[Callable[[Problem], bool], str, Collection[str]]] = []
        self._history: PassHistory | None = None

    def problems(self, split: str) -> list[Problem]:
        """The problems of a split, limited and filtered.

        Raises:
            UserError: There are none, or the source cannot be read.
        """
        problems = self._load_split(split)
        if not problems:
            why = f"; {self.source.hint(split)}"
            if self.source.load(split):
                reasons = [reason for _, reason, splits in self._predicates if split in splits]
                why = f", all were left out: {'; '.join(reasons)}"
            raise UserError(f"{self.source.name}: the {split} split is empty{why}")
        return problems

    def has(self, split: str) -> bool:
        """Whether a split has problems."""
        return bool(self._load_split(split))

    def keep(
        self,
        predicate: Callable[[Problem], bool],
        reason: str = "unsuitable",
        splits: Collection[str] = SPLITS,
    ) -> int:
        """Leave out the problems for which ``predicate`` is false, and log how many.

        Splits that are not loaded yet are filtered when they are.

        Args:
            predicate: True for the problems to keep.
            reason: Why the others are left out, for the log.
            splits: The splits that are filtered.

        Returns:
            How many training problems were left out.

        Raises:
            UserError: No training problem is left.
        """
        before = len(self.problems("train"))
        for split in self._loaded.keys() & set(splits):
            self._loaded[split] = self._filter(split, self._loaded[split], predicate, reason)
        self._predicates.append((predicate, reason, splits))
        return before - len(self._loaded["train"])

    def guard(self, held_out: Sequence[Problem], name: str) -> None:
        """Refuse held-out problems that are also training problems (contamination).

        With ``allow_contamination``, and for a source with a single split, it only logs a warning. Three
        problems in MBPP's published splits have the same words: these too are only logged.

        Args:
            held_out: The problems to be evaluated on.
            name: What messages call them, such as ``"the test split"``.

        Raises:
            UserError: Training problems are among them, by id or by their words.
        """
        source, train = self.source.name, self._load_split("train")
        found = overlaps(train, held_out)
        copies = [overlap for overlap in found if not as_published(overlap)]
        if not copies:
            if found:
                pairs = ", ".join(map(str, found))
                log.warning("%s: %s has training problems in MBPP as published: %s", source, name, pairs)
            return
        what = f"{len(copies)} of {len(train)} training problems are in {name}: {describe(copies)}"
        if not self.source.single_split and not self.allow_contamination:
            raise UserError(
                f"{source}: {what}; remove them from the training data, or train on them all the "
                "same with --data.allow_contamination true: results then say so"
            )
        log.warning("%s: CONTAMINATED, %s; scores there say little of other problems", source, what)

    def trained(self) -> TrainingRecord:
        """The record of the training problems, limited and filtered, that is saved with the trained model."""
        return TrainingRecord.of(self.problems("train"))

    def prepare_data(self) -> None:
        """Read every split, so that bad files are reported before any weights load.

        Before a fit, training problems that are also in another split are refused, see :meth:`guard`.
        """
        # Lightning calls this hook on one rank of a machine while the others wait: only one downloads.
        for split in SPLITS:
            self._load_split(split)
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            _ = self.history  # raises where the file of the curriculum cannot be read
            # The validation split too: the best checkpoint would be the one that has memorized most.
            for split in SPLITS[1:]:
                self.guard(self._load_split(split), f"the {split} split")

    def train_dataloader(self) -> StatefulDataLoader[Problem]:
        """Training batches. The loader's ``state_dict`` resumes anywhere, epoch boundaries included."""
        problems = self.problems("train")
        sampler = self._sampler(problems)
        with warnings.catch_warnings():
            # torchdata 0.11 calls a function that torch 2.13 deprecates.
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
            return StatefulDataLoader(problems, self.batch_size, sampler=sampler, collate_fn=list)

    def val_dataloader(self) -> Loader | list[Loader]:
        """Validation batches in order; none in a fit whose source has no validation problems.

        Raises:
            UserError: There are none, and ``coderl validate`` needs them.
        """
        asked = self.trainer is not None and self.trainer.state.fn == TrainerFn.VALIDATING
        return self._in_order("validation") if asked or self.has("validation") else []

    def test_dataloader(self) -> Loader:
        """Test batches in order."""
        return self._in_order("test")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return the batch as it is."""
        # It is text, and Lightning would try to rebuild each Problem, which fails for frozen dataclasses.
        return batch

    @property
    def history(self) -> PassHistory | None:
        """How often samples of each problem passed; None without a curriculum.

        Raises:
            UserError: The curriculum names a history that cannot be read.
        """
        if self.curriculum is not None and self._history is None:
            history = PassHistory(self.curriculum.decay)
            if self.curriculum.history is not None:
                history.load(Path(self.curriculum.history))
            self._history = history
        return self._history

    def observe(self, problems: Sequence[Problem], passed: Sequence[int], known: Sequence[int]) -> None:
        """Update the curriculum with the outcomes of a rollout. Does nothing without a curriculum.

        Collective: call it once for each rollout, on every rank. Rank 0 writes ``curriculum.json`` into the
        run folder.

        Args:
            problems: Training problems; one that is listed twice is one observation with all its samples.
            passed: How many samples of each passed.
            known: How many samples of each got a verdict (infrastructure errors are none).
        """
        if (history := self.history) is None:
            return
        # One row for each training problem, so that the sum over ranks needs no agreement on which were
        # drawn.
        train = self.problems("train")
        rows = {problem.id: row for row, problem in enumerate(train)}
        counts = torch.zeros(len(train), 2)
        for problem, right, judged in zip(problems, passed, known, strict=True):
            counts[rows[problem.id]] += torch.tensor([right, judged - right])
        if self.trainer is not None and self.trainer.world_size > 1:
            strategy = self.trainer.strategy
            total = strategy.reduce(counts.to(strategy.root_device), reduce_op="sum")
            assert isinstance(total, torch.Tensor)
            counts = total.cpu()
        for row in counts.any(dim=1).nonzero().flatten().tolist():
            history.observe(train[row].id, *counts[row].tolist())
        if self.trainer is not None and self.trainer.is_global_zero:
            history.save(RunFolder.of(self.trainer).curriculum)

    def draw(self, count: int, without: Collection[str]) -> list[Problem]:
        """Sample further training problems, without replacement, from torch's global generator.

        With a curriculum by its weights, otherwise all with equal probability.

        Args:
            count: How many; fewer are returned where too few are left.
            without: Ids of problems to exclude.
        """
        left = [problem for problem in self.problems("train") if problem.id not in without]
        return [left[index] for index in weighted_sample(left, count, self.history)]

    def state_dict(self) -> dict[str, Any]:
        """The curriculum's history, for Lightning's checkpoint. The loader saves its position by itself."""
        return {} if self.history is None else self.history.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the history, if the run still has a curriculum."""
        if self.curriculum is not None:
            # Not through `history`: a resumed run does not need the file of the earlier run any more.
            self._history = self._history or PassHistory(self.curriculum.decay)
            self._history.load_state_dict(state)

    def resume(self, loop: dict[str, Any]) -> None:
        """Fit a checkpoint's count of batches to what is left of its epoch, and say what has changed since.

        Lightning ends an epoch when so many batches are done as the loader has, whatever problems they had:
        with another batch size, or other problems, it would skip problems or ask for more than there are.

        Args:
            loop: State of Lightning's fit loop, from a checkpoint that was written at the end of a step, and
                settled (:func:`coderl.data.loops.settle`).
        """
        loaders = loop["state_dict"].get("combined_loader") or [{}]
        state = (loaders[0].get("_sampler_iter_state") or {}).get("sampler_state")
        if state is None:  # the checkpoint is of a fit with a loader of its own
            return
        if loop["epoch_progress"]["current"]["processed"] != state["epoch"]:
            return  # the loop ended the epoch before the sampler (limit_train_batches): the next one begins
        sampler, current = self._sampler(self.problems("train")), loop[BATCHES]["current"]
        sampler.load_state_dict(state)
        ended = sampler.epoch > state["epoch"]
        batches, left = (-(-count // self.batch_size) for count in (sampler.num_samples, sampler.left()))
        if batches - left == current["processed"] and sampler.fits(state) and not ended:
            return
        what = "another batch size"
        if not sampler.fits(state):
            then, now = state["size"], len(sampler.ids)
            what = f"other training problems, seed or ranks ({then} problems then, {now} now)"
        log.warning(
            "since the checkpoint there is %s: its epoch goes on with the %d problems that it has not had, "
            "in %d batches",
            what,
            0 if ended else sampler.left() * sampler.num_replicas,
            0 if ended else left,
        )
        if ended:
            begin_next_epoch(loop)
        else:
            # In mid-epoch the batch is not counted as completed: the step was just about to end.
            completed = batches - left - (current["processed"] - current["completed"])
            loop[BATCHES]["current"] = dict.fromkeys(current, batches - left) | {"completed": completed}

    def _sampler(self, problems: list[Problem]) -> EpochSampler:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if self.history is None:
            return EpochSampler(problems, self.seed, rank, world_size)
        return CurriculumSampler(problems, self.history, self.batch_size, self.seed, rank, world_size)

    def _in_order(self, split: str) -> Loader:
        return DataLoader(self.problems(split), self.batch_size, collate_fn=list)  # type: ignore[arg-type]

    def _load_split(self, split: str) -> list[Problem]:
        """The problems of a split, limited and filtered, read once. May be empty."""
        if split not in SPLITS:
            raise UsageError(f"no split '{split}'; there are {', '.join(SPLITS)}")
        if split not in self._loaded:
            problems = self.source.load(split)[: self.limits[split]]
            for predicate, reason, splits in self._predicates:
                if split in splits:
                    problems = self._filter(split, problems, predicate, reason)
            self._loaded[split] = problems
        return self._loaded[split]

    def _filter(
        self, split: str, problems: list[Problem], predicate: Callable[[Problem], bool], reason: str
    ) -> list[Problem]:
        kept = [problem for problem in problems if predicate(problem)]
        if split == "train" and problems and not kept:
            raise UserError(
                f"{self.source.name}: none of the {len(problems)} {split} problems is left: {reason}; "
                "change that, or choose another source"
            )
        if len(kept) < len(problems):
            left_out = len(problems) - len(kept)
            log.warning("%d of %d %s problems left out: %s", left_out, len(problems), split, reason)
        return kept
