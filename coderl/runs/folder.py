"""Names and folders of runs: where a run writes, and that it never writes over another one."""

from __future__ import annotations

import itertools
import re
import shutil
from pathlib import Path

from coderl.errors import UserError

ROOT = Path("checkpoints")
"""The folder that run folders lie in, relative to where the command was called."""

DEBUG = ROOT / "debug"
"""The run folder of ``debug.yaml``: the one that the next run in it takes the place of."""


def short_name(model: str) -> str:
    """The last part of a hub id or path, in lower case and without a trailing ``-hf``.

    Args:
        model: A hub id such as ``codellama/CodeLlama-7b-Python-hf``, or a path to a folder or GGUF file.
    """
    name = Path(model).name.lower().removesuffix(".gguf").removesuffix("-hf")
    return re.sub(r"[^a-z0-9.]+", "-", name).strip("-.") or "model"


def run_name(model: str, dataset: str, method: str) -> str:
    """``{model}-{dataset}-{method}-qlora``: the folder, hub and W&B name of a run.

    Args:
        model: Hub id or path of the base model.
        dataset: Name of the problem source, such as ``mbpp``.
        method: Name of the algorithm, such as ``grpo``.

    >>> run_name("codellama/CodeLlama-7b-Python-hf", "mbpp", "grpo")
    'codellama-7b-python-mbpp-grpo-qlora'
    """
    return f"{short_name(model)}-{dataset.lower()}-{method.lower()}-qlora"


def is_run_name(name: str) -> bool:
    """Whether ``name`` has the form of :func:`run_name`'s.

    >>> is_run_name("codellama-7b-python-mbpp-grpo-qlora"), is_run_name("mine")
    (True, False)
    """
    return re.fullmatch(r"[a-z0-9.][a-z0-9.-]*-\S+-\S+-qlora", name) is not None


def merged_folder(run: str | Path) -> Path:
    """Where the merged model of the run in folder ``run`` goes: beside it, with ``-merged``."""
    run = Path(run)
    return run.with_name(f"{run.name}-merged")


def require_fresh(folder: Path) -> None:
    """Refuse a run folder that something was written to; :data:`DEBUG` is emptied, unless it is a link.

    A start that failed leaves ``logs/version_n/config.yaml``, ``console.log`` and what W&B and TensorBoard
    write before the first step; the next one writes beside it, or below. One that was killed while it
    measured the policy as it was leaves answers, with which the next one goes on; one that was killed between
    that and its first step leaves results, beside which the next one writes its own.

    Args:
        folder: Where the run would write.

    Raises:
        UserError: If the folder is a file, or holds anything more than that.
    """
    if folder == DEBUG and not folder.is_symlink() and (folder / "console.log").is_file():
        shutil.rmtree(folder)
        shutil.rmtree(merged_folder(folder), ignore_errors=True)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(
            f"the run folder {folder} is a file; name a folder with --trainer.default_root_dir DIR"
        )
    results = [f"{kind}_*_before_*.json" for kind in ("evaluation_results", "generations", "references")]
    parts = ("logs", "logs/version_*", "logs/version_*/config.yaml", ".*_before_*.jsonl", *results)
    parts += ("config.yaml", "console.log", "wandb", "tensorboard")
    failed_starts = {path for part in parts for path in folder.glob(part)}
    failed_starts |= {path for name in ("wandb", "tensorboard") for path in folder.glob(f"{name}/**/*")}
    if set(folder.rglob("*")) - failed_starts:
        checkpoint = latest_checkpoint(folder)
        resume = f", or go on with --ckpt_path {checkpoint}" if checkpoint else ""
        raise UserError(
            f"the run folder {folder} is not empty and nothing in it is overwritten; "
            f"remove it, name another with --trainer.default_root_dir DIR{resume}"
        )


def latest_checkpoint(folder: Path) -> Path | None:
    """The Lightning checkpoint below ``folder`` that was written last, None where there is none."""
    return max(folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, default=None)


def free_path(path: Path) -> Path:
    """``path`` itself, or ``stem-2.suffix``, ``stem-3.suffix`` ... : the first one that nothing lies at."""
    numbered = (path.with_name(f"{path.stem}-{i}{path.suffix}") for i in itertools.count(2))
    return next(p for p in itertools.chain([path], numbered) if not p.exists())


def resume_command(folder: Path, checkpoint: Path) -> str:
    """The command that continues the run in ``folder`` from ``checkpoint``, with its latest configuration."""
    config = max(folder.rglob("config.yaml"), key=lambda path: path.stat().st_mtime, default=None)
    return f"coderl fit --config {config or 'CONFIG'} --ckpt_path {checkpoint}"
