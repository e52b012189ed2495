"""What training changed in a task's scores, in words and as JSON.

The console, ``summary.json``, ``coderl report`` and the model card all say it with these sentences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coderl.scores.caveats import common_ks, different_settings
from coderl.scores.comparison import SIGNIFICANCE, counted
from coderl.scores.numbers import between, is_interval, percent, points, points_between

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coderl.scores.comparison import Comparison, Score

BY_CHANCE = {"grading", "tier", "cpu"}
"""Settings that depend on the samples or the machine: they may differ before and after one training."""


def gain_sentences(
    before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, comparison: Comparison | None
) -> list[str]:
    """What training changed in pass@1 and in the pass@k of the largest k, a sentence each.

    Args:
        before: Scores before training, as a results file or ``summary.json`` holds them; None for none.
        after: Scores after training.
        comparison: The two compared problem by problem, before as side A. None where they cannot be.
    """
    if before is None or after is None or comparison is None:
        return _apart(before, after)
    footing = ", ".join(_footing(after, comparison))
    sentences = [f"{_name(before, after)} {_changed(comparison.scores[1])}, {footing}."]
    if (k := max(comparison.scores)) > 1:
        score = comparison.scores[k]
        fewer = f", on {counted(score.problems, 'problem')}" * (score.problems != comparison.problems)
        sentences.append(f"pass@{k} {_changed(score)}{fewer}.")
    different = {k: v for k, v in different_settings(before, after).items() if k not in BY_CHANCE}
    if different:
        listed = ", ".join(f"{key} {x} and then {y}" for key, (x, y) in different.items())
        sentences.append(f"The two were not measured alike ({listed}): training is not all that differs.")
    return sentences


def gain_record(comparison: Comparison) -> dict[str, Any]:
    """The same comparison for ``summary.json``: of each pass@k what it was, is, and whether it changed."""
    scores = {
        f"pass@{k}": {
            "before": score.a,
            "after": score.b,
            "difference": score.difference,
            "interval": score.interval,
            "problems": score.problems,
            "won": score.won,
            "lost": score.lost,
            "p_value": score.p_value,
            "change": change(score),
        }
        for k, score in comparison.scores.items()
    }
    return {"task": comparison.task, "problems": comparison.problems, **scores}


def change(score: Score) -> str:
    """Whether a score changed, side A being before: rose and fell only where its interval excludes 0."""
    if not score.won and not score.lost:
        return "did not change"
    if not score.better:
        return "shows no clear change"
    rose = score.better == "B"
    if score.p_value < SIGNIFICANCE:
        return "rose" if rose else "fell"
    return "may have risen" if rose else "may have fallen"


def scored(scores: Mapping[str, Any]) -> str:
    """pass@1 with its interval, and the pass@k of the largest k that is known."""
    interval = scores.get("interval")
    others = [f"95 % interval {between(interval)}"] if is_interval(interval) else []
    if (k := largest_k(scores)) > 1:
        others.append(f"pass@{k} {percent(scores[f'pass@{k}'])}")
    return percent(scores.get("pass@1")) + f" ({', '.join(others)})" * bool(others)


def left_out(comparison: Comparison) -> str:
    """Problems that are not compared and why, with A as before training; empty for none."""
    return comparison.left_out.replace("in A", "before training").replace("in B", "after training")


def largest_k(*sides: Mapping[str, Any]) -> int:
    """The largest k whose pass@k is known on all sides; 1 where none is."""
    known = [{key: value for key, value in side.items() if value is not None} for side in sides]
    return max(common_ks(*known))


def _name(*sides: Mapping[str, Any]) -> str:
    return "pass@1, not held out," if any(side.get("contaminated") for side in sides) else "Held-out pass@1"


def _footing(after: Mapping[str, Any], comparison: Comparison) -> list[str]:
    """What the figures rest on."""
    problems = f"on {counted(comparison.problems, 'problem')} of {comparison.task}"
    if comparison.left_out:
        problems += f" ({left_out(comparison)})"
    n, temperature = after.get("n"), (after.get("settings") or {}).get("temperature")
    samples = [f"{counted(n, 'sample')} each"] if isinstance(n, int) else []
    return [problems, *samples, *([] if temperature is None else [f"temperature {temperature}"])]


def _changed(score: Score) -> str:
    """How a score changed, with its figures."""
    words, was, now = change(score), percent(score.a), percent(score.b)
    if words == "did not change":
        return f"{words}: {now} before and after, the same on every problem"
    gain = f"{points(score.difference)} points"
    if is_interval(score.interval):
        gain += f", 95 % interval {points_between(score.interval)}"
    else:
        gain += " on the one problem" if score.problems == 1 else " on every problem"
        gain += ", too few to tell" * (not score.better)
    if words == "shows no clear change":
        return f"{words} ({gain}): {was} before, {now} after"
    chance = ", but wins and losses could be chance" if words.startswith("may") else ""
    return f"{words} from {was} to {now} ({gain}{chance})"


def _apart(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> list[str]:
    """The scores, where they cannot be compared problem by problem."""
    measured = [(when, side) for when, side in (("before", before), ("after", after)) if side is not None]
    sentences = [
        f"{_name(side)} {when} training is {scored(side)}."
        if side.get("pass@1") is not None
        else f"{_name(side)} {when} training is not known: no sample got a verdict."
        for when, side in measured
    ]
    if len(measured) == 2 and all(side.get("pass@1") is not None for _, side in measured):
        sentences.append(
            "Whether that is more than chance cannot be told without the results per problem of both."
        )
    return sentences
