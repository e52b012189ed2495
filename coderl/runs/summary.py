"""``summary.json`` of a run folder: what it holds, and the same as text for the console."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coderl.errors import UserError
from coderl.files import read_json_or_none
from coderl.scores.compare import compare_task, read_results
from coderl.scores.comparison import counted
from coderl.scores.gain import gain_record, gain_sentences

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


def summary_gain(
    before: dict[str, Any] | None, results: Path | None, after: Evaluation | None
) -> dict[str, Any]:
    """The parts of ``summary.json`` on what training changed.

    Args:
        before: Scores before training, as :func:`summary_scores` makes them.
        results: The results file that they were saved in; None where it is gone.
        after: The same task after training.

    Returns:
        ``gain``, each pass@k compared problem by problem, or None where that cannot be; ``verdict``, the
        same in sentences.
    """
    comparison = None
    if before is not None and after is not None and results is not None:
        try:
            earlier = read_results(results).get(after.task)
            comparison = earlier and compare_task(after.task, earlier, after.to_json())
        except UserError:  # the file was damaged meanwhile, or the two have no judged problem in common
            comparison = None
        # Scores of other problems than those after training are no scores before it.
        before = before if comparison else None
    scores = None if after is None else summary_scores(after)
    return {
        "gain": gain_record(comparison) if comparison else None,
        "verdict": gain_sentences(before, scores, comparison or None),
    }


def fit_summary_text(summary: dict[str, Any], target: Path, next_command: str | None = None) -> str:
    """The lines that are printed at the end of a fit.

    Args:
        summary: The content of ``summary.json``.
        target: Its path.
        next_command: A command to suggest; None suggests nothing.
    """
    steps, seconds = counted(summary["steps"], "step"), f"{summary['seconds']:.0f} seconds"
    took = f"{steps} and {seconds}"
    if resumed_at := summary["resumed_at"]:
        took = f"{steps}; resumed after {resumed_at}, it took {seconds}"
    lines = [f"{summary['method'].upper()} ended after {took}.", *summary["verdict"]]
    lines += [f"  {name:<11} {path}" for name, path in summary["paths"].items()]
    lines.append(f"  {'summary':<11} {target}")
    if next_command:
        lines.append(f"Next: {next_command}")
    return "\n".join(lines)
