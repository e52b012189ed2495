"""Where base models come from: a folder, a hub id, a GGUF file, or the one in the package; 4-bit or not."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from copy import copy
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from coderl.errors import UsageError, UserError
from coderl.model.architectures import auto_class

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Quantization = Literal["nf4", "none"]
ComputeDtype = Literal["auto", "float32", "float16", "bfloat16"]

EMBEDDED = "embedded"
"""The name of the model that ships in the package."""

log = logging.getLogger(__name__)


def compute_dtype(name: ComputeDtype, device: torch.device) -> torch.dtype:
    """``auto`` is float32 on a CPU, bfloat16 on a GPU that has it, else float16 (the original recipe's)."""
    if name != "auto":
        return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def stored_dtype(source: str) -> torch.dtype:
    """The precision of a checkpoint's weights, by its config.json; float32 where that does not say.

    Args:
        source: What :func:`resolve` returned.

    Raises:
        UserError: If there is no config.json, or it cannot be read.
    """
    dtype = _config(source).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _config(source: str) -> PreTrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source)  # type: ignore[no-any-return]
    except Exception as error:
        raise UserError(f"the model {source} could not be loaded: {_first_line(error)}") from error


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


def cache_dir() -> Path:
    """``$CODERL_CACHE_DIR``, else ``coderl`` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "coderl"
    return Path(os.environ.get("CODERL_CACHE_DIR", default))


def _converted(folder: Path, gguf_file: str) -> Path:
    """The plain checkpoint made from a GGUF file: once per content, whole or not at all."""
    source = folder / gguf_file
    if not source.is_file():
        found = ", ".join(sorted(p.name for p in folder.glob("*.gguf"))) or "none"
        raise UserError(f"gguf_file {gguf_file} is not in {folder}: GGUF files there: {found}")
    stat = source.stat()
    key = hashlib.sha256(f"{source.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    target = cache_dir() / f"{source.stem}-{key}"
    if not (target / "config.json").is_file():
        log.info("converting %s to a plain checkpoint, once, in %s", gguf_file, target)
        partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
        try:
            _convert(folder, gguf_file, partial)
            if not target.exists():  # another rank may have been faster
                partial.rename(target)
        except OSError as error:
            raise UserError(
                f"{target} could not be written: {error.strerror or error}: free the space, or set "
                "CODERL_CACHE_DIR to another folder"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
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
        raise UserError(f"{folder / gguf_file} cannot be read as GGUF: {_first_line(error)}") from error
    # The loaded config still says "gguf", which save_pretrained refuses; a plain twin takes the weights.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer, as its tokenizer.json has it, and with a pad token.

    A model that has no pad token pads with its end-of-sequence token. That is safe here because masks come
    from generation lengths, never from token ids.
    """
    from transformers import AutoTokenizer

    # It asks for another tokenizer_class where it is about to do what is done below for every class.
    logging.getLogger("transformers.models.auto.tokenization_auto").setLevel(logging.ERROR)
    try:
        tokenizer = _as_stored(AutoTokenizer.from_pretrained(source), source)
    except Exception as error:
        raise UserError(f"no tokenizer could be loaded from {source}: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {source} has no eos_token: set one in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _as_stored(tokenizer: PreTrainedTokenizerBase, source: str) -> PreTrainedTokenizerBase:
    """The tokenizer itself, or what tokenizer.json says where its class says something else.

    Some classes of transformers 5 take vocabulary and merges from that file and make up the rest (its issues
    45488 and 46489). So StarCoder2 would not split digits, CodeLlama would gain tokens for infilling that its
    embedding has no rows for, and DeepSeek-Coder would lose its spaces (up to 5.10).
    """
    from transformers import TokenizersBackend
    from transformers.models.auto.tokenization_auto import get_tokenizer_config
    from transformers.utils.hub import cached_file

    if (
        not isinstance(tokenizer, TokenizersBackend)
        or cached_file(source, "tokenizer.json", _raise_exceptions_for_missing_entries=False) is None
    ):
        return tokenizer
    made_up = type(tokenizer) is not TokenizersBackend
    stored: Any = TokenizersBackend.from_pretrained(source) if made_up else tokenizer
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):  # that the class alone gives
        if getattr(stored, name) is None and (token := getattr(tokenizer, name)) in stored.get_vocab():
            setattr(stored, name, token)
    if get_tokenizer_config(source).get("add_bos_token", _begins(tokenizer)) and not _begins(stored):
        _set_bos(stored)
    # The class is known by name, which other programs go by.
    return tokenizer if made_up and _alike(stored, tokenizer) else stored


def _begins(tokenizer: Any) -> bool:
    """Whether the tokenizer begins a text with its bos token."""
    return bool(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])


def _set_bos(tokenizer: Any) -> None:
    """Let the tokenizer begin a text with its bos token, and end it as it did.

    Transformers 5 drops the flag ``add_bos_token`` where there is a tokenizer.json. Older ones went by it, so
    that file need not say it; DeepSeek-Coder's is reported not to (swift-transformers' issue 161).
    """
    if tokenizer.bos_token_id is None:
        return
    ends = tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]
    # Each of the two makes the post-processor anew, from both; of ByteLevel's only offsets depend on it.
    tokenizer.add_eos_token = ends
    tokenizer.add_bos_token = True


def _alike(one: Any, other: Any) -> bool:
    """Whether two tokenizers that have the same vocabulary and merges do the same to every text."""
    same = _pipeline(one) == _pipeline(other) and len(one) == len(other)
    return same and bool(one("a")["input_ids"] == other("a")["input_ids"])  # the special tokens around it


def _pipeline(tokenizer: Any) -> list[Any]:
    """What a tokenizer does with a text before and after its vocabulary."""
    backend = tokenizer.backend_tokenizer
    parts = (backend.normalizer, backend.pre_tokenizer, backend.decoder)
    return [None if part is None else part.__getstate__() for part in parts]


def embedding_rows(source: str) -> int:
    """Rows of a model's embedding by its config.json, which :func:`load_base` holds the weights to.

    Args:
        source: What :func:`resolve` returned.

    Raises:
        UserError: If there is no config.json, or it cannot be read.
    """
    return int(_config(source).get_text_config(decoder=True).vocab_size)


def load_base(
    source: str, quantization: Quantization, dtype: torch.dtype, device: torch.device, *, random: bool = False
) -> PreTrainedModel:
    """The base model on ``device``, its linear layers in NF4 where asked, dropout off everywhere.

    Args:
        source: What :func:`resolve` returned.
        quantization: ``nf4`` or ``none``.
        dtype: Of the computation, and of the weights that are not quantized.
        device: Where it goes.
        random: Fresh weights for ``config.json`` instead of the stored ones.

    Raises:
        UserError: If the checkpoint is missing, incomplete or corrupt.
    """
    from transformers import AutoConfig, BitsAndBytesConfig

    options: dict[str, Any] = {}
    if quantization == "nf4":
        # It misses an optional kernel for 4-bit decoding on CPUs; rollouts decode from plain weights.
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
        options["device_map"] = {"": device}
    try:
        config = AutoConfig.from_pretrained(source)
        # At step 0 the scored forward must equal the sampled one: no dropout hidden in a checkpoint's config.
        for name in [n for n in config.to_dict() if n.endswith(("dropout", "pdrop", "dropout_rate"))]:
            setattr(config, name, 0.0)
        family = auto_class(config)
        if random:
            return family.from_config(config, dtype=dtype).to(device)  # type: ignore[no-any-return]
        loaded: Any = family.from_pretrained(
            source, config=config, dtype=dtype, output_loading_info=True, **options
        )
    except Exception as error:
        raise UserError(f"the model {source} could not be loaded: {_first_line(error)}") from error
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
        # eval mode and then computes in bfloat16: the frozen bytes and the scores would both change.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model  # type: ignore[no-any-return]


def dense(layer: nn.Module, key: str) -> Tensor:
    """A layer's tensor; float32 where it is in 4 bits, so that what an adapter adds is not rounded away."""
    value = getattr(layer, key)
    assert isinstance(value, Tensor)
    if (state := getattr(value, "quant_state", None)) is None:
        return value
    from bitsandbytes.functional import dequantize_4bit

    state = copy(state)
    state.dtype = torch.float32
    return dequantize_4bit(value.data, state)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:400]
