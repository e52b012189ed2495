"""The report's sentences and tables: what training gained, and how runs differ."""

from __future__ import annotations

import math
import re
from itertools import islice
from typing import TYPE_CHECKING, Any

from coderl.scores.table import points

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from coderl.runs.metrics import Series
    from coderl.runs.reading import Run
    from coderl.scores.comparison import Comparison

MOST_SETTINGS, DEEPEST = 5000, 20
FEW = 5  # steps at either end of the training whose means are compared


def percent(value: Any) -> str:
    """A share in percent; a dash where it is not known."""
    known = isinstance(value, int | float) and math.isfinite(value)
    return f"{100 * value:.1f} %" if known else "–"


def between(ends: Any) -> str:
    """An interval of shares, in percent; a dash where it is not known."""
    known = isinstance(ends, list | tuple) and len(ends) == 2
    return f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f} %" if known else "–"


def setting(value: Any) -> str:
    """A setting as text."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {setting(part)}" for name, part in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(setting, value)) or "none"
    return str(value)


def verdict(comparison: Comparison) -> str:
    """A comparison's verdict as a sentence, with the policy before training as A and the trained one as B."""
    sides = {"A": "the policy before training", "B": "the trained policy"}
    sentence = re.sub(r"\b[AB]\b", lambda found: sides[found[0]], comparison.verdict)
    return f"{sentence[:1].upper()}{sentence[1:]} ({comparison.evidence})."


def headline(run: Run) -> str:
    """What training gained, in one or two sentences."""
    before, after = run.held_out
    was, now = (scores.get("pass@1") if scores else None for scores in (before, after))
    if before is None or after is None or was is None or now is None:
        known = [
            (when, s)
            for when, s in (("before", before), ("after", after))
            if s and s.get("pass@1") is not None
        ]
        once = [f"Held-out pass@1 {when} training is {_scored(scores)}." for when, scores in known]
        return " ".join([_in_training(run), *once])
    verb = "rose" if now > was else "fell" if now < was else "stayed where it was"
    from_to = f"from {_scored(before)} to {_scored(after)}" if now != was else f"at {_scored(after)}"
    task = next(iter(run.tasks), "the test split")
    sentences = [f"Held-out pass@1 {verb}, {from_to}, on {after.get('problems', 'the')} problems of {task}."]
    if run.comparisons:
        sentences.append(paired(run.comparisons[0]))
    return " ".join(sentences)


def _scored(scores: dict[str, Any]) -> str:
    return f"{percent(scores['pass@1'])} (95 % interval {between(scores.get('interval'))})"


def paired(comparison: Comparison) -> str:
    """The paired difference and the sign test, in a sentence."""
    low, high = comparison.interval
    return (
        f"Paired, that is {points(comparison.difference)} points (95 % interval {points(low)} to "
        f"{points(high)}): more samples pass on {len(comparison.won)} problems and fewer on "
        f"{len(comparison.lost)}, as many on {comparison.tied} ({comparison.evidence})"
        f"{f'; {comparison.left_out}' if comparison.left_out else ''}."
    )


def _in_training(run: Run) -> str:
    """First and last values of a curve, for a run without evaluations before and after."""
    for name, what, format_value in (
        ("reward/passed", "Programs that pass in training", percent),
        ("reward/mean", "The mean reward", _number),
        ("loss/sft", "The loss", lambda value: f"{_number(value)} nats per token"),
    ):
        series = run.metrics.get(name)
        if series is not None and len(series.finite):
            return _ends(series, what, format_value, run.step_name)
    return "Nothing was measured in training."


def _ends(series: Series, what: str, format_value: Callable[[float], str], step: str) -> str:
    count = min(FEW, max(len(series.finite) // 2, 1))
    first, last = series.mean(first=count), series.mean(last=count)
    if len(series.finite) == 1:
        return f"{what}: {format_value(first)} in the one {step} so far."
    many = f" {count}" * (count > 1)
    start = f"{format_value(first)} in the first{many} of {len(series)} {step}s"
    return f"{what}: {start}, {format_value(last)} in the last{many}."


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1e6 else f"{value:.3g}"


def table(runs: Sequence[Run]) -> list[dict[str, str]]:
    """A row for each run with its model, steps and gain, to print or to make a data frame of."""
    rows = [_row(run) for run in runs]
    known = [name for name in rows[0] if any(row[name] != "–" for row in rows)] if rows else []
    return [{name: row[name] for name in known} for row in rows]


def _row(run: Run) -> dict[str, str]:
    before, after = run.held_out
    gain = run.comparisons[0] if run.comparisons else None
    seconds = run.summary.get("seconds")
    return {
        "run": run.name,
        "method": run.method,
        "model": run.model,
        "steps": f"{run.steps}{'' if run.finished else ' so far'}",
        "seconds": f"{seconds:.0f}{' (last start)' * (len(run.logs) > 1)}" if seconds is not None else "–",
        "pass@1 before": percent(before and before.get("pass@1")),
        "pass@1 after": percent(after and after.get("pass@1")),
        "95 % interval": between(after and after.get("interval")),
        "gain, points": points(gain.difference) if gain else "–",
        "95 % interval of the gain": f"{points(gain.interval[0])} to {points(gain.interval[1])}"
        if gain
        else "–",
        "won, lost": f"{len(gain.won)}, {len(gain.lost)}" if gain else "–",
    }


def differing_settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The settings in which the runs differ, each with its value in every run."""
    flat = [dict(islice(_flat(run.config), MOST_SETTINGS)) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    values = [(key, [settings.get(key, "–") for settings in flat]) for key in keys]
    # Paths of a run always differ.
    paths = ("default_root_dir", "dirpath", "save_dir", "ckpt_path")
    return [(key, row) for key, row in values if len(set(row)) > 1 and key.rpartition(".")[2] not in paths]


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as dotted names and values, down to a depth: aliases in YAML can nest without end."""
    if isinstance(value, dict | list) and value and prefix.count(".") < DEEPEST:
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flat(part, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, "..." if isinstance(value, dict | list) and value else str(value)
