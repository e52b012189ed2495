"""LightningCLI with coderl's additions: shipped configs, presets, run folders, errors of one line."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import warnings
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import yaml
from jsonargparse import ActionConfigFile, Namespace, set_parsing_settings
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.exceptions import MisconfigurationException

# jsonargparse finds a class by its bare name, such as `GRPO`, only in modules that are imported: in these,
# and in those below.
import coderl.algorithms.rewards
import coderl.rollout  # noqa: F401
from coderl import launcher
from coderl.algorithms import PolicyGradient
from coderl.algorithms.base import ignore_harmless
from coderl.callbacks import Checkpoint
from coderl.callbacks.last_step import LastStep
from coderl.cli import presets
from coderl.cli.config_files import find_config
from coderl.cli.messages import explain
from coderl.cli.overlays import last_of_each, merge_callbacks
from coderl.data import CodeDataModule
from coderl.errors import UsageError, UserError
from coderl.files import free_path
from coderl.problems.sources import jsonl_stem
from coderl.runs import loggers
from coderl.runs.checkpoint_files import damage_of, is_remote, latest_whole
from coderl.runs.config import flat_settings
from coderl.runs.console import ConsoleLog
from coderl.runs.folder import DEBUG, ROOT, RunFolder, run_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SEED = 42
# Errors are raised, so that `main` prints them in one line; `--model.pol` is an error and no abbreviation.
_PARSER = {"prog": "coderl", "exit_on_error": False, "allow_abbrev": False}
_CKPT_KEYWORDS = ("best", "last", "hpc", "registry")
"""Values of ``--ckpt_path`` that Lightning resolves to a checkpoint."""
_OF_A_START = (
    "ckpt_path",
    "weights_only",
    "preset",
    "trainer.default_root_dir",
    "trainer.logger",
    "checkpoint.dirpath",
)
"""Settings that may differ from start to start of a run without changing its training."""


class ConfigFile(ActionConfigFile):
    """``--config``: a path, the bare name of a shipped config, or YAML text."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Load the config ``values`` into ``cfg``; bare names are looked up among the shipped configs."""
        path = find_config(values)
        before = list(cfg.get("trainer.callbacks") or [])
        try:
            super().__call__(parser, cfg, presets.without_match(path), option_string)  # type: ignore[no-untyped-call]
        except (TypeError, argparse.ArgumentError) as error:
            place = values if path != values or os.path.isfile(path) else "--config"
            raise UsageError(f"{place}: {explain(str(error), [])}") from error
        if isinstance(now := cfg.get("trainer.callbacks"), list):
            cfg["trainer.callbacks"] = merge_callbacks(before, now)


class SaveConfig(SaveConfigCallback):
    """Writes the configuration into run folder and checkpoints, and says what a resumed run changes."""

    _as_dict: dict[str, Any] | None = None
    _stage: str | None = None

    def state_dict(self) -> dict[str, Any]:
        """The run's settings, for its checkpoints."""
        if self._as_dict is None:
            self._as_dict = yaml.safe_load(self.parser.dump(self.config, skip_validation=True))
        return {"settings": self._as_dict}

    @rank_zero_only
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Say which settings of a fit are not those that the checkpoint was written with."""
        if self._stage != "fit":
            return
        then, now = flat_settings(state_dict["settings"]), flat_settings(self.state_dict()["settings"])
        for key in sorted(then.keys() | now.keys()):
            if (before := then.get(key)) != (after := now.get(key)) and not key.startswith(_OF_A_START):
                print(f"coderl: {key}: {before} in the checkpoint, {after} from here on", flush=True)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the first free of ``config.yaml``, ``config-2.yaml`` ..., then save as Lightning does."""
        self._stage = stage
        folder = trainer.log_dir  # every rank has to ask: Lightning broadcasts the folder
        if not self.already_saved and folder is not None and trainer.is_global_zero:
            self.config_filename = free_path(Path(folder, self.config_filename)).name
        super().setup(trainer, pl_module, stage)


class CoderlCLI(LightningCLI):
    """The commands ``fit``, ``validate`` and ``test``. :meth:`start` runs one of them."""

    @classmethod
    def start(cls, args: ArgsType) -> Self:
        """Parse ``args`` and run the command they name.

        Args:
            args: Arguments as on the shell, or a configuration with the key ``subcommand``.

        Raises:
            UsageError: If a key, value or class does not exist.
            UserError: If what the configuration names cannot be used.
        """
        if not {"", str(Path.cwd())} & set(sys.path):
            # For `--model.rewards+ my_module.MyReward`. Last, so that it hides no installed module.
            sys.path.append(str(Path.cwd()))
        _set_up_parsing()
        try:
            with _quiet_lightning():
                return cls(
                    LightningModule,
                    CodeDataModule,
                    save_config_callback=SaveConfig,
                    seed_everything_default=SEED,
                    parser_class=loggers.Parser,
                    parser_kwargs={"default_env": True, "env_prefix": "CODERL"},
                    subclass_mode_model=True,
                    subclass_mode_data=True,
                    auto_configure_optimizers=False,
                    args=args,
                )
        except (MisconfigurationException, ValueError) as error:
            if (fixable := _fixable(error)) is None:
                raise
            raise fixable from None

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's commands but ``predict``, each with the arguments of its method that are no flags."""
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name != "predict"}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that raises its errors and finds shipped configs by name."""
        parser = self.parser_class(**{**_PARSER, **kwargs})
        parser.add_argument(
            "-c",
            "--config",
            action=ConfigFile,
            help="A YAML file, or a shipped config's bare name. May be given several times; later ones win.",
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The checkpoint callback, ``--preset``, and defaults that suit steps of several seconds."""
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.add_argument(
            "--preset",
            type=str,
            default=presets.AUTO,
            help="Settings for a family of models, over the shipped config that names the model and under "
            "all else: auto (by the model's name or type), none, a name from configs/models, or a path.",
        )
        parser.set_defaults(
            {
                "checkpoint.save_last": True,
                "checkpoint.every_n_train_steps": 25,
                "trainer.log_every_n_steps": 1,
                "trainer.enable_model_summary": False,
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse into ``self.config``, with the preset for the model."""
        self._arguments = args if isinstance(args, list) else None
        self._early_lines: list[str] = []
        self.config = presets.parse(partial(self._parsed, parser), args, self._print_early)

    def _print_early(self, text: str) -> None:
        """Print a line, and keep it for ``console.log``: the run folder is not known yet."""
        self._early_lines.append(f"coderl: {text}")
        if _is_first_rank():
            print(self._early_lines[-1], file=sys.stderr)

    def _parsed(self, parser: LightningArgumentParser, args: ArgsType) -> Namespace:
        """The configuration of a call; errors have one line."""
        try:
            return parser.parse_args(args) if isinstance(args, list) else parser.parse_object(args)
        except argparse.ArgumentError as error:
            actions = [action for parser in self._subcommand_parsers.values() for action in parser._actions]
            keys = sorted({action.dest for action in actions if action.option_strings})
            raise UsageError(explain(str(error), keys)) from error

    def before_instantiate_classes(self) -> None:
        """Decide on the run folder, and refuse one in use, before anything is loaded or written."""
        config = self.config[self.subcommand]
        trainer = config.trainer
        if trainer.default_root_dir is None:
            trainer.default_root_dir = str(ROOT / run_name(*_identity(config)))
        if config.weights_only is None:
            config.weights_only = True  # else unpickling a checkpoint from somebody else could run code
        if self.subcommand == "validate" and trainer.limit_val_batches == 0:
            trainer.limit_val_batches = None  # 0 in a config switches off validation during fits
        config.ckpt_path = self._checked_checkpoint(config, RunFolder(trainer.default_root_dir))
        fresh = self.subcommand == "fit" and config.ckpt_path is None and not trainer.fast_dev_run
        # Every process of a launcher looks: they all start before one has written there. Those that Lightning
        # starts would find what rank 0 has written. DEBUG is emptied, which only one process may do.
        folder = Path(trainer.default_root_dir)
        if fresh and (_is_first_rank() or (launcher.launched() and folder != DEBUG)):
            RunFolder(folder).require_fresh()
        # SaveConfig gets these as the user gave them: see _run_subcommand.
        self._as_configured = trainer.logger, config.checkpoint.dirpath
        if config.checkpoint.dirpath is None:
            config.checkpoint.dirpath = str(RunFolder(trainer.default_root_dir).checkpoints)
        trainer.logger = loggers.resolve_loggers(
            trainer.logger,
            Path(trainer.default_root_dir),
            run_name(*_identity(config)),
            trainer,
            resumed=self.subcommand == "fit" and config.ckpt_path is not None,
        )
        trainer.callbacks = _with_progress_bar(trainer.callbacks, trainer.enable_progress_bar)

    def _parse_ckpt_path(self) -> None:
        """Take no settings from a checkpoint: :meth:`_checked_checkpoint` looks at it.

        This overrides a step of LightningCLI, in which hyper-parameters that a module of one's own has saved
        there would silently win over configs and flags.
        """

    def _checked_checkpoint(self, config: Namespace, folder: RunFolder) -> str | None:
        """The checkpoint to load. A fit whose checkpoint is damaged goes on from the one before, and says so.

        Raises:
            UserError: There is no such file, or it is no checkpoint.
        """
        path: str | Path | None = config.ckpt_path
        fits, checkpoints = self.subcommand == "fit", Path(config.checkpoint.dirpath or folder.checkpoints)
        # The run folder itself has what Lightning wrote before SLURM was to start the job again.
        places = [checkpoints, folder.path]
        why, fix = None, "--ckpt_path takes a .ckpt file of a run folder, or `last`"
        if path is None and fits and "SLURM_RESTART_COUNT" in os.environ:
            return self._latest(places, "SLURM has started the job again", config.weights_only)
        if path == "last" and not is_remote(config.checkpoint.dirpath or ""):
            # Lightning would warn, and train from the start over what the run has written.
            path = checkpoints / folder.last_checkpoint.name
            if not path.is_file():
                why = f"no checkpoint {path}"
        if path is None or path in _CKPT_KEYWORDS or "://" in str(path) or Path(path).is_dir():
            return None if path is None else str(path)
        if why is None and not Path(path).is_file():
            raise UserError(f"no checkpoint {path}; {fix}")
        if why is None and (damage := damage_of(Path(path))):
            why, fix = f"{path} is damaged or no checkpoint ({damage})", "name another with --ckpt_path"
            places.append(Path(path).parent)
        if why is None:
            return str(path)
        instead = self._latest(places, f"warning: {why}", config.weights_only, Path(path)) if fits else None
        if instead is None:
            raise UserError(f"{why}; {fix}")
        return instead

    def _latest(
        self, places: Sequence[Path], why: str, weights_only: bool, besides: Path | None = None
    ) -> str | None:
        """The whole checkpoint of the most steps in some folders, and say so; None without any."""
        found = latest_whole(*places, besides=besides, weights_only=weights_only)
        if found is None:
            return None
        self._print_early(f"{why}: going on from {found[0]}, step {found[1]}")
        return str(found[0])

    def _plain(self) -> dict[str, Any]:
        """The command's configuration as dicts, lists and values."""
        dump = yaml.safe_load(self.parser.dump(self.config, skip_validation=True))
        plain: dict[str, Any] = dump[self.config.subcommand]
        return plain

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the command, with console.log and the loggers open."""
        folder = Path(self.trainer.default_root_dir)
        # The saved configuration names no run folder, so that it can be run elsewhere, and no preset: it has
        # the preset's settings.
        config = self.config[subcommand]
        config.trainer.logger, config.checkpoint.dirpath = self._as_configured
        config.preset = presets.NONE
        if not _is_first_rank() or config.trainer.fast_dev_run:
            self._run_or_say_how_to_resume(subcommand)
            return
        axis = "rollout_step" if isinstance(self.model, PolicyGradient) else "global_step"
        with ConsoleLog(folder, self._arguments, self._early_lines):
            try:
                with loggers.open_loggers(self.trainer.loggers, folder, self._plain, axis):
                    self._run_or_say_how_to_resume(subcommand)
            except (MisconfigurationException, ValueError) as error:
                # As in `start`, but inside ConsoleLog, so that console.log ends in the line as well.
                if (fixable := _fixable(error)) is None:
                    raise
                raise fixable from None

    def _run_or_say_how_to_resume(self, subcommand: str) -> None:
        """Run the command; whatever ends a fit before its end, it says how to resume."""
        try:
            super()._run_subcommand(subcommand)
        except Exception:
            launcher = self.trainer.strategy.launcher
            if isinstance(launcher, _SubprocessScriptLauncher):
                # Other ranks may hang, and Lightning ends those that it started only after Ctrl-C.
                launcher.kill(signal.SIGKILL)
            last = LastStep.of(self.trainer)
            if last.saved is not None:
                path, step = last.saved
                command = RunFolder.of(self.trainer).resume_command(path)
                print(f"coderl: step {step} is saved; go on with: {command}", file=sys.stderr, flush=True)
            raise
        except SystemExit as stop:  # Lightning answers Ctrl-C with sys.exit
            if self.trainer.state.status != TrainerStatus.INTERRUPTED:
                raise
            folder, saved = RunFolder.of(self.trainer), LastStep.of(self.trainer).saved
            checkpoint = saved[0] if saved else folder.latest_checkpoint()
            resume = checkpoint and f"go on with: {folder.resume_command(checkpoint)}"
            ways = (resume or "no checkpoint was written yet",) if _is_first_rank() else ()
            raise KeyboardInterrupt(*ways) from stop


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Silence harmless warnings and Lightning's tips in the block, and restore Ctrl-C after it."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    main_thread = threading.current_thread() is threading.main_thread()
    interrupt = signal.getsignal(signal.SIGINT)
    logger.addFilter(_is_no_tip)
    try:
        with warnings.catch_warnings():
            ignore_harmless()
            yield
    finally:
        logger.removeFilter(_is_no_tip)
        if main_thread:
            signal.signal(signal.SIGINT, interrupt)  # Lightning leaves it ignored after Ctrl-C


@cache
def _set_up_parsing() -> None:
    """Set jsonargparse's settings for the process: once, since it refuses to have them set again."""
    # jsonargparse 4.53 cannot carry an optional dataclass (policy.lora) over to another algorithm, as in
    # `-c grpo.yaml --model PPO`; other classes it can.
    set_parsing_settings(add_print_completion_argument=True, subclasses_enabled=["is_pure_dataclass"])


def _is_no_tip(record: logging.LogRecord) -> bool:
    """False for Lightning's tips, which advertise its cloud products."""
    return "Tip:" not in record.getMessage()


def _is_first_rank() -> bool:
    """Whether this is rank 0. Needs no trainer; a single process is rank 0."""
    return not getattr(rank_zero_only, "rank", 0)


def _with_progress_bar(callbacks: Any, enabled: bool | None) -> list[Any]:
    """The callbacks that were asked for, and tqdm's progress bar where none of them is one.

    Lightning would take rich's where rich is installed, which captures what tqdm's bars of evaluations print,
    and in a notebook recurses without end.
    """
    given = last_of_each(callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else [])
    if enabled is False or any("ProgressBar" in callback.class_path for callback in given):
        return given
    arguments = Namespace(refresh_rate=1, process_position=0, leave=False)
    return [*given, Namespace(class_path="lightning.pytorch.callbacks.TQDMProgressBar", init_args=arguments)]


def _fixable(error: Exception) -> UserError | None:
    """The UserError to raise for an error that the user can fix; None for others.

    jsonargparse wraps what a class's ``__init__`` raises in a ValueError, so the causes are searched.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return UserError(" ".join(str(error).split())) if isinstance(error, MisconfigurationException) else None


def _identity(config: Namespace) -> tuple[str, str, str]:
    """Base model, data set and algorithm of a configuration: the run is named after them."""
    keys = (
        "policy.init_args.gguf_file",
        "policy.init_args.model",
        "policy.gguf_file",
        "policy.model",
        "model",
    )
    model = next((found for key in keys if (found := config.model.get(f"init_args.{key}"))), "model")
    own_file = config.data.get("init_args.source.init_args.train")
    source = config.data.get("init_args.source.class_path") or config.data.class_path
    dataset = jsonl_stem(own_file) if own_file else source.rpartition(".")[2]
    return str(model), dataset, config.model.class_path.rpartition(".")[2]
