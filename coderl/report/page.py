"""The report's page: one HTML file that needs no other file and runs no script.

Programs of a model are hostile text, and so may be names and values in a run folder that somebody sent. Jinja
escapes everything that goes into the template, control characters are spelled out
(:func:`coderl.report.programs.visible`), and the page's content policy allows no scripts, and images only as
``data:`` URIs.
"""

from __future__ import annotations

import base64
import io
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coderl import __version__
from coderl.report import figures
from coderl.report import text as sentences
from coderl.report.programs import changes, lost, printable, visible, won
from coderl.scores import numbers
from coderl.scores.gain import left_out

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from coderl.runs.reading import Run

MARK = "coderl report"
"""The generator noted in pages and PNGs, by which a later report knows that it may overwrite them."""
SHOWN = 8  # problems won that are shown with their programs, and as many lost
MOMENTS = 8  # steps of training from which completions are shown
DOTS_PER_INCH = 160


def page(runs: Sequence[Run]) -> str:
    """The whole page on one run or several, as HTML.

    Raises:
        UserError: A file of the run is damaged.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # Macros return Markup, whose text has come through here already.
        finalize=lambda value: value if hasattr(value, "__html__") else visible(str(value)),
    )
    environment.filters |= {
        "percent": numbers.percent,
        "between": numbers.between,
        "points": numbers.points,
        "points_between": numbers.points_between,
        "left_out": left_out,
        "setting": sentences.setting,
        "verdict": sentences.verdict,
        "printable": lambda text: printable(str(text)),
    }
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    known, others, cover = figures.known_metrics(runs), figures.other_metrics(runs), figures.cover(runs)
    html = template.render(
        mark=MARK,
        version=__version__,
        made=f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        entries=[_entry(run) for run in runs],
        table=sentences.table(runs),
        differing=sentences.differing_settings(runs) if len(runs) > 1 else [],
        cover=image(cover, "Summary") if cover else None,
        curves=image(figures.curves(runs, known), "Curves") if known else None,
        others=image(figures.curves(runs, others), "Curves") if others else None,
    )
    return html.encode("utf-8", "backslashreplace").decode("utf-8")  # names may hold lone surrogates


def _entry(run: Run) -> dict[str, Any]:
    """What the template shows of one run."""
    found = changes(run)
    has_outcomes = any(name.startswith("outcome/") for name in run.metrics)
    has_seconds = any(name.startswith("seconds/") for name in run.metrics)
    return {
        "run": run,
        "headline": sentences.headline(run),
        "tasks": [_task(run, name) for name in dict.fromkeys([*run.tasks, *run.tasks_before])],
        "groups": [
            {"verb": verb, "ids": [change.id for change in group], "shown": group[:SHOWN]}
            for verb, group in (("won", won(found)), ("lost", lost(found)))
        ],
        "compared": bool(found),
        "moments": moments(run),
        "outcomes": image(figures.outcomes(run), "Areas over the steps") if has_outcomes else None,
        "seconds": image(figures.seconds(run), "Areas over the steps") if has_seconds else None,
    }


def _task(run: Run, name: str) -> dict[str, Any]:
    """The scores of a task before and after training, with the settings of the evaluation."""
    before, after = run.tasks_before.get(name), run.tasks.get(name)
    # Without a results file the summary still has the scores before training, of the held-out task only.
    if before is None and name == next(iter(run.tasks), None):
        before = run.summary.get("before")
    sides = [(when, side) for when, side in (("before", before), ("after", after)) if side]
    return {
        "name": name,
        "sides": sides,
        "ks": list(dict.fromkeys(key for _, side in sides for key in side if key.startswith("pass@"))),
        "settings": sides[-1][1].get("settings") or {},
        "comparison": next((each for each in run.comparisons if each.task == name), None),
    }


def moments(run: Run, most: int = MOMENTS) -> list[dict[str, Any]]:
    """The worst and the best sampled program of some steps, spread evenly over the training.

    Args:
        run: The run.
        most: Number of steps, at most.

    Returns:
        For each its ``step``, and ``worst`` and ``best``: rows of ``completions.jsonl``.
    """
    steps = list(dict.fromkeys(row["rollout_step"] for row in run.completions))
    count = min(most, len(steps))
    chosen = {steps[round(i * (len(steps) - 1) / max(count - 1, 1))] for i in range(count)}
    found = []
    for step in (step for step in steps if step in chosen):
        rows = [row for row in run.completions if row["rollout_step"] == step]
        ranked = sorted(rows, key=lambda row: row["reward"])
        found.append({"step": step, "worst": ranked[0], "best": ranked[-1]})
    return found


def image(figure: Figure, kind: str) -> dict[str, str]:
    """A figure for the template's ``<img>``.

    Args:
        figure: From :mod:`coderl.report.figures`.
        kind: Kind of figure, such as ``"Curves"``, for its alternative text.

    Returns:
        ``src``, an SVG as a ``data:`` URI; ``alt``, the kind and the titles of its panels; ``width``, the
        largest width to show it at, such as ``"12.1in"``.
    """
    import matplotlib

    svg = io.BytesIO()
    # Letters as paths: the reader's machine need not have the font. White: its ink is dark in dark mode, too.
    with figures.quiet(), matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": MARK}):
        figure.savefig(svg, format="svg", facecolor="white", metadata={"Date": None})
    titles = ", ".join(title for axes in figure.axes if (title := axes.get_title(loc="left")))
    return {
        "src": f"data:image/svg+xml;base64,{base64.b64encode(svg.getvalue()).decode('ascii')}",
        "alt": f"{kind}: {titles}",
        "width": f"{1.1 * figure.get_size_inches()[0]:.1f}in",
    }


def png(figure: Figure) -> bytes:
    """A figure as PNG on white."""
    data = io.BytesIO()
    with figures.quiet():
        figure.savefig(data, format="png", dpi=DOTS_PER_INCH, facecolor="white", metadata={"Software": MARK})
    return data.getvalue()
