"""The report's sentences and tables: what training gained, and how runs differ."""

from __future__ import annotations

import re
from itertools import islice
from typing import TYPE_CHECKING, Any

from coderl.scores.comparison import counted
from coderl.scores.gain import gain_sentences, largest_k
from coderl.scores.numbers import UNKNOWN, between, percent, points, points_between

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from coderl.runs.metrics import Series
    from coderl.runs.reading import Run
    from coderl.scores.comparison import Comparison

MOST_SETTINGS, DEEPEST = 5000, 20
FEW = 5  # steps at either end of the training whose means are compared


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
    """What training gained, in a few sentences."""
    before, after = run.held_out
    comparison = _gain(run)
    # The results file from before training was not sent along: the end of the fit still had it.
    kept = [] if comparison or run.before else run.summary.get("verdict") or []
    sentences = [str(sentence) for sentence in kept] or gain_sentences(before, after, comparison)
    if comparison:
        sentences.append(won_and_lost(comparison))
    measured = [side and side.get("pass@1") for side in (before, after)]
    return " ".join(sentences if None not in measured else [_in_training(run), *sentences])


def _gain(run: Run) -> Comparison | None:
    """The held-out split after training compared with before."""
    task = next(iter(run.tasks), None)
    return next((each for each in run.comparisons if each.task == task), None)


def won_and_lost(comparison: Comparison) -> str:
    """Problems won and lost and the sign test, in a sentence."""
    return (
        f"More samples pass on {counted(len(comparison.won), 'problem')}, fewer on {len(comparison.lost)} "
        f"and as many on {comparison.tied} ({comparison.evidence})."
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
    names = dict.fromkeys(name for row in rows for name in row)
    known = [name for name in names if any(row.get(name, UNKNOWN) != UNKNOWN for row in rows)]
    return [{name: row.get(name, UNKNOWN) for name in known} for row in rows]


def _row(run: Run) -> dict[str, str]:
    metrics = [f"pass@{k}" for k in sorted({1, largest_k(*filter(None, run.held_out))})]
    before, after = (dict(side or {}) for side in run.held_out)
    seconds, gain = run.summary.get("seconds"), _gain(run)
    if gain:  # then of the problems that are compared, as in the headline
        after["interval"] = gain.scores[1].interval_b
        for k, score in gain.scores.items():
            before[f"pass@{k}"], after[f"pass@{k}"] = score.a, score.b
    return {
        "run": run.name,
        "method": run.method,
        "model": run.model,
        "steps": f"{run.steps}{'' if run.finished else ' so far'}",
        "seconds": f"{seconds:.0f}{' (last start)' * (len(run.logs) > 1)}"
        if seconds is not None
        else UNKNOWN,
        **{
            f"{metric} {when}": percent(side.get(metric))
            for metric in metrics
            for when, side in (("before", before), ("after", after))
        },
        "95 % interval of pass@1 after": between(after.get("interval")),
        "gain in pass@1, points": points(gain.difference) if gain else UNKNOWN,
        "95 % interval of the gain": points_between(gain.interval) if gain else UNKNOWN,
        "won, lost": f"{len(gain.won)}, {len(gain.lost)}" if gain else UNKNOWN,
    }


def differing_settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The settings in which the runs differ, each with its value in every run."""
    flat = [dict(islice(_flat(run.config), MOST_SETTINGS)) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    values = [(key, [settings.get(key, UNKNOWN) for settings in flat]) for key in keys]
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
