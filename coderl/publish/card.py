"""Model cards: what a model is, how it was trained, what was measured of it, and how to use it.

Every fact comes from a file in the model's own folder or in its run's, and is gathered here. The text is
``card.md.jinja``. What is not known is left out.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from coderl.files import read_json_or_none, write_atomic
from coderl.model.adapter_files import ADAPTER_CONFIG, adapter_base
from coderl.model.loading import EMBEDDED, resolve
from coderl.model.provenance import POLICY_FILE
from coderl.problems import MBPP, HumanEval, HumanEvalPlus, MBPPPlus, prompts
from coderl.problems.contamination import FILE as TRAINED
from coderl.runs.config import arguments, class_name, parse_config, policy_arguments
from coderl.runs.folder import RunFolder, is_epoch
from coderl.runs.versions import installed_versions
from coderl.scores.numbers import between, percent
from coderl.types import Problem

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

FILE = "README.md"
"""Where the hub looks for a model's card."""

MERGE_FILE = "merge.json"
"""Lies in a merged model's folder: what it was made from, and how it was verified."""

PACKAGES = ("coderl", "torch", "transformers", "peft", "bitsandbytes")
"""The libraries that a model is made with."""

DATA_SETS = {source.name: source.hub for source in (MBPP, HumanEval, HumanEvalPlus, MBPPPlus)}
"""Ids on the hub of the tasks' data sets."""

NAMES = {
    "mbpp": "MBPP",
    "humaneval": "HumanEval",
    "mbppplus": "MBPP+",
    "humanevalplus": "HumanEval+",
    "embedded": "the problems that ship with coderl",
}
"""Names of the data sets, as the card prints them."""

SETTINGS = (
    *("learning_rate", "schedule", "warmup_steps", "weight_decay", "max_grad_norm", "group_size"),
    *("inner_epochs", "loss_type", "baseline", "scale", "kl", "kl_coefficient", "clip", "clip_high"),
    *("gamma", "lam", "entropy_coefficient", "temperature", "max_new_tokens"),
)
"""Arguments of the algorithms that the card lists."""

_TASK = ("Write a function to double a number.", "assert double(2) == 4")
EXAMPLE = Problem("example", prompts.mbpp_prompt(*_TASK), prompts.mbpp_instruction(*_TASK))
"""The problem that the card's code lets the model solve."""

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

# The line of the card's code that names the model, as the template writes it.
_NAME_LINE = re.compile(
    r'^name = "(?:[^"\\\n]|\\.)*"(?=  # this model\'s folder, or its id on the hub$)', re.MULTILINE
)


@dataclass(frozen=True)
class Facts:
    """What a card is written from.

    Attributes:
        name: The model's.
        base: Hub id of the base, or the name of its folder or file, or ``embedded``; empty if unknown.
        license: The base's, None where its own card is not on this machine.
        is_adapter: Whether it is an adapter; else it is a whole model.
        is_encoder_decoder: Whether it has an encoder.
        quantization: The base's during training, None if unknown.
        trained: Ids of the problems that it was trained on.
        merge: The content of :data:`MERGE_FILE`.
        config: The run's configuration.
        summary: The run's summary, where what it measured is this model.
        versions: Of the packages that it was made with.
    """

    name: str
    base: str = ""
    license: str | None = None
    is_adapter: bool = False
    is_encoder_decoder: bool = False
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
        """Name of the algorithm, in lower case; empty if unknown."""
        return str(self.summary.get("method") or class_name(self.config.get("model")).lower())

    @property
    def policy(self) -> dict[str, Any]:
        """The arguments of the run's policy."""
        return policy_arguments(self.config)

    @property
    def problems(self) -> dict[str, int]:
        """From the data set's name to the number of its problems that were trained on, by name."""
        return dict(sorted(Counter(name.rpartition("/")[0] or name for name in self.trained).items()))

    @property
    def scores(self) -> dict[str, dict[str, Any]]:
        """From a task to what was measured on it after training."""
        return {task: found for task, found in (self.summary.get("tasks") or {}).items() if found}

    @property
    def verdict(self) -> str:
        """What training changed, in the words that the fit ended with; empty if unknown."""
        found = self.summary.get("verdict")
        return " ".join(map(str, found)) if isinstance(found, list) else ""

    @property
    def settings(self) -> list[tuple[str, str]]:
        """Names and values of the run's settings that shaped the model, those that are set."""
        model, data = arguments(self.config.get("model")), arguments(self.config.get("data"))
        lora = arguments(self.policy.get("lora"))
        if not self.policy.get("train_dropout"):
            lora = lora | {"dropout": None}  # without train_dropout it never acts
        # SFT samples only for its evaluation.
        unused = ("temperature", "max_new_tokens") if self.method == "sft" else ()
        found: dict[str, Any] = {
            "algorithm": class_name(self.config.get("model")),
            "problems": class_name(data.get("source")),
            "prompts a batch": data.get("batch_size"),
            **{name: model.get(name) for name in SETTINGS if name not in unused},
            "rewards": [class_name(reward) for reward in model.get("rewards") or []],
            **{f"LoRA {name}": lora.get(name) for name in ("r", "alpha", "dropout", "target_modules")},
            **{name: self.policy.get(name) for name in ("quantization", "compute_dtype", "prompt_form")},
            "seed": self.config.get("seed_everything"),
        }
        return [
            (name, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
            for name, value in found.items()
            if value not in (None, "", [])
        ]

    @property
    def score_table(self) -> list[tuple[str, ...]]:
        """The titles, then a row for each task; before them the first task's score before training."""
        rows = [(task_name(task), found) for task, found in self.scores.items()]
        if before := self.summary.get("before"):
            after = [(f"{name}, after training", found) for name, found in rows]
            rows = [(f"{rows[0][0]}, before training", before), *after]
        metrics = {metric for _, found in rows for metric in found if metric.startswith("pass@")}
        first, *others = sorted(metrics, key=lambda metric: int(metric.removeprefix("pass@")))
        table = [("", first, "95 % interval", *others, "problems", "samples each", "temperature")]
        for label, found in rows:
            temperature = (found.get("settings") or {}).get("temperature")
            table.append(
                (
                    label,
                    percent(found.get(first)),
                    between(found.get("interval")),
                    *(percent(found.get(metric)) for metric in others),
                    *(
                        "" if x is None else str(x)
                        for x in (found.get("problems"), found.get("n"), temperature)
                    ),
                )
            )
        return table

    def head(self) -> ModelCardData:
        """The card's YAML head, which the hub reads."""
        from huggingface_hub import EvalResult, ModelCardData

        measured = [
            EvalResult(
                task_type="text-generation",
                dataset_type=DATA_SETS.get(task.removesuffix("_test"), task),
                dataset_name=f"{task_name(task)} ({found['problems']} problems)",
                metric_type=metric,
                metric_name=metric,
                metric_value=round(value, 4),
            )
            for task, found in self.scores.items()
            if not found.get("contaminated")  # the hub ranks models by these: held-out problems alone
            for metric, value in found.items()
            if metric.startswith("pass@") and value is not None
        ]
        tags = ["coderl", "code", *([self.method] if self.method else [])]
        if self.is_adapter:
            tags += ["lora", "qlora"] if self.quantization == "nf4" else ["lora"]
        relation: dict[str, Any] = (
            {"base_model_relation": "adapter" if self.is_adapter else "finetune"} if self.hub_base else {}
        )
        return ModelCardData(
            base_model=self.hub_base,
            library_name="peft" if self.is_adapter else "transformers",
            pipeline_tag="text-generation",
            tags=tags,
            datasets=[DATA_SETS[name] for name in self.problems if DATA_SETS.get(name)] or None,
            license=self.license,
            model_name=self.name if measured else None,
            eval_results=measured or None,
            **relation,
        )


def write(folder: Path, name: str, run: Path | None, *, measured: bool = True) -> None:
    """Write the card of an adapter or a merged model.

    Args:
        folder: The model's.
        name: What it is called.
        run: The run folder that it is from, where there is one.
        measured: Whether the scores in the run's summary were measured of this model.
    """
    from huggingface_hub import ModelCard
    from jinja2 import Environment, StrictUndefined

    facts = gather_facts(folder, name, run, measured)
    # No autoescape: the text is Markdown, in which &#39; would stand as it is.
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"quoted": quoted, "repr": repr}
    template = environment.from_string(
        Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8"),
        globals={"names": NAMES, "task_name": task_name},
    )
    text = template.render(
        facts=facts,
        head=facts.head().to_yaml(),
        prompt=EXAMPLE.prompt,
        messages=prompts.chat_messages(EXAMPLE),
        chat_opening=prompts.CHAT_OPENING,
    )
    ModelCard(text.rstrip("\n") + "\n").save(folder / FILE)


def with_hub_id(text: str, hub_id: str) -> str:
    """The card's text with the model's hub id in its code, unless somebody has edited that line."""
    return _NAME_LINE.sub(lambda _: f"name = {quoted(hub_id)}", text)


def quoted(name: str) -> str:
    """A name as a Python string, in double quotes and on one line."""
    return json.dumps(name, ensure_ascii=not name.isprintable())


def task_name(task: str) -> str:
    """A task as the card prints it; the test split of MBPP is MBPP to others."""
    return NAMES.get(task.removesuffix("_test"), task)


def is_hub_id(name: str) -> bool:
    """Whether a name could be a model's id on the hub: ``owner/name``, and no folder here."""
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


def model_name(folder: Path) -> str:
    """What a model is called: as its folder; as its run if that is only ``adapter`` or an epoch's."""
    folder = folder.absolute()
    if folder == RunFolder(folder.parent).adapter:
        return folder.parent.name
    return f"{folder.parent.name}-{folder.name}" if is_epoch(folder.name) else folder.name


def run_of(folder: Path) -> Path | None:
    """The run folder that an adapter or a merged model is from, by where it lies; None if from none."""
    run = RunFolder.of_model(folder.absolute())
    return run.path if run and run.logs.is_dir() else None


def write_merge_record(
    folder: Path, base: str, dtype: str, held: dict[str, Any], verified: dict[str, Any]
) -> None:
    """Write :data:`MERGE_FILE`: what a merged model was made from.

    Args:
        folder: The model's.
        base: Hub id, folder, file or ``embedded``. Only a path's last part is written: this may be published.
        dtype: Of the merged weights.
        held: The base's ``quantization`` in the policy, and whether ``all_weights_trained``.
        verified: What the comparison with the policy found.
    """
    body = {"base": public_name(base), "dtype": dtype} | held
    body |= {"verified": verified, "versions": _versions()}
    write_atomic(folder / MERGE_FILE, json.dumps(body, indent=2) + "\n")


def public_name(base: str) -> str:
    """A base's name without where it lies on this machine."""
    if Path(base).is_dir() and Path(base).resolve() == Path(resolve(EMBEDDED)).resolve():
        return EMBEDDED
    return base if is_hub_id(base) else Path(base).name


def _versions() -> dict[str, str]:
    """The installed versions of :data:`PACKAGES`."""
    return {name: version for name, version in installed_versions().items() if name in PACKAGES}


def gather_facts(folder: Path, name: str, run: Path | None, measured: bool) -> Facts:
    """Read what is known of a model. Files that are missing or damaged are left out: a card needs none.

    Args:
        folder: The model's.
        name: What it is called.
        run: The run folder that it is from, where there is one.
        measured: Whether the scores in the run's summary were measured of this model.
    """
    adapter, merge = _dict(folder / ADAPTER_CONFIG), _dict(folder / MERGE_FILE)
    config = _latest_config(run) if run else {}
    policy = policy_arguments(config)
    trained_on = policy.get("gguf_file") or policy.get("model")
    # Merged by hand into another base than the run's: the run measured another model than this.
    other = bool(merge.get("base") and trained_on) and merge["base"] != public_name(str(trained_on))
    base = (merge.get("base") if other else trained_on) or merge.get("base")
    base = str(base or adapter_base(folder) or "")
    summary: dict[str, Any] = {}
    if run and measured and not other:
        summary = _dict(RunFolder(run).summary)
        if len(list(RunFolder(run).logs.glob("version_*"))) > 1:
            summary.pop("seconds", None)  # the run was resumed: they are its last part's
    return Facts(
        name=name,
        base=public_name(base),
        license=_license(base),
        is_adapter=bool(adapter),
        is_encoder_decoder=adapter.get("task_type") == "SEQ_2_SEQ_LM"
        or bool(_dict(folder / "config.json").get("is_encoder_decoder")),
        quantization=merge.get("quantization") or _dict(folder / POLICY_FILE).get("quantization"),
        trained=tuple(map(str, _dict(folder / TRAINED).get("ids") or ())),
        merge=merge,
        config=config,
        summary=summary,
        versions=merge.get("versions") or _versions(),
    )


def _license(base: str) -> str | None:
    """The base's, from its own card if that is on this machine."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    if public_name(base) == EMBEDDED:
        return "mit"  # it ships in this package
    path = try_to_load_from_cache(base, FILE) if is_hub_id(base) else Path(base, FILE)
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return None
    try:
        found = ModelCard.load(path, ignore_metadata_errors=True).data.get("license")
    except (OSError, ValueError, TypeError, yaml.YAMLError):  # no card
        return None
    return found if isinstance(found, str) else None


def _latest_config(run: Path) -> dict[str, Any]:
    """The settings of the run's latest start; empty where they cannot be read."""
    path = RunFolder(run).latest_config()
    try:
        return parse_config(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError):
        return {}


def _dict(path: Path) -> dict[str, Any]:
    found = read_json_or_none(path)
    return found if isinstance(found, dict) else {}
