"""``coderl merge``: merges an adapter into its base, so that transformers loads it as an ordinary model."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal, get_args

from coderl.errors import UsageError, UserError
from coderl.model import loading
from coderl.model.adapter_files import ADAPTER_CONFIG, read_adapter_config, require_adapter
from coderl.model.policy import Policy
from coderl.model.provenance import compute_dtype_of, quantization_of
from coderl.publish import card, hub
from coderl.publish.export import require_replaceable, save_merged
from coderl.runs.model_ref import ModelRef, find_adapter, find_model
from coderl.types import ComputeDtype, Quantization

Weights = Literal["dequantized", "original"]


def merge(
    adapter_model_id: str | None = None,
    output_dir: str | None = None,
    base_model: str | None = None,
    gguf_file: str | None = None,
    weights: Weights | None = None,
    dtype: ComputeDtype = "auto",
    device: str = "auto",
    push_to_hub: bool = False,
    hub_model_id: str | None = None,
    private: bool = False,
) -> None:
    """Merge a LoRA adapter into its base, and verify the merged model.

    What was written is read again and its logits are compared with those of base and adapter on real prompts,
    before it takes the name of --output_dir: it is there whole and verified, or not at all.

    Args:
        adapter_model_id: Folder of an adapter, a run's folder, or the hub id of an adapter.
        output_dir: Folder for the model. An earlier merged model there is replaced, nothing else is.
        base_model: The adapter's base, where its configuration does not name it, or names a folder that is
            gone: a hub id or a folder.
        gguf_file: Name of a GGUF file in the folder --base_model.
        weights: dequantized takes the base in NF4, as it was trained on, so that the model is the policy that
            was trained; original takes the base's own weights. By default as the adapter was trained.
        dtype: Of the merged weights; auto is that of the base's checkpoint. Changes by the adapter that are
            smaller than a step of bfloat16 are lost in it: float32 keeps them.
        device: Where the policy runs that the model is compared with, such as cuda:1; auto is the first GPU,
            else the CPU. The merged weights are made in the CPU's memory.
        push_to_hub: Push the model to the hub once it is verified.
        hub_model_id: Where to, as owner/name; by default your own name and the folder's.
        private: Make a new repository on the hub private.

    Raises:
        UsageError: The arguments contradict each other.
        UserError: The adapter or its base cannot be read, memory or disk do not suffice, the result is
            another model than base and adapter, or the hub did not take it (the model is on the disk then).
    """
    if not adapter_model_id or not output_dir:
        raise UsageError("give --adapter_model_id DIR, an adapter or a run, and --output_dir OUT")
    if (hub_model_id or private) and not push_to_hub:
        raise UsageError("--hub_model_id and --private are about pushing: add --push_to_hub")
    output = Path(output_dir).expanduser().resolve()
    torch_device = loading.find_device(device)
    if push_to_hub:  # so that an invalid id is refused before the work
        hub.require_id(card.model_name(output) if hub_model_id is None else hub_model_id)
    ref = _find_adapter(adapter_model_id, base_model, gguf_file)
    adapter = Path(ref.adapter or "")
    _check_adapter(adapter)
    _check_output(output, {"adapter": adapter, "base": Path(loading.resolve(ref.base, gguf_file))})
    policy = _policy(ref, gguf_file, weights)
    progress(f"reading {adapter} and its base {ref.base}")
    policy.load(torch_device, for_training=False)
    merged_dtype = None if dtype == "auto" else loading.compute_dtype(dtype, torch_device)
    run = card.run_of(adapter)
    save_merged(policy, output, dtype=merged_dtype, run=run, progress=progress)
    # Verified, the model is the policy that the run evaluated: so the run's scores go into its card.
    card.write(output, card.model_name(output), run)
    print(output)
    if push_to_hub:
        print(hub.push(output, hub_model_id, private=private, progress=progress))


def progress(line: str) -> None:
    """Print what is being done on stderr; stdout gets only the model's folder and address, for scripts."""
    print(line, file=sys.stderr, flush=True)


def _find_adapter(adapter: str, base: str | None, gguf_file: str | None) -> ModelRef:
    """The adapter, from a folder or from the hub, and its base."""
    if gguf_file is not None and base is None:
        raise UsageError("--gguf_file is a file in the folder --base_model: give both")
    folder = Path(adapter).expanduser()
    if not folder.exists():
        if not card.is_hub_id(adapter):
            raise UserError(
                f"there is no folder {adapter}: give an adapter's, a run's, or a hub id owner/name"
            )
        folder = hub.fetch_adapter(adapter)
    own = find_adapter(folder) or folder
    require_adapter(own, "give the folder of an adapter, or of its run")
    flags = ("--base_model", "--adapter_model_id")
    return find_model(str(own), flags=flags) if base is None else find_model(base, str(own), gguf_file, flags)


def _check_adapter(folder: Path) -> None:
    """Refuse adapters that are more than plain LoRA: merging would leave the rest out."""
    config = read_adapter_config(folder)
    if (kind := config.get("peft_type")) is None:
        raise UserError(f"{folder}/{ADAPTER_CONFIG} has no peft_type: give an adapter in peft's format")
    more = ("use_dora", "modules_to_save", "trainable_token_indices", "layer_replication")
    found = [name for name in more if config.get(name)]
    if config.get("bias", "none") != "none":
        found.append(f"bias {config['bias']}")
    if kind != "LORA" or found:
        what = f"a {kind} adapter" if kind != "LORA" else f"LoRA with {', '.join(found)}"
        raise UserError(f"{folder} is {what}: only plain LoRA is merged here; peft's merge_and_unload may do")


def _check_output(output: Path, others: dict[str, Path]) -> None:
    """Refuse a folder that the model cannot be written to, before any work.

    Args:
        output: The folder.
        others: Folders that are read, by what they are called in errors; none may hold the other.
    """
    require_replaceable(output)
    for name, other in others.items():
        other = other.resolve()
        if other.is_dir() and (output == other or other in output.parents or output in other.parents):
            raise UserError(
                f"--output_dir {output} and the {name} {other} are in one place: name another folder"
            )
    parent = next(parent for parent in output.parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--output_dir {output}: nothing can be written to {parent}; name another folder")
    if output.is_mount() or output == Path.cwd():
        raise UserError(f"--output_dir {output} cannot be replaced as a whole: name a folder in it")


def _policy(ref: ModelRef, gguf_file: str | None, weights: Weights | None) -> Policy:
    """The policy to merge, and to compare the result with: by default on the base as it was trained on."""
    trained = quantization_of(ref.adapter)
    if weights == "dequantized" and trained == "none":
        raise UsageError("the adapter was trained on its base's own weights: give --weights original")
    quantization: Quantization = trained
    if weights is not None:
        quantization = "nf4" if weights == "dequantized" else "none"
    if quantization == "nf4":  # as in training: the base is cast to this dtype before it is quantized
        compute = compute_dtype_of(ref.adapter)
    else:  # a wider dtype than the checkpoint's adds no information
        stored = str(loading.stored_dtype(loading.resolve(ref.base, gguf_file))).removeprefix("torch.")
        compute = next((name for name in get_args(ComputeDtype) if name == stored), "auto")
    return Policy(
        ref.base,
        gguf_file=gguf_file,
        quantization=quantization,
        compute_dtype=compute,
        adapter=ref.adapter,
    )
