"""The report on a run: one HTML page to send to others, and its parts for notebooks.

A :class:`~coderl.runs.reading.Run` comes in; sentences, figures and HTML go out. Of the run's files only the
programs are read here. Nothing here trains or loads torch.

>>> from coderl.report import curves, headline, load_run
>>> run = load_run("checkpoints/embedded-embedded-grpo-qlora")  # doctest: +SKIP
>>> print(headline(run))  # doctest: +SKIP
>>> curves(run)  # doctest: +SKIP
"""

from coderl.report.figures import cover, curves, outcomes, scores, seconds
from coderl.report.page import moments, page
from coderl.report.programs import Change, changes, lost, won
from coderl.report.text import headline, table
from coderl.runs.metrics import Series
from coderl.runs.reading import Run, load_run, load_runs

__all__ = [
    "Change",
    "Run",
    "Series",
    "changes",
    "cover",
    "curves",
    "headline",
    "load_run",
    "load_runs",
    "lost",
    "moments",
    "outcomes",
    "page",
    "scores",
    "seconds",
    "table",
    "won",
]
