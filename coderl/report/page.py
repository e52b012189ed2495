"""The page: one HTML file that needs nothing else, and runs no script.

What a model wrote is hostile text, and so may be names and values in files that somebody sent. Jinja escapes
everything that is put into the template, control characters in it are spelled out
(:func:`coderl.report.programs.visible`), and the page's own content policy forbids scripts and anything from
elsewhere.
"""

from __future__ import annotations

import html
import io
import re
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coderl import __version__
from coderl.report import figures, words
from coderl.report.programs import changes, lost, printable, visible, won

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from coderl.report.programs import Change
    from coderl.runs.reading import Run

MARK = "coderl report"
"""Is noted in what is written here as what made it, so that nothing else is ever written over."""
SHOWN = 8  # problems won, and as many lost, with their programs
MOMENTS = 8  # of training, from which completions are shown
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
        finalize=lambda value: value if hasattr(value, "__html__") else visible(str(value)),
    )
    environment.filters |= {
        "percent": words.percent,
        "between": words.between,
        "points": words.points,
        "setting": words.setting,
        "verdict": words.verdict,
        "printable": lambda text: printable(str(text)),
    }
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    text = template.render(
        mark=MARK,
        version=__version__,
        made=f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        runs=[_told(run, f"r{number}") for number, run in enumerate(runs)],
        table=words.table(runs),
        unlike=words.unlike(runs) if len(runs) > 1 else [],
        **_shared_figures(runs),
    )
    return text.encode("utf-8", "backslashreplace").decode("utf-8")  # names may hold lone surrogates


def _shared_figures(runs: Sequence[Run]) -> dict[str, Any]:
    known, others = figures.known_metrics(runs), figures.other_metrics(runs)
    cover = figures.cover(runs)
    return {
        "cover": svg(cover, "What was won", "c") if cover else "",
        "curves": svg(figures.curves(runs, known), f"Curves: {', '.join(known)}", "k") if known else "",
        "others": svg(figures.curves(runs, others), f"Curves: {', '.join(others)}", "o") if others else "",
    }


def _told(run: Run, key: str) -> dict[str, Any]:
    """What the template says of one run."""
    found = changes(run)
    stacks = {
        "outcomes": (figures.outcomes, "outcome/", "How programs ended"),
        "seconds": (figures.seconds, "seconds/", "Where the time goes"),
    }
    drawn = {
        name: svg(draw(run), title, key + name[0]) if any(m.startswith(start) for m in run.metrics) else ""
        for name, (draw, start, title) in stacks.items()
    }
    return {
        "run": run,
        "headline": words.headline(run),
        "tasks": [_task(run, name) for name in dict.fromkeys([*run.tasks, *run.tasks_before])],
        "groups": [_group("won", won(found)), _group("lost", lost(found))],
        "compared": bool(found),
        "moments": moments(run),
        **drawn,
    }


def _task(run: Run, name: str) -> dict[str, Any]:
    """The scores of a task before and after, each with what it rests on."""
    before, after = run.tasks_before.get(name), run.tasks.get(name)
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


def _group(verb: str, found: list[Change]) -> dict[str, Any]:
    return {"verb": verb, "ids": [change.id for change in found], "shown": found[:SHOWN]}


def moments(run: Run, most: int = MOMENTS) -> list[dict[str, Any]]:
    """The worst and the best sampled program of moments spread over the training.

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


def svg(figure: Figure, title: str, key: str) -> str:
    """A figure as SVG to stand in a page, as wide as there is room, its ink in the colour of the page's text.

    Args:
        figure: Of :mod:`coderl.report.figures`.
        title: What is told to those who cannot see it.
        key: Goes before the names inside, so that those of two figures on a page do not meet.
    """
    import matplotlib

    whole = io.StringIO()
    with figures.quiet(), matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": key}):
        figure.savefig(whole, format="svg", transparent=True, metadata={"Date": None})
    text = whole.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="|(?<=href=")#|(?<=url\()#', lambda found: f"{found[0]}{key}-", text)
    width = figure.get_size_inches()[0]
    head = f'<svg role="img" aria-label="{html.escape(visible(title))}" style="max-width:{1.1 * width:.1f}in"'
    text = re.sub(
        r'<svg( (?!width=|height=)[\w:]+="[^"]*"| (?:width|height)="[^"]*")*',
        lambda m: head + _kept(m[0]),
        text,
        count=1,
    )
    return text.replace(figures.INK, "currentColor")


def _kept(opening: str) -> str:
    """The attributes of the outermost tag but for its size, which would keep it from fitting the page."""
    return re.sub(r'<svg| (?:width|height)="[^"]*"', "", opening)


def png(figure: Figure) -> bytes:
    """A figure as PNG on white."""
    whole = io.BytesIO()
    with figures.quiet():
        figure.savefig(whole, format="png", dpi=DOTS_PER_INCH, facecolor="white", metadata={"Software": MARK})
    return whole.getvalue()
