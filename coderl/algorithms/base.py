"""The base class of all algorithms: loading, optimizer and schedule, a step over ranks, checkpoints."""

from __future__ import annotations

import logging
import time
import warnings
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from coderl import launcher
from coderl.algorithms import distributed, resuming, rng
from coderl.algorithms.micro_batches import Portion, portions
from coderl.algorithms.schedule import Schedule, rate_factor
from coderl.data import CodeDataModule
from coderl.data.loops import resume_at_first_batch, settle
from coderl.errors import UsageError, UserError, named_line
from coderl.model import memory
from coderl.model.allocator import give_back_freed_memory, keep_freed_memory
from coderl.model.provenance import prior_training
from coderl.problems.contamination import merge_records
from coderl.problems.sources import SPLITS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.utilities.types import OptimizerLRScheduler

    from coderl.algorithms.resuming import Groups
    from coderl.model.memory import Budget
    from coderl.model.policy import Policy
    from coderl.problems import TrainingRecord
    from coderl.types import Experience, Problem

log = logging.getLogger(__name__)

HARMLESS = {
    "in eval mode at the start of training": "dropout is kept off on purpose",
    "does not have many workers": "batches are a few lines of text",
    "no pre-optimization state was saved": "checkpoints hold the state after the step, as they should",
    "You have overridden `transfer_batch_to_device` in both": "both leave text alone",
    "have no `val_dataloader`": "a source need not have a validation split",
    "Total length of `list` across ranks is zero": "the problems have no validation split",
    "Checkpoint directory .* exists and is not empty": "only when resuming: see `RunFolder.require_fresh`",
    "callbacks used to create the checkpoint": "what a resumed run changes is said line by line",
    "recommended to use `self.log": "what ranks log is the same on all of them",
    "LeafSpec": "Lightning 2.6 asks torch 2.13's pytree in the old way",
    "'set_vital' is deprecated": "torchdata 0.11 calls a hook that torch 2.13 has retired",
    "`is_gradient_checkpointing` is deprecated": "peft 0.21 asks transformers 5.23 by an old name",
}
"""Warnings that do not apply here, or that a user cannot fix; each with the reason."""

MOST_SKIPPED = 3
"""Gradients in a row that may not be finite, with the one that ends the fit."""

T = TypeVar("T")
Init = TypeVar("Init", bound="Callable[..., None]")


class ModuleOptions(TypedDict, total=False):
    """Options that subclasses of :class:`PolicyModule` pass on to it; documented there."""

    learning_rate: float
    weight_decay: float
    warmup_steps: int
    schedule: Schedule
    max_grad_norm: float
    micro_batch_size: int | None
    max_prompt_tokens: int


def passes_options_on(init: Init) -> Init:
    """Decorator of an ``__init__`` that passes ``**options: Unpack[...]`` on to its parent's.

    The type checker still sees the annotation, and finds misspelt options. At run time it is removed, so that
    jsonargparse reads the parent's signature with its defaults and docstrings.
    """
    # With the annotation, jsonargparse would list the same options as required, without default and help.
    init.__annotations__["options"] = Any
    return init


def ignore_harmless() -> None:
    """Ignore the warnings in :data:`HARMLESS`, until the warning filters are reset."""
    for message in HARMLESS:
        warnings.filterwarnings("ignore", message=f".*{message}")


class PolicyModule(LightningModule):
    """A LightningModule that trains a policy, with manual optimization.

    Under DDP each rank has its own problems and its own random generator, and gradients, baselines and
    deviations are those of one process that holds all rows. Ranks may have unequally many rows or
    micro-batches. They meet in :meth:`step`, :meth:`mean_over_ranks` and :meth:`gathered`, which are
    collective: all ranks must call them equally often and in the same order.

    Hyper-parameters are not stored in checkpoints: the run folder's ``config.yaml`` holds them, and flags
    given when a run is resumed override it.

    Args:
        policy: The model to train.
        learning_rate: Of AdamW, after warm-up.
        weight_decay: Of AdamW, on matrices.
        warmup_steps: Optimizer steps over which the learning rate rises evenly; the last has the peak.
        schedule: After warm-up: constant, or down to 0 after the last step (linear, cosine).
        max_grad_norm: Gradients are clipped to this norm, those of policy and critic separately.
        micro_batch_size: Sequences in one forward and backward, at most. Null is as many as memory holds.
            Changes memory and speed, never the gradient.
        max_prompt_tokens: Problems with a longer prompt are left out, and their number is logged.
    """

    def __init__(
        self,
        policy: Policy,
        learning_rate: float = 3e-6,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        schedule: Schedule = "constant_with_warmup",
        max_grad_norm: float = 1.0,
        micro_batch_size: int | None = None,
        max_prompt_tokens: int = 512,
    ) -> None:
        super().__init__()
        # Lightning checks a fit before any hook of the module runs: later would be too late for its warnings.
        ignore_harmless()
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints hold only what trains; on_load_checkpoint checks the rest
        self.policy = policy
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.warmup_steps, self.schedule = warmup_steps, schedule
        self.max_grad_norm, self.micro_batch_size = max_grad_norm, micro_batch_size
        self._budget: Budget | None = None
        self.max_prompt_tokens = max_prompt_tokens
        self._rng: dict[str, Any] | None = None
        self._stream: int | None = None
        self._skipped = 0
        self.require(
            micro_batch_size=(micro_batch_size is None or micro_batch_size >= 1, "1 or more, or null"),
            max_prompt_tokens=(max_prompt_tokens >= 1, "1 or more"),
            learning_rate=(0 < learning_rate < float("inf"), "above 0"),
            weight_decay=(weight_decay >= 0, "0 or more"),
            warmup_steps=(warmup_steps >= 0, "0 or more"),
            max_grad_norm=(max_grad_norm > 0, "above 0"),
        )

    def require(self, **settings: tuple[bool, str]) -> None:
        """Check settings: from the name of each to whether it is valid, and its range in words.

        Raises:
            UsageError: On the first that is not valid.
        """
        for name, (valid, range_) in settings.items():
            if not valid:
                raise UsageError(f"{name} is {getattr(self, name)}: model.{name} must be {range_}")

    # -- before training -------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check the trainer's settings, and leave out problems whose prompt is too long.

        Raises:
            UsageError: The strategy shards the weights, the trainer changes their precision, a launcher
                started another number of processes than the trainer uses, or rows may be longer than what
                the model reads.
        """
        launched = launcher.launched()
        if launched and launched[1] != self.trainer.world_size:
            raise UsageError(
                f"{launched[0]} started {launched[1]} processes and the trainer takes "
                f"{self.trainer.world_size}, so each would be a run of its own: set trainer.devices to the "
                "processes on a machine, and trainer.num_nodes to the machines"
            )
        if self.trainer.precision not in ("32-true", "bf16-mixed"):
            raise UsageError(
                f"trainer.precision {self.trainer.precision}: what trains stays in float32, and "
                "policy.compute_dtype says what the frozen weights compute in: set trainer.precision to "
                "32-true or bf16-mixed"
            )
        strategy = self.trainer.strategy
        if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
            raise UsageError(
                f"{type(strategy).__name__} divides the weights up, and here every process holds them all: "
                "set trainer.strategy: ddp"
            )
        if stage == "fit" and self.trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()
        # Lightning sets the data module up before the module, so its problems can be read by now.
        if self.datamodule is not None:
            self.datamodule.keep(self.fits, self.filter_reason)
            self._require_context(self.datamodule)

    def _require_context(self, data: CodeDataModule) -> None:
        """Refuse settings with which a problem and its answer may be longer than what the model reads."""
        every = [problem for split in SPLITS if data.has(split) for problem in data.problems(split)]
        rows = [(len(self.policy.encode(problem)), self.answer_tokens(problem)) for problem in every]
        fix = "lower model.max_prompt_tokens or model.max_new_tokens, to {known} together at most"
        self.policy.require_context(*max(rows, key=sum), fix)

    def answer_tokens(self, problem: Problem) -> int:
        """Tokens of the longest answer to a problem."""
        return self.longest_row - self.max_prompt_tokens

    @property
    def datamodule(self) -> CodeDataModule | None:
        """The data module; None where the trainer was given loaders.

        Raises:
            UsageError: It is no :class:`CodeDataModule`, so it cannot leave problems out or draw further
                ones.
        """
        found = getattr(self.trainer, "datamodule", None)
        if found is None or isinstance(found, CodeDataModule):
            return found
        raise UsageError(
            f"{type(found).__name__} is no CodeDataModule: subclass coderl.data.CodeDataModule, or give it a "
            "ProblemSource of your own"
        )

    def training_record(self) -> TrainingRecord | None:
        """The problems that the policy is trained on, in this fit and in earlier ones; None if not known."""
        here = self.datamodule.trained() if self.datamodule is not None else None
        return merge_records(prior_training(self.policy), here)

    @property
    def filter_reason(self) -> str:
        """Why :meth:`fits` leaves a problem out, for the log."""
        return f"prompt over {self.max_prompt_tokens} tokens (model.max_prompt_tokens)"

    def fits(self, problem: Problem) -> bool:
        """Whether the problem's prompt is short enough."""
        return len(self.policy.encode(problem)) <= self.max_prompt_tokens

    def configure_model(self) -> None:
        """Load the weights. Lightning calls this for each fit, validation or test; later calls do nothing."""
        if self.policy.net is None:
            self.policy.load(self.trainer.strategy.root_device)
            for line in self.policy.notes():
                rank_zero_info(line)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW and its schedule. Vectors (biases, norms) have no weight decay.

        Raises:
            UserError: No parameter trains.
            UsageError: The schedule needs a last step, and the fit has none.
        """
        parameters, groups = self.policy.trainable(), self.optimizer_groups()
        if not groups:
            raise UserError("no parameter trains: check policy.lora and policy.adapter")
        optimizer = torch.optim.AdamW(
            [
                {"params": [parameters[name] for name in names], "lr": rate, "weight_decay": decay}
                for (rate, decay), names in groups.items()
            ]
        )
        planned = self.planned_steps()
        if self.schedule != "constant_with_warmup" and not planned:
            raise UsageError(
                f"schedule {self.schedule} ends with the fit, which has no end: set trainer.max_steps, "
                "trainer.max_epochs, or model.schedule: constant_with_warmup"
            )
        factor = partial(rate_factor, schedule=self.schedule, warmup_steps=self.warmup_steps, planned=planned)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_groups(self) -> Groups:
        """The names of the parameters that train, by learning rate and weight decay."""
        groups: Groups = {}
        for name, parameter in self.policy.trainable().items():
            settings = self.learning_rate_of(name), self.weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault(settings, []).append(name)
        return groups

    def learning_rate_of(self, name: str) -> float:
        """The peak learning rate of a parameter of the policy."""
        return self.learning_rate

    def planned_steps(self) -> int:
        """Optimizer steps of the whole fit; 0 where it has no end."""
        steps = self.trainer.estimated_stepping_batches
        # The line above makes Lightning set the loader up before it has restored the position in the data
        # from a checkpoint, and it would not do so again: a run resumed in mid-epoch would start the epoch
        # again.
        self.trainer.fit_loop._combined_loader = None
        return int(steps) if steps != float("inf") else 0

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return the batch as it is."""
        # It is text, and Lightning would try to rebuild each Problem, which fails for frozen dataclasses.
        return batch

    # -- a step ----------------------------------------------------------------------------------------------

    prompt_readings = 1
    """Adapters that read a portion's prompts with gradient."""
    step_learning_rate: float
    """Learning rate of the last optimizer step; that of a critic's own parameters may differ."""

    @property
    def longest_row(self) -> int:
        """Tokens of the longest prompt with its completion."""
        return self.max_prompt_tokens

    def portions(self, experience: Experience, rows: Tensor | None = None) -> Iterator[Portion]:
        """Rows of a step, by default all, in micro-batches on the module's device."""
        rows = torch.arange(len(experience)) if rows is None else rows
        budget = self.budget
        tokens = budget.tokens if torch.is_grad_enabled() else budget.scored
        attended = budget.cost.attended / budget.cost.read
        return portions(experience, rows, tokens, self.micro_batch_size, self.device, attended)

    @property
    def budget(self) -> Budget:
        """How much is computed at a time, by the memory that is free when this is first asked for."""
        if self._budget is None:
            policy, text = self.policy, self.policy.base.config.get_text_config()
            with policy.without_dropout():
                plain = memory.token_cost(policy.base).for_readings(self.prompt_readings)
            free = memory.free_bytes(policy.device) - memory.still_to_come(policy)
            # A model that does not know checkpointing has none, whatever would fit.
            can = policy.gradient_checkpointing is None and policy.base.supports_gradient_checkpointing
            self._budget = memory.Budget.of(
                self.device.type,
                plain,
                text.num_hidden_layers,
                text.hidden_size * policy.base.dtype.itemsize,
                free,
                self.longest_row,
                None if can else policy.is_checkpointing,
            )
            if self._budget.checkpointed and not policy.is_checkpointing:
                policy.checkpoint_activations()
        return self._budget

    def batches_line(self) -> str:
        """How much is computed at a time, and why."""
        budget = self.budget
        rows = f", {self.micro_batch_size} sequences at most" if self.micro_batch_size else ""
        how = "with gradient checkpointing " if budget.checkpointed else ""
        return (
            f"updates: {budget.tokens:,} tokens at a time{rows}; a token takes {how}"
            f"{budget.cost.read / 1e6:.2g} MB, and {max(0, budget.free) / 1e9:.1f} GB are free"
        )

    def in_fitting_parts(self, work: Callable[[], T]) -> T:
        """Do work that goes through :meth:`portions`; where memory does not suffice, again in smaller ones.

        Collective, but ranks may take unequally many attempts: in the work none may wait for others.

        Raises:
            UserError: It does not suffice for the smallest, or another rank has failed.
        """
        with self.together():
            while True:
                try:
                    return work()
                except (RuntimeError, MemoryError) as error:
                    if not memory.is_exhausted(error):
                        raise
                    said = named_line(error)
                # Out here: the error holds what the attempt has left behind.
                for parameter in self.policy.trainable().values():
                    parameter.grad = None
                memory.release(self.device)
                self._use_smaller_parts(said)

    def _use_smaller_parts(self, said: str) -> None:
        budget = self.budget
        smaller = budget.smaller(scoring=not torch.is_grad_enabled())
        if smaller is None:
            raise UserError(
                f"memory does not suffice for a single sequence ({said}): set "
                "policy.gradient_checkpointing: true, or lower model.max_new_tokens"
            )
        self._budget = smaller
        if smaller.tokens == budget.tokens:
            log.warning("memory does not suffice: scoring %d tokens at a time", smaller.scored)
        else:
            log.warning("memory does not suffice: micro-batches of %d tokens from here on", smaller.tokens)

    @property
    def loss_scale(self) -> float:
        """Factor on the loss so that float16 gradients do not underflow; :meth:`step` divides by it again."""
        # The weight of a token may be 1 / 50,000. A power of two changes no bit of the mantissa.
        return 1024.0 if self.policy.base.dtype == torch.float16 else 1.0

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backward without exchange between ranks; :meth:`step` averages and unscales the gradients."""
        # DDP would all-reduce in each backward and wait for ranks that have fewer micro-batches.
        strategy = self.trainer.strategy
        no_sync = strategy.block_backward_sync() if isinstance(strategy, DDPStrategy) else nullcontext()
        with no_sync:
            super().manual_backward(self.loss_scale * loss, *args, **kwargs)

    def clip_groups(self) -> list[list[torch.nn.Parameter]]:
        """Groups of parameters; gradients are clipped by the norm of their group."""
        return [list(self.policy.trainable().values())]

    def step(self) -> Tensor:
        """Average gradients over ranks, unscale, clip, step optimizer and schedule. Collective.

        A gradient that is not finite changes no parameter: the step counts, with a warning.

        Returns:
            The norm of the gradient before clipping.

        Raises:
            UserError: :data:`MOST_SKIPPED` gradients in a row are not finite.
        """
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        parameters = list(self.policy.trainable().values())
        if self.trainer.world_size > 1:
            distributed.average_gradients(parameters)
        # Before clipping: the limit is on the norm of the true gradient.
        for parameter in parameters if self.loss_scale != 1 else []:
            if parameter.grad is not None:
                parameter.grad /= self.loss_scale
        norms = [torch.nn.utils.clip_grad_norm_(group, self.max_grad_norm) for group in self.clip_groups()]
        norm: Tensor = torch.stack(norms).norm()
        finite = bool(torch.isfinite(norm))
        self._skipped = 0 if finite else self._skipped + 1
        if not finite:
            # The same on all ranks: the norm is of the averaged gradient.
            line = f"the gradient of step {self.trainer.global_step} is not finite, and was left out"
            fix = "set policy.compute_dtype to bfloat16 or float32, or lower model.learning_rate; then resume"
            if self._skipped >= MOST_SKIPPED:
                raise UserError(f"{line}, as {self._skipped - 1} before it: {fix}")
            log.warning("%s (%d in a row end the fit)", line, MOST_SKIPPED)
        if norm == 0 or not finite:
            # No sample had an advantage. With gradients set to None the step still counts (for schedules and
            # limits), but Adam's momentum does not move the weights.
            optimizer.zero_grad()
        self.step_learning_rate = float(optimizer.param_groups[0]["lr"])
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()  # Lightning does not, under manual optimization
        return norm

    # -- ranks -----------------------------------------------------------------------------------------------

    def mean_over_ranks(self, value: Tensor) -> Tensor:
        """The mean of a tensor over ranks, on the device that it came from. Collective."""
        if self.trainer.world_size == 1:
            return value
        # Counts may come as integers, which have no mean; and NCCL reduces no CPU tensors.
        mean = self.trainer.strategy.reduce(value.float().to(self.device), reduce_op="mean")
        assert isinstance(mean, Tensor)
        return mean.to(value.device)

    def gathered(self, value: T, patience: float = 0.0) -> list[T]:
        """The values of all ranks, in order of rank. Collective.

        Args:
            value: This rank's.
            patience: Seconds by which the ranks' work before this may differ.

        Raises:
            UserError: A rank has not come.
        """
        return [value] if self.trainer.world_size == 1 else distributed.all_gather(value, patience)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work in which no rank waits for others: an error of one ends all of them, after the block.

        Collective. Without this the others would wait for the one that failed, or be killed with it, before
        they could save.

        Raises:
            UserError: Another rank has failed, or has not come.
        """
        began, failed = time.monotonic(), None
        try:
            yield
        except Exception as error:
            failed = error
        others: list[str] = []
        # `_trainer`, because Lightning's `trainer` raises where the module has none.
        if self._trainer is not None and self.trainer.world_size > 1:
            # Ten times as long as this rank took: prompts, answers and programs differ.
            said = named_line(failed) if failed else ""
            try:
                told = self.gathered(said, patience=10 * (time.monotonic() - began))
            except UserError as missing:
                raise failed or missing from None  # what has failed here says more than who has not come
            others = [f"rank {rank}: {line}" for rank, line in enumerate(told) if line]
        if failed is not None:
            raise failed
        if others:
            raise UserError(f"another process has failed, and the fit ends on all ({'; '.join(others)})")

    # -- checkpoints -----------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the parameters that train, without the frozen ones, and the state of the random generators."""
        trainable = self.policy.trainable().keys()
        names = {f"policy.{name}" for name in trainable}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in names}
        # The state after the last step: evaluations since then may have drawn from the generators.
        checkpoint["rng"] = rng.state() if self._rng is None else self._rng
        checkpoint["stream"] = self._stream
        checkpoint[resuming.PARAMETERS] = resuming.in_order(self.optimizer_groups())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is of this policy, and let this run's settings win over those in it.

        The random generators are restored at the first step.

        Raises:
            UserError: Parameters are missing, surplus or of another shape.
        """
        mine = {f"policy.{name}": p.shape for name, p in self.policy.trainable().items()}
        theirs = {name: value.shape for name, value in checkpoint["state_dict"].items()}
        if mine != theirs:
            odd = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
            raise UserError(
                f"the checkpoint is of another policy ({len(odd)} tensors differ, first {odd[0]}): "
                "resume with the policy settings in the run folder's config.yaml"
            )
        self._rng, self._stream = checkpoint.get("rng"), checkpoint.get("stream")
        if self.trainer.state.fn == TrainerFn.FITTING:
            callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
            resuming.keep_settings(callbacks, checkpoint.get("callbacks", {}))
            if resuming.PARAMETERS in checkpoint:  # not in those of earlier versions
                if "optimizer_states" not in checkpoint:
                    raise UserError(
                        "the checkpoint holds weights alone (save_weights_only), without the optimizer's "
                        "state: a fit cannot go on from it; start a new one from its adapter with "
                        "policy.adapter, or name another with --ckpt_path"
                    )
                resuming.regroup_optimizer(checkpoint, self.optimizer_groups())
            settle(checkpoint["loops"]["fit_loop"])
            if self.datamodule is not None:
                self.datamodule.resume(checkpoint["loops"]["fit_loop"])

    def on_train_start(self) -> None:
        """Make all ranks use rank 0's seed, from which their random generators are seeded."""
        scheduler: Any = self.lr_schedulers()
        resume_at_first_batch(self.trainer)
        resuming.follow(scheduler)  # a checkpoint's rates were those of its own run's schedule
        # A checkpoint's seed if there is one: a resumed run must draw the same numbers.
        self._stream = self.trainer.strategy.broadcast(self._stream or torch.initial_seed())
        give_back_freed_memory()  # of loading, and of an evaluation before: it is free
        rank_zero_info(self.batches_line())
        give_back_freed_memory()  # of counting; the steps keep theirs

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Restore the random generators as the last step, of this run or of its checkpoint, left them."""
        # So that nothing that draws between steps (loaders, evaluations, setting up a resumed run) changes
        # training.
        if self._rng is not None:
            rng.restore(self._rng)
            self._rng = None
        # A checkpoint holds the generators of rank 0 only. The other ranks seed theirs before each step, from
        # the number of the step, so that they resume too.
        if rank := self.trainer.global_rank:
            rng.seed_all(f"{self._stream}, rank {rank}, step {self.trainer.fit_loop.total_batch_idx}")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the state of the random generators for the next step."""
        self._rng = rng.state()
