"""Where metrics go: CSV always, W&B and TensorBoard where a config asks for them, all in the run folder."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from coderl import __version__
from coderl.errors import UserError
from coderl.runs.folder import RunFolder, is_run_name

log = logging.getLogger(__name__)

WAYS_OUT = (
    "WANDB_MODE=offline, which writes to the run folder for a later `wandb sync`, or -c no-wandb.yaml, which "
    "leaves W&B out"
)
_WANDB_SETTINGS = {  # beside WANDB_DATA_DIR, without which tables go to the home folder
    "WANDB_MAX_END_OF_RUN_HISTORY_METRICS": "0",  # the console ends with what the run was worth
    "WANDB_MAX_END_OF_RUN_SUMMARY_METRICS": "0",
    "WANDB_FINISH_TIMEOUT": "600",  # seconds: where the network is down at the end, W&B would try for good
}
_UNNAMED = (None, "lightning_logs")  # Lightning's name for want of one
_WANDB_FOLDER = re.compile(r"(?:offline-)?run-(?P<time>\d{8}_\d{6})-(?P<id>.+)")

# `--trainer.logger TensorBoardLogger` is enough: where loggers write is settled with the run folder.
# WandbLogger's `save_dir` has this default in Lightning already.
for _kind in (CSVLogger, TensorBoardLogger):
    _defaults = _kind.__init__.__defaults__ or ()
    if len(_defaults) < _kind.__init__.__code__.co_argcount - 1:
        setattr(_kind.__init__, "__defaults__", (".", *_defaults))  # noqa: B010 -- mypy knows no such attribute


# -- before the run ------------------------------------------------------------------------------------------


def settled(
    asked: Any, folder: Path, run_name: str, trainer: Namespace, resumed: bool
) -> list[Any] | Literal[False]:
    """The loggers of a run, from those that a configuration asks for.

    Args:
        asked: ``trainer.logger`` of the configuration.
        folder: The run folder: they write there, unless they were told where.
        run_name: The W&B run's name begins with it, where the folder has a name of another form.
        trainer: The trainer's configuration: accelerator and devices are part of that name.
        resumed: A fit that is taken up in this folder: it goes on with its W&B run and its event files.

    Returns:
        The same, with CSV before them; False if loggers are switched off.

    Raises:
        UserError: If a logger's package is not installed.
    """
    if asked is False:
        return False
    others = [] if asked in (None, True) else asked if isinstance(asked, list) else [asked]
    if not any(_is(other, CSVLogger) for other in others):
        arguments = Namespace(save_dir=None, name="logs", version=None, prefix="", flush_logs_every_n_steps=1)
        others = [Namespace(class_path=_path(CSVLogger), init_args=arguments), *others]
    return [_settled(other, folder, run_name, trainer, resumed) for other in others]


def _settled(asked: Any, folder: Path, run_name: str, trainer: Namespace, resumed: bool) -> Any:
    if not isinstance(asked, Namespace):
        return asked  # an object, made in Python
    made = asked.clone()
    given = made.init_args
    if given.get("save_dir") in (None, ".") and given.get("dir") is None:
        given.save_dir = str(folder)
    if _is(made, CSVLogger):
        given.name = "logs" if given.name in _UNNAMED else given.name
    elif _is(made, TensorBoardLogger):
        _require_tensorboard()
        given.name = "tensorboard" if given.name in _UNNAMED else given.name
        if resumed and given.version is None:
            given.version = _latest_version(Path(given.save_dir, given.name))
    elif _is(made, WandbLogger):
        given.project = given.project or os.environ.get("WANDB_PROJECT", "coderl")
        known = given.version or given.id or os.environ.get("WANDB_RUN_ID")
        if resumed and known is None:
            known = given.id = wandb_id(folder)
        if known is None and given.name is None and "WANDB_NAME" not in os.environ:
            given.name = wandb_name(folder, run_name, trainer)
    return made


def _is(asked: Any, kind: type[Logger]) -> bool:
    """Whether a logger, or what a configuration says of it, is of this kind."""
    if not isinstance(asked, Namespace):
        return isinstance(asked, kind)
    module, _, name = asked.class_path.rpartition(".")
    return issubclass(getattr(importlib.import_module(module), name), kind)


def _path(kind: type[Logger]) -> str:
    return f"lightning.pytorch.loggers.{kind.__name__}"


def _require_tensorboard() -> None:
    if not any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX")):
        raise UserError("TensorBoardLogger needs the package tensorboard: pip install 'coderl[tensorboard]'")


def _latest_version(folder: Path) -> int | None:
    found = [re.fullmatch(r"version_(\d+)", path.name) for path in folder.glob("version_*")]
    return max((int(match[1]) for match in found if match), default=None)


def wandb_name(folder: Path, run_name: str, trainer: Namespace) -> str:
    """The original recipe's name of a W&B run, such as ``codellama-7b-python-mbpp-ppo-qlora-gpu1-0601-1234``.

    Args:
        folder: The run folder, whose own name comes first if it has the form of one.
        run_name: What comes first otherwise.
        trainer: Configuration with ``accelerator`` and ``devices``.
    """
    name = folder.resolve().name
    now = datetime.now().strftime("%m%d-%H%M")
    return f"{name if is_run_name(name) else run_name}-{device_tag(trainer)}-{now}"


def device_tag(trainer: Namespace) -> str:
    """``gpu1``, ``gpu0-1``, ``cpu``: what the trainer will run on, GPUs by the machine's own numbers.

    Args:
        trainer: Configuration with ``accelerator`` and ``devices``, as Lightning takes them.

    Raises:
        MisconfigurationException: If there are no such GPUs.
    """
    accelerator, devices = trainer.accelerator, trainer.devices
    if accelerator == "mps" or (accelerator in ("auto", "gpu") and MPSAccelerator.is_available()):
        return "mps"
    if accelerator not in ("auto", "gpu", "cuda") or not CUDAAccelerator.is_available():
        return "cpu"
    if devices == "auto":
        devices = CUDAAccelerator.auto_device_count()
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    numbers = []
    for index in CUDAAccelerator.parse_devices(devices) or []:
        name = seen[index].strip() if index < len(seen) else ""
        numbers.append(name if name.isdigit() else str(index))  # a UUID has no number to tell
    return "gpu" + "-".join(numbers)


def wandb_id(folder: Path) -> str | None:
    """The id of the W&B run that wrote to a run folder last; None if none did."""
    found = [_WANDB_FOLDER.fullmatch(path.name) for path in RunFolder(folder).wandb.glob("*run-*")]
    latest = max((match for match in found if match), key=lambda match: match["time"], default=None)
    return latest["id"] if latest else None


# -- the run -------------------------------------------------------------------------------------------------


@contextmanager
def opened(
    loggers: list[Logger], folder: Path, config: Callable[[], dict[str, Any]], axis: str
) -> Iterator[None]:
    """Start W&B before anything heavy is, tell the loggers the configuration, and end W&B with the run.

    Args:
        loggers: The trainer's.
        folder: The run folder.
        config: Gives the configuration as plain values. CSV gets none: it has ``config.yaml`` beside it.
        axis: What W&B draws over: ``rollout_step``, or ``global_step`` where nothing is rolled out.

    Raises:
        UserError: If W&B cannot be started: nobody is logged in or the network is down.
    """
    with _wandb([logger for logger in loggers if isinstance(logger, WandbLogger)], folder, axis):
        for logger in loggers:
            if not isinstance(logger, CSVLogger):
                logger.log_hyperparams({"coderl": __version__, **readable(config())})
        yield


@contextmanager
def _wandb(loggers: list[WandbLogger], folder: Path, axis: str) -> Iterator[None]:
    if not loggers:
        yield
        return
    import wandb

    theirs = wandb.run is not None  # a notebook's own run, which Lightning takes: its owner ends it
    ours = _WANDB_SETTINGS | {"WANDB_DATA_DIR": str(RunFolder(folder).wandb.resolve())}
    ours = {name: value for name, value in ours.items() if name not in os.environ}
    os.environ.update(ours)
    code = 1
    try:
        for logger in loggers:
            _start(logger, axis)
        yield
        code = 0
    except KeyboardInterrupt:
        code = 255  # W&B's word for killed
        raise
    finally:
        if not theirs:
            _safe(_end_wandb)(code)
        for name in ours:
            os.environ.pop(name, None)


def _end_wandb(code: int) -> None:
    """Leave no process behind; a second run in Python is a run of its own."""
    import wandb

    try:
        wandb.finish(code)
    finally:
        wandb.teardown(code)


def _start(logger: WandbLogger, axis: str) -> None:
    """Start the W&B run of a logger and name its axes.

    Lightning's own axis, ``trainer/global_step``, counts batches from 0.
    """
    from wandb.errors import Error, UsageError

    logger._wandb_init.pop("anonymous", None)  # W&B warns of an option that it no longer has
    try:
        experiment = logger.experiment
    except UsageError as error:
        if "API key" not in str(error):
            raise UserError(f"W&B: {_one_line(error)}") from error
        raise UserError(
            f"W&B is not logged in, and nobody is there to be asked: `wandb login`, {WAYS_OUT}"
        ) from error
    except Error as error:
        raise UserError(f"W&B cannot be started ({_one_line(error)}): {WAYS_OUT}") from error
    for name in ("log_metrics", "after_save_checkpoint", "finalize"):
        setattr(logger, name, _safe(getattr(logger, name)))
    for step in ("global_step", "rollout_step"):
        experiment.define_metric(step)
    experiment.define_metric("*", step_metric=axis, step_sync=True)


def _safe(call: Callable[..., None]) -> Callable[..., None]:
    """The same, but what fails is a warning, once: tables ask the server, and its end is not the run's."""
    told = False

    def safe(*arguments: Any, **options: Any) -> None:
        nonlocal told
        try:
            call(*arguments, **options)
        except Exception as error:  # of every kind: the network's, the server's, those of W&B's own process
            if not told:
                why = f"{type(error).__name__}: {_one_line(error)}"
                log.warning("W&B did not take everything (%s); metrics.csv has it", why)
            told = True

    return safe


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def readable(config: Any) -> Any:
    """A configuration as trackers show it well: of ``class_path`` and ``init_args`` only names and arguments.

    Args:
        config: Plain values. The loggers themselves are left out.

    >>> readable({"model": {"class_path": "coderl.algorithms.GRPO", "init_args": {"clip": 0.2}}})
    {'model': {'class': 'GRPO', 'clip': 0.2}}
    """
    if isinstance(config, list):
        classes = [entry["class_path"] for entry in config if _names_class(entry)]
        if not classes or len(classes) < len(config) or len(set(classes)) < len(classes):
            return [readable(entry) for entry in config]
        return {path.rpartition(".")[2]: readable(e) for path, e in zip(classes, config, strict=True)}
    if not isinstance(config, dict):
        return config
    if _names_class(config):
        arguments = (config.get("init_args") or {}) | (config.get("dict_kwargs") or {})
        return {"class": config["class_path"].rpartition(".")[2], **readable(arguments)}
    return {key: readable(value) for key, value in config.items() if key != "logger"}


def _names_class(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("class_path"), str)
