"""Loading base models: from a folder, the hub, a GGUF file or the package; in 4 bits or not."""

from __future__ import annotations

import hashlib
import logging
from copy import copy
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from coderl.errors import UsageError, UserError, named_line
from coderl.files import cache_folder, replacing_folder
from coderl.model.architectures import auto_class
from coderl.types import ComputeDtype, Quantization

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


EMBEDDED = "embedded"
"""The name of the model that ships in the package."""

log = logging.getLogger(__name__)


def compute_dtype(name: ComputeDtype, device: torch.device) -> torch.dtype:
    """The dtype that a name stands for on a device.

    ``auto`` is float32 on a CPU, bfloat16 on a GPU that has it, else float16 (the original recipe's).
    """
    if name != "auto":
        return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def let_adapters_use_tensor_cores(dtype: torch.dtype, device: torch.device) -> None:
    """Let float32 products on a GPU round their factors to TF32, where the base computes in 16 bits.

    Those are the adapter's: its weights are float32, and TF32 has as many bits as float16 and three more than
    bfloat16. Without tensor cores they take, by estimate, a third of scoring and update. A float32 base stays
    exact, and so does a precision that the user has set.
    """
    if device.type == "cuda" and dtype.itemsize == 2 and torch.get_float32_matmul_precision() == "highest":
        torch.set_float32_matmul_precision("high")


def stored_dtype(source: str) -> torch.dtype:
    """The precision of a checkpoint's weights, by its config.json; float32 where that does not say.

    Args:
        source: What :func:`resolve` returned.

    Raises:
        UserError: If there is no config.json, or it cannot be read.
    """
    dtype = read_config(source).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def read_config(source: str) -> PreTrainedConfig:
    """A model's configuration, by its config.json.

    Args:
        source: What :func:`resolve` returned.

    Raises:
        UserError: If there is none, or it cannot be read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source)  # type: ignore[no-any-return]
    except Exception as error:  # the hub's, json's, transformers' own
        raise _not_loaded(source, error) from error


def _not_loaded(source: str, error: Exception) -> UserError:
    return UserError(f"the model {source} could not be loaded: {named_line(error)}")


def find_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is the first GPU, else the CPU.

    Raises:
        UsageError: It is no device's name.
        UserError: There is no GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"no device {name!r}: give auto, cpu, cuda or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name} is not supported: give auto, cpu, cuda or cuda:1")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: there is no GPU that torch can use; coderl doctor says why")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} GPUs, counted from cuda:0")
    return device


def resolve(model: str, gguf_file: str | None = None) -> str:
    """A folder or hub id that ``from_pretrained`` takes.

    Args:
        model: A folder, a hub id, or ``embedded``.
        gguf_file: Name of a GGUF file inside ``model``. It is converted once, into the cache folder, since
            neither quantizing nor merging can start from GGUF blocks.

    Raises:
        UserError: If the folder or the GGUF file does not exist.
    """
    if model == EMBEDDED:
        return str(resources.files("coderl.embedded") / "model")
    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1
    path = Path(model).expanduser()
    if looks_local and not path.is_dir():
        raise UserError(
            f"model folder {model} does not exist: give a folder with config.json, or a hub id owner/name"
        )
    if gguf_file is not None:
        return str(_converted(path, gguf_file))
    if path.is_dir() and not (path / "config.json").is_file():
        found = sorted(p.name for p in path.glob("*.gguf"))
        hint = (
            f"set gguf_file: {found[0]}"
            if found
            else "is it the folder of an adapter? then give its base model"
        )
        raise UserError(f"{model} has no config.json: {hint}")
    return str(path) if path.is_dir() else model


def _converted(folder: Path, gguf_file: str) -> Path:
    """Folder of the plain checkpoint converted from a GGUF file: once per content, whole or not at all."""
    source = folder / gguf_file
    if not source.is_file():
        found = ", ".join(sorted(p.name for p in folder.glob("*.gguf"))) or "none"
        raise UserError(f"gguf_file {gguf_file} is not in {folder}: GGUF files there: {found}")
    stat = source.stat()  # stands for the content: hashing gigabytes would take longer than loading them
    key = hashlib.sha256(f"{source.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    target = cache_folder() / f"{source.stem}-{key}"
    if not (target / "config.json").is_file():
        log.info("converting %s to a plain checkpoint, once, in %s", gguf_file, target)
        fix = "free the space, or set CODERL_CACHE_DIR to another folder"
        # Another rank may be faster. Then its files, which are equal, are replaced.
        with replacing_folder(target, owned=("*",), errors=(SafetensorError,), fix=fix) as partial:
            _convert(folder, gguf_file, partial)
    return target


def _convert(folder: Path, gguf_file: str, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
    except ImportError as error:
        raise UserError(
            f"reading {gguf_file} needs the package gguf: pip install 'coderl[offline]'"
        ) from error
    except Exception as error:
        raise UserError(f"{folder / gguf_file} cannot be read as GGUF: {named_line(error)}") from error
    # The loaded model still has quantization_method "gguf", which save_pretrained refuses: the weights are
    # saved from a plain model of the same configuration.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)


def embedding_rows(source: str) -> int:
    """Rows of a model's embedding by its config.json, which :func:`load_base` checks the weights against.

    Args:
        source: What :func:`resolve` returned.

    Raises:
        UserError: If there is no config.json, or it cannot be read.
    """
    return int(read_config(source).get_text_config(decoder=True).vocab_size)


def load_base(
    source: str, quantization: Quantization, dtype: torch.dtype, device: torch.device, *, random: bool = False
) -> PreTrainedModel:
    """Load the base model onto ``device``, its linear layers in NF4 if asked for, without any dropout.

    Args:
        source: What :func:`resolve` returned.
        quantization: ``nf4`` or ``none``.
        dtype: Of the computation, and of the weights that are not quantized.
        device: Where it goes.
        random: Whether to make random weights for ``config.json`` instead of reading the stored ones.

    Raises:
        UserError: If the checkpoint is missing, incomplete, corrupt or quantized.
    """
    from transformers import BitsAndBytesConfig

    options: dict[str, Any] = {}
    config = read_config(source)
    if quantization == "nf4":
        # It warns that an optional kernel for 4-bit decoding on CPUs is missing; rollouts decode from plain
        # weights and do not need it.
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
        options["device_map"] = {"": device}
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"the checkpoint {source} is quantized already: give the weights that it was made from, and "
            "quantization: nf4 to hold them in 4 bits"
        )
    # At step 0 the scored forward must equal the sampled one: no dropout hidden in a checkpoint's config.
    for name in [n for n in config.to_dict() if n.endswith(("dropout", "pdrop", "dropout_rate"))]:
        setattr(config, name, 0.0)
    try:
        model_class = auto_class(config)
        if random:
            return model_class.from_config(config, dtype=dtype).to(device)  # type: ignore[no-any-return]
        loaded: Any = model_class.from_pretrained(
            source, config=config, dtype=dtype, output_loading_info=True, **options
        )
    except Exception as error:  # safetensors', torch's, bitsandbytes', the hub's
        raise _not_loaded(source, error) from error
    model, info = loaded
    if info["missing_keys"] or info["mismatched_keys"]:
        missing = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise UserError(
            f"the checkpoint {source} does not fit its config.json: {missing[0]} and {len(missing) - 1} more"
        )
    if quantization == "none":
        return model.to(device)  # type: ignore[no-any-return]
    for module in model.modules():
        # On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks a 4-bit layer's bytes at its first forward in
        # eval mode and then computes in bfloat16. Both the frozen bytes and the scores would change.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model  # type: ignore[no-any-return]


class WeightCount(NamedTuple):
    """How a base's weights are held; those of adapters are not among them.

    Attributes:
        quantized: Number of weights in 4 bits.
        quantized_bytes: What they take, with the scales of their blocks.
        plain: Number of the others.
        plain_bytes: What these take.
    """

    quantized: int
    quantized_bytes: int
    plain: int
    plain_bytes: int

    @staticmethod
    def of(model: nn.Module) -> WeightCount:
        """Count a loaded model's."""
        quantized = quantized_bytes = plain = plain_bytes = 0
        for name, parameter in model.named_parameters():  # tied ones once
            if ".lora_" in name:
                continue
            if (state := getattr(parameter, "quant_state", None)) is None:
                plain += parameter.numel()
                plain_bytes += parameter.nbytes
            else:  # two weights share a byte
                quantized += state.shape.numel()
                quantized_bytes += parameter.nbytes + state.absmax.nbytes
        return WeightCount(quantized, quantized_bytes, plain, plain_bytes)


def is_transposed(layer: nn.Module) -> bool:
    """Whether a 4-bit layer holds its weight the other way round than the plain model: that of a Conv1D."""
    from transformers.pytorch_utils import Conv1D

    # transformers notes the class that a 4-bit layer has replaced; GPT-2's holds [in, out].
    return issubclass(getattr(layer, "source_cls", nn.Linear), Conv1D)


def dense(layer: nn.Module, key: str) -> Tensor:
    """A layer's tensor, as the layer holds it.

    It is float32 where it is in 4 bits, so that what an adapter adds is not rounded away.
    """
    value = getattr(layer, key)
    assert isinstance(value, Tensor)
    if (state := getattr(value, "quant_state", None)) is None:
        return value
    from bitsandbytes.functional import dequantize_4bit

    state = copy(state)  # the layer's own keeps its dtype, in which it computes
    state.dtype = torch.float32
    return dequantize_4bit(value.data, state)
