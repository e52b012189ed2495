"""The card as a file: its head for the hub, its text for people."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from coderl.problems import MBPP, HumanEval, HumanEvalPlus, MBPPPlus
from coderl.publish.card.code import quoted
from coderl.publish.card.facts import Facts, gather
from coderl.publish.card.text import NAMES, body

if TYPE_CHECKING:
    from pathlib import Path

    from huggingface_hub import EvalResult, ModelCardData

FILE = "README.md"
"""Where the hub looks for a model's card."""

DATA_SETS = {source.name: source.hub for source in (MBPP, HumanEval, HumanEvalPlus, MBPPPlus)}
"""Where the hub has the problems of a task."""

_NAME_LINE = re.compile(
    r'^name = "(?:[^"\\\n]|\\.)*"(?=  # this model\'s folder, or its id on the hub$)', re.MULTILINE
)


def write(folder: Path, name: str, run: Path | None, *, measured: bool = True) -> None:
    """Write the card of an adapter or a merged model.

    Args:
        folder: The model's.
        name: What it is called.
        run: The run folder that it is from, where there is one.
        measured: Whether what the run's summary says was measured of this model.
    """
    from huggingface_hub import ModelCard

    facts = gather(folder, name, run, measured)
    ModelCard(f"---\n{head(facts).to_yaml()}\n---\n\n{body(facts)}").save(folder / FILE)


def call(text: str, hub_id: str) -> str:
    """The card's text with the model's hub id in its code, where that is still the code that was written."""
    return _NAME_LINE.sub(lambda _: f"name = {quoted(hub_id)}", text)


def head(facts: Facts) -> ModelCardData:
    """The YAML head, which the hub reads."""
    from huggingface_hub import ModelCardData

    measured = results(facts)
    kinds = ["lora", *(["qlora"] if facts.quantization == "nf4" else [])] if facts.adapter else []
    relation: dict[str, Any] = (
        {"base_model_relation": "adapter" if facts.adapter else "finetune"} if facts.hub_base else {}
    )
    return ModelCardData(
        base_model=facts.hub_base,
        library_name="peft" if facts.adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["coderl", "code", *([facts.method] if facts.method else []), *kinds],
        datasets=[hub for name in facts.problems if (hub := DATA_SETS.get(name))] or None,
        license=facts.license,
        model_name=facts.name if measured else None,
        eval_results=measured or None,
        **relation,
    )


def results(facts: Facts) -> list[EvalResult]:
    """What was measured on problems that were held out, for the head's model-index."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=DATA_SETS.get(task.removesuffix("_test"), task),
            dataset_name=f"{NAMES.get(task.removesuffix('_test'), task)} ({found['problems']} problems)",
            metric_type=metric,
            metric_name=metric,
            metric_value=round(value, 4),
        )
        for task, found in facts.scores.items()
        if not found.get("contaminated")
        for metric, value in found.items()
        if metric.startswith("pass@") and value is not None
    ]
