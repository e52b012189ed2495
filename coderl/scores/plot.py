"""A comparison as a figure: pass@k of both, the paired difference, problems won and lost.

Matplotlib loads with the first figure, not with this module.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections import Counter
from typing import TYPE_CHECKING, Any

from coderl.files import write_output
from coderl.scores.numbers import percent, points, points_between

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

    from coderl.scores.comparison import Comparison

COLOURS = {"A": "#D55E00", "B": "#0072B2", "": "#6F6F6F"}
"""Of each side, and of neither. Okabe and Ito's colours, which colour-blind readers can tell apart."""
PALE = "#E4E4E4"
WIDTH, DOTS_PER_INCH = 10.0, 160  # inches
NAME_WIDTH = 105  # characters of a name in a line
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "text.usetex": False,
    "text.parse_math": False,  # a name may hold dollar signs
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
}
"""Matplotlib settings of all of coderl's figures."""
_COMPARISON_STYLE = STYLE | {
    "axes.spines.left": False,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "ytick.left": False,
    "xtick.color": COLOURS[""],
    "ytick.labelcolor": "black",
}


def plot(comparisons: Sequence[Comparison], path: Path) -> None:
    """Draw a comparison as a PNG, 1600 pixels wide: for each task a strip of panels.

    Raises:
        UserError: It cannot be written.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sides = (("A", comparisons[0].name_a), ("B", comparisons[0].name_b))
    names = [(letter, textwrap.wrap(name, NAME_WIDTH) or [""]) for letter, name in sides]
    heights = [0.12 + 0.17 * sum(len(lines) for _, lines in names), *map(_height, comparisons)]
    with matplotlib.rc_context(_COMPARISON_STYLE), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing"
        )  # a letter that the font lacks is drawn as a box
        figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
        FigureCanvasAgg(figure)
        strips = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights, hspace=0.03)[:, 0]
        _draw_names(strips[0], names, heights[0])
        for strip, comparison in zip(strips[1:], comparisons, strict=True):
            _draw_task(strip, comparison)
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=DOTS_PER_INCH)
    write_output(path, png.getvalue())


def _height(comparison: Comparison) -> float:
    """Inches for a task: title, notes, and a row for each k or the square that shares are drawn in."""
    rows = max(1.2 + 0.6 * len(comparison.scores), 3.0 if _has_shares(comparison) else 0)
    return rows + 0.16 * len(_notes(comparison)) + 0.2 * len(_title(comparison))


def _title(comparison: Comparison) -> list[str]:
    return textwrap.wrap(f"{comparison.task}: {comparison.verdict}", 100)


def _notes(comparison: Comparison) -> list[str]:
    """Problems left out and warnings, for somebody who sees the figure alone, as lines."""
    notes = [
        comparison.left_out,
        *(line.removeprefix(f"{comparison.task}: ") for line in comparison.warnings),
    ]
    return textwrap.wrap("; ".join(filter(None, notes)), 150, max_lines=5, placeholder=" ...")


def _has_shares(comparison: Comparison) -> bool:
    """Whether some problem has several samples, so that shares other than 0 and 1 occur."""
    return any(judged > 1 for _, judged in comparison.a + comparison.b)


def _draw_names(strip: SubFigure, names: Sequence[tuple[str, list[str]]], height: float) -> None:
    """At the top, which letter and colour stands for which file."""
    top = 0.09
    for letter, lines in names:
        style: dict[str, Any] = {"va": "top", "ha": "left", "color": COLOURS[letter], "fontsize": 10}
        strip.text(0.012, 1 - top / height, letter, fontweight="bold", **style)
        strip.text(0.035, 1 - top / height, "\n".join(lines), **style)
        top += 0.17 * len(lines)


def _draw_task(strip: SubFigure, comparison: Comparison) -> None:
    title = "\n".join(_title(comparison))
    strip.suptitle(title, x=0.012, ha="left", fontsize=11, fontweight="bold")
    if notes := _notes(comparison):
        strip.supxlabel("\n".join(notes), x=0.012, ha="left", fontsize=8, color=COLOURS[""])
    shares = _has_shares(comparison)
    widths = [2.6, 2.4, 2.0, 2.0] if shares else [3.2, 3.2, 2.2]
    panels = strip.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    _draw_scores(panels[0], comparison)
    _draw_differences(panels[1], comparison)
    _draw_problems(panels[2], comparison)
    if shares:
        _draw_shares(panels[3], comparison)


def _draw_scores(panel: Axes, comparison: Comparison) -> None:
    """Both scores of each k, a dot on its interval."""
    for place, score in enumerate(comparison.scores.values()):
        for letter, value, ends, shift in (
            ("A", score.a, score.interval_a, -0.16),
            ("B", score.b, score.interval_b, 0.16),
        ):
            _dot(panel, value, ends, place + shift, COLOURS[letter])
            up = letter == "A"  # A's figure above it, B's below
            panel.annotate(
                percent(value),
                (100 * value, place + shift),
                (0, 5 if up else -6),
                textcoords="offset points",
                ha="center",
                va="bottom" if up else "top",
                color=COLOURS[letter],
            )
    _rows(panel, [f"pass@{k}" for k in comparison.scores])
    panel.margins(x=0.14)
    left, right = panel.get_xlim()
    middle = (left + right) / 2
    # Four points at least: equal scores would otherwise give an axis of no width.
    panel.set_xlim(min(left, middle - 2), max(right, middle + 2))
    panel.set_title("score and 95 % interval, %")


def _draw_differences(panel: Axes, comparison: Comparison) -> None:
    """The paired difference of each k on its interval, and a line at no difference."""
    panel.axvline(0, color="black", linewidth=0.9, linestyle=(0, (4, 3)))
    for place, score in enumerate(comparison.scores.values()):
        colour = COLOURS[score.better]
        _dot(panel, score.difference, score.interval, place, colour)
        panel.annotate(
            f"{points(score.difference)}  ({points_between(score.interval)})",
            (0.5, place),
            (0, 6),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="center",
            color=colour,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    reach = max(1.0, *(100 * abs(end) for score in comparison.scores.values() for end in score.interval))
    panel.set_xlim(-1.12 * reach, 1.12 * reach)
    _rows(panel, [""] * len(comparison.scores))
    panel.set_title("B − A, points")


def _draw_problems(panel: Axes, comparison: Comparison) -> None:
    """On how many problems each side does better, A to the left and B to the right, and the ties below."""
    won, lost = len(comparison.won), len(comparison.lost)
    panel.barh([0, 0], [-lost, won], height=0.5, color=[COLOURS["A"], COLOURS["B"]])
    panel.plot([0, 0], [-0.35, 0.35], color="black", linewidth=0.9)
    for letter, number, side in (("A", lost, -1), ("B", won, 1)):
        panel.annotate(
            f"{letter}  {number}" if side > 0 else f"{number}  {letter}",
            (side * number, 0),
            (4 * side, 0),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            va="center",
            color=COLOURS[letter],
            fontweight="bold",
        )
    reach = 1.8 * max(won, lost, 1)
    panel.set(xlim=(-reach, reach), ylim=(1.0, -0.7), xticks=[], yticks=[])
    panel.spines["bottom"].set_visible(False)
    panel.set_title("problems done better")
    ties = f"no difference on {comparison.tied} of {comparison.problems}\n{comparison.evidence}"
    panel.text(0, 0.42, ties, ha="center", va="top", linespacing=1.4)


def _draw_shares(panel: Axes, comparison: Comparison) -> None:
    """A bubble for each pair of shares, with an area by its number of problems, and the line of no change."""
    bubbles = Counter(comparison.shares)
    most = max(bubbles.values())
    x, y = ([100 * share for share in side] for side in zip(*bubbles, strict=True))
    panel.plot([0, 100], [0, 100], color="black", linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    panel.scatter(
        x,
        y,
        s=[max(6, 320 * number / most) for number in bubbles.values()],
        c=[COLOURS["B" if b > a else "A" if b < a else ""] for a, b in bubbles],
        alpha=0.6,
        linewidths=0,
        clip_on=False,
        zorder=2,
    )
    panel.spines["left"].set_visible(True)
    panel.set(xlim=(-4, 104), ylim=(-4, 104), xticks=[0, 50, 100], yticks=[0, 50, 100], aspect="equal")
    panel.tick_params(left=True, color=COLOURS[""], labelcolor=COLOURS[""])
    panel.set_xlabel("samples of A that pass, %", color=COLOURS["A"])
    panel.set_ylabel("of B, %", color=COLOURS["B"])
    panel.set_title("each problem")


def _dot(panel: Axes, value: float, ends: tuple[float, float], place: float, colour: str) -> None:
    low, high = (100 * end for end in ends)
    panel.plot([low, high], [place, place], color=colour, linewidth=2, alpha=0.5, solid_capstyle="butt")
    panel.plot([100 * value], [place], "o", color=colour, markersize=6, markeredgewidth=0)


def _rows(panel: Axes, labels: Sequence[str]) -> None:
    """One row for each k, the first on top."""
    panel.set_yticks(range(len(labels)), labels)
    panel.set_ylim(len(labels) - 0.4, -0.6)
    panel.locator_params(axis="x", nbins=6)
    panel.grid(axis="x", color=PALE, linewidth=0.6)
    panel.set_axisbelow(True)
