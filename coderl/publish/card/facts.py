"""What is known of a model, from the files in its folder and in its run's."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from coderl.model.loading import EMBEDDED, resolve
from coderl.problems.contamination import FILE as TRAINED
from coderl.runs.folder import RunFolder

MERGED = "merge.json"
"""What lies in a merged model's folder and says what it was made from, and how it was verified."""

PACKAGES = ("coderl", "torch", "transformers", "peft", "bitsandbytes")

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class Facts:
    """What a card is written from.

    Attributes:
        name: The model's.
        base: Hub id of the base, or the name of its folder or file, or ``embedded``; empty where nobody noted
            it.
        license: The base's, None where its card is not at hand.
        adapter: Whether it is an adapter; else whole weights.
        seq2seq: Whether it has an encoder.
        quantization: How the base was held in training, None where nobody noted it.
        trained: Ids of the problems that it was trained on.
        merge: What :func:`note` left.
        config: The run's configuration.
        summary: The run's summary, where what it measured is this model.
        versions: Of the packages that it was made with.
    """

    name: str
    base: str = ""
    license: str | None = None
    adapter: bool = False
    seq2seq: bool = False
    quantization: str | None = None
    trained: tuple[str, ...] = ()
    merge: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def hub_base(self) -> str | None:
        """The base's hub id."""
        return self.base if is_hub_id(self.base) else None

    @property
    def method(self) -> str:
        """Name of the algorithm, in lower case; empty where it is not known."""
        return str(self.summary.get("method") or last(self.config.get("model")).lower())

    @property
    def policy(self) -> dict[str, Any]:
        """The arguments of the run's policy."""
        return arguments(arguments(self.config.get("model")).get("policy"))

    @property
    def problems(self) -> dict[str, int]:
        """From the data set's name to the number of its problems that were trained on."""
        return dict(Counter(name.rpartition("/")[0] or name for name in self.trained))

    @property
    def scores(self) -> dict[str, dict[str, Any]]:
        """From a task to what was measured on it after training."""
        return {task: found for task, found in (self.summary.get("tasks") or {}).items() if found}


def arguments(part: Any) -> dict[str, Any]:
    """The arguments of a class in a configuration; of a part without a class path, the part."""
    found = part.get("init_args", {} if "class_path" in part else part) if isinstance(part, dict) else {}
    return found if isinstance(found, dict) else {}


def last(part: Any) -> str:
    """The name of a class in a configuration, without its module; empty where there is none."""
    path = part.get("class_path") if isinstance(part, dict) else None
    return path.rpartition(".")[2] if isinstance(path, str) else ""


def is_hub_id(name: str) -> bool:
    """Whether a name could be a model's id on the hub: ``owner/name``, and no folder here."""
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


def versions() -> dict[str, str]:
    """The versions that a model is made with."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def name_of(folder: Path) -> str:
    """What a model is called: its folder, or its run's where that is but ``adapter`` or an epoch's."""
    folder = folder.absolute()
    if folder.name == "adapter":
        return folder.parent.name
    return f"{folder.parent.name}-{folder.name}" if re.fullmatch(r"epoch-\d+", folder.name) else folder.name


def run_of(folder: Path) -> Path | None:
    """The run that an adapter's or a merged model's folder is from, by where it lies; None where by none."""
    folder = folder.absolute()
    if folder.name.endswith("-merged"):
        run = folder.with_name(folder.name.removesuffix("-merged"))
    else:
        run = folder.parent
    return (
        run if (folder.name == "adapter" or run != folder.parent) and RunFolder(run).logs.is_dir() else None
    )


def note(folder: Path, base: str, dtype: str, held: dict[str, Any], verified: dict[str, Any]) -> None:
    """Write :data:`MERGED`: what a merged model was made from.

    Args:
        folder: The model's.
        base: Hub id, folder, file or ``embedded``. Only a path's last part is kept: this may be published.
        dtype: Of the merged weights.
        held: How the policy held its base.
        verified: What the comparison with the policy found.
    """
    body = {"base": public(base), "dtype": dtype} | held | {"verified": verified, "versions": versions()}
    (folder / MERGED).write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")


def public(base: str) -> str:
    """A base's name without where it lies on this machine."""
    if Path(base).is_dir() and Path(base).resolve() == Path(resolve(EMBEDDED)).resolve():
        return EMBEDDED
    return base if is_hub_id(base) else Path(base).name


def gather(folder: Path, name: str, run: Path | None, measured: bool) -> Facts:
    """Read what is known of a model. Files that are missing or damaged tell nothing.

    Args:
        folder: The model's.
        name: What it is called.
        run: The run folder that it is from, where there is one.
        measured: Whether what the run's summary says was measured of this model.
    """
    adapter, merge, config = _json(folder / "adapter_config.json"), _json(folder / MERGED), _config(run)
    policy = arguments(arguments(config.get("model")).get("policy"))
    trained_on = policy.get("gguf_file") or policy.get("model")
    other = bool(merge.get("base") and trained_on) and merge["base"] != public(str(trained_on))
    base = (merge.get("base") if other else trained_on) or merge.get("base")
    base = str(base or adapter.get("base_model_name_or_path") or "")
    encoder = adapter.get("task_type") == "SEQ_2_SEQ_LM"
    return Facts(
        name,
        public(base),
        _license(base),
        bool(adapter),
        encoder or bool(_json(folder / "config.json").get("is_encoder_decoder")),
        merge.get("quantization") or _json(folder / "policy.json").get("quantization"),
        tuple(map(str, _json(folder / TRAINED).get("ids") or ())),
        merge,
        config,
        _summary(run) if run and measured and not other else {},
        merge.get("versions") or versions(),
    )


def _summary(run: Path) -> dict[str, Any]:
    """What a fit left. Of one in several parts it knows the last one's seconds alone: those are left out."""
    found = _json(RunFolder(run).summary)
    if len(list(run.glob("logs/version_*"))) > 1:
        found.pop("seconds", None)
    return found


def _license(base: str) -> str | None:
    """The base's, where its own card is at hand and says so."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    if public(base) == EMBEDDED:
        return "mit"  # it ships in this package
    path = try_to_load_from_cache(base, "README.md") if is_hub_id(base) else Path(base, "README.md")
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return None
    try:
        found = ModelCard.load(path, ignore_metadata_errors=True).data.get("license")
    except (OSError, ValueError, TypeError, yaml.YAMLError):  # no card
        return None
    return found if isinstance(found, str) else None


def _config(run: Path | None) -> dict[str, Any]:
    """The configuration that the run was started with last."""
    files = run.glob("logs/version_*/config.yaml") if run else ()
    path = max(files, key=lambda file: file.stat().st_mtime, default=None)
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) if path else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
