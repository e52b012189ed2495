"""The prose of a model card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coderl.publish.card.code import code
from coderl.publish.card.facts import Facts, arguments, last

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

METHODS = {
    "grpo": "[GRPO](https://arxiv.org/abs/2402.03300) on rewards from running its programs against tests",
    "ppo": "[PPO](https://arxiv.org/abs/1707.06347) on rewards from running its programs against tests",
    "sft": "supervised fine-tuning on solutions",
}
NAMES = {
    "mbpp": "MBPP",
    "humaneval": "HumanEval",
    "mbppplus": "MBPP+",
    "humanevalplus": "HumanEval+",
    "embedded": "the problems that ship with coderl",
}
SETTINGS = (
    *("learning_rate", "schedule", "warmup_steps", "weight_decay", "max_grad_norm", "group_size"),
    *("inner_epochs", "loss_type", "baseline", "scale", "kl", "kl_coefficient", "clip", "clip_high"),
    *("gamma", "lam", "entropy_coefficient", "temperature", "max_new_tokens"),
)
"""Arguments of the algorithms that say how a model came about."""


def body(facts: Facts) -> str:
    """Everything below the head. A part of which nothing is known is left out."""
    parts = [
        (f"# {' '.join(facts.name.split())}", _what(facts)),
        ("## How it was trained", _training(facts)),
        ("## What was measured", _measured(facts)),
        ("## How to use it", _usage(facts)),
        ("## How it was made", _making(facts)),
    ]
    return "\n\n".join(f"{title}\n\n{text}" for title, text in parts if text) + "\n"


def _what(facts: Facts) -> str:
    method = METHODS.get(facts.method, facts.method.upper())
    what = "A LoRA adapter" if facts.adapter else "A code model"
    base = _base(facts)
    of = (f" for {base}" if facts.adapter else f" made from {base}") if base else ""
    return f"{what}{of}{f', trained with {method}' if method else ''}. Made with coderl."


def _base(facts: Facts) -> str:
    if facts.hub_base:
        return f"[{facts.hub_base}](https://huggingface.co/{facts.hub_base})"
    if facts.base == "embedded":
        return "the tiny code model that ships with coderl"
    return f"`{facts.base}`" if facts.base else ""


def _training(facts: Facts) -> str:
    lines = []
    if sets := facts.problems:
        told = ", ".join(f"{count} of {NAMES.get(name, f'`{name}`')}" for name, count in sorted(sets.items()))
        lines.append(
            f"It was trained from a set of {sum(sets.values())} problems ({told}); `training_problems.json` "
            "names each. Scores on them say little about others."
        )
    if steps := facts.summary.get("steps"):
        seconds = facts.summary.get("seconds")
        lines.append(f"{steps} optimizer steps" + (f", {seconds:.0f} seconds in all." if seconds else "."))
    if rows := list(settings(facts)):
        lines.append(_table([("setting", "value"), *rows]))
    return "\n\n".join(lines)


def settings(facts: Facts) -> Iterable[tuple[str, str]]:
    """The settings of the run that say how its model came about: names and values, those that were set."""
    model, data = arguments(facts.config.get("model")), arguments(facts.config.get("data"))
    lora = arguments(facts.policy.get("lora"))
    found: dict[str, Any] = {
        "algorithm": last(facts.config.get("model")),
        "problems": last(data.get("source")),
    }
    silent = ("temperature", "max_new_tokens") if facts.method == "sft" else ()  # of what is sampled
    if not facts.policy.get("train_dropout"):
        lora = lora | {"dropout": None}
    found |= {"prompts a batch": data.get("batch_size")} | {
        name: model.get(name) for name in SETTINGS if name not in silent
    }
    found |= {"rewards": [last(reward) for reward in model.get("rewards") or []]}
    found |= {f"LoRA {name}": lora.get(name) for name in ("r", "alpha", "dropout", "target_modules")}
    found |= {name: facts.policy.get(name) for name in ("quantization", "compute_dtype", "prompt_form")}
    found |= {"seed": facts.config.get("seed_everything")}
    for name, value in found.items():
        if value not in (None, "", []):
            yield name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _measured(facts: Facts) -> str:
    rows = [(NAMES.get(task.removesuffix("_test"), task), found) for task, found in facts.scores.items()]
    if not rows:
        return ""
    if before := facts.summary.get("before"):
        rows = [(f"{rows[0][0]}, before training", before), *((f"{n}, after training", f) for n, f in rows)]
    ks = sorted({k for _, found in rows for k in found if k.startswith("pass@")}, key=lambda k: int(k[5:]))
    titles = ("", ks[0], "95 % interval", *ks[1:], "problems", "samples each", "temperature")
    notes = [_footing(task, found) for task, found in facts.scores.items()]
    if facts.merge.get("quantization") == "none" and facts.policy.get("quantization") == "nf4":
        notes.append(
            "Measured with the base in NF4, as in training; here the adapter is on the base's own weights."
        )
    return "\n\n".join([_table([titles, *(_row(*row, ks) for row in rows)]), *filter(None, notes)])


def _row(label: str, found: dict[str, Any], ks: Sequence[str]) -> tuple[str, ...]:
    scores = ["" if (score := found.get(k)) is None else f"{score:.1%}" for k in ks]
    between = " to ".join(f"{bound:.1%}" for bound in found.get("interval") or ())
    rest = (found.get("problems"), found.get("n"), (found.get("settings") or {}).get("temperature"))
    return (label, scores[0], between, *scores[1:], *("" if x is None else str(x) for x in rest))


def _footing(task: str, found: dict[str, Any]) -> str:
    met, name = found.get("contaminated"), NAMES.get(task.removesuffix("_test"), task)
    if met:
        return (
            f"**NOT HELD OUT**: {len(met)} of the {found.get('problems')} problems of {name} were trained on."
        )
    return "" if met is None else f"None of the problems measured ({name}) was trained on here."


def _usage(facts: Facts) -> str:
    return (
        f"```python\n{code(facts)}```\n\n"
        "What it prints is a program that nobody has read: run it in a sandbox, as `coderl execute` does."
    )


def _making(facts: Facts) -> str:
    lines = [_weights(facts)]
    if found := (facts.merge.get("verified") or {}).get("words"):
        lines.append(f"Read again from disk, it was compared with the policy it was made from: {found}.")
    named = ", ".join(f"{name} {number}" for name, number in facts.versions.items())
    return "\n\n".join(filter(None, [*lines, f"Versions: {named}." if named else ""]))


def _weights(facts: Facts) -> str:
    if facts.adapter:
        nf4 = "The base was held in 4 bits (NF4, [QLoRA](https://arxiv.org/abs/2305.14314))."
        return nf4 if facts.quantization == "nf4" else ""
    if facts.merge.get("all_weights_trained"):
        how = "All weights were trained."
    elif facts.quantization == "nf4":
        how = "The base was dequantized from NF4, in which it was trained, and the adapter added once."
    elif facts.merge:
        how = "The adapter was added once to the base's own weights."
    else:
        return ""
    return f"{how} The weights are in {facts.merge['dtype']}."


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], ("---",) * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
