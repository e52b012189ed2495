"""LoRA adapters: their settings, and the policy's, the critic's and the reference's on one base."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from coderl.errors import UsageError, UserError, first_line, named_line
from coderl.model.adapter_files import require_adapter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn
    from transformers import PreTrainedModel

POLICY, REFERENCE, CRITIC = "default", "reference", "critic"
"""Names of the adapters; ``default`` is peft's own."""


@dataclass
class LoRA:
    """Low-rank adapters (arXiv:2106.09685), with the original recipe's values.

    Args:
        r: Rank.
        alpha: Updates are scaled by alpha / r.
        dropout: Probability, used only where ``Policy.train_dropout`` is set.
        target_modules: Names of the linear layers that get an adapter.
        target_parameters: Likewise of the parameters that hold the experts of an MoE layer, all in one:
            mlp.experts.gate_up_proj and mlp.experts.down_proj. Dropout must be 0 then.
    """

    r: int = 64
    alpha: int = 16
    dropout: float = 0.1
    target_modules: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    target_parameters: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.target_parameters and self.dropout:
            raise UsageError(
                f"lora.dropout is {self.dropout}, and adapters on lora.target_parameters have none: set "
                "policy.lora.dropout to 0"
            )
        if self.r < 1:
            raise UsageError(f"lora.r is {self.r}: set policy.lora.r to 1 or more, or policy.lora to null")


def create(base: PreTrainedModel, lora: LoRA, name: str) -> Any:
    """A peft model with a new adapter, which changes nothing yet.

    Args:
        base: The base model.
        lora: Settings of the adapter.
        name: The model's name, for errors.

    Raises:
        UserError: If a target module or parameter is missing, or its adapter could never be merged.
    """
    from peft import LoraConfig, get_peft_model

    _check_targets(base, lora, name)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        target_parameters=list(lora.target_parameters) or None,
        task_type="SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            # Adapters on tied weights are refused below.
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings")
            warnings.filterwarnings("ignore", "fan_in_fan_out is set")  # peft sees by itself that it is GPT-2
            net: Any = get_peft_model(base, config)
    except ValueError as error:
        targets = "target_modules or target_parameters" if lora.target_parameters else "target_modules"
        raise UserError(f"lora.{targets} do not fit {name}: {first_line(error)}") from error
    require_own_weights(net.get_base_model(), name)
    return net


def require_own_weights(base: PreTrainedModel, name: str) -> None:
    """Refuse an adapter on the embedding or the head where the two share their weights.

    Merged, its update would change both, though it was trained on one.

    Args:
        base: The model, with or without adapters on it.
        name: The model's name, for the error.

    Raises:
        UserError: There is one.
    """
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    plain = [getattr(end, "base_layer", end) for end in ends]
    if None in plain or plain[0].weight is not plain[1].weight:
        return
    adapted = [
        path
        for path, module in base.named_modules()
        if any(module is end for end in ends) and hasattr(module, "base_layer")
    ]
    if adapted:
        raise UserError(
            f"lora.target_modules: in {name} {adapted[0]} shares its weights, embedding and head are one, so "
            "an adapter on it can never be merged: train one on the blocks' layers alone"
        )


def _check_targets(base: PreTrainedModel, lora: LoRA, name: str) -> None:
    """Refuse targets that match nothing: peft skips them without a word if others match."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    experts = expert_parameters(base)
    odd = [
        target
        for target in lora.target_parameters
        if not any(f".{n}".endswith(f".{target}") for n in experts)
    ]
    if odd:
        known = {".".join(path.rsplit(".", 3)[-3:]): None for path in experts}
        raise UserError(
            f"lora.target_parameters {', '.join(odd)} match no experts of {name}, which has "
            f"{', '.join(known) or 'none'}: set policy.lora.target_parameters to those, or leave it out"
        )
    paths = {f".{path}" for path, _ in base.named_modules()}
    unmatched = [name for name in lora.target_modules if not any(p.endswith(f".{name}") for p in paths)]
    if not unmatched:
        return
    head = base.get_output_embeddings()
    layers = {
        path.rpartition(".")[2]: None  # in the model's order
        for path, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    raise UserError(
        f"lora.target_modules {', '.join(unmatched)} match no layer of {name}, whose blocks have "
        f"{', '.join(layers) or 'no linear layers'}: set policy.lora.target_modules to those, or --preset to "
        "the model's family"
    )


def expert_parameters(base: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that hold all experts of an MoE layer in one, by their names in a plain model."""
    from torch import nn
    from torch.nn.modules.conv import _ConvNd

    return {
        f"{plain_name(path)}.{name}": parameter
        for path, module in base.named_modules()
        if not isinstance(module, _ConvNd | nn.Embedding) and ".lora_" not in path
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    }


def plain_name(path: str) -> str:
    """The name of a module in a model without adapters; peft puts the original into ``base_layer``."""
    return path.replace(".base_layer", "")


def adapted(base: nn.Module) -> dict[str, Any]:
    """The parameters that have an adapter, by their names in a plain model, and peft's layer for each."""
    return {
        f"{plain_name(path)}.{getattr(module, 'parameter_name', 'weight')}": module
        for path, module in base.named_modules()
        if hasattr(module, "get_delta_weight") and hasattr(module, "get_base_layer")
    }


def load(base: PreTrainedModel, folder: str) -> Any:
    """A peft model with a saved adapter to train on, and a frozen copy of it as the reference.

    Raises:
        UserError: The folder holds no adapter, or one that is damaged or belongs to another model.
    """
    from peft import PeftModel

    require_adapter(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error below
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings")  # an error where it is merged
        warnings.filterwarnings("ignore", "fan_in_fan_out is set")  # see create()
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing")  # peft 0.21 uses the old name
        try:
            net = PeftModel.from_pretrained(base, folder, is_trainable=True)
            loaded = net.load_adapter(folder, adapter_name=REFERENCE, is_trainable=False)
        except Exception as error:  # json's, safetensors', the hub's, torch's
            # Torch's first line names the model class only; the reason is on the second.
            reason = named_line(error, limit=300, lines=2)
            raise UserError(
                f"the adapter {folder} could not be loaded: {reason}; is it an adapter of another model, or "
                "damaged?"
            ) from error
    keys = [*loaded.missing_keys, *loaded.unexpected_keys]
    # Keys of the base are always missing: an adapter's file holds none of them.
    if wrong := [key for key in keys if ".lora_" in key]:
        raise UserError(f"the adapter {folder} does not fit its base: {wrong[0]} and {len(wrong) - 1} more")
    return net


def has(net: Any, adapter: str) -> bool:
    """Whether the model has an adapter of that name."""
    return adapter in getattr(net, "peft_config", {})


def add(net: Any, adapter: str, trains: bool) -> None:
    """Add an adapter of the policy's shape, which changes nothing until it is trained or filled."""
    with _same_parameters_train(net):
        net.add_adapter(adapter, net.peft_config[POLICY])
    for name, parameter in net.named_parameters():
        if f".{adapter}." in name:
            parameter.requires_grad_(trains)


@torch.no_grad()
def fill(net: Any, adapter: str, values: dict[str, Tensor]) -> None:
    """Copy weights that :func:`weights` returned, of any adapter, into an adapter."""
    for name, parameter in weights(net, adapter).items():
        parameter.copy_(values[name])


def weights(net: Any, adapter: str) -> dict[str, Tensor]:
    """An adapter's parameters, by names without the adapter's own name, so that they fit every adapter."""
    marked = {name: p for name, p in net.named_parameters() if f".{adapter}." in name}
    return {name.replace(f".{adapter}.", "."): p.detach() for name, p in marked.items()}


@contextmanager
def using(net: Any, adapter: str | None) -> Iterator[None]:
    """Inside, the model computes with this adapter, or with none. The same parameters train as before."""
    if adapter is None:
        with _same_parameters_train(net), net.disable_adapter():
            yield
        return
    with _same_parameters_train(net):
        net.set_adapter(adapter)
    try:
        yield
    finally:
        with _same_parameters_train(net):
            net.set_adapter(POLICY)


@contextmanager
def _same_parameters_train(net: nn.Module) -> Iterator[None]:
    """Restore ``requires_grad`` afterwards: peft freezes adapters that it switches off, and the reverse."""
    trains = [(parameter, parameter.requires_grad) for parameter in net.parameters()]
    try:
        yield
    finally:
        for parameter, required in trains:
            parameter.requires_grad_(required)
