"""What a fit was worth, in words and in ``summary.json``."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_only

from coderl import __version__

if TYPE_CHECKING:
    from pathlib import Path

    from lightning import Trainer

    from coderl.scores import Evaluation


PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "lightning")


def versions() -> dict[str, str]:
    """What a fit ran on, from name to version."""
    packages = {name: metadata.version(name) for name in PACKAGES}
    return {"coderl": __version__, "python": platform.python_version()} | packages


def summarized_steps(path: Path) -> int:
    """How far the fit was that the summary there speaks of; -1 where there is none, or a part of one."""
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["steps"])
    except (OSError, ValueError, LookupError, TypeError):
        return -1


def limits_reached(trainer: Trainer, checkpoint: dict[str, Any]) -> dict[str, int]:
    """The trainer's limits that the fit in the checkpoint has reached, by name.

    Lightning asks the same once it has restored its loops, after the last hook that could evaluate.
    """
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    done = {"max_steps": checkpoint["global_step"], "max_epochs": epochs}
    limits = {"max_steps": trainer.max_steps, "max_epochs": trainer.max_epochs}
    return {k: limit for k, limit in limits.items() if limit is not None and 0 <= limit <= done[k]}


def figures(evaluation: Evaluation) -> dict[str, Any]:
    """The scores, and what must stand beside them."""
    keys = ("interval", "n", "problems", "test_pass_rate", "outcomes", "infra_errors", "contaminated")
    whole = evaluation.to_json()
    return evaluation.scores() | {key: whole[key] for key in keys} | {"settings": evaluation.settings}


def percent(score: float | None) -> str:
    """A score in words: it is None where the machinery failed on every sample."""
    return "unknown" if score is None else f"{score:.1%}"


def summary_text(summary: dict[str, Any], target: Path, next_command: str | None = None) -> str:
    """What the console is told at the end of a fit.

    Args:
        summary: What stands in ``summary.json``.
        target: Where that is.
        next_command: What to do next, if there is anything to suggest.
    """
    before, after = summary["before"], summary["after"]
    method, steps, seconds = summary["method"].upper(), summary["steps"], summary["seconds"]
    lines = [f"{method} ended after {steps} steps and {seconds:.0f} seconds."]
    if before and after and None not in (before["pass@1"], after["pass@1"]):
        gain = after["pass@1"] - before["pass@1"]
        was, now = percent(before["pass@1"]), percent(after["pass@1"])
        verb = f"rose from {was} to" if gain > 0 else f"fell from {was} to" if gain < 0 else "stayed at"
        temperature = after["settings"]["temperature"]
        lines.append(
            f"Held-out pass@1 {verb} {now} ({100 * gain:+.1f} points) on {after['problems']} problems, "
            f"{after['n']} samples each, temperature {temperature}."
        )
    lines += [f"  {name:<11} {path}" for name, path in summary["paths"].items()]
    lines.append(f"  {'summary':<11} {target}")
    if next_command:
        lines.append(f"Next: {next_command}")
    return "\n".join(lines)


@rank_zero_only
def say(text: str) -> None:
    """Print on the first process alone, at once."""
    print(text, flush=True)
