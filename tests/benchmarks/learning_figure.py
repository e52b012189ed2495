"""The figure of a learning benchmark: curves in small panels, and held-out scores beside them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from tests.benchmarks.learning_curves import PASSED, WINDOW, Curve, by_variant, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#8A8A8A"  # Okabe and Ito's: told apart by every kind of eyes
STYLE: dict[str, Any] = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 3,
}


def running_mean(curve: Curve, metric: str = PASSED) -> dict[int, float]:
    """By rollout step, the mean of it and the steps before it, as many as :data:`WINDOW`."""
    known = [(int(step["rollout_step"]), step[metric]) for step in curve.steps if metric in step]
    values = [value for _, value in known]
    return {step: fmean(values[max(0, i + 1 - WINDOW) : i + 1]) for i, (step, _) in enumerate(known)}


def over_seeds(curves: Sequence[Curve]) -> list[tuple[int, float, float, float]]:
    """Step, mean, lowest and highest of the seeds' running means in percent, at steps that all have."""
    means = [running_mean(curve) for curve in curves]
    steps = sorted(set(means[0]).intersection(*means[1:]))
    at = {step: [100 * each[step] for each in means] for step in steps}
    return [(step, fmean(values), min(values), max(values)) for step, values in at.items()]


def draw(curves: Sequence[Curve], path: Path, reference: str) -> None:
    """A small panel for each variant's curve, and one for the held-out scores of all, best first.

    Args:
        curves: All finished runs.
        path: The PNG, 900 pixels wide on the page and twice as many in the file.
        reference: The variant whose mean stands in grey behind the others.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups, order = by_variant(curves), [row.variant for row in table(curves)]
    columns = 2 if len(order) in (2, 4) else min(3, len(order))
    lines = -(-len(order) // columns)
    with pyplot.style.context(STYLE):
        figure = pyplot.figure(figsize=(9, max(2.8, 1.3 * lines + 0.75)), layout="constrained")
        left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[2, 1.05], wspace=0.03)[0]
        axes = left.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for variant, panel in zip(order, axes.flat, strict=False):
            draw_curves(panel, groups[variant])
            if variant != reference and reference in groups:
                draw_reference(panel, groups[reference])
            panel.set_title(variant)
            panel.xaxis.get_major_locator().set_params(integer=True)
        for panel in axes.flat[len(order) :]:
            panel.set_visible(False)
        for column in range(columns):  # where the last line is short, the panel above it shows the steps
            lowest = max(i for i in range(len(order)) if i % columns == column)
            axes.flat[lowest].tick_params(labelbottom=True)
        legend = f"in training, mean of {WINDOW} steps and of the seeds; band: lowest to highest seed"
        left.suptitle(f"{legend}; grey: {reference}" if reference in groups else legend, fontsize=9)
        left.supxlabel("rollout step", fontsize=9)
        left.supylabel("programs that pass, %", fontsize=9)
        draw_scores(right.subplots(), order, groups)
        save(figure, path)
        pyplot.close(figure)


def save(figure: Figure, path: Path) -> None:
    """As a PNG of 64 colours: a third of the bytes, and looks the same."""
    from PIL import Image

    whole = io.BytesIO()
    figure.savefig(whole, dpi=200)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(whole).convert("RGB").quantize(64).save(path, "PNG", optimize=True)


def draw_curves(panel: Axes, curves: Sequence[Curve]) -> None:
    """Mean over seeds, with a band from lowest to highest."""
    steps, means, lowest, highest = zip(*over_seeds(curves), strict=True)
    panel.fill_between(steps, lowest, highest, color=BLUE, alpha=0.25, linewidth=0)
    panel.plot(steps, means, color=BLUE, linewidth=1.5)


def draw_reference(panel: Axes, curves: Sequence[Curve]) -> None:
    """The mean alone, behind."""
    steps, means, _, _ = zip(*over_seeds(curves), strict=True)
    panel.plot(steps, means, color=GREY, linewidth=1.0, zorder=1)


def draw_scores(panel: Axes, order: Sequence[str], groups: dict[str, list[Curve]]) -> None:
    """A dot for each seed, a stroke at their mean, and a line where all began."""
    for place, variant in enumerate(order):
        scores = [100 * curve.after for curve in groups[variant]]
        panel.plot(
            scores, [place] * len(scores), "o", color=BLUE, alpha=0.65, markersize=5, markeredgewidth=0
        )
        panel.plot([fmean(scores)], [place], "|", color=BLUE, markersize=13, markeredgewidth=1.6)
    base = 100 * fmean(curve.before for curves in groups.values() for curve in curves)
    panel.axvline(base, color=VERMILION, linewidth=1.2, linestyle="--")
    panel.annotate(
        "before",
        (base, 1),
        (3, 2),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        color=VERMILION,
    )
    panel.set_yticks(range(len(order)), order)
    panel.set_ylim(len(order) - 0.5, -0.5)
    panel.grid(axis="y", visible=False)
    panel.set_xlabel("held-out pass@1 after training, %\n(dots: seeds, stroke: mean)", fontsize=9)
