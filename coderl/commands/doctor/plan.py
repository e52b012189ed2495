"""What a fit will take of a machine's memory, by part, and what it will compute at a time, beforehand.

The decisions are those of a fit (:mod:`coderl.model.memory`). No weights are read: the model is made from its
config.json, of which a layer or two hold real, random numbers so that activations can be counted.
"""

from __future__ import annotations

import json
import logging
import shlex
import subprocess
import sys
import warnings
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import psutil
import torch
import yaml
from torch import nn

from coderl.errors import UserError, named_line
from coderl.model import adapters, loading, memory
from coderl.model.adapter_files import read_adapter_config
from coderl.model.adapters import LoRA
from coderl.model.architectures import auto_class

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

GB = 1e9
NF4_BYTES = 0.5625
"""Bytes of a weight in NF4: four bits, and a float32 for each block of 64."""
ADAPTER_BYTES = 4 + memory.OPTIMIZER_BYTES
CUDA_BYTES = 600_000_000
"""What CUDA and its libraries take on a GPU before anything is allocated."""
SAMPLED_LOGIT_BYTES = 20
"""Bytes for a logit in rollouts: itself, its log-probability and probability, float32, and copies."""


@dataclass(frozen=True)
class Shape:
    """A model's measures.

    Attributes:
        weights: Bytes of the base.
        copy: Bytes of a plain copy; 0 where the policy is as fast itself.
        trained: Number of weights that train.
        cost: What a token's activations take, without checkpointing.
        cache: Bytes of the key-value cache for a token.
        layers: Number of layers.
        width: Bytes of a hidden state.
        vocabulary: Number of tokens that there are.
        frozen: Bytes of a copy of the adapter that the reference computes with; 0 where it is the base alone.
    """

    weights: int
    copy: int
    trained: int
    cost: memory.TokenCost
    cache: int
    layers: int
    width: int
    vocabulary: int
    frozen: int = 0


@dataclass(frozen=True)
class Fit:
    """The settings of a fit that memory depends on.

    Attributes:
        samples: Completions in a step.
        problems: Problems in a step.
        prompt: Longest prompt, in tokens.
        completion: Longest completion, in tokens.
        checkpointing: Gradient checkpointing; None: where activations would not fit.
        copy: Whether rollouts decode from a plain copy; None: where it fits. Nothing is sampled where
            ``samples`` is 0.
        sequences: Most sequences decoded together; None: as many as fit.
        rows: Most sequences in a micro-batch; None: as many as fit.
    """

    samples: int
    problems: int
    prompt: int
    completion: int
    checkpointing: bool | None = None
    copy: bool | None = None
    sequences: int | None = None
    rows: int | None = None


@dataclass
class Plan:
    """Memory by part, in bytes, and what is computed at a time.

    Attributes:
        parts: What stays for the whole fit, by name.
        rollout: What a rollout takes beside it.
        update: What an update takes beside it.
        total: Memory that there is.
        reused: Whether an update can take what a rollout has freed: a GPU's allocator sees to that, the C
            library's leaves holes.
        lines: The decisions, in words.
    """

    total: int
    parts: dict[str, int] = field(default_factory=dict)
    rollout: int = 0
    update: int = 0
    reused: bool = True
    lines: list[str] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """The most that is held at a time."""
        both = (self.rollout, self.update)
        return sum(self.parts.values()) + (max(both) if self.reused else sum(both))


def plan(shape: Shape, fit: Fit, kind: str, total: int, program: int) -> Plan:
    """Make the decisions of a fit.

    Args:
        shape: The model's.
        fit: The settings.
        kind: ``cpu`` or ``cuda``.
        total: Bytes of memory for this process, or of the GPU.
        program: Bytes that the program itself takes.
    """
    found = Plan(total, reused=kind == "cuda")
    found.parts |= {"program and libraries": program, "base model": shape.weights}
    if shape.copy:
        found.parts["adapter, gradients, AdamW"] = ADAPTER_BYTES * shape.trained
    else:  # all weights train, and are the base
        found.parts["gradients, AdamW"] = memory.OPTIMIZER_BYTES * shape.trained
    if kind == "cpu":
        found.parts["copy of the last step"] = memory.LAST_STEP_BYTES * shape.trained
    if shape.frozen:
        found.parts["frozen reference adapter"] = shape.frozen
    free = total - sum(found.parts.values())
    row = fit.prompt + fit.completion
    if fit.samples and shape.copy and (memory.copy_fits(shape.copy, free) if fit.copy is None else fit.copy):
        found.parts["plain copy to decode from"] = shape.copy
        free -= shape.copy
    if fit.samples:
        room = int(memory.CACHE_SHARE * free)
        limit = fit.sequences or memory.MOST_SEQUENCES[kind]
        many = memory.largest_batch(room, row * shape.cache, limit)
        used = min(many, fit.samples)
        found.rollout = used * (row * shape.cache + SAMPLED_LOGIT_BYTES * shape.vocabulary)
        source = "a plain copy" if "plain copy to decode from" in found.parts else "the policy itself"
        found.lines.append(f"rollouts: {used} of {fit.samples} sequences at a time, from {source}")
    budget = memory.Budget.of(kind, shape.cost, shape.layers, shape.width, free, row, fit.checkpointing)
    cost, tokens = budget.cost, budget.tokens
    weight = fit.completion + cost.attended / cost.read * fit.prompt
    rows = max(1, min(fit.samples or fit.problems, int(tokens / weight), fit.rows or sys.maxsize))
    prompts = fit.prompt * max(1, min(fit.problems, tokens // fit.prompt))
    found.update = memory.update_bytes(cost, shape.layers, shape.vocabulary, prompts, int(rows * weight))
    how = "with" if budget.checkpointed else "without"
    found.lines.append(
        f"updates: {rows} of {fit.samples or fit.problems} longest sequences at a time ({tokens:,} tokens, "
        f"{cost.read / 1e6:.2g} MB each), {how} gradient checkpointing"
    )
    return found


# -- the model -----------------------------------------------------------------------------------------------


def shape_of(source: str, quantization: str, dtype: torch.dtype, lora: LoRA | None, name: str) -> Shape:
    """Measure a model by its config.json.

    Args:
        source: Folder or hub id of the base.
        quantization: ``nf4`` or ``none``.
        dtype: In which it computes.
        lora: The adapter; None trains all weights.
        name: The model's name, for errors.

    Raises:
        UserError: There is no config.json, or it cannot be read.
    """
    config = loading.read_config(source)
    with torch.device("meta"):
        whole = auto_class(config).from_config(config)
    head = whole.get_output_embeddings()
    linear = {id(m.weight) for m in whole.modules() if isinstance(m, nn.Linear) and m is not head}
    small = sum(p.numel() for p in whole.parameters() if id(p) in linear)
    other = sum(p.numel() for p in whole.parameters()) - small
    plain = (small + other) * dtype.itemsize
    text = config.get_text_config()
    (one, trained_one), (two, trained_two) = (_twin(config, n, dtype, lora, name) for n in (1, 2))
    more = text.num_hidden_layers - 1
    return Shape(
        weights=int(NF4_BYTES * small + dtype.itemsize * other) if quantization == "nf4" else plain,
        copy=plain if lora is not None else 0,
        trained=trained_one + more * (trained_two - trained_one) if lora is not None else small + other,
        cost=memory.TokenCost(
            one.read + more * (two.read - one.read),
            one.prompt + more * (two.prompt - one.prompt),
            one.attended + more * (two.attended - one.attended),
        ),
        cache=memory.cache_bytes(config, dtype.itemsize),
        layers=text.num_hidden_layers,
        width=text.hidden_size * dtype.itemsize,
        vocabulary=text.vocab_size,
    )


def _twin(
    config: PreTrainedConfig, layers: int, dtype: torch.dtype, lora: LoRA | None, name: str
) -> tuple[memory.TokenCost, int]:
    """What a token takes in a model of a few such layers, and how many of its weights train."""
    settings = config.to_dict() | {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    for key in ("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer", "n_layers"):
        if key in settings:
            settings[key] = layers
    if settings.get("layer_types"):
        settings["layer_types"] = settings["layer_types"][:layers]
    base: PreTrainedModel = auto_class(config).from_config(type(config).from_dict(settings), dtype=dtype)
    if lora is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
            base = adapters.create(base, lora, name).get_base_model()
    trained = sum(p.numel() for p in base.parameters() if p.requires_grad)
    return memory.token_cost(base.eval()), trained


# -- the command ---------------------------------------------------------------------------------------------


def settings_of(config: str) -> dict[str, Any]:
    """The whole configuration of a fit, defaults and preset included.

    Args:
        config: A config's name or path, and further options of ``coderl fit`` behind it.

    Raises:
        UserError: ``coderl fit`` would not take it.
    """
    words = ["-c", *shlex.split(config), "--print_config"]
    done = subprocess.run([sys.executable, "-m", "coderl", "fit", *words], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"--plan {config}: {_last_line(done.stderr)}")
    return dict(yaml.safe_load(done.stdout))


def _last_line(text: str) -> str:
    """The last line that says something."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no reason was given")


def fit_of(settings: dict[str, Any]) -> Fit:
    """The settings of a fit that memory depends on, from its whole configuration."""
    model, data = settings["model"]["init_args"], settings["data"]["init_args"]
    engine = (model.get("engine") or {}).get("init_args", {})
    problems = data["batch_size"]
    return Fit(
        samples=problems * model["group_size"] if "group_size" in model else 0,
        problems=problems,
        prompt=model["max_prompt_tokens"],
        completion=model["max_new_tokens"],
        checkpointing=model["policy"]["init_args"]["gradient_checkpointing"],
        copy=engine.get("merged_copy"),
        sequences=engine.get("batch_size"),
        rows=model["micro_batch_size"],
    )


def planned(config: str, gpu_memory: float | None) -> tuple[str, Plan]:
    """What ``coderl fit -c CONFIG`` would take, on this machine or on a GPU of so many GB.

    Returns:
        The model's name, and the plan.

    Raises:
        UserError: The config or the model's config.json cannot be read.
    """
    # It says that a kernel for decoding on CPUs is missing, which rollouts do not use.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    settings = settings_of(config)
    policy = settings["model"]["init_args"]["policy"]["init_args"]
    kind = "cuda" if gpu_memory is not None or torch.cuda.is_available() else "cpu"
    lora = _lora_of(policy)
    if lora is None:
        dtype = torch.float32  # all weights train
    elif policy["compute_dtype"] == "auto" and kind == "cuda":
        dtype = torch.bfloat16
    else:
        dtype = loading.compute_dtype(policy["compute_dtype"], torch.device("cpu"))
    if gpu_memory is not None:
        program, total = CUDA_BYTES, int(gpu_memory * GB)
    elif kind == "cuda":
        program, total = CUDA_BYTES, torch.cuda.get_device_properties(0).total_memory
    else:
        program = _program_bytes()
        total = memory.free_bytes(torch.device("cpu")) + psutil.Process().memory_info().rss
    source = loading.resolve(policy["model"], policy["gguf_file"])
    try:
        shape = shape_of(source, policy["quantization"], dtype, lora, policy["model"])
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise UserError(f"--plan: {policy['model']} cannot be measured: {named_line(error)}") from error
    adapter = 4 * shape.trained if policy["adapter"] is not None else 0
    if settings["model"]["init_args"].get("critic_adapter"):
        shape = replace(shape, trained=2 * shape.trained, cost=shape.cost.for_readings(2))
    shape = replace(shape, frozen=adapter)
    return policy["model"], plan(shape, fit_of(settings), kind, total, program)


def _lora_of(policy: dict[str, Any]) -> LoRA | None:
    """The adapter that a policy trains, new or saved; None where all weights train."""
    if policy["adapter"] is None:
        lora = policy["lora"]
        return None if lora is None else LoRA(**lora.get("init_args", lora))
    saved = read_adapter_config(policy["adapter"])
    if isinstance(saved["target_modules"], str):
        raise UserError(f"--plan: {policy['adapter']} names its layers by a pattern, which is not supported")
    experts = tuple(saved.get("target_parameters") or ())
    return LoRA(saved["r"], saved["lora_alpha"], 0.0, tuple(saved["target_modules"]), experts)


def _program_bytes() -> int:
    """What this process takes with everything loaded that a fit loads, and no model."""
    import bitsandbytes  # noqa: F401
    import lightning.pytorch  # noqa: F401
    import peft  # noqa: F401

    import coderl.algorithms
    import coderl.callbacks  # noqa: F401

    torch.ones(64, 64) @ torch.ones(64, 64)
    return int(psutil.Process().memory_info().rss)


def show(config: str, gpu_memory: float | None, as_json: bool) -> None:
    """Print the plan of a fit.

    Args:
        config: See :func:`settings_of`.
        gpu_memory: GB of a GPU; None: this machine.
        as_json: As one JSON document.

    Raises:
        UserError: It does not fit, or cannot be planned.
    """
    model, found = planned(config, gpu_memory)
    if as_json:
        values = {"model": model, "peak": found.peak, "fits": found.peak <= found.total} | vars(found)
        print(json.dumps(values, indent=2))
    else:
        print(text(model, found))
    if found.peak > found.total:
        raise UserError(
            f"{model} does not fit: {found.peak / GB:.1f} GB of {found.total / GB:.1f} GB. In this order: "
            "--model.max_new_tokens 256, --model.policy.lora.r 16, --model.policy.quantization nf4, a "
            "smaller model, a larger GPU"
        )


def text(model: str, found: Plan) -> str:
    """The plan as a table, in GB."""
    rows = [*found.parts.items(), ("a rollout, at most", found.rollout), ("an update, at most", found.update)]
    table = "\n".join(f"  {name:<28}{size / GB:>8.2f}" for name, size in rows if size)
    decisions = "\n".join(f"  {line}" for line in found.lines)
    return (
        f"{model}: GB of memory, where prompts and completions are as long as they may be\n{table}\n"
        f"  {'at the peak':<28}{found.peak / GB:>8.2f} of {found.total / GB:.1f}\n{decisions}"
    )
