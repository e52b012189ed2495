"""The figures of a report, in matplotlib; curves of several runs are laid over each other.

Steps are drawn as faint points, and over them a centred running mean. Of long runs a point is the mean of
several steps, which the figure says.
"""

from __future__ import annotations

import math
import textwrap
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from coderl.report.programs import visible
from coderl.runs.metrics import Series
from coderl.runs.reading import Run
from coderl.scores import plot
from coderl.scores.numbers import percent

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Of runs, in order. Okabe and Ito's colours, which colour-blind readers can tell apart."""
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))
"""Of runs that share a colour, once there are more runs than colours."""
INK, GREY = "#1B1B1B", "#8A8A8A"
MOST_POINTS = 400
STYLE: dict[Any, Any] = {
    "axes.titlesize": 9.5,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "legend.frameon": False,
} | dict.fromkeys(
    ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), INK
)
"""Matplotlib settings of a report's figures, over :data:`coderl.scores.plot.STYLE`."""


@dataclass(frozen=True)
class Panel:
    """How a metric is drawn: its title, its unit, and what its values are multiplied by."""

    title: str
    unit: str
    scale: float = 1.0


PANELS = {
    "reward/mean": Panel("Reward", "mean of a step"),
    "reward/passed": Panel("Programs that pass in training", "%", 100),
    "reward/test_pass_rate": Panel("Single tests that hold", "%", 100),
    "policy/entropy": Panel("Entropy", "nats per token"),
    "policy/kl": Panel("Divergence from the reference", "nats per token"),
    "groups/no_signal": Panel("Groups without signal", "%", 100),
    "completion/length": Panel("Length of completions", "tokens"),
    "completion/clipped": Panel("Completions cut off", "%", 100),
    "loss/sft": Panel("Training loss", "nats per token"),
    "val/loss": Panel("Validation loss", "nats per token"),
    "val/pass@1": Panel("Validation pass@1", "%", 100),
    "value/explained_variance": Panel("Variance the critic explains", "share, 1 is all"),
    "grad_norm": Panel("Gradient norm, before clipping", "L2"),
}
"""The metrics of a report, in order. A run has some of them."""

OUTCOMES = {
    "passed": "#0072B2",
    "failed": "#E69F00",
    "error": "#D55E00",
    "timeout": "#CC79A7",
    "syntax_error": "#56B4E9",
    "out_of_memory": "#009E73",
    "no_code": "#B8B8B8",
    "infra_error": INK,
}
PARTS = {"rollout": "#0072B2", "execution": "#E69F00", "scoring": "#009E73", "update": "#CC79A7"}


def smoothed(
    values: NDArray[np.float64], width: int | None = None, weights: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """Centred running mean that leaves out NaN; near the ends over what there is of the window.

    Args:
        values: ``[N]``, of any length.
        width: Number of values in a mean, odd; by default a twelfth of them, 5 at least.
        weights: ``[N]``, above 0: what each value counts in a mean; by default all the same.

    Returns:
        ``[N]``; NaN only where all values of a window are.
    """
    count = len(values)
    half = min((width or window(count)) // 2, count)
    known = np.isfinite(values)
    each = np.where(known, 1.0 if weights is None else weights, 0.0)
    sums = np.concatenate([[0.0], np.cumsum(each * np.where(known, values, 0.0))])
    counts = np.concatenate([[0.0], np.cumsum(each)])
    place = np.arange(count)
    low, high = np.maximum(place - half, 0), np.minimum(place + half + 1, count)
    number = counts[high] - counts[low]
    return np.where(number > 0, (sums[high] - sums[low]) / np.where(number > 0, number, 1.0), np.nan)


def window(count: int) -> int:
    """Width of the running mean over ``count`` steps: odd, and 1 for few steps."""
    return 1 if count < 8 else max(5, count // 12 | 1)


def thinned(series: Series, most: int = MOST_POINTS) -> tuple[Series, int]:
    """A series of at most ``most`` points, each a mean over steps, and the number of steps in a mean."""
    share = math.ceil(len(series) / most) if len(series) else 1
    if share == 1:
        return series, 1
    places = [slice(i, i + share) for i in range(0, len(series), share)]
    steps = np.array([series.steps[place].mean() for place in places])
    means = [
        Series(series.steps[place], series.values[place], series.weights[place]).mean() for place in places
    ]
    samples = np.array([series.weights[place].sum() for place in places])
    return Series(steps, np.array(means), samples), share


def known_metrics(runs: Sequence[Run]) -> list[str]:
    """The metrics of :data:`PANELS` with a finite value in some run."""
    return [name for name in PANELS if _has(runs, name)]


def other_metrics(runs: Sequence[Run]) -> list[str]:
    """The metrics that are in no other figure of a report, such as those of the user's rewards."""
    names = dict.fromkeys(name for run in runs for name in run.metrics)
    apart = ("outcome/", "seconds/", "rollout/samples")
    return [n for n in names if n not in PANELS and not n.startswith(apart) and _has(runs, n)]


def _has(runs: Sequence[Run], name: str) -> bool:
    return any(name in run.metrics and len(run.metrics[name].finite) for run in runs)


def curves(runs: Run | Sequence[Run], names: Sequence[str] | None = None, columns: int = 3) -> Figure:
    """Metrics over the steps, a panel each.

    Args:
        runs: One run, or several.
        names: Metrics; by default those of :data:`PANELS` that there are.
        columns: Panels beside each other.
    """
    runs = _listed(runs)
    names = known_metrics(runs) if names is None else list(names)
    columns = max(1, min(columns, len(names)))
    rows = max(1, math.ceil(len(names) / columns))
    with _figure(11.0 * columns / 3 if columns < 3 else 11.0, 0.35 + 2.25 * rows) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, name in zip(panels, names, strict=False):
            _curve(axes, runs, name)
        for axes in panels[len(names) :]:
            axes.set_axis_off()
        if len(runs) > 1:
            lines, labels = _legend(runs)
            figure.legend(lines, labels, loc="outside upper left", ncols=min(3, len(runs)))
    return figure


def _curve(axes: Axes, runs: Sequence[Run], name: str) -> None:
    panel = PANELS.get(name) or Panel(visible(name), "")
    for place, run in enumerate(runs):
        if name not in run.metrics:
            continue
        series, share = thinned(run.metrics[name])
        values = panel.scale * _drawable(series.values)
        colour, dash = _look(place)
        axes.plot(series.steps, values, "o", color=colour, alpha=0.3, markersize=3.2, markeredgewidth=0)
        finite = np.isfinite(values)
        axes.plot(
            series.steps[finite],
            smoothed(values, weights=series.weights)[finite],
            color=colour,
            linestyle=dash,
            linewidth=1.6,
        )
        if len(series.finite) == 1:
            axes.plot(series.steps, values, "o", color=colour, markersize=4)
        if share > 1:
            axes.set_title(f"a point: {share} steps", loc="right", fontsize=7.5, color=GREY)
    axes.set_title(panel.title)
    axes.set_ylabel(panel.unit)
    if panel.scale == 100:  # shares: no axis below 0, and none so short that it shows noise
        high = max(1.0, axes.get_ylim()[1])
        axes.set_ylim(max(-0.03 * high, axes.get_ylim()[0]), high)
    _steps(axes, runs)


def _drawable(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The values, with gaps for infinities and numbers too large for an axis."""
    return np.where(np.abs(values) < 1e50, values, np.nan)


def _steps(axes: Axes, runs: Sequence[Run]) -> None:
    """The axis of steps, with ticks far enough apart to read."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(runs[0].step_name)
    figure = axes.get_figure(root=True)
    assert figure is not None  # axes always belong to one
    width = axes.get_position().width * figure.get_size_inches()[0]
    axes.xaxis.set_major_locator(MaxNLocator(nbins=max(3, round(1.6 * width)), integer=True, min_n_ticks=1))
    axes.grid(color=INK, alpha=0.12, linewidth=0.6)


def outcomes(run: Run) -> Figure:
    """Outcomes of each step's programs, as stacked shares."""
    shares = {name: run.metrics.get(f"outcome/{name}") for name in OUTCOMES}
    with _figure(11.0, 3.0) as figure:
        _stack(figure.subplots(), run, shares, OUTCOMES, 100.0, "programs, %", "How programs ended")
    return figure


def seconds(run: Run) -> Figure:
    """Seconds of each part of a step, stacked."""
    others = {name.removeprefix("seconds/"): GREY for name in run.metrics if name.startswith("seconds/")}
    colours = PARTS | {name: colour for name, colour in others.items() if name not in PARTS}
    parts = {name: run.metrics.get(f"seconds/{name}") for name in colours}
    with _figure(11.0, 2.6) as figure:
        _stack(figure.subplots(), run, parts, colours, 1.0, "seconds a step", "Where the time goes")
    return figure


def _stack(
    axes: Axes,
    run: Run,
    columns: dict[str, Series | None],
    colours: dict[str, str],
    scale: float,
    unit: str,
    title: str,
) -> None:
    """Stacked areas; each step is as wide as its distance to the next."""
    there = {name: thinned(s)[0] for name, s in columns.items() if s is not None and np.nansum(s.values) > 0}
    steps = sorted({step for series in there.values() for step in series.steps.tolist()})
    if steps:
        ends = [*steps, 2 * steps[-1] - steps[-2] if len(steps) > 1 else steps[-1] + 1]
        at = {step: place for place, step in enumerate(steps)}
        heights = np.zeros((len(there), len(ends)))
        for row, series in zip(heights, there.values(), strict=True):
            row[[at[step] for step in series.steps.tolist()]] = scale * np.nan_to_num(
                _drawable(series.values)
            )
            row[-1] = row[-2]
        edges = np.array(ends) - (ends[1] - ends[0]) / 2
        axes.stackplot(
            edges,
            heights,
            labels=[visible(name.replace("_", " ")) for name in there],
            colors=[colours[name] for name in there],
            step="post",
            linewidth=0,
            alpha=0.9,
        )
        axes.set_xlim(edges[0], edges[-1])
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.0, 1.02))
    axes.set(title=title, ylabel=unit)
    if scale == 100.0:
        axes.set_ylim(0, 100)
    _steps(axes, [run])


def scores(runs: Run | Sequence[Run]) -> Figure:
    """Held-out pass@1 before and after training, with its intervals."""
    runs = _listed(runs)
    with _figure(max(3.0, 1.6 + 1.5 * len(runs)), 3.2) as figure:
        _bars(figure.subplots(), runs)
    return figure


def _bars(axes: Axes, runs: Sequence[Run]) -> None:
    """Two bars for each run with scores, before in grey and after in the colour of its curve."""
    there = [(place, run) for place, run in enumerate(runs) if _has_scores(run)]
    for at, (place, run) in enumerate(there):
        for shift, side, colour in zip((-0.2, 0.2), run.held_out, (GREY, _look(place)[0]), strict=True):
            if side and side.get("pass@1") is not None:
                _bar(axes, at + shift, side, colour)
    axes.set(title="Held-out pass@1, 95 % intervals", ylabel="%", xlim=(-0.6, max(len(there), 1) - 0.4))
    if len(runs) == 1:
        axes.set_xticks([-0.2, 0.2], ["before", "after"])
    else:
        axes.set_title("Held-out pass@1 before (grey) and after, 95 % intervals")
        names = [
            "\n".join(textwrap.wrap(visible(run.name), max(8, 90 // len(there)))[:4]) for _, run in there
        ]
        axes.set_xticks(range(len(there)), names, fontsize=8)
    axes.set_ylim(0, max(5.0, 1.12 * axes.get_ylim()[1]))
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)


def _has_scores(run: Run) -> bool:
    return any(side and side.get("pass@1") is not None for side in run.held_out)


def _bar(axes: Axes, place: float, side: dict[str, Any], colour: str) -> None:
    value = 100 * side["pass@1"]
    low, high = (100 * end for end in side.get("interval") or (side["pass@1"],) * 2)
    axes.bar([place], [value], width=0.36, color=colour, alpha=0.9)
    axes.errorbar(
        [place],
        [value],
        [[max(value - low, 0.0)], [max(high - value, 0.0)]],
        color=INK,
        capsize=3,
        linewidth=1,
    )
    label = percent(side["pass@1"]).removesuffix(" %")
    axes.annotate(label, (place, high), (0, 3), textcoords="offset points", ha="center", va="bottom")


def cover(runs: Run | Sequence[Run]) -> Figure | None:
    """One wide figure for a README: programs that pass over the steps, and held-out pass@1 before and after.

    Returns:
        The figure; None where there is nothing to draw.
    """
    runs = _listed(runs)
    drawn = next(
        (name for name in ("reward/passed", "loss/sft", *known_metrics(runs)) if _has(runs, name)), None
    )
    measured = any(map(_has_scores, runs))
    if drawn is None and not measured:
        return None
    wide = min(1.1 + 0.7 * len(runs), 3.6)
    with _figure(11.0, 3.3) as figure:
        # A bar takes as much room in any figure; the curve has the rest.
        ratios = [max(11.0 - 1.6 * wide, 4.0), 1.6 * wide] if drawn and measured else [1.0]
        panels = figure.subplots(1, len(ratios), squeeze=False, width_ratios=ratios)[0]
        if drawn:
            _curve(panels[0], runs, drawn)
        if measured:
            _bars(panels[-1], runs)
        if len(runs) > 1:
            lines, labels = _legend(runs)
            figure.legend(lines, labels, loc="outside upper left", ncols=min(3, len(runs)))
    return figure


def _legend(runs: Sequence[Run]) -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D

    looks = [_look(place) for place in range(len(runs))]
    lines = [Line2D([], [], color=colour, linestyle=dash) for colour, dash in looks]
    return lines, [textwrap.shorten(visible(run.name), 60, placeholder="...") for run in runs]


def _look(place: int) -> tuple[str, Any]:
    """Colour and dashes of a run."""
    return COLOURS[place % len(COLOURS)], DASHES[place // len(COLOURS) % len(DASHES)]


def _listed(runs: Run | Sequence[Run]) -> list[Run]:
    return [runs] if isinstance(runs, Run) else list(runs)


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    """An empty figure of a size in inches, in the report's style."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with quiet(), matplotlib.rc_context(plot.STYLE | STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore warnings on letters that the font lacks, drawn as boxes, and on vast numbers."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield
