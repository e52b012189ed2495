"""Saved models: the adapter in peft's format, the merged model in transformers'."""

from __future__ import annotations

import gc
import logging
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psutil
import torch
from safetensors import SafetensorError

from coderl.errors import UserError
from coderl.files import is_partial, replacing_folder
from coderl.model import adapters, loading
from coderl.model.adapter_files import ADAPTER_CONFIG
from coderl.model.provenance import POLICY_FILE, prior_training, write_policy_file
from coderl.problems.contamination import FILE as TRAINED
from coderl.problems.contamination import TrainingRecord, merge_records
from coderl.publish import card
from coderl.publish.verify import Probe
from coderl.runs.folder import is_epoch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from coderl.model.policy import Policy


MODEL_FILES = (
    *("README.md", card.MERGE_FILE, POLICY_FILE, TRAINED, ADAPTER_CONFIG, "adapter_model.safetensors"),
    *("config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors"),
    *("model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "additional_chat_templates/*.jinja", "vocab.json"),
    *("vocab.txt", "merges.txt", "*.model", "preprocessor_config.json", "processor_config.json"),
)
"""Patterns of the files of a model: those that transformers, peft and this module write."""

SPARE = 20_000_000
"""Bytes that tokenizer, configuration and card take at most."""

log = logging.getLogger(__name__)


def save_adapter(
    policy: Policy, folder: Path, trained: TrainingRecord | None = None, run: Path | None = None
) -> Path:
    """Write the adapter, the tokenizer and a model card. Whole or not at all: a full disk leaves the old one.

    Args:
        policy: The policy that has the adapter.
        folder: Where to.
        trained: What the policy was trained on here. It is saved together with what it had been trained on.
        run: The run folder, whose settings the card lists.

    Returns:
        ``folder``.

    Raises:
        UserError: If the policy has no adapter, the disk is full, or the policy started from a folder whose
            list of training problems is damaged.
    """
    if not policy.has_adapter:
        raise UserError("all weights were trained, so there is no adapter to save: save the merged model")
    with _model_folder(folder) as partial:
        _save_training_record(policy, trained, partial)
        policy.net.save_pretrained(partial, selected_adapters=["default"])
        write_policy_file(policy, partial)
        policy.tokenizer.save_pretrained(partial)
        card.write(partial, card.model_name(folder), run, measured=False)
    return folder


def save_merged(
    policy: Policy,
    folder: Path,
    trained: TrainingRecord | None = None,
    dtype: torch.dtype | None = None,
    run: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Write base + adapter as an ordinary checkpoint in safetensors, with tokenizer and model card.

    The pristine base is dequantized and the adapter added once, in the CPU's memory; the policy itself is
    only read. What was written is read again and compared with the policy before it takes its place.

    Args:
        policy: The policy to merge.
        folder: Where to. An earlier merged model there is replaced; other files in it stay.
        trained: What the policy was trained on here. It is saved together with what it had been trained on.
        dtype: Of the weights; see :func:`merged_dtype`.
        run: The run folder, whose settings the card lists.
        progress: Gets a line before each long step.

    Returns:
        ``folder``.

    Raises:
        UserError: If disk or memory do not suffice, something else lies in the folder, the result is another
            model than the policy, or the policy started from a folder whose list of training problems is
            damaged.
    """
    report = progress or log.debug
    dtype = dtype or merged_dtype(policy)
    # 1. Refuse what cannot work before the work.
    require_replaceable(folder)
    adapters.require_own_weights(policy.base, policy.model)
    size = _parameters(policy) * dtype.itemsize
    _require_room(folder, size, _name(dtype))
    with _model_folder(folder) as partial:
        _save_training_record(policy, trained, partial)
        # 2. What the policy computes, for the comparison: before there is a second model in memory.
        probe = Probe(policy)
        # 3. Merge and write.
        report(f"merging, and writing {_gigabytes(size)} in {_name(dtype)} to {folder}")
        policy.merged(dtype, "merging" if progress else None).save_pretrained(partial)
        policy.tokenizer.save_pretrained(partial)
        gc.collect()  # the merged copy is in a reference cycle, and as large as what is read now
        # 4. Verify what is on the disk.
        report("reading it again, and comparing it with base and adapter")
        verification = probe.check(partial)
        report(f"verified: {verification.describe()}")
        # 5. Document it.
        base = {"quantization": policy.quantization, "all_weights_trained": policy.trains_all}
        card.write_merge_record(
            partial, policy.gguf_file or policy.model, _name(dtype), base, verification.to_json()
        )
        card.write(partial, card.model_name(folder), run, measured=False)
    return folder


def merged_dtype(policy: Policy) -> torch.dtype:
    """The precision a policy is merged in: its base's checkpoint's, or its own where all weights trained."""
    # Rounding weights that all trained would take back most of what they learned.
    return policy.base.dtype if policy.trains_all else loading.stored_dtype(policy.source)


def require_replaceable(folder: Path) -> None:
    """Refuse a folder that holds anything but an earlier merged model.

    Raises:
        UserError: If it does.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: name a folder for the merged model")
    others = [
        path
        for path in folder.iterdir()
        if not (is_epoch(path.name) and (path / card.MERGE_FILE).exists()) and not is_partial(path)
    ]
    if others and not (folder / card.MERGE_FILE).is_file():
        raise UserError(
            f"{folder} is not empty and holds no merged model of coderl's: nothing in it is overwritten; "
            "name another folder"
        )


def _require_room(folder: Path, size: int, dtype: str) -> None:
    """Refuse a merged model of ``size`` bytes that disk or memory have no room for."""
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    needed = f"the merged model takes {_gigabytes(size)} in {dtype}"
    if (free := shutil.disk_usage(parent).free) < size + SPARE:
        raise UserError(
            f"{needed}, tokenizer and card up to {_gigabytes(SPARE)}, and {parent} has {_gigabytes(free)} "
            "left: make room, or name another folder"
        )
    if (free := psutil.virtual_memory().available) < size:
        raise UserError(
            f"{needed}, and {_gigabytes(free)} of memory are free: end other programs, or run coderl merge "
            "with a smaller --dtype or where there is more"
        )


def _parameters(policy: Policy) -> int:
    """Number of parameters of the base, tied ones counted once."""
    # Two parameters share a byte in NF4: the tensor's own shape is not the weight's.
    shapes = (
        state.shape if (state := getattr(parameter, "quant_state", None)) is not None else parameter.shape
        for name, parameter in policy.base.named_parameters()
        if ".lora_" not in name
    )
    return sum(shape.numel() for shape in shapes)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size > 1e8 else f"{size / 1e6:.1f} MB"


def _save_training_record(policy: Policy, trained: TrainingRecord | None, folder: Path) -> None:
    if record := merge_records(prior_training(policy), trained):
        record.save(folder)


@contextmanager
def _model_folder(target: Path) -> Iterator[Path]:
    """A folder to write a model into, which replaces ``target`` whole or not at all."""
    with replacing_folder(target, owned=MODEL_FILES, errors=(SafetensorError,)) as partial:
        yield partial
        for weights in partial.glob("*.safetensors"):
            # The writer of safetensors gives rights to the owner alone, whatever the umask.
            weights.chmod(partial.stat().st_mode & 0o666)
