"""The loggers of a run: CSV always, W&B and TensorBoard where a config asks for them, all in its folder."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from coderl import __version__
from coderl.errors import UserError, first_line, named_line
from coderl.runs.config import class_name
from coderl.runs.folder import METRICS, RunFolder, parse_run_name

log = logging.getLogger(__name__)

WAYS_OUT = (
    "WANDB_MODE=offline, which writes to the run folder for a later `wandb sync`, or -c no-wandb.yaml, which "
    "leaves W&B out"
)
_WANDB_SETTINGS = {
    "WANDB_MAX_END_OF_RUN_HISTORY_METRICS": "0",  # the console ends with the scores of the run
    "WANDB_MAX_END_OF_RUN_SUMMARY_METRICS": "0",
    "WANDB_FINISH_TIMEOUT": "600",  # seconds; W&B would retry forever where the network is down at the end
}
_UNNAMED = (None, "lightning_logs")  # the latter is Lightning's default
_WANDB_FOLDER = re.compile(r"(?:offline-)?run-(?P<time>\d{8}_\d{6})-(?P<id>.+)")


class Parser(LightningArgumentParser):
    """Lightning's parser, for which CSV and TensorBoard loggers need no ``save_dir``.

    ``--trainer.logger TensorBoardLogger`` is enough, as for W&B: :func:`resolve_loggers` fills in the run
    folder.
    """

    def add_class_arguments(self, theclass: Any, *args: Any, **options: Any) -> list[str]:
        """Add the arguments of a class; jsonargparse calls this for each class that a config names."""
        added: list[str] = super().add_class_arguments(theclass, *args, **options)
        if inspect.isclass(theclass) and issubclass(theclass, CSVLogger | TensorBoardLogger):
            for action in self._actions:
                if action.dest == "save_dir" and action.required:
                    action.required = False
                    self.set_defaults(save_dir=".")  # WandbLogger's default
        return added


class TolerantWandbLogger(WandbLogger):
    """Lightning's W&B logger, with failures as one warning: a run does not end because W&B does.

    Metrics go through a service process and tables ask the server. Either may fail in the middle of a fit,
    with any kind of exception.
    """

    _warned = False

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics, or warn once that W&B lacks some."""
        self._try(super().log_metrics, metrics, step)

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Upload a checkpoint where ``log_model`` asks for it, or warn once."""
        self._try(super().after_save_checkpoint, checkpoint_callback)

    def finalize(self, status: str) -> None:
        """Upload what is left, or warn once."""
        self._try(super().finalize, status)

    def _try(self, method: Callable[..., None], *args: Any) -> None:
        try:
            method(*args)
        except Exception as error:
            if not self._warned:
                _warn_incomplete(error)
            self._warned = True


def _warn_incomplete(error: Exception) -> None:
    why = named_line(error).rstrip(".")
    log.warning("W&B did not take everything (%s); %s has it", why, METRICS)


# -- before the run ------------------------------------------------------------------------------------------


def resolve_loggers(
    asked: Any, folder: Path, run_name: str, trainer: Namespace, resumed: bool
) -> list[Any] | Literal[False]:
    """The configuration of a run's loggers, with every folder and name filled in.

    Args:
        asked: ``trainer.logger`` of the configuration.
        folder: The run folder, where they write unless they have a folder of their own.
        run_name: What the name of the W&B run begins with, if the folder's name is not a run name.
        trainer: The trainer's configuration; accelerator and devices are part of the W&B run's name.
        resumed: Whether a fit is resumed in this folder: it continues its W&B run and its event files.

    Returns:
        The loggers, CSV first; False if loggers are switched off.

    Raises:
        UserError: If a logger's package is not installed.
    """
    if asked is False:
        return False
    others = [] if asked in (None, True) else asked if isinstance(asked, list) else [asked]
    if not any(_is(other, CSVLogger) for other in others):
        arguments = Namespace(save_dir=None, name="logs", version=None, prefix="", flush_logs_every_n_steps=1)
        others = [Namespace(class_path=_path(CSVLogger), init_args=arguments), *others]
    return [_resolved(other, folder, run_name, trainer, resumed) for other in others]


def _resolved(asked: Any, folder: Path, run_name: str, trainer: Namespace, resumed: bool) -> Any:
    if not isinstance(asked, Namespace):
        return asked  # a logger object, made in Python
    made = asked.clone()
    given = made.init_args
    if given.get("save_dir") in (None, ".") and given.get("dir") is None:
        given.save_dir = str(folder)
    if _is(made, CSVLogger):
        given.name = "logs" if given.name in _UNNAMED else given.name
    elif _is(made, TensorBoardLogger):
        if not any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX")):
            raise UserError(
                "TensorBoardLogger needs the package tensorboard: pip install 'coderl[tensorboard]'"
            )
        given.name = "tensorboard" if given.name in _UNNAMED else given.name
        if resumed and given.version is None:
            names = [path.name for path in Path(given.save_dir, given.name).glob("version_*")]
            found = [re.fullmatch(r"version_(\d+)", name) for name in names]
            given.version = max((int(match[1]) for match in found if match), default=None)
    elif _is(made, WandbLogger):
        given.project = given.project or os.environ.get("WANDB_PROJECT", "coderl")
        known = given.version or given.id or os.environ.get("WANDB_RUN_ID")
        if resumed and known is None:
            known = given.id = wandb_id(folder)
        if known is None and given.name is None and "WANDB_NAME" not in os.environ:
            given.name = wandb_name(folder, run_name, trainer)
        if made.class_path == _path(WandbLogger):  # a subclass of one's own stays what it is
            made.class_path = f"{__name__}.{TolerantWandbLogger.__name__}"
    return made


def _is(asked: Any, kind: type[Logger]) -> bool:
    """Whether a logger, or the one that a configuration names, is an instance of ``kind``."""
    if not isinstance(asked, Namespace):
        return isinstance(asked, kind)
    module, _, name = asked.class_path.rpartition(".")
    return issubclass(getattr(importlib.import_module(module), name), kind)


def _path(kind: type[Logger]) -> str:
    return f"lightning.pytorch.loggers.{kind.__name__}"


def wandb_name(folder: Path, run_name: str, trainer: Namespace) -> str:
    """The original recipe's name of a W&B run, such as ``codellama-7b-python-mbpp-ppo-qlora-gpu1-0601-1234``.

    Args:
        folder: The run folder. The name begins with its name, if that is a run name.
        run_name: What the name begins with otherwise.
        trainer: Configuration with ``accelerator`` and ``devices``.
    """
    name = folder.resolve().name
    now = datetime.now().strftime("%m%d-%H%M")
    return f"{name if parse_run_name(name) else run_name}-{device_tag(trainer)}-{now}"


def device_tag(trainer: Namespace) -> str:
    """``gpu1``, ``gpu0-1``, ``cpu``: the devices of a trainer, GPUs by the machine's numbers.

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
        numbers.append(name if name.isdigit() else str(index))  # a UUID is not a number
    return "gpu" + "-".join(numbers)


def wandb_id(folder: Path) -> str | None:
    """The id of the last W&B run in a run folder; None without any."""
    found = [_WANDB_FOLDER.fullmatch(path.name) for path in RunFolder(folder).wandb.glob("*run-*")]
    latest = max((match for match in found if match), key=lambda match: match["time"], default=None)
    return latest["id"] if latest else None


# -- the run -------------------------------------------------------------------------------------------------


@contextmanager
def open_loggers(
    loggers: list[Logger], folder: Path, config: Callable[[], dict[str, Any]], axis: str
) -> Iterator[None]:
    """Start W&B before any heavy work, log the configuration, and end W&B with the run.

    Args:
        loggers: The trainer's.
        folder: The run folder.
        config: Returns the configuration as plain values. CSV logs none: ``config.yaml`` lies beside it.
        axis: The x-axis in W&B: ``rollout_step``, or ``global_step`` without rollouts.

    Raises:
        UserError: If W&B cannot be started: not logged in, or the network is down.
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

    # Lightning uses a run that is open, such as a notebook's. Who opened it ends it.
    already_open = wandb.run is not None
    # Without WANDB_DATA_DIR tables go to the home folder.
    defaults = _WANDB_SETTINGS | {"WANDB_DATA_DIR": str(RunFolder(folder).wandb.resolve())}
    added = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(added)
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
        if not already_open:
            try:
                _end_wandb(code)
            except Exception as error:
                _warn_incomplete(error)
        for name in added:
            os.environ.pop(name, None)


def _end_wandb(code: int) -> None:
    """End the W&B run and its service process, so that a later run in this process is a run of its own."""
    import wandb

    try:
        wandb.finish(code)
    finally:
        wandb.teardown(code)


def _start(logger: WandbLogger, axis: str) -> None:
    """Start the W&B run of a logger and name its axes.

    Lightning's axis, ``trainer/global_step``, counts batches from 0.
    """
    from wandb.errors import Error, UsageError

    logger._wandb_init.pop("anonymous", None)  # an option that W&B removed, and warns of
    try:
        experiment = logger.experiment
    except UsageError as error:
        if "API key" not in str(error):
            raise UserError(f"W&B: {first_line(error).rstrip('.')}") from error
        raise UserError(
            f"W&B is not logged in, and this is no terminal to log in from: `wandb login`, {WAYS_OUT}"
        ) from error
    except Error as error:
        raise UserError(f"W&B cannot be started ({first_line(error).rstrip('.')}): {WAYS_OUT}") from error
    for step in ("global_step", "rollout_step"):
        experiment.define_metric(step)
    experiment.define_metric("*", step_metric=axis, step_sync=True)


def readable(config: Any) -> Any:
    """A configuration in the form that trackers show best, without ``class_path`` and ``init_args``.

    Args:
        config: Plain values. Loggers are left out.

    >>> readable({"model": {"class_path": "coderl.algorithms.GRPO", "init_args": {"clip": 0.2}}})
    {'model': {'class': 'GRPO', 'clip': 0.2}}
    """
    if isinstance(config, list):
        names = [class_name(entry) for entry in config]
        if not names or not all(names) or len(set(names)) < len(names):
            return [readable(entry) for entry in config]
        return {name: readable(entry) for name, entry in zip(names, config, strict=True)}
    if not isinstance(config, dict):
        return config
    if name := class_name(config):
        arguments = (config.get("init_args") or {}) | (config.get("dict_kwargs") or {})
        return {"class": name, **readable(arguments)}
    return {key: readable(value) for key, value in config.items() if key != "logger"}
