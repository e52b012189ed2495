"""What the runs of a learning benchmark have left behind, and the table of it."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

WINDOW = 5
"""Steps in a running mean, and steps that count as the end of a run."""
PASSED, ENTROPY, NO_SIGNAL, KL = "reward/passed", "policy/entropy", "groups/no_signal", "policy/kl"


@dataclass(frozen=True)
class Curve:
    """What a finished run has left behind.

    Attributes:
        before: Held-out pass@1 before the fit, from 0 to 1.
        after: The same after it.
        seconds: Of the whole run, evaluations too.
        steps: The metrics that are known at each rollout step, by name, in order.
    """

    variant: str
    seed: int
    before: float
    after: float
    seconds: float
    steps: list[dict[str, float]]

    def end(self, metric: str) -> float | None:
        """The mean over the last steps, None where the metric was not logged."""
        known = [step[metric] for step in self.steps if metric in step][-WINDOW:]
        return fmean(known) if known else None

    def step_seconds(self) -> list[float]:
        return [sum(v for k, v in step.items() if k.startswith("seconds/")) for step in self.steps]


@dataclass(frozen=True)
class Row:
    """A variant over its seeds. Scores and shares from 0 to 1, ``gain`` in points of a hundred."""

    variant: str
    seeds: list[int]
    before: float
    after: float
    after_lowest: float
    after_highest: float
    gain: float
    steps: int
    seconds_a_step: float
    seconds: float
    entropy: float | None
    no_signal: float | None
    kl: float | None

    @classmethod
    def of(cls, curves: Sequence[Curve]) -> Row:
        """From the finished runs of one variant."""
        before, after = fmean(c.before for c in curves), [c.after for c in curves]
        return cls(
            variant=curves[0].variant,
            seeds=[c.seed for c in curves],
            before=before,
            after=fmean(after),
            after_lowest=min(after),
            after_highest=max(after),
            gain=100 * (fmean(after) - before),
            steps=max(len(c.steps) for c in curves),
            seconds_a_step=median(s for c in curves for s in c.step_seconds()),
            seconds=median(c.seconds for c in curves),
            entropy=mean_end(curves, ENTROPY),
            no_signal=mean_end(curves, NO_SIGNAL),
            kl=mean_end(curves, KL),
        )


def mean_end(curves: Sequence[Curve], metric: str) -> float | None:
    ends = [end for curve in curves if (end := curve.end(metric)) is not None]
    return fmean(ends) if ends else None


def finished(folder: Path) -> Curve | None:
    """What the run in a folder ``{variant}-{seed}`` has left behind, None where it has not ended."""
    try:
        return read_curve(folder)
    except (OSError, ValueError, LookupError, TypeError):  # no file, half a file, no figure in it
        return None


def read_curve(folder: Path) -> Curve:
    variant, _, seed = folder.name.rpartition("-")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    steps = read_metrics(folder / "logs" / "version_0" / "metrics.csv")
    if not steps:
        raise ValueError(f"{folder} has logged no step")
    before, after = (float(summary[when]["pass@1"]) for when in ("before", "after"))
    return Curve(variant, int(seed), before, after, float(summary["seconds"]), steps)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """What is known of each rollout step; rows of evaluations, blanks and NaN are left out."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    known = [{k: v for k, v in row.items() if not math.isnan(v)} for row in rows if "rollout_step" in row]
    return sorted(known, key=lambda row: row["rollout_step"])


def by_variant(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(curve.variant, []).append(curve)
    return groups


def table(curves: Sequence[Curve]) -> list[Row]:
    """A row for each variant, the greatest gain first."""
    return sorted(map(Row.of, by_variant(curves).values()), key=lambda row: -row.gain)


COLUMNS: dict[str, Callable[[Row], str]] = {
    "variant": lambda row: row.variant,
    "seeds": lambda row: str(len(row.seeds)),
    "held-out pass@1 before, %": lambda row: percent(row.before),
    "after, % (lowest to highest)": lambda row: (
        f"{percent(row.after)} ({percent(row.after_lowest)} to {percent(row.after_highest)})"
    ),
    "gain, points": lambda row: f"{row.gain:+.1f}",
    "rollout steps": lambda row: str(row.steps),
    "seconds a step": lambda row: f"{row.seconds_a_step:.2f}",
    "seconds in all": lambda row: f"{row.seconds:.0f}",
    "entropy at the end, nats": lambda row: number(row.entropy, ".3f"),
    "groups without signal at the end, %": lambda row: percent(row.no_signal, ".0f"),
    "KL at the end, nats": lambda row: number(row.kl, ".4f"),
}


def markdown(rows: Sequence[Row]) -> str:
    lines = [
        list(COLUMNS),
        ["---"] * len(COLUMNS),
        *([cell(row) for cell in COLUMNS.values()] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def percent(share: float | None, form: str = ".1f") -> str:
    return "" if share is None else f"{100 * share:{form}}"
