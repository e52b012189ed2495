"""Names and paths of a run, and the rule that no run overwrites another."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from coderl.errors import UserError
from coderl.scores.results import GENERATIONS, REFERENCES, RESULTS

if TYPE_CHECKING:
    from lightning import Trainer

ROOT = Path("checkpoints")
"""The folder that run folders lie in, relative to where the command was called."""

DEBUG = ROOT / "debug"
"""The run folder of ``debug.yaml``. The next debug run empties it."""


METRICS = "metrics.csv"
"""Name of the file that the CSV logger writes, in the folder of each start."""

_MERGED = "-merged"
_SIGNS = ("summary.json", "config.yaml", f"*/version_*/{METRICS}", "*/version_*/config.yaml")


def short_name(model: str) -> str:
    """The last part of a hub id or path, in lower case and without a trailing ``-hf``.

    Args:
        model: A hub id such as ``codellama/CodeLlama-7b-Python-hf``, or a path to a folder or GGUF file.
    """
    name = Path(model).name.lower().removesuffix(".gguf").removesuffix("-hf")
    return re.sub(r"[^a-z0-9.]+", "-", name).strip("-.") or "model"


@dataclass(frozen=True)
class RunName:
    """The parts of a run's name.

    Attributes:
        model: Short name of the base model.
        dataset: Name of the problem source.
        method: Name of the algorithm.
    """

    model: str
    dataset: str
    method: str


_RUN_NAME = re.compile(r"(?P<model>.+)-(?P<dataset>[^-]+)-(?P<method>[^-]+)-qlora")


def run_name(model: str, dataset: str, method: str) -> str:
    """``{model}-{dataset}-{method}-qlora``: the folder, hub and W&B name of a run.

    Args:
        model: Hub id or path of the base model.
        dataset: Name of the problem source, such as ``mbpp``; hyphens in it become underscores, so that
            :func:`parse_run_name` can tell it from the model.
        method: Name of the algorithm, such as ``grpo``.

    >>> run_name("codellama/CodeLlama-7b-Python-hf", "mbpp", "grpo")
    'codellama-7b-python-mbpp-grpo-qlora'
    """
    return f"{short_name(model)}-{dataset.lower().replace('-', '_')}-{method.lower()}-qlora"


def parse_run_name(name: str) -> RunName | None:
    """The parts of a name that :func:`run_name` made; None for other names.

    >>> parse_run_name("codellama-7b-python-mbpp-grpo-qlora")
    RunName(model='codellama-7b-python', dataset='mbpp', method='grpo')
    """
    found = _RUN_NAME.fullmatch(name)
    return RunName(**found.groupdict()) if found else None


def is_epoch(name: str) -> bool:
    """Whether a folder's name is that of an epoch's model, see :meth:`RunFolder.merged_epoch`."""
    return re.fullmatch(r"epoch-\d+", name) is not None


class RunFolder:
    """Every path in a run folder, and the rule that nothing in it is overwritten.

    Args:
        path: The folder, such as ``checkpoints/embedded-embedded-grpo-qlora``.

    Attributes:
        path: The folder.
        summary: Scores, time and versions, written at the end of the fit.
        completions: Some sampled programs of some steps with their verdicts, a JSON line each.
        curriculum: For each problem, how many of its samples passed.
        console_log: Everything that the run has printed.
        checkpoints: The folder of Lightning's checkpoints.
        last_checkpoint: The checkpoint to resume from.
        adapter: The folder of the trained adapter, in peft's format.
        logs: The folder of the CSV logger, with one ``version_n`` for each start.
        wandb: Where W&B writes.
        tensorboard: Where TensorBoard writes.
        report: The page of ``coderl report``.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.summary = self.path / "summary.json"
        self.completions = self.path / "completions.jsonl"
        self.curriculum = self.path / "curriculum.json"
        self.console_log = self.path / "console.log"
        self.checkpoints = self.path / "checkpoints"
        self.last_checkpoint = self.checkpoints / "last.ckpt"
        self.adapter = self.path / "adapter"
        self.logs = self.path / "logs"
        self.wandb = self.path / "wandb"
        self.tensorboard = self.path / "tensorboard"
        self.report = self.path / "report.html"

    @classmethod
    def of(cls, trainer: Trainer) -> RunFolder:
        """The folder that a trainer writes to."""
        return cls(trainer.default_root_dir)

    @classmethod
    def of_model(cls, folder: Path) -> RunFolder | None:
        """The run that a model was made by, as far as its folder's name and place say; None for others.

        Args:
            folder: Of the adapter or the merged model. That of a single epoch is not what the run ended with:
                None.
        """
        if folder == cls(folder.parent).adapter:
            return cls(folder.parent)
        name = folder.name.removesuffix(_MERGED)
        return cls(folder.with_name(name)) if name not in ("", folder.name) else None

    @property
    def merged(self) -> Path:
        """The folder of base and adapter as one model: beside the run's, with ``-merged``."""
        return self.path.with_name(f"{self.path.name}{_MERGED}")

    def merged_epoch(self, epoch: int) -> Path:
        """The folder of the merged model of an epoch, counted from 1."""
        return self.merged / f"epoch-{epoch}"

    def samples(self, rank: int = 0) -> Path:
        """Where a rank writes all that it has sampled, see :mod:`coderl.runs.samples`."""
        return self.path / (f"samples-rank{rank}.jsonl.gz" if rank else "samples.jsonl.gz")

    def further_samples(self, ranks: int) -> list[Path]:
        """The files of samples of ranks from the number ``ranks`` on, which an earlier start had."""
        found = {
            path: re.fullmatch(r"samples-rank(\d+)\.jsonl\.gz", path.name) for path in self.path.glob("*")
        }
        return sorted(path for path, match in found.items() if match and int(match[1]) >= ranks)

    def is_run(self) -> bool:
        """Whether a run has written here, so that there is something to report."""
        return any(next(self.path.glob(sign), None) for sign in _SIGNS)

    def unfinished_answers(self, task: str, when: str, key: str) -> Path:
        """The file in which an evaluation keeps its answers until it has ended.

        Args:
            task: Name of the task.
            when: ``"before"`` or ``"after"`` training.
            key: Hash of what the answers depend on.
        """
        return self.path / f".{task}_{when}_{key}.jsonl"

    def starts(self) -> list[Path]:
        """The folders that the starts of the run have logged to, oldest first."""
        found = [path for path in self.path.glob("*/version_*") if path.is_dir()]

        def number(path: Path) -> int:
            digits = path.name.removeprefix("version_")
            return int(digits) if digits.isdecimal() else -1

        return sorted(found, key=lambda path: (number(path), path.name))

    def metrics(self) -> list[Path]:
        """Where the starts log metrics, oldest first; a start without the CSV logger has no such file."""
        return [folder / METRICS for folder in self.starts()]

    def configs(self) -> list[Path]:
        """The files of settings that the starts have saved, oldest first.

        Only where they are saved: W&B has other files of this name in the folder.
        """
        # Without a logger there are no folders of starts, and the files are config.yaml, config-2.yaml ...
        folders = self.starts() or [self.path]
        return [
            path
            for folder in folders
            for path in sorted(folder.glob("config*.yaml"), key=lambda path: (len(path.name), path.name))
        ]

    def latest_config(self) -> Path | None:
        """The settings of the latest start; None where none were saved."""
        return next(reversed(self.configs()), None)

    def latest_checkpoint(self) -> Path | None:
        """The checkpoint that was written last; None where there is none."""
        return max(self.path.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, default=None)

    def resume_command(self, checkpoint: str | Path) -> str:
        """The command that goes on from a checkpoint, with the settings of the latest start."""
        return f"coderl fit --config {self.latest_config() or 'CONFIG'} --ckpt_path {checkpoint}"

    def require_fresh(self) -> None:
        """Refuse a folder that a run has written to; :data:`DEBUG` is emptied, unless it is a link.

        Files of a failed start do not count: settings, ``console.log``, what W&B and TensorBoard write before
        the first step, and the answers and results of the evaluation before training. The next start
        continues with such answers, and writes its other files beside these.

        Raises:
            UserError: The folder is a file, or holds anything else.
        """
        folder = self.path
        if folder == DEBUG and not folder.is_symlink() and self.console_log.is_file():
            shutil.rmtree(folder)
            shutil.rmtree(self.merged, ignore_errors=True)
        if not folder.exists():
            return
        if not folder.is_dir():
            raise UserError(
                f"the run folder {folder} is a file; name a folder with --trainer.default_root_dir DIR"
            )
        names = [
            *("logs", "logs/version_*", "logs/version_*/config.yaml", "config.yaml", "console.log"),
            *(
                ".*_before_*.jsonl",
                *(f"{kind}_*_before_*.json" for kind in (RESULTS, GENERATIONS, REFERENCES)),
            ),
            *("wandb", "wandb/**/*", "tensorboard", "tensorboard/**/*"),
        ]
        failed_starts = {path for name in names for path in folder.glob(name)}
        if set(folder.rglob("*")) - failed_starts:
            checkpoint = self.latest_checkpoint()
            resume = f", or go on with --ckpt_path {checkpoint}" if checkpoint else ""
            raise UserError(
                f"the run folder {folder} is not empty and nothing in it is overwritten; "
                f"remove it, name another with --trainer.default_root_dir DIR{resume}"
            )
