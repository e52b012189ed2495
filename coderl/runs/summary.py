"""``summary.json`` of a run folder: what it holds, and the same as text for the console."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coderl.files import read_json_or_none

if TYPE_CHECKING:
    from pathlib import Path

    from coderl.scores import Evaluation


def summarized_steps(path: Path) -> int:
    """Optimizer steps of the fit that a ``summary.json`` describes; -1 where it is missing or damaged."""
    try:
        return int(read_json_or_none(path)["steps"])
    except (ValueError, LookupError, TypeError):
        return -1


def summary_scores(evaluation: Evaluation) -> dict[str, Any]:
    """The scores of a task as ``summary.json`` holds them, with their settings, counts and caveats."""
    keys = ("interval", "n", "problems", "test_pass_rate", "outcomes", "infra_errors", "contaminated")
    whole = evaluation.to_json()
    return evaluation.scores() | {key: whole[key] for key in keys} | {"settings": evaluation.settings}


def percent(score: float | None) -> str:
    """A score in per cent; ``unknown`` for None, which says that no sample got a verdict."""
    return "unknown" if score is None else f"{score:.1%}"


def fit_summary_text(summary: dict[str, Any], target: Path, next_command: str | None = None) -> str:
    """The lines that are printed at the end of a fit.

    Args:
        summary: The content of ``summary.json``.
        target: Its path.
        next_command: A command to suggest; None suggests nothing.
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
